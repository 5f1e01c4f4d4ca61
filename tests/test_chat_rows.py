"""Conversations as rows of tokens: what counts in the loss, what is kept whole, split, dropped or refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limbeck.distill.losses import DistillLoss, cross_entropy_loss, distillation_loss
from limbeck.distill.text import pieces, resolve
from limbeck.distill.text.bins import best_fit
from limbeck.distill.text.conversations import ANSWER, KIND, PROMPT, Renderer, read_conversation
from limbeck.distill.text.given import fitted
from limbeck.distill.text.mixture import Mixture
from limbeck.distill.text.packing import Batch, Corpus, joined
from limbeck.distill.text.reading import TextData
from limbeck.distill.trainer import counted
from limbeck.models.errors import InputError
from limbeck.models.generate import chat
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.chat_helpers import CHATML, NEMOTRON, chat_folder, drawn_row, unmarked
from limbeck.tests.helpers import random_model, tiny_config

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [drawn_row(seed) for seed in range(60)]


def said(messages: Sequence[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """Messages with everything changed that is not the assistant's."""
    return [message if message["role"] == "assistant" else message | changes for message in messages]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chat"), CHATML)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus_of(path: Path | str, folder: Path, **options: Any) -> Corpus:
    corpus = resolve.text_in_tokens(TextData(str(path), **options), "all", folder)
    assert isinstance(corpus, Corpus)
    return corpus


def whole_batch(corpus: Corpus, seq_len: int) -> Batch:
    return joined(list(corpus.sample(batch_size=4, seq_len=seq_len)))


def test_rows_hold_whole_conversations(folder: Path, tmp_path: Path) -> None:
    """Each token of every conversation once, as transformers has it, the assistant's counted and no other."""
    corpus = corpus_of(write_rows(tmp_path / "a.jsonl", ROWS), folder)
    batch, renderer = whole_batch(corpus, 700), Renderer(load_tokenizer(folder), None)
    assert batch.weights is None and batch.parts is not None
    for number, row in enumerate(ROWS):
        conversation = read_conversation(row, "row")
        assert conversation is not None
        ids, parts = renderer.tokens(conversation, None)
        here = batch.doc_id == number
        size = int(here.sum())  # the last token of a full row is a label alone
        assert size in (len(ids), len(ids) - 1) and len(set(here.nonzero()[:, 0].tolist())) == 1
        assert batch.input_ids[here].tolist() == ids[:size].tolist()
        kinds = (parts & KIND)[1:]
        expected = np.where(kinds >= ANSWER, ids[1:], -100)
        assert batch.labels[here].tolist() == [*expected.tolist(), -100][:size]
        assert batch.parts[here].tolist()[: len(kinds)] == kinds.tolist()
        assert len(set(batch.seq_idx[here].tolist())) == 1


def test_a_long_conversation_goes_through_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text through the tokenizer, its renderings through the template's process: the tokens and their parts stay.
    One answer is longer than a piece."""
    rows = [*ROWS[:12], long_row(9), long_row(2, words=300)]
    conversations = [each for row in rows if (each := read_conversation(row, "row")) is not None]
    bare = chat_folder(folder.parent / "bare", unmarked(CHATML))
    for template in (folder, bare):
        renderer = Renderer(load_tokenizer(template), None)
        whole = [renderer.tokens(each, None) for each in conversations]
        with monkeypatch.context() as patch:
            for name, value in {"PIECE": 400, "OVERLAP": 50, "LONGEST": 3200}.items():
                patch.setattr(pieces, name, value)
            patch.setattr(chat, "AT_ONCE", 1000)
            for expected, conversation in zip(whole, conversations, strict=True):
                found = renderer.tokens(conversation, None)
                assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", ("kl", "cross entropy", "hidden"))
def test_only_the_assistant_s_tokens_are_learnt(loss: str, folder: Path, tmp_path: Path) -> None:
    """In a model whose layers see one token alone, whatever else is said changes nothing; an answer does, and so does
    what is trained on."""
    tokenizer = load_tokenizer(folder)
    config = tiny_config(pattern="--", vocab_size=tokenizer.vocab_size, pad_token_id=0)
    teacher, student = random_model(config, 0), random_model(config, 1)

    def of_rows(name: str, rows: Sequence[Any], **options: Any) -> float:
        batch = whole_batch(corpus_of(write_rows(tmp_path / f"{name}.jsonl", rows), folder, **options), 900)
        loss_of = cross_entropy_loss if loss == "cross entropy" else distillation_loss(teacher, DistillLoss())
        with torch.no_grad():
            return float(loss_of(student, batch, counted(batch)))

    rows = [row for row in ROWS if not any("tool" in message["role"] for message in row["messages"])][:12]
    others = [{"messages": said(row["messages"], content="something else altogether")} for row in rows]
    answered = [{"messages": [m | {"content": "no"} for m in row["messages"]]} for row in rows]
    first = of_rows("a", rows)
    assert of_rows("b", others) == pytest.approx(first, rel=1e-12)
    assert abs(of_rows("c", answered) - first) > 1e-3
    everything = of_rows("a", rows, train_on="all")
    assert abs(everything - first) > 1e-3 and abs(of_rows("b", others, train_on="all") - everything) > 1e-3
    assert of_rows("a", rows, train_on="weighted", prompt_weight=1.0) == pytest.approx(everything, rel=1e-12)
    assert of_rows("a", rows, train_on="weighted", prompt_weight=0.0) == pytest.approx(first, rel=1e-12)


def test_weights_are_those_of_the_loss(folder: Path, tmp_path: Path) -> None:
    """The loss of weighted rows is the weighted mean of the losses of their tokens, and its gradient alike."""
    path, tokenizer = write_rows(tmp_path / "a.jsonl", ROWS[:8]), load_tokenizer(folder)
    config = tiny_config(vocab_size=tokenizer.vocab_size, pad_token_id=0)
    teacher, student = random_model(config, 0), random_model(config, 1)
    batch = whole_batch(corpus_of(path, folder, train_on="weighted", prompt_weight=0.25), 300)
    assert batch.weights is not None and batch.parts is not None
    assert torch.equal(batch.weights == 0.25, batch.parts == PROMPT)
    logits = [model(batch.input_ids, seq_idx=batch.seq_idx).log_softmax(-1) for model in (teacher, student)]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    ce = -logits[1].gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0]
    weights = (batch.weights * (batch.labels >= 0)).double()
    assert counted(batch) == pytest.approx(float(weights.sum()))
    for loss_of, token in ((distillation_loss(teacher, DistillLoss()), kl), (cross_entropy_loss, ce)):
        expected = (token * weights).sum() / weights.sum()
        (wanted,) = torch.autograd.grad(expected, student.head_weight, retain_graph=True)
        found = loss_of(student, batch, counted(batch))
        (gradient,) = torch.autograd.grad(found, student.head_weight)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        assert torch.allclose(gradient, wanted, rtol=1e-6, atol=1e-9)


def long_row(exchanges: int, words: int = 12) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(exchanges):
        messages += [
            {"role": "user", "content": f"question {number} " + "word " * words},
            {"role": "assistant", "content": f"answer {number} " + "line " * words},
        ]
    return {"messages": messages}


def test_long_conversations_are_split_at_their_turns(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each part is what the template makes of the system message and some exchanges; said and counted."""
    tokenizer = load_tokenizer(folder)
    huge = {
        "messages": [
            *long_row(1)["messages"],
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "x " * 400},
        ]
    }
    path = write_rows(tmp_path / "a.jsonl", [long_row(9), long_row(1), huge])
    batch = whole_batch(corpus_of(path, folder), 150)
    parts = []
    for row in range(len(batch.input_ids)):
        for piece in batch.seq_idx[row].unique().tolist():
            here = (batch.seq_idx[row] == piece) & (batch.doc_id[row] >= 0)
            if here.any():
                parts.append((int(batch.doc_id[row][here][0]), tokenizer.decode(batch.input_ids[row][here].tolist())))
    renderer = Renderer(tokenizer, None)
    messages, exchanges = long_row(9)["messages"], 0
    for text in (text for document, text in sorted(parts) if document == 0):
        count = text.count("question")
        conversation = read_conversation({"messages": [messages[0], *messages[1 + 2 * exchanges :][: 2 * count]]}, "")
        assert conversation is not None
        assert tokenizer.decode(renderer.tokens(conversation, None)[0].tolist()) == text
        exchanges += count
    assert exchanges == 9 and len([text for document, text in parts if document == 0]) > 2
    assert [text.count("question") for document, text in parts if document == 2] == [1]
    told = " ".join(record.message for record in caplog.records)
    assert "150 tokens: 2 conversations are split at their turns (the first: a.jsonl, record 1)" in told
    assert "1 exchanges that are longer than a row are dropped" in told
    assert "the first: a.jsonl, record 3" in told
    whole_batch(corpus_of(path, folder, long="drop"), 150)
    assert (
        "rows of 150 tokens: 2 conversations that are too long are dropped (the first: a.jsonl, record 1)"
        in " ".join(record.message for record in caplog.records)
    )
    with pytest.raises(
        InputError, match=r"a.jsonl, record 1 has \d+ tokens, and rows have 150: its answer \d would be cut off"
    ):
        whole_batch(corpus_of(path, folder, long="refuse"), 150)
    with pytest.raises(InputError, match="give longer rows"):
        whole_batch(corpus_of(path, folder), 10)


def test_training_reads_whole_rows_in_another_order_each_epoch(folder: Path, tmp_path: Path) -> None:
    corpus = corpus_of(write_rows(tmp_path / "a.jsonl", ROWS), folder)
    options: dict[str, Any] = {"batch_size": 2, "seq_len": 400, "seed": 3}
    per_epoch = corpus.batches_per_epoch(2, 400)
    source = corpus.train_batches(**options)
    batches = [next(source) for _ in range(2 * per_epoch)]
    documents = [
        sorted(set(joined(part).doc_id.flatten().tolist())) for part in (batches[:per_epoch], batches[per_epoch:])
    ]
    assert all(len(each) >= len(ROWS) - 15 for each in documents)
    assert not torch.equal(batches[0].input_ids, batches[per_epoch].input_ids)
    sought = next(corpus.train_batches(**options, start=per_epoch + 1))
    assert torch.equal(sought.input_ids, batches[per_epoch + 1].input_ids)


def test_a_mixture_of_text_and_conversations(folder: Path, tmp_path: Path) -> None:
    """Shares of rows, boundaries of documents, weights and parts hold through it; options of a source are its own."""
    write_rows(tmp_path / "chat.jsonl", ROWS)
    (tmp_path / "text.txt").write_text("plain words, and </s> in them\n" * 400)
    sources = [{"path": "chat.jsonl", "weight": 3, "train_on": "weighted"}, {"path": "text.txt", "weight": 1}]
    (tmp_path / "mix.yaml").write_text(json.dumps({"sources": sources}))
    mixture = resolve.text_in_tokens(str(tmp_path / "mix.yaml"), "all", folder)
    assert isinstance(mixture, Mixture)
    batches = mixture.train_batches(batch_size=20, seq_len=400, seed=0)
    batch = joined([next(batches) for _ in range(5)])
    assert batch.parts is not None and batch.weights is not None
    text = batch.doc_id == len(ROWS)
    assert int(text[:, 0].sum()) == 25
    assert (batch.parts[text] == 0).all() and (batch.weights[text] == 1).all() and (batch.parts[~text][:50] > 0).any()
    assert set(batch.weights.unique().tolist()) == {torch.tensor(0.1).item(), 1.0}
    assert load_tokenizer(folder).eos_token_id not in batch.input_ids[text][:-1].tolist()
    everything = resolve.text_in_tokens(TextData(str(tmp_path / "mix.yaml"), train_on="all"), "all", folder)
    assert next(everything.train_batches(batch_size=4, seq_len=400, seed=0)).weights is None
    assert resolve.data_input(TextData("x")) == resolve.data_input("x")
    inputs = {str(resolve.data_input(data)) for data in (
        str(tmp_path / "mix.yaml"), TextData(str(tmp_path / "mix.yaml"), train_on="all")
    )}  # fmt: skip
    assert len(inputs) == 2


def test_reasoning_in_stated_shares(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "f", NEMOTRON)
    rows = [
        {"messages": [ASK | {"content": f"{i}?"}, SAY | {"content": f"{i}.", "reasoning_content": f"hm {i}"}]}
        for i in range(300)
    ]
    rows.append({"messages": [ASK, SAY]})
    path, tokenizer = write_rows(tmp_path / "a.jsonl", rows), load_tokenizer(folder)
    for share in (0.0, 0.7, 1.0):
        corpus = corpus_of(path, folder, reasoning_share=share)
        on = [name.endswith("(reasoning on)") for name in corpus.names]
        assert abs(sum(on) / 300 - share) < 0.08 and on[300] is False
        for number, thinks in enumerate(on):
            text = tokenizer.decode(corpus.ids[corpus.starts[number] : corpus.starts[number + 1]].tolist())
            assert ("<think>" in text) is thinks is (f"hm {number}" in text) and "/no_think" not in text
    names = corpus_of(path, folder).names
    assert names[0] == "a.jsonl:0"


def test_best_fit() -> None:
    sizes = np.random.default_rng(0).integers(1, 100, 500)
    rows = best_fit(sizes, 100)
    assert sorted(piece for row in rows for piece in row) == list(range(500))
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) <= 100 and len(rows) <= sizes.sum() / 100 * 1.05 + 1


def test_rows_in_memory(folder: Path) -> None:
    corpus = resolve.text_in_tokens([*ROWS[:5], "a text"], "all", folder)
    assert isinstance(corpus, Corpus) and corpus.names == ("row:0", "row:1", "row:2", "row:3", "row:4", "text-5")
    assert corpus.parts is not None and corpus.parts[int(corpus.starts[5]) :].max() == 0
    with pytest.raises(InputError, match="row 0, turn 1 has no role"):
        resolve.text_in_tokens([{"messages": [{"content": "x"}]}], "all", folder)


SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    (
        {"messages": [ASK, SAY]}, {"prompt": "q", "completion": "a"}, {"prompt": [ASK], "completion": [SAY]},
        {"conversations": SHARED}, {"conversations": SHARED, "system": "", "id": 5},
        {"messages": json.dumps([ASK, SAY])},
        {"conversations": [ASK, SAY]}, {"messages": [ASK | {"name": None}, SAY], "tools": None},
    ),
)  # fmt: skip
def test_rows_that_say_the_same(row: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    corpora = [
        corpus_of(write_rows(tmp_path / f"{n}.jsonl", [each]), folder)
        for n, each in enumerate((row, {"messages": [ASK, SAY]}))
    ]
    assert corpora[0].ids[:].tolist() == corpora[1].ids[:].tolist()


STRICT = (
    "{% for m in messages %}{% if loop.index0 % 2 == (m.role == 'user') %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("row", "says"),
    (
        ({"messages": [ASK, SAY, SAY]}, "line 2, turn 3: the chat template refuses: roles must alternate"),
        ({"messages": []}, "line 2 is an empty conversation"),
        ({"messages": "hello"}, "line 2: messages is a text, and no JSON"),
        ({"messages": {"role": "user"}}, "line 2: messages is no list"),
        ({"messages": [ASK, {"role": "assistant"}]}, "line 2, turn 2 has no content"),
        ({"messages": [ASK, {"role": "assistant", "content": 5}]}, "line 2, turn 2: its content is no text but int"),
        ({"messages": [ASK | {"content": [{"type": "image"}]}, SAY]}, "line 2, turn 1 has a part of type 'image'"),
        ({"messages": ["q"]}, "line 2, turn 1 is no message but str"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "line 2, turn 1 is from 'narrator'; known: human"),
        ({"prompt": "q", "completion": 5}, "line 2: prompt and completion are texts"),
        ({"messages": [ASK, SAY], "tools": "x y"}, "line 2: tools is a text, and no JSON"),
        ({"question": "q"}, "line 2 has the columns 'question'; expected a column 'text', messages"),
    ),
)  # fmt: skip
def test_what_is_no_conversation(row: Any, says: str, tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "f", STRICT)
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK, SAY]}, row])
    with pytest.raises(InputError) as raised:
        corpus_of(path, folder)
    assert f"{path}, {says}" in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK, SAY]}])
    with pytest.raises(
        InputError, match=r"a.jsonl, line 1 is a conversation, and .* has no chat template; .*data.columns"
    ):
        corpus_of(path, chat_folder(tmp_path / "f", None))


def test_null_and_silent_conversations_are_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": [ASK, SAY]}, {"messages": None}, {"prompt": None, "completion": "a"}, {"messages": [ASK]}]
    corpus = corpus_of(write_rows(tmp_path / "a.jsonl", rows), folder)
    assert len(corpus) == 2 and corpus.rows(64) == 1
    told = " ".join(record.message for record in caplog.records)
    assert "2 records whose text is null" in told and "1 conversations without an answer" in told


def test_of_conversations_without_tokens_or_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The template may write nothing of a conversation, first, between others and last; and of rows without any answer
    longer rows are no help."""
    quiet = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    folder, system = chat_folder(tmp_path / "f", quiet), {"role": "system", "content": "s"}
    rows = [{"messages": [system]}, {"messages": [ASK, SAY]}, {"messages": [{**system, "content": "t"}]},
            {"messages": [ASK, {**SAY, "content": "b"}]}, {"messages": [{**system, "content": "u"}]}]  # fmt: skip
    corpus = corpus_of(write_rows(tmp_path / "a.jsonl", rows), folder)
    assert len(corpus) == 5 and corpus.rows(64) == 1
    assert "3 conversations of which the template writes nothing" in " ".join(r.message for r in caplog.records)
    batch = whole_batch(corpus, 64)
    assert int((batch.labels >= 0).sum()) > 0 and set(batch.doc_id.unique().tolist()) == {-1, 1, 3}
    silent = corpus_of(write_rows(tmp_path / "b.jsonl", [{"messages": [ASK]}]), folder)
    with pytest.raises(InputError, match=r"1 conversations without an answer are left out$"):
        silent.rows(64)


def test_contents_in_parts_are_texts(folder: Path, tmp_path: Path) -> None:
    """And a message's dates are texts, too, as a table has them."""
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]}
    rows = [{"messages": [parts, SAY]}]
    one = corpus_of(write_rows(tmp_path / "a.jsonl", rows), folder)
    rows = [{"messages": [{"role": "user", "content": "q?"}, SAY]}]
    other = corpus_of(write_rows(tmp_path / "b.jsonl", rows), folder)
    assert one.ids.tolist() == other.ids.tolist()
    dated = [{"messages": [{**ASK, "at": datetime.datetime(2026, 1, 1)}, SAY]}]
    text = resolve.text_in_tokens(dated, "all", folder)
    assert text.tokens == one.tokens - 1


def test_a_template_that_knows_nothing_of_thinking_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = chat_folder(tmp_path / "f", "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}")
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK, SAY | {"reasoning_content": "hm"}]}])
    told, plain = (corpus_of(path, folder, **more) for more in ({"reasoning_share": 1.0}, {}))
    assert told.ids.tolist() == plain.ids.tolist()
    assert "the template has no word for it" in " ".join(record.message for record in caplog.records)


def test_errors_name_the_split_and_the_rows_there_are(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [ASK | {"content": f"{i}?"}]} for i in range(60)])
    with pytest.raises(InputError, match=r"data=.*a.jsonl, split validation: none of \d conversations"):
        resolve.text_in_tokens(str(path), "validation", folder).rows(64)
    few = corpus_of(write_rows(tmp_path / "b.jsonl", ROWS), folder)
    rows = few.rows(700)
    with pytest.raises(InputError, match=rf"{few.tokens} tokens, in {rows} rows of whole conversations, do not fill"):
        few.batches_per_epoch(rows + 1, 700)
    model = random_model(tiny_config())
    seq_len, batch = fitted(model, corpus_of(write_rows(tmp_path / "c.jsonl", ROWS[:4]), folder), 700, None)
    assert (seq_len, batch) == (700, corpus_of(tmp_path / "c.jsonl", folder).rows(700)) and batch < 8
