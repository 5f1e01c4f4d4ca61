"""A checkpoint in another dtype, read back and compared: with its source, and with transformers on the same folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .axes import Role, tensor_table
from .checkpoint import Checkpoint, open_checkpoint, stream_rows, write_checkpoint
from .companions import companions, copy_companions
from .config import HybridConfig
from .cost.parameters import count_parameters
from .errors import CheckFailed, InputError, gib
from .families.known import FAMILIES
from .folder import write_json
from .foreign import read_object
from .hybrid import HybridLM
from .offload import free_memory
from .streamed import open_streamed
from .tensors import is_finite
from .tokenizer import check_tokenizer, state_begin

PARITY = 1e-4
GENERATION = "generation_config.json"
LARGEST_LENGTH = 2**40  # beyond it a number of tokens means that none is known


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far transformers' class of the family is from ours on one folder, in relative RMS of the logits; or why the
    two were not compared.

    With nemotron_h's Mamba layers there is a clamp to tell: transformers clamps the step dt from below at the config's
    `time_step_min` (`dt_floor_transformers`), the published code and ours at its `time_step_limit` (`dt_floor`).
    `relative_rms` is with transformers' clamp in both, and has to be small; with each at its own it is
    `relative_rms_own_clamps`, which says what that clamp changes.
    """

    relative_rms: float | None = None
    note: str | None = None
    dt_floor: float | None = None
    version: str | None = None
    class_name: str | None = None
    dt_floor_transformers: float | None = None
    relative_rms_own_clamps: float | None = None

    @property
    def clamps(self) -> bool:
        """Whether the comparison had steps dt to clamp."""
        return self.dt_floor_transformers is not None

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if "class_name" in content:
            content["class"] = content.pop("class_name")
        return {"relative_rms": self.relative_rms} | content

    def check(self) -> None:
        """Raises CheckFailed where the two disagree."""
        if self.relative_rms is not None and not self.relative_rms <= PARITY:
            clamp = f", with dt clamped at {self.dt_floor_transformers:g} in both" if self.clamps else ""
            raise CheckFailed(
                f"export: transformers' logits differ by {self.relative_rms:.3g} relative RMS, more than"
                f" {PARITY:g}{clamp}"
            )

    def sentence(self) -> str:
        """The comparison in a sentence or two."""
        if self.relative_rms is None:
            return f"Not compared with transformers: {self.note}."
        text = (
            f"{self.class_name} of transformers {self.version} gives them up to {self.relative_rms:.1e} relative"
            " RMS in float32"
        )
        if not self.clamps:
            return text + "."
        text += f", with the step dt clamped at its `time_step_min` ({self.dt_floor_transformers:g})."
        if self.relative_rms_own_clamps is not None and self.relative_rms_own_clamps > PARITY:
            text += (
                f"\nWithout that clamp, as the published code has it, the logits differ by"
                f" {self.relative_rms_own_clamps:.1e}; `time_step_min` in config.json sets it."
            )
        return text


def write_export(
    folder: Path, source: Path, dtype: torch.dtype, *, max_shard_bytes: int, check_tokens: int, seed: int
) -> Parity:
    """Writes the folder, reads it again and compares logits of random tokens in float32: with the source rounded to
    the same dtype they have to be the same to the bit; transformers, where it is installed, has to agree too.

    Raises CheckFailed, and InputError where the dtype cannot hold the weights, or transformers does not take the
    config.
    """
    checkpoint = open_checkpoint(source)
    check_files(source, checkpoint.config)
    write_checkpoint(
        folder,
        checkpoint.config,
        rounded_rows(checkpoint, dtype),
        dtypes=dtype,
        tokenizer_from=source,
        max_shard_bytes=max_shard_bytes,
    )
    state_length(folder, checkpoint.config)
    state_begin(folder)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(checkpoint.config.vocab_size, (1, check_tokens), generator=generator)
    expected = logits_of(open_streamed(source, rounded=dtype), ids)
    logits = logits_of(open_streamed(folder), ids)
    if not torch.equal(expected, logits):
        worst = (expected - logits).abs().max().item()
        raise CheckFailed(f"export: logits of the folder read back differ from the source's by up to {worst:.3g}")
    parity = transformers_parity(folder, ids, checkpoint.config, logits)
    parity.check()
    return parity


def state_length(folder: Path, config: HybridConfig) -> None:
    """Says in the folder's tokenizer_config.json for how many tokens the model is made, unless it does: clients cut
    and warn by it (`model_max_length`; transformers writes 1e30 where it knows none)."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = read_object(path)
    stated = settings.get("model_max_length")
    if not isinstance(stated, int) or stated > LARGEST_LENGTH:
        write_json(path, settings | {"model_max_length": config.max_position_embeddings})


def rounded_rows(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors in `dtype`, rows by rows. Raises InputError where a number is beyond its range."""
    table = tensor_table(checkpoint.config)
    for name, tensor in stream_rows(checkpoint):
        rows = tensor.to(table[name].dtype(dtype))  # routers stay as precise as they are
        if not is_finite(rows):
            worst = tensor.abs().max().item()
            raise InputError(
                f"export: tensor {name} reaches {worst:.4g}, beyond {str(dtype).removeprefix('torch.')};"
                " take dtype=bfloat16 or float32"
            )
        yield name, rows


@torch.no_grad()
def logits_of(model: HybridLM, ids: Tensor) -> Tensor:
    return model(ids)


def class_of(config: HybridConfig) -> tuple[Any, str]:
    """transformers' native class of the family, None where there is none, and its version ("": not installed)."""
    if importlib.util.find_spec("transformers") is None:
        return None, ""
    import transformers

    return getattr(transformers, FAMILIES[config.family].architecture, None), transformers.__version__


def said(error: Exception) -> str:
    """What an error of transformers says, as one line, cut short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def check_files(source: Path, config: HybridConfig) -> None:
    """Raises InputError where readers of an export would not take what goes into its folder beside the weights."""
    check_config_files(source, config)
    check_tokenizer(source)


def check_config_files(source: Path, config: HybridConfig) -> None:
    """Raises InputError where transformers, if it is here and has the family, makes no model of the config that an
    export of a folder has, or does not take its generation_config.json: known before the first weight is written."""
    theirs, version = class_of(config)
    if theirs is None:
        return
    import transformers

    def model(folder: Path) -> None:
        with torch.device("meta"):
            theirs(theirs.config_class.from_pretrained(folder))

    readers: dict[str, Callable[[Path], Any]] = {
        "config.json": model,
        GENERATION: transformers.GenerationConfig.from_pretrained,
    }
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        write_json(Path(temporary) / "config.json", config.to_hf())
        copy_companions([file for file in companions(source) if file.name == GENERATION], Path(temporary))
        for name, read in readers.items():
            try:
                if (Path(temporary) / name).is_file():
                    read(Path(temporary))
            except Exception as error:  # its checks raise anything
                raise InputError(
                    f"{source / name}: transformers {version} does not take it ({said(error)}); correct it there"
                ) from None


def transformers_parity(folder: Path, ids: Tensor, config: HybridConfig, logits: Tensor) -> Parity:
    """transformers' native class of the family on the folder, beside the logits of ours; it holds the whole model."""
    mamba = bool(config.mamba_num_heads)
    floor = config.dt_limit[0] if mamba else None
    theirs_class, version = class_of(config)
    name = FAMILIES[config.family].architecture
    if theirs_class is None:
        note = f"transformers {version} has no {name}" if version else "transformers is not installed"
        return Parity(note=note, dt_floor=floor)
    import transformers

    needed, free = 4 * count_parameters(config), free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        note = f"its model takes {gib(needed)} in float32, and {gib(free)} of memory are free"
        return Parity(note=note, dt_floor=floor)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # Experts one after the other: torch's grouped product refuses strides of no whole 16 bytes (cautions.py).
    mixture = any(spec.role is Role.EXPERTS for spec in tensor_table(config).values())
    how = {"experts_implementation": "eager"} if mixture else {}
    try:
        theirs = theirs_class.from_pretrained(folder, dtype=torch.float32, **how)
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits
        least = getattr(theirs.config, "time_step_min", None)  # which transformers has for nemotron_h alone
        theirs_floor = None if least is None else float(least)
    except Exception as error:  # its checks of a config and a model's code raise anything
        raise CheckFailed(f"export: {name} of transformers {version} does not run it ({said(error)})") from None
    own = relative_rms(logits, expected)
    if not mamba or theirs_floor is None:
        return Parity(own, version=version, class_name=name)
    del theirs
    clamped = open_streamed(folder, config=config.replace(dt_limit=(theirs_floor, math.inf)))
    return Parity(
        relative_rms(logits_of(clamped, ids), expected),
        dt_floor=floor,
        version=version,
        class_name=name,
        dt_floor_transformers=theirs_floor,
        relative_rms_own_clamps=own,
    )


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    return ((theirs - ours).double().square().mean() / ours.double().square().mean()).sqrt().item()


def divergence(source: Tensor, file: Tensor) -> float:
    """KL(source || file) in nats a token of logits [B, T, V]."""
    p, q = (F.log_softmax(logits.double(), -1) for logits in (source, file))
    return (p.exp() * (p - q)).sum(-1).mean().item()
