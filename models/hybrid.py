"""The decoder: embedding, blocks x + mixer(norm(x)) after the pattern, final norm, head. The only loop over layers.

Shapes: [B, T] batch and tokens, [V] vocabulary. Parameters are named as in `axes.tensor_table`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.linear import linear
from ..kernels.norm import rms_norm
from .axes import Role, tensor_table
from .config import HybridConfig
from .layer import Bound, Context, NormWeight, Observe, RoundInput
from .mtp import MultiTokenPrediction
from .multipliers import scaled

if TYPE_CHECKING:
    from .generate.cache import Cache
    from .row_split import RowPart
    from .tokenizer import Tokenizer


class Block(nn.Module):
    """One layer: its norm, and the mixer of its kind.

    With `recompute` a training step keeps what enters the layer alone, and runs it again in the backward pass.
    """

    recompute = False

    def __init__(self, config: HybridConfig, layer: int, **place: Any) -> None:
        super().__init__()
        self.kind, self.layer, self.norm_eps = config.kinds[layer], layer, config.norm_eps
        self.multiplier = config.multipliers.residual
        self.norm = NormWeight(config.hidden_size, **place)
        self.mixer = self.kind.build(config, layer, **place)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """What the layer adds to the residual stream [B, T, hidden]."""
        if self.recompute and torch.is_grad_enabled() and context.states is None:
            return checkpoint(self.mix, hidden, context, use_reentrant=False, preserve_rng_state=False)
        return self.mix(hidden, context)

    def mix(self, hidden: Tensor, context: Context) -> Tensor:
        u = context.norm(hidden, self.norm.weight, self.norm_eps)
        context.note("hidden", self.layer, u)
        return scaled(self.mixer(u, context), self.multiplier)


class HybridLM(nn.Module):
    """A hybrid language model. Weights are uninitialised until `initialize` or a checkpoint fills them.

    `observe(name, layer, tensor)`, where a method takes it, sees activations as they pass: "residual" before a
    layer, "hidden" after its norm (both also at `num_layers`, around the final norm), and what the kinds of layers
    show of themselves: "ffn" what `up_proj` gives, "ffn_act" what `down_proj` reads (after the activation, and the gate
    where there is one), "attn_heads" [B, T, heads, head_dim] before `o_proj`, "mamba_x", "mamba_z" (from `in_proj`)
    and "mamba_out" (before `out_proj`), each [B, T, heads, head_dim], and "mamba_c" [B, T, groups * state]. An
    observer whose `names` have them sees "mamba_state" and "mamba_reach" as well, alike (kernels/state_energy.py).

    `tokenizer` is that of the folder, where `api.load` found one. `round_input(module, x)` is there while the model
    learns to be quantised (distill/quantised.py), is measured as a server computes (served_inputs.py), or to see what
    its matrices read (prune/calibration.py).
    """

    tokenizer: Tokenizer | None = None
    round_input: RoundInput | None = None

    def __init__(
        self,
        config: HybridConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **place)
        self.layers = nn.ModuleList(Block(config, layer, **place) for layer in range(config.num_layers))
        self.norm_f = NormWeight(config.hidden_size, **place)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **place)
        ahead = config.mtp_layers
        if ahead is not None:
            blocks = [Block(ahead, number, **place) for number in range(ahead.num_layers)]
            self.mtp = MultiTokenPrediction(config, blocks, **place)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, hidden]; the embedding's where they are tied."""
        return self.head.weight

    @property
    def head(self) -> nn.Embedding | nn.Linear:
        """The module whose weight is the head's matrix."""
        return self.embeddings if self.config.tie_word_embeddings else self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T]; see `hidden_states`."""
        hidden = self.hidden_states(input_ids, seq_idx=seq_idx, cache=cache, observe=observe)
        return linear(hidden, self.head_weight)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: Cache | None = None,
        observe: Observe | None = None,
        embedded: Tensor | None = None,
        part: RowPart | None = None,
    ) -> Tensor:
        """What the head reads, [B, T, hidden]: the final norm, times the multiplier of the logits, so that whoever
        multiplies with the head's matrix has the model's logits.

        Where `seq_idx` [B, T] changes along a row, a new document begins: state, attention and positions start anew.
        With a cache the tokens follow those that it holds (any number of them). `embedded` is the stream before the
        first layer, where the caller has looked it up already. Of rows split over processes these are this one's
        `part`; the others make the same call with theirs."""
        context = Context(seq_idx=seq_idx, observe=observe, part=part, round_input=self.round_input)
        if cache is not None:
            context.past, context.states = cache.length, cache.layers
        hidden = self.run_layers(
            self.embed(input_ids) if embedded is None else embedded, 0, self.config.num_layers, context
        )
        context.note("residual", self.config.num_layers, hidden)
        hidden = rms_norm(hidden, self.norm_f.weight, self.config.norm_eps)
        context.note("hidden", self.config.num_layers, hidden)
        hidden = scaled(hidden, self.config.multipliers.logits)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return hidden

    def decode(self, tokens: Tensor, lengths: Tensor, cache: Cache, bound: Bound | None = None) -> Tensor:
        """Logits [B, V] after one more token [B] of each of the cache's rows, `lengths` [B] tokens long before it;
        its states advance in place, its own lengths stay.

        Tensors are read where they lie and nothing waits for the host, so that the call can be captured.
        """
        context = Context(lengths=lengths, max_length=cache.max_length, states=cache.layers, bound=bound,
                          round_input=self.round_input)  # fmt: skip
        hidden = self.run_layers(self.embed(tokens.unsqueeze(1)), 0, self.config.num_layers, context)
        hidden = context.norm(hidden, self.norm_f.weight, self.config.norm_eps)
        hidden = scaled(hidden, self.config.multipliers.logits)
        head: Any = self.head  # an embedding where they are tied
        return (linear(hidden, head.weight) if bound is None else bound.project(head, hidden)).squeeze(1)

    def ahead_states(self, embedded: Tensor, hidden: Tensor, seq_idx: Tensor | None = None) -> list[Tensor]:
        """What the head reads of each step of multi-token prediction, [B, T - 1 - s, hidden] of step s: at token t its
        logits are those of token t + 2 + s. Of the same tokens `embedded` [B, T, hidden] is what `embed` and `hidden`
        what `hidden_states` gives; where a document ends before the tokens that are read there is no meaning."""
        found = [hidden]
        ahead = self.config.mtp_layers
        assert ahead is not None
        for step in range(self.config.mtp_steps):
            tokens = hidden.shape[1] - 1 - step
            # Each place is of its own token's document: what it reads of another one comes last there, and is read by
            # none after it.
            context = Context(seq_idx=None if seq_idx is None else seq_idx[:, :tokens])
            for share in dict.fromkeys(kind.share for kind in ahead.kinds):
                if share is not None:
                    context.shared[share] = share(ahead, context, tokens, hidden.device, hidden.dtype)
            found.append(self.mtp(step, embedded[:, 1 + step :], found[-1][:, :tokens], context))
        return found[1:]

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden]"""
        return scaled(self.embeddings(input_ids), self.config.multipliers.embedding)

    def forward_layers(
        self, hidden: Tensor, start: int, stop: int, *, seq_idx: Tensor | None = None, observe: Observe | None = None
    ) -> Tensor:
        """The residual stream [B, T, hidden] after layers start..stop-1."""
        context = Context(seq_idx=seq_idx, observe=observe, round_input=self.round_input)
        return self.run_layers(hidden, start, stop, context)

    def run_layers(self, hidden: Tensor, start: int, stop: int, context: Context) -> Tensor:
        tokens, blocks = hidden.shape[1], cast("list[Block]", [self.layers[layer] for layer in range(start, stop)])
        for share in dict.fromkeys(block.kind.share for block in blocks):
            if share is not None:
                context.shared[share] = share(self.config, context, tokens, hidden.device, hidden.dtype)
        for block in blocks:
            context.note("residual", block.layer, hidden)
            hidden = context.join(hidden, block(hidden, context))
        return hidden


def set_tensor(module: nn.Module, name: str, tensor: Tensor, *, trained: bool = True) -> None:
    """Puts a tensor in the place of a module's parameter (`trained`: with gradients) or buffer of that name."""
    place, _, field = name.rpartition(".")
    owner = module.get_submodule(place)
    buffers = dict(owner.named_buffers(recurse=False))
    setattr(owner, field, tensor if field in buffers else nn.Parameter(tensor, requires_grad=trained))


@torch.no_grad()
def initialize(model: HybridLM, generator: torch.Generator, *, std: float = 0.02) -> None:
    """Fills every weight in place: as its kind says, else by its role: norms one, matrices and tables normal(0, std),
    those that write the residual stream divided by sqrt(layers), buffers zero."""
    table, config = tensor_table(model.config), model.config
    for name, weight in model.named_parameters():
        spec = table[name]
        kinds = config if config.mtp_layers is None or spec.ahead is None else config.mtp_layers
        number = spec.layer if spec.ahead is None else spec.ahead
        kind = None if number is None else kinds.kinds[number]
        initial = None if kind is None else kind.initial.get(spec.part.removeprefix("mixer."))
        if initial is not None:
            initial(weight, generator, config)
        elif spec.role is Role.NORM:
            weight.fill_(1)
        else:
            weight.normal_(0, std / math.sqrt(config.num_layers) if spec.writes_stream else std, generator=generator)
    for buffer in model.buffers():
        buffer.zero_()
