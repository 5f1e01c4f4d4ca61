"""Other projects' pruning of a model of transformers, by their own code, for benchmarks/peers.py.

Torch-Pruning is a package of PyPI; the others come as folders with what their authors published: FLAP
(CASIA-IVA-Lab/FLAP), SliceGPT (microsoft/TransformerCompression; needs the package ml_collections) and PruneMe
(arcee-ai/PruneMe). What is here hands a model and rows to them and finds the size of equal parameters. Each peer is
counted with its embedding once, whether or not it leaves the head a matrix of its own.
Shapes: [B, T] tokens, [V] vocabulary, [H] hidden, [I] FFN neurons.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.models.errors import InputError
from torch import Tensor, nn

Rows = Sequence[Tensor]  # input_ids [B, T] a batch


def parameters_of(model: nn.Module) -> int:
    """Parameters without a head's matrix of its own; one that is the embedding's counts there."""
    return sum(weight.numel() for name, weight in model.named_parameters() if name != "lm_head.weight")


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules of a folder come first meanwhile."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def narrowest(count: Callable[[int], int], goal: int, sizes: Sequence[int]) -> int:
    """The largest of the sizes with `goal` parameters at most. Raises InputError where none is so small."""
    fitting = [size for size in sizes if count(size) <= goal]
    if not fitting:
        raise InputError(f"no size has {goal:,} parameters or fewer")
    return max(fitting)


def torch_pruning(model: Any, rows: Rows, goal: int, loss: Callable[[Tensor], Tensor]) -> Any:
    """Groups of channels of the stream and of FFNs, equally many in each layer, by the Taylor importance of `loss` over
    the rows, as the project's own script for language models does it; heads stay."""
    tp = importlib.import_module("torch_pruning")
    config = model.config
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # a tied matrix would be cut twice
    heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    whole = config.hidden_size

    def left(hidden: int) -> float:
        """The share that stays of each width; a little more than the ratio, since what it gives is rounded down."""
        return (hidden + 1e-6) / whole

    def count(hidden: int) -> int:
        ffn = int(config.intermediate_size * left(hidden))
        layer = 2 * hidden * sum(heads_width(config)) + 3 * hidden * ffn + 2 * hidden
        return config.vocab_size * hidden + hidden + config.num_hidden_layers * layer

    hidden = narrowest(count, goal, range(1, whole + 1))
    model.zero_grad()
    for ids in rows:
        loss(model(ids).logits).backward()
    pruner = tp.pruner.BasePruner(
        model, example_inputs=rows[0][:1, :8], importance=tp.importance.GroupTaylorImportance(), global_pruning=False,
        output_transform=lambda out: out.logits, pruning_ratio=1 - left(hidden), ignored_layers=[model.lm_head],
        num_heads=heads, prune_num_heads=False, prune_head_dims=False,
    )  # fmt: skip
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()
    return model


def heads_width(config: Any) -> tuple[int, int]:
    """Of queries and of keys, which values equal."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head, config.num_key_value_heads * head


def flap(folder: Path) -> Callable[[Any, Rows, int], Any]:
    """FLAP on FFN neurons, as many as it takes over all layers together (WIFV, standardised by layer), with the biases
    that make up for what the neurons gave on average. Its attention asks for keys of every head."""

    def cut(model: Any, rows: Rows, goal: int) -> Any:
        with importable(folder):
            wrapping, pruning = importlib.import_module("lib.layerwrapper"), importlib.import_module("lib.prune")
        layers, hidden = model.model.layers, model.config.hidden_size
        gone = -(-(parameters_of(model) - goal + hidden * len(layers)) // (3 * hidden))
        if gone >= len(layers) * model.config.intermediate_size:
            raise InputError("flap: more parameters are to go than its FFNs have")
        seen = [wrapping.BiasGPT(layer.mlp.down_proj, "WIFV") for layer in layers]
        handles = [
            layer.mlp.down_proj.register_forward_hook(lambda _, inputs, out, one=one: one.add_batch(inputs[0], out))
            for layer, one in zip(layers, seen, strict=True)
        ]
        with torch.no_grad():
            for ids in rows:
                for row in ids:  # its running variance is of single rows
                    model(row[None])
            for handle in handles:
                handle.remove()
            found = [pruning.metrics["WIFV"]({"down": one}, {"down": one.layer}, "down") for one in seen]
            metric = torch.stack(found)
            metric = (metric - metric.mean(1, keepdim=True)) / metric.std(1, keepdim=True)
            masks = metric > metric.flatten().sort()[0][gone - 1]
            for layer, one, mask in zip(layers, seen, masks, strict=True):
                layer.mlp.down_proj.bias = nn.Parameter(torch.zeros(hidden))
                pruning.compress(layer, None, mask, None, one.baseline_inp, torch.device("cpu"))
        return model

    return cut


def slicegpt(folder: Path) -> Callable[[Any, Rows, int], Any]:
    """SliceGPT: the stream rotated anew before every block and cut to one width, with matrices between the rotations;
    the head is a whole matrix of its own, which is not counted."""

    def cut(model: Any, rows: Rows, goal: int) -> Any:
        with importable(folder / "src"):
            adapters = importlib.import_module("slicegpt.adapters.llama_adapter")
            fusion, rotate = (importlib.import_module(f"slicegpt.{name}") for name in ("layernorm_fusion", "rotate"))
            scheduler = importlib.import_module("slicegpt.slicing_scheduler")
        llama = importlib.import_module("transformers.models.llama.modeling_llama")

        class RotatedLayer(llama.LlamaDecoderLayer):  # type: ignore[name-defined]
            """Theirs, for the layers of transformers' present versions."""

            attn_shortcut_Q: Tensor | None
            mlp_shortcut_Q: Tensor | None

            def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
                given, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
                hidden = rotated(hidden_states, self.attn_shortcut_Q) + given
                return rotated(hidden, self.mlp_shortcut_Q) + self.mlp(self.post_attention_layernorm(hidden))

        class Adapter(adapters.LlamaModelAdapter):  # type: ignore[name-defined]
            compressed_layer_type = RotatedLayer

            def convert_layer_to_compressed(self, layer: nn.Module, layer_idx: int | None) -> nn.Module:
                made = RotatedLayer(self.config, layer_idx)
                made.load_state_dict(layer.state_dict())
                return made

        config = model.config
        queries, keys = heads_width(config)

        def count(width: int) -> int:
            attention = 2 * width * (queries + keys)
            turns = 2 * width * width
            layers = config.num_hidden_layers * (attention + 3 * width * config.intermediate_size + turns)
            return config.vocab_size * width + layers

        width = narrowest(count, goal, range(1, config.hidden_size))
        adapter = Adapter(model)
        fusion.replace_layers(adapter)
        fusion.fuse_modules(adapter)
        loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
        rotate.rotate_and_slice(adapter, loader, scheduler.ConstSlicingScheduler(width), final_orientation="pca")
        return model

    return cut


def rotated(hidden: Tensor, turn: Tensor | None) -> Tensor:
    return hidden if turn is None else hidden @ turn


def pruneme(folder: Path) -> Callable[[Any, Rows, int], list[int]]:
    """PruneMe: the blocks that stay where as many neighbours go as it takes, those between which the last token's
    stream turns least."""

    def kept(model: Any, rows: Rows, gone: int) -> list[int]:
        path = folder / "compute_block_similarity" / "utils.py"
        spec = importlib.util.spec_from_file_location("pruneme_utils", path)
        assert spec is not None and spec.loader is not None
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        total, count = torch.zeros(model.config.num_hidden_layers - gone, dtype=torch.float64), 0
        with torch.no_grad():
            for ids in rows:
                streams = model(ids, output_hidden_states=True).hidden_states[1:]
                last = [stream[:, -1] for stream in streams]
                total += torch.tensor(theirs.compute_block_distances(last, gone), dtype=torch.float64)
                count += 1
        first = int((total / count).argmin()) + 1  # what block `first - 1` gives is read by the one after the gap
        return [block for block in range(model.config.num_hidden_layers) if not first <= block < first + gone]

    return kept
