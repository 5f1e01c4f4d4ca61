"""`limbeck search`: the sizes that fit a budget, ranked; the best ones distilled briefly, and picked by held-out KL."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..distill.options import DistillOptions
from ..distill.report.plots import save_png, save_svg, tradeoff
from ..models.checkpoint import load_model
from ..models.config import HybridConfig
from ..models.cost.hardware import GIB, Hardware
from ..models.errors import InputError
from ..models.folder import write_json
from ..prune.patterns import Rules, count_patterns
from ..prune.scores import Scores, check_width_scores, load_scores
from ..prune.search import (
    RANKS,
    Budget,
    Candidate,
    Found,
    Requests,
    Space,
    find_candidates,
    find_depths,
    pareto,
    ranked,
    sliced_loss,
    with_importance,
)
from . import distill, prune
from .run.resolve import data_input, model_config, model_folder, sample, torch_device, torch_dtype
from .run.show import gib, progress, read_json, result, say, table
from .run.stage import run_stage


@dataclasses.dataclass(frozen=True)
class Limits:
    """What has to fit: `gib`, or what the card has less framework, reserve and overhead."""

    gib: float | None
    framework_share: float
    reserve_gib: float
    overhead_gib: float
    context: int
    batch: int
    weight_dtype: str
    kv_dtype: str
    ssm_dtype: str
    conv_dtype: str

    def __post_init__(self) -> None:
        if not 0 <= self.framework_share < 1 or self.reserve_gib < 0 or self.overhead_gib < 0:
            raise InputError(
                "budget: framework_share must be in [0, 1), reserve_gib and overhead_gib at least 0; found"
                f" {self.framework_share:g}, {self.reserve_gib:g}, {self.overhead_gib:g}"
            )

    def budget(self, hardware: Hardware) -> Budget:
        """In bytes. Raises InputError where nothing is left."""
        room = hardware.budget(self.framework_share, self.reserve_gib, self.overhead_gib)
        room = room if self.gib is None else self.gib * GIB
        if not room > 0:
            raise InputError(
                f"budget: {room / GIB:g} GiB are left on {hardware.name}; expected more than 0 (budget.gib=NUMBER)"
            )
        names = ("weight_dtype", "kv_dtype", "ssm_dtype", "conv_dtype")
        return Budget(room, self.context, self.batch, {name: torch_dtype(getattr(self, name)) for name in names})


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    scores: Path | None
    data: str | None
    output: Path
    seed: int
    device: str
    dtype: str
    rank: str
    measure: int
    loss_tokens: int
    listed: int
    distill_top: int
    repair: prune.Mending
    space: Space
    rules: Rules
    budget: Limits
    requests: Requests
    hardware: Hardware
    distill: DistillOptions

    def __post_init__(self) -> None:
        if self.rank not in RANKS:
            raise InputError(f"rank is {self.rank!r}; known: {', '.join(RANKS)}")
        if min(self.measure, self.distill_top) < 0 or min(self.listed, self.loss_tokens) < 1:
            raise InputError("measure and distill_top must be at least 0, listed and loss_tokens at least 1")
        if self.scores is None and (self.rank != "memory" or self.distill_top):
            asked = f"rank={self.rank}" if self.rank != "memory" else "distill_top"
            raise InputError(f"scores is missing, which {asked} needs; give scores=FOLDER (limbeck score makes it)")
        if self.data is None and self.trains:
            raise InputError(
                "data is missing, which rank=loss and distill_top need; give data=FOLDER, a file, or stdlib"
            )
        if self.distill_top and not self.distill.train.evaluate_every:
            raise InputError("distill.train.evaluate_every is 0; picks are made by the held-out KL, give at least 1")

    @property
    def trains(self) -> bool:
        """Whether weights and text are needed."""
        return self.rank == "loss" or self.distill_top > 0


def run(options: Options) -> None:
    inputs: dict[str, Any] = {}
    if options.trains:
        assert options.data is not None
        inputs |= {"model": model_folder(options.model), "data": data_input(options.data)}
    config = model_config(options.model)
    inputs.setdefault("model", json.dumps(config.to_hf(), sort_keys=True))
    scores = None
    if options.scores is not None:
        inputs["scores"] = options.scores
        scores = load_scores(options.scores)
        check_width_scores(config, scores.widths, f"scores={options.scores}")
    depths = find_depths(config, options.space, options.rules, scores.layers if scores else None)
    budget = options.budget.budget(options.hardware)
    found = find_candidates(config, options.space, depths, budget, options.hardware, options.requests)
    chosen = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("model", "scores", "data", "output", "device")
    }
    run_stage(
        options.output,
        name="search",
        inputs=inputs,
        options=chosen,
        make=lambda folder, facts: fill(folder, options, config, scores, found, budget),
        scratch="work",
    )
    content = read_json(options.output / "candidates.json")
    show(content)
    best = content["picks"][0]["name"] if content["picks"] else content["candidates"][0]["name"]
    (words,) = (candidate["prune"] for candidate in content["candidates"] if candidate["name"] == best)
    say(f"prune to {best}: {words or 'nothing to prune'}")
    result(options.output, {"candidates": str(options.output / "candidates.json"), "best": best, "prune": words})


def fill(
    folder: Path, options: Options, config: HybridConfig, scores: Scores | None, found: Found, budget: Budget
) -> None:
    """candidates.json, its plot, and students/NAME of the first ones; what is measured on the way stays in work/."""
    candidates: Sequence[Candidate] = found.candidates
    if scores is not None:
        candidates = with_importance(config, scores.widths, candidates)
    if options.rank == "loss":
        assert scores is not None
        candidates = with_loss(folder / "work" / "losses", options, config, scores, candidates)
    candidates = ranked(candidates, options.rank)
    picks = distil(folder, options, candidates[: options.distill_top])
    listed = candidates[: max(options.listed, options.distill_top)]
    lengths = sorted({candidate.config.num_layers for candidate in found.candidates})
    content = {
        "rank": options.rank,
        "budget_bytes": budget.bytes,
        "combinations": found.combinations,
        "aligned": found.aligned,
        "fit": len(candidates),
        "patterns": {str(length): count_patterns(config.pattern, length, options.rules) for length in lengths},
        "picks": picks,
        "candidates": [as_json(candidate, rank) for rank, candidate in enumerate(listed, 1)],
    }
    write_json(folder / "candidates.json", content)
    draw(folder, candidates, [pick["name"] for pick in picks] or [candidates[0].name])


def with_loss(
    folder: Path, options: Options, config: HybridConfig, scores: Scores, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Measures the first candidates by importance; a file in `folder` for each, so that a kill loses one at most."""
    assert options.data is not None
    source = model_folder(options.model)
    how = options.distill
    rows: dict[str, Any] = {"seq_len": how.seq_len, "batch": how.batch, "seed": options.seed}
    batches = sample(options.data, "train", source, tokens=options.loss_tokens, **rows)
    calibration, mend = [], options.repair.repair(options.data)
    if mend.needs_data:
        calibration = sample(options.data, "train", source, tokens=options.repair.tokens, **rows)
    first = ranked(candidates, "importance")[: options.measure or None]
    folder.mkdir(parents=True, exist_ok=True)
    losses: dict[str, float] = {}
    model = None
    with progress("measuring losses", len(first)) as bar:
        for done, candidate in enumerate(first, 1):
            file = folder / f"{candidate.name}.json"
            if not file.exists():
                model = model or load_model(source, torch_dtype(options.dtype), torch_device(options.device))
                selection = candidate.selection(config, scores.widths)
                loss = sliced_loss(model, selection, batches, mend, calibration)
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
        prune.make(
            prune.Options(
                options.model, options.scores, pruned, candidate.target, options.repair, options.data,
                options.distill.seq_len, options.distill.batch, options.seed, options.device, options.dtype,
            )
        )  # fmt: skip
        distill.make(
            distill.Options(options.model, str(pruned), options.data, student, options.seed, options.device,
                            options.dtype, options.distill)
        )  # fmt: skip
        last = json.loads((student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        figures = {name: last[f"validation_{name}"] for name in ("kl", "bits_per_byte", "agreement")}
        picks.append({"name": candidate.name, **figures, "folder": f"students/{candidate.name}"})
    return sorted(picks, key=lambda pick: (pick["kl"], pick["name"]))


def as_json(candidate: Candidate, rank: int) -> dict[str, Any]:
    report = candidate.memory
    return {
        "rank": rank,
        "name": candidate.name,
        "prune": shlex.join(candidate.words()),
        "target": {name: value for name, value in dataclasses.asdict(candidate.target).items() if value is not None},
        "pattern": candidate.config.pattern,
        "layers": list(candidate.depth.layers),
        "parameters": candidate.parameters,
        "memory": {name: getattr(report, name) for name in ("weights", "kv", "ssm", "conv", "total")},
        "throughput": None if candidate.throughput is None else dataclasses.asdict(candidate.throughput),
        "importance": candidate.importance,
        "loss": candidate.loss,
    }


def draw(folder: Path, candidates: Sequence[Candidate], named: Sequence[str]) -> None:
    """The best value for the bytes: loss where it is measured, else importance, else tokens/s or parameters."""
    unit, name = (GIB, "GiB") if candidates[0].memory.total >= GIB else (2**20, "MiB")
    shown = [candidate for candidate in candidates if candidate.loss is not None] or list(candidates)
    x = [candidate.memory.total / unit for candidate in shown]
    cost, sign = x, 1
    if shown[0].loss is not None:
        title, y, sign = "Loss of the model cut in memory (nats a token)", [float(c.loss or 0) for c in shown], -1
    elif shown[0].importance is not None:
        title, y = "Share of the importance that stays", [float(c.importance or 0) for c in shown]
    elif any(candidate.throughput for candidate in shown):
        title, y = "Estimated tokens/s", [c.throughput.tokens_per_second if c.throughput else 0.0 for c in shown]
        cost = [-size for size in x]  # with nothing known of quality, more bytes stand for it
    else:
        title, y = "Parameters", [float(candidate.parameters) for candidate in shown]
    front = pareto([(c, sign * value) for c, value in zip(cost, y, strict=True)])
    places = {candidate.name: index for index, candidate in enumerate(shown) if candidate.name in named}
    figure = tradeoff(list(zip(x, y, strict=True)), front, places, title=title, xlabel=f"memory ({name})")
    save_svg(figure, folder, "search")
    save_png(figure, folder, "search")


def show(content: dict[str, Any]) -> None:
    """The best ten, and the picks."""
    say(
        f"{content['combinations']:,} combinations, {content['aligned']:,} aligned,"
        f" {content['fit']:,} within {gib(content['budget_bytes'])}"
    )
    for layers, count in content["patterns"].items():
        say(f"{layers} layers: {count:,} different patterns can be left within the rules")
    proxies = [key for key in ("loss", "importance") if content["candidates"][0][key] is not None]
    rows = []
    for candidate in content["candidates"][:10]:
        speed, total = candidate["throughput"], candidate["memory"]["total"]
        row = [
            f"{candidate['rank']}. {candidate['name']}\n{candidate['parameters']:,} parameters",
            f"{gib(total)}\n{gib(content['budget_bytes'] - total)}",
            "-" if speed is None else f"{speed['tokens_per_second']:,.0f}\n{speed['batch']:,}",
        ]
        if proxies:
            row.append("\n".join("-" if candidate[key] is None else f"{candidate[key]:.4f}" for key in proxies))
        rows.append(row)
    columns = ["candidate", "memory\nroom", "tokens/s\nbatch", *(["\n".join(proxies)] if proxies else [])]
    table(f"Best by {content['rank']}", columns, rows)
    if content["picks"]:
        picked = [
            (pick["name"], f"{pick['kl']:.4f}", f"{pick['bits_per_byte']:.4f}", f"{pick['agreement']:.1%}")
            for pick in content["picks"]
        ]
        table("Distilled briefly, by held-out KL", ("candidate", "KL", "bits per byte", "top-1 agreement"), picked)
