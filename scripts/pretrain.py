"""`limbeck pretrain`: cross-entropy on a corpus, from nothing (tokenizer, random weights) or from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..distill.gap import measure_gap
from ..distill.losses import cross_entropy_loss
from ..distill.mixture import sample_batches
from ..distill.trainer import TrainOptions
from ..models.checkpoint import load_model
from ..models.errors import InputError
from ..models.hybrid import HybridLM, initialize
from ..models.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer
from .distill import finish_training, train_with_bar
from .inputs import data_input, documents, model_config, model_folder, text_in_tokens, torch_device
from .show import progress, result, say
from .stage import run_stage


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


def run(options: Options) -> None:
    chosen = dataclasses.asdict(options)
    inputs = {"data": data_input(options.data)}
    if options.init is not None:
        inputs["init"] = model_folder(options.init)
        del chosen["model"], chosen["seed"]
    del chosen["output"], chosen["device"], chosen["data"], chosen["init"]
    run_stage(
        options.output,
        name="pretrain",
        inputs=inputs,
        options=chosen,
        make=lambda folder, facts: fill(folder, options),
        scratch="training",
    )
    result(options.output, {"model": str(options.output)})


def fill(folder: Path, options: Options) -> None:
    """Trains tokenizer and model into an existing folder, going on from what is there."""
    model = begin(folder, options)
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
    say(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {text.tokens:,} tokens of text")

    def evaluate(model: HybridLM) -> dict[str, float]:
        found = measure_gap(model, {}, held_out, resamples=2).models["teacher"]
        return {"validation_loss": found.cross_entropy.value, "validation_bits_per_byte": found.bits_per_byte.value}

    train_with_bar(
        "pretraining",
        model,
        cross_entropy_loss,
        text,
        options.train,
        folder / "training",
        batch=options.batch,
        seq_len=options.seq_len,
        seed=options.data_seed,
        evaluate=evaluate,
    )
    finish_training(folder, model, tokenizer_from)


def begin(folder: Path, options: Options) -> HybridLM:
    """The model at its first step: that of the folder `init`, or random, with a tokenizer trained into `folder`."""
    device = torch_device(options.device)
    if options.init is not None:
        return load_model(model_folder(options.init), torch.float32, device).train()
    config = model_config(options.model)
    if not (folder / "tokenizer.json").exists():
        with progress("training the tokenizer"):
            train_tokenizer((document.text for document in documents(options.data, "train")), config.vocab_size, folder)
    if (found := load_tokenizer(folder).vocab_size) != config.vocab_size:
        raise InputError(
            f"data={options.data}: the text gives only {found} tokens, the model has"
            f" {config.vocab_size}; give more text or a smaller vocab_size"
        )
    model = HybridLM(config, device=device)
    initialize(model, torch.Generator(device=model.head_weight.device).manual_seed(options.seed))
    return model
