"""What was probably meant by the name of an option that there is not: by its last part, by what other tools call it,
and by its letters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

# What others call an option (Hugging Face's trainers, vLLM, torchtune, papers): the last parts of our names for it.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "peak_lr", "max_lr", "rate"),
    "final_ratio": ("min_lr_ratio", "min_lr"),
    "steps": ("epochs", "num_epochs", "num_train_epochs", "max_steps", "num_steps", "train_steps", "iterations",
              "iters", "train_tokens", "tokens"),
    "warmup_steps": ("warmup", "warmup_ratio", "num_warmup_steps"),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type"),
    "optimizer": ("optim",),
    "weight_decay": ("wd",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "clip_norm": ("clip", "grad_clip", "max_grad_norm", "gradient_clipping"),
    "batch": ("batch_size", "bs", "bsz", "global_batch_size", "train_batch_size", "max_num_seqs", "num_seqs"),
    "micro_batch": ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "grad_accum"),
    "seq_len": ("seq_length", "sequence_length", "max_length", "max_seq_length", "max_seq_len", "block_size"),
    "context": ("context_length", "ctx", "max_model_len", "n_ctx"),
    "save_every": ("save_steps", "checkpoint_every"),
    "evaluate_every": ("eval_steps", "eval_every", "val_every"),
    "log_every": ("logging_steps", "log_steps"),
    "ema_decay": ("ema",),
    "activation_checkpointing": ("gradient_checkpointing", "recompute", "checkpointing"),
    "compile": ("torch_compile",),
    "evaluate_tokens": ("eval_tokens",),
    "temperature": ("temp", "tau"),
    "kl_weight": ("alpha", "kd_weight", "kd_alpha", "lambda"),
    "ce_weight": ("lm_weight", "hard_weight"),
    "divergence": ("loss_type", "kd_loss", "kl"),
    "tokens": ("calibration_tokens", "num_samples", "n_samples", "nsamples", "num_tokens"),
    "layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"),
    "hidden_size": ("hidden", "d_model", "hidden_dim", "dim", "n_embd", "width"),
    "intermediate_size": ("ffn_hidden_size", "d_ff", "ffn_dim", "ffn", "mlp_dim"),
    "num_attention_heads": ("num_heads", "n_heads", "n_head", "heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "kv_heads", "num_query_groups"),
    "mamba_num_heads": ("mamba_heads", "ssm_heads"),
    "mamba_head_dim": ("mamba_headdim", "headdim"),
    "ssm_state_size": ("d_state", "state_size", "mamba_d_state", "mamba_state_dim", "state"),
    "n_routed_experts": ("num_experts", "n_experts", "num_local_experts", "experts"),
    "num_experts_per_tok": ("top_k_experts", "experts_per_token", "moe_topk"),
    "parameters": ("params", "num_params", "num_parameters", "ratio", "sparsity", "pruning_ratio", "size"),
    "max_new_tokens": ("max_tokens", "max_length", "n_predict"),
    "model": ("model_name_or_path", "model_path", "model_name", "base_model", "checkpoint", "source"),
    "teacher": ("teacher_model", "teacher_model_name_or_path", "teacher_path"),
    "student": ("student_model", "student_path"),
    "data": ("dataset", "dataset_name", "datasets", "train_data", "calibration_data", "corpus", "text"),
    "output": ("output_dir", "out", "output_path", "save_dir", "out_dir", "o"),
    "dtype": ("torch_dtype", "precision", "bf16", "fp16"),
    "kv_dtype": ("kv_cache_dtype",),
    "seed": ("random_seed", "rng_seed"),
    "hardware": ("gpu", "card", "device_name"),
    "usable_gib": ("vram", "gpu_memory", "memory_gb", "memory"),
    "gib": ("budget_gb", "gb", "gigabytes"),
    "wandb": ("report_to", "use_wandb"),
    "tensorboard": ("tb", "logging_dir"),
    "push": ("push_to_hub", "hub_model_id", "repo_id"),
    "format": ("quantization", "quantize", "quant", "outtype"),
    "recipe": ("config", "config_name", "experiment_name", "preset"),
}  # fmt: skip
MOST = 3  # names in one hint


def guess_option(key: str, known: Sequence[str]) -> str:
    """What was probably meant by a dotted key, to be put after what was wrong; nothing where no name is near."""
    near = near_options(key, known)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def near_options(key: str, known: Sequence[str]) -> list[str]:
    """The known dotted keys that are nearest to one that is none, `MOST` at most: those whose last part is the key's,
    or what others call so; else those that look alike. Where several share the last part, those whose beginning
    looks like the key's come alone."""
    known = list(dict.fromkeys(known))
    leaf = canonical(key.rpartition(".")[2])
    meant = [name for name, others in SYNONYMS.items() if leaf in others]
    found = [name for name in known if canonical(name.rpartition(".")[2]) in (leaf, *meant)]
    if found:
        return nearest(key, found)
    leaves = difflib.get_close_matches(leaf, {canonical(name.rpartition(".")[2]) for name in known}, n=MOST, cutoff=0.8)
    if leaves:
        return nearest(key, [name for name in known if canonical(name.rpartition(".")[2]) == leaves[0]])
    return difflib.get_close_matches(key, known, n=1)


def canonical(leaf: str) -> str:
    """A name as options are spelled: learningRate, Learning-Rate and learning_rate are one."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", leaf).replace("-", "_").lower()


def nearest(key: str, found: Sequence[str]) -> list[str]:
    """Of keys that all fit those whose beginning is the most like the key's; of equals the shallower ones."""
    above = key.rpartition(".")[0]

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, above, name.rpartition(".")[0]).ratio()

    best = max(map(likeness, found))
    if above and best > 0.6:
        found = [name for name in found if likeness(name) == best]
    return sorted(found, key=lambda name: name.count("."))[:MOST]
