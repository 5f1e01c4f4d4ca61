"""What benchmarks/gpu.py runs: every operator with its inputs, its truth, its traffic and its peers, at the 9B's
widths or at tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from limbeck.benchmarks import gpu_peers
from limbeck.kernels import reference
from limbeck.kernels.activation import relu2, swiglu
from limbeck.kernels.attention import attention, decode_attention, document_mask
from limbeck.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl
from limbeck.kernels.mamba_step import mamba_step
from limbeck.kernels.moe import expert_mlp
from limbeck.kernels.moe_launch import triton_gradient, triton_product
from limbeck.kernels.moe_torch import segment_gradient, segment_product
from limbeck.kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from limbeck.kernels.ssd import ssd_scan
from limbeck.kernels.state_update import state_update
from torch import Tensor
from torch.nn import functional as F

# Nemotron-Nano-9B-v2 (NVIDIA-NeMo/Megatron-Bridge); the teacher's width is the 12B's.
HIDDEN, TEACHER, FFN, VOCABULARY = 4480, 5120, 15680, 131072
HEADS, HEAD_DIM, GROUPS, STATE, WIDTH, CHUNK = 128, 80, 8, 128, 4, 128
QUERIES, KEYS, QUERY_DIM = 40, 8, 128
EXPERTS, CHOSEN, EXPERT, MOE_HIDDEN = 128, 6, 1856, 2688  # Nemotron-3-Nano-30B-A3B
INNER = HEADS * HEAD_DIM
CONV = INNER + 2 * GROUPS * STATE
PROJECTED = INNER + CONV + HEADS
EPS = 1e-5

Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """One kernel: drawn inputs (those of floating dtype want gradients, unless `no_grad`), the fast way and the truth.

    `make(batch, tokens, small)` draws as DRAWN says, with the model's strides: what it slices is a slice here. The
    truth gets float64. `bytes_of` and `flops_of`, of (batch, tokens), are those of forward and backward; `peers` are
    the ways of other packages, by name."""

    make: Callable[[int, int, bool], Tensors]
    fast: Callable[..., Any]
    truth: Callable[..., Any]
    bytes_of: tuple[Callable[[int, int], float], Callable[[int, int], float]] | None = None
    flops_of: tuple[Callable[[int, int], float], Callable[[int, int], float]] | None = None
    no_grad: bool = False
    peers: dict[str, Callable[..., Any]] = {}  # noqa: RUF012


DRAWN: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def normal(*shape: int, scale: float = 1.0, single: bool = False) -> Tensor:
    """Drawn numbers; `single`: in float32, as the model keeps them whatever its dtype."""
    return torch.empty(shape, **DRAWN | ({"dtype": torch.float32} if single else {})).normal_(0, scale)


def rows_of(width: int, small: int, names: str) -> Callable[[int, int, bool], Tensors]:
    def make(batch: int, tokens: int, tiny: bool) -> Tensors:
        size = small if tiny else width
        return {name: normal(*((size,) if name == "weight" else (batch, tokens, size))) for name in names.split()}

    return make


def gated_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """The gate is a slice of the projection, as in the model."""
    size, wide = (48, 100) if tiny else (INNER, PROJECTED)
    return {"x": normal(batch, tokens, size), "z": normal(batch, tokens, wide)[..., :size], "weight": normal(size)}


def scan_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """x, B and C are slices of what the convolution gives, dt is one of what in_proj gives."""
    heads, head_dim, groups, state = (4, 16, 2, 16) if tiny else (HEADS, HEAD_DIM, GROUPS, STATE)
    inner, shared = heads * head_dim, groups * state
    x, B, C = normal(batch, tokens, inner + 2 * shared).split((inner, shared, shared), -1)
    return {
        "x": x.unflatten(-1, (heads, head_dim)),
        "dt": normal(batch, tokens, 2 * inner + 2 * shared + heads)[..., -heads:],
        "A": -torch.exp(torch.linspace(-4, 2.7, heads, device=DRAWN["device"])),
        "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)),
        "D": normal(heads),
        "dt_bias": normal(heads) - 3,
    }


def conv_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    size, wide, start = (40, 64, 8) if tiny else (CONV, PROJECTED, INNER)
    x = normal(batch, tokens, wide)[..., start : start + size]
    return {"x": x, "weight": normal(size, WIDTH), "bias": normal(size)}


def step_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    one = conv_inputs(batch, 1, tiny)
    return {"state": normal(batch, WIDTH - 1, len(one["weight"])).mT} | one | {"x": one["x"][:, 0]}


def update_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    scan = scan_inputs(batch, 1, tiny)
    one = {name: tensor[:, 0] if name in ("x", "dt", "B", "C") else tensor for name, tensor in scan.items()}
    return {"state": normal(*one["x"].shape, one["B"].shape[-1], single=True)} | one


def mamba_step_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Everything between a layer's projections, for one token a row; z, conv_in and dt are slices of in_proj's."""
    heads, head_dim, groups, state = (4, 16, 2, 16) if tiny else (HEADS, HEAD_DIM, GROUPS, STATE)
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    z, conv_in, dt = normal(batch, inner + channels + heads).split((inner, channels, heads), -1)
    return {
        "conv": normal(batch, WIDTH - 1, channels).mT, "ssm": normal(batch, heads, head_dim, state, single=True),
        "arrived": torch.zeros(batch, groups, dtype=torch.int32, device=DRAWN["device"]),
        "z": z, "conv_in": conv_in, "dt": dt, "conv_weight": normal(channels, WIDTH), "conv_bias": normal(channels),
        "A": -torch.exp(torch.linspace(-4, 2.7, heads, device=DRAWN["device"])), "D": normal(heads),
        "dt_bias": normal(heads) - 3, "norm_weight": normal(inner),
    }  # fmt: skip


def mamba_step_fast(**inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = mamba_step(**inputs, limit_low=0.0, limit_high=float("inf"), eps=EPS, norm_first=False)
    return y, inputs["conv"], inputs["ssm"]


def mamba_step_truth(
    conv: Tensor, ssm: Tensor, arrived: Tensor, z: Tensor, conv_in: Tensor, dt: Tensor, conv_weight: Tensor,
    conv_bias: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and both states after it."""
    groups, (heads, head_dim, state) = arrived.shape[1], ssm.shape[1:]
    sizes = heads * head_dim, groups * state, groups * state
    x, B, C = step_truth(conv, conv_in, conv_weight, conv_bias)[:, None].split(sizes, -1)
    split = x.unflatten(-1, (heads, head_dim)), dt[:, None], A, *(e.unflatten(-1, (groups, state)) for e in (B, C))
    how: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "initial_state": ssm}
    y, after = reference.ssd_scan_reference(*split, **how)
    normed = reference.gated_rms_norm_reference(y.flatten(2)[:, 0], z, norm_weight, EPS, groups)
    return normed, torch.cat((conv, conv_in[..., None]), -1)[..., 1:], after


def added_norm(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm, and the sum that takes the place of x."""
    return add_rms_norm(x, added, weight, EPS), x


def added_norm_truth(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rms_norm_reference(x + added, weight, EPS), x + added


def loss_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    count, vocabulary, widths = batch * tokens, *((60, (8, 12)) if tiny else (VOCABULARY, (HIDDEN, TEACHER)))
    found = {}
    for name, width in zip(("student", "teacher"), widths, strict=True):
        found[f"{name}_hidden"] = normal(count, width)
        found[f"{name}_head"] = normal(vocabulary, width, scale=width**-0.5)
    labels = torch.arange(count, device=DRAWN["device"]) * 7919 % vocabulary
    return found | {"labels": torch.where(labels % 5 == 0, -100, labels)}


def expert_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Tokens that choose evenly among the experts, in no order."""
    experts, chosen, inner, width = (5, 2, 24, 40) if tiny else (EXPERTS, CHOSEN, EXPERT, MOE_HIDDEN)
    count = batch * tokens
    return {"x": normal(count, width), "indices": normal(count, experts, single=True).topk(chosen).indices,
            "weights": normal(count, chosen), "up": normal(experts, inner, width, scale=width**-0.5),
            "down": normal(experts, width, inner, scale=inner**-0.5)}  # fmt: skip


def grouped_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Rows of all experts, as many of each as there are tokens that chose it."""
    found = expert_inputs(batch, tokens, tiny)
    rows = found["indices"].flatten().sort().values
    numbers = torch.arange(len(found["up"]), device=DRAWN["device"])
    ends = torch.searchsorted(rows, numbers, right=True, out_int32=True)
    return {"x": normal(len(rows), found["x"].shape[1]), "weight": found["up"], "ends": ends}


def grouped_gradient_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """What the product of `grouped_inputs` gives its gradient for, with the rows that it reads."""
    found = grouped_inputs(batch, tokens, tiny)
    return {"y": normal(len(found["x"]), found["weight"].shape[1]), "x": found["x"], "ends": found["ends"]}


def query_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Tokens before heads in memory, as the projections give them."""
    heads, groups, size = (6, 2, 16) if tiny else (QUERIES, KEYS, QUERY_DIM)
    many = {"q": heads, "k": groups, "v": groups}
    return {name: normal(batch, tokens, count, size).transpose(1, 2) for name, count in many.items()}


def packed_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """Eight documents a row, of unequal lengths."""
    ends = torch.linspace(0, 1, 9, device=DRAWN["device"])[1:] ** 2 * tokens
    document = torch.searchsorted(ends.ceil(), torch.arange(tokens, device=DRAWN["device"]) + 1.0)
    return query_inputs(batch, tokens, tiny) | {"document": document.clamp(max=7).repeat(batch, 1)}


def decode_inputs(batch: int, tokens: int, tiny: bool) -> Tensors:
    """The caches have heads before tokens."""
    found = query_inputs(batch, tokens, tiny)
    return {"q": found["q"][:, :, 0], "k": found["k"].contiguous(), "v": found["v"].contiguous()}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor | None = None) -> Tensor:
    index = torch.arange(q.shape[2], device=q.device)
    mask = (index <= index[:, None])[None, None]
    if document is not None:
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def step_truth(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.causal_conv1d_reference(x[:, None], weight, bias, initial_state=state)[0][:, 0]


def update_truth(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **more: Any) -> Tensor:
    x, dt, B, C = (tensor[:, None] for tensor in (x, dt, B, C))
    return reference.ssd_scan_reference(x, dt, A, B, C, dt_softplus=True, initial_state=state, **more)[0][:, 0]


def loss_of(divergence: str, temperature: float = 1.0, ce_weight: float = 0.0) -> tuple[Any, Any]:
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
    return (
        lambda **inputs: linear_kl(**inputs, **options)[:2],
        lambda **inputs: reference.linear_kl_reference(**inputs, **options),
    )


def per_token(forward: float, backward: float) -> Any:
    """Bytes of forward and backward for so many a token."""
    return (lambda batch, tokens: batch * tokens * forward), (lambda batch, tokens: batch * tokens * backward)


def per_pair(forward: float, backward: float) -> Any:
    """Operations for so many a pair of tokens, one of them before the other."""
    return (lambda b, t: b * t * t / 2 * forward), (lambda b, t: b * t * t / 2 * backward)


def loss_flops(student: int, teacher: int) -> Any:
    """All four products belong to the forward."""
    return (lambda b, t: 2 * b * t * VOCABULARY * (3 * student + teacher)), (lambda b, t: 0.0)


def decoding_operators() -> dict[str, Op]:
    """Those of one token; what they change is compared as well."""
    state_bytes = 2 * 4 * HEADS * HEAD_DIM * STATE
    return {
        "causal_conv1d_step": Op(step_inputs, causal_conv1d_step, step_truth,
                                 (lambda b, t: b * CONV * 16, lambda b, t: 0.0), no_grad=True),
        "state_update": Op(update_inputs, lambda **inputs: state_update(**inputs, dt_softplus=True), update_truth,
                           (lambda b, t: b * state_bytes, lambda b, t: 0.0), no_grad=True, peers=gpu_peers.UPDATE),
        "mamba_step": Op(mamba_step_inputs, mamba_step_fast, mamba_step_truth,
                         (lambda b, t: b * (state_bytes + 16 * CONV), lambda b, t: 0.0), no_grad=True),
        "add_rms_norm": Op(rows_of(HIDDEN, 48, "x added weight"), added_norm, added_norm_truth,
                           per_token(8 * HIDDEN, 0), no_grad=True),
    }  # fmt: skip


def operators() -> dict[str, Op]:
    """By name, in the order of their worth: what is not measured in a run is the last of them."""
    scan_bytes = 2 * (INNER + 2 * GROUPS * STATE + HEADS)  # x, B, C and dt in bfloat16
    pair, cached = 4 * QUERIES * QUERY_DIM, 2 * 2 * KEYS * QUERY_DIM
    expert = 2 * 2 * CHOSEN * EXPERT * MOE_HIDDEN  # operations of a token's two products
    scan: dict[str, Any] = {"dt_softplus": True}
    return {
        "ssd_scan": Op(scan_inputs, lambda **inputs: ssd_scan(**inputs, **scan, chunk_size=CHUNK),
                       lambda **inputs: reference.ssd_scan_reference(**inputs, **scan)[0],
                       per_token(scan_bytes + 2 * INNER, 2 * scan_bytes + 2 * INNER), peers=gpu_peers.SCAN),
        "causal_conv1d": Op(conv_inputs, causal_conv1d, lambda **inputs: reference.causal_conv1d_reference(**inputs)[0],
                            per_token(4 * CONV, 6 * CONV), peers=gpu_peers.CONV),
        **decoding_operators(),
        "rms_norm": Op(rows_of(HIDDEN, 48, "x weight"), lambda x, weight: rms_norm(x, weight, EPS),
                       lambda x, weight: reference.rms_norm_reference(x, weight, EPS),
                       per_token(4 * HIDDEN, 6 * HIDDEN), peers=gpu_peers.RMS_NORM),
        "gated_rms_norm": Op(
            gated_inputs, lambda x, z, weight: gated_rms_norm(x, z, weight, EPS, GROUPS),
            lambda x, z, weight: reference.gated_rms_norm_reference(x, z, weight, EPS, GROUPS),
            per_token(6 * INNER, 10 * INNER), peers=gpu_peers.GATED_RMS_NORM),
        "relu2": Op(rows_of(FFN, 37, "x"), relu2, reference.relu2_reference, per_token(4 * FFN, 6 * FFN),
                    peers=gpu_peers.RELU2),
        "swiglu": Op(rows_of(FFN, 37, "gate up"), swiglu, reference.swiglu_reference, per_token(6 * FFN, 10 * FFN),
                     peers=gpu_peers.SWIGLU),
        "linear_kl": Op(loss_inputs, *loss_of("forward"), flops_of=loss_flops(HIDDEN, TEACHER),
                        peers=gpu_peers.LINEAR_KL),
        "linear_kl jsd": Op(loss_inputs, *loss_of("jsd"), flops_of=loss_flops(HIDDEN, TEACHER),
                            peers=gpu_peers.LINEAR_JSD),
        "linear_kl reverse T=2 + ce": Op(loss_inputs, *loss_of("reverse", 2.0, 0.5),
                                         flops_of=loss_flops(HIDDEN, TEACHER)),
        "linear_cross_entropy": Op(
            lambda *shape: {name: tensor for name, tensor in loss_inputs(*shape).items() if "teacher" not in name},
            lambda **inputs: linear_cross_entropy(*inputs.values()).loss,
            lambda student_hidden, student_head, labels: F.cross_entropy(student_hidden @ student_head.T, labels),
            flops_of=loss_flops(HIDDEN, 0)),
        "expert_mlp": Op(expert_inputs, expert_mlp, reference.expert_mlp_reference,
                         flops_of=(lambda b, t: b * t * expert, lambda b, t: 2 * b * t * expert),
                         peers=gpu_peers.EXPERTS),
        "expert_mlp, served": Op(expert_inputs, expert_mlp, reference.expert_mlp_reference,
                                 flops_of=(lambda b, t: b * t * expert, lambda b, t: 0.0), no_grad=True,
                                 peers=gpu_peers.EXPERTS_SERVED),
        "grouped_product, Triton": Op(
            grouped_inputs, lambda x, weight, ends: triton_product(x, weight, ends, False),
            lambda x, weight, ends: segment_product(x, weight, ends, False),
            flops_of=(lambda b, t: b * t * expert / 2, lambda b, t: 0.0), no_grad=True, peers=gpu_peers.GROUPED),
        "grouped_gradient, Triton": Op(
            grouped_gradient_inputs, triton_gradient, segment_gradient,
            flops_of=(lambda b, t: b * t * expert / 2, lambda b, t: 0.0), no_grad=True,
            peers=gpu_peers.GROUPED_GRADIENT),
        "attention causal": Op(query_inputs, attention, dense_attention, flops_of=per_pair(pair, 2.5 * pair)),
        "decode_attention": Op(decode_inputs, decode_attention, gpu_peers.decode_reference,
                               per_token(cached, 0), no_grad=True, peers={"SDPA": gpu_peers.decode_reference}),
        "attention packed, FlexAttention": Op(
            packed_inputs, lambda q, k, v, document: attention(q, k, v, document_mask(document)), dense_attention,
            peers=gpu_peers.PACKED | {"SDPA, dense mask": dense_attention}),
    }  # fmt: skip
