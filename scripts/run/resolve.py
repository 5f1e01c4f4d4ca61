"""What model= and data= may be: a folder, a file, or a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...distill.text import resolve
from ...distill.text.mixture import Mixture, Text
from ...distill.text.packing import Batch
from ...models.errors import InputError
from ...models.errors import check_counts as check_counts
from ...models.named import SHIPPED, data_path, model_config, model_folder, names  # noqa: F401 (for the commands)
from .show import progress, table

ZOO = SHIPPED["zoo"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def model_names() -> list[str]:
    return names("model")


@contextlib.contextmanager
def reading(what: str, in_bytes: bool) -> Iterator[resolve.OnProgress]:
    """A bar for text that is read."""
    with progress(what, in_bytes=in_bytes) as bar:
        yield lambda done, total: bar.set(done, total or None)


def data_input(data: str) -> Path | str:
    return resolve.data_input(data_path(data))


def documents(data: str, split: str) -> Iterator[resolve.Document]:
    return resolve.documents(data_path(data), split)


def corpus(data: str, split: str, model: Path) -> Text:
    return resolve.corpus(data_path(data), split, model, reading)


def text_in_tokens(data: str, split: str, tokenizer_from: Path) -> Text:
    return resolve.text_in_tokens(data_path(data), split, tokenizer_from, reading)


def sample(data: str, split: str, model: Path, **size: int) -> list[Batch]:
    return resolve.sample(data_path(data), split, model, **size, progress=reading)


def say_epochs(text: Text, plan: Sequence[tuple[int, int]]) -> None:
    """Says of a mixture how often each source is read in a plan of (rows, seq_len). Raises InputError where that is
    more than the source's `epochs`."""
    if isinstance(text, Mixture):
        table("The mixture", ("source", "share", "documents", "tokens", "epochs"), text.reading(plan))


def torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch {torch.__version__} sees no GPU here; use device=cpu")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=device).fill_(0)
        except (RuntimeError, NotImplementedError, AssertionError):
            raise InputError(f"device {name!r}: torch {torch.__version__} has none here; use device=cpu") from None
    return device
