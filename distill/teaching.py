"""Who teaches a student: the model itself, or a cache of its answers; and what a student kept of its teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.checkpoint import load_config
from ..models.errors import InputError
from ..models.fingerprint import read_provenance
from ..models.folder import sha256_file
from ..models.hybrid import HybridLM
from .gap.measure import measure_gap
from .hidden import Kept, Pairing
from .losses import Distillation, DistillLoss, check_vocabularies
from .teacher import CachedTeacher, cached_gap


@dataclasses.dataclass(frozen=True)
class Teaching:
    """A teacher, and which of the student's hidden states are compared with which of its own."""

    teacher: HybridLM | CachedTeacher
    pairing: Pairing | None = None

    @property
    def model(self) -> HybridLM | None:
        """The teacher itself, where it runs."""
        return None if isinstance(self.teacher, CachedTeacher) else self.teacher

    def loss(self, options: DistillLoss) -> Distillation:
        return Distillation(self.teacher, options, self.pairing)

    def check_holds(self, batches: Iterable[Any]) -> None:
        """Raises InputError where a cache has no answer to one of these batches, which will be read."""
        cache = self.teacher
        if isinstance(cache, CachedTeacher) and not all(cache.holds(batch) for batch in batches):
            raise InputError(
                f"teacher_cache={cache.folder} lacks rows that will be read: it holds {len(cache)}, made for fewer"
                " steps or with another seed, seq_len, batch, repack or evaluate_tokens; make it with distill's options"
            )

    def gap(self, student: HybridLM, sample: Sequence[Any]) -> dict[str, float]:
        """The held-out figures that go into metrics.jsonl; of a cached teacher, KL over its buckets."""
        if isinstance(self.teacher, CachedTeacher):
            return cached_gap(self.teacher, student, sample)
        figures = measure_gap(self.teacher, {"student": student}, sample, resamples=2).models["student"]
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


def cache_fingerprint(cache: Path) -> str:
    """What stands for a cache as an input, instead of the sum of all its files. Raises InputError."""
    fingerprint = read_provenance(cache).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise InputError(f"teacher_cache={cache} is no finished cache of a teacher; limbeck cache-teacher makes one")
    return fingerprint


def kept_of(student: Path, teacher: Path, teacher_sum: Callable[[], str]) -> Kept | None:
    """What a student's folder says it is of its teacher; None unless it was pruned from just this one."""
    try:
        selection = json.loads((student / "selection.json").read_text(encoding="utf-8"))
        source = read_provenance(student)["inputs"]["model"]
    except (OSError, ValueError, KeyError):
        return None
    corrected = read_provenance(teacher)
    original = corrected["inputs"]["teacher"] if corrected.get("made_by") == "limbeck correct-teacher" else None
    if source not in (original, teacher_sum()):
        return None
    channels: tuple[int, ...] | None = None
    if "principal_directions" not in selection:
        channels = tuple(selection["kept"].get("hidden", range(load_config(teacher).hidden_size)))
    return Kept(tuple(selection["layers"]), channels)
