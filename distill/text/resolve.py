"""What `data=` may be, and its text in documents and in tokens: `stdlib`, a file, a folder, hf:OWNER/NAME[...], a
mixture's .yaml, any of these with options, or a list of texts or of rows with conversations in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ...models import processes
from ...models.checkpoint import load_config
from ...models.errors import InputError
from ...models.folder import sha256_file
from ...models.foreign import own_path, read_yaml
from ...models.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from .corpus_cache import cached_corpus, content_digest
from .documents import SPLITS, STDLIB, content_of, has_links, of_split, read_documents, split_of, unique
from .earlier import EarlierTexts, earlier_texts
from .formats import Row
from .held_out import held_out
from .hub import HUB
from .mixture import Mixture, Source, Text
from .notes import Notes, say
from .packing import Corpus, Sample, tokenize
from .reading import TextData
from .records import Document, OnProgress, row_document

NamedData = str | TextData  # what lies somewhere
Data = NamedData | Sequence[str | Mapping[str, Any]]
# Called with what begins and whether it is counted in bytes; gives what is told how far it has come.
Progress = Callable[[str, bool], AbstractContextManager[OnProgress | None]]
NONE = EarlierTexts()
EXPECTED = "expected sources: [{path: ..., weight: ...}, ...]"


def untold(what: str, in_bytes: bool) -> AbstractContextManager[None]:
    """A Progress that nobody looks at."""
    return contextlib.nullcontext()


def mixture_file(data: NamedData) -> Path | None:
    """The .yaml file of a mixture, where data= is one."""
    name = data if isinstance(data, str) else data.path
    path = own_path(name)
    is_file = local_file(name) is not None and path.suffix in (".yaml", ".yml") and path.is_file()
    return path if is_file else None


def sources_of(data: NamedData) -> tuple[Source, ...]:
    """The sources of data=: one for `stdlib`, hf:OWNER/NAME, a file or a folder; those of a mixture for a .yaml file,
    whose relative paths begin at its folder; all with the options that data= has itself. Raises InputError, also where
    a mixture is a source of another."""
    if isinstance(data, TextData):
        return tuple(dataclasses.replace(source, **data.changes) for source in sources_of(data.path))
    path = mixture_file(data)
    if path is None:
        return (Source(data),)
    sources = tuple(
        source if local_file(source.path) is None
        else dataclasses.replace(source, path=str(path.parent / own_path(source.path)))
        for source in read_mixture(path)
    )  # fmt: skip
    for source in sources:
        if mixture_file(source.path) is not None:
            raise InputError(f"data: {path}: source {source.path} is a mixture itself; give what it has as sources")
    return sources


def local_file(path: str) -> Path | None:
    """The file or folder of a source, where it is one."""
    return None if path == STDLIB or path.startswith(HUB) else own_path(path)


def read_mixture(path: Path) -> tuple[Source, ...]:
    """The sources that a mixture's .yaml holds, as they are written. Raises InputError."""
    import pydantic

    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"data: {path} holds no mapping; {EXPECTED}")
    if unknown := [key for key in content if key != "sources"]:
        raise InputError(f"data: {path}: {unknown[0]} is no option here; {EXPECTED}")
    if not content.get("sources"):
        raise InputError(f"data: {path} has no sources; {EXPECTED}")
    reader = pydantic.TypeAdapter(
        tuple[Source, ...], config=pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    )
    try:
        return reader.validate_python(content["sources"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), InputError):
            raise own from None
        place = ".".join(map(str, ("sources", *first["loc"])))
        raise InputError(f"data: {path}: {place}: {first['msg']} ({first['input']!r})") from None


def content(path: str) -> str:
    """What stands for a source's text: a digest of the files as they are now, or the hub's name with its commit."""
    return fixed_content(path) if local_file(path) is None else content_of(path, content_digest)


@functools.cache
def fixed_content(path: str) -> str:
    """Of what does not change while a process runs: the standard library, a commit of the hub."""
    return content_of(path, content_digest)


def data_input(data: Data) -> Path | str:
    """data= as an input of a stage: a path, whose contents count, or a text that says what is read."""
    if not isinstance(data, NamedData):
        return "texts:" + hashlib.sha256(json.dumps(list(data)).encode()).hexdigest()
    if isinstance(data, TextData) and not data.changes:
        return data_input(data.path)
    if isinstance(data, TextData) or mixture_file(data) is not None:
        return json.dumps([{**dataclasses.asdict(source), "path": content(source.path)} for source in sources_of(data)])
    if data == STDLIB:
        return data
    local = local_file(data)
    # The sum of a folder does not follow links out of it; that of its text does.
    return content(data) if local is None or has_links(local) else local


def documents(data: Data, split: str) -> Iterator[Document]:
    """The documents of a split of data=, source after source, each text once; texts in memory are named text-0, text-1,
    ..."""
    if not isinstance(data, NamedData):
        yield from of_split(unique(memory_documents(data)), split, "data")
        return
    sources = sources_of(data)
    for number, source in enumerate(sources):
        notes, before = Notes(), texts_before(sources[:number])
        # Of few documents all that there are.
        own = split if split not in SPLITS or splits_by_name(source, before) else "all"
        yield from of_split(read_source(source, notes=notes, before=before), own, f"data={source.path}")
        say(notes, f"data={source.path}")


def memory_documents(data: Sequence[str | Mapping[str, Any]]) -> Iterator[Document]:
    """Raises InputError where a row holds nothing known."""
    for number, value in enumerate(data):
        if isinstance(value, str):
            yield Document(f"text-{number}", value)
        elif (document := row_document(Row(value, f"row {number}"), "row", number, (), None)) is not None:
            yield document


def read_source(
    source: Source, on_progress: OnProgress | None = None, notes: Notes | None = None, before: EarlierTexts = NONE
) -> Iterator[Document]:
    """The documents of a source, those `before` it in a mixture left out."""
    path = content(source.path) if source.path.startswith(HUB) else source.path
    read = read_documents(
        path, source.columns, on_progress, streaming=source.streaming, limit=source.limit, notes=notes,
        takes=source.takes,
    )  # fmt: skip
    return read if before == NONE else before.without(read, notes, f"data: source {source.path}")


def reading_facts(source: Source) -> dict[str, Any]:
    """What the documents of a source follow from."""
    return {
        "content": content(source.path), "columns": source.columns, "limit": source.limit,
        "include": source.include, "exclude": source.exclude,
    }  # fmt: skip


def texts_before(sources: Sequence[Source], progress: Progress = untold) -> EarlierTexts:
    """The texts that sources of a mixture have, for the one that follows them."""

    def read(source: Source) -> Iterator[Document]:
        with progress(f"reading the texts of {source.path}", local_file(source.path) is not None) as on_progress:
            yield from read_source(source, on_progress)

    return earlier_texts((reading_facts(source), functools.partial(read, source)) for source in sources)


def corpus(data: Data, split: str, model: Path, progress: Progress = untold) -> Text:
    """A split of data=, in the tokens of a model folder's tokenizer; made once, and kept on disk."""
    check_vocabulary(load_tokenizer(model), load_config(model))
    return text_in_tokens(data, split, model, progress)


def text_in_tokens(data: Data, split: str, tokenizer_from: Path, progress: Progress = untold) -> Text:
    """`corpus` for a tokenizer that has no model yet. Texts in memory stay there."""
    tokenizer = load_tokenizer(tokenizer_from)
    if not isinstance(data, NamedData):
        return tokenize(documents(data, split), tokenizer)
    sources = sources_of(data)
    corpora = [tokenized_by_turns(sources[: number + 1], split, tokenizer, progress) for number in range(len(sources))]
    return Mixture.of(sources, corpora) if mixture_file(data) is not None else corpora[0]


def sample(
    data: Data, split: str, model: Path, *, tokens: int, seq_len: int, batch: int, seed: int,
    progress: Progress = untold,
) -> Sample:  # fmt: skip
    """A sample of `tokens` tokens at most of a split of data=, in the tokens of a model folder's tokenizer."""
    text = corpus(data, split, model, progress)
    return text.sample(batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=tokens)


def tokenized_by_turns(sources: Sequence[Source], split: str, tokenizer: Tokenizer, progress: Progress) -> Corpus:
    """A split of the last of some sources in tokens, without texts that those before it have. Of many processes the
    first makes it, the others where they do not find it then (on a disk of their own)."""
    for turn in (processes.rank() == 0, processes.rank() != 0):
        with processes.together():
            if turn:
                before = texts_before(sources[:-1], progress)
                made = tokenized(sources[-1], split, tokenizer, progress, before)
    return made


def splits_by_name(source: Source, before: EarlierTexts) -> bool:
    """Whether every split has a document of a source."""
    return names_fill_splits(source, content(source.path), Path.cwd(), before)


@functools.lru_cache(maxsize=256)
def names_fill_splits(source: Source, content: str, folder: Path, before: EarlierTexts) -> bool:
    """Whether every split has a document of a source of this content, by names that count from this folder; read until
    that is known."""
    seen = set[str]()
    for document in read_source(source, before=before):
        seen.add(split_of(document.name))
        if len(seen) == len(SPLITS):
            return True
    return False


def template_digest(folder: Path) -> str:
    """What stands for the chat template of a folder: the sha256 of the files that may have one."""
    files = (folder / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return ":".join(sha256_file(path) if path.is_file() else "" for path in files)


def tokenized(
    source: Source, split: str, tokenizer: Tokenizer, progress: Progress, before: EarlierTexts = NONE
) -> Corpus:
    """A split of a source in tokens, from the cache or made now; see `held_out` where its documents are few."""
    if split in SPLITS and not splits_by_name(source, before):
        made = held_out(tokenized(source, "all", tokenizer, progress, before), split, f"data={source.path}")
        say(made.notes, f"data={source.path}")
        return dataclasses.replace(made, where=named_split(source, split))
    facts = {
        **reading_facts(source), "split": split, "special_tokens": source.special_tokens,
        "reasoning_share": source.reasoning_share, "template": template_digest(tokenizer.folder),
        "tokenizer": sha256_file(tokenizer.folder / "tokenizer.json"),
        "begin": tokenizer.begin, "eos": tokenizer.eos_token_id,
    }  # fmt: skip
    facts |= {} if before == NONE else {"before": before.key}
    notes = Notes()

    def read() -> Iterator[Document]:
        with progress(f"tokenising {source.path} ({split})", local_file(source.path) is not None) as on_progress:
            yield from of_split(read_source(source, on_progress, notes, before), split, f"data={source.path}")

    made = cached_corpus(facts, read, tokenizer, source, notes)
    say(made.notes, f"data={source.path}")
    return dataclasses.replace(made, where=named_split(source, split))


def named_split(source: Source, split: str) -> str:
    return f"data={source.path}" if split == "all" else f"data={source.path}, split {split}"
