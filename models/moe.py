"""The expert layer: a router sends each token to a few of many small MLPs, and a shared expert sees all of them.

    s = sigmoid(W_g u), c = s + bias           the bias chooses, and never weights
    chosen: the k largest c, of the `topk_group` groups whose best two add up to most
    w_k = s_k / (sum over the chosen + 1e-20) x scaling;  y = fc2(sum_k w_k expert_k(fc1 u)) + shared(u)

fc1 and fc2 are there with a latent size alone. Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) for the sigmoid
router and its bias; published nemotron_h checkpoints for the rest. The "softmax" router (Granite 4) takes the k largest
logits, and their softmax for weights. Both work in float32.
Shapes: [B, T] batch and tokens, [n] tokens of all rows, [E] experts, [k] chosen ones, [I] neurons of one, [L] latent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.activation import relu2, swiglu
from ..kernels.moe import expert_mlp
from .axes import Axis, Dimension, Factor, Parts, Role, fixed
from .errors import InputError
from .layer import Context, ExpertStacks, LayerKind, ScoreSource, Sharing

if TYPE_CHECKING:
    from .config import HybridConfig

ROUTERS = ("sigmoid", "softmax")
BEST_OF_GROUP = 2  # a group of experts is worth what its best two are
LEAST_SUM = 1e-20  # keeps weights finite where all scores are 0


class RouterLogits(torch.autograd.Function):
    """x [n, H] and weight [E, H] -> logits [n, E], in the weight's dtype; a narrower x is kept as it is."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return (dy @ weight).to(x.dtype), dy.mT @ x.to(weight.dtype)


class Router(nn.Module):
    """Which experts a token goes to, and with which weights."""

    def __init__(self, config: HybridConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.closed: int | None = None  # an expert that no token may choose
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device=device, dtype=dtype))
        if config.router == "sigmoid":
            bias = torch.empty(config.n_routed_experts, device=device, dtype=dtype)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights [n, k] of x [n, hidden]."""
        config = self.config
        logits = RouterLogits.apply(x, self.weight)
        if self.closed is not None:
            logits = logits.index_fill(1, torch.tensor(self.closed, device=logits.device), -math.inf)
        if config.router == "softmax":
            best, indices = logits.topk(config.num_experts_per_tok)
            return indices, best.softmax(-1) * config.routed_scaling_factor
        scores = logits.sigmoid()
        worth = scores.detach() + self.e_score_correction_bias
        indices = self.choose(worth if self.closed is None else worth.masked_fill(scores == 0, -math.inf))
        weights = scores.gather(1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
        return indices, weights * config.routed_scaling_factor

    def choose(self, scores: Tensor) -> Tensor:
        """The experts [n, k] of the highest scores [n, E], in the groups of the highest sums."""
        config = self.config
        if config.topk_group < config.n_group:
            by_group = scores.unflatten(1, (config.n_group, -1))
            worth = by_group.topk(BEST_OF_GROUP).values.sum(-1)
            best = worth.topk(config.topk_group).indices
            closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
            scores = by_group.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(1)
        return scores.topk(config.num_experts_per_tok).indices


class Experts(nn.Module):
    """The matrices of all experts, stacked: up_proj and gate_proj [E, I, D], down_proj [E, D, I]; D is the latent size
    or the stream's."""

    def __init__(self, config: HybridConfig, **place: Any) -> None:
        super().__init__()
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        width = config.moe_latent_size or config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width, **place))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, **place))
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width, **place)) if config.gated_mlp else None


class SharedExpert(nn.Module):
    """The MLP that every token goes through."""

    def __init__(self, config: HybridConfig, **place: Any) -> None:
        super().__init__()
        size = (config.hidden_size, config.moe_shared_expert_intermediate_size)
        self.up_proj = nn.Linear(*size, bias=False, **place)
        self.down_proj = nn.Linear(*size[::-1], bias=False, **place)
        self.gate_proj = nn.Linear(*size, bias=False, **place) if config.gated_mlp else None

    def forward(self, u: Tensor, context: Context, layer: int) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]"""
        up = context.project(self.up_proj, u)
        active = relu2(up) if self.gate_proj is None else swiglu(context.project(self.gate_proj, u), up)
        context.note("shared_ffn", layer, up)
        context.note("shared_ffn_act", layer, active)
        return context.project(self.down_proj, active)


class MixtureOfExperts(nn.Module):
    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config, **place)
        self.experts = Experts(config, **place)
        latent, self.shared_experts = config.moe_latent_size, None
        if config.moe_shared_expert_intermediate_size:
            self.shared_experts = SharedExpert(config, **place)
        self.fc1_latent_proj = nn.Linear(config.hidden_size, latent, bias=False, **place) if latent else None
        self.fc2_latent_proj = nn.Linear(latent, config.hidden_size, bias=False, **place) if latent else None

    def forward(self, u: Tensor, context: Context) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]; a decoding step reads the experts that it chooses and no others.

        Shows "expert_in" [B, T, D], "expert_choice" and "expert_weights" [B, T, k], "routing" [B, T, E] (the weights, 0
        where an expert is not chosen, so that the gradient of an expert's is what its share adds), "expert_ffn" and
        "expert_ffn_act" [B, T, I, k], "expert_out" [B, T, k, D] (kernels/moe.py; weights included), "latent_out" [B, T,
        L] before fc2, "shared_ffn" and "shared_ffn_act"; and see `note_uses`."""
        indices, weights = self.gate(u.flatten(0, 1))
        if context.observe is not None:
            self.noted("expert_choice", indices, u, context)
            dense = weights.new_zeros(len(weights), len(self.gate.weight)).scatter(1, indices, weights)
            weights = self.noted("routing", dense, u, context).gather(1, indices)
            weights = self.noted("expert_weights", weights, u, context)
        x = u if self.fc1_latent_proj is None else context.project(self.fc1_latent_proj, u)
        experts = self.experts
        context.note("expert_in", self.layer, x)

        def note(name: str, tensor: Tensor) -> Tensor:
            if name == "expert_ffn_act" and context.round_input is not None:
                tensor = context.input_of(experts, tensor.mT).mT
            if name == "expert_out":
                self.note_uses(indices, weights.detach(), tensor.detach(), u, context)
            return self.noted(name, tensor, u, context)

        y = expert_mlp(
            context.input_of(experts, x).flatten(0, 1), indices, weights, experts.up_proj, experts.down_proj,
            experts.gate_proj, None if context.observe is None and context.round_input is None else note,
        ).view(x.shape)  # fmt: skip
        if self.fc2_latent_proj is not None:
            context.note("latent_out", self.layer, y)
            y = context.project(self.fc2_latent_proj, y)
        return y if self.shared_experts is None else y + self.shared_experts(u, context, self.layer)

    def note_uses(self, indices: Tensor, weights: Tensor, out: Tensor, u: Tensor, context: Context) -> None:
        """Shows what each expert does at the tokens that chose it, [B, T, E], to those who name it: "expert_norm" the
        L2 norm of what it gives, "expert_reap" that times its weight, of a sum of 1 over the chosen (REAP, arXiv
        2510.13999); both NaN at other tokens. "expert_use" is 1 where it is chosen, and 0 elsewhere."""
        if not any(context.wants(name) for name in ("expert_norm", "expert_reap", "expert_use")):
            return
        given = torch.linalg.vector_norm(out, dim=-1, dtype=weights.dtype)  # weights included
        for name, values, other in (
            ("expert_norm", given / weights, math.nan),
            ("expert_reap", given / weights.sum(-1, keepdim=True), math.nan),
            ("expert_use", torch.ones_like(given), 0.0),
        ):
            if context.wants(name):
                dense = torch.full((len(given), len(self.gate.weight)), other, dtype=given.dtype, device=given.device)
                self.noted(name, dense.scatter_(1, indices, values), u, context)

    def noted(self, name: str, tensor: Tensor, u: Tensor, context: Context) -> Tensor:
        """Shows a tensor [n, ...] of the tokens of u [B, T, hidden] as [B, T, ...], and gives it back as shown."""
        shown = tensor.unflatten(0, u.shape[:2])
        context.note(name, self.layer, shown)
        return shown.flatten(0, 1)


@contextlib.contextmanager
def without_expert(mixer: MixtureOfExperts, expert: int) -> Iterator[None]:
    """Tokens choose among the others meanwhile, as they will when it is gone."""
    mixer.gate.closed = expert
    try:
        yield
    finally:
        mixer.gate.closed = None


def moe_tensors(config: HybridConfig, layer: int, hidden: Dimension) -> Parts:
    experts: Dimension = ((Factor(Axis("experts", layer), config.n_routed_experts),),)
    inner: Dimension = ((Factor(Axis("expert_ffn", layer), config.moe_intermediate_size),),)
    latent = config.moe_latent_size
    width = fixed(latent) if latent else hidden
    tensors: Parts = {"gate.weight": (Role.ROUTER, (experts, hidden))}
    if config.router == "sigmoid":
        tensors["gate.e_score_correction_bias"] = (Role.BUFFER, (experts,))
    if config.gated_mlp:
        tensors["experts.gate_proj"] = (Role.EXPERTS, (experts, inner, width))
    tensors["experts.up_proj"] = (Role.EXPERTS, (experts, inner, width))
    tensors["experts.down_proj"] = (Role.EXPERTS, (experts, width, inner))
    if config.moe_shared_expert_intermediate_size:
        shared: Dimension = ((Factor(Axis("shared_ffn", layer), config.moe_shared_expert_intermediate_size),),)
        if config.gated_mlp:
            tensors["shared_experts.gate_proj.weight"] = (Role.MATRIX, (shared, hidden))
        tensors["shared_experts.up_proj.weight"] = (Role.MATRIX, (shared, hidden))
        tensors["shared_experts.down_proj.weight"] = (Role.MATRIX, (hidden, shared))
    if latent:
        tensors["fc1_latent_proj.weight"] = (Role.MATRIX, (fixed(latent), hidden))
        tensors["fc2_latent_proj.weight"] = (Role.MATRIX, (hidden, fixed(latent)))
    return tensors


def check_routing(config: HybridConfig) -> None:
    """Raises InputError where a router cannot choose so."""
    experts, chosen, groups, best = (
        config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group
    )  # fmt: skip
    if config.gated_mlp != (config.activation == "silu"):
        raise InputError(
            f"config: activation {config.activation!r} with gated_mlp={config.gated_mlp} is not supported;"
            " known: relu2 without a gate, silu with one"
        )
    if config.mlp_bias:
        raise InputError("config: mlp_bias is true; experts have no biases, expected false")
    if config.router not in ROUTERS:
        raise InputError(f"config: router {config.router!r} is unknown; known: {', '.join(ROUTERS)}")
    if experts % groups:
        raise InputError(f"config: n_routed_experts ({experts}) is not divisible by n_group ({groups})")
    if config.router == "softmax" and groups > 1:
        raise InputError(f"config: n_group is {groups}, but a softmax router has no groups of experts; expected 1")
    if groups > 1 and experts // groups < BEST_OF_GROUP:
        raise InputError(
            f"config: n_routed_experts ({experts}) in {groups} groups (n_group) leave {experts // groups} in each;"
            f" expected at least {BEST_OF_GROUP}, whose sum ranks a group"
        )
    if best > groups:
        raise InputError(f"config: topk_group ({best}) is more than n_group ({groups})")
    if chosen > experts // groups * best:
        raise InputError(
            f"config: num_experts_per_tok ({chosen}) is more than the experts to choose from"
            f" ({experts // groups * best} of n_routed_experts {experts})"
        )
    scaling = config.routed_scaling_factor
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
        raise InputError(f"config: routed_scaling_factor is {scaling!r}; expected a number above 0")


def size_label(config: HybridConfig) -> str:
    shared = config.moe_shared_expert_intermediate_size
    return f"E{config.n_routed_experts}x{config.moe_intermediate_size}" + (f"-S{shared}" if shared else "")


KIND = LayerKind(
    letter="E",
    name="mixture of experts",
    key="moe",
    fields=("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    optional=("moe_shared_expert_intermediate_size", "moe_latent_size"),
    check=check_routing,
    tensors=moe_tensors,
    build=MixtureOfExperts,
    chosen=lambda config: (config.num_experts_per_tok, config.n_routed_experts),
    # Without a latent size the experts write the stream too, each for the tokens that chose it.
    writers={"shared_experts.down_proj.weight": "shared_ffn_act", "fc2_latent_proj.weight": "latent_out"},
    scores={
        "experts": ScoreSource(
            {"reap": "expert_reap", "frequency": "expert_use", "norm": "expert_norm", "routing": "routing"},
            option="expert_source",
            per_use=("expert_reap", "expert_norm"),
            left_out="logits",
        ),
        "top_k": ScoreSource({"": "expert_weights"}),
        # A neuron of that number in each of the experts that a token chose.
        "expert_ffn": ScoreSource({"pre": "expert_ffn", "act": "expert_ffn_act"}, option="ffn_source", reduce=True),
        "shared_ffn": ScoreSource({"pre": "shared_ffn", "act": "shared_ffn_act"}, option="ffn_source"),
    },
    ranks=dict.fromkeys(("moe_intermediate_size", "moe_shared_expert_intermediate_size"), Sharing.EQUAL),
    aligned=(("moe_intermediate_size",), ("moe_shared_expert_intermediate_size",)),
    without={"experts": without_expert},
    experts=ExpertStacks(
        up="experts.up_proj",
        down="experts.down_proj",
        gate="experts.gate_proj",
        inputs="expert_in",
        choice="expert_choice",
        weights="expert_weights",
        read="expert_ffn_act",
        given="expert_out",
        total="latent_out",
        use="expert_use",
    ),
    size_label=size_label,
)
