"""`limbeck compress`: the whole story. Each stage reads folders and writes a folder; a finished one is not done again.

model --score--> scores --prune--> pruned --distill--> distilled --evaluate--> gap --export--> exported

The first three make a round; of several, each begins with what the one before it distilled. Of many processes all
score and distil, and the first does the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..distill.report.report import write_page
from ..distill.text.mixture import batches_per_epoch
from ..models import processes
from ..models.checkpoint import load_config, open_checkpoint
from ..models.cost.inference import Hardware, count_parameters
from ..models.errors import InputError
from ..models.fingerprint import PROVENANCE, plain
from ..models.tokenizer import check_vocabulary, load_tokenizer
from ..prune.target import Target
from . import distill, evaluate, export, memory_fit, prune, score
from .rounds import Round, make_rounds, rehearse, walk
from .run.resolve import check_counts, corpus, data_input, model_config, model_folder
from .run.show import console, gib, read_json, result, say, table
from .run.stage import Facts, run_stage
from .score import many_processes


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    data: str | None
    output: Path | None
    dry_run: bool
    seed: int
    device: str
    dtype: str
    importance: score.Importance
    target: Target
    rounds: tuple[dict[str, Any], ...]
    repair: prune.Mending
    distill: distill.Distill
    evaluate_tokens: int
    export_dtype: str
    hardware: Hardware
    fit: memory_fit.Fit

    def __post_init__(self) -> None:
        for name in ("data", "output"):
            if getattr(self, name) is None and not self.dry_run:
                raise InputError(f"{name} is missing; give {name}=VALUE (limbeck compress --help)")
        if not self.rounds and self.target == Target():
            raise InputError("target is empty; give a size, such as target.parameters=0.75 (limbeck compress --help)")
        check_counts(self, "evaluate_tokens")
        self.plan()

    def plan(self) -> tuple[Round, ...]:
        base = Round("", self.seed, self.importance, self.target, self.repair, self.distill)
        return make_rounds(base, self.rounds)


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        for how in (how for found in options.plan() for how in found.distill.plan()):
            distill.check_share(how.batch)
        processes.in_first(lambda: begin(options))
        if not options.dry_run:
            compress(options)


def begin(options: Options) -> None:
    """Claims the output, once what is asked for is seen to be possible; or says what it will come to."""
    if options.dry_run:
        return rehearse(model_config(options.model), options.plan(), options.hardware, options.fit)
    assert options.data is not None and options.output is not None
    claim(options, options.data, options.output)


def compress(options: Options) -> None:
    """The chain, or what is left of it to do."""
    assert options.output is not None
    rounds, out, source = options.plan(), options.output, str(model_folder(options.model))
    number, before = itertools.count(1), source
    for found in rounds:
        which = f" ({found.name})" if found.name else ""
        folder = out / found.name
        stage(f"{next(number)}. score: what matters{which}")
        score_round(options, before, found, folder / "scores")
        stage(f"{next(number)}. prune: layers, widths and SSM heads{which}")
        pruned = functools.partial(prune_round, options, before, found, folder / "scores", folder / "pruned")
        processes.in_first(pruned)
        stage(f"{next(number)}. distill: the teacher's logits back in{which}")
        distill_round(options, source, folder / "pruned", found, folder / "distilled")
        before = str(folder / "distilled")
    processes.in_first(lambda: prove(options, source, before, number))


def prove(options: Options, source: str, distilled: str, number: Iterator[int]) -> None:
    """Behind the rounds: the gap, the folder for others, whether it fits, and the page of all that."""
    assert options.output is not None
    out = options.output
    stage(f"{next(number)}. evaluate: the gap on held-out files")
    measure_gap(options, source, student_folders(out, options.plan()), out)
    stage(f"{next(number)}. export: a folder for others")
    export.run(export.Options(distilled, out / "exported", options.export_dtype, 5 * 10**9, 256, options.seed,
                              base=source, gap=str(out / "gap")))  # fmt: skip
    stage(f"{next(number)}. memory-fit: does it fit the card")
    fits = {name: memory_fit.measure(model_config(str(folder)), options.hardware, options.fit)
            for name, folder in {"teacher": model_folder(source), "student": out / "exported"}.items()}  # fmt: skip
    memory_fit.show(load_config(out / "exported"), *fits["student"], options.hardware)
    finish(out, options, {name: memory_fit.as_json(*fit, options.hardware) for name, fit in fits.items()})


def shared(options: Options) -> dict[str, Any]:
    """What every stage is told."""
    return {"data": options.data, "device": options.device, "dtype": options.dtype}


def score_round(options: Options, model: str, found: Round, folder: Path) -> None:
    length, batch = found.distill.seq_len, found.distill.rows
    score.run(score.Options(model, output=folder, seq_len=length, batch=batch, seed=found.seed,
                            importance=found.scored(load_config(model_folder(model))), **shared(options)))  # fmt: skip


def prune_round(options: Options, model: str, found: Round, scores: Path, folder: Path) -> None:
    length, batch = found.distill.seq_len, found.distill.rows
    prune.run(prune.Options(model, scores, folder, found.target, found.repair,
                            seq_len=length, batch=batch, seed=found.seed, **shared(options)))  # fmt: skip


def distill_round(
    options: Options, teacher: str, student: Path, found: Round, folder: Path, cache: Path | None = None
) -> None:
    distill.run(distill.Options(teacher, str(student), output=folder, seed=found.seed, distill=found.distill,
                                teacher_cache=cache, **shared(options)))  # fmt: skip


def measure_gap(options: Options, teacher: str, students: Mapping[str, Path], out: Path) -> None:
    named = {name: str(folder) for name, folder in students.items()}
    how = options.distill
    scores = str(out / "scores") if (out / "scores" / "scores.json").is_file() else None  # of one round: the teacher's
    evaluate.run(evaluate.Options(teacher, named, output=out / "gap", split="test", tokens=options.evaluate_tokens,
                                  seq_len=how.seq_len, batch=how.rows, seed=options.seed, scores=scores,
                                  hardware=options.hardware, fit=options.fit, **shared(options)))  # fmt: skip


def student_folders(out: Path, rounds: Sequence[Round]) -> dict[str, Path]:
    """The students of all rounds by name; those of the last are "pruned" and "distilled", of which recovery is told."""
    found: dict[str, Path] = {}
    for item in rounds:
        label = f"{item.name} " if item is not rounds[-1] else ""
        found |= {f"{label}{name}": out / item.name / name for name in ("pruned", "distilled")}
    return found


def claim(options: Options, data: str, root: Path) -> None:
    """Makes the output folder this run's. Raises InputError where it is not new or this very run's, and, of a new one,
    where a stage could not do what is asked of it."""
    source, rounds = model_folder(options.model), options.plan()
    content = plain(options) | {"distill": options.distill.chosen}
    for name in ("output", "device", "data", "dry_run", *(() if options.rounds else ("rounds",))):
        content.pop(name)
    known = {"scores", "pruned", "distilled", "gap", "exported", "run", "report", "result.json"}
    known |= {found.name for found in rounds}
    if root.exists() and (not root.is_dir() or not (root / "run").is_dir()):
        strangers = [path.name for path in root.iterdir()] if root.is_dir() else [root.name]
        if [name for name in strangers if name.strip(".").removesuffix(".partial") not in known]:
            raise InputError(f"{root} exists already and is not of limbeck; give an output that does not")
    if not (root / "run").exists():
        check_feasible(data, source, rounds)
    run_stage(
        root / "run",
        name="compress",
        inputs={"model": source, "data": data_input(data)},
        options=content,
        make=lambda folder, facts: None,
    )


def check_feasible(data: str, source: Path, rounds: Sequence[Round]) -> None:
    """Finds what is wrong with model, targets and data before the first folder is written. Raises InputError."""
    config = open_checkpoint(source).config
    for _ in walk(config, rounds):
        pass
    check_vocabulary(load_tokenizer(source), config)
    text, *_ = (corpus(data, split, source) for split in ("train", "validation", "test"))
    for found in rounds:
        with found.named():
            for how in found.distill.plan():
                batches_per_epoch(text, how.batch, how.seq_len)


def stage(title: str) -> None:
    console.rule(title, align="left")


def finish(out: Path, options: Options, fits: dict[str, Any]) -> None:
    """The page, and the table of what matters."""
    gap, rounds = read_json(out / "gap" / "gap.json"), options.plan()
    last = out / rounds[-1].name
    sizes = {"teacher": model_folder(options.model), **student_folders(out, rounds)}
    folders = {
        f"{found.name} {name}".strip(): out / found.name / name
        for found in rounds
        for name in ("scores", "pruned", "distilled")
    }
    folders |= {name: out / name for name in ("gap", "exported")}

    def make(folder: Path, _: Facts) -> None:
        write_page(
            folder,
            "report.html",
            title="Compression report",
            gap=gap,
            provenance={name: read_json(path / PROVENANCE) for name, path in folders.items()},
            scores=last / "scores",
            metrics=last / "distilled" / "metrics.jsonl",
            memory=gap["memory"],
            selection=read_json(last / "pruned" / "selection.json"),
        )

    run_stage(out / "report", name="report", inputs=folders, options={"memory": fits}, make=make)
    rows = []
    for name, found in gap["models"].items():
        config = load_config(sizes[name])
        values = [f"{found[key]['value']:.4f}" for key in ("bits_per_byte", "kl")]
        share = f"{found['agreement']['value']:.1%}"
        total = memory_fit.measure(config, options.hardware, options.fit)[0].total
        rows.append((name, f"{count_parameters(config):,}", *values, share, gib(total)))
    console.rule("Result", align="left")
    length = options.fit.of(load_config(model_folder(options.model))).length
    context = f"memory at {length:,} tokens x {options.fit.batch}"
    table("", ("model", "parameters", "bits per byte", "KL", "top-1 agreement", context), rows)
    if gap["recovery"] is not None:
        say(f"recovered {gap['recovery']['value']:.1%} of the cross-entropy that pruning lost")
    say(f"page:   {out / 'report' / 'report.html'}")
    say(f"export: {out / 'exported'}")
    result(out, {"gap": gap["models"], "recovery": gap["recovery"], "memory": fits})
