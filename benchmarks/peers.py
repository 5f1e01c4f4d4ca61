"""limbeck's pruning beside other projects', on one model and text: what is added to the held-out loss.

    python -m limbeck.benchmarks.peers OUTPUT --model FOLDER [--data stdlib] [--shares 0.9,0.79,0.74] [--seeds 0,1,2]
        [--methods "limbeck, defaults;ShortGPT;..."] [--tokens 15360] [--rates 0.0001,0.0003]
        [--torch-pruning] [--flap FOLDER] [--slicegpt FOLDER] [--pruneme FOLDER]

The model is one of llama's layers (SmolLM2-135M: benchmarks/smollm2.py makes its folder) with a tied embedding. Every
method reads the same rows, is cut to the same share of the parameters (the embedding counted once) or a little below,
and is measured by the same rows of held-out text, in nats a token: before training, and after `--tokens` of forward KL
from the unpruned model by one plain loop (AdamW; of the rates the better one). Rows are the text as it comes, documents
after one another, since transformers' models know no borders. Peers run where they are given: Torch-Pruning where it is
installed, others' code from a folder (benchmarks/pruning_peers.py). A cell is a file of OUTPUT/cells, not made twice;
tables give means and, in brackets, the least and the largest of the seeds, which draw the calibration text.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks import pruning_peers
from limbeck.benchmarks.cells import print_table, spread, stored_cell
from limbeck.benchmarks.pruning import PLAIN
from limbeck.distill.text.packing import Batch, Corpus, tokenize
from limbeck.distill.text.resolve import NamedData, documents
from limbeck.models.checkpoint import load_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.hybrid import HybridLM
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from limbeck.prune.choose import select
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair, RepairOptions, repair_model
from limbeck.prune.scores import WidthScores
from limbeck.prune.slice import Selection
from limbeck.prune.target import Target
from torch import Tensor, nn
from torch.nn import functional as F

DEFAULTS = RepairOptions().repair(with_data=True)
OURS = {
    "limbeck, plain": PLAIN,
    "limbeck, defaults": DEFAULTS,
    "limbeck, local distillation": dataclasses.replace(DEFAULTS, local_steps=64),
}
SHORTGPT = "ShortGPT (block influence)"
WARMUP = 5


@dataclasses.dataclass(frozen=True)
class PeerSetting:
    model: Path
    data: NamedData
    seq_len: int
    batch: int
    calibration_tokens: int
    held_out_tokens: int
    tokens: int
    rates: tuple[float, ...]


@dataclasses.dataclass
class Cut:
    """A model that was cut, ours or of transformers, and its parameters with the embedding counted once."""

    module: nn.Module
    parameters: int

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, V]"""
        found = self.module(ids)
        return found if isinstance(found, Tensor) else found.logits


class PeerBench:
    """The model, its text and its scores, which all methods share."""

    def __init__(self, setting: PeerSetting, cells: Path) -> None:
        self.setting, self.cells = setting, cells
        cells.mkdir(parents=True, exist_ok=True)
        self.corpus, self.widths = functools.cache(self.tokenized), functools.cache(self.scored)
        self.lessons = functools.cache(self.taught)

    @functools.cached_property
    def model(self) -> HybridLM:
        model = load_model(self.setting.model)
        if not model.config.tie_word_embeddings:
            raise InputError(f"{self.setting.model}: expected a model whose head is its embedding")
        return model.requires_grad_(False)

    @property
    def blocks(self) -> int:
        return self.model.config.num_layers // self.model.config.block_size

    def tokenized(self, split: str) -> Corpus:
        return tokenize(documents(self.setting.data, split), load_tokenizer(self.setting.model))

    def rows(self, split: str, tokens: int, seed: int) -> list[Batch]:
        sizes = {"batch_size": self.setting.batch, "seq_len": self.setting.seq_len}
        found = self.corpus(split).sample(**sizes, seed=seed, max_tokens=tokens)
        return [dataclasses.replace(batch, seq_idx=torch.zeros_like(batch.seq_idx)) for batch in found]

    def calibration(self, seed: int) -> list[Batch]:
        return self.rows("train", self.setting.calibration_tokens, seed)

    def scored(self, seed: int) -> WidthScores:
        return score_widths(self.model, self.calibration(seed))

    def goal(self, share: float) -> int:
        return int(share * count_parameters(self.model.config))

    def theirs(self) -> Any:
        """The model in transformers' class, in float32."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(self.setting.model, **how).eval()
        model.config.use_cache = False  # with a cache Torch-Pruning's graph of the model has no end
        return model

    @torch.no_grad()
    def loss(self, cut: Cut) -> float:
        """Held-out cross-entropy, nats a token."""
        total, tokens = 0.0, 0
        for batch in self.rows("test", self.setting.held_out_tokens, 0):
            total += float(cross_entropy(cut.logits(batch.input_ids), batch.labels, reduction="sum"))
            tokens += int((batch.labels >= 0).sum())
        return total / tokens

    def base(self) -> float:
        return stored_cell(self.cells, "unpruned", lambda: {"loss": self.loss(self.whole())})["loss"]

    def whole(self) -> Cut:
        return Cut(self.model, count_parameters(self.model.config))

    @torch.no_grad()
    def taught(self) -> list[tuple[Tensor, Tensor]]:
        """A step's row and the unpruned model's log-probabilities there, [1, T] and [1, T, V], kept for all methods."""
        steps = range(self.setting.tokens // self.setting.seq_len)
        batches = self.corpus("train").train_batches(batch_size=1, seq_len=self.setting.seq_len, seed=0)
        rows = (batch.input_ids for _, batch in zip(steps, batches, strict=False))
        return [(ids, F.log_softmax(self.model(ids), -1)) for ids in rows]

    def train(self, cut: Cut, rate: float) -> Cut:
        """So many tokens of forward KL(unpruned || pruned), one row a step, the same rows in the same order for all."""
        lessons = self.lessons()
        steps = len(lessons)
        weights = list(cut.module.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step, (ids, target) in enumerate(lessons):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP, (steps - step) / (steps / 2))
            found = F.log_softmax(cut.logits(ids), -1)
            loss = F.kl_div(found, target, reduction="sum", log_target=True) / ids.numel()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        cut.module.requires_grad_(False)
        return cut


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)


def ours(repair: Repair) -> Callable[[PeerBench, float, int], Cut]:
    def cut(bench: PeerBench, share: float, seed: int) -> Cut:
        target = Target(parameters=bench.goal(share) / count_parameters(bench.model.config))
        return sliced(bench, select(bench.model.config, bench.widths(seed), (), target), seed, repair)

    return cut


def sliced(bench: PeerBench, selection: Selection, seed: int, repair: Repair = PLAIN) -> Cut:
    small = repair_model(bench.model, selection, bench.calibration(seed) if repair.needs_data else [], repair)
    return Cut(small, count_parameters(small.config))


def blocks_to_remove(bench: PeerBench, share: float) -> int:
    """As few whole blocks as bring the model to the share."""
    config, size = bench.model.config, bench.model.config.block_size
    for gone in range(1, bench.blocks):
        if count_parameters(config.replace(pattern=config.pattern[gone * size :])) <= bench.goal(share):
            return gone
    raise InputError(f"no number of blocks brings the model to {share:.0%}")


def without_blocks(bench: PeerBench, kept: Sequence[int], seed: int) -> Cut:
    size = bench.model.config.block_size
    return sliced(bench, Selection(tuple(block * size + part for block in kept for part in range(size))), seed)


def shortgpt(bench: PeerBench, share: float, seed: int) -> Cut:
    gone, size = blocks_to_remove(bench, share), bench.model.config.block_size
    how: Any = {"metric": "block_influence", "iterative": False}
    order = score_layers(bench.model, bench.calibration(seed), remove=gone * size, **how).order
    removed = {layer // size for layer in order}
    return without_blocks(bench, [block for block in range(bench.blocks) if block not in removed], seed)


def neighbours(folder: Path) -> Callable[[PeerBench, float, int], Cut]:
    choose = pruning_peers.pruneme(folder)

    def cut(bench: PeerBench, share: float, seed: int) -> Cut:
        rows = [batch.input_ids for batch in bench.calibration(seed)]
        return without_blocks(bench, choose(bench.theirs(), rows, blocks_to_remove(bench, share)), seed)

    return cut


def peer(prune: Callable[[Any, pruning_peers.Rows, int], Any]) -> Callable[[PeerBench, float, int], Cut]:
    def cut(bench: PeerBench, share: float, seed: int) -> Cut:
        rows = [batch.input_ids for batch in bench.calibration(seed)]
        model = prune(bench.theirs(), rows, bench.goal(share))
        return Cut(model, pruning_peers.parameters_of(model))

    return cut


def taylor(bench: PeerBench, share: float, seed: int) -> Cut:
    batches = bench.calibration(seed)
    labels = iter([batch.labels for batch in batches])
    rows = [batch.input_ids for batch in batches]
    model = pruning_peers.torch_pruning(
        bench.theirs(), rows, bench.goal(share), lambda logits: cross_entropy(logits, next(labels))
    )
    return Cut(model, pruning_peers.parameters_of(model))


def methods_of(options: argparse.Namespace) -> dict[str, Callable[[PeerBench, float, int], Cut]]:
    """Every method that is there, by name."""
    found: dict[str, Callable[[PeerBench, float, int], Cut]] = {name: ours(repair) for name, repair in OURS.items()}
    found[SHORTGPT] = shortgpt
    if options.torch_pruning:
        found["Torch-Pruning (Taylor)"] = taylor
    if options.flap is not None:
        found["FLAP (FFN)"] = peer(pruning_peers.flap(options.flap))
    if options.slicegpt is not None:
        found["SliceGPT"] = peer(pruning_peers.slicegpt(options.slicegpt))
    if options.pruneme is not None:
        found["PruneMe"] = neighbours(options.pruneme)
    return found


def measured(
    bench: PeerBench, name: str, cut: Callable[[PeerBench, float, int], Cut], share: float, seed: int
) -> list[float]:
    """[share left, added before training, added after]; the last is the best of the rates."""
    where = f"{name}, {share:.0%}, seed {seed}"

    @functools.cache
    def pruned() -> Cut:
        return cut(bench, share, seed)

    def before() -> dict[str, Any]:
        return {"loss": bench.loss(pruned()), "parameters": pruned().parameters}

    def after(rate: float) -> dict[str, Any]:
        own = dataclasses.replace(pruned(), module=copy.deepcopy(pruned().module))
        return {"loss": bench.loss(bench.train(own, rate))}

    base, first = bench.base(), stored_cell(bench.cells, where, before)
    gc.collect()
    figures = [first["parameters"] / count_parameters(bench.model.config), first["loss"] - base]
    trained = [
        stored_cell(bench.cells, f"{where}, {bench.setting.tokens} tokens at {rate:g}", functools.partial(after, rate))
        for rate in bench.setting.rates if bench.setting.tokens
    ]  # fmt: skip
    return figures + ([min(each["loss"] for each in trained) - base] if trained else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model of llama's layers")
    parser.add_argument("--data", default="stdlib", help="as data= of the commands")
    parser.add_argument("--shares", default="0.9,0.79,0.74")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", help="names, with semicolons between them; all that are there without")
    parser.add_argument("--tokens", type=int, default=15360, help="of training; 0: none")
    parser.add_argument("--rates", default="0.0001,0.0003")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows of calibration at a time")
    parser.add_argument("--torch-pruning", action="store_true", help="the package is installed")
    for name in ("flap", "slicegpt", "pruneme"):
        parser.add_argument(f"--{name}", type=Path, help="folder of its code")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    rates = tuple(float(rate) for rate in options.rates.split(","))
    sizes = (options.seq_len, options.batch, options.calibration_tokens, options.held_out_tokens, options.tokens)
    bench = PeerBench(PeerSetting(options.model, options.data, *sizes, rates), options.output / "cells")
    methods = methods_of(options)
    chosen = options.methods.split(";") if options.methods else list(methods)
    if unknown := [name for name in chosen if name not in methods]:
        parser.error(f"--methods: unknown {unknown}; here are {list(methods)}")
    seeds, shares = ([kind(part) for part in text.split(",")] for kind, text in
                     ((int, options.seeds), (float, options.shares)))  # fmt: skip
    for share in shares:
        rows = []
        for name in chosen:
            figures = [measured(bench, name, methods[name], float(share), int(seed)) for seed in seeds]
            left, *added = ([row[column] for row in figures] for column in range(len(figures[0])))
            rows.append([name, f"{sum(left) / len(left):.1%}", *(spread(values) for values in added)])
        title = (
            f"{options.model.name}, {options.data}: added to {bench.base():.3f} nats at {share:.0%} of the parameters"
        )
        columns = ["method", "left", "before training", f"after {options.tokens:,} tokens"]
        print_table(title, columns[: len(rows[0])], rows)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
