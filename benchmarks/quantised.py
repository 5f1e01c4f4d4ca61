"""Rounded weights with and without training for it: the table of docs/RESULTS.md.

    python -m limbeck.benchmarks.quantised OUTPUT --teacher zoo --student FOLDER [--data stdlib] [--steps 30]
        [--formats fp8,w8a8,w4a16] [--seeds 0,1,2] [--ways as,calibrated,then,through]
        [--train distill.train.learning_rate=0.0005 ...]

The student as it is and rounded to every format, to the nearest and calibrated on the data (GPTQ, 32,768 tokens); then
trained for so many steps more of 4 x 512 tokens, once as it is (and rounded afterwards), once through each format's
rounding (`distill.train.quantize`), for every seed; a student that is its own teacher through the rounding alone. A
folder that is there already is taken as it is. Held-out figures are those of `limbeck evaluate`: weights rounded, and
the inputs of fp8 and w8a8 products. KL is from the teacher. `--train` are words for `limbeck distill`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from limbeck.models.provenance import provenance
from limbeck.models.rounding import ROUNDINGS

PLAIN = "bfloat16"
WAYS = {
    "as": "as it is",
    "calibrated": "calibrated",
    "then": "trained, then rounded",
    "through": "trained through rounding",
}


def run(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "limbeck", *words], check=True, stdout=subprocess.DEVNULL)


def exported(folder: Path, source: str, form: str, data: str | None = None, seed: int = 0) -> Path:
    """The folder of a model in a format, calibrated where there is data."""
    calibrates = data is not None and form != PLAIN
    out = folder / (f"{Path(source).name}-as-{form}" + (f"-calibrated-{seed}" if calibrates else ""))
    if not out.exists():
        how = "dtype=bfloat16" if form == PLAIN else f"format={form}"
        run(
            "export", f"model={source}", f"output={out}", how, *([f"data={data}", f"seed={seed}"] if calibrates else [])
        )
    return out


def trained(folder: Path, options: argparse.Namespace, quantize: str, seed: int) -> Path:
    out = folder / f"trained-{quantize}-{seed}"
    if not out.exists():
        run(
            "distill", f"teacher={options.teacher}", f"student={options.student}", f"data={options.data}",
            f"output={out}", f"seed={seed}", "wandb=off", "distill.batch=4", f"distill.train.steps={options.steps}",
            "distill.train.warmup_steps=3", f"distill.train.quantize={'null' if quantize == PLAIN else quantize}",
            *options.train,
        )  # fmt: skip
    return out


def students_of(
    folder: Path, options: argparse.Namespace, forms: Sequence[str], how: str, seed: int
) -> dict[str, Path]:
    """The folder of each format; what is trained through rounding has no plain one."""
    students = {}
    for form in forms:
        if form == PLAIN and how in ("calibrated", "trained through rounding"):
            continue
        source = options.student
        if how.startswith("trained"):
            source = str(trained(folder, options, form if "through" in how else PLAIN, seed))
        students[form] = exported(folder, source, form, options.data if how == "calibrated" else None, seed)
    return students


def figures(
    folder: Path, options: argparse.Namespace, how: str, seed: int, students: dict[str, Path]
) -> list[tuple[float, float]]:
    """Bits per byte, and KL from the teacher, of each; other formats than before are an evaluation of their own."""
    out = folder / "-".join(["gap", how.replace(", ", "-").replace(" ", "-"), str(seed), *students])
    if not out.exists():
        run("evaluate", f"teacher={options.teacher}", f"data={options.data}", f"output={out}",
            f"tokens={options.tokens}", *(f"+student.{form}={path}" for form, path in students.items()))  # fmt: skip
    models = json.loads((out / "gap.json").read_text())["models"]
    return [(models[form]["bits_per_byte"]["value"], models[form]["kl"]["value"]) for form in students]


def spread(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values) + f" ({statistics.mean(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", default="zoo")
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--train", nargs="*", default=["distill.train.optimizer=muon", "distill.train.learning_rate=0.0005"]
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--formats", default=",".join(ROUNDINGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    folder, forms = options.output, [PLAIN, *options.formats.split(",")]
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    own = options.teacher == options.student  # nothing to learn as it is
    ways = [way for way in options.ways.split(",") if not (own and way == "then")]
    for how in (WAYS[way] for way in ways):
        for seed in map(int, options.seeds.split(",") if how != "as it is" else "0"):  # draws nothing
            students = students_of(folder, options, forms, how, seed)
            for form, measured in zip(students, figures(folder, options, how, seed, students), strict=True):
                size = sum(file.stat().st_size for file in students[form].glob("*.safetensors"))
                rows.setdefault((how, form), []).append((*measured, size))
    print(f"\n| {options.student}, {options.steps * 2048:,} tokens | format | bytes | bits per byte | KL, nats |")
    print("|---|---|---|---|---|")
    for (how, form), found in rows.items():
        bits, kl = spread([one[0] for one in found], 4), spread([one[1] for one in found], 4)
        print(f"| {how} | {form} | {found[0][2]:,} | {bits} | {kl} |")
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
