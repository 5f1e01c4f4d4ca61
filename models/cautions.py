"""What other programs will not do with a model, though it is right: sentences for who prunes or exports it."""

from __future__ import annotations

from collections.abc import Container

from .axes import Role, tensor_table
from .config import HybridConfig
from .families.family import stored_tensors, tensor_table_of
from .quantise import module_end, rounded_names
from .rounding import ROUNDINGS

MARLIN = ((64, 128), (128, 64))  # multiples of rows and columns, either of which its tiles take
CUTLASS = 16  # rows and columns of 8 bits
MERGED = ("gate_proj", "up_proj")  # which servers multiply as one matrix


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


def random_experts(config: HybridConfig, name: str, kept: Container[int] = ()) -> str:
    """Which experts of an export in the format `name`, whose layers `kept` stay, transformers does not read: it knows
    those in 8-bit floats and packed ones, all else it leaves as a new model has it.

    Source: transformers 5.23, integrations/compressed_tensors.py (CompressedTensorsDequantize.convert)."""
    rounding, table = ROUNDINGS[name], tensor_table_of(config)
    if rounding.kind == "float":
        return ""
    rounded = rounded_names(config, rounding, kept)
    own = {stored: table[tensor.pieces[0].ours] for stored, tensor in stored_tensors(config).items()}
    unread = {
        spec.layer
        for stored, spec in own.items()
        if spec.role is Role.EXPERTS and spec.layer is not None and not (rounding.grouped and stored in rounded)
    }
    if not unread:
        return ""
    layers = ", ".join(str(layer // config.block_size) for layer in sorted(unread))
    how = "that stay in bfloat16 beside 4 bits" if rounding.grouped else "in 8-bit whole numbers"
    return (
        f"experts {how} (layers {layers}): transformers leaves such experts at random values (seen in 5.23), and says"
        " no more than that weights are missing; open this with vLLM on a GPU, or take format=fp8"
    )


def opens_in_transformers(config: HybridConfig, name: str | None = None, kept: Container[int] = ()) -> bool:
    """Whether transformers reads every weight of an export: plain, or in the format `name` whose layers `kept` stay."""
    return config.family_record.transformers and (name is None or not random_experts(config, name, kept))


def format_cautions(config: HybridConfig, name: str, kept: Container[int] = ()) -> list[str]:
    """What of an export in the format `name`, whose layers `kept` stay, transformers does not read, and what vLLM's
    kernels on a GPU make of it, on one card.

    Source: vLLM 0.32, model_executor/layers/quantization/utils/marlin_utils.py (marlin_padded_nk,
    check_moe_marlin_supports_config), kernels/linear/scaled_mm/cutlass.py and _custom_ops.py (cutlass_scaled_mm)."""
    table, rounding = tensor_table_of(config), ROUNDINGS[name]
    dense, experts = set[tuple[str, int, int]](), set[int]()
    for weight in rounded_names(config, rounding, kept):
        stored, end = stored_tensors(config)[weight], module_end(weight)
        (rows, columns), ours = stored.shape, stored.pieces[0].ours
        if table[ours].role is not Role.EXPERTS:
            dense.add((end, rows * (2 if end in MERGED and config.gated_mlp else 1), columns))
        else:  # what they read and write, which no kernel fills up
            experts.add(rows if "down_proj" in ours else columns)
    fits = fits_marlin if rounding.grouped else fits_cutlass
    odd = [f"{end} of {rows:,} x {columns:,}" for end, rows, columns in sorted(dense) if not fits(rows, columns)]
    wide = [size for size in sorted(experts) if size % 128]
    lost = random_experts(config, name, kept) if config.family_record.transformers else ""
    found = ([lost] if lost else []) + ([f"{', '.join(odd)}: {SHAPES[name]}"] if odd else [])
    if wide and rounding.grouped:
        found.append(
            f"experts read {wide[0]:,} numbers, no multiple of 128: vLLM's Marlin kernel takes no such experts in 4"
            " bits; take another hidden size, or format=fp8"
        )
    return found


SHAPES = {
    "w4a16": "rows are no multiple of 64 and columns of 128, nor of 128 and 64: vLLM 0.32 fills such matrices up with"
    " zeros for its Marlin kernel on a GPU, which takes time, and readers that do not fill up refuse them",
    "fp8": f"rows or columns are no multiple of {CUTLASS}: vLLM 0.32 fills such matrices up with zeros for its CUTLASS"
    " kernel on a GPU, which takes time, and readers that do not fill up refuse them",
    "w8a8": f"rows or columns are no multiple of {CUTLASS}, which vLLM's CUTLASS kernel takes alone on a GPU: vLLM 0.32"
    " runs such matrices by Triton instead, and readers that do not refuse them",
}


def fits_marlin(rows: int, columns: int) -> bool:
    return any(rows % own == 0 and columns % other == 0 for own, other in MARLIN)


def fits_cutlass(rows: int, columns: int) -> bool:
    return rows % CUTLASS == 0 and columns % CUTLASS == 0
