"""`limbeck cache-teacher`: the teacher's top-k tokens, or draws from its distribution, at every token that `limbeck
distill` will read with the same teacher, data, seed and distill options. Killed, the same command resumes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..distill.options import DistillOptions
from ..distill.parallel import process_device
from ..distill.stages import measured_rows, stage_batches
from ..distill.teacher import TOP_K, CacheOptions, finish_cache, write_cache
from ..distill.text.mixture import Text
from ..distill.text.packing import Batch
from ..models import processes
from ..models.checkpoint import load_model
from ..models.device import torch_device, torch_dtype
from ..models.errors import InputError
from ..models.folder import sha256_file
from .run.resolve import NamedData, corpus, data_input, held_out, model_folder, say_epochs
from .run.show import progress, read_json, result, table
from .run.stage import many_processes, stage


@dataclasses.dataclass(frozen=True)
class Options:
    teacher: str
    data: NamedData
    output: Path
    seed: int
    device: str
    dtype: str
    cache: CacheOptions
    distill: DistillOptions


def run(options: Options) -> None:
    check(options.distill)
    with many_processes(options.device), processes.together():
        cache(options)
        if processes.rank():
            return
        facts = read_json(options.output / "cache.json")
        rows = [(name, f"{facts[name]:,}") for name in ("k", "rows", "tokens")]
        rows.insert(0, ("method", facts.get("method", TOP_K)))
        rows.append(("bytes a token", f"{facts['bytes_per_token']:,.1f}"))
        table(f"Cached {options.teacher}", ("", ""), rows)
        result(options.output, {"cache": str(options.output), **facts})


def check(how: DistillOptions) -> None:
    """Raises InputError for what a cache cannot have, or what would not be heeded."""
    if any(part.own_rows for part in how.plan()):
        raise InputError(
            "cache-teacher: a student with distill.rollouts is yet to write what it reads, and nothing of it can be"
            " cached; leave them out"
        )
    if how.teacher_correction is not None:
        raise InputError(
            "cache-teacher: the teacher is cached as it is; leave distill.teacher_correction out, and give"
            " teacher=OUTPUT-corrected-teacher of a limbeck distill that has it"
        )
    if how.teacher_dtype is not None:
        raise InputError("cache-teacher: the teacher's dtype is dtype=; leave distill.teacher_dtype out")
    if how.teacher_offload:
        raise InputError("cache-teacher: the teacher is loaded whole; leave distill.teacher_offload out")


def cache(options: Options) -> None:
    """The stage. Of many processes each runs a whole teacher on its share of the rows."""
    source, how = model_folder(options.teacher), options.distill
    chosen = {
        "cache": options.cache.chosen,
        "rows": [[part.train.steps, part.batch, part.seq_len, part.evaluate_tokens] for part in how.plan()],
        "repack": how.repack,
        "seed": options.seed,
        "dtype": options.dtype,
    }
    inputs = {"teacher": source, "data": data_input(options.data)}
    with stage(options.output, "cache-teacher", inputs=inputs, options=chosen, resumes=True) as work:
        if work.finished:
            return
        device = process_device(torch_device(options.device))
        teacher = load_model(source, torch_dtype(options.dtype), device)
        text = corpus(options.data, "train", source)
        say_epochs(text, [part.reads for part in how.plan()])
        unread = functools.partial(held_out, options.data, source, seed=options.seed)
        measured = [list(measured_rows(part, unread)) for part in how.plan()]
        total = sum(part.train.steps * part.batch for part in how.plan())
        total += sum(len(batch.input_ids) for batches in measured for batch in batches)
        with progress("caching the teacher", total) as bar:
            write_cache(teacher, batches(text, measured, options), work.folder, options.cache, bar.add)
        processes.gather(None)  # every process has written its files
        if processes.rank() == 0:
            tokenizer = sha256_file(source / "tokenizer.json")
            finish_cache(work.folder, teacher.config.vocab_size, tokenizer, options.cache)


def batches(text: Text, held_out: list[list[Batch]], options: Options) -> Iterator[tuple[Batch, int]]:
    """What distill will read, held-out rows first, each batch with the rows that go through a model at once."""
    for number, (how, measured) in enumerate(zip(options.distill.plan(), held_out, strict=True)):
        for batch in itertools.chain(measured, stage_batches(text, how, number, options.seed)):
            yield batch, how.rows
