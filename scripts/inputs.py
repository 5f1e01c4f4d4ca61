"""What model= and data= may be: a folder, a file, or a name."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import torch

from ..distill.data import (
    Batch,
    Corpus,
    Document,
    folder_documents,
    keep_split,
    sample_batches,
    stdlib_documents,
    tokenize,
)
from ..models.checkpoint import load_config
from ..models.config import HybridConfig
from ..models.errors import InputError
from ..models.folder import sha256_file
from ..models.tokenizer import check_vocabulary, load_tokenizer
from .compose import CONF, guess
from .show import progress

ZOO = Path(__file__).parents[1] / "models" / "zoo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def model_names() -> list[str]:
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


def model_folder(name: str) -> Path:
    """The folder of a model with weights. Raises InputError where there is none."""
    if name == "zoo":
        return ZOO
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in model_names():
        raise InputError(f"model {name!r} is a named config without weights; give a checkpoint folder, or zoo")
    near = guess(name, ["zoo", *model_names()])
    raise InputError(f"model {name!r} is neither a folder nor a name; known: zoo, {', '.join(model_names())}{near}")


def model_config(name: str) -> HybridConfig:
    """The config of a named model or of a checkpoint folder."""
    if name in model_names():
        from omegaconf import OmegaConf

        content = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
        assert isinstance(content, dict)
        return HybridConfig.from_hf({str(key): value for key, value in content.items()})
    return load_config(model_folder(name))


def data_input(data: str) -> Path | str:
    """data= as an input of a stage: a path, whose contents count, or a name."""
    return data if data == "stdlib" else Path(data).expanduser()


def documents(data: str, split: str) -> list[Document]:
    """The documents of a split of data=: `stdlib`, a folder or a file."""
    place = data_input(data)
    found = folder_documents(place) if isinstance(place, Path) else stdlib_documents()
    return keep_split(found, split, f"data={data}")


def corpus(data: str, split: str, model: Path) -> Corpus:
    """A split of data=, in the tokens of a model folder's tokenizer; remembered, since stages share both."""
    check_vocabulary(load_tokenizer(model), load_config(model))
    return tokenized(data, split, Tokens(model, sha256_file(model / "tokenizer.json")))


def sample(data: str, split: str, model: Path, *, tokens: int, seq_len: int, batch: int, seed: int) -> list[Batch]:
    """A sample of `tokens` tokens at most of a split of data=, in the tokens of a model folder's tokenizer."""
    text = corpus(data, split, model)
    return sample_batches(text, batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=tokens)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenizer, known by its contents."""

    folder: Path = dataclasses.field(compare=False)
    digest: str


@functools.lru_cache(maxsize=4)
def tokenized(data: str, split: str, tokens: Tokens) -> Corpus:
    tokenizer = load_tokenizer(tokens.folder)
    found = documents(data, split)
    with progress(f"tokenising {data} ({split})", len(found)) as bar:
        return tokenize(found, tokenizer, lambda done, total: bar.set(done, total))


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
    return device
