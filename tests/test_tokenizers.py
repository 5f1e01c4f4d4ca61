"""Tokenizers of other makers: what a file says of one batch, bytes of a token by what it decodes to, what stands before
a text and after it as transformers has it, and no bos."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limbeck.distill.gap.evaluation import continued
from limbeck.distill.gap.examples import Window, as_text
from limbeck.distill.gap.token_groups import CLASSES, token_classes
from limbeck.distill.text.pieces import encoded_texts
from limbeck.models.backend import begins_with, check_maps
from limbeck.models.checkpoint import save_model
from limbeck.models.errors import InputError
from limbeck.models.generate.detokenize import TextStream
from limbeck.models.gguf.vocabulary import read_vocabulary
from limbeck.models.named import SHIPPED
from limbeck.models.tokenizer import check_agreement, load_tokenizer, say_once
from limbeck.tests.helpers import limbeck, random_model, tiny_config
from limbeck.tests.tokenizer_helpers import TEXTS, byte_level, metaspace, saved, sentencepiece
from tokenizers import AddedToken, Tokenizer, processors


@pytest.mark.parametrize(("maker", "begins_with"), [(sentencepiece, 1), (metaspace, 1), (byte_level, 0)])
def test_bytes_of_tokens_are_those_of_the_text(
    maker: Callable[[], Tokenizer], begins_with: int, tmp_path: Path
) -> None:
    """Together they are the text's UTF-8 bytes, in any script; and the space put before a text, where one is."""
    backend = maker()
    tokenizer = load_tokenizer(saved(backend, tmp_path / "words"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "<unk>" not in text and backend.token_to_id("<unk>") not in ids
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode()) + begins_with
    if maker is sentencepiece:
        one = tokenizer.token_bytes[backend.token_to_id("<0xE6>")], tokenizer.token_bytes[backend.token_to_id("日本")]
        assert [int(count) for count in one] == [1, 6]
    assert int(tokenizer.token_bytes[backend.token_to_id("</s>")]) == 0


@pytest.mark.parametrize("maker", (sentencepiece, metaspace, byte_level))
def test_spaces_are_text_to_what_shows_tokens(maker: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """Their class, the worst windows, and what a model writes after a prompt."""
    tokenizer = load_tokenizer(saved(maker(), tmp_path / "words"))
    ids = tuple(tokenizer.encode(TEXTS[0].strip()))
    shown = as_text(Window(0, 1.0, ids, tuple(1.0 for _ in ids), ids, ids), ["a"], tokenizer)["pieces"]
    assert "".join(piece["text"] for piece in shown).strip() == TEXTS[0].strip()
    assert [piece["teacher"] for piece in shown] == [piece["text"] for piece in shown]
    classes = token_classes(tokenizer, tokenizer.vocab_size)
    spaces = [token for token in set(ids) if not tokenizer.backend.id_to_token(token).strip("\u2581Ġ")]
    assert spaces and {CLASSES[int(classes[token])] for token in spaces} == {"white space"}
    words = tokenizer.encode("x values")[len(tokenizer.encode("x")) :]
    assert continued([*words, tokenizer.eos_token_id, *words], tokenizer) == " values"


@pytest.mark.parametrize("maker", (sentencepiece, byte_level))
def test_named_tokens_are_special_whether_marked_so_or_not(maker: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """As transformers has it: they are no text, to what counts bytes and to what writes."""
    transformers = pytest.importorskip("transformers")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
    folder = saved(maker(), tmp_path / "words", tokenizer_class="PreTrainedTokenizerFast", **names)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<|pad|>", normalized=False), AddedToken("<|other|>", normalized=False)])
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.backend.token_to_id(name) for name in names.values()]
    other = tokenizer.backend.token_to_id("<|other|>")
    assert [int(tokenizer.token_bytes[token]) for token in (*ids, other)] == [0, 0, 0, len("<|other|>")]
    written = [*ids, *tokenizer.encode("me and"), ids[1], other, *ids]
    stream = TextStream(tokenizer)
    shown = "".join(map(stream.push, written)) + stream.finish()
    theirs = transformers.AutoTokenizer.from_pretrained(folder).decode(written, skip_special_tokens=True)
    assert shown == tokenizer.decode(written, skip_special_tokens=True) == theirs == "me and<|other|>"
    assert tokenizer.decode(written).endswith("<|other|><s></s><|pad|>")


def test_how_a_batch_was_cut_and_padded_is_not_obeyed(workshop: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(workshop / "model")
    backend = Tokenizer.from_file(str(workshop / "model" / "tokenizer.json"))
    backend.enable_truncation(7)
    backend.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    cut = load_tokenizer(saved(backend, tmp_path / "cut"))
    text = TEXTS[0] * 20
    assert cut.encode(text) == plain.encode(text) and len(cut.encode(text)) > 64
    assert cut.encode_many(["a", text]) == plain.encode_many(["a", text])


def with_parts(source: Path, folder: Path, **parts: Any) -> Path:
    """A folder whose tokenizer.json has other parts; `model` is of more or other keys."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("limbeck.json"))
    content = json.loads((folder / "tokenizer.json").read_text())
    parts = {name: content["model"] | part if name == "model" else part for name, part in parts.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))
    return folder


def test_a_dropout_of_merges_is_not_obeyed(workshop: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(workshop / "model")
    dropped = load_tokenizer(with_parts(workshop / "model", tmp_path / "dropped", model={"dropout": 0.5}))
    for text in TEXTS:
        assert [dropped.encode(text) for _ in range(5)] == [plain.encode(text)] * 5
        assert [list(ids) for ids, _ in encoded_texts([text] * 3, dropped)] == [plain.encode(text)] * 3


def charsmap(size: int, more: bytes) -> dict[str, str]:
    stored = size.to_bytes(4, "little") + more
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(stored).decode()}


def replacing(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {  # parts of tokenizer.json -> what is said, on opening or later
    "an empty map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "has a trie of 0"),
    "a map beyond its end": ({"normalizer": charsmap(2**32 - 1, b"\0")}, "has a trie of 4,294,967,295"),
    "a map within": ({"normalizer": {"type": "Sequence", "normalizers": [charsmap(99, b"\0")]}}, "has a trie of 99"),
    "a map that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "is no base64"),
    "a longer text": ({"normalizer": replacing("e", "e" * 1001)}, "makes a text 1,001 times as long"),
    "longer and longer": ({"normalizer": {"type": "Sequence", "normalizers": [replacing("e", "e" * 40)] * 2}},
                          "makes a text 1,600 times as long"),
    "a longer answer": ({"decoder": {"type": "Sequence", "decoders": [replacing("e", "e" * 2000)]}}, "2,000 times"),
    "what is prepended": ({"normalizer": {"type": "Prepend", "prepend": "e" * 5000}}, "5,000 times"),
    "an empty pattern": ({"normalizer": replacing("", "x")}, "index out of bounds"),
    "a prefix": ({"model": {"continuing_subword_prefix": "##"}}, "is no tokenizer: "),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    "what a decoder strips": ({"decoder": {"type": "Strip", "content": "e", "start": 5, "stop": 5}}, "index out of"),
    "no unknown word": ({"model": {"type": "WordLevel", "unk_token": "<nope>"}}, "Missing [UNK] token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_library_is_one_line(case: str, workshop: Path, tmp_path: Path) -> None:
    """Wherever it does: on opening, in texts together or one by one, in decoding at once or token by token."""
    parts, says = BROKEN[case]
    folder, ids = (
        with_parts(workshop / "model", tmp_path / "broken", **parts),
        load_tokenizer(workshop / "model").encode("e"),
    )

    def streamed(tokenizer: Any) -> None:
        stream = TextStream(tokenizer)
        for token in ids:
            stream.push(token)

    uses: dict[str, Callable[[Any], object]] = {
        "encode": lambda tokenizer: tokenizer.encode(TEXTS[0]),
        "encode_many": lambda tokenizer: tokenizer.encode_many(TEXTS),
        "encoded_texts": lambda tokenizer: list(encoded_texts(TEXTS, tokenizer)),
        "decode": lambda tokenizer: tokenizer.decode(ids),
        "stream": streamed,
    }
    wrong = set()
    for name, use in uses.items():
        try:
            use(load_tokenizer(folder))
        except InputError as error:
            assert str(folder / "tokenizer.json") in str(error) and "is no tokenizer" in str(error)
            assert says in str(error) and "\n" not in str(error)
            wrong.add(name)
    texts, answers = {"encode", "encode_many", "encoded_texts"}, {"decode", "stream"}
    assert wrong in (texts, answers, texts | answers), wrong


def test_maps_and_replacements_that_are_published_are_read(workshop: Path, tmp_path: Path) -> None:
    """A SentencePiece map, whose trie is followed by what it leads to, and replacements by turns."""
    steps = [replacing("``", '"'), replacing(" ", "\u2581"), {"type": "Prepend", "prepend": "\u2581"}]
    folder = with_parts(workshop / "model", tmp_path / "a", normalizer={"type": "Sequence", "normalizers": steps})
    assert load_tokenizer(folder).encode("a b")
    check_maps(json.dumps({"normalizer": charsmap(4, b"\0" * 4 + b"x\0")}).encode())


def framing(before: str, after: str, ids: dict[str, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=list(ids.items()))


# What stands before and after a text -> the post-processor that adds it, of a vocabulary's ids of <s> and </s>.
ADDED: dict[tuple[str, ...], Callable[[int, int], Any]] = {
    ("",): lambda bos, eos: None,
    ("", "offsets"): lambda bos, eos: processors.ByteLevel(),
    ("<s>",): lambda bos, eos: begins_with("<s>", bos),
    ("<s>", "offsets"): lambda bos, eos: processors.Sequence([processors.ByteLevel(), begins_with("<s>", bos)]),
    ("", "</s>"): lambda bos, eos: framing("", "</s>", {"</s>": eos}),
    ("<s></s>",): lambda bos, eos: framing("<s> </s>", "", {"<s>": bos, "</s>": eos}),
    ("<s>", "</s>"): lambda bos, eos: processors.RobertaProcessing(("</s>", eos), ("<s>", bos)),
    ("</s><s></s>",): lambda bos, eos: processors.Sequence([begins_with("<s>", bos), begins_with("</s>", eos)]),
}


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("maker", (sentencepiece, metaspace, byte_level))
def test_a_prompt_is_what_transformers_makes_of_it(
    maker: Callable[[], Tokenizer], added: tuple[str, ...], tmp_path: Path
) -> None:
    """Whatever tokenizer_config.json says of bos."""
    transformers = pytest.importorskip("transformers")
    backend = maker()
    backend.post_processor = ADDED[added](*map(backend.token_to_id, ("<s>", "</s>")))
    texts = ["", "a", "<s> is a tag, </s> too", *TEXTS]
    for number, (adds, bos) in enumerate(itertools.product((True, False, None, "absent"), ("<s>", None))):
        stated = {} if adds == "absent" else {"add_bos_token": adds}
        folder = saved(backend, tmp_path / str(number), tokenizer_class="PreTrainedTokenizerFast", bos_token=bos,
                       eos_token="</s>", unk_token="<unk>", **stated)  # fmt: skip
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert [ours.framed(text) for text in texts] == [theirs(text).input_ids for text in texts], (adds, bos)
        assert ours.decode(ours.begin) == added[0] and ours.decode(ours.end) in ("", *added[1:])


@pytest.mark.parametrize("name", SHIPPED)
def test_prompts_of_shipped_models_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(SHIPPED[name]), transformers.AutoTokenizer.from_pretrained(SHIPPED[name])
    assert ours.prompt("def f(x):") == [1, 295, 404, 917, 952] and ours.begin == [ours.bos_token_id]
    assert [ours.prompt(text) for text in ("", *TEXTS)] == [theirs(text).input_ids for text in ("", *TEXTS)]


def test_a_post_processor_of_no_token(workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    words = json.loads(path.read_text())
    words["post_processor"]["special_tokens"]["<s>"]["ids"] = [320]
    path.write_text(json.dumps(words))
    code, _, err = limbeck("generate", f"model={tmp_path / 'model'}", "prompt=x")
    assert code == 2 and "the post-processor adds token 320, which is not there" in err and err.count("\n") == 1


def test_what_two_files_say_otherwise_is_said(workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """add_bos_token beside a post-processor, once; and a teacher that begins texts otherwise."""
    for name in ("plain", "other"):
        shutil.copytree(workshop / "model", tmp_path / name)
    (path := tmp_path / "plain" / "tokenizer_config.json").write_text(
        json.dumps(json.loads(path.read_text()) | {"add_bos_token": False})
    )
    say_once.cache_clear()
    assert load_tokenizer(tmp_path / "plain").begin == load_tokenizer(tmp_path / "plain").begin == [1]
    assert caplog.text.count("add_bos_token false, tokenizer.json lets texts begin with <s>; that counts") == 1
    words = json.loads((path := tmp_path / "other" / "tokenizer.json").read_text())
    path.write_text(json.dumps(words | {"post_processor": {"type": "ByteLevel", "add_prefix_space": False,
                                                           "trim_offsets": True, "use_regex": False}}))  # fmt: skip
    (note,) = check_agreement(tmp_path / "plain", tmp_path / "other")
    assert note.startswith("texts begin with <s> in ") and "with nothing in the student's" in note


@pytest.mark.parametrize("form", ("hf", "gguf", "fp8"))
def test_export_says_the_bos_of_folders_before_post_processors(
    form: str, workshop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a vocabulary of limbeck's had bos before every text, which nothing in its folder says."""
    shutil.copytree(workshop / "model", tmp_path / "old")
    path = tmp_path / "old" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    say_once.cache_clear()
    assert load_tokenizer(tmp_path / "old").begin == [] and "limbeck export writes it there" in caplog.text
    pytest.importorskip({"gguf": "gguf", "fp8": "compressed_tensors"}.get(form, "tokenizers"))
    options = ["check_tokens=16", f"format={form}", *(["pre_tokenizer=gpt-2"] if form == "gguf" else [])]
    code, _, err = limbeck("export", f"model={tmp_path / 'old'}", f"output={tmp_path / 'new'}", *options)
    assert code == 0, err
    if form == "gguf":
        config = tiny_config(vocab_size=320)
        assert read_vocabulary(tmp_path / "old", config, "gpt-2").ggml["add_bos_token"]
    else:
        assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (workshop / "model/tokenizer.json").read_bytes()


def test_gguf_says_what_stands_around_a_text(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=400)
    found = []
    for number, added in enumerate(ADDED):
        backend = byte_level()
        backend.post_processor = ADDED[added](*map(backend.token_to_id, ("<s>", "</s>")))
        folder = saved(backend, tmp_path / str(number), bos_token=None, eos_token="</s>")
        if len(added[0]) > 4:
            with pytest.raises(InputError, match=r"before a text and .* after it; llama.cpp adds one"):
                read_vocabulary(folder, config)
            continue
        ggml = read_vocabulary(folder, config).ggml
        found.append((ggml.get("bos_token_id"), ggml["add_bos_token"], ggml["add_eos_token"]))
    none, first = (config.bos_token_id, False), (1, True)  # without a bos of its own the config's
    assert found == [(*none, False), (*none, False), (*first, False), (*first, False), (*none, True), (*first, True)]


def test_a_tokenizer_without_bos(workshop: Path, tmp_path: Path) -> None:
    """`"bos_token": null` (Qwen3 as published): every command reads text, which begins with nothing."""
    backend = Tokenizer.from_file(str(workshop / "model" / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    words = saved(backend, tmp_path / "words",
                  bos_token=None, eos_token="</s>", pad_token="<pad>")  # fmt: skip
    config = tiny_config(vocab_size=320, pad_token_id=0, bos_token_id=7, extra={"time_step_min": 1e-6})
    save_model(random_model(config).float(), tmp_path / "model", tokenizer_from=words)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.bos_token_id is None and tokenizer.prompt("x") == tokenizer.encode("x")
    assert check_agreement(tmp_path / "model", tmp_path / "model") == []
    with pytest.raises(InputError, match=r"the prompt is empty, and the tokenizer of .* adds nothing"):
        tokenizer.prompt("")
    places = [f"model={tmp_path / 'model'}", f"data={workshop / 'text'}"]
    small = ["seq_len=32", "batch=2"]
    code, out, err = limbeck("generate", places[0], "prompt=def ", "max_new_tokens=4")
    assert code == 0 and out.startswith("def "), err
    code, _, err = limbeck("score", *places, f"output={tmp_path / 'scores'}", *small, "importance.tokens=64",
                           "importance.depth_tokens=64")  # fmt: skip
    assert code == 0, err
    probes = ["details.probe_lengths=[96]", "details.probe_count=2", "probes=[needle]", "tokens=256"]
    details = ["details.prompt_tokens=8", "details.new_tokens=4", "details.resamples=20", "split=all"]
    code, _, err = limbeck("evaluate", f"teacher={tmp_path / 'model'}", places[1], f"output={tmp_path / 'gap'}", *small,
                           *probes, *details)  # fmt: skip
    assert code == 0, err
