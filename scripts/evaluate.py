"""`limbeck evaluate`: the gap between a teacher and its students on held-out text: gap.json and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..distill.continuation import continuations, draw_prompts
from ..distill.data import Corpus
from ..distill.examples import as_text
from ..distill.gap import TEACHER, measure_gap
from ..distill.mixture import whole
from ..distill.probes import check_probes, make_probe, retrieve
from ..distill.report import write_page
from ..distill.token_groups import TokenGroups, group_documents, token_classes
from ..models.checkpoint import load_config, load_model
from ..models.config import HybridConfig
from ..models.cost import Hardware, count_parameters, throughput
from ..models.errors import InputError
from ..models.folder import write_json
from ..models.hybrid import HybridLM
from ..models.tokenizer import Tokenizer, load_tokenizer
from . import memory_fit
from .inputs import corpus, data_input, model_folder, torch_device, torch_dtype
from .show import progress, read_json, result, say, table
from .stage import PROVENANCE, Facts, run_stage
from .tasks import Tasks, answer, show_tasks


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
        for name in ("resamples", "prompt_tokens", "new_tokens", "probe_count", "worst", "prompts"):
            least = 0 if name in ("worst", "prompts") else 1
            if getattr(self, name) < least:
                raise InputError(f"details.{name} is {getattr(self, name)}; expected at least {least}")


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
        inputs["scores"] = scores_folder(options.scores)
    longest = min(load_config(folder).max_position_embeddings for folder in folders.values())
    check_probes(options.probes, options.details.probe_lengths, longest)
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


def scores_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "scores.json").is_file():
        raise InputError(f"scores={name} is no folder of limbeck score; expected scores.json in it")
    return folder


def fill(folder: Path, folders: dict[str, Path], options: Options, facts: Facts) -> None:
    """Measures into an existing folder: gap.json, gap.html and its plots."""
    dtype, device = torch_dtype(options.dtype), torch_device(options.device)
    fits = {name: fitted(load_config(path), options.hardware, options.fit) for name, path in folders.items()}
    models = {name: load_model(path, dtype, device) for name, path in folders.items()}
    teacher = models.pop(TEACHER)
    read = corpus(options.data, options.split, folders[TEACHER])
    batches = read.sample(
        batch_size=options.batch, seq_len=options.seq_len, seed=options.seed, max_tokens=options.tokens
    )
    text = whole(read)
    tokenizer = load_tokenizer(folders[TEACHER])
    groups = TokenGroups(
        *group_documents(text.names, np.diff(text.starts).tolist()),
        token_classes(tokenizer, teacher.config.vocab_size),
    )
    with progress("evaluating", len(batches)) as bar:
        report = measure_gap(
            teacher, models, batches, resamples=options.details.resamples, seed=options.seed, groups=groups,
            worst=options.details.worst, on_step=lambda done: bar.set(done),
        )  # fmt: skip
    content = report.to_json()
    content["parameters"] = {name: count_parameters(load_config(path)) for name, path in folders.items()}
    content["data"] = {"data": options.data, "split": options.split, "tokens": report.tokens}
    content["worst"] = {
        name: [as_text(window, text.names, tokenizer) for window in windows] for name, windows in report.worst.items()
    }
    content["continuation"] = written(teacher, models, text, tokenizer.eos_token_id, options)
    content["probes"] = probed({TEACHER: teacher, **models}, text, tokenizer, options)
    content["tasks"] = (
        answer(folders, options.asked(), dtype=dtype, device=device, seed=options.seed) if options.tasks else {}
    )
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
        scores=None if options.scores is None else scores_folder(options.scores),
        metrics=next((path for path in curves if path.is_file()), None),
        selection=selection(folders, made_by, facts.content()["inputs"].get("scores")),
    )


def written(
    teacher: HybridLM, students: Mapping[str, HybridLM], text: Corpus, eos_token_id: int, options: Options
) -> dict[str, Any]:
    """How long each student's greedy text is the teacher's; nothing where no prompt was asked for or found."""
    details = options.details
    prompts = draw_prompts(text, details.prompts, details.prompt_tokens, options.seed) if details.prompts else None
    if prompts is None or not students:
        return {}
    say(f"continuing {len(prompts)} texts by {details.new_tokens} tokens")
    found = continuations(teacher, students, prompts, details.new_tokens, eos_token_id=eos_token_id,
                          resamples=details.resamples, seed=options.seed)  # fmt: skip
    return {name: dataclasses.asdict(each) | {"prompts": len(prompts), "new_tokens": details.new_tokens}
            for name, each in found.items()}  # fmt: skip


def probed(
    models: Mapping[str, HybridLM], text: Corpus, tokenizer: Tokenizer, options: Options
) -> dict[str, dict[str, dict[str, Any]]]:
    """How the models answer each kind of probe at each length; the same probes for all."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    details, draw = options.details, np.random.default_rng(options.seed)
    for kind in options.probes:
        for length in details.probe_lengths:
            say(f"probing: {kind}, {length:,} tokens")
            probes = [make_probe(kind, length, text, tokenizer, draw) for _ in range(details.probe_count)]
            answers = retrieve(models, probes, resamples=details.resamples, seed=options.seed)
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
