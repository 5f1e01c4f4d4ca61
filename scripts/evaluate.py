"""`limbeck evaluate`: the gap between a teacher and its students on held-out text: gap.json and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..distill.agreement import check_agreement
from ..distill.gap.continuation import continuations, draw_prompts
from ..distill.gap.examples import as_text
from ..distill.gap.measure import TEACHER, measure_gap
from ..distill.gap.probes import Probe, check_probes, make_probe, retrieve
from ..distill.gap.token_groups import TokenGroups, group_documents, token_classes
from ..distill.report.report import write_page
from ..distill.text.mixture import whole
from ..distill.text.packing import Corpus
from ..models.checkpoint import load_config, load_model
from ..models.config import HybridConfig
from ..models.cost.inference import Hardware, count_parameters, throughput
from ..models.errors import InputError
from ..models.fingerprint import PROVENANCE
from ..models.folder import write_json
from ..models.hybrid import HybridLM
from ..models.offload import free_memory
from ..models.placement import let_go
from ..models.tokenizer import Tokenizer, load_tokenizer
from ..prune.scores import check_width_scores, load_scores
from . import memory_fit
from .run.resolve import check_counts, corpus, data_input, model_folder, torch_device, torch_dtype
from .run.show import gib, progress, read_json, result, say, table
from .run.stage import Facts, run_stage
from .tasks import Asked, Tasks, answer, show_tasks

SHARE = 0.8  # of a GPU's free memory that weights may take; the rest is for the work of a batch


@dataclasses.dataclass(frozen=True)
class Details:
    """What is measured beside the figures of every token; see conf/evaluate.yaml."""

    resamples: int = 1000
    worst: int = 6
    prompts: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    probe_lengths: tuple[int, ...] = (512, 1024)
    probe_count: int = 20
    task_shots: int | None = None
    task_limit: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "resamples", "prompt_tokens", "new_tokens", "probe_count", group="details.")
        check_counts(self, "worst", "prompts", least=0, group="details.")


@dataclasses.dataclass(frozen=True)
class Options:
    teacher: str
    student: dict[str, str]
    data: str
    output: Path
    split: str
    tokens: int
    seq_len: int
    batch: int
    seed: int
    device: str
    dtype: str
    hardware: Hardware
    fit: memory_fit.Fit
    details: Details = Details()
    scores: str | None = None
    probes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, "tokens", "seq_len", "batch")

    def asked(self) -> Tasks:
        """The task suites. Raises InputError."""
        return Tasks(self.tasks, self.details.task_shots, self.details.task_limit)


def run(options: Options) -> None:
    if TEACHER in options.student:
        raise InputError(f"student.{TEACHER} stands for the teacher itself; give the student another name")
    folders = {TEACHER: model_folder(options.teacher)}
    folders |= {name: model_folder(folder) for name, folder in options.student.items()}
    inputs: dict[str, Path | str] = {**folders, "data": data_input(options.data)}
    if options.scores is not None:
        inputs["scores"] = scores_folder(options.scores, folders[TEACHER])
    longest = min(load_config(folder).max_position_embeddings for folder in folders.values())
    check_probes(options.probes, options.details.probe_lengths, longest)
    check_continuations(options, longest)
    check_tokenizers(folders)
    kept = ("split", "tokens", "seq_len", "batch", "seed", "dtype", "details", "hardware", "fit", "probes")
    run_stage(
        options.output,
        name="evaluate",
        inputs=inputs,
        options={name: getattr(options, name) for name in kept} | {"tasks": options.asked().content()},
        make=lambda folder, facts: fill(folder, folders, options, facts),
    )
    show(read_json(options.output / "gap.json"))
    result(options.output, {"gap": str(options.output / "gap.json"), "page": str(options.output / "gap.html")})


def scores_folder(name: str, teacher: Path) -> Path:
    """A folder of `limbeck score`. Raises InputError where it is none, or of another model than the teacher."""
    folder = Path(name).expanduser()
    if not (folder / "scores.json").is_file():
        raise InputError(f"scores={name} is no folder of limbeck score; expected scores.json in it")
    found, config = load_scores(folder), load_config(teacher)
    if found.metadata.get("pattern") != config.pattern:
        raise InputError(f"scores={name} are of another model than the teacher, {teacher}; expected its own")
    check_width_scores(config, found.widths, f"scores={name}")
    return folder


def own_scores(options: Options, facts: Facts) -> Path | None:
    """The scores folder, unless what it was made from is not the teacher."""
    if options.scores is None:
        return None
    folder = Path(options.scores).expanduser()
    made_by = provenance({"scores": folder}).get("scores", {}).get("inputs", {})
    if made_by.get("model", facts.content()["inputs"][TEACHER]) == facts.content()["inputs"][TEACHER]:
        return folder
    say(f"scores={options.scores} are of another model of the teacher's shape: the page leaves them out")
    return None


def check_continuations(options: Options, longest: int) -> None:
    """Raises InputError where the texts that students go on with are longer than what the models are made for."""
    details = options.details
    asked = details.prompt_tokens + details.new_tokens
    if details.prompts and options.student and asked > longest:
        raise InputError(f"details.prompt_tokens + new_tokens is {asked:,}; the models take {longest:,}, give less")


def check_tokenizers(folders: Mapping[str, Path]) -> None:
    """Raises InputError where a student's tokens are others than the teacher's. One without a tokenizer of its own is
    taken at its word."""
    for name, folder in folders.items():
        if name != TEACHER and (folder / "tokenizer.json").is_file():
            check_agreement(folders[TEACHER], folder)


def fill(folder: Path, folders: dict[str, Path], options: Options, facts: Facts) -> None:
    """Measures into an existing folder: gap.json, gap.html and its plots."""
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    fits = {name: fitted(load_config(path), options.hardware, options.fit) for name, path in folders.items()}
    read = corpus(options.data, options.split, folders[TEACHER])
    batches = read.sample(
        batch_size=options.batch, seq_len=options.seq_len, seed=options.seed, max_tokens=options.tokens
    )
    text = whole(read)
    tokenizer = load_tokenizer(folders[TEACHER])
    # What may be wrong with them shows before anything is measured.
    probes = drawn_probes(text, tokenizer, options)
    tasks = Asked.of(folders, options.asked(), dtype=dtype, seed=options.seed) if options.tasks else None
    models, away = load_models(folders, dtype, device)
    teacher = models.pop(TEACHER)
    groups = TokenGroups(*group_documents(text.names, text.starts), token_classes(tokenizer, teacher.config.vocab_size))
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(
            teacher, models, batches, resamples=options.details.resamples, seed=options.seed, groups=groups,
            worst=options.details.worst, device=away, on_step=lambda done: bar.set(done),
        )  # fmt: skip
    content = report.to_json()
    content["parameters"] = {name: count_parameters(load_config(path)) for name, path in folders.items()}
    content["data"] = {"data": options.data, "split": options.split, "tokens": report.tokens}
    content["worst"] = {
        name: [as_text(window, text.names, tokenizer) for window in windows] for name, windows in report.worst.items()
    }
    content["continuation"] = written(teacher, models, text, tokenizer.eos_token_id, options, away)
    content["probes"] = probed({TEACHER: teacher, **models}, probes, options, away)
    content["tasks"] = {} if tasks is None else answer({TEACHER: teacher, **models}, folders, tasks, device=away)
    content["memory"] = fits
    write_json(folder / "gap.json", content)
    made_by = provenance(folders)
    curves = [folders[name] / "metrics.jsonl" for name in sorted(models, key=lambda name: name != "distilled")]
    write_page(
        folder,
        "gap.html",
        title="Teacher-student gap",
        gap=content,
        provenance={"evaluate": facts.content(), **made_by},
        memory=fits,
        scores=own_scores(options, facts),
        metrics=next((path for path in curves if path.is_file()), None),
        selection=selection(folders, made_by, facts.content()["inputs"].get("scores")),
    )


def load_models(
    folders: Mapping[str, Path], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, HybridLM], torch.device | None]:
    """The models on the device; where a GPU has no room for all of them, in main memory, and the device that each is to
    come to when its turn comes. Raises InputError where one alone is too large."""
    let_go()
    free = free_memory(device) if device.type == "cuda" else None
    sizes = {name: count_parameters(load_config(path)) * dtype.itemsize for name, path in folders.items()}
    away = None if free is None or sum(sizes.values()) <= SHARE * free else device
    if free is not None and away is not None:
        largest = max(sizes, key=lambda name: sizes[name])
        if sizes[largest] > SHARE * free:
            raise InputError(
                f"{largest} takes {gib(sizes[largest])} in {dtype}, {device} has {gib(free)} free; expected a narrower"
                f" dtype, or at most {SHARE:.0%} of what is free"
            )
        say(f"the models take {gib(sum(sizes.values()))} together, of {gib(free)} free: they wait in main memory")
    home = device if away is None else torch.device("cpu")
    return {name: load_model(path, dtype, home) for name, path in folders.items()}, away


def written(
    teacher: HybridLM,
    students: Mapping[str, HybridLM],
    text: Corpus,
    eos_token_id: int,
    options: Options,
    device: torch.device | None,
) -> dict[str, Any]:
    """How long each student's greedy text is the teacher's; nothing where no prompt was asked for or found."""
    details = options.details
    prompts = draw_prompts(text, details.prompts, details.prompt_tokens, options.seed) if details.prompts else None
    if prompts is None or not students:
        return {}
    say(f"continuing {len(prompts)} texts by {details.new_tokens} tokens")
    found = continuations(teacher, students, prompts, details.new_tokens, eos_token_id=eos_token_id,
                          resamples=details.resamples, seed=options.seed, device=device)  # fmt: skip
    return {name: dataclasses.asdict(each) | {"prompts": len(prompts), "new_tokens": details.new_tokens}
            for name, each in found.items()}  # fmt: skip


def drawn_probes(text: Corpus, tokenizer: Tokenizer, options: Options) -> dict[tuple[str, int], list[Probe]]:
    """The probes of each kind and length. Raises InputError where a length or the text is too short for one."""
    details, draw = options.details, np.random.default_rng(options.seed)
    return {
        (kind, length): [make_probe(kind, length, text, tokenizer, draw) for _ in range(details.probe_count)]
        for kind in options.probes
        for length in details.probe_lengths
    }


def probed(
    models: Mapping[str, HybridLM],
    probes: Mapping[tuple[str, int], Sequence[Probe]],
    options: Options,
    device: torch.device | None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """How the models answer each kind of probe at each length; the same probes for all."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (kind, length), drawn in probes.items():
        say(f"probing: {kind}, {length:,} tokens")
        answers = retrieve(models, drawn, resamples=options.details.resamples, seed=options.seed, device=device)
        found.setdefault(kind, {})[str(length)] = {name: dataclasses.asdict(each) for name, each in answers.items()}
    return found


def fitted(config: HybridConfig, hardware: Hardware, fit: memory_fit.Fit) -> dict[str, Any]:
    """Memory and verdict as memory-fit says them, and the estimated tokens a second of a third of the context read and
    two thirds written, as of the published 8k and 16k (arXiv 2508.14444), for the largest batch that fits."""
    fit = fit.of(config)
    report, answer = memory_fit.measure(config, hardware, fit)
    read, asked = max(fit.length // 3, 1), fit.asked(hardware)
    dtypes = {name: asked[name] for name in ("weight_dtype", "kv_dtype", "ssm_dtype")}
    estimate = throughput(
        config, hardware, input_tokens=read, output_tokens=max(fit.length - read, 1), budget=answer.budget, **dtypes
    )
    speed = None if estimate is None else dataclasses.asdict(estimate)
    return memory_fit.as_json(report, answer, hardware) | {"throughput": speed}


def provenance(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What made each model, where its folder says it."""
    return {name: read_json(path / PROVENANCE) for name, path in folders.items() if (path / PROVENANCE).is_file()}


def selection(folders: Mapping[str, Path], made_by: Mapping[str, Any], scores: str | None) -> dict[str, Any] | None:
    """What was kept of the first student that was pruned by just these scores."""
    for name, facts in made_by.items():
        path = folders[name] / "selection.json"
        if scores is not None and facts["inputs"].get("scores") == scores and path.is_file():
            return read_json(path)
    return None


def show(gap: dict[str, Any]) -> None:
    """The table of the gap, and how two students differ, with 95% intervals over documents."""
    columns = ("bits per byte", "cross-entropy", "KL to teacher", "top-1 agreement")
    keys = ("bits_per_byte", "cross_entropy", "kl", "agreement")
    rows = [
        (f"{name}\n{gap['parameters'][name]:,}", *(interval(found[key]) for key in keys))
        for name, found in gap["models"].items()
    ]
    title = f"Held-out text: {gap['tokens']:,} tokens of {gap['documents']} documents (95% intervals over documents)"
    table(title, ("model\nparameters", *columns), rows)
    show_nearness(gap)
    if gap["probes"]:
        rows = [
            (
                f"{kind}, {int(length):,} tokens",
                *(
                    f"{interval(found[name]['answered'])}\n{found[name]['nats']['value']:.1f} nats"
                    for name in gap["models"]
                ),
            )
            for kind, lengths in gap["probes"].items()
            for length, found in lengths.items()
        ]
        table("Retrieval: share of probes answered, and nats of an answer", ("", *gap["models"]), rows)
    show_tasks(gap["tasks"])
    pairs = [
        (f"{pair['second']}\n- {pair['first']}", *(interval(pair[key], "+", pair["p"][key]) for key in keys))
        for pair in gap["differences"]
        if pair["first"] != TEACHER
    ]
    if pairs:
        table("Differences between students, paired by document", ("", *columns), pairs)
    if gap["recovery"] is not None:
        found = gap["recovery"]
        say(f"recovered of what pruning lost: {found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})")
    elif {"pruned", "distilled"} <= gap["models"].keys():
        say("recovered: not said, since pruning lost nothing that these documents show")


def show_nearness(gap: dict[str, Any]) -> None:
    """The further figures, a line each."""
    models, written = gap["models"], gap["continuation"]
    names = {"reverse_kl": "KL from teacher", "top5_agreement": "top-5 agreement", "mean_rank": "mean rank",
             "mass_kept": "probability mass kept"}  # fmt: skip
    rows = [(title, *(interval(found[key]) for found in models.values())) for key, title in names.items()]
    rows.append(("calibration error (ECE)", *(interval(found["calibration"]["ece"]) for found in models.values())))
    if written:
        tokens = next(iter(written.values()))["new_tokens"]
        found = (interval(written[name]["length"]) if name in written else "" for name in models)
        rows.append((f"same greedy text, of {tokens} tokens", *found))
    table("Nearness to the teacher, and calibration", ("", *models), rows)


def interval(found: dict[str, float], sign: str = "", p: float | None = None) -> str:
    """A value over its interval: two lines, and a third for a p-value."""
    return f"{found['value']:{sign}.4f}\n{found['low']:.3f}..{found['high']:.3f}" + (
        "" if p is None else f"\np {p:.3f}"
    )
