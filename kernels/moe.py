"""A mixture's experts on the tokens that chose them: y_t = sum_k w_tk down_e(act(up_e x_t)), e the k-th choice of t.

Tokens are put in the order of their experts, so that each expert's are neighbours, and two products over groups of
rows do the rest (`grouped_product`). Nothing is ever [tokens, experts, width]: what there is grows with the rows that
were chosen, and an expert that no token chose is not read. The routing weight is taken in before the second product, so
that the sum over a token's experts is a sum of rows and every order is fixed: equal inputs give equal bits.
All shapes follow from the inputs' (`ends` says which rows are which expert's, and on a GPU it stays there: Triton's
product never looks at it from the host, and torch's is taken where it does not either), so that a CUDA graph captures a
decoding step once and replays it whatever is chosen.
Shapes: [n] tokens, [k] experts a token, [m] = n k rows, [E] experts, [D] inputs, [I] neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import relu2, relu2_gradient, swiglu, swiglu_gradients
from .launch import takes_triton
from .moe_launch import triton_gradient, triton_product
from .moe_torch import segment_gradient, segment_product, takes_torch_grouped, torch_gradient, torch_product

# The name of what passes, and the tensor -> what is to be used: the same, or a view of what was shown of it, so that
# whoever was shown it has its gradient.
Note = Callable[[str, Tensor], Tensor]


class Routing(NamedTuple):
    """`order` [m]: of each row, in the order of the experts, its number among the choices [n, k] laid flat; `place` [m]
    is where each choice's row lies. Expert e has the rows from ends[e - 1] to ends[e] (int32 [E])."""

    order: Tensor
    place: Tensor
    ends: Tensor
    chosen: int

    @property
    def tokens(self) -> Tensor:
        """The token of each row, [m]."""
        return self.order // self.chosen

    def gathered(self, rows: Tensor) -> Tensor:
        """rows [m, C] in the order of the choices, [n, k, C]."""
        return rows.index_select(0, self.place).unflatten(0, (-1, self.chosen))


def routing_of(indices: Tensor, experts: int) -> Routing:
    """The routing of tokens that chose `indices` [n, k]; of one expert's rows the earlier token's come first."""
    flat, order = indices.flatten().sort(stable=True)
    numbers = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(flat, torch.arange(experts, device=flat.device), right=True, out_int32=True)
    return Routing(order, torch.empty_like(order).scatter_(0, order, numbers), ends, indices.shape[1])


def expert_mlp(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    note: Note | None = None,
) -> Tensor:
    """y [n, D] of x [n, D], the experts that its tokens chose, indices [n, k], and their weights [n, k]; up and gate
    [E, I, D], down [E, D, I]. Without a gate experts are down(relu^2(up x)), with one down(silu(gate x) * up x).

    `note`, where given, sees what passes: "expert_ffn" [n, I, k] what `up` gives, "expert_ffn_act" [n, I, k] what
    `down` reads (after the activation, times the weight), and "expert_out" [n, k, D], whose sum over k is y.
    Experts are counted from 0. Raises ValueError where shapes disagree, on a CPU also where an index is beyond E - 1.
    """
    if indices.shape != weights.shape or indices.dim() != 2 or len(indices) != len(x):
        raise ValueError(
            f"expert_mlp: indices {tuple(indices.shape)} and weights {tuple(weights.shape)} are not [n, k] for x"
            f" {tuple(x.shape)}"
        )
    if up.shape[-1:] != x.shape[-1:] or down.shape != up.mT.shape or (gate is not None and gate.shape != up.shape):
        raise ValueError(f"expert_mlp: up {tuple(up.shape)} and down {tuple(down.shape)} do not fit x {tuple(x.shape)}")
    routing = routing_of(indices, len(up))
    if note is not None:
        return noted(x, weights, up, down, gate, routing, note)
    if torch.is_grad_enabled():
        return ExpertMLP.apply(x, weights, up, down, gate, routing)
    weight = weights.flatten().index_select(0, routing.order)[:, None]
    # Nothing has a name that is not needed any more: what comes and goes is at its highest here.
    active = activated(*products(x.index_select(0, routing.tokens), up, gate, routing.ends)).mul_(weight)
    return routing.gathered(grouped_product(active, down, routing.ends)).sum(1)


def noted(
    x: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, routing: Routing, note: Note
) -> Tensor:
    """`expert_mlp` step by step, for whoever looks on: autograd keeps every step."""
    (tokens, width), chosen = x.shape, routing.chosen
    # Not by number of the token: the gradient of rows that are taken several times would be a sum in any order.
    rows = x.unsqueeze(1).expand(tokens, chosen, width).flatten(0, 1).index_select(0, routing.order)
    hidden, opened = products(rows, up, gate, routing.ends)
    hidden = note("expert_ffn", routing.gathered(hidden).mT)
    active = activated(hidden, None if opened is None else routing.gathered(opened).mT)
    active = note("expert_ffn_act", (active * weights.unsqueeze(1)).to(x.dtype))
    active = active.mT.flatten(0, 1).index_select(0, routing.order)
    return note("expert_out", routing.gathered(grouped_product(active, down, routing.ends))).sum(1)


def products(rows: Tensor, up: Tensor, gate: Tensor | None, ends: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `up`, and the gate where there is one, give [m, I] of rows [m, D]."""
    return grouped_product(rows, up, ends), None if gate is None else grouped_product(rows, gate, ends)


def activated(hidden: Tensor, opened: Tensor | None) -> Tensor:
    return relu2(hidden) if opened is None else swiglu(opened, hidden)


class ExpertMLP(torch.autograd.Function):
    """Backward keeps the inputs and what `up` and the gate gave, and recomputes the rest."""

    @staticmethod
    def forward(ctx, x, weights, up, down, gate, routing):
        hidden, opened = products(x.index_select(0, routing.tokens), up, gate, routing.ends)
        weight = weights.flatten().index_select(0, routing.order)[:, None]
        ctx.save_for_backward(x, weight, up, down, gate, hidden, opened, *routing[:3])
        ctx.chosen, ctx.weights_dtype = routing.chosen, weights.dtype
        y = grouped_product(activated(hidden, opened).mul_(weight), down, routing.ends)
        return routing.gathered(y).sum(1)

    @staticmethod
    def backward(ctx, dy):
        x, weight, up, down, gate, hidden, opened, order, place, ends = ctx.saved_tensors
        routing, needed = Routing(order, place, ends, ctx.chosen), ctx.needs_input_grad
        active = activated(hidden, opened)
        dout = dy.index_select(0, routing.tokens)
        dactive = grouped_product(dout, down, routing.ends, turned=True)  # of what down reads
        # No expert's answer is kept: <y_k, dy> is <act, down^T dy>.
        dweight = torch.sum(active * dactive, 1, keepdim=True, dtype=weight.dtype) if needed[1] else None
        ddown = grouped_gradient(dout, active.mul_(weight), routing.ends) if needed[3] else None
        del dout, active
        dactive.mul_(weight)
        dhidden, dopened = dactive, None
        if opened is None:
            dhidden = relu2_gradient(hidden, dactive)
        else:
            dopened, dhidden = swiglu_gradients(opened, hidden, dactive)
        del dactive
        rows: Tensor = x.index_select(0, routing.tokens)
        dup = grouped_gradient(dhidden, rows, routing.ends) if needed[2] else None
        dgate = grouped_gradient(dopened, rows, routing.ends) if dopened is not None and needed[4] else None
        del rows
        dx = None
        if needed[0]:
            drows = grouped_product(dhidden, up, routing.ends, turned=True)
            if dopened is not None:
                drows += grouped_product(dopened, gate, routing.ends, turned=True)
            dx = routing.gathered(drows).sum(1)
        if dweight is not None:
            dweight = routing.gathered(dweight).squeeze(-1).to(ctx.weights_dtype)
        return dx, dweight, dup, ddown, dgate, None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor, *, turned: bool = False) -> Tensor:
    """[m, N] of rows x [m, K], group e of them (up to ends[e]) times weight[e] [N, K] transposed; `turned`: [m, K] of
    x [m, N], times weight[e] as it is. Differentiable in x and weight."""
    return product_op(x, weight, ends, turned)


def grouped_gradient(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[E, N, K] of y [m, N] and x [m, K]: of each group of rows y^T x."""
    return gradient_op(y, x, ends)


# Operators that torch.library knows, wherever they run: how many rows an expert has is no shape, so that tensors
# without values pass through as well (models/cost).
@torch.library.custom_op("limbeck::grouped_product", mutates_args=())
def product_op(x: Tensor, weight: Tensor, ends: Tensor, turned: bool) -> Tensor:
    if not takes_triton(x):
        return segment_product(x, weight, ends, turned)
    if takes_torch_grouped(x, weight):
        return torch_product(x, weight, ends, turned)
    return triton_product(x, weight, ends, turned)


@torch.library.custom_op("limbeck::grouped_gradient", mutates_args=())
def gradient_op(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    if not takes_triton(x):
        return segment_gradient(y, x, ends)
    if takes_torch_grouped(y, x):
        return torch_gradient(y, x, ends)
    return triton_gradient(y, x, ends)


product_op.register_fake(lambda x, weight, ends, turned: x.new_empty(len(x), weight.shape[2 if turned else 1]))
gradient_op.register_fake(lambda y, x, ends: x.new_empty(len(ends), y.shape[1], x.shape[1]))


def keep_operands(ctx, inputs, output) -> None:
    x, weight, ends, turned = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.turned = turned


def product_backward(ctx, dy):
    x, weight, ends = ctx.saved_tensors
    dx = product_op(dy, weight, ends, not ctx.turned) if ctx.needs_input_grad[0] else None
    pair = (x, dy) if ctx.turned else (dy, x)
    return dx, gradient_op(*pair, ends) if ctx.needs_input_grad[1] else None, None, None


product_op.register_autograd(product_backward, setup_context=keep_operands)
