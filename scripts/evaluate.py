"""`limbeck evaluate`: the gap between a teacher and its students on held-out text: gap.json and a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..distill.data import sample_batches
from ..distill.gap import Estimate, measure_gap
from ..distill.report import write_page
from ..models.checkpoint import load_config, load_model
from ..models.cost import count_parameters
from ..models.folder import write_json
from .inputs import corpus, data_input, model_folder, torch_device, torch_dtype
from .show import progress, read_json, result, table
from .stage import run_stage


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
    folders = {"teacher": model_folder(options.teacher)}
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


def fill(folder: Path, folders: dict[str, Path], options: Options, facts: dict[str, Any]) -> None:
    """Measures into an existing folder: gap.json, gap.html and its plots."""
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    models = {name: load_model(path, dtype, device) for name, path in folders.items()}
    teacher = models.pop("teacher")
    text = corpus(options.data, options.split, folders["teacher"])
    batches = sample_batches(
        text, batch_size=options.batch, seq_len=options.seq_len, seed=options.seed, max_tokens=options.tokens
    )
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(teacher, models, batches, seed=options.seed, on_step=lambda done: bar.set(done))
    content = report.to_json()
    content["parameters"] = {name: count_parameters(load_config(path)) for name, path in folders.items()}
    content["data"] = {"data": options.data, "split": options.split, "tokens": report.tokens}
    write_json(folder / "gap.json", content)
    write_page(folder, "gap.html", title="Teacher-student gap", gap=content, provenance=facts)


def show(gap: dict[str, Any]) -> None:
    """The table of the gap, with 95% intervals over documents."""
    rows = []
    for name, found in gap["models"].items():
        cells = [interval(found[key]) for key in ("bits_per_byte", "cross_entropy", "kl", "agreement")]
        rows.append((name, f"{gap['parameters'][name]:,}", *cells))
    title = f"Held-out text: {gap['tokens']:,} tokens of {gap['documents']} documents (95% intervals over documents)"
    table(title, ("model", "parameters", "bits per byte", "cross-entropy", "KL to teacher", "top-1 agreement"), rows)
    if gap["recovery"] is not None:
        table("", ("recovered of what pruning lost", interval(gap["recovery"])), [])


def interval(found: dict[str, float] | Estimate) -> str:
    value = found if isinstance(found, dict) else dataclasses.asdict(found)
    return f"{value['value']:.4f} [{value['low']:.3f}, {value['high']:.3f}]"
