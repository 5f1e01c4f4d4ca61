"""`limbeck compress`: the whole story. Each stage reads folders and writes a folder; a finished one is not done again.

model --score--> scores --prune--> pruned --distill--> distilled --evaluate--> gap --export--> exported
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..distill.report import write_page
from ..models.checkpoint import load_config, open_checkpoint
from ..models.cost import Hardware, count_parameters
from ..models.errors import InputError
from ..models.tokenizer import check_vocabulary, load_tokenizer
from ..prune.choose import Target, select
from ..prune.depth import check_removal, step_size
from ..prune.importance import score_random
from ..prune.slice import slice_config
from . import distill, evaluate, export, memory_fit, prune, score
from .inputs import data_input, documents, model_config, model_folder
from .show import console, gib, read_json, result, say, table
from .stage import PROVENANCE, Facts, plain, run_stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    data: str
    output: Path
    seed: int
    device: str
    dtype: str
    importance: score.Importance
    target: Target
    repair: prune.Mending
    distill: distill.Distill
    evaluate_tokens: int
    export_dtype: str
    hardware: Hardware
    fit: memory_fit.Fit


def run(options: Options) -> None:
    out, begin = options.output, claim(options)
    length, batch = options.distill.seq_len, options.distill.batch
    common: dict[str, Any] = {
        "data": options.data, "seed": options.seed, "device": options.device, "dtype": options.dtype
    }  # fmt: skip
    stage("1. score: what matters")
    score.run(score.Options(begin, output=out / "scores", seq_len=length, batch=batch, importance=options.importance,
                            **common))  # fmt: skip
    stage("2. prune: layers, widths and SSM heads")
    prune.run(prune.Options(begin, out / "scores", out / "pruned", options.target, options.repair, seq_len=length,
                            batch=batch, **common))  # fmt: skip
    stage("3. distill: the teacher's logits back in")
    distill.run(distill.Options(begin, str(out / "pruned"), output=out / "distilled", distill=options.distill,
                                **common))  # fmt: skip
    stage("4. evaluate: the gap on held-out files")
    students = {"pruned": str(out / "pruned"), "distilled": str(out / "distilled")}
    evaluate.run(evaluate.Options(begin, students, output=out / "gap", split="test", tokens=options.evaluate_tokens,
                                  seq_len=length, batch=batch, **common))  # fmt: skip
    stage("5. export: a folder for others")
    export.run(export.Options(str(out / "distilled"), out / "exported", options.export_dtype, 5 * 10**9, 256,
                              options.seed))  # fmt: skip
    stage("6. memory-fit: does it fit the card")
    fits = {name: memory_fit.measure(model_config(str(folder)), options.hardware, options.fit)
            for name, folder in {"teacher": model_folder(begin), "student": out / "exported"}.items()}  # fmt: skip
    memory_fit.show(load_config(out / "exported"), *fits["student"], options.hardware)
    finish(out, options, {name: memory_fit.as_json(*fit, options.hardware) for name, fit in fits.items()})


def claim(options: Options) -> str:
    """The model's folder as text, once the output folder is seen to be new, or this very run's."""
    source = model_folder(options.model)
    content = plain(options)
    for name in ("output", "device", "data"):
        content.pop(name)
    root = options.output
    known = {"scores", "pruned", "distilled", "gap", "exported", "run", "report", "result.json"}
    if root.exists() and (not root.is_dir() or not (root / "run").is_dir()):
        strangers = [path.name for path in root.iterdir()] if root.is_dir() else [root.name]
        if [name for name in strangers if name.strip(".").removesuffix(".partial") not in known]:
            raise InputError(f"{root} exists already and is not of limbeck; give an output that does not")
    if not (root / "run").exists():
        check_feasible(options, source)
    run_stage(
        root / "run",
        name="compress",
        inputs={"model": source, "data": data_input(options.data)},
        options=content,
        make=lambda folder, facts: None,
    )
    return str(source)


def check_feasible(options: Options, source: Path) -> None:
    """Finds what is wrong with model, target and data before the first folder is written. Raises InputError."""
    config = open_checkpoint(source).config
    how = options.importance
    check_removal(config, how.remove_layers, step_size(config, how.pairs), how.min_layers)
    order = tuple(range(config.num_layers))[: how.remove_layers]
    selection = select(config, score_random(config, options.seed), order, options.target)
    slice_config(config, selection).to_hf()
    check_vocabulary(load_tokenizer(source), config)
    for split in ("train", "validation", "test"):
        documents(options.data, split)


def stage(title: str) -> None:
    console.rule(title, align="left")


def finish(out: Path, options: Options, fits: dict[str, Any]) -> None:
    """The page, and the table of what matters."""
    gap = read_json(out / "gap" / "gap.json")
    teacher = model_folder(options.model)
    sizes = {"teacher": teacher, "pruned": out / "pruned", "distilled": out / "distilled"}
    folders = {name: out / name for name in ("scores", "pruned", "distilled", "gap", "exported")}

    def make(folder: Path, _: Facts) -> None:
        write_page(
            folder,
            "report.html",
            title="Compression report",
            gap=gap,
            provenance={name: read_json(path / PROVENANCE) for name, path in folders.items()},
            scores=out / "scores",
            metrics=out / "distilled" / "metrics.jsonl",
            memory=fits,
            selection=read_json(out / "pruned" / "selection.json"),
        )

    run_stage(out / "report", name="report", inputs=folders, options={"memory": fits}, make=make)
    rows = []
    totals = {"teacher": fits["teacher"], "pruned": fits["student"], "distilled": fits["student"]}
    for name, found in gap["models"].items():
        values = [f"{found[key]['value']:.4f}" for key in ("bits_per_byte", "kl")]
        share = f"{found['agreement']['value']:.1%}"
        memory = gib(totals[name]["memory"]["total"])
        rows.append((name, f"{count_parameters(load_config(sizes[name])):,}", *values, share, memory))
    console.rule("Result", align="left")
    context = f"memory at {options.fit.context:,} tokens x {options.fit.batch}"
    table("", ("model", "parameters", "bits per byte", "KL", "top-1 agreement", context), rows)
    if gap["recovery"] is not None:
        say(f"recovered {gap['recovery']['value']:.1%} of the cross-entropy that pruning lost")
    say(f"page:   {out / 'report' / 'report.html'}")
    say(f"export: {out / 'exported'}")
    result(out, {"gap": gap["models"], "recovery": gap["recovery"], "memory": fits})
