"""What distill and pretrain share around the training loop: where the models lie, what the log says, what is left."""

from __future__ import annotations

import itertools
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..distill.average import Kept, kept_weights
from ..distill.options import TrainOptions
from ..distill.parallel import Trained, load_sharded, prepare, shard
from ..models import processes
from ..models.axes import tensor_table
from ..models.checkpoint import load_model, write_checkpoint
from ..models.config import HybridConfig
from ..models.cost.speed import flops_per_token
from ..models.hybrid import HybridLM
from .run.compose import CONF
from .run.resolve import torch_device
from .run.stage import Facts


def process_device(name: str) -> torch.device:
    """The device of this process: of several GPUs its own."""
    device = torch_device(name)
    if device.type == "cuda" and device.index is None and processes.count() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights in training are kept in: float32 at least."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def narrower(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype, if matrices are used in it and not kept in it."""
    return None if dtype == stored_dtype(dtype) else dtype


def load_trained(path: Path, dtype: torch.dtype, device: torch.device, split: bool) -> Trained:
    """A checkpoint to be trained: matrices in `dtype` where they are used, and what the optimizer moves in float32;
    with `split` divided among the processes. Raises InputError."""
    stored = stored_dtype(dtype)
    if split and processes.count() > 1:
        return prepare(load_sharded(path, stored, device, dtype=narrower(dtype)).train())
    return prepare(load_model(path, stored, device).train(), dtype)


def placed_model(model: HybridLM, dtype: torch.dtype, split: bool) -> Trained:
    """A model that is whole in every process, to be trained; with `split` divided among them."""
    if split and processes.count() > 1:
        shard(model, narrower(dtype))
        return prepare(model)
    return prepare(model, dtype)


def load_frozen(path: Path, dtype: torch.dtype, device: torch.device, split: bool, offload: bool = False) -> HybridLM:
    """A checkpoint to learn from, in `dtype`, without gradients; with `offload` its layers stay in main memory (each
    process's own), and each comes to the device when its turn comes. Raises InputError."""
    if offload:
        from accelerate import cpu_offload

        model = load_model(path, dtype, torch.device("cpu")).requires_grad_(False)
        layers = model.layers
        model.layers = torch.nn.ModuleList()
        model.to(device)
        model.layers = layers
        for layer in layers:
            cpu_offload(layer, execution_device=device, preload_module_classes=[type(layer).__name__])
        return model
    if split and processes.count() > 1:
        return load_sharded(path, dtype, device, frozen=True)
    return load_model(path, dtype, device).requires_grad_(False)


def figures(
    student: HybridConfig, teacher: HybridConfig | None, seq_len: int, device: torch.device
) -> Callable[[float], dict[str, float]]:
    """From tokens a second: the model's TFLOP/s (three passes of the student, one of the teacher; what runs twice for
    activation checkpointing counts once), their share of the cards' peak where that is known, and the memory."""
    flops = 3 * flops_per_token(student, seq_len) + (flops_per_token(teacher, seq_len) if teacher is not None else 0)
    peak = card_tflops(device)

    def found(rate: float) -> dict[str, float]:
        tflops = rate * flops / 1e12
        said = {"model_tflops": tflops, "memory_gib": peak_memory(device) / 2**30}
        return said | ({"mfu": tflops / (peak * processes.count())} if peak else {})

    return found


def card_tflops(device: torch.device) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU that conf/hardware/ knows, None for others (PCIe cards are slower)."""
    if device.type != "cuda":
        return None
    from omegaconf import OmegaConf

    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    words += [one + other for one, other in itertools.pairwise(words)] + [word.removesuffix("b") for word in words]
    for profile in sorted((CONF / "hardware").glob("*.yaml")):
        if "pcie" not in words and set(profile.stem.split("-")) <= set(words):
            content = OmegaConf.to_container(OmegaConf.load(profile), resolve=False)
            assert isinstance(content, dict)
            return float(content["bf16_tflops"])
    return None


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def finish_training(
    folder: Path,
    place: Path,
    config: HybridConfig,
    dtype: torch.dtype,
    options: TrainOptions,
    facts: Facts,
    tokenizer_from: Path,
) -> None:
    """What training left in `place` becomes a checkpoint in `folder`: weights, tokenizer, metrics. Matrices have the
    dtype that they were used in; limbeck.json will say which weights they are."""
    with processes.together():
        kept: Kept = kept_weights(place, options)
        facts.notes["weights"] = kept.said
        if processes.rank() == 0:
            dtypes = {
                name: dtype if len(axes.shape) > 1 else stored_dtype(dtype)
                for name, axes in tensor_table(config).items()
            }
            write_checkpoint(folder, config, kept.tensors(), dtypes=dtypes, tokenizer_from=tokenizer_from)
            metrics = folder / "training" / "metrics.jsonl"
            if metrics.exists():
                shutil.copyfile(metrics, folder / "metrics.jsonl")
