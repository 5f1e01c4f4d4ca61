"""`limbeck evaluate`: the gap between a teacher and its students on held-out text: gap.json and a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..distill.gap import TEACHER, measure_gap
from ..distill.report import write_page
from ..models.checkpoint import load_config, load_model
from ..models.cost import count_parameters
from ..models.errors import InputError
from ..models.folder import write_json
from .inputs import data_input, model_folder, sample, torch_device, torch_dtype
from .show import progress, read_json, result, say, table
from .stage import Facts, run_stage


@dataclasses.dataclass(frozen=True)
class Options:
    teacher: str
    student: dict[str, str]
    data: str
    output: Path
    split: str
    tokens: int
    seq_len: int
    batch: int
    seed: int
    device: str
    dtype: str


def run(options: Options) -> None:
    if TEACHER in options.student:
        raise InputError(f"student.{TEACHER} stands for the teacher itself; give the student another name")
    folders = {TEACHER: model_folder(options.teacher)}
    folders |= {name: model_folder(folder) for name, folder in options.student.items()}
    run_stage(
        options.output,
        name="evaluate",
        inputs={**folders, "data": data_input(options.data)},
        options={name: getattr(options, name) for name in ("split", "tokens", "seq_len", "batch", "seed", "dtype")},
        make=lambda folder, facts: fill(folder, folders, options, facts),
    )
    show(read_json(options.output / "gap.json"))
    result(options.output, {"gap": str(options.output / "gap.json"), "page": str(options.output / "gap.html")})


def fill(folder: Path, folders: dict[str, Path], options: Options, facts: Facts) -> None:
    """Measures into an existing folder: gap.json, gap.html and its plots."""
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    models = {name: load_model(path, dtype, device) for name, path in folders.items()}
    teacher = models.pop(TEACHER)
    batches = sample(
        options.data, options.split, folders[TEACHER],
        tokens=options.tokens, seq_len=options.seq_len, batch=options.batch, seed=options.seed,
    )  # fmt: skip
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(teacher, models, batches, seed=options.seed, on_step=lambda done: bar.set(done))
    content = report.to_json()
    content["parameters"] = {name: count_parameters(load_config(path)) for name, path in folders.items()}
    content["data"] = {"data": options.data, "split": options.split, "tokens": report.tokens}
    write_json(folder / "gap.json", content)
    write_page(folder, "gap.html", title="Teacher-student gap", gap=content, provenance={"evaluate": facts.content()})


def show(gap: dict[str, Any]) -> None:
    """The table of the gap, and how two students differ, with 95% intervals over documents."""
    columns = ("bits per byte", "cross-entropy", "KL to teacher", "top-1 agreement")
    keys = ("bits_per_byte", "cross_entropy", "kl", "agreement")
    rows = [
        (f"{name}\n{gap['parameters'][name]:,}", *(interval(found[key]) for key in keys))
        for name, found in gap["models"].items()
    ]
    title = f"Held-out text: {gap['tokens']:,} tokens of {gap['documents']} documents (95% intervals over documents)"
    table(title, ("model\nparameters", *columns), rows)
    pairs = [
        (f"{pair['second']}\n- {pair['first']}", *(interval(pair[key], "+") for key in keys))
        for pair in gap["differences"]
        if pair["first"] != TEACHER
    ]
    if pairs:
        table("Differences between students, paired by document", ("", *columns), pairs)
    if gap["recovery"] is not None:
        found = gap["recovery"]
        say(f"recovered of what pruning lost: {found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})")
    elif {"pruned", "distilled"} <= gap["models"].keys():
        say("recovered: not said, since pruning lost nothing that these documents show")


def interval(found: dict[str, float], sign: str = "") -> str:
    """A value over its interval: two lines."""
    return f"{found['value']:{sign}.4f}\n{found['low']:.3f}..{found['high']:.3f}"
