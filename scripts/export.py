"""`limbeck export`: a checkpoint in a given dtype and shard size, read back and compared before it appears."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from ..distill.report.card import read_licence, write_card
from ..models.checkpoint import load_config
from ..models.device import torch_dtype
from ..models.errors import InputError
from ..models.export import write_export
from ..models.fingerprint import PROVENANCE
from ..models.folder import write_json
from .run.resolve import model_folder
from .run.show import read_json, result, table
from .run.stage import Work, stage


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    output: Path
    dtype: str
    max_shard_bytes: PositiveInt
    check_tokens: PositiveInt
    seed: int
    base: str | None = None
    gap: str | None = None


def run(options: Options, replaces: bool = False) -> None:
    source = model_folder(options.model)
    inputs = {"model": source}
    if options.base is not None:
        inputs["base"] = model_folder(options.base)
    if options.gap is not None:
        inputs["gap"] = gap_folder(options.gap)
    sizes = {"max_shard_bytes": options.max_shard_bytes, "check_tokens": options.check_tokens, "seed": options.seed}
    chosen = {"dtype": options.dtype} | sizes
    with stage(options.output, "export", inputs=inputs, options=chosen, replaces=replaces) as work:
        if not work.finished:
            gap, name = measured(options, work)
            parity = write_export(work.folder, source, torch_dtype(options.dtype), **sizes)
            content = {"dtype": options.dtype, "read_back": "identical", "transformers": parity.to_json()}
            write_json(work.folder / "export.json", content)
            licence = read_licence(inputs.get("base", source))
            picture = None if options.gap is None else inputs["gap"] / "plots" / "gap.png"
            if picture is not None and not picture.is_file():
                picture = None
            config = load_config(work.folder)
            write_card(work.folder, config, options.dtype, parity.sentence(), licence, gap, name, picture)
    print_checks(options.output)
    result(options.output, {"model": str(options.output)})


def gap_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "gap.json").is_file() or not (folder / PROVENANCE).is_file():
        raise InputError(f"gap={name} is no folder of limbeck evaluate; expected gap.json and {PROVENANCE} in it")
    return folder


def measured(options: Options, work: Work) -> tuple[dict[str, Any] | None, str | None]:
    """gap.json's content, and what it calls the model of this export. Raises InputError where it is not about it."""
    if options.gap is None:
        return None, None
    folder, model = gap_folder(options.gap), work.content()["inputs"]["model"]
    made = read_json(folder / PROVENANCE)
    gap = read_json(folder / "gap.json")
    name = next((name for name, digest in made["inputs"].items() if digest == model and name in gap["models"]), None)
    if name is None:
        raise InputError(
            f"gap={options.gap} measured other models than {options.model}; evaluate this one, or leave it out"
        )
    gap["data"]["dtype"] = made["options"]["dtype"]
    return gap, name


def print_checks(folder: Path) -> None:
    content = read_json(folder / "export.json")
    theirs = content["transformers"]
    rows = [("read back", content["read_back"]), ("transformers", theirs.get("note", ""))]
    if theirs["relative_rms"] is not None:
        rows[1] = (f"{theirs['class']} {theirs['version']}", f"{theirs['relative_rms']:.1e} relative RMS")
    if "dt_floor_transformers" in theirs:
        rows.append((f"  both with dt >= {theirs['dt_floor_transformers']:g}", "as transformers has it"))
        rows.append(
            (f"  ours with dt >= {theirs['dt_floor']:g}", f"{theirs['relative_rms_own_clamps']:.1e} relative RMS")
        )
    table(f"Exported to {folder}", ("check", ""), rows)
