"""`limbeck distill`: a student recovers from its teacher's logits. Killed, the same command resumes where it was."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from ..distill.average import write_trained
from ..distill.hidden import Pairing, make_pairing
from ..distill.nested import open_nest
from ..distill.options import DistillOptions
from ..distill.parallel import Trained, load_frozen, load_trained, process_device
from ..distill.rollouts import check_plan
from ..distill.stages import check_text, check_texts, correct, join_metrics, train_stages
from ..distill.teacher import CachedTeacher
from ..distill.teaching import cache_fingerprint, check_cache_serves, kept_of, open_cache
from ..models import processes
from ..models.checkpoint import check_forward, load_config
from ..models.errors import InputError
from ..models.folder import write_json
from ..models.generate.writer import stop_tokens
from ..models.hybrid import HybridLM
from ..models.row_split import row_split
from ..models.tokenizer import check_agreement
from ..prune.nested import NESTED, nested_student
from .run.resolve import (
    NamedData,
    check_scores,
    corpus,
    data_input,
    held_out,
    model_folder,
    sample,
    say_epochs,
    torch_device,
    torch_dtype,
    training_dtype,
)
from .run.show import result, say
from .run.stage import Work, many_processes, stage
from .run.tracking import Tracked, journal, speed_of, training_bar


@dataclasses.dataclass(frozen=True)
class Options(Tracked):
    teacher: str
    student: str
    data: NamedData
    output: Path
    seed: int
    device: str
    dtype: str
    distill: DistillOptions
    shard: bool = True
    teacher_cache: Path | None = None
    scores: Path | None = None

    def __post_init__(self) -> None:
        training_dtype(self.dtype)
        if self.teacher_cache is not None:
            check_cache_serves(self.distill)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"distill": self.distill.chosen, "seed": self.seed, "dtype": self.dtype}


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        train_student(options)
        if processes.rank() == 0:
            result(options.output, {"model": str(options.output), "metrics": str(options.output / "metrics.jsonl")})


def train_student(options: Options) -> None:
    """The stage, without its result.json."""
    teacher, student = model_folder(options.teacher), model_folder(options.student)
    inputs: dict[str, Path | str] = {"teacher": teacher, "student": student, "data": data_input(options.data)}
    if (options.scores is None) != (options.distill.nested is None):
        raise InputError("distill: scores=FOLDER, of the student, puts nested sizes in order; give both or neither")
    inputs |= {} if options.scores is None else {"scores": options.scores}
    if options.teacher_cache is not None:
        inputs["teacher_cache"] = cache_fingerprint(options.teacher_cache)
    if options.distill.teacher_correction is not None:
        with processes.together():  # all of this is said again; here the teacher is not trained yet
            check_agreement(teacher, student)
            check_plan(options.distill.plan(), load_config(student), not options.shard or processes.count() == 1)
            unseen = functools.partial(held_out, options.data, student, seed=options.seed)
            check_texts(corpus(options.data, "train", student), options.distill.plan(), options.seed, None, unseen, "")
        teacher = inputs["teacher"] = correct_teacher(teacher, options)
    with stage(options.output, "distill", inputs=inputs, options=options.fingerprint, scratch="training") as work:
        if not work.finished:
            distill(work, teacher, student, options)


def correct_teacher(teacher: Path, options: Options) -> Path:
    """The folder OUTPUT-corrected-teacher: the teacher, trained on the text before it teaches."""
    folder = options.output.with_name(f"{options.output.name}-corrected-teacher")
    how, dtype = options.distill.correction(), torch_dtype(options.dtype)
    facts = {"train": how.chosen["train"], "seq_len": how.seq_len, "batch": how.batch, "seed": options.seed,
             "dtype": options.dtype}  # fmt: skip
    inputs = {"teacher": teacher, "data": data_input(options.data)}
    with stage(folder, "correct-teacher", inputs=inputs, options=facts, scratch="training") as work:
        if not work.finished:
            with processes.together():
                text = corpus(options.data, "train", teacher)
                check_text(text, how)
                say_epochs(text, [how.reads])
                check_plan([how], load_config(teacher), whole=True)
            model = load_trained(teacher, dtype, process_device(torch_device(options.device)), options.shard)
            training, config = work.folder / "training", model.model.config
            correct(model, how, training, text, options.seed, bar=training_bar, say=say,
                    describe=lambda how: speed_of(config, None, how.seq_len, model.device))  # fmt: skip
            work.notes["weights"] = write_trained(
                work.folder, training, how.train, config, dtype, tokenizer_from=teacher
            )
    return folder


def distill(work: Work, teacher_folder: Path, student_folder: Path, options: Options) -> None:
    """Trains in `work.folder/training`, which holds the state, and leaves the checkpoint and metrics.jsonl beside it.

    Of several stages each has a folder of its own in there, and what it leaves is where the next one begins.
    """
    plan, dtype, seed = options.distill.plan(), torch_dtype(options.dtype), options.seed
    with processes.together():
        for note in check_agreement(teacher_folder, student_folder):
            say(f"note: {note}")
        check_plan(plan, load_config(student_folder), not options.shard or processes.count() == 1)
    measured = functools.partial(held_out, options.data, student_folder, seed=seed)
    device, nest = process_device(torch_device(options.device)), None
    if options.distill.nested is not None and options.scores is not None:
        with processes.together():
            cut = nested_student(student_folder, options.scores, options.distill.nested.targets, dtype, device)
            student, nest = open_nest(options.distill.nested, cut.model, cut.sizes, cut.parameters, dtype)
    else:
        student = load_trained(student_folder, dtype, device, options.shard, any(how.loss.mtp_weight for how in plan))
    teacher, pairing = open_teacher(work, teacher_folder, student_folder, student, options)
    check_forward({"student": student.model} | ({"teacher": teacher} if isinstance(teacher, HybridLM) else {}))
    with processes.together():
        text = corpus(options.data, "train", student_folder)
        check_texts(text, plan, seed, teacher, measured, options.data)
        if processes.rank() == 0:
            made_from = work.made_of.settle("data")["inputs"]  # a damaged input shows before the first step
            if options.scores is not None:
                check_scores(options.scores, made_from["student"], options.student)
        say_epochs(text, [how.reads for how in plan])
    training = work.folder / "training"
    folders = [training / str(number) for number in range(1, len(plan) + 1)] if options.distill.stages else [training]
    configs = student.model.config, teacher.config if isinstance(teacher, HybridLM) else None
    with journal(options, work.folder, options.output.name, work.options) as note_down:
        train_stages(
            student, teacher, plan, folders, text, seed, pairing=pairing, nest=nest,
            ends=stop_tokens(student_folder, student.model.config) if any(how.own_rows for how in plan) else (),
            held_out=measured,
            bar=lambda title, steps, before: training_bar(title, steps, note_down, before),
            describe=lambda how: speed_of(*configs, how.seq_len, student.device), say=say,
        )  # fmt: skip
    if options.distill.stages and processes.rank() == 0:
        join_metrics(folders, training)
    work.notes["weights"] = write_trained(
        work.folder, folders[-1], plan[-1].train, student.model.config, dtype, tokenizer_from=student_folder
    )
    if nest is not None and processes.rank() == 0:
        write_json(work.folder / NESTED, nest.content())


def open_teacher(
    work: Work, teacher_folder: Path, student_folder: Path, student: Trained, options: Options
) -> tuple[HybridLM | CachedTeacher, Pairing | None]:
    """The teacher for a student as it is before its first step, or the cache that stands in for it; and which of their
    hidden states are compared.

    Raises InputError where the two do not fit together, or the cache is of something else.
    """

    def sums() -> dict[str, str]:
        return processes.from_first(work.content()["inputs"] if processes.rank() == 0 else None)

    if options.teacher_cache is not None:
        return open_cache(options.teacher_cache, student.model, student_folder, sums()), None
    dtype = torch_dtype(options.distill.teacher_dtype or options.dtype)
    teacher = load_frozen(teacher_folder, dtype, student.device, options.shard, options.distill.teacher_offload)
    how, hidden = options.distill.plan()[0], options.distill.loss.hidden
    if not options.distill.loss.hidden_weighs:
        return teacher, None
    kept = kept_of(student_folder, teacher_folder, lambda: sums()["teacher"])
    rows = sample(options.data, "train", student_folder, tokens=hidden.fit_tokens, seq_len=how.seq_len, batch=how.rows,
                  seed=options.seed)  # fmt: skip
    split, there = row_split(how.train.context_parallel), (row.to(student.device) for row in rows)
    return teacher, make_pairing(teacher, student.model, hidden, kept, there, split)


if __name__ == "__main__":  # accelerate launch -m limbeck.scripts.distill KEY=VALUE ...
    from .run.main import main

    sys.exit(main(["distill", *sys.argv[1:]]))
