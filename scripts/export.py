"""`limbeck export`: a checkpoint in a given dtype as a folder of its own or a GGUF file, read back and compared before
it appears."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from ..distill.report.card import Figures, gap_folder, read_figures, read_licence, write_card
from ..distill.report.exported import ExportForm, check_tables
from ..distill.report.exported_text import evaluated_tokens
from ..distill.text.packing import Batch
from ..models.checkpoint import load_config
from ..models.device import torch_device
from ..models.errors import InputError, gib
from ..models.hub import check_push_name, push_folder
from ..prune.rounding_plan import SCRATCH, GivenRounding, RoundingOptions, RoundingPlan, plan_rounding
from .run.resolve import NamedData, data_input, model_folder, sample
from .run.show import progress, read_json, result, say, table
from .run.stage import Work, stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    output: Path
    dtype: str
    max_shard_bytes: PositiveInt | None
    check_tokens: PositiveInt
    seed: int
    base: str | None = None
    gap: str | None = None
    format: str = "hf"
    pre_tokenizer: str | None = None
    push: str | None = None
    push_dry: bool = True
    data: NamedData | None = None
    calibration_tokens: NonNegativeInt | None = None
    evaluate_tokens: NonNegativeInt | None = None
    sensitivity: bool = False
    sensitivity_tokens: PositiveInt = 8192
    keep_layers: PositiveInt | tuple[NonNegativeInt, ...] | None = None
    seq_len: PositiveInt = 512
    batch: PositiveInt = 8
    device: str = "auto"

    def form(self) -> ExportForm:
        return ExportForm(
            self.format, self.dtype, self.max_shard_bytes, self.check_tokens, self.seed, self.pre_tokenizer
        )

    def rounding(self) -> RoundingOptions:
        given = GivenRounding(self.calibration_tokens, self.sensitivity, self.sensitivity_tokens, self.keep_layers)
        return given.settled(self.format, self.data is not None, self.measured > 0)

    @property
    def measured(self) -> int:
        """Held-out tokens that the export is measured on."""
        return evaluated_tokens(self.evaluate_tokens, self.data is not None)


def run(options: Options, replaces: bool = False) -> None:
    if options.push is not None:
        check_push_name(options.push)
    elif not options.push_dry:
        raise InputError("push_dry=false uploads to a model of the hub; give push=OWNER/NAME, or leave it out")
    form, how, source = options.form(), options.rounding(), model_folder(options.model)
    inputs: dict[str, Path | str] = {"model": source}
    if options.base is not None:
        inputs["base"] = model_folder(options.base)
    if options.gap is not None:
        inputs["gap"] = gap_folder(options.gap)
    given, scratch = form.settings(), SCRATCH if how.needs_data else None
    if how != RoundingOptions():
        given |= {"rounding": how}
    if options.data is not None:
        inputs["data"] = data_input(options.data)
        given |= {"seq_len": options.seq_len, "batch": options.batch, "evaluate_tokens": options.measured}
    with stage(options.output, "export", inputs=inputs, options=given, replaces=replaces, scratch=scratch) as work:
        if not work.finished:
            config, licence = load_config(source), read_licence(Path(inputs.get("base", source)))
            figures = Figures()
            if options.gap is not None:
                figures = read_figures(gap_folder(options.gap), work.content()["inputs"]["model"], config)
            text = reader(options, source)("validation", options.measured) if options.measured else ()
            plan = planned(options, how, source, work) if how != RoundingOptions() else RoundingPlan()
            published = form.write(
                work.folder, source, plan.kept, plan.calibrated, plan.facts, text, torch_device(options.device)
            )
            sources = work.notes.get("sources")
            write_card(
                work.folder, config, published, licence, figures.gap, figures.name, figures.picture, sources=sources
            )
    content = read_json(options.output / "export.json")
    for caution in content.get("cautions", ()):
        say(f"caution: {caution}")
    for shown in check_tables(options.output, content):
        table(*shown)
    if options.push is not None:
        print_push(options)
    result(options.output, {"model": str(options.output)})


def planned(options: Options, how: RoundingOptions, source: Path, work: Work) -> RoundingPlan:
    return plan_rounding(
        source, options.format, how, work.folder / SCRATCH, reader(options, source), progress,
        torch_device(options.device),
    )  # fmt: skip


def reader(options: Options, source: Path) -> Callable[[str, int], list[Batch]]:
    """Rows of a split of data=, of so many tokens."""
    sizes = {"seq_len": options.seq_len, "batch": options.batch, "seed": options.seed}
    return lambda split, tokens: sample(options.data or "", split, source, tokens=tokens, **sizes)


def print_push(options: Options) -> None:
    """Uploads the folder, or says what would be."""
    assert options.push is not None
    files = push_folder(options.output, options.push, options.push_dry)
    rows = [(str(file.relative_to(options.output)), gib(file.stat().st_size)) for file in files]
    what = "Would go to the hub (push_dry=false uploads)" if options.push_dry else "Uploaded, private"
    table(f"{what}: {options.push}", ("file", ""), rows)
