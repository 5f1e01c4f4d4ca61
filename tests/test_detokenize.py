"""Streamed text: whole characters, stop strings, thoughts that end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from limbeck.models.errors import InputError
from limbeck.models.generate.detokenize import TextStream
from limbeck.models.generate.engine import Engine, Request, Thought
from limbeck.models.generate.sampling import Sampling
from limbeck.models.tokenizer import Tokenizer, load_tokenizer
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import random_model, tiny_config
from tokenizers import decoders, models


@pytest.fixture(scope="module")
def tokenizer(workshop: Path) -> Tokenizer:
    return load_tokenizer(workshop / "model")


def bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text in tokens of one byte each, so that characters fall apart."""
    return [token for byte in text.encode() for token in [byte_token(tokenizer, byte)]]


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # how byte-level vocabularies spell bytes
    rest = [value for value in range(256) if value not in shown]
    letter = chr(byte) if byte in shown else chr(256 + rest.index(byte))
    token = tokenizer.backend.token_to_id(letter)
    assert token is not None
    return token


@pytest.mark.parametrize("text", ("déjà vu", "日本語 ok", "🦊🦊 x", "a\ufffdb", "plain"))
def test_pieces_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    for ids in (bytes_of(tokenizer, text), tokenizer.encode(text)):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == text
    assert len([piece for piece in pieces if piece]) > 1 or text == "plain"


def test_bytes_that_are_no_text_come_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*bytes_of(tokenizer, "ab"), byte_token(tokenizer, 0xE6), byte_token(tokenizer, 0x97)]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "b", "", ""]
    assert "ab" + stream.finish() == tokenizer.decode(ids)
    again = TextStream(tokenizer)
    mixed = [*ids, *bytes_of(tokenizer, "c日d")]
    assert "".join(again.push(token) for token in mixed) + again.finish() == tokenizer.decode(mixed)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_tokens_are_the_whole_text(seed: int) -> None:
    """The shipped tokenizer, on bytes of many alphabets cut anywhere and on tokens drawn at random."""
    shipped, draw = load_tokenizer(ZOO), random.Random(seed)
    ranges = ((32, 127), (0x300, 0x9FFF), (0x1F300, 0x1F6FF))
    letters = "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(60))
    spelled, drawn = bytes_of(shipped, letters), [draw.randrange(shipped.vocab_size) for _ in range(80)]
    for ids in (spelled, spelled[: draw.randrange(1, len(spelled))], drawn):
        stream = TextStream(shipped)
        pieces = [stream.push(token) for token in ids]
        whole = shipped.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) + stream.finish() == whole
        assert "".join(pieces) == whole[: stream.decoded]
        if ids is spelled:
            assert whole == letters and not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert "".join(stream.push(token) for token in ids) + stream.finish() == "ab"


@pytest.mark.parametrize(
    "stop,shown", ((("END",), "abc"), (("cEN", "END"), "ab"), (("ENx",), "abcENDz"), (("z",), "abcEND"), (("ab",), ""))
)
def test_stop_strings_across_tokens(tokenizer: Tokenizer, stop: tuple[str, ...], shown: str) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in bytes_of(tokenizer, "abcENDz")]
    held = stream.finish()
    assert "".join(pieces) + held == shown
    assert stream.stopped == (shown != "abcENDz")
    for cut in range(len(pieces)):  # no piece takes back what an earlier one has shown
        assert shown.startswith("".join(pieces[:cut]))
    with pytest.raises(InputError, match="empty"):
        TextStream(tokenizer, ("",))


def test_what_may_become_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("aab",))
    pushed = [stream.push(token) for token in bytes_of(tokenizer, "aaab")]
    assert pushed == ["", "", "a", ""] and stream.stopped and stream.finish() == ""


def test_stop_strings_end_requests(workshop: Path, tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    sampling = Sampling(1.0, seed=3)
    free = Request([1, 2], 40, sampling, stop_tokens=())
    engine = Engine(model, max_length=60, tokenizer=tokenizer)
    whole = engine.complete([free])[0]
    assert whole.finished == "length" and whole.text == tokenizer.decode(whole.tokens, skip_special_tokens=True)
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped, never = engine.complete(
        [
            Request([1, 2], 40, sampling, stop=(stop,), stop_tokens=()),
            Request([1, 2], 40, sampling, stop=("no such text",), stop_tokens=()),
        ]
    )
    assert stopped.finished == "stop string" and stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.tokens) < 40 and stopped.tokens == whole.tokens[: len(stopped.tokens)]
    assert never.finished == "length" and never.text == whole.text


@pytest.mark.parametrize("budget", (0, 1, 7))
def test_thoughts_end_with_their_budget(tokenizer: Tokenizer, budget: int) -> None:
    model = random_model(tiny_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    close = tokenizer.encode("</think>")
    prompt = [1, *tokenizer.encode("<think>\n")]
    request = Request(prompt, 30, Sampling(1.0, seed=1), stop_tokens=(), thinking_budget=budget)
    engine = Engine(model, max_length=60, tokenizer=tokenizer)
    free, found = engine.complete([Request(prompt, 30, Sampling(1.0, seed=1), stop_tokens=()), request])
    assert found.tokens[:budget] == free.tokens[:budget]
    assert found.tokens[budget : budget + len(close)] == close
    assert found.text.count("</think>") == 1 and len(found.tokens) == 30


def test_a_thought_that_began_long_ago_is_one(tokenizer: Tokenizer) -> None:
    """Of a prompt whose marker is further back than what a new marker's text is looked for in."""
    prompt = tokenizer.encode("<think>" + "a b c d " * 20)
    assert len(prompt) > 40 and Thought(tokenizer, prompt, 2).open
    assert not Thought(tokenizer, tokenizer.encode("<think></think>" + "a b c d " * 20), 2).open


def test_thoughts_are_seen_opening_and_closing(tokenizer: Tokenizer) -> None:
    thought = Thought(tokenizer, [1, *tokenizer.encode("<think>a</think>b")], 2)
    assert not thought.open
    for token in tokenizer.encode("c<think>"):
        thought.see(token)
    assert thought.open and not thought.forced
    for token in tokenizer.encode("x</think>"):
        thought.see(token)
        if thought.forced:
            break
    for token in thought.forced:
        thought.see(token)
    assert not thought.open


PIECES = ("<unk>", "<s>", "▁", "▁def", "▁mean", "s", "(", ",", *(f"<0x{byte:02X}>" for byte in "日🦊".encode()))
DECODERS = {
    "sentencepiece": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    ),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(cleanup=False),
    "none": None,
}


def pieces_tokenizer(decoder: str) -> Tokenizer:
    """A vocabulary as SentencePiece makes them, with a decoder to which the first token is another matter."""
    backend = tokenizers.Tokenizer(models.BPE({piece: number for number, piece in enumerate(PIECES)}, [],
                                              unk_token="<unk>", byte_fallback=True))  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>"])
    if DECODERS[decoder] is not None:
        backend.decoder = DECODERS[decoder]
    return Tokenizer(backend, Path("none"), None, "<unk>", None)


@pytest.mark.parametrize("decoder", DECODERS)
def test_new_tokens_are_decoded_after_the_prompt(decoder: str) -> None:
    tokenizer, draw = pieces_tokenizer(decoder), random.Random(0)
    numbers = range(2, 8)
    for _ in range(200):
        prompt = [1, *(draw.choice(numbers) for _ in range(draw.randrange(1, 40)))]
        ids = [draw.choice(numbers) for _ in range(8)]
        stream = TextStream(tokenizer, (), prompt)
        text = "".join(stream.push(token) for token in ids) + stream.finish()
        whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
        assert tokenizer.decode(prompt, skip_special_tokens=True) + text == whole


def test_spaces_after_a_prompt() -> None:
    tokenizer = pieces_tokenizer("sentencepiece")

    def text_of(prompt: Sequence[int], ids: Sequence[int], *stop: str) -> str:
        stream = TextStream(tokenizer, stop, prompt)
        return "".join(stream.push(token) for token in ids) + stream.finish()

    assert text_of([1, 3], [4, 5]) == " means" and text_of([3], [5, 4]) == "s mean"
    assert text_of([1, 3], [5, 4, 6], " mean") == "s"  # a stop string that begins with a space
    assert text_of([], [4]) == text_of([1], [4]) == text_of([3, 1], [4]) == "mean"  # a text of its own begins
    fox, day = range(11, 15), range(8, 11)
    assert text_of([3, *day], [*fox, 4]) == "🦊 mean" and text_of([*day] * 9, [*day]) == "日"
    assert text_of([3, 8], [9, 10]) == "\ufffd\ufffd"  # a prompt that ends within a character: as if alone
    assert text_of([3, *day], [8, 4, 5]) == "\ufffd means"  # the library's stream raises for these
    assert text_of([], [*day, 8, 4]) == "日\ufffd mean"


def test_byte_level_texts_do_not_depend_on_the_prompt(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(50):
        prompt, ids = ([draw.randrange(tokenizer.vocab_size) for _ in range(20)] for _ in range(2))
        alone, after = TextStream(tokenizer), TextStream(tokenizer, (), prompt)
        assert [alone.push(token) for token in ids] == [after.push(token) for token in ids]
        assert alone.finish() == after.finish()
