"""`limbeck pretrain`: cross-entropy on a corpus, from nothing (tokenizer, random weights) or from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..distill.gap.measure import measure_gap
from ..distill.losses import cross_entropy_loss
from ..distill.options import TrainOptions
from ..distill.parallel import Trained
from ..distill.text.mixture import sample_batches
from ..models import processes
from ..models.cost.parameters import count_parameters
from ..models.errors import InputError
from ..models.hybrid import HybridLM, initialize
from ..models.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer
from .distill import check_share, train_with_bar
from .run.resolve import check_counts, data_input, documents, model_config, model_folder, text_in_tokens
from .run.show import progress, result, say
from .run.stage import Facts, run_stage
from .run.tracking import check_mode, journal
from .score import many_processes
from .training import finish_training, load_trained, placed_model, process_device


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    init: str | None
    data: str
    output: Path
    seed: int
    data_seed: int
    device: str
    seq_len: int
    batch: int
    evaluate_tokens: int
    train: TrainOptions
    shard: bool = True
    wandb: str = "off"

    def __post_init__(self) -> None:
        check_mode(self.wandb)
        check_counts(self, "seq_len", "batch", "evaluate_tokens")


def run(options: Options) -> None:
    with many_processes(options.device), processes.together():
        make(options)
        if processes.rank() == 0:
            result(options.output, {"model": str(options.output)})


def make(options: Options) -> None:
    """The stage without its result.json."""
    chosen = dataclasses.asdict(options)
    inputs = {"data": data_input(options.data)}
    if options.init is not None:
        inputs["init"] = model_folder(options.init)
        del chosen["model"], chosen["seed"]
    for name in ("output", "device", "data", "init", "shard", "wandb"):
        del chosen[name]
    run_stage(
        options.output,
        name="pretrain",
        inputs=inputs,
        options=chosen,
        make=lambda folder, facts: fill(folder, facts, options),
        scratch="training",
    )


def fill(folder: Path, facts: Facts, options: Options) -> None:
    """Trains tokenizer and model into an existing folder, going on from what is there."""
    with processes.together():
        check_share(options.batch)
    student = begin(folder, options)
    model = student.model
    tokenizer_from = folder if options.init is None else model_folder(options.init)
    tokenizer = load_tokenizer(tokenizer_from)
    check_vocabulary(tokenizer, model.config)
    text = text_in_tokens(options.data, "train", tokenizer_from)
    held_out = sample_batches(
        text_in_tokens(options.data, "validation", tokenizer_from),
        batch_size=options.batch,
        seq_len=options.seq_len,
        seed=options.data_seed,
        max_tokens=options.evaluate_tokens,
    )
    say(f"{count_parameters(model.config):,} parameters, {text.tokens:,} tokens of text")

    def evaluate(model: HybridLM) -> dict[str, float]:
        found = measure_gap(model, {}, held_out, resamples=2).models["teacher"]
        return {"validation_loss": found.cross_entropy.value, "validation_bits_per_byte": found.bits_per_byte.value}

    with journal(options.wandb, folder, options.output.name, facts.options) as note_down:
        train_with_bar(
            "pretraining",
            student,
            cross_entropy_loss,
            text,
            options.train,
            folder / "training",
            batch=options.batch,
            seq_len=options.seq_len,
            seed=options.data_seed,
            evaluate=evaluate,
            note_down=note_down,
        )
    finish_training(folder, folder / "training", model.config, torch.float32, options.train, facts, tokenizer_from)


def begin(folder: Path, options: Options) -> Trained:
    """The model at its first step: that of the folder `init`, or random, with a tokenizer trained into `folder`."""
    device = process_device(options.device)
    if options.init is not None:
        return load_trained(model_folder(options.init), torch.float32, device, options.shard)
    config = model_config(options.model)
    with processes.together():
        if processes.rank() == 0 and not (folder / "tokenizer.json").exists():
            text = (document.text for document in documents(options.data, "train"))
            with progress("training the tokenizer"):
                train_tokenizer(text, config.vocab_size, folder)
    if (found := load_tokenizer(folder).vocab_size) != config.vocab_size:
        raise InputError(
            f"data={options.data}: the text gives only {found} tokens, the model has"
            f" {config.vocab_size}; give more text or a smaller vocab_size"
        )
    model = HybridLM(config, device=device)
    initialize(model, torch.Generator(device=device).manual_seed(options.seed))
    return placed_model(model, torch.float32, options.shard)
