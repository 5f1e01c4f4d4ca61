"""`limbeck evaluate`: the gap between a teacher and its students on held-out text: gap.json and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from ..distill.gap.evaluation import Details, answer_probes, continue_texts, draw_probes, gap_content, load_models
from ..distill.gap.kept import Kept
from ..distill.gap.measure import TEACHER, check_names, measure_gap
from ..distill.gap.probes import check_probes
from ..distill.gap.tasks import Tasks, answer_tasks, plan_tasks
from ..distill.gap.token_groups import group_tokens
from ..distill.report.gap_rows import few_documents
from ..distill.report.gap_tables import gap_tables, recovery_line
from ..distill.report.report import write_page
from ..distill.text.mixture import whole
from ..distill.text.packing import check_measurable
from ..models.checkpoint import check_forward, load_config
from ..models.cost.fit import Fit
from ..models.cost.hardware import Hardware
from ..models.errors import InputError
from ..models.fingerprint import RUN, read_provenance
from ..models.folder import write_json
from ..models.foreign import own_path
from ..models.matmul import Multiplied
from ..models.placement import placed
from ..models.tokenizer import check_agreement, load_tokenizer
from ..prune.scores import scores_folder
from .run.facts import run_facts
from .run.resolve import (
    NamedData,
    corpus,
    data_input,
    estimated,
    model_folder,
    say_sampled,
    torch_device,
    torch_dtype,
)
from .run.show import progress, read_json, result, say, table
from .run.stage import Work, stage

SCRATCH = "measured"
CHOSEN = ("split", "tokens", "seq_len", "batch", "seed", "dtype", "details", "hardware", "fit", "probes")


@dataclasses.dataclass(frozen=True)
class Options(Multiplied):
    teacher: str
    student: dict[str, str]
    data: NamedData
    output: Path
    split: str
    tokens: PositiveInt
    seq_len: PositiveInt
    batch: PositiveInt
    seed: int
    device: str
    dtype: str
    hardware: Hardware
    fit: Fit
    details: Details = dataclasses.field(default_factory=Details)
    scores: str | None = None
    probes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in {TEACHER, "data", "scores"} & self.student.keys():
            raise InputError(f"student.{name} stands for what {name}= is; give the student another name")
        check_names(self.student)

    @property
    def suites(self) -> Tasks:
        """The task suites. Raises InputError."""
        return Tasks(self.tasks, self.details.task_shots, self.details.task_limit)


def run(options: Options, replaces: bool = False) -> None:
    folders = {TEACHER: model_folder(options.teacher)}
    folders |= {name: model_folder(folder) for name, folder in options.student.items()}
    inputs: dict[str, Path | str] = {**folders, "data": data_input(options.data)}
    if options.scores is not None:
        inputs["scores"] = scores_folder(options.scores, folders[TEACHER])
    longest = min(load_config(folder).max_position_embeddings for folder in folders.values())
    if options.probes:
        check_probes(options.probes, options.details.probe_lengths, longest)
    if options.student:
        options.details.check_length(longest)
    for name, folder in folders.items():
        if name != TEACHER and (folder / "tokenizer.json").is_file():  # one without is taken at its word
            check_agreement(folders[TEACHER], folder)
    facts = {name: getattr(options, name) for name in CHOSEN} | {"tasks": options.suites.content()}
    with stage(options.output, "evaluate", inputs=inputs, options=facts, replaces=replaces, scratch=SCRATCH) as work:
        if not work.finished:
            evaluate(work, folders, options)
    gap = read_json(options.output / "gap.json")
    for title, columns, rows in gap_tables(gap):
        table(title, columns, rows)
    for line in (recovery_line(gap), few_documents(gap)):
        if line:
            say(line)
    result(options.output, {"gap": str(options.output / "gap.json"), "page": str(options.output / "gap.html")})


def evaluate(work: Work, folders: dict[str, Path], options: Options) -> None:
    """Measures into an existing folder: gap.json, gap.html and its plots."""
    dtype, seed, details = torch_dtype(options.dtype), options.seed, options.details
    models, away = load_models(folders, dtype, torch_device(options.device), say)
    for name, model in models.items():
        with placed(model, away):
            check_forward({name: model})
    # What may be wrong with the rest shows before anything is measured.
    say(f"estimating memory on {options.hardware.name}")
    fits = {name: fitted(path, options.hardware, options.fit) for name, path in folders.items()}
    read = corpus(options.data, options.split, folders[TEACHER])
    batches = read.sample(batch_size=options.batch, seq_len=options.seq_len, seed=seed, max_tokens=options.tokens)
    say_sampled(batches, options.data, options.split, folders[TEACHER], options.tokens, options.seq_len)
    check_measurable(batches, options.data, options.split)
    text, tokenizer = whole(read), load_tokenizer(folders[TEACHER])
    probes = draw_probes(options.probes, details, text, tokenizer, seed)
    tasks = plan_tasks(folders, options.suites, dtype=dtype, seed=seed) if options.tasks else None
    teacher, kept = models[TEACHER], Kept(work.folder / SCRATCH)
    students = {name: model for name, model in models.items() if name != TEACHER}
    groups = group_tokens(text, tokenizer, teacher.config.vocab_size)
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(
            teacher, students, batches, resamples=details.resamples, seed=seed, groups=groups,
            worst=details.worst, device=away, on_step=bar.set, kept=kept,
        )  # fmt: skip
    content = gap_content(report, models, text, tokenizer, str(options.data), options.split)
    content["continuation"], content["samples"] = kept.value(
        "continuation", lambda: continue_texts(teacher, students, text, tokenizer, details, seed, away, say)
    )
    content["probes"] = kept.value("probes", lambda: answer_probes(models, probes, details.resamples, seed, away, say))
    if tasks is not None:
        with progress("tasks", 1) as bar:
            content["tasks"] = answer_tasks(
                models, folders, tasks, device=away, on_step=lambda name, done, total: bar.set(done, total, name)
            )
    content["memory"] = fits
    write_json(work.folder / "gap.json", content)
    made_by = {name: made for name, path in folders.items() if (made := read_provenance(path))}
    curves = [folders[name] / "metrics.jsonl" for name in sorted(students, key=lambda name: name != "distilled")]
    run = run_facts(work.folder, output=options.output, inputs=work.made_of.inputs)
    write_page(
        work.folder,
        "gap.html",
        title="Teacher-student gap",
        gap=content,
        provenance={"evaluate": work.content() | {RUN: run}, **made_by},
        models={TEACHER: options.teacher, **options.student},
        run=run,
        memory=fits,
        scores=own_scores(work, options),
        metrics=next((path for path in curves if path.is_file()), None),
        selection=selection(folders, made_by, work.content()["inputs"].get("scores")),
    )


def fitted(model: Path, hardware: Hardware, fit: Fit) -> dict[str, Any]:
    """What memory-fit says of a folder, and the estimated tokens a second."""
    estimate = estimated(str(model), hardware, fit)
    speed = estimate.throughput()
    return estimate.to_json() | {"throughput": speed and dataclasses.asdict(speed)}


def own_scores(work: Work, options: Options) -> Path | None:
    """The scores folder, unless what it was made from is not the teacher."""
    if options.scores is None:
        return None
    folder = own_path(options.scores)
    teacher = work.content()["inputs"][TEACHER]
    if read_provenance(folder).get("inputs", {}).get("model", teacher) == teacher:
        return folder
    say(f"scores={options.scores} are of another model of the teacher's shape: the page leaves them out")
    return None


def selection(folders: Mapping[str, Path], made_by: Mapping[str, Any], scores: str | None) -> dict[str, Any] | None:
    """What was kept of the first student that was pruned by just these scores."""
    for name, facts in made_by.items():
        path = folders[name] / "selection.json"
        if scores is not None and facts["inputs"].get("scores") == scores and path.is_file():
            return read_json(path)
    return None
