"""How other packages, and torch.compile, do what limbeck's kernels do; for benchmarks/gpu.py. Nothing is imported
before it is called: a package that is not installed becomes a line of the table."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from limbeck.kernels import reference
from limbeck.kernels.moe_torch import segment_gradient, segment_product
from torch import Tensor
from torch.nn import functional as F

EPS, GROUPS = 1e-5, 8
PACKAGES = ("mamba_ssm", "causal_conv1d", "liger_kernel", "fla", "transformers", "vllm")  # vllm takes longest to import


def load_package(name: str) -> None:
    """Imports a peer. mamba_ssm whose CUDA extension was built for another torch gives its Triton files, which need
    none. Raises ImportError where it is not there."""
    try:
        importlib.import_module(name)
    except ImportError:
        spec = importlib.util.find_spec(name) if name == "mamba_ssm" else None
        if spec is None:
            raise
        sys.modules[name] = importlib.util.module_from_spec(spec)  # not run: it imports the extension
        try:
            importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        except ImportError:
            del sys.modules[name]
            raise


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a torch formula, compiled at its first call."""

    @functools.cache
    def built() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return lambda **inputs: built()(**inputs)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    u = (x.float() * F.silu(z.float())).unflatten(-1, (GROUPS, -1))
    return (F.rms_norm(u, u.shape[-1:], None, EPS).flatten(-2) * weight).to(x.dtype)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def fla_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from fla.modules.layernorm import rms_norm

    return rms_norm(x, weight, None, eps=EPS)


def mamba_ssm_gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    load_package("mamba_ssm")
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(x, weight, None, z=z, eps=EPS, group_size=x.shape[-1] // GROUPS, norm_before_gate=False)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def dense_kl(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    """The plain loss on float32 log-probabilities."""
    q = F.log_softmax((student_hidden @ student_head.T).float(), -1)
    p = F.log_softmax((teacher_hidden @ teacher_head.T).float(), -1)
    counted = (labels != -100).to(q.dtype)
    return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * counted).sum() / counted.sum()


def liger_jsd(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.5)(student_hidden, student_head, teacher_hidden, teacher_head, labels)


class FourProducts(torch.autograd.Function):
    """The loss's four matrix products, chunk by chunk, with nothing between them."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, chunk):
        dhidden = torch.empty_like(student_hidden)
        dhead = torch.empty_like(student_head)
        for start in range(0, len(student_hidden), chunk):
            rows = slice(start, start + chunk)
            logits = student_hidden[rows] @ student_head.T
            torch.mm(teacher_hidden[rows], teacher_head.T)
            torch.mm(logits, student_head, out=dhidden[rows])
            torch.mm(logits.T, student_hidden[rows], out=dhead)
        ctx.save_for_backward(dhidden, dhead)
        return student_hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        return *ctx.saved_tensors, None, None, None


def four_products(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    chunk: int,
) -> Tensor:
    return FourProducts.apply(student_hidden, student_head, teacher_hidden, teacher_head, chunk)


def decode_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def packed_varlen(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """torch's own FlashAttention of sequences laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    batch, _, tokens, _ = q.shape
    change = torch.ones_like(document, dtype=torch.bool)
    change[:, 1:] = document[:, 1:] != document[:, :-1]
    starts = change.flatten().nonzero()[:, 0].int()
    bounds = F.pad(starts, (0, 1), value=batch * tokens)
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q, k, v))
    options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True}  # all before, none after
    y: Any = varlen_attn(q, k, v, bounds, bounds, tokens, tokens, **options)
    return y.unflatten(0, (batch, tokens)).transpose(1, 2)


def mamba_ssm_scan(**inputs: Tensor) -> Tensor:
    load_package("mamba_ssm")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    named = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
    return mamba_chunk_scan_combined(*named, chunk_size=128, dt_softplus=True, **inputs)


def package_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def mamba_ssm_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    load_package("mamba_ssm")
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    _, heads, head_dim, width = state.shape
    per_head = (heads, head_dim)
    return selective_state_update(
        state, x, dt[..., None].expand(-1, *per_head), A[:, None, None].expand(*per_head, width), B, C,
        D[:, None].expand(per_head), dt_bias=dt_bias[:, None].expand(per_head), dt_softplus=True,
    )  # fmt: skip


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).transpose(1, 2)


def torch_grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=ends)


def one_by_one(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A product for each expert, which waits for the device to say where its rows end."""
    return segment_product(x, weight, ends, False)


def torch_grouped_gradient(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(y.mT, x, offs=ends)


def transformers_experts(x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """transformers' experts of Nemotron 3, by torch's grouped product, as it runs them unless told otherwise."""
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config: Any = SimpleNamespace(
        n_routed_experts=len(up), hidden_size=x.shape[1], moe_intermediate_size=up.shape[1], moe_latent_size=None,
        mlp_hidden_act="relu2", _experts_implementation="grouped_mm",
    )  # fmt: skip
    with torch.device("meta"):
        experts = NemotronHExperts(config)
    return torch.func.functional_call(experts, {"up_proj": up, "down_proj": down}, (x, indices, weights))


def vllm_experts(x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """vLLM's Triton kernel of experts without a gate (0.32), which has no gradients."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return fused_experts(x, up, down, weights.float(), indices.int(), activation=MoEActivation.RELU2_NO_MUL)


RMS_NORM = {"torch.compile": compiled(torch_rms_norm), "liger_kernel": liger_rms_norm, "fla": fla_rms_norm}
GATED_RMS_NORM = {"torch.compile": compiled(torch_gated_rms_norm), "mamba_ssm": mamba_ssm_gated}
RELU2 = {"torch.compile": compiled(reference.relu2_reference)}
GROUPED = {"torch grouped_mm": torch_grouped, "expert by expert": one_by_one}
GROUPED_GRADIENT = {"torch grouped_mm": torch_grouped_gradient, "expert by expert": segment_gradient}
EXPERTS = {"transformers": transformers_experts}
EXPERTS_SERVED = EXPERTS | {"vllm": vllm_experts}
SWIGLU = {"torch.compile": compiled(lambda gate, up: F.silu(gate) * up), "liger_kernel": liger_swiglu}
LINEAR_KL = {"dense": dense_kl, "dense, torch.compile": compiled(dense_kl)}
LINEAR_JSD = {"liger_kernel": liger_jsd}
PACKED = {"varlen_attn": packed_varlen}
SCAN = {"mamba_ssm": mamba_ssm_scan}
CONV = {"torch.compile": compiled(torch_conv), "causal_conv1d": package_conv}
UPDATE = {"mamba_ssm": mamba_ssm_update}
