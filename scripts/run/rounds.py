"""The rounds of `limbeck compress`: each a way from a model to a smaller, distilled one; and what they will come to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...distill.options import DistillOptions
from ...distill.report.gap_rows import won_back
from ...distill.rollouts import check_plan
from ...distill.stages import check_reads
from ...models.axes import AXES, AxisRow
from ...models.checkpoint import open_checkpoint
from ...models.config import HybridConfig
from ...models.cost.fit import Fit
from ...models.cost.hardware import Hardware
from ...models.cost.parameters import count_active, count_parameters
from ...models.errors import InputError, guess
from ...models.fingerprint import plain
from ...models.tokenizer import check_vocabulary, load_tokenizer
from ...prune.repair import RepairOptions
from ...prune.rounds import Cut, in_kinds, leftovers, named_round, plan_cuts
from ...prune.scoring import Importance
from ...prune.target import Target
from .compose import build
from .resolve import NamedData, corpus
from .show import gib, progress, say, table


@dataclasses.dataclass(frozen=True)
class Round:
    """One way from a model to a smaller, distilled one. `name` is its folder in the output, "" the output itself."""

    name: str
    seed: int
    importance: Importance
    target: Target
    repair: RepairOptions
    distill: DistillOptions

    @property
    def cut(self) -> Cut:
        how = self.importance
        return Cut(self.name, self.seed, self.target, how.remove_layers, how.pairs, how.min_layers)

    def ways(self, last: bool) -> dict[str, Round]:
        """How its model is cut, by folder: "pruned", which is distilled; before it, where the last round repairs,
        "plain": without repair, to show what repair is worth."""
        repair = self.repair.repair(with_data=True)
        plain = dataclasses.replace(self, repair=RepairOptions(rotate=False, least_squares=False))
        return ({"plain": plain} if last and repair.needs_data else {}) | {"pruned": self}

    @property
    def reads_text(self) -> bool:
        """Whether its repair does."""
        return self.repair.repair(with_data=True).needs_data

    def scored(self, config: HybridConfig) -> Importance:
        """How a model of this config is scored: as many layers as the target removes are put in order."""
        return self.importance.settled(config, self.cut.removed(config))


def rounds_of(base: Round, changes: Sequence[Mapping[str, Any]]) -> tuple[Round, ...]:
    """The rounds, each `base` but for what it says itself; `base` alone where there are none.

    A round has a name, a target, and may have a seed, importance, repair and distill, with what is otherwise there.
    Raises InputError, and where `base` has a target that no round would read.
    """
    if not changes:
        return (base,)
    if base.target != Target():
        raise InputError("target is given beside rounds, each of which has its own; leave it out, or give rounds=[]")
    return tuple(round_of(base, number, change) for number, change in enumerate(changes, 1))


def round_of(base: Round, number: int, changes: Mapping[str, Any]) -> Round:
    where = f"rounds[{number - 1}]"
    known = [field.name for field in dataclasses.fields(Round)]
    for key in changes:
        if key not in known:
            raise InputError(f"{where}.{key} is no option here{guess(key, known)}; known: {', '.join(known)}")
    name = changes.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{where}.name is {name!r}; expected a text of letters, numbers, - and _, such as depth")
    name = f"{number}-{name}"
    target = changes.get("target") or {}
    if isinstance(target, Mapping) and all(value is None for value in target.values()):
        raise InputError(f"round {name} has no target; expected a size, such as target: {{layers: 10}}")
    with named_round(name):
        return build(Round, merged(plain(base), {**changes, "name": name}))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes, options below options one by one."""
    content = dict(base)
    for key, value in changes.items():
        below = content.get(key)
        content[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return content


def check_feasible(data: NamedData, source: Path, rounds: Sequence[Round], *, whole: bool) -> None:
    """Finds what is wrong with model, targets, training and data before the first folder is written; in training a
    student is `whole` in every process, or split among them. Raises InputError."""
    config = open_checkpoint(source).config
    list(plan_cuts(config, [one.cut for one in rounds]))  # every round is checked as its turn comes
    check_vocabulary(load_tokenizer(source), config)
    for one in rounds:
        with named_round(one.name):
            one.distill.check_one_size("compress")
            check_plan(one.distill.plan(), config, whole)
            check_reads(lambda split: corpus(data, split, source), one.distill, data)


def student_folders(out: Path, rounds: Sequence[Round]) -> dict[str, Path]:
    """The students of all rounds by name; those of the last are "pruned" and "distilled", of which recovery is told,
    and where its pruned one is repaired, "plain" before them is not."""
    folders = {}
    for one in rounds:
        last = one is rounds[-1]
        for name in (*one.ways(last), "distilled"):
            folders[name if last else f"{one.name} {name}"] = out / one.name / name
    return folders


def rehearse(config: HybridConfig, rounds: Sequence[Round], hardware: Hardware, fit: Fit) -> None:
    """Prints what the rounds come to: sizes, bytes, tokens, and whether that fits the card. Writes nothing."""
    names, patterns = ["model", *(one.name or "student" for one in rounds)], {in_kinds(config)}
    steps = plan_cuts(config, [one.cut for one in rounds])
    with progress("estimating the memory", len(names)) as bar:
        columns = [column([config], hardware, fit, "-")]
        for one, step in zip(rounds, steps, strict=True):
            one.distill.check_one_size("compress")
            bar.set(len(columns))
            patterns = leftovers(step, patterns)
            outcomes = [step.left(pattern) for pattern in sorted(patterns)]
            columns.append(column(outcomes, hardware, fit, f"{one.distill.tokens:,}"))
        bar.set(len(columns))
    budget = gib(fit.budget(hardware))
    title = f"Dry run: {fit.of(config).length:,} tokens x {fit.batch} within {budget} of {hardware.name}"
    rows = [(row, *(values[row] for values in columns)) for row in columns[0]]
    table(title, ["", *names], [row for row in rows if set(row[1:]) != {"-"}])  # no widths that no model has
    if len(patterns) > 1:
        say("Which layers go is known once they are scored; from and to are the least and the most that can be left.")
    for one in rounds:
        for number, stage in enumerate(one.distill.plan(), 1):
            size = f"{stage.train.steps:,} steps x {stage.batch:,} rows x {stage.seq_len:,}"
            say(f"{f'{one.name} ' if one.name else ''}distill, stage {number}: {size} = {stage.tokens:,} tokens")
    say(f"tokens to distil in all: {sum(one.distill.tokens for one in rounds):,}")
    say("dry run: of the model only its config was read, and nothing was written")


def column(outcomes: Sequence[HybridConfig], hardware: Hardware, fit: Fit, tokens: str) -> dict[str, str]:
    """What the table says of a model, by row, over the mixes of layers that it may have."""
    like, estimates = outcomes[0], [fit.estimate(outcome, hardware) for outcome in outcomes]
    fits = [estimate.fits for estimate in estimates]
    return {
        "layers": f"{like.num_hidden_layers}",
        **{row.title: width(like, row) for row in AXES.values() if row.within is None},
        "parameters": between([count_parameters(outcome) for outcome in outcomes], lambda count: f"{count:,.0f}"),
        "active parameters": active(outcomes),
        "weights": between([estimate.memory.weights for estimate in estimates], gib),
        "weights and caches": between([estimate.memory.total for estimate in estimates], gib),
        "fits": "yes" if all(fits) else "if the right layers go" if any(fits) else "no",
        "tokens to distil": tokens,
    }


def active(outcomes: Sequence[HybridConfig]) -> str:
    """Parameters that a token meets; "-" where these are all."""
    counts = [count_active(outcome) for outcome in outcomes]
    return between(counts, lambda count: f"{count:,.0f}") if counts[0] < count_parameters(outcomes[0]) else "-"


def width(config: HybridConfig, row: AxisRow) -> str:
    """A width with those within it, such as "16 x 64"; "-" where the config has none."""
    inner = [other.width for other in AXES.values() if other.within == row.name]
    sizes = [getattr(config, name, 0) for name in (row.width, *inner)]
    return " x ".join(f"{size:,}" for size in sizes) if sizes[0] else "-"


def between(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}\nto {high}"


def print_figures(gap: Mapping[str, Any], configs: Mapping[str, HybridConfig], hardware: Hardware, fit: Fit) -> None:
    """The table of what matters: of each model (the teacher first) its size, its gap, and its memory on the card."""
    rows = []
    for name, config in configs.items():
        figures = gap["models"][name]
        values = [f"{figures[key]['value']:.4f}" for key in ("bits_per_byte", "kl")]
        share, total = f"{figures['agreement']['value']:.1%}", fit.estimate(config, hardware).memory.total
        rows.append((name, f"{count_parameters(config):,}", *values, share, gib(total)))
    length = fit.of(configs["teacher"]).length
    context = f"memory at {length:,} tokens x {fit.batch}"
    table("", ("model", "parameters", "bits per byte", "KL", "top-1 agreement", context), rows)


def from_plain(gap: Mapping[str, Any]) -> str:
    """How much of what the selection alone loses is won back, where the pruned student is repaired."""
    share = won_back(gap)
    return "" if share is None else f", {share:.1%} of what it loses without repair"
