"""How an export is rounded: which layers stay, by a list or by their measured sensitivity, and whether on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.export import check_files
from ..models.families.family import stored_tensors
from ..models.folder import write_json
from ..models.foreign import read_object
from ..models.offload import open_layers
from ..models.quantise import Calibrated, module_end, rounded_names
from ..models.rounding import ROUNDINGS, Rounding
from .calibration import calibrate
from .importance import IGNORED_LABEL, TokenBatch
from .sensitivity import Sensitivity, block_of, layers_in, most_sensitive

Read = Callable[[str, int], Sequence[TokenBatch]]  # (split, tokens) -> rows of calibration text
Progress = Callable[[str, int], AbstractContextManager[Any]]  # (what, total) -> a bar with `set(done)`
CALIBRATION_TOKENS = 32768
SCRATCH = "rounding"  # in an unfinished export: what is measured and rounded so far


@dataclasses.dataclass(frozen=True)
class RoundingOptions:
    """Tokens to calibrate on (0: none, every number to the nearest), whether to measure what rounding each layer costs,
    on how many held-out tokens, and the layers that stay: so many of the most sensitive, or these."""

    calibration_tokens: int = 0
    sensitivity: bool = False
    sensitivity_tokens: int = 8192
    keep_layers: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.calibration_tokens < 0 or self.sensitivity_tokens < 1:
            raise InputError(
                f"calibration_tokens is {self.calibration_tokens}, sensitivity_tokens {self.sensitivity_tokens};"
                " expected at least 0 and 1"
            )
        if isinstance(self.keep_layers, int) and self.keep_layers < 1:
            raise InputError(f"keep_layers is {self.keep_layers}; expected how many layers stay, or a list of numbers")

    @property
    def measures(self) -> bool:
        return self.sensitivity or isinstance(self.keep_layers, int)

    @property
    def needs_data(self) -> bool:
        return self.measures or self.calibration_tokens > 0


@dataclasses.dataclass(frozen=True)
class GivenRounding:
    """The options of an export as they are given: `calibration_tokens` None are 32,768 where there is data and the
    format rounds."""

    calibration_tokens: int | None = None
    sensitivity: bool = False
    sensitivity_tokens: int = 8192
    keep_layers: int | tuple[int, ...] | None = None

    def settled(self, form: str, data: bool, evaluates: bool = False) -> RoundingOptions:
        """For an export in the format `form`, with or without data, on which the export itself is measured where it
        `evaluates`. Raises InputError where options contradict each other."""
        tokens = (
            CALIBRATION_TOKENS * (data and form in ROUNDINGS)
            if self.calibration_tokens is None
            else self.calibration_tokens
        )
        how = RoundingOptions(tokens, self.sensitivity, self.sensitivity_tokens, self.keep_layers)
        if form not in ROUNDINGS and how != RoundingOptions():
            raise InputError(f"format={form} rounds nothing; leave calibration_tokens, keep_layers and the like out")
        if how.needs_data and not data:
            raise InputError("calibration_tokens, sensitivity and keep_layers=NUMBER need data=")
        if data and not how.needs_data and not evaluates:
            raise InputError(
                "data= is read for evaluate_tokens, calibration_tokens, sensitivity and keep_layers=NUMBER; none is"
                " given"
            )
        return how


@dataclasses.dataclass(frozen=True)
class RoundingPlan:
    """Our layers that stay, what data made of the weights (None: to the nearest), and what there is to tell of both,
    for export.json."""

    kept: frozenset[int] = frozenset()
    calibrated: Calibrated | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plan_rounding(
    source: Path,
    form: str,
    how: RoundingOptions,
    scratch: Path,
    read: Read,
    progress: Progress,
    device: torch.device,
) -> RoundingPlan:
    """Measures and calibrates for an export in the format `form`. `scratch` is a folder for what is done so far, from
    which an interrupted run of just the same resumes. Raises InputError."""
    checkpoint, rounding = open_checkpoint(source), ROUNDINGS[form]
    config = checkpoint.config
    names, facts = rounded_names(config, rounding), dict[str, Any]()
    chosen = [] if how.keep_layers is None or isinstance(how.keep_layers, int) else sorted(set(how.keep_layers))
    kept = layers_in(config, chosen)  # which says what is wrong before anything is measured
    with_matrices = {block_of(config, name) for name in names}
    if isinstance(how.keep_layers, int) and how.keep_layers >= len(with_matrices):
        raise InputError(
            f"keep_layers={how.keep_layers} leaves nothing to round: {len(with_matrices)} layers have matrices that"
            f" {form} rounds; keep fewer"
        )
    if how.needs_data:
        check_files(source, config)
        scratch.mkdir(exist_ok=True)
    if how.measures:
        measured = Measured(source, names, rounding, scratch / "sensitivity.json")
        losses = measured.losses(read("validation", how.sensitivity_tokens), progress, device)
        facts["sensitivity"] = sensitivity_rows(config, names, losses)
        facts["sensitivity_tokens"] = measured.tokens
        if isinstance(how.keep_layers, int):
            chosen = most_sensitive(losses, how.keep_layers)
            kept = layers_in(config, chosen)
    names = rounded_names(config, rounding, kept)
    if not names and kept:
        raise InputError(f"keep_layers={chosen} leaves nothing to round; keep fewer")
    if chosen:
        facts["keep_layers"] = chosen
    calibrated = None
    if how.calibration_tokens:
        batches = read("train", how.calibration_tokens)
        calibrated = calibration(checkpoint, names, rounding, batches, scratch, progress, device)
        facts["calibration_tokens"] = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
    return RoundingPlan(frozenset(kept), calibrated, facts)


def calibration(
    checkpoint: Checkpoint,
    names: set[str],
    rounding: Rounding,
    batches: Sequence[TokenBatch],
    scratch: Path,
    progress: Progress,
    device: torch.device,
) -> Calibrated:
    with progress("calibrating layers", checkpoint.config.num_layers) as bar:
        return calibrate(checkpoint, names, rounding, batches, scratch / "layers", device=device, on_layer=bar.set)


class Measured:
    """The sensitivity of a model's layers, kept in a file as far as it is measured."""

    def __init__(self, source: Path, names: set[str], rounding: Rounding, path: Path) -> None:
        self.source, self.names, self.rounding, self.path = source, names, rounding, path
        self.tokens = 0

    def losses(self, batches: Sequence[TokenBatch], progress: Progress, device: torch.device) -> dict[int, float]:
        """KL in nats a token by the layer's number."""
        stored = read_object(self.path) if self.path.is_file() else {}
        found = {int(layer): float(kl) for layer, kl in stored.items()}
        work = Sensitivity(open_layers(self.source, torch.float32, device), self.names, self.rounding, batches)
        self.tokens = work.tokens
        with progress("measuring the sensitivity of layers", len(work.config.pattern)) as bar:
            for more in work.losses(list(found), on_step=bar.set):
                found |= more
                write_json(self.path, {str(layer): kl for layer, kl in found.items()})
        return dict(sorted(found.items()))


def sensitivity_rows(config: HybridConfig, names: set[str], losses: Mapping[int, float]) -> list[dict[str, Any]]:
    """Of each layer its number and letters, which matrices are rounded, how many parameters they have, and the KL."""
    rows, size = [], config.block_size
    for layer, kl in losses.items():
        own = [name for name in stored_tensors(config) if name in names and block_of(config, name) == layer]
        shapes = [stored_tensors(config)[name].shape for name in own]
        rows.append(
            {
                "layer": layer,
                "pattern": config.pattern[layer * size : (layer + 1) * size],
                "matrices": sorted({module_end(name) for name in own}),
                "parameters": sum(height * width for height, width in shapes),
                "kl": kl,
            }
        )
    return rows
