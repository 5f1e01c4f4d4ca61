"""`limbeck cache-teacher`: the teacher's likeliest tokens at every token that `limbeck distill` will read with the same
teacher, data, seed and distill options. Killed, the same command goes on where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..distill.options import DistillOptions
from ..distill.stages import stage_batches
from ..distill.teacher import CacheOptions, finish_cache, write_cache
from ..distill.text.mixture import Text
from ..distill.text.packing import Batch
from ..models import processes
from ..models.checkpoint import load_model
from ..models.folder import sha256_file
from .distill import held_out
from .run.resolve import corpus, data_input, model_folder, torch_device, torch_dtype
from .run.show import progress, read_json, result, table
from .run.stage import run_stage


@dataclasses.dataclass(frozen=True)
class Options:
    teacher: str
    data: str
    output: Path
    seed: int
    device: str
    dtype: str
    cache: CacheOptions
    distill: DistillOptions


def run(options: Options) -> None:
    teacher, how = model_folder(options.teacher), options.distill
    run_stage(
        options.output,
        name="cache-teacher",
        inputs={"teacher": teacher, "data": data_input(options.data)},
        options={
            "cache": options.cache,
            "rows": [[part.train.steps, part.batch, part.seq_len, part.evaluate_tokens] for part in how.plan()],
            "repack": how.repack,
            "seed": options.seed,
            "dtype": options.dtype,
        },
        make=lambda folder, facts: fill(folder, teacher, options),
        resumes=True,
    )
    facts = read_json(options.output / "cache.json")
    rows = [(name, f"{facts[name]:,}") for name in ("k", "rows", "tokens")]
    rows.append(("bytes a token", f"{facts['bytes_per_token']:,.1f}"))
    table(f"Cached {options.teacher}", ("", ""), rows)
    result(options.output, {"cache": str(options.output), **facts})


def fill(folder: Path, teacher_folder: Path, options: Options) -> None:
    teacher = load_model(teacher_folder, torch_dtype(options.dtype), torch_device(options.device))
    text = corpus(options.data, "train", teacher_folder)
    total = done = 0
    for how in options.distill.plan():
        measured = held_out(options.data, teacher_folder, how, options.seed)
        total += how.train.steps * how.batch + sum(len(batch.input_ids) for batch in measured)
    with progress("caching the teacher", total) as bar:

        def on_rows(count: int) -> None:
            nonlocal done
            done += count
            bar.set(done)

        write_cache(teacher, batches(text, teacher_folder, options), folder, options.cache, on_rows)
    processes.gather(None)  # every process has written its files
    if processes.rank() == 0:
        finish_cache(folder, teacher.config.vocab_size, sha256_file(teacher_folder / "tokenizer.json"), options.cache)


def batches(text: Text, teacher_folder: Path, options: Options) -> Iterator[tuple[Batch, int]]:
    """What distill will read, held-out rows first, each batch with the rows that go through a model at once."""
    for number, how in enumerate(options.distill.plan()):
        for batch in held_out(options.data, teacher_folder, how, options.seed):
            yield batch, how.rows
        for batch in stage_batches(text, how, number, options.seed):
            yield batch, how.rows
