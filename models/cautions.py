"""What other programs will not do with a model, though it is right: sentences for who prunes or exports it."""

from __future__ import annotations

from .axes import Role, tensor_table
from .config import HybridConfig


def cautions(config: HybridConfig) -> list[str]:
    """Each with its remedy; none for most models."""
    return [
        sentence for sentence in (no_attention(config), unaligned_rows(config), unaligned_experts(config)) if sentence
    ]


def no_attention(config: HybridConfig) -> str:
    """transformers' cache asks an attention layer for its length (seen in 5.23)."""
    if any(kind.state_bytes(config, 1, 1, 1).token for kind in set(config.kinds)):
        return ""
    return (
        "no attention layer is left: transformers' generate() fails without use_cache=False;"
        " keep one, or generate with limbeck"
    )


def unaligned_rows(config: HybridConfig) -> str:
    """causal_conv1d reads x, B and C where in_proj writes them, token by token: strides that are no multiples of 8 are
    refused (state-spaces/mamba#351, fla-org/flash-linear-attention#519)."""
    rows = {spec.shape[0] for spec in tensor_table(config).values() if spec.part.endswith("in_proj.weight")}
    odd = sorted(count for count in rows if count % 8)
    if not odd:
        return ""
    return (
        f"in_proj has {odd[0]:,} rows, no multiple of 8: the causal_conv1d kernel refuses such strides on a GPU, in"
        " transformers among others; take another mamba_num_heads or mamba_head_dim"
    )


def unaligned_experts(config: HybridConfig) -> str:
    """torch's grouped product, which transformers' experts take unless told otherwise, asks for strides of whole 16
    bytes ("strides should be multiple of 16 bytes", torch 2.13): of 8 numbers in bfloat16."""
    widths = {size for spec in tensor_table(config).values() if spec.role is Role.EXPERTS for size in spec.shape[1:]}
    odd = sorted(size for size in widths if size % 8)
    if not odd:
        return ""
    return (
        f"experts are {odd[0]:,} wide, no multiple of 8: transformers runs them with"
        " experts_implementation='eager' alone; take another moe_intermediate_size"
    )
