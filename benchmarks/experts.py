"""What experts are worth by every score, merged or dropped, beside other axes: tables of docs/RESULTS.md.

    python -m limbeck.benchmarks.experts OUTPUT [--model FOLDER] [--parts scores,merging,...] [--seeds 0,1,2]
        [--scores reap,logits,...] [--rate 0.0005]

Cells, seeds, held-out text and brackets are those of benchmarks/pruning.py. 25% and 50% are of the experts' parameters;
other axes are cut to the same total, or to the same that a token meets, of parameters. Figures are what is added to the
held-out loss (nats a token), slices as they are unless said otherwise. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from limbeck.benchmarks.cells import print_table, spread
from limbeck.benchmarks.pruning import PLAIN, Bench, Subject
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.errors import InputError
from limbeck.models.kinds import score_sources
from limbeck.models.named import model_folder
from limbeck.models.provenance import provenance
from limbeck.prune.choose import select
from limbeck.prune.importance import score_widths
from limbeck.prune.repair import Repair
from limbeck.prune.scores import WidthScores
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores

Count = Callable[[HybridConfig], int]
SHARES = (0.25, 0.5)
FITTED = Repair(norms="measured", least_squares=True)
WHOLE = (0.75, 0.5, 0.0)


def subject(folder: Path, rate: float) -> Subject:
    return Subject(
        folder.name, folder, 8192, 8192, 16384, {}, Target(), Target(), (), steps=60, batch=4, optimizer="muon",
        learning_rates=(rate,), repairs=(), distilled=(), ablated=False,
    )  # fmt: skip


def added(bench: Bench, name: str, target: Target, method: str, seeds: Sequence[int], repair: Repair = PLAIN) -> str:
    """What a cut by a method's scores adds to the loss, over seeds."""

    def loss(seed: int) -> dict[str, Any]:
        selection = select(bench.model.config, widths_by(bench, method, seed), (), target)
        return {"loss": bench.loss(bench.pruned(selection, seed, repair))}

    cells = [bench.cell(f"{name}, seed {seed}", functools.partial(loss, seed)) for seed in seeds]
    return spread([cell["loss"] - bench.base() for cell in cells])


@functools.cache
def widths_by(bench: Bench, method: str, seed: int) -> WidthScores:
    """Scores by a value of `expert_source`, or by another method."""
    if method in ("random", "magnitude", "taylor"):
        return bench.widths(method, seed)
    return score_widths(bench.model, bench.calibration(seed), ActivationScores(expert_source=method))


def experts_left(config: HybridConfig, share: float) -> Target:
    return Target(n_routed_experts=round(config.n_routed_experts * (1 - share)))


def known_scores() -> list[str]:
    source = score_sources()["experts"]
    return ["random", "magnitude", "taylor", *source.observed, *([source.left_out] if source.left_out else [])]


def score_table(bench: Bench, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """Every score, experts dropped, and with what is left refitted."""
    config = bench.model.config
    rows = []
    for method in methods:
        row = [method]
        for share in SHARES:
            for how, repair in (("", PLAIN), (", refitted", FITTED)):
                name = f"{share:.0%} of the experts gone by {method}{how}"
                row.append(added(bench, name, experts_left(config, share), method, seeds, repair))
        rows.append(row)
    columns = ["score", *(f"{share:.0%}{how}" for share in SHARES for how in ("", ", refitted"))]
    print_table(f"{bench.subject.name}: added by experts gone (of {config.n_routed_experts})", columns, rows)


def merging_table(bench: Bench, seeds: Sequence[int]) -> None:
    """Dropped, or taken in by those that stay, of which a share stays whole."""
    config, rows = bench.model.config, []
    for whole in (None, *WHOLE):
        row = ["dropped" if whole is None else f"{whole:.0%} whole"]
        for share in SHARES:
            for how, fit in (("", False), (", refitted", True)):
                repair = Repair(norms="measured" if fit else "none", least_squares=fit, whole_experts=whole)
                name = f"{share:.0%} of the experts, {row[0]}{how}"
                row.append(added(bench, name, experts_left(config, share), "reap", seeds, repair))
        rows.append(row)
    columns = ["", *(f"{share:.0%}{how}" for share in SHARES for how in ("", ", refitted"))]
    print_table(f"{bench.subject.name}: added by experts merged or dropped (REAP)", columns, rows)


def sized(
    config: HybridConfig, field: str, goal: int, count: Callable[[HybridConfig], int], step: int
) -> Target | None:
    """The largest width, a multiple of `step`, with `goal` parameters at most; None where there is none."""
    for size in range(getattr(config, field) // step * step, 0, -step):
        try:
            smaller = config.replace(**{field: size})
        except InputError:  # fewer experts than a token takes
            return None
        if count(smaller) <= goal:
            return Target(**{field: size})  # type: ignore[arg-type]
    return None


def equal_cuts(config: HybridConfig, share: float) -> dict[str, dict[str, Target]]:
    """Cuts of equal total, and of equal active parameters: by experts and by their width what the share takes."""
    fewer = experts_left(config, share)
    narrower = Target(moe_intermediate_size=round(config.moe_intermediate_size * (1 - share)))
    total, active = count_parameters(config.replace(**fewer.widths)), count_active(config.replace(**narrower.widths))
    fields = {
        "experts": ("n_routed_experts", 1), "expert width": ("moe_intermediate_size", 1), "hidden": ("hidden_size", 4),
        "experts a token": ("num_experts_per_tok", 1),
    }  # fmt: skip
    found: dict[str, dict[str, Target]] = {}
    for kind, goal, count in (("total", total, count_parameters), ("active", active, count_active)):
        cuts = {name: sized(config, field, goal, count, step) for name, (field, step) in fields.items()}
        changes = {name: cut for name, cut in cuts.items() if cut is not None}
        # A width that alone takes away far more than was to go is no match.
        found[kind] = {n: c for n, c in changes.items() if count(config.replace(**c.widths)) >= 0.97 * goal}
    return found


def axis_table(bench: Bench, seeds: Sequence[int]) -> None:
    config = bench.model.config
    for kind in ("total", "active"):
        rows = []
        for share in SHARES:
            for axis, target in equal_cuts(config, share)[kind].items():
                (said,) = (f"{getattr(config, field)} to {size}" for field, size in target.widths.items())
                smaller = config.replace(**target.widths)
                row = [f"{share:.0%}", f"{axis} {said}", f"{count_parameters(smaller):,}", f"{count_active(smaller):,}"]
                for how, repair in (("", PLAIN), (", refitted", FITTED)):
                    name = f"equal {kind}, {share:.0%}, {axis}{how}"
                    row.append(added(bench, name, target, "reap", seeds, repair))
                rows.append(row)
        title = f"{bench.subject.name}: added at equal {kind} parameters (whole {count_parameters(config):,})"
        print_table(title, ["of the experts' parameters", "cut", "parameters", "active", "added", "refitted"], rows)


def distill_table(bench: Bench, seeds: Sequence[int], kind: str = "total") -> None:
    """After a little training: axes at equal parameters, and experts merged."""
    config, rows = bench.model.config, []
    for share in SHARES:
        named = "" if kind == "total" else f"equal {kind}, "
        cuts = equal_cuts(config, share)[kind]
        cases: dict[str, tuple[Target, float | None]] = {f"{named}{axis}": (cuts[axis], None) for axis in cuts}
        if kind == "total":
            cases["experts, half of them merged into"] = (experts_left(config, share), 0.5)
        for case, (target, whole) in cases.items():
            values = [distilled(bench, f"{share:.0%}, {case}", target, "reap", whole, seed) for seed in seeds]
            rows.append([f"{share:.0%}", case, spread(values)])
    print_table(f"{bench.subject.name}: added after {trained_tokens(bench):,} tokens", ["", "cut", "added"], rows)


def distilled_scores(bench: Bench, seeds: Sequence[int], methods: Sequence[str]) -> None:
    """After a little training: experts gone by every score."""
    named = {"reap": "experts", "random": "experts at random"}
    rows = []
    for method in methods:
        row = [method]
        for share in SHARES:
            name, target = named.get(method, f"experts by {method}"), experts_left(bench.model.config, share)
            values = [distilled(bench, f"{share:.0%}, {name}", target, method, None, seed) for seed in seeds]
            row.append(spread(values))
        rows.append(row)
    title = f"{bench.subject.name}: added by experts gone, after {trained_tokens(bench):,} tokens"
    print_table(title, ["score", *(f"{share:.0%}" for share in SHARES)], rows)


def trained_tokens(bench: Bench) -> int:
    return bench.subject.steps * bench.subject.batch * bench.subject.seq_len


def distilled(bench: Bench, name: str, target: Target, method: str, whole: float | None, seed: int) -> float:
    (rate,) = bench.subject.learning_rates

    def make() -> dict[str, Any]:
        selection = select(bench.model.config, widths_by(bench, method, seed), (), target)
        repair = Repair(rotate=True, least_squares=True, whole_experts=whole)
        return {"loss": bench.loss(bench.distilled(bench.pruned(selection, seed, repair), rate))}

    return bench.cell(f"distilled, {name}, seed {seed}", make)["loss"] - bench.base()


def state_table(bench: Bench, seeds: Sequence[int]) -> None:
    """The SSM state beside heads and head channels at equal parameters: those that a quarter of the heads takes, and
    those that half of the state takes, which no whole number of heads may match."""
    config, rows = bench.model.config, []
    fewer = config.replace(mamba_num_heads=config.mamba_num_heads * 3 // 4)
    half = config.replace(ssm_state_size=config.ssm_state_size // 2)
    for goal in (count_parameters(fewer), count_parameters(half)):
        for field, step in (("ssm_state_size", 4), ("mamba_num_heads", config.n_groups), ("mamba_head_dim", 1)):
            target = sized(config, field, goal, count_parameters, step)
            if target is None or count_parameters(config.replace(**target.widths)) < 0.99 * goal:
                continue
            said = f"{field} {getattr(config, field)} to {target.widths[field]}"
            row = [said, f"{count_parameters(config.replace(**target.widths)):,}"]
            for how, repair in (("", PLAIN), (", refitted", FITTED)):
                row.append(added(bench, f"{said}{how}", target, "reap", seeds, repair))
            rows.append(row)
    print_table(f"{bench.subject.name}: Mamba-2 layers", ["cut", "parameters", "added", "refitted"], rows)


PARTS: dict[str, Callable[..., None]] = {
    "scores": score_table, "merging": merging_table, "axes": axis_table, "distill": distill_table,
    "distill-active": functools.partial(distill_table, kind="active"), "distill-scores": distilled_scores,
    "state": state_table,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the cells, made where it is not there")
    parser.add_argument("--model", default="zoo-moe", help="a folder, or the name of a shipped model")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rate", type=float, default=5e-4, help="of Muon, in the parts that train")
    parser.add_argument("--scores", default=",".join(known_scores()), help="of the parts of scores, comma-separated")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    bench = Bench(subject(model_folder(options.model), options.rate), options.output / "cells")
    for part in options.parts.split(","):
        more = (options.scores.split(","),) if part.endswith("scores") else ()
        PARTS[part](bench, [int(seed) for seed in options.seeds.split(",")], *more)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
