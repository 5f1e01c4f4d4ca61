"""What model= and data= may be: a folder, a file, or a name."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...distill.text.corpus_cache import cached_corpus, content_digest
from ...distill.text.documents import HUB, STDLIB, Document, OnProgress, content_of, of_split, read_documents
from ...distill.text.mixture import BLOCK, Mixture, Source, Text, sample_batches
from ...distill.text.packing import Batch, Corpus
from ...models import processes
from ...models.checkpoint import load_config
from ...models.config import HybridConfig
from ...models.errors import InputError
from ...models.errors import check_counts as check_counts
from ...models.folder import sha256_file
from ...models.tokenizer import check_vocabulary, load_tokenizer
from .compose import CONF, build, guess
from .show import progress, table

ZOO = Path(__file__).parents[2] / "models" / "zoo"
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


def data_names() -> list[str]:
    return sorted(path.stem for path in (CONF / "data").glob("*.yaml"))


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a mixture's .yaml holds."""

    sources: tuple[Source, ...]


def sources_of(data: str) -> tuple[Source, ...]:
    """The sources of data=: one for `stdlib`, hf:OWNER/NAME, a file or a folder; those of a mixture for a .yaml file or
    a name in conf/data/. A mixture's relative paths begin at its file's folder. Raises InputError."""
    if data == STDLIB or data.startswith(HUB):
        return (Source(data),)
    path = Path(data).expanduser()
    if data in data_names() and not path.exists():
        path = CONF / "data" / f"{data}.yaml"
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return (Source(data),)
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's and omegaconf's own
        raise InputError(f"data: {path} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"data: {path} holds no mapping; expected sources: [{{path: ..., weight: ...}}, ...]")
    found = build(Sources, {str(key): value for key, value in content.items()}, f"data: {path}: ").sources
    if not found:
        raise InputError(f"data: {path} has no sources; expected sources: [{{path: ..., weight: ...}}, ...]")
    plain = [source.path == STDLIB or source.path.startswith(HUB) for source in found]
    return tuple(
        source if known else dataclasses.replace(source, path=str(path.parent / Path(source.path).expanduser()))
        for source, known in zip(found, plain, strict=True)
    )


def is_mixture(data: str, sources: Sequence[Source]) -> bool:
    return sources != (Source(data),)


@functools.cache
def content(path: str) -> str:
    """What stands for a source's text; asked once in a run."""
    return content_of(path, content_digest)


def data_input(data: str) -> Path | str:
    """data= as an input of a stage: a path, whose contents count, or a text that says what is read."""
    sources = sources_of(data)
    if is_mixture(data, sources):
        return json.dumps([{**dataclasses.asdict(source), "path": content(source.path)} for source in sources])
    if data == STDLIB:
        return data
    return content(data) if data.startswith(HUB) else Path(data).expanduser()


def documents(data: str, split: str) -> Iterator[Document]:
    """The documents of a split of data=, source after source."""
    for source in sources_of(data):
        yield from of_split(read(source), split, f"data={source.path}")


def read(source: Source, on_progress: OnProgress | None = None) -> Iterator[Document]:
    path = content(source.path) if source.path.startswith(HUB) else source.path
    found = read_documents(path, source.columns, on_progress, streaming=source.streaming, limit=source.limit)
    return (document for document in found if source.takes(document.name))


def corpus(data: str, split: str, model: Path) -> Text:
    """A split of data=, in the tokens of a model folder's tokenizer; made once, and kept on disk."""
    check_vocabulary(load_tokenizer(model), load_config(model))
    return text_in_tokens(data, split, model)


def text_in_tokens(data: str, split: str, tokenizer_from: Path) -> Text:
    sources = sources_of(data)
    tokens = Tokens(tokenizer_from, sha256_file(tokenizer_from / "tokenizer.json"))
    corpora = [tokenized(source, split, tokens) for source in sources]
    return Mixture.of(sources, corpora) if is_mixture(data, sources) else corpora[0]


def sample(data: str, split: str, model: Path, *, tokens: int, seq_len: int, batch: int, seed: int) -> list[Batch]:
    """A sample of `tokens` tokens at most of a split of data=, in the tokens of a model folder's tokenizer."""
    text = corpus(data, split, model)
    return sample_batches(text, batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=tokens)


def say_epochs(text: Text, plan: Sequence[tuple[int, int]]) -> None:
    """Says of a mixture how often each source is read in a plan of (rows, seq_len). Raises InputError where that is
    more than the source's `epochs`."""
    if isinstance(text, Mixture):
        times = text.check_epochs(plan)
        rows = [
            (source.path, f"{share / BLOCK:.1%}", f"{len(found):,}", f"{found.tokens:,}", f"{read:.2f}")
            for source, share, found, read in zip(text.sources, text.shares(), text.corpora, times, strict=True)
        ]
        table("The mixture", ("source", "share", "documents", "tokens", "epochs"), rows)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenizer, known by its contents."""

    folder: Path = dataclasses.field(compare=False)
    digest: str


def tokenized(source: Source, split: str, tokens: Tokens) -> Corpus:
    """A split of a source in tokens. Of many processes the first makes it, the others where they do not find it then
    (on a disk of their own)."""
    for turn in (processes.rank() == 0, processes.rank() != 0):
        with processes.together():
            if turn:
                made = tokenized_here(source, split, tokens)
    return made


@functools.lru_cache(maxsize=16)
def tokenized_here(source: Source, split: str, tokens: Tokens) -> Corpus:
    """A split of a source in tokens, from the cache or made now."""
    tokenizer = load_tokenizer(tokens.folder)
    facts = {
        "content": content(source.path), "columns": source.columns, "limit": source.limit, "split": split,
        "include": source.include, "exclude": source.exclude,
        "tokenizer": tokens.digest, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
    }  # fmt: skip

    def found() -> Iterator[Document]:
        in_bytes = source.path != STDLIB and not source.path.startswith(HUB)
        with progress(f"tokenising {source.path} ({split})", in_bytes=in_bytes) as bar:
            show = lambda done, total: bar.set(done, total or None)  # noqa: E731
            yield from of_split(read(source, show), split, f"data={source.path}")

    return cached_corpus(facts, found, tokenizer)


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
