"""`limbeck pretrain`: cross-entropy on a corpus, from nothing (tokenizer, random weights) or from a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from ..distill.average import write_trained
from ..distill.gap.measure import measure_gap
from ..distill.losses import cross_entropy_loss
from ..distill.options import SPLIT, TrainOptions
from ..distill.parallel import Trained, check_share, load_trained, placed_model, process_device
from ..distill.text.packing import check_measurable
from ..distill.trainer import train
from ..models import processes
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.hybrid import HybridLM, initialize
from ..models.row_split import row_split
from ..models.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer
from .run.resolve import (
    NamedData,
    check_counts,
    data_input,
    documents,
    model_config,
    model_folder,
    say_epochs,
    text_in_tokens,
    torch_device,
)
from .run.show import progress, result, say
from .run.stage import Work, many_processes, stage
from .run.tracking import Tracked, journal, speed_of, training_bar


@dataclasses.dataclass(frozen=True)
class Options(Tracked):
    model: str
    init: str | None
    data: NamedData
    output: Path
    seed: int
    data_seed: int
    device: str
    seq_len: int
    batch: int
    evaluate_tokens: int
    train: TrainOptions
    shard: bool = True

    def __post_init__(self) -> None:
        check_counts(self, "seq_len", "batch", "evaluate_tokens")


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        chosen = dataclasses.asdict(options)
        inputs: dict[str, Path | str] = {"data": data_input(options.data)}
        if options.init is not None:
            inputs["init"] = model_folder(options.init)
            del chosen["model"], chosen["seed"]
        for name in ("output", "device", "data", "init", "shard", "matmul", *options.tracking):
            del chosen[name]
        del chosen["train"][SPLIT]
        with stage(options.output, "pretrain", inputs=inputs, options=chosen, scratch="training") as work:
            if not work.finished:
                pretrain(work, options)
        if processes.rank() == 0:
            result(options.output, {"model": str(options.output)})


def pretrain(work: Work, options: Options) -> None:
    """Trains tokenizer and model into an existing folder, from what is there on."""
    with processes.together():
        check_share(options.batch, options.seq_len, options.train.context_parallel)
    student = first_model(work.folder, options)
    config = student.model.config
    tokenizer_from = work.folder if options.init is None else model_folder(options.init)
    check_vocabulary(load_tokenizer(tokenizer_from), config)
    text = text_in_tokens(options.data, "train", tokenizer_from)
    size: dict[str, Any] = {"batch_size": options.batch, "seq_len": options.seq_len, "seed": options.data_seed}
    held_out: list[Any] = []
    if options.train.evaluate_every:
        unseen = text_in_tokens(options.data, "validation", tokenizer_from)
        held_out = list(unseen.sample(**size, max_tokens=options.evaluate_tokens))
        check_measurable(held_out, options.data, "validation")
    say(f"{count_parameters(config):,} parameters, {text.tokens:,} tokens of text")
    say_epochs(text, [(options.train.steps * options.batch, options.seq_len)])

    def evaluate(model: HybridLM) -> dict[str, float]:
        split = row_split(options.train.context_parallel)
        gap = measure_gap(model, {}, held_out, resamples=2, split=split).models["teacher"]
        return {"validation_loss": gap.cross_entropy.value, "validation_bits_per_byte": gap.bits_per_byte.value}

    if processes.rank() == 0:
        work.made_of.settle("data")
    training, batches = work.folder / "training", functools.partial(text.train_batches, **size)
    speed = speed_of(config, None, options.seq_len, student.device)
    with (
        journal(options, work.folder, options.output.name, work.options) as note_down,
        training_bar("pretraining", options.train.steps, note_down) as on_step,
    ):
        train(
            student, cross_entropy_loss, lambda start: batches(start=start), options.train, training,
            evaluate=evaluate, on_step=on_step, describe=speed, say=say,
        )  # fmt: skip
    work.notes["weights"] = write_trained(
        work.folder, training, options.train, config, torch.float32, tokenizer_from=tokenizer_from
    )


def first_model(folder: Path, options: Options) -> Trained:
    """The model at its first step: that of the folder `init`, or random, with a tokenizer trained into `folder`."""
    device = process_device(torch_device(options.device))
    if options.init is not None:
        return load_trained(model_folder(options.init), torch.float32, device, options.shard)
    config = model_config(options.model)
    with processes.together():
        if processes.rank() == 0 and not (folder / "tokenizer.json").exists():
            text = (document.text for document in documents(options.data, "train"))
            with progress("training the tokenizer"):
                train_tokenizer(text, config.vocab_size, folder)
    if (size := load_tokenizer(folder).vocab_size) != config.vocab_size:
        raise InputError(
            f"data={options.data}: the text gives only {size} tokens, the model has"
            f" {config.vocab_size}; give more text or a smaller vocab_size"
        )
    model = HybridLM(config, device=device)
    initialize(model, torch.Generator(device=device).manual_seed(options.seed))
    return placed_model(model, torch.float32, options.shard)
