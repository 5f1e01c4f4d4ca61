"""The page's part on where its figures come from: the models before and after, and what each stage took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.axes import AXES
from .gap_rows import TEACHER
from .page import Cell, Section, Table, size

TITLES = {"family": "family", "layers": "layers", "pattern": "kinds of layers", "vocab_size": "vocabulary"} | {
    row.width: row.title for row in AXES.values()
}


def model_section(gap: Mapping[str, Any], models: Mapping[str, str]) -> Iterator[Section]:
    """Names and sizes of the models, the teacher's beside the students'; what a student has otherwise says by how
    much."""
    shapes = {name: shape for name in gap["models"] if (shape := gap.get("architecture", {}).get(name))}
    if not shapes and not models:
        return
    names = list(gap["models"])
    rows = [("from", [Cell(models.get(name, "")) for name in names])] if models else []
    rows.append(("parameters", [Cell(f"{gap['parameters'][name]:,}") for name in names]))
    keys = list(dict.fromkeys(key for shape in shapes.values() for key in shape))
    for key in keys:
        values = [shapes.get(name, {}).get(key) for name in names]
        rows.append((TITLES.get(key, key), [changed(value, values[names.index(TEACHER)]) for value in values]))
    note = "What is another size than the teacher's has the share that is left below it."
    if len(names) == 1:
        note = "Its size."
    yield Section("Models before and after" if len(names) > 1 else "Model", note,
                  tables=[Table("", ["", *names], rows, texts=True)])  # fmt: skip


def changed(value: Any, teacher: Any) -> Cell:
    if not isinstance(value, int):
        return Cell("" if value is None else str(value))
    share = "" if value == teacher or not isinstance(teacher, int) or not teacher else f"{value / teacher:.0%}"
    return Cell(f"{value:,}", "", share)


def stage_section(gap: Mapping[str, Any], provenance: Mapping[str, Mapping[str, Any]]) -> Iterator[Section]:
    """When each stage ran, on what, for how long, over how many tokens; nothing where no folder says so. The stage that
    evaluates is the one that `gap` is of."""
    runs = {name: run for name, facts in provenance.items() if isinstance(run := facts.get("run"), Mapping)}
    rows = []
    for name, run in runs.items():
        tokens = stage_tokens(provenance[name], gap)
        resumed = " (resumed: its last part)" if run.get("resumed") else ""
        rows.append((name, [
            Cell(str(run.get("began", ""))[:19].replace("T", " ")), Cell(seconds(run.get("seconds")) + resumed),
            Cell(tokens), Cell(device(run)), Cell(str(run.get("commit", ""))),
            Cell(size(sum(held.values())) if isinstance(held := run.get("bytes"), Mapping) else ""),
        ]))  # fmt: skip
    if rows:
        commands = dict.fromkeys(str(run.get("command", "")) for run in runs.values() if run.get("command"))
        yield Section(
            "Stages",
            "When each ran (UTC), how long it took, how many tokens of text it read or trained on, and where.",
            tables=[
                Table("", ["stage", "began", "took", "tokens", "on", "commit", "left"], rows, texts=True),
                *([Table("Commands", ["", "command"], [(str(number), [Cell(text)]) for number, text in
                                                       enumerate(commands, 1)], texts=True)] if commands else []),
            ],
        )  # fmt: skip


def stage_tokens(facts: Mapping[str, Any], gap: Mapping[str, Any]) -> str:
    """The tokens of text that a stage read. What one evaluates is counted in `gap`; the options of the others bound the
    text that is sampled, of which there may be less, and say how much is trained on."""
    if facts.get("made_by") == "limbeck evaluate":
        return f"{gap['tokens']:,}"
    options = facts.get("options", {})
    most, trained = sampled_tokens(options), trained_tokens(options)
    count = f"{most + trained:,}" if most + trained else ""
    return f"up to {count}" if most else count


def sampled_tokens(options: Mapping[str, Any]) -> int:
    """The most tokens of calibration text that a stage of these options reads."""
    count = options.get("tokens", 0)
    importance = options.get("importance")
    if isinstance(importance, Mapping):
        count += sum(importance.get(name) or 0 for name in ("tokens", "depth_tokens"))
    repair = options.get("repair")
    if isinstance(repair, Mapping) and reads_text(repair):
        count += repair.get("tokens") or 0
    return int(count)


def trained_tokens(options: Mapping[str, Any]) -> int:
    """The tokens in the rows of all steps of a distillation."""
    how, count = options.get("distill"), 0
    if isinstance(how, Mapping):
        for stage in how.get("stages") or [{}]:
            rows = stage.get("batch", how.get("batch", 0)) * stage.get("seq_len", how.get("seq_len", 0))
            steps = stage.get("steps", how.get("train", {}).get("steps", 0))
            count += stage.get("tokens") or steps * rows
    return int(count)


def reads_text(repair: Mapping[str, Any]) -> bool:
    """Whether a repair of these options reads calibration text."""
    wished = any(repair.get(name) for name in ("rotate", "least_squares", "local_steps"))
    return wished or repair.get("norms") == "measured" or repair.get("whole_experts") is not None


def seconds(count: Any) -> str:
    """1 h 2 min, 3 min 4 s, 5.6 s."""
    if not isinstance(count, (int, float)):
        return ""
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def device(run: Mapping[str, Any]) -> str:
    """GPU or processor, how many of them, and whose."""
    count = run.get("processes", 1)
    many = f"{count} \N{MULTIPLICATION SIGN} " if count != 1 else ""
    threads = "" if run.get("gpu") else f", {run.get('threads')} threads"
    return f"{many}{run.get('gpu') or run.get('cpu', '')}{threads}, {run.get('host', '')}"


def run_lines(run: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """What the head of the page says of the run that wrote it: date, place, versions, command."""
    if not run:
        return []
    versions = ", ".join(f"{name} {run[name]}" for name in ("python", "torch", "commit") if run.get(name))
    place = Path(str(run.get("output", ""))).name
    lines = [("Written", f"{str(run.get('began', ''))[:19].replace('T', ' ')} UTC"), ("On", device(run)),
             ("With", versions), ("Into", place), ("Command", str(run.get("command", "")))]  # fmt: skip
    return [(name, text) for name, text in lines if text]
