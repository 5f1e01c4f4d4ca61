"""Whether a model fits a card at a context and batch: the assumptions, the bytes by formula, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ..config import HybridConfig
from ..device import DTYPES, torch_dtype
from ..errors import InputError
from ..quantities import check_between
from .hardware import GIB, Hardware, Reserve
from .inference import MOST_SEQUENCES, Change, MemoryReport, Verdict, changes, memory, verdict
from .speed import Throughput, throughput
from .state_formats import STATE_FORMATS, runs_here, state_caution, vllm_refusal
from .vllm import flags

if TYPE_CHECKING:
    from .simulate import Simulation
    from .stored_weights import StoredWeights

KV_DTYPES = DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn}
LONGEST = 131072  # tokens of a context that nobody has chosen


@dataclasses.dataclass(frozen=True)
class Fit(Reserve):
    """Context (tokens a sequence; None: see `of`), batch (sequences), dtypes, tokens of a prefill chunk, vLLM's mode
    for the states of Mamba layers, GPUs that vLLM shares the model out over; and what of a card is not the model's."""

    context: int | None = None
    batch: int = 1
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    ssm_dtype: str = "float32"
    chunk: int = 512
    mamba_cache_mode: str = "none"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between(self, "fit.", 1, math.inf, "context", "batch", "chunk", "tensor_parallel")
        if self.batch > MOST_SEQUENCES:
            raise InputError(f"fit.batch is {self.batch:,}; expected {MOST_SEQUENCES:,} at most")
        for name, known in (("weight_dtype", DTYPES), ("ssm_dtype", STATE_FORMATS), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in known:
                raise InputError(f"fit.{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")

    def of(self, config: HybridConfig) -> Fit:
        """With a context where none was given: what the model is made for, at most `LONGEST`."""
        if self.context is not None:
            return self
        return dataclasses.replace(self, context=min(LONGEST, config.max_position_embeddings))

    @property
    def length(self) -> int:
        """The context, once there is one."""
        assert self.context is not None
        return self.context

    def assumptions(self, hardware: Hardware) -> dict[str, Any]:
        """The arguments of `memory` beside context and batch."""
        return {
            "weight_dtype": torch_dtype(self.weight_dtype),
            "kv_dtype": KV_DTYPES[self.kv_dtype],
            "ssm_dtype": STATE_FORMATS[self.ssm_dtype].dtype,
            "chunk": self.chunk,
            "place": hardware.place,
            "mamba_cache_mode": self.mamba_cache_mode,
            "tensor_parallel": self.tensor_parallel,
        }

    def check_run(self, method: str, model: str, *, quantised: bool) -> None:
        """Raises InputError for what the inference path does not run, which a simulation and a measurement take; of
        quantised weights they would be of plain ones."""
        if self.kv_dtype != self.weight_dtype:
            wrong = (
                f"which keeps keys and values in the weights' dtype: fit.kv_dtype is {self.kv_dtype},"
                f" fit.weight_dtype {self.weight_dtype}"
            )
        elif not runs_here(self.ssm_dtype):
            wrong = f"which keeps SSM states in {', '.join(DTYPES)}: fit.ssm_dtype is {self.ssm_dtype}"
        elif quantised:
            wrong = (
                f"whose weights are plain; those of {model} are quantised, which method=formula counts as the files"
                " have them"
            )
        elif self.tensor_parallel > 1:
            wrong = f"which is one GPU's; fit.tensor_parallel is {self.tensor_parallel}, which method=formula counts"
        else:
            return
        raise InputError(f"method={method} runs the inference path, {wrong}")

    def estimate(self, config: HybridConfig, hardware: Hardware, held: StoredWeights | None = None) -> Estimate:
        """The bytes by formula, and the verdict on them, of each GPU where there are several; quantised weights are
        what is `held`. Raises InputError where the card has no memory, or the model does not share out."""
        fit = self.of(config)
        if self.tensor_parallel > 1 and hardware.device != "cuda":
            raise InputError(
                f"fit.tensor_parallel is {self.tensor_parallel} on hardware={hardware.name}; expected 1, or a GPU"
            )
        budget = fit.budget(hardware)
        report = memory(config, fit.length, fit.batch, budget=budget, held=held, **fit.assumptions(hardware))
        return Estimate(config, hardware, fit, report, verdict(config, report, budget), held)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a model takes of a card by formula, of each of several where it is shared out, and whether the card has
    it."""

    config: HybridConfig
    hardware: Hardware
    fit: Fit
    memory: MemoryReport
    verdict: Verdict
    held: StoredWeights | None = None

    @property
    def fits(self) -> bool:
        return self.verdict.fits

    def changes(self) -> list[Change]:
        """What would help a model that does not fit, from the least cost on."""
        if self.fits:
            return []
        how = self.fit.assumptions(self.hardware) | {"held": self.held}
        return changes(self.config, self.memory, self.verdict.budget, **how)

    def advice(self) -> str:
        """What would help, in half a sentence."""
        helps = next((change.name for change in self.changes() if change.fits), None)
        if self.verdict.largest_context > 0:
            return f"{self.verdict.largest_context:,} tokens would fit at this batch, or {helps or 'prune further'}"
        return f"no context fits at this batch: {helps or 'prune further, or take a larger card'}"

    def vllm_refusal(self) -> str:
        """Why vLLM does not serve this fit; "" where it does."""
        if self.memory.ssm and (refusal := vllm_refusal(self.fit.ssm_dtype, self.hardware)):
            return refusal
        if not self.memory.vllm.max_num_seqs:
            return "vLLM would not start at this length: the blocks do not hold one request"
        return ""

    def vllm_flags(self) -> list[str]:
        """The flags of `vllm serve` for this fit; none where vLLM does not keep such states."""
        if self.memory.ssm and vllm_refusal(self.fit.ssm_dtype, self.hardware):
            return []
        return flags(
            self.memory.vllm,
            self.hardware,
            context=self.memory.context,
            utilization=max(self.verdict.budget, 0) / (self.hardware.usable_gib * GIB),
            ssm_dtype=self.fit.ssm_dtype,
            kv_dtype=self.fit.kv_dtype,
            dtype=self.fit.weight_dtype,
            mamba=self.memory.ssm > 0,
            tensor_parallel=self.fit.tensor_parallel,
        )

    def cautions(self) -> list[str]:
        """What of the fit the card does not run, each with its remedy, and what states are known to cost."""
        cost = state_caution(self.fit.ssm_dtype) if self.memory.ssm else ""
        return [sentence for sentence in (self.without_bfloat16(), cost) if sentence]

    def without_bfloat16(self) -> str:
        types = ("weight_dtype", "kv_dtype", "ssm_dtype")
        wrong = [f"fit.{name}" for name in types if getattr(self.fit, name) == "bfloat16"]
        if self.hardware.has_bfloat16 or not wrong:
            return ""
        card, capability = self.hardware.name, self.hardware.compute_capability
        return (
            f"{card} has no bfloat16 products (compute capability {capability}), and vLLM refuses bfloat16 there; the"
            f" bytes are those of float16: give {', '.join(f'{name}=float16' for name in wrong)}"
        )

    def layers_with(self, state: str) -> str:
        """How many layers of which kinds keep this of a sequence: "token", "ssm" or "conv" (see `StateBytes`)."""
        kinds = [kind.name for kind in self.config.kinds if getattr(kind.state_bytes(self.config, 1, 1, 1), state)]
        return ", ".join(f"{count} {name} layers" for name, count in Counter(kinds).items()) or "no layers"

    def simulate(self) -> Simulation:
        """The inference path run without memory."""
        from .simulate import simulate

        fit = self.fit
        return simulate(
            self.config, fit.length, fit.batch, chunk=fit.chunk, weight_dtype=torch_dtype(fit.weight_dtype),
            ssm_dtype=torch_dtype(fit.ssm_dtype), place=self.hardware.place,
        )  # fmt: skip

    def throughput(self) -> Throughput | None:
        """Tokens a second, estimated: a third of the context read and two thirds written, as of the published 8k and
        16k (arXiv 2508.14444), in the largest batch that fits; None where none does."""
        if not (batch := self.verdict.largest_batch):
            return None
        length, dtypes = self.fit.length, self.fit.assumptions(self.hardware)
        read = max(length // 3, 1)
        return throughput(
            self.config, self.hardware, input_tokens=read, output_tokens=max(length - read, 1),
            batch=batch, held=self.held, tensor_parallel=self.fit.tensor_parallel,
            **{name: dtypes[name] for name in ("weight_dtype", "kv_dtype", "ssm_dtype")},
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        report = self.memory
        derived = {"total": report.total, "transient": report.transient, "peak": report.peak}
        return {
            "memory": dataclasses.asdict(report) | derived,
            "verdict": dataclasses.asdict(self.verdict),
            "hardware": dataclasses.asdict(self.hardware),
            "tensor_parallel": self.fit.tensor_parallel,
            "gib": GIB,
        }
