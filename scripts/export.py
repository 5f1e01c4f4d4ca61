"""`limbeck export`: a checkpoint in the dtype and shards asked for, read back and compared before it appears."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distill.report.card import read_licence, write_card
from ..models.checkpoint import Checkpoint, load_model, open_checkpoint, stream_rows, write_checkpoint
from ..models.errors import CheckFailed, InputError
from ..models.families.known import FAMILIES
from ..models.fingerprint import PROVENANCE
from ..models.folder import write_json
from ..models.hybrid import HybridLM
from ..models.tensors import is_finite
from .run.resolve import model_folder, torch_dtype
from .run.show import read_json, result, table
from .run.stage import Facts, run_stage

PARITY = 1e-4


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    output: Path
    dtype: str
    max_shard_bytes: int
    check_tokens: int
    seed: int
    base: str | None = None
    gap: str | None = None

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1 or self.check_tokens < 1:
            raise InputError(
                f"export: max_shard_bytes ({self.max_shard_bytes}) and check_tokens ({self.check_tokens})"
                " must be at least 1"
            )


def run(options: Options) -> None:
    source = model_folder(options.model)
    inputs: dict[str, Path | str] = {"model": source}
    if options.base is not None:
        inputs["base"] = model_folder(options.base)
    if options.gap is not None:
        inputs["gap"] = gap_folder(options.gap)
    run_stage(
        options.output,
        name="export",
        inputs=inputs,
        options={name: getattr(options, name) for name in ("dtype", "max_shard_bytes", "check_tokens", "seed")},
        make=lambda folder, facts: fill(folder, source, options, facts),
    )
    show(options.output)
    result(options.output, {"model": str(options.output)})


def gap_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "gap.json").is_file() or not (folder / PROVENANCE).is_file():
        raise InputError(f"gap={name} is no folder of limbeck evaluate; expected gap.json and {PROVENANCE} in it")
    return folder


def measured(options: Options, facts: Facts) -> tuple[dict[str, Any] | None, str | None]:
    """gap.json's content, and what it calls the model of this export. Raises InputError where it is not about it."""
    if options.gap is None:
        return None, None
    folder, wanted = gap_folder(options.gap), facts.content()["inputs"]["model"]
    made = read_json(folder / PROVENANCE)
    gap = read_json(folder / "gap.json")
    name = next((name for name, found in made["inputs"].items() if found == wanted and name in gap["models"]), None)
    if name is None:
        raise InputError(
            f"gap={options.gap} measured other models than {options.model}; evaluate this one, or leave it out"
        )
    gap["data"]["dtype"] = made["options"]["dtype"]
    return gap, name


def fill(folder: Path, source: Path, options: Options, facts: Facts) -> None:
    """Writes the folder, reads it again and compares logits in float32: with the source rounded to the same dtype
    they have to be the same to the bit; transformers, where it is installed, has to agree too. Raises CheckFailed,
    and InputError where the dtype cannot hold the weights."""
    gap, name = measured(options, facts)
    checkpoint = open_checkpoint(source)
    dtype = torch_dtype(options.dtype)
    write_checkpoint(
        folder,
        checkpoint.config,
        rounded(checkpoint, dtype),
        dtypes=dtype,
        tokenizer_from=source,
        max_shard_bytes=options.max_shard_bytes,
    )
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(checkpoint.config.vocab_size, (1, options.check_tokens), generator=generator)
    expected = logits_of(load_model(source, dtype).float(), ids)
    again = load_model(folder)
    logits = logits_of(again, ids)
    if not torch.equal(expected, logits):
        worst = (expected - logits).abs().max().item()
        raise CheckFailed(f"export: logits of the folder read back differ from the source's by up to {worst:.3g}")
    parity = transformers_parity(folder, ids, again, logits)
    if parity["relative_rms"] is not None and not parity["relative_rms"] <= PARITY:
        clamp = f", with dt clamped at {parity['dt_floor_transformers']:g} in both" if clamps(parity) else ""
        raise CheckFailed(
            f"export: transformers' logits differ by {parity['relative_rms']:.3g} relative RMS, more than {PARITY:g}"
            f"{clamp}"
        )
    write_json(folder / "export.json", {"dtype": options.dtype, "read_back": "identical", "transformers": parity})
    licence = read_licence(source if options.base is None else model_folder(options.base))
    picture = None if options.gap is None else gap_folder(options.gap) / "plots" / "gap.png"
    if picture is not None and not picture.is_file():
        picture = None
    write_card(folder, checkpoint.config, options.dtype, said(parity), licence, gap, name, picture)


def rounded(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in `dtype`, rows by rows. Raises InputError where a number is beyond its range."""
    for name, tensor in stream_rows(checkpoint):
        found = tensor.to(dtype)
        if not is_finite(found):
            worst = tensor.abs().max().item()
            raise InputError(
                f"export: tensor {name} reaches {worst:.4g}, beyond {str(dtype).removeprefix('torch.')};"
                " take dtype=bfloat16 or float32"
            )
        yield name, found


@torch.no_grad()
def logits_of(model: HybridLM, ids: Tensor) -> Tensor:
    return model(ids)


def transformers_parity(folder: Path, ids: Tensor, model: HybridLM, logits: Tensor) -> dict[str, Any]:
    """How far transformers' native class of the family is from ours on the same folder, in relative RMS of the logits.

    With Mamba layers there is a clamp to tell: transformers clamps the step dt from below at the config's
    `time_step_min`, the published code and ours at its `time_step_limit`. `relative_rms` is with transformers' clamp
    in both, and has to be small; with each at its own it is `relative_rms_own_clamps`, which says what that clamp
    changes.
    """
    mamba = "M" in model.config.pattern
    found: dict[str, Any] = {"dt_floor": model.config.dt_limit[0]} if mamba else {}
    if importlib.util.find_spec("transformers") is None:
        return found | {"relative_rms": None, "note": "transformers is not installed"}
    import transformers

    name = FAMILIES[model.config.family].architecture
    if not hasattr(transformers, name):
        return found | {"relative_rms": None, "note": f"transformers {transformers.__version__} has no {name}"}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    theirs = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    found |= {"relative_rms": relative(logits, expected), "version": transformers.__version__, "class": name}
    if mamba:
        floor = float(theirs.config.time_step_min)
        clamped = HybridLM(model.config.replace(dt_limit=(floor, math.inf)), device="meta")
        clamped.load_state_dict(model.state_dict(), assign=True)
        found |= {
            "dt_floor_transformers": floor,
            "relative_rms": relative(logits_of(clamped.eval(), ids), expected),
            "relative_rms_own_clamps": found["relative_rms"],
        }
    return found


def clamps(parity: dict[str, Any]) -> bool:
    """Whether the comparison had steps dt to clamp."""
    return "dt_floor_transformers" in parity


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((theirs - ours).double().square().mean() / ours.double().square().mean()).sqrt().item()


def said(parity: dict[str, Any]) -> str:
    """The comparison with transformers, in a sentence or two."""
    if parity["relative_rms"] is None:
        return f"Not compared with transformers: {parity['note']}."
    text = (
        f"{parity['class']} of transformers {parity['version']} gives them up to {parity['relative_rms']:.1e} relative"
        " RMS in float32"
    )
    if not clamps(parity):
        return text + "."
    text += f", with the step dt clamped at its `time_step_min` ({parity['dt_floor_transformers']:g})."
    if parity["relative_rms_own_clamps"] > PARITY:
        text += (
            f"\nWithout that clamp, as the published code has it, the logits differ by"
            f" {parity['relative_rms_own_clamps']:.1e}; `time_step_min` in config.json sets it."
        )
    return text


def show(folder: Path) -> None:
    found = read_json(folder / "export.json")
    theirs = found["transformers"]
    rows = [("read back", found["read_back"]), ("transformers", theirs.get("note", ""))]
    if theirs["relative_rms"] is not None:
        rows[1] = (f"{theirs['class']} {theirs['version']}", f"{theirs['relative_rms']:.1e} relative RMS")
    if clamps(theirs):
        rows.append((f"  both with dt >= {theirs['dt_floor_transformers']:g}", "as transformers has it"))
        rows.append(
            (f"  ours with dt >= {theirs['dt_floor']:g}", f"{theirs['relative_rms_own_clamps']:.1e} relative RMS")
        )
    table(f"Exported to {folder}", ("check", ""), rows)
