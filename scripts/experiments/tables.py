"""An experiment's table on the terminal and in table.md, its plot, and result.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...distill.report.experiment_plot import draw_order, draw_rows, draw_sizes
from ...models.errors import InputError
from ...models.fingerprint import RESULT
from ...models.foreign import read_object, read_text
from ..run.show import read_json, result, say, table
from .cells import DISTILLED, TEACHER
from .figures import VariantRow, agreement, order_of, published_pairs, spread, stable_from
from .plans import Experiment, Plan, overrides_of

TABLE, ALL_TABLES, TITLE = "table.md", "experiments.md", "# Experiments"
Cells = Mapping[str, list[dict[str, Any]]]  # of each variant those of its seeds


def check_tables(output: Path, plans: Sequence[Plan], seeds: Sequence[int], also: str, members: Sequence[str]) -> None:
    """Raises InputError where a table would be written over that is not ours, or that has more in it or something
    else."""
    for plan in plans:
        folder, experiment = plan.folder, plan.experiment
        check_text(folder / TABLE, f"**{experiment.question}**")
        if not (folder / RESULT).is_file():
            continue
        before = read_object(folder / RESULT)
        if before.get("question") != experiment.question:
            raise InputError(f"{folder} holds another experiment ({before.get('question')}); give another output")
        more = [f"seed {seed}" for seed in before.get("seeds", ()) if seed not in seeds]
        more += [f"variant {name}" for name in before.get("rows", ()) if name not in plan.cells]
        if more:
            raise InputError(f"{folder} has a table with {', '.join(more)} as well; give these too, or another output")
        measure, words = before.get("measure", experiment.measure), before.get("also", also)
        if measure != experiment.measure:
            raise InputError(f"{folder} has a table of {measure}, not {experiment.measure}; give another output")
        if overrides_of(words) != overrides_of(also):
            raise InputError(
                f"{folder} has a table with also={words!r}, not {also!r}; give the same, or another output"
            )
    if members:
        check_text(output / ALL_TABLES, TITLE)


def check_text(path: Path, begin: str) -> None:
    """Raises InputError where there is a file that does not begin as ours do."""
    if path.exists() and not read_text(path).startswith(begin):
        raise InputError(f"{path} is not of limbeck experiment, and would be written over; give another output")


def write_tables(plan: Plan, locks: Path, seeds: Sequence[int], also: str, cells: Cells) -> None:
    """All of an experiment whose cells are there. Commands that share cells end together, and take turns by a lock."""
    experiment = plan.experiment
    rows = {
        name: VariantRow(
            tuple(cell["models"][experiment.student][experiment.figure]["value"] for cell in row),
            experiment.variants[name].published,
        )
        for name, row in cells.items()
    }
    pairs = published_pairs(rows, experiment.published_more, experiment.orders)
    order = order_of(rows, cells) if experiment.picture == "order" else {}
    sentence = stable_from(order) if order else agreement(rows, experiment.figure == "agreement", pairs)
    title = f"{experiment.measure.replace('.', ', ').replace('_', ' ')}; {len(seeds)} seeds"
    columns, body = table_of(experiment, cells, rows)
    with FileLock(locks / ".tables.lock"):
        plan.folder.mkdir(parents=True, exist_ok=True)
        say(experiment.question)
        table(title, columns, body)
        say(f"{sentence} ({experiment.source})")
        lines = [f"**{experiment.question}** {title[0].upper()}{title[1:]}.", "", *markdown(columns, body), ""]
        where = circumstances(experiment, cells, seeds, also)
        lines += [f"Published: {experiment.source}. {sentence} {where}.", *order_lines(order), ""]
        (plan.folder / TABLE).write_text("\n".join(lines), encoding="utf-8")
        draw_picture(plan, cells, rows, title, order)
        machines = sorted({tuple(cell["made_on"].items()) for row in cells.values() for cell in row})
        values = {
            name: {"values": row.values, "mean": row.mean, "published": row.published} for name, row in rows.items()
        }
        content = {"question": experiment.question, "measure": experiment.measure, "seeds": seeds, "also": also,
                   "rows": values, "agreement": sentence, "order": order,
                   "made_on": [dict(each) for each in machines]}  # fmt: skip
        result(plan.folder, content)


def table_of(experiment: Experiment, cells: Cells, rows: Mapping[str, VariantRow]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: parameters only where variants differ in them, published figures only where there are any."""
    first = next(iter(rows))
    sizes = {
        name: from_to([cell["models"][experiment.student]["parameters"] for cell in row]) for name, row in cells.items()
    }
    different, known = len(set(sizes.values())) > 1, any(row.published is not None for row in rows.values())
    columns = ["variant", "mean [least, largest]", f"minus {first}"]
    columns += ["parameters"] * different + ["published"] * known
    lines = []
    for name, row in rows.items():
        line = [name, row.spread, "" if name == first else spread(row.less(rows[first]), "+")]
        line += [sizes[name]] * different
        line += ["" if row.published is None else f"{row.published:g}"] * known
        lines.append(line)
    return columns, lines


def circumstances(experiment: Experiment, cells: Cells, seeds: Sequence[int], also: str) -> str:
    """Seeds, tokens, the teacher's figure, and the machines with their commits."""
    every = [cell for row in cells.values() for cell in row]
    words = [f"Seeds {', '.join(map(str, seeds))}"]
    if experiment.student == DISTILLED:
        words.append(f"{from_to([cell['tokens'] for cell in every])} tokens")
    if experiment.figure in ("cross_entropy", "bits_per_byte"):
        words.append(f"the teacher's is {every[0]['models'][TEACHER][experiment.figure]['value']:.4f}")
    if also:
        words.append(f"with `{also}`")
    commits: dict[str, set[str]] = {}
    for cell in every:
        machine = ", ".join(f"{key} {value}" for key, value in cell["made_on"].items() if key != "commit")
        commits.setdefault(machine, set()).add(cell["made_on"]["commit"])
    made_on = [f"{machine}, commit {', '.join(sorted(these))}" for machine, these in commits.items()]
    return f"{', '.join(words)}; {'; '.join(made_on)}"


def from_to(counts: Sequence[int]) -> str:
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts))))


def markdown(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(line)} |" for line in (columns, *body)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def order_lines(order: Mapping[str, Sequence[float]]) -> list[str]:
    if not order:
        return []
    body = [(name, spread(values)) for name, values in order.items()]
    table("How well it predicts the order at the end (Spearman)", ("by", "correlation"), body)
    heading = "How well the order at the end is predicted, Spearman's correlation:"
    return ["", heading, "", *markdown(("by", "correlation"), body)]


def draw_picture(
    plan: Plan, cells: Cells, rows: Mapping[str, VariantRow], title: str, order: Mapping[str, Sequence[float]]
) -> None:
    experiment = plan.experiment
    if experiment.picture == "sizes":
        groups: dict[str, list[dict[str, Any]]] = {}
        for name, row in cells.items():
            groups.setdefault(experiment.variants[name].start, []).extend(row)
        draw_sizes(plan.folder, experiment.question, groups, next(iter(cells.values()))[0]["models"][TEACHER])
    elif experiment.picture == "order":
        draw_order(plan.folder, experiment.question, order)
    else:
        draw_rows(plan.folder, experiment.question, title, {name: row.values for name, row in rows.items()})


def gather_tables(output: Path, members: Sequence[str]) -> None:
    """experiments.md: the tables and pictures of all members that are finished, one below the other."""
    parts = [TITLE, ""]
    for name in members:
        if (output / name / TABLE).is_file():
            question = read_json(output / name / RESULT)["question"]
            text = (output / name / TABLE).read_text(encoding="utf-8")
            parts += [f"## {name}", "", text, f"![{question}]({name}/plots/experiment.svg)", ""]
    (output / ALL_TABLES).write_text("\n".join(parts), encoding="utf-8")
    say(f"tables: {output / 'experiments.md'}")
