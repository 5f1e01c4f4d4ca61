"""`limbeck search`: the sizes that fit a budget, ranked; the best ones distilled briefly, and picked by held-out KL."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from ..distill.options import DistillOptions
from ..distill.state import check_measured, last_figures
from ..models.checkpoint import load_model
from ..models.config import HybridConfig
from ..models.cost.hardware import Hardware
from ..models.device import torch_device, torch_dtype
from ..models.errors import InputError
from ..models.folder import write_json
from ..prune.candidates import BudgetOptions, best_rows, candidate_json, tradeoff_of
from ..prune.patterns import Rules
from ..prune.repair import RepairOptions
from ..prune.scores import Scores, check_width_scores, load_scores
from ..prune.search import (
    Candidate,
    Requests,
    Space,
    find_candidates,
    find_depths,
    pattern_counts,
    ranked,
    with_importance,
)
from ..prune.sliced_loss import sliced_loss
from . import distill, prune
from .run.resolve import NamedData, check_scores, data_input, model_config, model_folder, sample
from .run.show import gib, progress, read_json, result, say, table
from .run.stage import stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    scores: Path | None
    data: NamedData | None
    output: Path
    seed: int
    device: str
    dtype: str
    rank: Literal["memory", "importance", "loss"]
    measure: NonNegativeInt
    loss_tokens: PositiveInt
    listed: PositiveInt
    distill_top: NonNegativeInt
    repair: RepairOptions
    space: Space
    rules: Rules
    budget: BudgetOptions
    requests: Requests
    hardware: Hardware
    distill: DistillOptions

    def __post_init__(self) -> None:
        if self.scores is None and (self.rank != "memory" or self.distill_top):
            needs = f"rank={self.rank}" if self.rank != "memory" else "distill_top"
            raise InputError(f"scores is missing, which {needs} needs; give scores=FOLDER (limbeck score makes it)")
        if self.data is None and self.trains:
            raise InputError("data is missing, which rank=loss and distill_top need; give data=FOLDER, file, or stdlib")
        if self.distill_top:
            check_measured(self.distill.train.evaluate_every, self.distill.train.average_states)

    @property
    def trains(self) -> bool:
        """Whether weights and text are needed."""
        return self.rank == "loss" or self.distill_top > 0


def run(options: Options) -> None:
    options.distill.check_one_size("search")
    inputs: dict[str, Any] = {}
    if options.trains:
        assert options.data is not None
        inputs |= {"model": model_folder(options.model), "data": data_input(options.data)}
    elif options.data is not None:
        say(f"note: data= is not read: rank={options.rank} needs no text (rank=loss and distill_top would)")
    config, scores = model_config(options.model), None
    inputs.setdefault("model", json.dumps(config.to_hf(), sort_keys=True))
    if options.scores is not None:
        inputs["scores"], scores = options.scores, load_scores(options.scores)
        check_width_scores(config, scores.widths, f"scores={options.scores}")
    depths = find_depths(config, options.space, options.rules, scores.layers if scores else None)
    budget = options.budget.limit(options.hardware)
    space = find_candidates(config, options.space, depths, budget, options.hardware, options.requests)
    chosen = {k: v for k, v in vars(options).items() if k not in ("model", "scores", "data", "output", "device")}
    with stage(options.output, "search", inputs=inputs, options=chosen, scratch="work") as work:
        if not work.finished:
            candidates: Sequence[Candidate] = space.candidates
            if scores is not None:
                if options.trains:
                    check_scores(inputs["scores"], work.content()["inputs"]["model"], options.model)
                candidates = with_importance(config, scores.widths, candidates)
            if options.rank == "loss":
                assert scores is not None
                candidates = with_loss(work.folder / "work" / "losses", options, config, scores, candidates)
            candidates = ranked(candidates, options.rank)
            picks = distil(work.folder, options, candidates[: options.distill_top])
            listed = candidates[: max(options.listed, options.distill_top)]
            content = {
                "rank": options.rank,
                "budget_bytes": budget.bytes,
                "combinations": space.combinations,
                "aligned": space.aligned,
                "fit": len(candidates),
                "patterns": pattern_counts(config, space.candidates, options.rules),
                "picks": picks,
                "candidates": [candidate_json(candidate, rank) for rank, candidate in enumerate(listed, 1)],
            }
            write_json(work.folder / "candidates.json", content)
            draw(work.folder, candidates, [pick["name"] for pick in picks] or [candidates[0].name])
    content = read_json(options.output / "candidates.json")
    print_candidates(content)
    best = content["picks"][0]["name"] if content["picks"] else content["candidates"][0]["name"]
    (words,) = (candidate["prune"] for candidate in content["candidates"] if candidate["name"] == best)
    say(f"prune to {best}: {words or 'nothing to prune'}")
    result(options.output, {"candidates": str(options.output / "candidates.json"), "best": best, "prune": words})


def with_loss(
    folder: Path, options: Options, config: HybridConfig, scores: Scores, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Measures the first candidates by importance; a file in `folder` for each, so that a kill loses one at most."""
    assert options.data is not None
    source = model_folder(options.model)
    rows = {"seq_len": options.distill.seq_len, "batch": options.distill.batch, "seed": options.seed}
    batches = sample(options.data, "train", source, tokens=options.loss_tokens, **rows)
    calibration, repair = [], options.repair.repair(with_data=True)
    if repair.needs_data:
        calibration = sample(options.data, "train", source, tokens=options.repair.tokens, **rows)
    first = ranked(candidates, "importance")[: options.measure or None]
    folder.mkdir(parents=True, exist_ok=True)
    losses, model = dict[str, float](), None
    with progress("measuring losses", len(first)) as bar:
        for done, candidate in enumerate(first, 1):
            file = folder / f"{candidate.name}.json"
            if not file.exists():
                model = model or load_model(source, torch_dtype(options.dtype), torch_device(options.device))
                selection = candidate.selection(config, scores.widths)
                loss = sliced_loss(model, selection, batches, repair, calibration)
                write_json(file, {"loss": loss})
            losses[candidate.name] = read_json(file)["loss"]
            bar.set(done, note=f"lowest {min(losses.values()):.3f}")
    return [dataclasses.replace(candidate, loss=losses.get(candidate.name)) for candidate in candidates]


def distil(folder: Path, options: Options, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """A student of each, pruned in work/ and trained into students/NAME; best first by the held-out KL."""
    picks = []
    for candidate in candidates:
        assert options.scores is not None and options.data is not None
        pruned, student = folder / "work" / candidate.name, folder / "students" / candidate.name
        say(f"distilling {candidate.name}")
        prune.prune(
            prune.Options(options.model, options.scores, pruned, candidate.target, options.repair, options.data,
                          options.distill.seq_len, options.distill.batch, options.seed, options.device, options.dtype)
        )  # fmt: skip
        distill.train_student(
            distill.Options(options.model, str(pruned), options.data, student, options.seed, options.device,
                            options.dtype, options.distill)
        )  # fmt: skip
        left = last_figures(student, ["validation_kl", "validation_bits_per_byte", "validation_agreement"])
        figures = {name.removeprefix("validation_"): value for name, value in left.items()}
        picks.append({"name": candidate.name, "folder": f"students/{candidate.name}"} | figures)
    return sorted(picks, key=lambda pick: (pick["kl"], pick["name"]))


def draw(folder: Path, candidates: Sequence[Candidate], named: Sequence[str]) -> None:
    from ..distill.report.plots import save_png, save_svg, tradeoff

    shown = tradeoff_of(candidates, named)
    figure = tradeoff(shown.points, shown.front, shown.named, title=shown.title, xlabel=f"memory ({shown.unit})")
    for save in (save_svg, save_png):
        save(figure, folder, "search")


def print_candidates(content: dict[str, Any]) -> None:
    """The best ten, and the picks."""
    say(
        f"{content['combinations']:,} combinations, {content['aligned']:,} aligned,"
        f" {content['fit']:,} within {gib(content['budget_bytes'])}"
    )
    for layers, count in content["patterns"].items():
        say(f"{layers} layers: {count:,} different patterns can be left within the rules")
    table(f"Best by {content['rank']}", *best_rows(content, 10))
    if content["picks"]:
        picked = [
            (pick["name"], f"{pick['kl']:.4f}", f"{pick['bits_per_byte']:.4f}", f"{pick['agreement']:.1%}")
            for pick in content["picks"]
        ]
        table("Distilled briefly, by held-out KL", ("candidate", "KL", "bits per byte", "top-1 agreement"), picked)
