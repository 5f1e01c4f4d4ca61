"""`limbeck compress`: the whole story. Each stage reads folders and writes a folder; a finished one is not done again.

model --score--> scores --prune--> pruned --distill--> distilled --evaluate--> gap --export--> exported

The first three make a round; of several, each begins with what the one before it distilled. Of many processes all
score and distil, and the first does the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from ..distill.options import DistillOptions
from ..distill.parallel import check_share
from ..distill.report.report import write_page
from ..models import processes
from ..models.checkpoint import load_config
from ..models.cost.fit import Fit
from ..models.cost.hardware import Hardware
from ..models.device import torch_device, torch_dtype, training_dtype
from ..models.errors import InputError
from ..models.fingerprint import PROVENANCE, plain
from ..prune.repair import RepairOptions
from ..prune.scoring import Importance
from ..prune.target import Target
from . import distill, evaluate, export, memory_fit, prune, score
from .run.facts import run_facts
from .run.resolve import NamedData, data_input, estimated, model_config, model_folder
from .run.rounds import Round, check_feasible, from_plain, print_figures, rehearse, rounds_of, student_folders
from .run.show import console, read_json, result, say
from .run.stage import check_ours, many_processes, owned_by_run, stage
from .run.tracking import Tracked

APART = ("output", "device", "data", "dry_run", "matmul", "shard")  # not the run's own, or what `stage` is told of
# What only the last stages read: another value makes these anew, and leaves the rest as it is.
LATE = ("evaluate_tokens", "export_dtype", "hardware", "fit")


@dataclasses.dataclass(frozen=True)
class Options(Tracked):
    model: str
    data: NamedData | None
    output: Path | None
    dry_run: bool
    seed: int
    device: str
    dtype: str
    importance: Importance
    target: Target
    rounds: tuple[dict[str, Any], ...]
    repair: RepairOptions
    distill: DistillOptions
    evaluate_tokens: PositiveInt
    export_dtype: str
    hardware: Hardware
    fit: Fit
    shard: bool

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            if getattr(self, name) is None and not self.dry_run:
                raise InputError(f"{name} is missing; give {name}=VALUE (limbeck compress --help)")
        if not self.rounds and self.target == Target():
            raise InputError("target is empty; give a size, such as target.parameters=0.75 (limbeck compress --help)")
        training_dtype(self.dtype)
        torch_dtype(self.export_dtype)
        self.plan()

    def plan(self) -> tuple[Round, ...]:
        base = Round("", self.seed, self.importance, self.target, self.repair, self.distill)
        return rounds_of(base, self.rounds)


def run(options: Options) -> None:
    rounds = options.plan()
    with many_processes(options.device), processes.together():
        for how in (how for one in rounds for how in one.distill.plan()):
            if not options.dry_run or processes.count() > 1:  # one process may plan for many
                check_share(how.batch, how.seq_len, how.train.context_parallel)
        if options.dry_run:
            config = model_config(options.model)
            return processes.in_first(lambda: rehearse(config, rounds, options.hardware, options.fit))
        assert options.data is not None and options.output is not None
        with owned_by_run(options.output):
            whole = not options.shard or processes.count() == 1
            processes.in_first(functools.partial(claim, options, options.data, options.output, whole=whole))
            compress(options, options.output)


def compress(options: Options, out: Path) -> None:
    """The chain, or what is left of it to do."""
    source = before = str(model_folder(options.model))
    number, rounds = itertools.count(1), options.plan()
    for one in rounds:
        which, folder = f" ({one.name})" if one.name else "", out / one.name
        console.rule(f"{next(number)}. score: what matters{which}", align="left")
        score_round(options, before, one, folder / "scores")
        console.rule(f"{next(number)}. prune: layers, widths and SSM heads{which}", align="left")
        for name, way in one.ways(one is rounds[-1]).items():
            processes.in_first(functools.partial(prune_round, options, before, way, folder / "scores", folder / name))
        console.rule(f"{next(number)}. distill: the teacher's logits back in{which}", align="left")
        distill_round(options, source, folder / "pruned", one, folder / "distilled")
        before = str(folder / "distilled")
    processes.in_first(lambda: prove(options, source, before, out, number))


def prove(options: Options, source: str, distilled: str, out: Path, number: Iterator[int]) -> None:
    """After the rounds: the gap, the folder for others, whether it fits, and the page of all that."""
    console.rule(f"{next(number)}. evaluate: the gap on held-out files", align="left")
    measure_gap(options, source, student_folders(out, options.plan()), out)
    console.rule(f"{next(number)}. export: a folder for others", align="left")
    export.run(export.Options(distilled, out / "exported", options.export_dtype, None, 256, options.seed,
                              base=source, gap=str(out / "gap")), replaces=True)  # fmt: skip
    console.rule(f"{next(number)}. memory-fit: does it fit the card", align="left")
    fits = {name: estimated(str(folder), options.hardware, options.fit)
            for name, folder in {"teacher": model_folder(source), "student": out / "exported"}.items()}  # fmt: skip
    memory_fit.print_estimate(fits["student"])
    finish(out, options, {name: estimate.to_json() for name, estimate in fits.items()})


def shared(options: Options, reads: bool = True) -> dict[str, Any]:
    """What every stage is told."""
    return {"data": options.data if reads else None, "device": options.device, "dtype": options.dtype}


def score_round(options: Options, model: str, one: Round, folder: Path) -> None:
    score.run(score.Options(model, output=folder, seq_len=one.distill.seq_len, batch=one.distill.rows, seed=one.seed,
                            importance=one.scored(load_config(model_folder(model))), **shared(options)))  # fmt: skip


def prune_round(options: Options, model: str, one: Round, scores: Path, folder: Path) -> None:
    prune.run(prune.Options(model, scores, folder, one.target, one.repair, seq_len=one.distill.seq_len,
                            batch=one.distill.rows, seed=one.seed, **shared(options, one.reads_text)))  # fmt: skip


def distill_round(
    options: Options, teacher: str, student: Path, one: Round, folder: Path, cache: Path | None = None
) -> None:
    distill.run(distill.Options(teacher, str(student), output=folder, seed=one.seed, distill=one.distill,
        teacher_cache=cache, shard=options.shard, **options.tracking, **shared(options)))  # fmt: skip


def measure_gap(options: Options, teacher: str, students: Mapping[str, Path], out: Path) -> None:
    how, named = options.distill, {name: str(folder) for name, folder in students.items()}
    scores = str(out / "scores") if (out / "scores" / "scores.json").is_file() else None  # of one round: the teacher's
    wanted = evaluate.Options(teacher, named, output=out / "gap", split="test", tokens=options.evaluate_tokens,
                              seq_len=how.seq_len, batch=how.rows, seed=options.seed, scores=scores,
                              hardware=options.hardware, fit=options.fit, **shared(options))  # fmt: skip
    evaluate.run(wanted, replaces=True)


def claim(options: Options, data: NamedData, root: Path, *, whole: bool) -> None:
    """Makes the output folder this run's, whose students are `whole` in every process or split among them. Raises
    InputError where it is not new or this very run's (but for LATE), and where a stage could not do what is wanted."""
    source, rounds = model_folder(options.model), options.plan()
    content = plain(options) | {"distill": options.distill.chosen}
    for name in (*APART, *LATE, *options.tracking, *(() if options.rounds else ("rounds",))):
        content.pop(name)
    known = {"scores", "plain", "pruned", "distilled", "gap", "exported", "run", "report", "result.json"}
    check_ours(root, known | {one.name for one in rounds}, root / "run")
    torch_device(options.device)
    options.fit.estimate(load_config(source), options.hardware)  # says what is wrong with either
    evaluate.Details().check_length(load_config(source).max_position_embeddings)
    if not (root / "run").exists():
        check_feasible(data, source, rounds, whole=whole)
    with stage(root / "run", "compress", inputs={"model": source, "data": data_input(data)}, options=content):
        pass


def finish(out: Path, options: Options, fits: dict[str, Any]) -> None:
    """The page, and the table of what matters."""
    gap, rounds = read_json(out / "gap" / "gap.json"), options.plan()
    last = out / rounds[-1].name
    folders = {f"{one.name} scores".strip(): out / one.name / "scores" for one in rounds}
    sizes = student_folders(out, rounds)
    folders |= sizes | {name: out / name for name in ("gap", "exported")}
    with stage(out / "report", "report", inputs=folders, options={"memory": fits}, replaces=True) as work:
        if not work.finished:
            write_page(
                work.folder, "report.html", title="Compression report", gap=gap,
                provenance={name: read_json(path / PROVENANCE) for name, path in folders.items()},
                models={"teacher": options.model, **{name: str(path) for name, path in sizes.items()}},
                run=run_facts(work.folder, output=out, inputs=work.made_of.inputs), scores=last / "scores",
                metrics=last / "distilled" / "metrics.jsonl", memory=gap["memory"],
                selection=read_json(last / "pruned" / "selection.json"),
            )  # fmt: skip
    sizes = {"teacher": model_folder(options.model), **sizes}
    console.rule("Result", align="left")
    print_figures(gap, {name: load_config(sizes[name]) for name in gap["models"]}, options.hardware, options.fit)
    if gap["recovery"] is not None:
        say(f"recovered {gap['recovery']['value']:.1%} of the cross-entropy that pruning lost{from_plain(gap)}")
    say(f"page:   {out / 'report' / 'report.html'}\nexport: {out / 'exported'}")
    result(out, {"gap": gap["models"], "recovery": gap["recovery"], "memory": fits})
