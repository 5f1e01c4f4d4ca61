"""Checkpoint folders of every family that goes into a GGUF file, with tokenizers that cut text as published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from limbeck.models.backend import begins_with
from limbeck.models.checkpoint import save_model
from limbeck.models.config import HybridConfig
from limbeck.models.folder import write_json
from limbeck.models.gguf.pretokenizers import DIGIT, GPT2, KNOWN
from limbeck.models.multipliers import Multipliers
from limbeck.models.rope import Llama3Rope, YarnRope
from limbeck.tests.helpers import EXPERTS, TEXT, random_model, tiny_config
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

SAMPLES = (
    "def f_1(x2):\n\treturn  x2 + 12345 # it's WE'LL\n\n\n    y = '∑' + \"ÄÖü\"\r\n",
    "The quick brown fox, 1/3 of it: don't… can\u2019t!?  \n \n  HelloWorld camelCase SHOUTing 你好世界 1234567890",
    "    if a == b:\n        print('%s' % (a,))  # /tmp/FIXME\n",
    "Ünïcödé naïve façade Ωmega ﬁ ½ ² emoji 🙂🙃 tab\there  two  spaces   three\n\n",
    "x=1;y=-2.5e10;z=0xFF&&!w||(a^b)<<3>>2; // comment */",
)


def pre_tokenizer_of(name: str) -> Any:
    """The tokenizer.json's step that llama.cpp's name stands for."""
    cuts, _ = KNOWN[name]
    if cuts == (GPT2,):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps: list[Any] = []
    for cut in cuts:
        if cut == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut == GPT2:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        else:
            steps += [pre_tokenizers.Split(Regex(cut), "isolated"),
                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]  # fmt: skip
    return pre_tokenizers.Sequence(steps)


def write_tokenizer(folder: Path, name: str, size: int = 400, **settings: Any) -> int:
    """A byte-level BPE that cuts text as llama.cpp's pre-tokenizer of that name, and begins it with bos where it has
    one; gives its number of tokens."""
    ignore = KNOWN[name][1]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer_of(name), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT, *SAMPLES * 3], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | settings
    if special["bos_token"] is not None:
        backend.post_processor = begins_with("<s>", 1)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
    return backend.get_vocab_size()


def gguf_config(family: str, vocabulary: int, **changes: Any) -> HybridConfig:
    """A small config of a family that has everything which its GGUF form turns over."""
    if family == "nemotron_h":
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
        return tiny_config(**{"vocab_size": vocabulary + 3, "pad_token_id": 0, **sizes, **changes})
    if family == "granitemoehybrid":
        return HybridConfig(**GRANITE | {"vocab_size": vocabulary + 3} | changes)
    return HybridConfig(
        **{
            "family": family, "pattern": "*-" * 3, "vocab_size": vocabulary + 3, "hidden_size": 64,
            "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16 if family == "llama" else 24, "activation": "silu", "gated_mlp": True,
            "qk_norm": family == "qwen3", "rope_theta": 10000.0, "max_position_embeddings": 256, "pad_token_id": 0,
        }
        | changes
    )  # fmt: skip


GRANITE: dict[str, Any] = {
    "family": "granitemoehybrid", "pattern": "M-*-M-", "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "n_groups": 1, "ssm_state_size": 16, "activation": "silu", "gated_mlp": True, "pad_token_id": 0,
    "multipliers": Multipliers(embedding=3.0, residual=0.5, attention=0.3, logits_scaling=2.0),
}  # fmt: skip
GRANITE_EXPERTS = {
    "pattern": "ME*EME", "intermediate_size": 0, "router": "softmax", "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip
NO_MAMBA = {"mamba_num_heads": 0, "mamba_head_dim": 0, "n_groups": 0, "ssm_state_size": 0, "rope_theta": 10000.0}
STRETCHED = {"llama3": Llama3Rope(8.0, 1.0, 4.0, 32), "yarn": YarnRope(4.0, 64)}
WIDE = {"pattern": "ME*EM", "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64}
ONE_EXPERT = {"n_routed_experts": 1, "num_experts_per_tok": 1}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "num_experts_per_tok": 3}
# What a folder is called -> its family, its pre-tokenizer, and what its config has of its own.
FOLDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nemotron_h": ("nemotron_h", "tekken", {"eos_token_id": (2, 3)}),
    "nemotron_h-tied": ("nemotron_h", "gpt-2", {"tie_word_embeddings": True, "conv_bias": False}),
    "nemotron_h-experts": ("nemotron_h", "gpt-2", EXPERTS | WIDE),
    "nemotron_h-latent": ("nemotron_h", "gpt-2", EXPERTS | WIDE | {"moe_latent_size": 32, "norm_topk_prob": False}),
    "nemotron_h-one-expert": ("nemotron_h", "gpt-2", EXPERTS | WIDE | ONE_EXPERT),
    "nemotron_h-groups": ("nemotron_h", "gpt-2", EXPERTS | WIDE | GROUPS | {"topk_group": 2}),
    "nemotron_h-all-groups": ("nemotron_h", "gpt-2", EXPERTS | WIDE | GROUPS | {"topk_group": 4}),
    "llama": ("llama", "llama-bpe", {}),
    "llama-biases": ("llama", "smollm", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-3": ("llama", "llama-bpe", {"rope_scaling": STRETCHED["llama3"]}),
    "llama-yarn": ("llama", "dbrx", {"rope_scaling": STRETCHED["yarn"]}),
    "granite": ("granitemoehybrid", "dbrx", {"tie_word_embeddings": True}),
    "granite-positions": ("granitemoehybrid", "dbrx", {"rope_theta": 10000.0, "conv_bias": False}),
    "granite-experts": ("granitemoehybrid", "dbrx", GRANITE_EXPERTS),
    "granite-attention": ("granitemoehybrid", "dbrx", NO_MAMBA | {"pattern": "*-*-"}),
    "granite-attention-experts": ("granitemoehybrid", "dbrx", GRANITE_EXPERTS | NO_MAMBA | {"pattern": "*E*E"}),
    "qwen3": ("qwen3", "qwen2", {}),
    "qwen3-yarn": ("qwen3", "qwen2", {"rope_scaling": STRETCHED["yarn"], "tie_word_embeddings": True}),
}  # fmt: skip


def write_folder(root: Path, name: str) -> Path:
    """One of `FOLDERS`, its weights in float32."""
    family, pre, changes = FOLDERS[name]
    settings: dict[str, Any] = {"bos_token": None} if family == "qwen3" else {}
    size = write_tokenizer(root / f"{name}-words", pre, **settings)
    (root / f"{name}-words" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = gguf_config(family, size, **changes)
    save_model(random_model(config, 3, torch.float32), root / name, tokenizer_from=root / f"{name}-words")
    return root / name
