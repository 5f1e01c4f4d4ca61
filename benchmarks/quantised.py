"""Rounded weights with and without training for it: the table of docs/RESULTS.md.

    python -m limbeck.benchmarks.quantised OUTPUT --teacher zoo --student FOLDER [--data stdlib] [--steps 30]
        [--formats fp8,w8a8,w4a16] [--seeds 0,1,2] [--rate 0.0005]

The student as it is and rounded to every format, to the nearest and calibrated on the data (GPTQ, 32,768 tokens); then
trained for so many steps more of 4 x 512 tokens, once as it is (and rounded afterwards), once through each format's
rounding (`distill.train.quantize`), for every seed. A folder that is there already is taken as it is. Held-out figures
are those of `limbeck evaluate`: weights rounded, activations as they are. KL is from the teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from limbeck.models.provenance import provenance
from limbeck.models.rounding import ROUNDINGS

PLAIN = "bfloat16"


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
            f"output={out}", f"seed={seed}", "wandb=off", "distill.batch=4", "distill.train.optimizer=muon",
            f"distill.train.steps={options.steps}", f"distill.train.learning_rate={options.rate}",
            "distill.train.warmup_steps=3", f"distill.train.quantize={'null' if quantize == PLAIN else quantize}",
        )  # fmt: skip
    return out


def figures(folder: Path, options: argparse.Namespace, students: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Bits per byte, and KL from the teacher, of each."""
    out = folder / f"gap-{'-'.join(students)}"
    if not out.exists():
        run("evaluate", f"teacher={options.teacher}", f"data={options.data}", f"output={out}",
            f"tokens={options.tokens}", *(f"+student.{name}={path}" for name, path in students.items()))  # fmt: skip
    models = json.loads((out / "gap.json").read_text())["models"]
    return {name: (models[name]["bits_per_byte"]["value"], models[name]["kl"]["value"]) for name in students}


def spread(values: list[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values) + f" ({statistics.mean(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", default="zoo")
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--formats", default=",".join(ROUNDINGS))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    folder, forms = options.output, [PLAIN, *options.formats.split(",")]
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for how in ("as it is", "calibrated", "trained, then rounded", "trained through rounding"):
            students = {}
            for form in forms:
                if "trained" not in how:
                    source = options.student
                else:
                    source = str(trained(folder, options, form if "through" in how else PLAIN, seed))
                students[f"{form}{seed}{how.count(' ')}{len(how)}"] = exported(
                    folder, source, form, options.data if how == "calibrated" else None, seed
                )
            for form, (name, measured) in zip(forms, figures(folder, options, students).items(), strict=True):
                size = sum(file.stat().st_size for file in students[name].glob("*.safetensors"))
                rows.setdefault((how, form), []).append((*measured, size))
    print(f"\n| {options.student}, {options.steps * 2048:,} tokens | format | bytes | bits per byte | KL, nats |")
    print("|---|---|---|---|---|")
    for (how, form), found in rows.items():
        bits, kl = spread([one[0] for one in found], 4), spread([one[1] for one in found], 4)
        print(f"| {how} | {form} | {found[0][2]:,} | {bits} | {kl} |")
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
