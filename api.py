"""limbeck from Python: what the commands do, on models in memory and by the same functions. See docs/python.md.

A `model` is what `load` gives, or anything that `load` takes. `data` is what `data=` takes (`stdlib`, a file, a folder,
hf:OWNER/NAME, a name in conf/data/, a mixture's .yaml), of which a split is read: "train", for `evaluate` "test". Or it
is a list of texts, or of rows with conversations, all of which are read; `{"path": ..., "train_on": "all"}` gives it
options (`distill.text.reading.TextData`). Options that are None take the commands' value, or less where the model or
the text is smaller; the logger "limbeck" says so. Whatever is wrong raises InputError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .distill.gap.measure import TEACHER, GapReport, measure_gap
from .distill.in_memory import distill_in_memory
from .distill.nested import open_nest
from .distill.nested_options import NestedSizes
from .distill.options import DistillLoss, DistillOptions, TrainOptions
from .distill.report.exported import ExportForm
from .distill.report.exported_text import evaluated_tokens
from .distill.rollout_options import Rollouts
from .distill.rollouts import check_plan
from .distill.stages import check_epochs, check_text
from .distill.text.given import Data, fitted, held_out_of, named_text, read_sample, read_text
from .distill.text.mixture import whole
from .distill.text.packing import Batch, check_measurable
from .models.checkpoint import load_config, load_model, open_checkpoint, save_model
from .models.config import HybridConfig
from .models.cost.fit import Estimate, Fit
from .models.cost.hardware import Hardware
from .models.device import torch_device, torch_dtype
from .models.dtype_names import dtype_name
from .models.errors import InputError, expect
from .models.folder import atomic_folder
from .models.generate.engine import Engine, Request
from .models.generate.sampling import Sampling
from .models.generate.writer import stop_tokens
from .models.hybrid import HybridLM
from .models.named import load_checked, model_config, model_folder, model_weights, read_hardware
from .models.quantities import counted
from .models.schema import checked
from .models.served_inputs import served
from .models.tokenizer import check_tokens, check_vocabulary, load_tokenizer
from .prune.choose import select
from .prune.depth import random_layers, score_layers
from .prune.importance import score_widths
from .prune.nested import nested_model
from .prune.repair import Repair, repair_model
from .prune.rounding_plan import SCRATCH, GivenRounding, RoundingOptions, RoundingPlan, plan_rounding
from .prune.scores import Scores
from .prune.scoring import Importance
from .prune.target import Target

Source = str | Path | HybridLM | Any  # the last: a model of transformers
log = logging.getLogger("limbeck")


def load(
    source: Source,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
) -> HybridLM:
    """A model with its `.config` and `.tokenizer` (None where it has none), on a GPU where there is one unless told.

    `source` is a checkpoint folder, "zoo" or "zoo-moe", or a model of transformers, whose weights are copied.
    `tokenizer` is a folder with tokenizer.json; without it the source's own is taken, of a model of transformers that
    of the folder which it was read from. A model of ours is given back as it is, with the `tokenizer` if one is named.
    """
    place, dtype = torch_device(device), torch_dtype(dtype_name(str(dtype)))
    if isinstance(source, HybridLM):
        if tokenizer is not None:
            source.tokenizer = load_tokenizer(Path(tokenizer))
            check_vocabulary(source.tokenizer, source.config)
        return source
    if isinstance(source, (str, Path)):
        home = model_folder(str(source))
        model = load_checked(home, dtype, place)
    else:
        if not hasattr(source, "save_pretrained"):
            raise InputError(
                f"load: {type(source).__name__} is no model; expected a folder, a model of transformers, zoo or zoo-moe"
            )
        with tempfile.TemporaryDirectory() as temporary:  # the public layout is the one way in
            source.save_pretrained(temporary)
            model = load_model(temporary, dtype, place)
        home = Path(getattr(source, "name_or_path", "") or "")
    if tokenizer is not None or (home / "tokenizer.json").is_file():
        model.tokenizer = load_tokenizer(home if tokenizer is None else Path(tokenizer))
        check_vocabulary(model.tokenizer, model.config)
    return model


def export(
    model: Source,
    output: str | Path,
    *,
    format: str = "hf",
    dtype: torch.dtype | str | None = None,
    pre_tokenizer: str | None = None,
    check_tokens: int = 256,
    seed: int = 0,
    data: Data | None = None,
    evaluate_tokens: int | None = None,
    seq_len: int | None = None,
    batch: int | None = None,
    **rounding: Any,
) -> Path:
    """Writes a model as a folder, its tokenizer and export.json in it, read back and compared before it appears: in
    the public layout, or as the `format` gguf, fp8, w8a8 or w4a16. `dtype` None keeps the model's; of the other formats
    it is bfloat16. On `evaluate_tokens` of held-out `data` (None: 16,384, 0: none) export.json has bits per byte
    beside the model's; for formats that round, `data` is calibration text, too, and `rounding` has the options of
    `prune.rounding_plan.GivenRounding`. Raises CheckFailed where logits are not what they should be."""
    measured = evaluated_tokens(evaluate_tokens, data is not None)
    how = checked(GivenRounding, "export", **rounding).settled(format, data is not None, measured > 0)
    given = model_folder(str(model)) if isinstance(model, (str, Path)) else load(model)
    own = torch.bfloat16
    if format == "hf":
        own = open_checkpoint(given).dtype() if isinstance(given, Path) else given.head_weight.dtype
    name = dtype_name(str(own if dtype is None else dtype))
    form = ExportForm(format, name, None, check_tokens, seed, pre_tokenizer)
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(Path(output)) as folder:
        source, plan = given if isinstance(given, Path) else Path(temporary) / "model", RoundingPlan()
        if not isinstance(given, Path):
            save_model(given, source, tokenizer_from=None if given.tokenizer is None else given.tokenizer.folder)
        reader = HybridLM(load_config(source), device="meta")
        reader.tokenizer = None if data is None else load_tokenizer(source)

        def rows(split: str, tokens: int) -> list[Batch]:
            return read_sample(reader, data or "", split, tokens, seq_len, batch, seed)

        device, text = torch_device("auto"), rows("validation", measured) if measured else ()
        if how != RoundingOptions():
            plan = plan_rounding(source, format, how, Path(temporary) / SCRATCH, rows, unseen, device)
        published = form.write(folder, source, plan.kept, plan.calibrated, plan.facts, text, device)
    for caution in published.cautions:
        log.warning("export: %s", caution)
    return Path(output)


@contextlib.contextmanager
def unseen(what: str, total: int) -> Iterator[Any]:
    """A bar that is not shown."""
    yield types.SimpleNamespace(set=lambda *done: None)


def score(
    model: Source, data: Data, *, seq_len: int | None = None, batch: int | None = None, seed: int = 0, **options: Any
) -> Scores:
    """How much every unit and layer matters on text. `options` are those of `prune.scoring.Importance`: `method` is
    "activation" unless told, and `remove_layers` are put in the order of their removal (None: the first)."""
    model = load(model)
    given = {"method": "activation", "remove_layers": None, "pairs": False, "min_layers": {}} | options
    how = checked(Importance, "score", **given).settled(model.config)
    text = read_text(model, data, "train")
    seq_len, batch = fitted(model, text, seq_len, batch, seed)
    assert how.remove_layers is not None
    limits: dict[str, Any] = {"pairs": how.pairs, "min_layers": how.min_layers}
    limits["remove"] = how.remove_layers * model.config.block_size  # whole blocks
    if how.method == "random":
        order = random_layers(model.config, seed=seed, **limits)
    else:
        sample = text.sample(batch_size=how.depth_batch, seq_len=seq_len, seed=seed, max_tokens=how.depth_tokens)
        order = score_layers(
            model, list(sample), metric=how.depth_metric, iterative=how.iterative, table=how.depth_table, **limits
        )
    sample = text.sample(batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=how.tokens)
    widths = score_widths(model, list(sample), how.width_metric(seed))
    return Scores(widths, order, {"method": how.method, "seed": seed, "pattern": model.config.pattern})


def prune(
    model: Source,
    scores: Scores,
    *,
    repair: bool | Repair = True,
    data: Data | None = None,
    tokens: int = 32768,
    seq_len: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    **target: Any,
) -> HybridLM:
    """A smaller model of the units that score highest. `target` is the size: `parameters=0.75` (a share, or "75%", or a
    count, or "5B"), `layers=`, `hidden_size=` and the other fields of `prune.target.Target`. `repair` on `data` rotates
    the stream and refits the matrices; without data it rescales the norms alone."""
    model = load(model)
    expect("prune: scores", scores, Scores, "what score gives")
    expect("prune: repair", repair, (bool, Repair), "true, false or a prune.repair.Repair")
    if isinstance(repair, bool):
        fit = repair and data is not None
        repair = Repair(rotate=fit, norms="count" if repair else "none", least_squares=fit, reselect=fit)
    if repair.needs_data and data is None:
        raise InputError("prune: this repair needs data=")
    selection = select(model.config, scores.widths, scores.layers.order, checked(Target, "prune", **target))
    batches = read_sample(model, data, "train", tokens, seq_len, batch, seed) if data and repair.needs_data else []
    small = repair_model(model, selection, batches, repair)
    small.tokenizer = model.tokenizer
    return small


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What a distillation did: its steps, the rows of each, the tokens they read and how often that is all of the text,
    the loss of the last step (nats a token), and every step's record; of nested sizes each one's model, by its name."""

    steps: int
    seq_len: int
    batch: int
    tokens: int
    epochs: float
    loss: float
    records: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    sizes: Mapping[str, HybridLM] = dataclasses.field(default_factory=dict, repr=False)


def distill(
    teacher: Source,
    student: HybridLM,
    data: Data,
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    loss: DistillLoss | Mapping[str, Any] | None = None,
    rollouts: Rollouts | Mapping[str, Any] | None = None,
    nested: NestedSizes | Mapping[str, Any] | None = None,
    scores: Scores | None = None,
    held_out: Data | None = None,
    evaluate_tokens: int = 16384,
    seq_len: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Distilled:
    """Trains the student in place towards the teacher's logits. `options` are fields of `distill.options.TrainOptions`;
    a student in fewer than 32 bits trains in float32 and is in its own dtype again afterwards. `rollouts`, such as
    {"new_tokens": 64}, has it learn on text that it writes itself (`distill.rollout_options.Rollouts`). With `nested`,
    such as {"sizes": [{"target": {}}, {"target": {"parameters": 0.75}}]} (`distill.nested_options.NestedSizes`), and
    the student's `scores`, several sizes are cut out of it and trained in one; they are the result's `sizes`, and the
    student stays as it is. With `evaluate_every` records have figures of so many tokens of `held_out`, which is the
    validation split of `data` unless told; what the options keep (best, mean, moving average) is what is left."""
    teacher = load(teacher)
    if not isinstance(student, HybridLM) or student is teacher:
        raise InputError("distill: the student is trained in place; expected a model of load or prune, not the teacher")
    if (nested is None) != (scores is None) or not isinstance(scores, Scores | None):
        raise InputError("distill: scores=, the student's as of score, put nested sizes in order; give both or neither")
    check_tokens(teacher.tokenizer, student.tokenizer)
    reader = student if student.tokenizer is not None else teacher
    text = read_text(reader, data, "train")
    seq_len, batch = fitted(student, text, seq_len, batch, seed)
    few = {"warmup_steps": min(20, steps // 5), "save_every": max(steps, 1)}
    how = checked(TrainOptions, "distill", **({"steps": steps, "learning_rate": learning_rate} | few | options))
    if isinstance(loss, Mapping):
        loss = checked(DistillLoss, "distill.loss", **loss)
    if isinstance(rollouts, Mapping):
        rollouts = checked(Rollouts, "distill.rollouts", **rollouts)
    if isinstance(nested, Mapping):
        nested = checked(NestedSizes, "distill.nested", **nested)
    plan = DistillOptions(loss or DistillLoss(), how, seq_len, batch, 0, rollouts=rollouts, nested=nested)
    check_text(text, plan)
    check_epochs(text, [plan])
    check_plan([plan], student.config, whole=True)
    measured: list[Batch] = []
    if how.evaluate_every:
        unread = held_out_of(data, held_out)
        measured = read_sample(reader, unread, "validation", evaluate_tokens, seq_len, plan.rows, seed)
        check_measurable(measured, named_text(unread), "validation")
    nest = None
    if nested is not None and scores is not None:
        cut = nested_model(student, scores.widths, nested.targets)
        nest = open_nest(nested, cut.model, cut.sizes, cut.parameters, student.head_weight.dtype)
    records, sizes = distill_in_memory(teacher, student, text, plan, seed, nest, measured)
    last = next((record["loss"] for record in reversed(records) if "loss" in record), float("nan"))
    read = how.steps * batch * seq_len
    return Distilled(how.steps, seq_len, batch, read, read / text.tokens, last, tuple(records), sizes)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How far students are from their teacher on held-out text; `content` is what gap.json holds."""

    report: GapReport
    content: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def kl(self) -> dict[str, float]:
        """KL(teacher || student) of each student, nats a token."""
        return {name: gap.kl.value for name, gap in self.report.models.items() if name != TEACHER}

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Of each model, the teacher's too."""
        return {name: gap.bits_per_byte.value for name, gap in self.report.models.items()}

    def page(self, path: str | Path) -> Path:
        """Writes the page and, in plots/ beside it, its pictures."""
        from .distill.report.report import write_page  # with matplotlib

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_page(path.parent, path.name, title="Teacher-student gap", gap=self.content, provenance={})


def load_to_measure(source: Source) -> HybridLM:
    """`load`; of a folder as a server computes."""
    model = load(source)
    return served(model, model_folder(str(source))) if isinstance(source, (str, Path)) else model


def evaluate(
    teacher: Source,
    students: Mapping[str, Source] | Source,
    data: Data,
    *,
    tokens: int = 65536,
    seq_len: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    split: str = "test",
    worst: int = 6,
    resamples: int = 1000,
) -> Evaluation:
    """The gap on held-out text, with intervals over documents. One model alone is called "student". Folders compute as
    a server does (`models.served_inputs`)."""
    from .distill.gap.evaluation import gap_content
    from .distill.gap.token_groups import group_tokens

    teacher = load_to_measure(teacher)
    named = students if isinstance(students, Mapping) else {"student": students}
    models = {name: load_to_measure(model) for name, model in named.items()}
    for model in models.values():
        check_tokens(teacher.tokenizer, model.tokenizer)
    read = read_text(teacher, data, split)
    seq_len, batch = fitted(teacher, read, seq_len, batch, seed)
    text, tokenizer = whole(read), teacher.tokenizer
    assert tokenizer is not None
    groups = group_tokens(text, tokenizer, teacher.config.vocab_size)
    batches = read.sample(batch_size=batch, seq_len=seq_len, seed=seed, max_tokens=counted(tokens=tokens)[0])
    check_measurable(batches, named_text(data), split)
    report = measure_gap(teacher, models, batches, resamples=resamples, seed=seed, groups=groups, worst=worst)
    content = gap_content(report, {TEACHER: teacher, **models}, text, tokenizer, named_text(data), split)
    return Evaluation(report, content)


def memory_fit(
    model: Source | HybridConfig, hardware: str | Hardware = "a10g", context: int | None = None, **options: Any
) -> Estimate:
    """Whether a model fits a card, a name in conf/hardware/, at a context (None: the model's own, 131,072 at most):
    `.fits`, `.memory` in bytes, `.verdict`. `model` may be a config, or a name in conf/model/; of a folder whose
    weights are quantised they count as the files have them. `options` are those of `models.cost.fit.Fit`."""
    fit = checked(Fit, "memory_fit", context=context, **options)
    name = str(model) if isinstance(model, (str, Path)) else None
    held = None if name is None else model_weights(name, torch_dtype(fit.weight_dtype), fit.tensor_parallel)
    model = model if name is None else model_config(name)
    config = model if isinstance(model, HybridConfig) else load(model).config
    longest = config.max_position_embeddings
    if context is not None and context > longest:
        raise InputError(f"memory_fit: context {context:,} is beyond the {longest:,} tokens that the model is made for")
    return fit.estimate(config, hardware if isinstance(hardware, Hardware) else read_hardware(hardware), held)


def generate(
    model: Source,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    batch: int = 8,
) -> list[str]:
    """Each prompt with the text that follows it, up to a text of `stop`. Temperature 0 takes the most probable token;
    prompt n draws from seed + n."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    max_new_tokens, batch = counted(max_new_tokens=max_new_tokens, batch=batch)
    model = load(model)
    if (reader := model.tokenizer) is None:
        raise InputError("the model has no tokenizer to read prompts with; give load(..., tokenizer=FOLDER)")
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"generate: prompts is {prompts!r}; expected a list of texts, one at least")
    ends = stop_tokens(reader.folder, model.config)
    draws = [Sampling(temperature, top_k, top_p, min_p, seed + number) for number in range(len(prompts))]
    read = zip(map(reader.prompt, prompts), draws, strict=True)
    requests = [Request(ids, max_new_tokens, draw, stop, ends) for ids, draw in read]
    longest = max(len(request.prompt) for request in requests) + max_new_tokens
    engine = Engine(model, max_length=longest, slots=min(batch, len(requests)), tokenizer=reader, prepare=False)
    return [prompt + each.text for prompt, each in zip(prompts, engine.complete(requests), strict=True)]
