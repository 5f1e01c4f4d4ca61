"""What is known of a student's descent from its teacher, and of a teacher's cached answers; and how far a student is
from either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.checkpoint import load_config
from ..models.errors import InputError
from ..models.fingerprint import read_provenance
from ..models.folder import sha256_file
from ..models.foreign import read_object
from ..models.hybrid import HybridLM
from ..models.row_split import row_split
from .gap.measure import ModelGap, measure_gap
from .hidden import KeptParts
from .losses import check_vocabularies
from .options import DistillOptions
from .teacher import CachedTeacher, cached_gap


def held_out_figures(
    teacher: HybridLM | CachedTeacher, student: HybridLM, sample: Sequence[Any], context_parallel: int = 1
) -> dict[str, float]:
    """The held-out figures that go into metrics.jsonl; of a cached teacher, KL over its buckets. Rows go through the
    models in as many parts as in training."""
    split = row_split(context_parallel)
    if isinstance(teacher, CachedTeacher):
        return cached_gap(teacher, student, sample, split)
    return figures_of(measure_gap(teacher, {"student": student}, sample, resamples=2, split=split).models["student"])


def figures_of(figures: ModelGap) -> dict[str, float]:
    """What metrics.jsonl has of a model's held-out figures."""
    return {
        "validation_loss": figures.cross_entropy.value,
        "validation_bits_per_byte": figures.bits_per_byte.value,
        "validation_kl": figures.kl.value,
        "validation_agreement": figures.agreement.value,
    }


def open_cache(folder: Path, student: HybridLM, student_folder: Path, inputs: Mapping[str, str]) -> CachedTeacher:
    """A cache in a folder; `inputs` are the sums of the teacher and of the data. Raises InputError where it was made by
    another teacher, of other data, or in other tokens than the student's."""
    cache = CachedTeacher(folder)
    check_vocabularies(cache, student)
    made_from = read_provenance(folder).get("inputs", {})
    for name in ("teacher", "data"):
        if made_from.get(name) != inputs[name]:
            raise InputError(
                f"teacher_cache={folder} was made from another {name} than {name}=; make it anew with limbeck"
                " cache-teacher"
            )
    if cache.tokenizer != sha256_file(student_folder / "tokenizer.json"):
        raise InputError(
            f"teacher_cache={folder} was made with another tokenizer.json than {student_folder} has; teacher and"
            " student must share one"
        )
    return cache


def check_cache_serves(how: DistillOptions) -> None:
    """Raises InputError where a cache of the teacher's answers cannot have what is trained on."""
    if how.teacher_correction is not None:
        raise InputError(
            "distill: teacher_cache holds what the teacher said as it was; leave teacher_correction out, and cache"
            " the corrected teacher"
        )
    if how.teacher_dtype is not None or how.teacher_offload:
        name = "teacher_dtype" if how.teacher_dtype is not None else "teacher_offload"
        raise InputError(f"distill: with teacher_cache no teacher is read; leave distill.{name} out")
    if any(stage.own_rows for stage in how.plan()):
        raise InputError(
            "distill: teacher_cache has no answer to text that the student is yet to write; leave it or"
            " distill.rollouts out"
        )


def cache_fingerprint(cache: Path) -> str:
    """What stands for a cache as an input, instead of the sum of all its files. Raises InputError."""
    fingerprint = read_provenance(cache).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise InputError(f"teacher_cache={cache} is no finished cache of a teacher; limbeck cache-teacher makes one")
    return fingerprint


def kept_of(student: Path, teacher: Path, teacher_sum: Callable[[], str]) -> KeptParts | None:
    """What a student's folder says it is of its teacher; None unless it was pruned from just this one."""
    try:
        selection = read_object(student / "selection.json")
        source = read_provenance(student)["inputs"]["model"]
    except (OSError, ValueError, KeyError):
        return None
    corrected = read_provenance(teacher)
    original = corrected["inputs"].get("teacher") if corrected.get("made_by") == "limbeck correct-teacher" else None
    if source not in (original, teacher_sum()):
        return None
    channels: tuple[int, ...] | None = None
    if "principal_directions" not in selection:
        channels = tuple(selection["kept"].get("hidden", range(load_config(teacher).hidden_size)))
    return KeptParts(tuple(selection["layers"]), channels)
