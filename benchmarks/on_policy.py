"""What a student learns on its own text, beside as many tokens more of the text it has always read.

    python -m limbeck.benchmarks.on_policy STUDENT OUTPUT [--steps 47] [--seeds 0,1,2] [--ways off,full,...]
        [--rate 0.0003] [--tokens 65536] [--prompts 128] [--peer PYTHON] [--peer-steps 4]

STUDENT is the folder `distilled` of `limbeck compress recipe=tiny`; 47 steps are a fifth of its 235. From it every way
trains the same number of rows with Muon at the same rate: `off`, forward KL on the text; `full`, `top_k` and
`advantage`, reverse KL on its own continuations; `half`, half of the rows of each kind. On held-out text: KL to the
teacher, how many tokens both write alike from a prompt (greedily), and KL(student || teacher) on continuations that the
student draws. Means over seeds, with the least and the greatest. A run is a file of OUTPUT/cells, not made twice, with
the means of its first and last ten steps' lengths, entropies and KL.

With --peer, a Python that has TRL (benchmarks/on_policy_peer.py), its trainer of on-policy distillation does the same
steps on this CPU: the same weights through transformers, prompts, batch, new tokens, reverse KL and AdamW. Tokens are
those of prompts and continuations; seconds are the median of the steps but the first, memory is the highest of a
process of its own above what it held before the models were there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table, spread, stored_cell
from limbeck.benchmarks.cpu_vs_transformers import resident
from limbeck.benchmarks.distill import status
from limbeck.distill.gap.continuation import continuations, draw_prompts
from limbeck.distill.gap.measure import measure_gap
from limbeck.distill.losses import DistillLoss
from limbeck.distill.options import DistillOptions, TrainOptions
from limbeck.distill.rollout_options import Rollouts
from limbeck.distill.rollouts import OnPolicy, stage_loss
from limbeck.distill.stages import stage_batches
from limbeck.distill.text import resolve
from limbeck.distill.text.mixture import Text
from limbeck.distill.text.packing import Corpus
from limbeck.distill.text.prompts import Prompts, prompt_batches
from limbeck.distill.trainer import counted, train
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.generate.generate import end_tokens
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.models.processes import keep_memory
from limbeck.models.provenance import provenance

ROWS, SEQ_LEN, NEW = 4, 512, 64
WAYS: dict[str, Rollouts | None] = {
    "off": None,
    "full": Rollouts(),
    "top_k": Rollouts(estimator="top_k"),
    "advantage": Rollouts(estimator="advantage"),
    "half": Rollouts(share=0.5),
}
BEFORE = "before"
FIGURES = ("KL", "tokens alike", "KL on its own text")


def text(split: str) -> Text:
    return resolve.text_in_tokens("stdlib", split, SHIPPED["zoo"])


def plan_of(rollouts: Rollouts | None, steps: int, rate: float, **changes: Any) -> DistillOptions:
    chosen: dict[str, Any] = {"optimizer": "muon", "warmup_steps": 5, "save_every": steps, "log_every": 1} | changes
    return DistillOptions(DistillLoss(), TrainOptions(steps, rate, **chosen), SEQ_LEN, ROWS, 0, rollouts=rollouts)


def trained(student: HybridLM, teacher: HybridLM, plan: DistillOptions, seed: int) -> list[dict[str, Any]]:
    """Trains in place; the records of all steps, with the seconds since the first began."""
    records: list[dict[str, Any]] = []
    ends, read = end_tokens(student.config.eos_token_id), text("train")
    with tempfile.TemporaryDirectory() as folder:
        train(
            student.requires_grad_(True).train(), stage_loss(teacher, plan, None, seed, ends),
            lambda start: stage_batches(read, plan, 0, seed, start), plan.train, Path(folder),
            on_step=lambda record: records.append(dict(record)),
        )  # fmt: skip
    student.eval()
    return records


@torch.no_grad()
def on_its_own_text(student: HybridLM, teacher: HybridLM, prompts: int) -> float:
    """KL(student || teacher) a token of continuations of so many held-out prompts, drawn with one seed for all."""
    how, slots = Rollouts(), SEQ_LEN // Rollouts().width
    loss = OnPolicy(teacher, DistillLoss(), how, seed=0, ends=end_tokens(student.config.eos_token_id))
    rows = next(
        prompt_batches(
            text("test"), rows=-(-prompts // slots), own_rows=-(-prompts // slots), seq_len=SEQ_LEN, width=how.width,
            prompt_tokens=how.prompt_tokens, seed=0,
        )
    )  # fmt: skip
    written = loss.written(student, rows, 0)
    for start in range(0, len(rows.input_ids), ROWS):
        loss(student, written.rows(start, start + ROWS), counted(written))
    return loss.figures()["rollout_kl"]


def figures(student: HybridLM, teacher: HybridLM, tokens: int, prompts: int) -> dict[str, float]:
    held_out = text("test")
    assert isinstance(held_out, Corpus)
    batches = list(held_out.sample(batch_size=ROWS, seq_len=SEQ_LEN, seed=0, max_tokens=tokens))
    drawn = draw_prompts(held_out, prompts, 64, 0)
    assert drawn is not None
    gap = measure_gap(teacher, {"student": student}, batches, resamples=2).models["student"]
    alike = continuations(teacher, {"student": student}, drawn, NEW, resamples=2)["student"]
    return dict(
        zip(FIGURES, (gap.kl.value, alike.length.value, on_its_own_text(student, teacher, prompts)), strict=True)
    )


def compare_ways(folder: Path, options: argparse.Namespace) -> None:
    """The figures of the student as it is, and after each way with each seed."""
    teacher = load_model(SHIPPED["zoo"]).requires_grad_(False)

    def run(way: str, seed: int) -> dict[str, Any]:
        student = load_model(folder)
        records = [] if way == BEFORE else trained(student, teacher, plan_of(WAYS[way], *plan), seed)
        told = [name for name in ("rollout_length", "rollout_entropy", "rollout_kl") if records and name in records[0]]
        ends = {
            name: [statistics.fmean(record[name] for record in part) for part in (records[:10], records[-10:])]
            for name in told
        }
        return figures(student, teacher, options.tokens, options.prompts) | ends

    plan, seeds = (options.steps, options.rate), [int(seed) for seed in options.seeds.split(",")]
    cells, found = options.output / "cells", dict[str, list[dict[str, Any]]]()
    cells.mkdir(parents=True, exist_ok=True)
    for way in (BEFORE, *options.ways.split(",")):
        named = BEFORE if way == BEFORE else f"{way}, {options.steps} steps at {options.rate:g}"
        found[way] = [
            stored_cell(cells, f"{named}, seed {seed}", functools.partial(run, way, seed))
            for seed in (seeds[:1] if way == BEFORE else seeds)
        ]
    rows = [[way, *(spread([each[name] for each in seeds], 4) for name in FIGURES)] for way, seeds in found.items()]
    print_table(f"{options.steps} steps more, {options.steps * ROWS * SEQ_LEN:,} tokens", ["way", *FIGURES], rows)


def our_side(folder: Path, steps: int) -> dict[str, float]:
    """Seconds a step and bytes of full reverse KL on the student's own text, by `distill.trainer.train`."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what it is now
    student, teacher = load_model(folder), load_model(SHIPPED["zoo"]).requires_grad_(False)
    records = trained(student, teacher, plan_of(WAYS["full"], steps + 1, 1e-4, optimizer="adamw", save_every=10**6), 0)
    reached = [
        record["tokens"] / record["tokens_per_second"] for record in records[:-1]
    ]  # without the last one's state
    seconds = [later - earlier for earlier, later in itertools.pairwise(reached)]
    return {"seconds": statistics.median(seconds), "bytes": status("VmHWM") - before,
            "length": statistics.fmean(record["rollout_length"] for record in records)}  # fmt: skip


def compare_sides(folder: Path, peer: str, steps: int) -> None:
    """Ours and TRL's, each in a process of its own, on the same models and prompts."""
    count = SEQ_LEN // Rollouts().width * ROWS
    prompts = Prompts(text("train"), Rollouts().prompt_tokens, 0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, source in (("student", folder), ("teacher", SHIPPED["zoo"])):
            save_model(load_model(source), root / name, tokenizer_from=SHIPPED["zoo"])
        given = [prompts[number][1].tolist() for number in range((steps + 1) * count)]
        ends = end_tokens(load_model(folder).config.eos_token_id)
        (root / "prompts.json").write_text(
            json.dumps({"prompts": given, "batch": count, "new_tokens": NEW, "ends": ends})
        )
        ours = [sys.executable, "-m", "limbeck.benchmarks.on_policy", str(folder), temporary, "--own", str(steps)]
        theirs = [peer, str(Path(__file__).with_name("on_policy_peer.py")), str(root)]
        found = {name: answer_of(words) for name, words in (("limbeck", ours), ("TRL", theirs))}
    rows = []
    for name, side in found.items():
        rate = count * (Rollouts().prompt_tokens + side["length"]) / side["seconds"]
        rows.append([name, f"{side['seconds']:.2f}", f"{rate:,.0f}", f"{side['bytes'] / 2**20:,.0f}"])
    ratios = [found["TRL"][key] / found["limbeck"][key] for key in ("seconds", "bytes")]
    rows.append(["TRL / limbeck", f"{ratios[0]:.2f}", "", f"{ratios[1]:.2f}"])
    title = f"A step of {count} continuations of {NEW} tokens after prompts of {Rollouts().prompt_tokens}"
    print_table(title, ["", "seconds a step", "tokens a second", "memory, MiB"], rows)


def answer_of(words: Sequence[str]) -> dict[str, float]:
    """The last line of what a process prints, as JSON."""
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--steps", type=int, default=47)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--rate", type=float, default=0.0003)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--peer", help="a Python with TRL")
    parser.add_argument("--peer-steps", type=int, default=4)
    parser.add_argument("--own", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_memory()
    if options.own:
        print(json.dumps(our_side(options.student, options.own)))
        return
    if options.ways:
        compare_ways(options.student, options)
    if options.peer:
        compare_sides(options.student, options.peer, options.peer_steps)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
