"""The rounds of `limbeck compress`: what each does, whether the model allows it, and what it will come to.

Source: Nemotron Nano 2 (arXiv 2508.14444) takes layers first, distils, and takes widths of what that left; the
teacher is the original model every time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

from ..models.config import HybridConfig
from ..models.cost.inference import Hardware, count_parameters
from ..models.errors import InputError
from ..models.fingerprint import plain
from ..prune.choose import select
from ..prune.depth import check_removal, random_layers, step_size
from ..prune.importance import score_random
from ..prune.slice import Selection, slice_config
from ..prune.target import Target, with_widths
from . import distill, memory_fit, prune, score
from .run.compose import build, guess
from .run.show import gib, say, table


@dataclasses.dataclass(frozen=True)
class Round:
    """One way from a model to a smaller, distilled one. `name` is its folder in the output, "" the output itself."""

    name: str
    seed: int
    importance: score.Importance
    target: Target
    repair: prune.Mending
    distill: distill.Distill

    def scored(self, config: HybridConfig) -> score.Importance:
        """How a model of this config is scored: as many layers as the target removes are put in order."""
        layers = self.target.layers
        return self.importance.settled(config, 0 if layers is None else max(config.num_layers - layers, 0))

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Says in which round an input was wrong."""
        try:
            yield
        except InputError as error:
            raise InputError(f"round {self.name}: {error}" if self.name else str(error)) from None


@dataclasses.dataclass(frozen=True)
class Step:
    """A round's way from config to config, and what stays in between."""

    round: Round
    before: HybridConfig
    selection: Selection
    after: HybridConfig

    def left(self, pattern: str) -> HybridConfig:
        """What is left where layers of that pattern stay. Raises InputError where the target cannot be met so."""
        target = with_widths(self.before, pattern, self.round.target)
        return self.after.replace(pattern=pattern, **target.widths)


def make_rounds(base: Round, changes: Sequence[Mapping[str, Any]]) -> tuple[Round, ...]:
    """The rounds, each `base` but for what it says itself; `base` alone where there are none.

    A round has a name, a target, and may have a seed, importance, repair and distill, with what is otherwise there.
    Raises InputError, and where `base` has a target that no round would read.
    """
    if not changes:
        return (base,)
    if base.target != Target():
        raise InputError("target is given beside rounds, each of which has its own; leave it out, or give rounds=[]")
    return tuple(make_round(base, number, found) for number, found in enumerate(changes, 1))


def make_round(base: Round, number: int, changes: Mapping[str, Any]) -> Round:
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
    content = merged(plain(base), {**changes, "name": name})
    try:
        return build(Round, content)
    except InputError as error:
        raise InputError(f"round {name}: {error}") from None


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes, options below options one by one."""
    found = dict(base)
    for key, value in changes.items():
        below = found.get(key)
        found[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def walk(config: HybridConfig, rounds: Sequence[Round], orders: Sequence[Sequence[int]] = ()) -> Iterator[Step]:
    """The rounds on a config alone, by random scores; `orders` are the layers to remove where they are known.

    Raises InputError where a round cannot be done, or would leave what no folder can hold.
    """
    for number, found in enumerate(rounds):
        with found.named():
            order = orders[number] if number < len(orders) else some_layers(config, found)
            selection = select(config, score_random(config, found.seed), order, found.target)
            after = slice_config(config, selection)
            after.to_hf()
        yield Step(found, config, selection, after)
        config = after


def some_layers(config: HybridConfig, found: Round) -> tuple[int, ...]:
    """Layers that might be removed: drawn, and drawn again where one leaves no room for the next."""
    how = found.scored(config)
    assert how.remove_layers is not None
    check_removal(config, how.remove_layers, step_size(config, how.pairs), how.min_layers)
    limits: dict[str, Any] = {"remove": how.remove_layers, "pairs": how.pairs, "min_layers": how.min_layers}
    for seed in range(9):
        with contextlib.suppress(InputError):
            return random_layers(config, seed=seed, **limits).order
    return random_layers(config, seed=9, **limits).order


def leftovers(step: Step, patterns: set[str]) -> set[str]:
    """Every mix of kinds of layers that a round may leave of those; a pattern's order is of no account here.

    Of neighbours removed two at a time any two kinds are taken for possible, so that the mixes are no fewer.
    """
    config, how = step.before, step.round.importance
    named = step.round.target.keep_layers is not None
    if config.family_record.blocks or (named and len(patterns) == 1):
        return {in_kinds(step.after)}
    least = check_removal(config, 0, 1, {} if named else how.min_layers)
    removed = config.num_layers - step.after.num_layers
    found = set()
    for pattern in patterns:
        for letters in combinations_with_replacement(sorted(set(pattern)), removed):
            left = {kind: pattern.count(kind) - letters.count(kind) for kind in sorted(set(pattern))}
            if all(left[kind] >= (least[kind] if kind in letters else 0) for kind in left):
                found.add("".join(kind * count for kind, count in left.items()))
    return found


def in_kinds(config: HybridConfig) -> str:
    """The pattern with like layers side by side, unless they come in blocks."""
    return config.pattern if config.family_record.blocks else "".join(sorted(config.pattern))


def rehearse(config: HybridConfig, rounds: Sequence[Round], hardware: Hardware, fit: memory_fit.Fit) -> None:
    """Prints what the rounds come to: sizes, bytes, tokens, and whether that fits the card. Writes nothing."""
    names, columns, patterns = ["model"], [column([config], hardware, fit, "-")], {in_kinds(config)}
    for step in walk(config, rounds):
        patterns = leftovers(step, patterns)
        outcomes = [step.left(pattern) for pattern in sorted(patterns)]
        names.append(step.round.name or "student")
        columns.append(column(outcomes, hardware, fit, f"{step.round.distill.tokens:,}"))
    budget = gib(hardware.budget(fit.framework_share, fit.reserve_gib, fit.overhead_gib))
    title = f"Dry run: {fit.of(config).length:,} tokens x {fit.batch} within {budget} of {hardware.name}"
    table(title, ["", *names], [(row, *(found[row] for found in columns)) for row in columns[0]])
    if len(patterns) > 1:
        say("Which layers go is known once they are scored; from and to are the least and the most that can be left.")
    for found in rounds:
        for number, stage in enumerate(found.distill.plan(), 1):
            steps = f"{stage.train.steps:,} steps x {stage.batch:,} rows x {stage.seq_len:,}"
            say(f"{f'{found.name} ' if found.name else ''}distill, stage {number}: {steps} = {stage.tokens:,} tokens")
    say(f"tokens to distil in all: {sum(found.distill.tokens for found in rounds):,}")
    say("dry run: of the model only its config was read, and nothing was written")


def column(outcomes: Sequence[HybridConfig], hardware: Hardware, fit: memory_fit.Fit, tokens: str) -> dict[str, str]:
    """What the table says of a model, by row, over the mixes of layers that it may have."""
    like, measured = outcomes[0], [memory_fit.measure(outcome, hardware, fit) for outcome in outcomes]
    fits = [answer.fits for _, answer in measured]
    return {
        "layers": f"{like.num_layers}",
        "hidden": f"{like.hidden_size:,}",
        "FFN": f"{like.intermediate_size:,}" if like.intermediate_size else "-",
        "attention heads": f"{like.num_attention_heads}" if like.num_attention_heads else "-",
        "Mamba heads": f"{like.mamba_num_heads} x {like.mamba_head_dim}" if like.mamba_num_heads else "-",
        "parameters": between([count_parameters(outcome) for outcome in outcomes], lambda count: f"{count:,.0f}"),
        "weights": between([report.weights for report, _ in measured], gib),
        "weights and caches": between([report.total for report, _ in measured], gib),
        "fits": "yes" if all(fits) else "if the right layers go" if any(fits) else "no",
        "tokens to distil": tokens,
    }


def between(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low}\nto {high}"
