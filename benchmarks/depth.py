"""The order in which layers go, by ours and by the plain way: layers run, seconds, and whether the orders are equal.

    python -m limbeck.benchmarks.depth [--metric mse] [--remove 4] [--rows 16] [--tokens 128] [--json FILE]

The plain way is written here: for each removal and each candidate a whole forward of the layers that remain, then the
head's logits beside the original's. The shipped model reads files of the running Python's standard library; a hybrid
of 62 layers in the 12B's pattern has random weights, each layer's part in the stream scaled at random (0.05 to 1), as
trained layers differ too, and reads random tokens. "streamed" reads each layer from its folder when its turn comes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.surgery import BEFORE
from limbeck.distill.text.packing import IGNORED, Batch, tokenize
from limbeck.distill.text.resolve import documents
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.hybrid import HybridLM, initialize
from limbeck.models.named import SHIPPED
from limbeck.models.offload import open_layers
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from limbeck.prune.depth import score_layers
from torch import Tensor
from torch.nn import functional as F

SMALL = HybridConfig(
    pattern=BEFORE,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    chunk_size=64,
)


def shipped(rows: int, tokens: int) -> tuple[HybridLM, list[Batch]]:
    """The model in models/zoo, and rows of text, one a batch."""
    corpus = tokenize(list(documents("stdlib", "train"))[::16], load_tokenizer(SHIPPED["zoo"]))
    return load_model(SHIPPED["zoo"]), list(
        corpus.sample(batch_size=1, seq_len=tokens, seed=0, max_tokens=rows * tokens)
    )


@torch.no_grad()
def random_hybrid(rows: int, tokens: int) -> tuple[HybridLM, list[Batch]]:
    """The 62 layers, and rows of random tokens, one a batch."""
    generator = torch.Generator().manual_seed(0)
    model = HybridLM(SMALL).eval()
    initialize(model, generator, std=0.2)
    for name, weight in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            weight.mul_(20 ** -float(torch.rand((), generator=generator)))
    batches = []
    for _ in range(rows):
        ids = torch.randint(SMALL.vocab_size, (1, tokens), generator=generator)
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
        batches.append(Batch(ids, labels, torch.zeros_like(ids, dtype=torch.int32), ids, ids))
    return model, batches


class Plain:
    """The plain way: nothing is kept but the original's logits."""

    def __init__(self, model: HybridLM, batches: Sequence[Batch], metric: str) -> None:
        self.model, self.batches, self.metric, self.runs = model, batches, metric, 0
        self.original = [self.logits(batch, range(model.config.num_layers)) for batch in batches]

    @torch.no_grad()
    def logits(self, batch: Batch, stack: Sequence[int]) -> Tensor:
        """[counted tokens, V]"""
        hidden = self.model.embed(batch.input_ids)
        for layer in stack:
            hidden = self.model.forward_layers(hidden, layer, layer + 1, seq_idx=batch.seq_idx)
            self.runs += 1
        hidden = hidden[batch.labels != IGNORED]
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.model.norm_f.weight, self.model.config.norm_eps)
        return normed @ self.model.head_weight.T

    def cost(self, stack: Sequence[int]) -> float:
        """Of a smaller model: the sum over tokens."""
        total = 0.0
        for batch, original in zip(self.batches, self.original, strict=True):
            found = self.logits(batch, stack)
            if self.metric == "mse":
                total += float((found - original).double().square().sum())
            elif self.metric == "kl":
                p, q = (logits.double().log_softmax(-1) for logits in (original, found))
                total += float((p.exp() * (p - q)).sum())
            else:
                labels = batch.labels[batch.labels != IGNORED]
                total += float(F.cross_entropy(found.double(), labels, reduction="sum"))
        return total

    def order(self, remove: int) -> tuple[int, ...]:
        stack, gone = list(range(self.model.config.num_layers)), []
        for _ in range(remove):
            costs = [(self.cost([other for other in stack if other != layer]), layer) for layer in stack]
            gone.append(min(costs)[1])
            stack.remove(gone[-1])
        return tuple(gone)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.perf_counter()
    found = work()
    return time.perf_counter() - clock, found


def compare(name: str, model: HybridLM, batches: list[Batch], remove: int, metric: str) -> list[dict[str, Any]]:
    """Plain, ours, and ours from a folder."""
    options: dict[str, Any] = {"remove": remove, "metric": metric}
    plain = Plain(model, batches, metric)
    seconds, order = timed(lambda: plain.order(remove))
    rows = [
        {"model": name, "way": "plain", "evaluations": plain.runs / len(batches), "seconds": seconds, "order": order}
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        streamed = open_layers(Path(folder) / "model", torch.float32, torch.device("cpu"), offload="disk")
        for way, layers in (("ours", model), ("ours, streamed", streamed)):
            seconds, found = timed(lambda: score_layers(layers, batches, **options))  # noqa: B023
            facts = {"evaluations": found.layer_evaluations, "seconds": seconds, "order": found.order}
            rows.append({"model": name, "way": way, **facts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metric", choices=("mse", "kl", "perplexity"), default="mse")
    parser.add_argument("--remove", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = []
    for name, made in (("shipped, 12 layers", shipped), ("random, 62 layers", random_hybrid)):
        count = options.rows if made is shipped else options.rows // 2
        model, batches = made(count, options.tokens if made is shipped else options.tokens // 2)
        rows += compare(name, model, batches, options.remove, options.metric)
    print(f"{options.remove} layers by {options.metric}\n")
    print("| model | way | layer evaluations | of plain | seconds | of plain | order |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        if row["way"] == "plain":
            plain = row
        shares = [row[key] / plain[key] for key in ("evaluations", "seconds")]
        order = " ".join(map(str, row["order"])) + ("" if row["order"] == plain["order"] else " (another)")
        print(
            f"| {row['model']} | {row['way']} | {row['evaluations']:,.1f} | {shares[0]:.0%} |"
            f" {row['seconds']:.1f} | {shares[1]:.0%} | {order} |"
        )
    facts = provenance()
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "provenance": facts}, indent=1))


if __name__ == "__main__":
    main()
