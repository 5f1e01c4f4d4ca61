"""Who teaches in `limbeck distill`: the model itself, or a cache of its answers; and what is known of the student's
descent from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..distill.gap.measure import measure_gap
from ..distill.hidden import Kept, Pairing, make_pairing
from ..distill.losses import Distillation, DistillLoss, check_vocabularies
from ..distill.teacher import CachedTeacher, cached_gap
from ..distill.text.packing import Batch
from ..distill.weights import greatest
from ..models import processes
from ..models.checkpoint import load_config
from ..models.errors import InputError
from ..models.fingerprint import PROVENANCE
from ..models.folder import sha256_file
from ..models.hybrid import HybridLM


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

    def check_holds(self, batches: Iterable[Batch]) -> None:
        """Raises InputError where a cache has no answer to one of these batches, which will be asked for."""
        cache = self.teacher
        if isinstance(cache, CachedTeacher) and not all(cache.holds(batch) for batch in batches):
            raise InputError(
                f"teacher_cache={cache.folder} lacks rows that will be read: it holds {len(cache)}, made for fewer"
                " steps or with another seed, seq_len, batch, repack or evaluate_tokens; make it with distill's options"
            )

    def gap(self, student: HybridLM, sample: list[Batch]) -> dict[str, float]:
        """The held-out figures that go into metrics.jsonl; of a cached teacher, KL over its buckets."""
        if isinstance(self.teacher, CachedTeacher):
            return cached_gap(self.teacher, student, sample)
        found = measure_gap(self.teacher, {"student": student}, sample, resamples=2).models["student"]
        return {
            "validation_loss": found.cross_entropy.value,
            "validation_bits_per_byte": found.bits_per_byte.value,
            "validation_kl": found.kl.value,
            "validation_agreement": found.agreement.value,
        }


def open_teaching(
    student: HybridLM,
    options: DistillLoss,
    *,
    teacher_folder: Path,
    student_folder: Path,
    cache: Path | None,
    load_teacher: Callable[[], HybridLM],
    facts: Callable[[], Mapping[str, Any]],
    batches: Callable[[], Iterable[Batch]],
) -> Teaching:
    """The teacher for a student as it is before its first step; it is loaded unless a cache stands in for it. `facts`
    gives the stage's (it may wait for sums), and `batches` the text that maps between hidden states are fitted on.

    Raises InputError where the two do not fit together, or the cache is of something else.
    """
    if cache is not None:
        found = CachedTeacher(cache)
        check_vocabularies(found, student)
        check_cache(found, student_folder, inputs_of(facts))
        return Teaching(found)
    teacher = load_teacher()
    check_vocabularies(teacher, student)
    if greatest(options.hidden.weight) == 0:
        return Teaching(teacher)
    kept = kept_of(student_folder, teacher_folder, lambda: inputs_of(facts)["teacher"])
    moved = (batch.to(student.head_weight.device) for batch in batches())
    return Teaching(teacher, make_pairing(teacher, student, options.hidden, kept, moved))


def inputs_of(facts: Callable[[], Mapping[str, Any]]) -> dict[str, str]:
    """The sums of the stage's inputs; of many processes the first one takes them."""
    found: dict[str, str] = processes.from_first(facts()["inputs"] if processes.rank() == 0 else None)
    return found


def check_cache(cache: CachedTeacher, student_folder: Path, inputs: Mapping[str, str]) -> None:
    """Raises InputError where a cache was made by another teacher, of other data, or in other tokens."""
    made_from = provenance(cache.folder).get("inputs", {})
    for name in ("teacher", "data"):
        if made_from.get(name) != inputs[name]:
            raise InputError(
                f"teacher_cache={cache.folder} was made from another {name} than {name}=; make it anew with limbeck"
                " cache-teacher"
            )
    if cache.tokenizer != sha256_file(student_folder / "tokenizer.json"):
        raise InputError(
            f"teacher_cache={cache.folder} was made with another tokenizer.json than {student_folder} has; teacher and"
            " student must share one"
        )


def kept_of(student: Path, teacher: Path, teacher_sum: Callable[[], str]) -> Kept | None:
    """What a student's folder says it is of its teacher; None unless it was pruned from just this one."""
    try:
        selection = json.loads((student / "selection.json").read_text(encoding="utf-8"))
        source = provenance(student)["inputs"]["model"]
    except (OSError, ValueError, KeyError):
        return None
    corrected = provenance(teacher)
    original = corrected["inputs"]["teacher"] if corrected.get("made_by") == "limbeck correct-teacher" else None
    if source not in (original, teacher_sum()):
        return None
    channels: tuple[int, ...] | None = None
    if "principal_directions" not in selection:
        channels = tuple(selection["kept"].get("hidden", range(load_config(teacher).hidden_size)))
    return Kept(tuple(selection["layers"]), channels)


def provenance(folder: Path) -> dict[str, Any]:
    """What a folder says of who made it; nothing where it says nothing."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def cache_sum(cache: Path) -> str:
    """What stands for a cache as an input: its own fingerprint, and not the sum of all its files."""
    found = provenance(cache).get("fingerprint")
    if not isinstance(found, str):
        raise InputError(f"teacher_cache={cache} is no finished cache of a teacher; limbeck cache-teacher makes one")
    return found
