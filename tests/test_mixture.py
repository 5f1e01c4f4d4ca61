"""Mixtures: sources in their shares, sought to the row; data= that names one."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck import api
from limbeck.distill.text import notes
from limbeck.distill.text import resolve as inputs
from limbeck.distill.text.mixture import BLOCK, Mixture, Source, labels, whole
from limbeck.distill.text.packing import Batch, Packing, epoch_rows, joined, tokenize
from limbeck.distill.text.records import Document
from limbeck.models.errors import InputError
from limbeck.models.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from limbeck.scripts.run.resolve import data_path
from limbeck.tests.helpers import limbeck, make_workshop

TEXTS = [f"# {i}\nvalue = {'x' * (i % 17)} + {i}\n" for i in range(90)]
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("words"))


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    return make_workshop(tmp_path)


def documents(start: int = 0, stop: int = 90) -> list[Document]:
    return [Document(f"text {i}", TEXTS[i]) for i in range(start, stop)]


@pytest.fixture(scope="module")
def mixture(tokenizer: Tokenizer) -> Mixture:
    parts = ((0, 60, 0.7), (60, 80, 0.2), (80, 90, 0.1))
    corpora = [tokenize(documents(start, stop), tokenizer) for start, stop, _ in parts]
    return Mixture.of([Source(str(i), weight) for i, (_, _, weight) in enumerate(parts)], corpora)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def test_mixture_keeps_its_shares_everywhere(mixture: Mixture) -> None:
    assert mixture.shares() == [700, 200, 100]
    order = np.concatenate([mixture.block(number, 5) for number in range(3)])
    for source, share in enumerate((0.7, 0.2, 0.1)):
        counts = np.cumsum(order == source)
        assert np.abs(counts - share * np.arange(1, len(order) + 1)).max() <= 2
    assert not np.array_equal(mixture.block(0, 5), mixture.block(1, 5))
    assert not np.array_equal(mixture.block(0, 5), mixture.block(0, 6))


@pytest.mark.parametrize("start", (0, 1, 7, 249, 250, 333))
def test_any_row_of_a_mixture_can_be_sought(mixture: Mixture, start: int) -> None:
    """Also over the end of a block of 1,000 rows and over many epochs; and whatever the batch."""
    how: dict[str, Any] = {"seq_len": 20, "seed": 5}
    whole = itertools.islice(mixture.train_batches(batch_size=4, **how), start, start + 6)
    sought = mixture.train_batches(batch_size=4, start=start, **how)
    singles = mixture.train_batches(batch_size=1, start=4 * start, **how)
    for expected, found in zip(whole, sought, strict=False):
        assert same(expected, found)
        for row in range(4):
            assert same(expected.rows(row, row + 1), next(singles))


@pytest.mark.parametrize("max_tokens", (None, 2000))
def test_a_sample_has_each_source_s_share(max_tokens: int | None, mixture: Mixture) -> None:
    """Row by row what each corpus alone gives of its share, source after source, over the ends of batches."""
    sample = mixture.sample(batch_size=7, seq_len=20, seed=5, max_tokens=max_tokens)
    rows = []
    for corpus, share in zip(mixture.corpora, (0.7, 0.2, 0.1), strict=True):
        most = None if max_tokens is None else round(max_tokens * share)
        rows += list(corpus.sample(batch_size=1, seq_len=20, seed=5, max_tokens=most))
    assert len(sample) == -(-len(rows) // 7) and len(sample[-1].labels) == len(rows) - 7 * (len(sample) - 1)
    for number, batch in enumerate(sample):
        assert same(batch, joined(rows[7 * number : 7 * number + 7]))
    assert all(map(same, mixture.sample(batch_size=7, seq_len=20, seed=5, max_tokens=max_tokens), sample))


def test_a_mixture_is_one_corpus_without_a_copy(mixture: Mixture) -> None:
    one = whole(mixture)
    ids = np.concatenate([np.asarray(corpus.ids) for corpus in mixture.corpora])
    assert not isinstance(one.ids, np.ndarray) and one.tokens == len(ids) == mixture.tokens and len(one) == 90
    ends = np.cumsum([corpus.tokens for corpus in mixture.corpora]).tolist()
    for begin, end in ((0, 5), (ends[0] - 3, ends[0] + 3), (ends[0], ends[1]), (5, ends[2] + 9), (-4, None), (9, 4)):
        assert np.array_equal(one.ids[begin:end], ids[begin:end])
    with pytest.raises(IndexError):
        one.ids[::2]
    names = [f"{source}/text {i}" for i, source in enumerate("0" * 60 + "1" * 20 + "2" * 10)]
    assert list(one.names) == names and one.names[-1] == names[-1] and one.names[58:62] == names[58:62]
    with pytest.raises(IndexError):
        one.names[90]
    order = np.arange(90)[::-1].copy()
    for number in (0, 3):
        rows = [Packing(corpus, order, 20).batch([number])
                for corpus in (one, dataclasses.replace(one, ids=ids))]  # fmt: skip
        assert same(*rows)


def test_sources_of_one_name_are_told_apart() -> None:
    def found(*paths: str) -> list[str]:
        return labels([Source(path) for path in paths])

    assert found("stdlib", "stdlib") == ["stdlib#1", "stdlib#2"]
    assert found("a/train", "a/test", "a/train") == ["train#1", "test", "train#3"]
    assert found("stdlib", "a/stdlib") == ["stdlib", "stdlib (a)"]
    assert found("a/train", "b/train", "c/test") == ["train (a)", "train (b)", "test"]
    assert found("x/a/train", "y/a/train", "b/train") == ["train (a)#1", "train (a)#2", "train (b)"]
    assert found("hf:one/set:a", "hf:two/set:a") == ["set:a (hf:one)", "set:a (hf:two)"]


def test_evaluate_tells_sources_of_one_name_apart(workshop: Path, tmp_path: Path) -> None:
    mix = workshop / "mix.yaml"
    mix.write_text("sources:\n- {path: text, exclude: ['1*']}\n- {path: text, include: ['1*']}\n")
    code, _, err = limbeck("evaluate", f"teacher={workshop / 'model'}", f"data={mix}", f"output={tmp_path / 'gap'}",
                           "seq_len=32", "batch=4", "split=all", "tokens=512", "details.resamples=20",
                           "details.prompts=0", "probes=[needle]", "details.probe_lengths=[128]",
                           "details.probe_count=2")  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "gap" / "gap.json").read_text())
    domains = found["models"]["teacher"]["by_domain"]
    assert set(domains) == {"text#1/", "text#2/"} and found["probes"]["needle"]["128"]["teacher"]
    assert sum(domain["tokens"] for domain in domains.values()) == found["tokens"]


def test_an_epoch_of_a_source_has_each_of_its_rows_once(mixture: Mixture) -> None:
    how: dict[str, Any] = {"batch_size": 1, "seq_len": 20, "seed": 5}
    rows = (mixture.corpora[2].tokens - 1) // 20
    seen: list[tuple[int, ...]] = []
    for batch in itertools.islice(mixture.train_batches(**how), BLOCK):
        if batch.doc_id.max() >= 80:
            assert batch.doc_id.min() >= 80, "no row has two sources"
            seen.append(tuple(batch.input_ids[0].tolist()))
    for epoch in range(2):
        packing, _ = epoch_rows(mixture.corpora[2], 20, 5 + (2 << 32), epoch, True)
        expected = [tuple(packing.batch([row]).input_ids[0].tolist()) for row in range(rows)]
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == sorted(expected)


def test_without_repacking_epochs_have_the_same_rows(mixture: Mixture, tokenizer: Tokenizer) -> None:
    corpus = mixture.corpora[0]
    per_epoch = (corpus.tokens - 1) // 20
    how: dict[str, Any] = {"batch_size": 1, "seq_len": 20, "seed": 5}
    epochs = {}
    for repack in (True, False):
        batches = itertools.islice(corpus.train_batches(repack=repack, **how), 2 * per_epoch)
        rows = [tuple(batch.input_ids[0].tolist()) for batch in batches]
        epochs[repack] = rows[:per_epoch], rows[per_epoch:]
    assert epochs[False][0] == epochs[True][0] and epochs[False][0] != epochs[False][1]
    assert sorted(epochs[False][0]) == sorted(epochs[False][1]) != sorted(epochs[True][1])


def test_epochs_of_sources_are_stated_and_kept(mixture: Mixture) -> None:
    rows = [(corpus.tokens - 1) // 20 for corpus in mixture.corpora]
    found = mixture.check_epochs([(2000, 20), (500, 20)])
    assert found == pytest.approx([2500 * share / count for share, count in zip((0.7, 0.2, 0.1), rows, strict=True)])
    few = dataclasses.replace(mixture.sources[2], epochs=found[2] - 0.01)
    with pytest.raises(InputError, match="source 2 would be read"):
        dataclasses.replace(mixture, sources=(*mixture.sources[:2], few)).check_epochs([(2500, 20)])
    with pytest.raises(InputError, match="do not fill one row"):
        next(mixture.train_batches(batch_size=1, seq_len=10**6, seed=0))
    light = dataclasses.replace(mixture.sources[2], weight=1e-5)
    with pytest.raises(InputError, match="less than one row"):
        dataclasses.replace(mixture, sources=(*mixture.sources[:2], light)).shares()


@pytest.mark.parametrize(
    "wrong",
    (
        {"weight": 0},
        {"weight": -1},
        {"epochs": -1},
        {"limit": 5},
        {"streaming": True, "path": "hf:a/b"},
        {"weight": "much"},
        {"odd": 1},
    ),
)
def test_wrong_sources(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(json.dumps({"sources": [{"path": "x"} | wrong]}))
    with pytest.raises(InputError, match="source") as raised:
        inputs.sources_of(str(tmp_path / "mix.yaml"))
    assert next(iter(wrong)) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["inner.yaml", "INNER.yml", "outer.yaml"])
def test_a_mixture_is_no_source_of_another(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("sources: [{path: stdlib}]")
    (tmp_path / "outer.yaml").write_text(f"sources: [{{path: stdlib}}, {{path: {name}}}]")
    with pytest.raises(InputError, match=rf"outer.yaml: source .*{name} is a mixture itself; give what it has"):
        inputs.sources_of(str(tmp_path / "outer.yaml"))


def test_mixture_of_a_file(workshop: Path) -> None:
    """data=MIX.yaml: paths from its own folder on, documents numbered through, and a change of a source is seen."""
    (workshop / "more").mkdir()
    for number in range(40):
        (workshop / "more" / f"{number}.md").write_text(f"more {number}\n" * 40)
    mix = workshop / "mix.yaml"
    mix.write_text("sources:\n- {path: text, weight: 7}\n- {path: more, weight: 3, epochs: 2}\n")
    text = inputs.corpus(str(mix), "train", workshop / "model")
    assert isinstance(text, Mixture) and text.shares() == [700, 300] and text.corpora[1].first_document > 0
    held = inputs.sample(str(mix), "validation", workshop / "model", tokens=1000, seq_len=20, batch=4, seed=0)
    owners = torch.cat([batch.doc_id.flatten() for batch in held])
    validation = inputs.corpus(str(mix), "validation", workshop / "model")
    assert isinstance(validation, Mixture)
    first = validation.corpora[1].first_document
    assert 0.2 < float((owners >= first).sum() / (owners >= 0).sum()) < 0.4
    before = inputs.data_input(str(mix))
    (workshop / "more" / "0.md").write_text("changed")
    assert isinstance(before, str) and inputs.data_input(str(mix)) != before
    assert inputs.data_input("stdlib") == "stdlib" and inputs.data_input(str(workshop)) == workshop
    for body, says in (("sources: []", "no sources"), ("a: [", "no YAML"), ("[1]", "no mapping"), ("odd: 1", "odd")):
        mix.write_text(body)
        with pytest.raises(InputError, match=says):
            inputs.data_input(str(mix))


def test_documents_by_patterns_of_their_names(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "deep/test/c.py", "deep/d.py", "deep/test_e.py"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(f"name = {name!r}\n")
    tests = ["test/*", "*/test/*"]

    def names(**patterns: list[str]) -> set[str]:
        path = tmp_path / "mix.yaml"
        path.write_text(json.dumps({"sources": [{"path": "text", **patterns}]}))
        (source,) = inputs.sources_of(str(path))
        return {document.name for document in inputs.read_source(source)}

    assert names() == {"a.py", "test/b.py", "deep/test/c.py", "deep/d.py", "deep/test_e.py"}
    assert names(include=tests) == {"test/b.py", "deep/test/c.py"}
    assert names(exclude=tests) == {"a.py", "deep/d.py", "deep/test_e.py"}
    assert names(include=["deep/*"], exclude=tests) == {"deep/d.py", "deep/test_e.py"}
    plain, kept = (json.dumps({"sources": [{"path": "text", **more}]}) for more in ({}, {"include": tests}))
    digests = []
    for text in (plain, kept):
        (tmp_path / "mix.yaml").write_text(text)
        digests.append(str(inputs.data_input(str(tmp_path / "mix.yaml"))))
    assert digests[0] != digests[1]


def test_an_excluded_file_hides_no_equal_one(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("a_old.py", "b.py"):
        (tmp_path / "text" / name).write_text("the same\n")
    for patterns in ({"exclude": ("*_old.py",)}, {"include": ("b*",)}):
        found = inputs.read_source(Source(str(tmp_path / "text"), **patterns))  # type: ignore[arg-type]
        assert [document.name for document in found] == ["b.py"]


def test_a_text_of_two_sources_is_the_first_one_s(
    workshop: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other names it would be in another split: whatever split, no text is in two sources."""
    monkeypatch.setattr(notes, "SAID", set())
    texts = [f"text {number}\n" * 30 for number in range(240)]
    for folder, prefix, some in (("one", "a", texts[:120]), ("two", "b", texts[60:])):
        (workshop / folder).mkdir()
        for number, text in enumerate(some):
            (workshop / folder / f"{prefix}{number}.md").write_text(text)
    mix, words = workshop / "mix.yaml", load_tokenizer(workshop / "model")
    mix.write_text("sources: [{path: one}, {path: two}]")
    read: list[list[str]] = [[], []]
    for split in ("train", "validation", "test"):
        text = inputs.corpus(str(mix), split, workshop / "model")
        assert isinstance(text, Mixture)
        for found, corpus in zip(read, text.corpora, strict=True):
            begins = corpus.starts.tolist()
            found += [words.decode(corpus.ids[a:b].tolist()) for a, b in itertools.pairwise(begins)]
    assert [len(found) for found in read] == [120, 120] and len({*read[0], *read[1]}) == 240
    assert {document.text for document in inputs.documents(str(mix), "all")} == set(texts)
    assert len(list(inputs.documents(str(mix), "all"))) == 240
    told = [record.message for record in caplog.records if "earlier source" in record.message]
    assert len(told) == 1 and "60 texts are left out, since an earlier source of the mixture has them" in told[0]
    alone = inputs.corpus(str(workshop / "two"), "all", workshop / "model")
    assert len(alone) == 180
    mix.write_text("sources: [{path: one}, {path: one}]")
    with pytest.raises(InputError, match=r"source .*one: an earlier source of the mixture has all of its texts"):
        inputs.corpus(str(mix), "train", workshop / "model")


@pytest.mark.parametrize("name", ("stdlib-90-10", "stdlib-70-30", "stdlib-50-50"))
def test_the_shipped_mixtures_split_the_standard_library(name: str) -> None:
    sources = inputs.sources_of(data_path(name))
    assert [source.weight for source in sources] == [float(part) for part in name.split("-")[1:]]
    for file in (
        "json/decoder.py",
        "test/test_json.py",
        "unittest/test/testmock/testmock.py",
        "idlelib/idle_test/x.py",
    ):
        assert sum(source.takes(file) for source in sources) == 1


def test_epochs_hold_wherever_a_mixture_is_read(workshop: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(json.dumps({"sources": [{"path": str(workshop / "text"), "weight": 1, "epochs": 0.001}]}))
    model = workshop / "model"
    places = {
        "pretrain": [f"init={model}", "seq_len=32", "batch=2", "train.steps=20", "evaluate_tokens=64"],
        "cache-teacher": [f"teacher={model}", "distill.seq_len=32", "distill.batch=2", "distill.train.steps=20"],
    }
    for command, words in places.items():
        code, _, err = limbeck(command, *words, f"data={mix}", f"output={tmp_path / 'out'}", "device=cpu")
        assert code == 2 and "its epochs are 0.001" in err, err
    loaded = api.load(model)
    with pytest.raises(InputError, match=r"its epochs are 0\.001"):
        api.distill(loaded, api.load(model), str(mix), steps=20, seq_len=32, batch=2)
