"""GGUF files, read with the gguf package's own reader: names, shapes, numbers, words; and what cannot be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.gguf import file
from limbeck.models.gguf.layout import Entry, entries, numbers_of
from limbeck.models.gguf.pretokenizers import KNOWN, pre_tokenizer
from limbeck.models.multipliers import Multipliers
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.gguf_helpers import GROUPS, WIDE, gguf_config, write_folder, write_tokenizer
from limbeck.tests.helpers import EXPERTS, limbeck, moe_config, random_model, tiny_config
from torch import Tensor


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def source_of(root: Path, name: str) -> Path:
    return root / name if (root / name).exists() else write_folder(root, name)


def exported(source: Path, out: Path, dtype: str = "float32") -> gguf.GGUFReader:
    code, _, err = limbeck(
        "export", f"model={source}", f"output={out}", "format=gguf", f"dtype={dtype}", "check_tokens=32"
    )
    assert code == 0, err
    return gguf.GGUFReader(out / f"model-{dtype}.gguf")


def values_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray[Any, Any]]:
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def test_a_hybrid(root: Path) -> None:
    source = source_of(root, "nemotron_h")
    reader = exported(source, root / "out")
    content, tensors = values_of(reader), tensors_of(reader)
    weights = {name: open_checkpoint(source).tensor(name).numpy() for name in open_checkpoint(source).names()}
    own = {key.removeprefix("nemotron_h."): value for key, value in content.items() if key.startswith("nemotron_h.")}
    assert content["general.architecture"] == "nemotron_h" and content["general.file_type"] == 0
    assert own["attention.head_count_kv"] == [0, 0, 0, 2, 0, 0] and own["feed_forward_length"] == [0, 96, 0, 0, 96, 0]
    expected = {"block_count": 6, "embedding_length": 64, "vocab_size": 403, "attention.key_length": 16,
                "ssm.inner_size": 64, "ssm.time_step_rank": 8, "ssm.group_count": 2, "ssm.state_size": 16,
                "ssm.conv_kernel": 4, "context_length": 131072}  # fmt: skip
    assert own | expected == own
    parts = {"M": ("ssm_in.weight", "ssm_conv1d.weight", "ssm_conv1d.bias", "ssm_a", "ssm_d", "ssm_dt.bias",
                   "ssm_norm.weight", "ssm_out.weight"),
             "-": ("ffn_up.weight", "ffn_down.weight"),
             "*": ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")}  # fmt: skip
    names = {f"blk.{i}.{part}" for i, letter in enumerate("M-M*-M") for part in ("attn_norm.weight", *parts[letter])}
    assert tensors.keys() == names | {"token_embd.weight", "output_norm.weight", "output.weight"}
    mixer = "layers.2.mixer."
    assert np.allclose(tensors["blk.2.ssm_a"], -np.exp(weights[mixer + "A_log"])[:, None], rtol=1e-6)
    assert np.array_equal(tensors["blk.2.ssm_d"], weights[mixer + "D"][:, None])
    assert np.array_equal(tensors["blk.2.ssm_conv1d.weight"], weights[mixer + "conv1d.weight"][:, 0])
    assert np.array_equal(tensors["blk.2.ssm_norm.weight"], weights[mixer + "norm.weight"].reshape(2, 32))
    assert np.array_equal(tensors["blk.3.attn_k.weight"], weights["layers.3.mixer.k_proj.weight"])
    assert np.array_equal(tensors["blk.0.ssm_in.weight"], weights["layers.0.mixer.in_proj.weight"])


def test_experts(root: Path) -> None:
    source = source_of(root, "nemotron_h-latent")
    reader = exported(source, root / "experts", "q8_0")
    content, kinds = values_of(reader), {each.name: each.tensor_type.name for each in reader.tensors}
    expected = {"expert_count": 6, "expert_used_count": 2, "expert_weights_scale": 2.5, "expert_weights_norm": False,
                "feed_forward_length": [0, 32, 0, 32, 0], "moe_latent_size": 32}  # fmt: skip
    assert content | {f"nemotron_h_moe.{key}": value for key, value in expected.items()} == content
    assert "nemotron_h_moe.expert_group_count" not in content  # with which llama.cpp aborts where it has no choice
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    shapes = {each.name: tuple(reversed(each.shape.tolist())) for each in reader.tensors}
    assert shapes["blk.3.ffn_down_exps.weight"] == (6, 32, 32) and shapes["blk.3.ffn_latent_up.weight"] == (64, 32)
    mixed = tiny_config(**EXPERTS | {"vocab_size": 403})
    save_model(random_model(mixed, 0, torch.float32), root / "mixed", tokenizer_from=source)
    refused("MLP layers beside layers of experts", root / "mixed-out", 2, f"model={root / 'mixed'}", "format=gguf")


def test_granite(root: Path) -> None:
    reader = exported(source_of(root, "granite-experts"), root / "granite-out")
    content, names = values_of(reader), {each.name for each in reader.tensors}
    expected = {"attention.scale": pytest.approx(0.3), "embedding_scale": 3.0, "residual_scale": 0.5,
                "logit_scale": 2.0, "attention.head_count_kv": [0, 2, 0], "rope.scaling.finetuned": False,
                "expert_count": 4, "block_count": 3, "feed_forward_length": 32}  # fmt: skip
    for key, value in expected.items():
        assert content[f"granitehybrid.{key}"] == value, key
    assert {
        "blk.0.ssm_in.weight",
        "blk.1.attn_q.weight",
        "blk.2.ffn_gate_exps.weight",
        "blk.0.ffn_norm.weight",
    } <= names
    plain = values_of(exported(source_of(root, "granite-attention"), root / "granite-plain"))
    assert plain["general.architecture"] == "granite" and plain["granite.rope.scaling.finetuned"]
    with_experts = values_of(exported(source_of(root, "granite-attention-experts"), root / "granite-moe"))
    assert with_experts["general.architecture"] == "granitemoe" and with_experts["granitemoe.expert_used_count"] == 2


def test_words(root: Path) -> None:
    source = source_of(root, "nemotron_h")
    content = values_of(exported(source, root / "words-out"))
    backend, tokens = load_tokenizer(source).backend, content["tokenizer.ggml.tokens"]
    assert tokens[:400] == [backend.id_to_token(number) for number in range(400)] and tokens[402] == "[PAD402]"
    assert content["tokenizer.ggml.token_type"] == [3] * 4 + [1] * 396 + [5] * 3
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    assert content["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    expected = {"pre": "tekken", "model": "gpt2", "bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 3,
                "padding_token_id": 0, "add_bos_token": True}  # fmt: skip
    assert content | {f"tokenizer.ggml.{key}": value for key, value in expected.items()} == content
    assert content["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_ids_of_no_token_are_left_out(root: Path, tmp_path: Path) -> None:
    source = source_of(root, "nemotron_h")
    shutil.copytree(source, tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"eos_token_id": [2, -1, 403, 5]}))
    found = values_of(exported(tmp_path / "model", tmp_path / "out"))
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.eot_token_id"] == 5
    assert "tokenizer.ggml.eom_token_id" not in found


def test_every_token_that_ends_a_text_is_said(root: Path, tmp_path: Path) -> None:
    """The tokenizer's eos, then config.json's, then those of generation_config.json, as `generate` stops at them; for
    more than a file has keys there is a caution. What the tokenizer is silent of is config.json's."""
    source = source_of(root, "qwen3")  # whose tokenizer has no bos
    shutil.copytree(source, tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"eos_token_id": 7, "bos_token_id": 5}))
    reader = exported(tmp_path / "model", tmp_path / "one")
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in values_of(reader).items()}
    expected = {"eos_token_id": 2, "eot_token_id": 7, "bos_token_id": 5, "add_bos_token": False}
    assert found | expected == found and "eom_token_id" not in found
    assert "cautions" not in json.loads((tmp_path / "one" / "export.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2, 9]}))
    found = values_of(exported(tmp_path / "model", tmp_path / "four"))
    assert [found[f"tokenizer.ggml.{key}"] for key in ("eos_token_id", "eot_token_id", "eom_token_id")] == [2, 7, 3]
    told = json.loads((tmp_path / "four" / "export.json").read_text())
    assert "does not end at 9 (`" in told["cautions"][0] and told["gguf"]["same_text"]
    assert "does not end at 9 (`" in (tmp_path / "four" / "README.md").read_text()


def test_queries_and_keys_of_llama_are_interleaved(root: Path) -> None:
    source = source_of(root, "llama-biases")
    tensors = tensors_of(exported(source, root / "biases"))
    weight, bias = (
        open_checkpoint(source).tensor(f"layers.2.mixer.q_proj.{part}").numpy() for part in ("weight", "bias")
    )
    order = [head * 16 + half * 8 + i for head in range(4) for i in range(8) for half in range(2)]
    assert np.array_equal(tensors["blk.1.attn_q.weight"], weight[order])
    assert np.array_equal(tensors["blk.1.attn_q.bias"], bias[order])
    values = open_checkpoint(source).tensor("layers.2.mixer.v_proj.weight").numpy()
    assert np.array_equal(tensors["blk.1.attn_v.weight"], values) and "output.weight" not in tensors


def test_positions(root: Path) -> None:
    stretched = exported(source_of(root, "llama-3"), root / "llama-3-out")
    factors = tensors_of(stretched)["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == 8 and factors.shape == (8,) and (np.diff(factors) >= 0).all()
    content = values_of(exported(source_of(root, "qwen3-yarn"), root / "yarn-out"))
    expected = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
                "qwen3.rope.scaling.original_context_length": 64, "tokenizer.ggml.add_bos_token": False}  # fmt: skip
    assert content | expected == content and content["tokenizer.ggml.bos_token_id"] == 1  # config.json's


@pytest.mark.parametrize("name", ("nemotron_h-tied", "qwen3"))
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16", "q8_0"))
def test_every_type_holds_the_weights(name: str, dtype: str, root: Path) -> None:
    source = source_of(root, name)
    out = root / f"{name}-{dtype}"
    reader = exported(source, out, dtype)
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["token_embd.weight"] == kind and kinds["output_norm.weight"] == "F32"
    found = json.loads((out / "export.json").read_text())["gguf"]
    assert found["bytes"] == (out / found["file"]).stat().st_size and found["same_text"]
    ids = torch.arange(32)[None]
    with torch.no_grad():
        ours, theirs = load_model(source)(ids), file.open_gguf(out / found["file"], load_model(source).config)(ids)
    error = ((ours - theirs).square().mean() / ours.square().mean()).sqrt().item()
    assert error <= {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.06, "q8_0": 0.1}[dtype]
    assert f"llama-cli -m {found['file']}" in (out / "README.md").read_text()
    if name == "nemotron_h-tied":
        assert not tensors_of(reader)["blk.0.ssm_conv1d.bias"].any()


def test_rows_that_no_block_fills_are_bfloat16(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "words", "gpt-2")
    config = gguf_config("llama", 400, intermediate_size=80)
    save_model(random_model(config, 0, torch.float32), tmp_path / "model", tokenizer_from=tmp_path / "words")
    kinds = {
        each.name: each.tensor_type.name for each in exported(tmp_path / "model", tmp_path / "out", "q8_0").tensors
    }
    assert kinds["blk.0.ffn_down.weight"] == "BF16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_small_numbers_in_q8_0(root: Path, tmp_path: Path) -> None:
    """A block whose step is subnormal in float16 is as near as such a step can be."""
    model = load_model(source_of(root, "llama"))
    with torch.no_grad():
        for row, size in enumerate((1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 1e-7)):  # as of tokens that were never trained
            model.embeddings.weight[10 * row : 10 * row + 10] = torch.randn(10, 64).bfloat16() * size
    save_model(model, tmp_path / "model", tokenizer_from=root / "llama")
    assert {each.tensor_type.name for each in exported(tmp_path / "model", tmp_path / "out", "q8_0").tensors} == {
        "Q8_0",
        "F32",
    }


@pytest.mark.parametrize("name", KNOWN)
def test_a_pre_tokenizer_is_known_by_what_it_does(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, name)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert pre_tokenizer(content, tmp_path) == (name, True)
    other = next(other for other in KNOWN if other != name)
    assert pre_tokenizer(content, tmp_path, other) == (other, False)


def test_forms_are_undone(root: Path) -> None:
    for family in ("nemotron_h", "llama", "qwen3"):
        config = gguf_config(family, 20)
        model = random_model(config).state_dict()
        for entry in entries(config):
            weight = model[entry.spec.name].float()
            if entry.form is not None:
                again = entry.form.read(config, entry.form.written(config, weight))
                assert torch.allclose(again, weight, atol=1e-5) and again.shape == weight.shape, entry.name


def refused(says: str, out: Path, code: int, *options: str) -> None:
    found, _, err = limbeck("export", f"output={out}", "check_tokens=8", *options)
    assert found == code and says in err and err.count("\n") == 1, (found, err)
    assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()


def changed(source: Path, root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A folder whose tokenizer.json has a change."""
    model = load_model(source)
    save_model(model, root, tokenizer_from=source)
    content = json.loads((root / "tokenizer.json").read_text())
    change(content)
    (root / "tokenizer.json").write_text(json.dumps(content))
    return root


def test_a_normalizer_is_told(root: Path, tmp_path: Path) -> None:
    """llama.cpp has none, and decomposed text becomes other tokens: the card, export.json and the command say it."""
    composed = changed(source_of(root, "llama"), tmp_path / "model", lambda content: content.update(
        normalizer={"type": "NFC"}))  # fmt: skip
    options = ("format=gguf", "dtype=float32", "check_tokens=8")
    code, text, err = limbeck("export", f"model={composed}", f"output={tmp_path / 'out'}", *options)
    assert code == 0 and "caution: llama.cpp has no normalizer" in text, err
    content = json.loads((tmp_path / "out" / "export.json").read_text())
    assert not content["gguf"]["same_text"] and content["cautions"] == content["gguf"]["notes"]
    assert "has NFC" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(root, "llama")
    out, model = tmp_path / "out", f"model={source}"
    refused("format=pt is unknown", out, 2, model, "format=pt")
    refused("dtype=q4 is none of format=gguf", out, 2, model, "format=gguf", "dtype=q4")
    refused("q8_0", out, 2, model, "dtype=q8_0")
    refused("format=gguf writes one file", out, 2, model, "format=gguf", "max_shard_bytes=9000")
    refused("pre_tokenizer is llama.cpp's", out, 2, model, "pre_tokenizer=gpt-2")
    refused("did you mean 'gpt-2'", out, 2, model, "format=gguf", "pre_tokenizer=gpt2")
    refused("no pre-tokenizer that cuts text as this one", out, 2, "model=zoo", "format=gguf")
    pieces = changed(source, tmp_path / "a", lambda content: content.update(normalizer={"type": "Lowercase"}))
    refused("normalizer Lowercase", out, 2, f"model={pieces}", "format=gguf")
    bare = changed(source, tmp_path / "bare", lambda content: content["model"].update(merges=[]))
    refused("has no merges", out, 2, f"model={bare}", "format=gguf")
    for name, value in (("max_position_embeddings", 2**33), ("rope_theta", 1e300)):
        far = tmp_path / name
        save_model(load_model(source), far, tokenizer_from=source)
        content = json.loads((far / "config.json").read_text())
        (far / "config.json").write_text(json.dumps(content | {name: value}))
        refused("a GGUF file holds up to", out, 2, f"model={far}", "format=gguf")
    pieces = changed(source, tmp_path / "b", lambda content: content.update(pre_tokenizer={"type": "Whitespace"}))
    refused("takes a byte-level BPE", out, 2, f"model={pieces}", "format=gguf")
    limited = tmp_path / "limited"
    save_model(random_model(tiny_config(vocab_size=403, dt_limit=(0.0, 0.5)), 0, torch.float32), limited,
               tokenizer_from=source)  # fmt: skip
    refused("clamps no step", out, 2, f"model={limited}", "format=gguf")
    alone = tmp_path / "alone"
    save_model(random_model(tiny_config(vocab_size=403, pattern="M-M"), 0, torch.float32), alone, tokenizer_from=source)
    refused("no layer is attention", out, 2, f"model={alone}", "format=gguf")
    ahead = tmp_path / "ahead"
    two = moe_config(vocab_size=403, pattern="ME*", mtp_steps=1, mtp_pattern="*E")
    save_model(random_model(two, 0, torch.float32), ahead, tokenizer_from=source)
    refused("target.drop_mtp=true", out, 2, f"model={ahead}", "format=gguf")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "gguf", None)
        refused("pip install 'limbeck[gguf]'", out, 2, model, "format=gguf")


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    (
        ("qwen3", {"attention_bias": True}, "qwen3 has no bias after attention"),
        ("nemotron_h", {"pattern": "*-*-"}, "no layer is Mamba-2"),
        ("nemotron_h", EXPERTS | {"pattern": "*E*E"}, "no layer is Mamba-2"),
        ("granitemoehybrid", {"multipliers": Multipliers(attention=0.0)}, "attention.scale is 0"),
        ("granitemoehybrid", {"multipliers": Multipliers(embedding=0.0)}, "embedding_scale is 0"),
        ("granitemoehybrid", {"multipliers": Multipliers(attention=1e-60)}, "attention.scale is 1e-60"),
    ),
)
def test_what_llama_cpp_does_not_run(
    family: str, changes: dict[str, Any], says: str, root: Path, tmp_path: Path
) -> None:
    """Found in llama.cpp by `make test-clients`' helpers: it refuses the file, aborts, or reads another number."""
    config = gguf_config(family, 400, **changes)
    save_model(random_model(config, 0, torch.float32), tmp_path / "model", tokenizer_from=source_of(root, "llama"))
    refused(says, tmp_path / "out", 2, f"model={tmp_path / 'model'}", "format=gguf", "dtype=float32")


@pytest.mark.parametrize(("used", "said"), ((1, True), (2, True), (4, False)))
def test_groups_of_experts_are_said_where_there_is_a_choice(used: int, said: bool) -> None:
    """llama.cpp aborts on groups of which all are chosen."""
    config = gguf_config("nemotron_h", 400, **EXPERTS | WIDE | GROUPS | {"topk_group": used, "num_experts_per_tok": 2})
    numbers = numbers_of(config)
    assert ("expert_group_count" in numbers) == said == ("expert_group_used_count" in numbers)


def test_a_failed_check_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(root, "llama")
    honest = file.pieces

    def careless(checkpoint: Any, entry: Entry) -> Iterator[Tensor]:
        for rows in honest(checkpoint, entry):
            yield rows * 1.02 if entry.name == "blk.1.ffn_up.weight" else rows

    monkeypatch.setattr(file, "pieces", careless)
    for dtype in ("float32", "q8_0"):
        refused(
            "layers.3.mixer.up_proj.weight", tmp_path / "out", 3, f"model={source}", "format=gguf", f"dtype={dtype}"
        )
