"""What `limbeck bench` compares: models under loads, measured here, held against the roofline, and carried over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import HybridConfig
from ..errors import InputError
from .hardware import Hardware, Reserve
from .inference import memory, verdict
from .speed import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, Load, Speed, predicted, roofline

if TYPE_CHECKING:
    from .stored_weights import StoredWeights

# Assumed where nothing is measured.
ASSUMED: dict[str, Any] = {"compute_efficiency": COMPUTE_EFFICIENCY, "bandwidth_efficiency": BANDWIDTH_EFFICIENCY}


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """A model under a load: measured here and the roofline here, and what the profile's card would do."""

    model: str
    load: Load
    measured: Speed | None
    limit: Speed | None
    estimate: Speed | None

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"model": self.model} | dataclasses.asdict(self.load)
        for name in ("measured", "limit", "estimate"):
            speed = getattr(self, name)
            content[name] = None
            if speed is not None:
                content[name] = dataclasses.asdict(speed) | {"tokens_per_second": speed.tokens_per_second(self.load)}
        return content


def load_of(
    text: str,
    config: HybridConfig,
    batch: int | str,
    hardware: Hardware,
    reserve: Reserve,
    types: Mapping[str, Any],
    chunk: int,
    held: StoredWeights | None = None,
) -> Load:
    """ "1k/8k": 1024 tokens in, 8192 out; the batch as given, or the largest that fits the profile at full length, in
    the dtypes that are those there, the prompt prefilled in chunks of `chunk` tokens."""
    parts = text.lower().split("/")
    try:
        source, target = (int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts)
    except ValueError:
        raise InputError(f"lengths: {text!r} is no pair; expected INPUT/OUTPUT such as 1k/8k or 128/64") from None
    if isinstance(batch, int):
        return Load(source, target, batch)
    dtypes: dict[str, Any] = {"weight_dtype": types["dtype"], "ssm_dtype": types["ssm_dtype"]}
    Load(source, target, 1)  # refuses what is below 1
    one = memory(config, source + target, 1, chunk=chunk, place=hardware.place, held=held, **dtypes)
    largest = verdict(config, one, reserve.budget(hardware)).largest_batch
    if largest < 1:
        raise InputError(f"batch=fit: not one sequence of {source} + {target} tokens fits {hardware.name}")
    return Load(source, target, largest)


def row_of(
    name: str,
    load: Load,
    config: HybridConfig,
    measured: Speed | None,
    here: Hardware | None,
    there: Hardware,
    types: Mapping[str, Any],
    types_there: Mapping[str, Any],
    *,
    carries: bool,
    held: StoredWeights | None = None,
) -> BenchRow:
    """A model under a load in these dtypes here, and in those on the card `there`. With `carries` what is measured is
    carried over to that card, as a GPU's is; a CPU's says nothing of one. Of quantised weights `held` are the bytes
    there; what is measured runs with plain ones."""
    limit = None if here is None else roofline(config, here, load, **types)
    if measured is not None and limit is not None and carries:
        target = roofline(config, there, load, **types_there)
        return BenchRow(name, load, measured, limit, None if target is None else predicted(measured, limit, target))
    return BenchRow(name, load, measured, limit, roofline(config, there, load, held=held, **types_there, **ASSUMED))


def figures(speed: Speed | None, load: Load) -> list[str]:
    if speed is None:
        return ["-", "-", "-"]
    return [seconds(speed.first_token_seconds), seconds(speed.step_seconds), f"{speed.tokens_per_second(load):,.1f}"]


def seconds(count: float) -> str:
    return f"{count:.2f} s" if count >= 1 else f"{count * 1e3:.2f} ms"


def shares(row: BenchRow) -> list[str]:
    """Of the rooflines of prefill and decoding, how much is reached."""
    if row.measured is None or row.limit is None:
        return ["-", "-"]
    prefill = row.limit.first_token_seconds / row.measured.first_token_seconds
    return [f"{prefill:.0%}", f"{row.limit.step_seconds / row.measured.step_seconds:.0%}"]


def ratios(first: BenchRow, second: BenchRow, there: str) -> str:
    """Tokens a second of the first over those of the second."""
    sentences = []
    for name, place in (("measured", "here"), ("estimate", f"on {there}")):
        one, other = getattr(first, name), getattr(second, name)
        if one is not None and other is not None:
            ratio = one.tokens_per_second(first.load) / other.tokens_per_second(second.load)
            sentences.append(f"{first.model} writes {ratio:.2f} times the tokens of {second.model} {place}")
    return "; ".join(sentences) or "nothing to compare"
