"""A cached teacher beside the one online: what k tokens tell of the loss, bytes a token, time a step.

    python -m limbeck.benchmarks.teacher_cache [--tokens 4096] [--rounds 5] [--ks 6,16,64,256,0] [--draws 12,128]
        [--documents 0] [--folder FOLDER]

The teacher is the shipped model; the student is it with 25% fewer parameters, pruned by activations and not trained.
On held-out text: KL a token with the bucket of the rest and without, beside the dense one, and how far the gradient of
the student's hidden states is from the dense one's (relative RMS); beside it that of the head, a sum over all tokens,
in which what is drawn averages out and what is cut off does not. k = 0 is the whole vocabulary, in float32; others are
kept in float16. A cache of 12 draws has about the bytes of the top 6, one of 128 draws those of the top 64. A step is
forward and backward of student and loss, with the teacher's forward or the reading of the cache (whose files the system
has in memory): medians, by turns, of the process's time on its processors, which a busy machine disturbs less than the
clock on the wall.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table
from limbeck.distill.losses import Distillation, DistillLoss, distillation_loss
from limbeck.distill.teacher import SAMPLE, CachedTeacher, CacheOptions, answer_loss, finish_cache, write_cache
from limbeck.distill.text.packing import Batch, tokenize
from limbeck.distill.text.resolve import documents
from limbeck.kernels.linear_draws_kl import Draws
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.linear_topk_kl import TopK
from limbeck.models.checkpoint import load_model
from limbeck.models.folder import sha256_file
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.models.provenance import provenance
from limbeck.models.tokenizer import load_tokenizer
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.slice import slice_model
from limbeck.prune.target import Target
from torch import Tensor

ROWS, SEQ_LEN = 4, 512
CUT = Target(hidden_size=208, intermediate_size=640, mamba_num_heads=12)


def text(split: str, tokens: int, most: int) -> list[Batch]:
    """Of every fourth document of a split, or of the first few."""
    read = itertools.islice(documents("stdlib", split), 0, most or None, 1 if most else 4)
    corpus = tokenize(read, load_tokenizer(SHIPPED["zoo"]))
    return list(corpus.sample(batch_size=ROWS, seq_len=SEQ_LEN, seed=0, max_tokens=tokens))


def pruned(teacher: HybridLM, most: int) -> HybridLM:
    return slice_model(teacher, select(teacher.config, score_widths(teacher, text("train", 4096, most)), (), CUT))


def make_cache(teacher: HybridLM, batches: Sequence[Batch], folder: Path, **chosen: Any) -> CachedTeacher:
    vocabulary, options = teacher.config.vocab_size, CacheOptions(**chosen)
    folder.mkdir(parents=True, exist_ok=True)
    write_cache(teacher, [(batch, ROWS) for batch in batches], folder, options)
    finish_cache(folder, vocabulary, sha256_file(SHIPPED["zoo"] / "tokenizer.json"), options)
    return CachedTeacher(folder)


class Compared:
    """The student's hidden states of the batches, and the dense loss and its gradient on them."""

    def __init__(self, teacher: HybridLM, student: HybridLM, batches: Sequence[Batch]) -> None:
        self.student, self.batches = student, batches
        with torch.no_grad():
            targets = [teacher.hidden_states(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1) for batch in batches]
            self.hidden = [
                student.hidden_states(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1) for batch in batches
            ]
        self.tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
        self.loss, *self.gradients = self.measured(
            lambda number, hidden, head, labels: (
                linear_kl(
                    hidden,
                    head,
                    targets[number],
                    teacher.head_weight,
                    labels=labels,
                    normalizer=self.tokens,
                ).loss
            )
        )

    def measured(self, loss_of: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> tuple[float, Tensor, Tensor]:
        """Loss a token, and its gradients by all hidden states and by the head."""
        total, gradients = 0.0, []
        head = self.student.head_weight.detach().clone().requires_grad_()
        of_head = torch.zeros_like(head)
        for number, (batch, hidden) in enumerate(zip(self.batches, self.hidden, strict=True)):
            leaf = hidden.clone().requires_grad_()
            loss = loss_of(number, leaf, head, batch.labels.flatten())
            by_hidden, by_head = torch.autograd.grad(loss, (leaf, head))
            gradients.append(by_hidden)
            of_head += by_head
            total += loss.item()
        return total, torch.cat(gradients), of_head

    def cached(self, targets: Sequence[TopK | Draws], tail: bool) -> tuple[float, float, float]:
        """Loss a token, and the relative RMS errors of its gradients by hidden states and head."""
        loss, *gradients = self.measured(
            lambda number, hidden, head, labels: (
                answer_loss(hidden, head, targets[number], tail=tail, labels=labels, normalizer=self.tokens).loss
            )
        )
        errors = [
            float((own - dense).norm() / dense.norm()) for own, dense in zip(gradients, self.gradients, strict=True)
        ]
        return loss, errors[0], errors[1]


def step_times(
    student: HybridLM, losses: dict[str, Distillation], batches: Sequence[Batch], rounds: int
) -> dict[str, float]:
    """Median milliseconds of a step with each loss, by turns."""
    found: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):  # the first is not counted
        for name, loss_of in losses.items():
            begun = time.process_time()
            loss_of(student, batches[number % len(batches)], 1.0).backward()
            if number:
                found[name].append(1000 * (time.process_time() - begun))
            student.zero_grad()
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ks", default="6,16,64,256,0", help="0: the whole vocabulary")
    parser.add_argument("--draws", default="12,128", help="of caches of draws")
    parser.add_argument("--documents", type=int, default=0, help="so many of a split alone; 0: every fourth of it")
    parser.add_argument("--folder", type=Path, help="where the caches are made; a temporary folder without")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    teacher = load_model(SHIPPED["zoo"])
    student = pruned(teacher, options.documents)
    batches = text("test", options.tokens, options.documents)
    compared, vocabulary = Compared(teacher, student, batches), teacher.config.vocab_size
    chosen: dict[str, dict[str, Any]] = {}
    for k in map(int, options.ks.split(",")):
        chosen[f"top {k or vocabulary}"] = {"k": k or vocabulary, "dtype": "float16" if k else "float32"}
    chosen |= {f"{k} draws": {"k": k, "method": SAMPLE} for k in map(int, options.draws.split(","))}
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        caches = {
            name: make_cache(teacher, batches, root / name.replace(" ", "-"), **how) for name, how in chosen.items()
        }
        losses = {"online": distillation_loss(teacher, DistillLoss())}
        losses |= {name: distillation_loss(cache, DistillLoss()) for name, cache in caches.items()}
        times = step_times(student.train(), losses, batches, options.rounds)
        rows = [["online", f"{compared.loss:.6f}", *[""] * 6, f"{times['online']:.0f}"]]
        for name, cache in caches.items():
            targets = [cache.targets(batch) for batch in batches]
            cells = []
            for tail in (True, False):
                if not tail and cache.method == SAMPLE:  # nothing is left out
                    cells += [""] * 3
                    continue
                loss, *errors = compared.cached(targets, tail)
                cells += [f"{loss:.6f}", *(f"{error:.1e}" for error in errors)]
            size = sum(path.stat().st_size for path in cache.folder.glob("rows-*")) / (len(cache) * SEQ_LEN)
            rows.append([name, *cells, f"{size:,.0f}", f"{times[name]:.0f}"])
    title = f"KL of a pruned student on {compared.tokens:,} held-out tokens, vocabulary {vocabulary:,}"
    off = ["gradient off", "of the head"]
    print_table(title, ["teacher", "KL", *off, "KL, no bucket", *off, "bytes a token", "ms a step"], rows)
    print(f"\na step: {ROWS} rows of {SEQ_LEN} tokens")
    print("\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
