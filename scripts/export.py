"""`limbeck export`: a checkpoint in a given dtype as a folder of its own or a GGUF file, read back and compared before
it appears."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from ..distill.report.card import TRANSFORMERS, Published, llama_cpp, read_licence, write_card
from ..models.cautions import cautions
from ..models.checkpoint import load_config, open_checkpoint
from ..models.device import torch_dtype
from ..models.errors import InputError, gib
from ..models.export import write_export
from ..models.fingerprint import PROVENANCE
from ..models.folder import write_json
from ..models.foreign import own_path
from ..models.gguf.export import write_gguf_export
from ..models.gguf.file import KINDS_OF_FILE, gguf_package
from ..models.hub import is_hub_name, push_folder
from ..models.quantise import compressed_tensors, write_quantised
from ..models.rounding import ROUNDINGS
from .run.resolve import model_folder, said_format
from .run.show import read_json, result, say, table
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
    format: str = "hf"
    pre_tokenizer: str | None = None
    push: str | None = None
    push_dry: bool = True


FORMATS = ("hf", "gguf", *ROUNDINGS)


def check(options: Options) -> None:
    """Raises InputError where the options do not fit the format, or what it needs is not installed."""
    if options.push is not None and not is_hub_name(options.push):
        raise InputError(f"push={options.push}: expected OWNER/NAME")
    if options.format not in FORMATS:
        raise InputError(f"format={options.format} is unknown; known: {', '.join(FORMATS)}")
    if options.format == "gguf":
        gguf_package()
        if options.dtype not in KINDS_OF_FILE:
            raise InputError(f"dtype={options.dtype} is none of format=gguf; known: {', '.join(KINDS_OF_FILE)}")
    elif options.pre_tokenizer is not None:
        raise InputError("pre_tokenizer is llama.cpp's; give format=gguf with it, or leave it out")
    elif options.format in ROUNDINGS:
        compressed_tensors()
        if options.dtype != "bfloat16":
            raise InputError(f"dtype={options.dtype}: what format={options.format} leaves is bfloat16; leave dtype out")
    else:
        torch_dtype(options.dtype)


def run(options: Options, replaces: bool = False) -> None:
    check(options)
    source = model_folder(options.model)
    inputs = {"model": source}
    if options.base is not None:
        inputs["base"] = model_folder(options.base)
    if options.gap is not None:
        inputs["gap"] = gap_folder(options.gap)
    with stage(options.output, "export", inputs=inputs, options=settings(options), replaces=replaces) as work:
        if not work.finished:
            work.notes |= said_format(options.model, open_checkpoint(source))
            gap, name = measured(options, work)
            published = write_format(options, source, work)
            licence = read_licence(inputs.get("base", source))
            picture = None if options.gap is None else inputs["gap"] / "plots" / "gap.png"
            if picture is not None and not picture.is_file():
                picture = None
            write_card(work.folder, load_config(source), published, licence, gap, name, picture,
                       sources=work.notes.get("sources"))  # fmt: skip
    print_checks(options.output)
    if options.push is not None:
        print_push(options)
    result(options.output, {"model": str(options.output)})


def settings(options: Options) -> dict[str, Any]:
    """The options that the weights follow from."""
    given = {"dtype": options.dtype, "check_tokens": options.check_tokens, "seed": options.seed}
    if options.format == "hf":
        return given | {"max_shard_bytes": options.max_shard_bytes}
    return given | {"format": options.format} | ({"pre_tokenizer": options.pre_tokenizer} if options.format == "gguf"
                                                 else {})  # fmt: skip


def write_format(options: Options, source: Path, work: Work) -> Published:
    if options.format == "hf":
        return write_hf(source, work)
    if options.format == "gguf":
        return write_gguf(options, source, work)
    sizes = {"check_tokens": options.check_tokens, "seed": options.seed}
    found = write_quantised(work.folder, source, options.format, **sizes)
    write_json(work.folder / "export.json", {"format": options.format, "quantised": dataclasses.asdict(found)})
    return Published(options.format, TRANSFORMERS, found.sentence(options.format),
                     tuple(cautions(load_config(source))), "quantized")  # fmt: skip


def write_hf(source: Path, work: Work) -> Published:
    dtype = work.options["dtype"]
    sizes = {name: work.options[name] for name in ("max_shard_bytes", "check_tokens", "seed")}
    parity = write_export(work.folder, source, torch_dtype(dtype), **sizes)
    content = {"dtype": dtype, "read_back": "identical", "transformers": parity.to_json()}
    found = cautions(load_config(source))
    write_json(work.folder / "export.json", content | ({"cautions": found} if found else {}))
    checked = f"Read back before it was published, the logits are those of the source rounded to {dtype}, to the bit.\n"
    return Published(dtype, TRANSFORMERS, checked + parity.sentence(), tuple(found))


def write_gguf(options: Options, source: Path, work: Work) -> Published:
    sizes = {"check_tokens": options.check_tokens, "seed": options.seed}
    found = write_gguf_export(work.folder, source, options.dtype, pre_tokenizer=options.pre_tokenizer, **sizes)
    write_json(
        work.folder / "export.json", {"format": "gguf", "dtype": options.dtype, "gguf": dataclasses.asdict(found)}
    )
    relation = "quantized" if options.dtype == "q8_0" else "finetune"
    return Published(options.dtype, llama_cpp(found.file), found.sentence(), relation=relation)


def print_push(options: Options) -> None:
    """Uploads the folder, or says what would be."""
    assert options.push is not None
    files = push_folder(options.output, options.push, options.push_dry)
    rows = [(str(file.relative_to(options.output)), gib(file.stat().st_size)) for file in files]
    what = "Would go to the hub (push_dry=false uploads)" if options.push_dry else "Uploaded, private"
    table(f"{what}: {options.push}", ("file", ""), rows)


def gap_folder(name: str) -> Path:
    folder = own_path(name)
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
    if "quantised" in content:
        found = content["quantised"]
        rows = [
            ("weights", f"{gib(found['bytes'])}, {gib(found['bytes_bfloat16'])} in bfloat16"),
            ("logits beside the source's", f"{found['relative_rms']:.1e} relative RMS, KL {found['kl']:.2g} nats"),
        ]
        return table(f"Exported to {folder}", ("check", ""), rows)
    for caution in content.get("cautions", ()):
        say(f"caution: {caution}")
    if content.get("format") == "gguf":
        found = content["gguf"]
        rows = [
            (found["file"], gib(found["bytes"])),
            ("logits beside the source's", f"{found['relative_rms']:.1e} relative RMS, KL {found['kl']:.2g} nats"),
            ("pre-tokenizer", found["pre_tokenizer"]),
        ]
        return table(f"Exported to {folder}", ("check", ""), rows)
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
