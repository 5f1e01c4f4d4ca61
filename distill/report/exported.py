"""What an export is made of and says of itself: its folder in a format, export.json, and the tables of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...models.cautions import cautions, format_cautions, opens_in_transformers
from ...models.checkpoint import load_config
from ...models.config import HybridConfig
from ...models.cost.fit import LONGEST
from ...models.cost.inference import memory
from ...models.cost.stored_weights import of_format
from ...models.device import torch_dtype
from ...models.errors import InputError, gib
from ...models.export import write_export
from ...models.folder import write_json
from ...models.gguf.export import gguf_path, write_gguf_export
from ...models.gguf.file import KINDS_OF_FILE, gguf_package, open_gguf
from ...models.hybrid import HybridLM
from ...models.quantise import Calibrated, compressed_tensors, write_quantised
from ...models.rounding import ROUNDINGS
from ...models.served_inputs import served
from ...models.shards import SHARD_BYTES
from ...models.streamed import open_streamed
from ..text.packing import Batch
from .card import TRANSFORMERS, VLLM, Opened, Published, Table, llama_cpp
from .exported_text import text_agreement, text_rows, text_sentence

FORMATS = ("hf", "gguf", *ROUNDINGS)
Shown = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # a table's title, columns and rows


@dataclasses.dataclass(frozen=True)
class ExportForm:
    """A format with what it takes; raises InputError where that does not fit, or what it needs is not installed."""

    format: str
    dtype: str
    max_shard_bytes: int | None  # None: 5 GB, of formats that have several files
    check_tokens: int
    seed: int
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format={self.format} is unknown; known: {', '.join(FORMATS)}")
        if self.format == "gguf":
            gguf_package()
            if self.max_shard_bytes is not None:
                raise InputError("max_shard_bytes is of folders; format=gguf writes one file, leave it out")
            if self.dtype not in KINDS_OF_FILE:
                raise InputError(f"dtype={self.dtype} is none of format=gguf; known: {', '.join(KINDS_OF_FILE)}")
        elif self.pre_tokenizer is not None:
            raise InputError("pre_tokenizer is llama.cpp's; give format=gguf with it, or leave it out")
        elif self.rounds:
            compressed_tensors()
            if self.dtype != "bfloat16":
                raise InputError(f"dtype={self.dtype}: what format={self.format} leaves is bfloat16; leave dtype out")
        else:
            torch_dtype(self.dtype)

    @property
    def rounds(self) -> bool:
        return self.format in ROUNDINGS

    def settings(self) -> dict[str, Any]:
        """The options that the weights follow from."""
        given = {"dtype": self.dtype, "check_tokens": self.check_tokens, "seed": self.seed}
        if self.format != "hf":
            given |= {"format": self.format}
        if self.format == "gguf":
            return given | {"pre_tokenizer": self.pre_tokenizer}
        return given | {"max_shard_bytes": self.shard_bytes}

    @property
    def shard_bytes(self) -> int:
        return SHARD_BYTES if self.max_shard_bytes is None else self.max_shard_bytes

    def write(
        self,
        folder: Path,
        source: Path,
        kept: Container[int] = (),
        calibrated: Calibrated | None = None,
        facts: Mapping[str, Any] | None = None,
        held_out: Sequence[Batch] = (),
        device: torch.device | None = None,
    ) -> Published:
        """Fills an existing folder, export.json in it. Of a format that rounds the layers `kept` stay, and weights are
        `calibrated`'s or to the nearest; `facts` are what else there is to tell of that. On `held_out` text, where
        there is any, the export is measured beside its source, on `device`."""
        config, sizes = load_config(source), {"check_tokens": self.check_tokens, "seed": self.seed}
        found, content = cautions(config), dict[str, Any]()
        if self.rounds:
            found += format_cautions(config, self.format, kept)
            agreement = write_quantised(
                folder, source, self.format, kept=kept, calibrated=calibrated, max_shard_bytes=self.shard_bytes, **sizes
            )
            content = {"format": self.format, "quantised": dataclasses.asdict(agreement)} | dict(facts or {})
            content |= ({"cautions": found} if found else {}) | {"needs": needs(config, self.format, kept=kept)}
            checked = agreement.sentence(self.format) + how_rounded(content)
            opened = opened_by(config, self.format, kept)
            published = Published(self.format, opened, checked, tuple(found), "quantized", cards(content))
        elif self.format == "gguf":
            made = write_gguf_export(folder, source, self.dtype, pre_tokenizer=self.pre_tokenizer, **sizes)
            content = {"format": "gguf", "dtype": self.dtype, "gguf": dataclasses.asdict(made)}
            content |= {"cautions": made.notes} if made.notes else {}
            content["needs"] = needs(config, f"gguf {self.dtype}", file_bytes=made.bytes)
            relation = "quantized" if self.dtype == "q8_0" else "finetune"
            published = Published(self.dtype, llama_cpp(made.file), made.sentence(), relation=relation)
        else:
            parity = write_export(folder, source, torch_dtype(self.dtype), max_shard_bytes=self.shard_bytes, **sizes)
            content = {"dtype": self.dtype, "read_back": "identical", "transformers": parity.to_json()}
            content |= ({"cautions": found} if found else {}) | {"needs": needs(config, self.dtype)}
            same = "Read back before it was published, the logits are those of the source rounded to"
            checked = f"{same} {self.dtype}, to the bit.\n{parity.sentence()}"
            published = Published(self.dtype, opened_by(config), checked, tuple(found))
        if held_out:
            text = text_agreement(
                open_streamed(source, device=device or "cpu"), self.read(folder, config, device or "cpu"), held_out
            )
            content["text"] = dataclasses.asdict(text)
            checked = published.checked + text_sentence(content["text"])
            published = dataclasses.replace(published, checked=checked)
        write_json(folder / "export.json", content)
        return published

    def read(self, folder: Path, config: HybridConfig, device: torch.device | str) -> HybridLM:
        """The model of a folder in this format, in float32, as a server computes (`served`)."""
        if self.format == "gguf":
            return open_gguf(gguf_path(folder, self.dtype), config, device)
        return served(open_streamed(folder, device=device), folder)


def opened_by(config: HybridConfig, name: str | None = None, kept: Container[int] = ()) -> Opened:
    """How a folder is opened, plain or in the format `name` whose layers `kept` stay."""
    return TRANSFORMERS if opens_in_transformers(config, name, kept) else VLLM


def how_rounded(content: Mapping[str, Any]) -> str:
    """How the numbers of a rounded export were chosen, in a sentence or two."""
    text = "\nNumbers are the nearest of the format."
    if "calibration_tokens" in content:
        text = (
            f"\nNumbers were chosen on {content['calibration_tokens']:,} tokens of calibration text, each column's"
            " error made up for by the columns after it (GPTQ, arXiv 2210.17323)."
        )
    if "keep_layers" in content:
        text += f" Layers {', '.join(map(str, content['keep_layers']))} stay in bfloat16."
    return text


def needs(
    config: HybridConfig, form: str, *, kept: Container[int] = (), file_bytes: int | None = None
) -> list[dict[str, Any]]:
    """What weights and caches take for one sequence of 131,072 tokens (or as many as the model is made for), in the
    export's own format, first, and in those that it could have had: bytes, or why it cannot. Keys, values and
    convolution states are in 16 bits, SSM states in 32."""
    rows, context = list[dict[str, Any]](), min(LONGEST, config.max_position_embeddings)
    caches = memory(config, context, chunk=None)
    for name in dict.fromkeys((form, "bfloat16", *ROUNDINGS)):
        row: dict[str, Any] = {"format": name, "context": context}
        try:
            if name in ROUNDINGS:
                row["weights"] = of_format(config, ROUNDINGS[name], torch.bfloat16, kept if name == form else ()).total
            elif file_bytes is not None and name == form:
                row["weights"] = file_bytes
            else:
                row["weights"] = memory(config, 1, weight_dtype=torch_dtype(name), chunk=None).weights
            row["total"] = row["weights"] + caches.total - caches.weights
        except InputError as error:
            row["cannot"] = str(error)
        rows.append(row)
    return rows


def needs_table(content: Mapping[str, Any]) -> Shown:
    rows: list[tuple[str, ...]] = [
        (row["format"], *((gib(row["weights"]), gib(row["total"])) if "total" in row else ("-", row["cannot"])))
        for row in content["needs"]
    ]
    context = content["needs"][0]["context"]
    return f"Memory at {context:,} tokens", ("format", "weights", "with caches"), rows


def sensitivity_table(content: Mapping[str, Any]) -> Shown:
    """Most sensitive first."""
    rows = sorted(content["sensitivity"], key=lambda row: (-row["kl"], row["layer"]))
    kept = content.get("keep_layers", ())
    cells: list[tuple[str, ...]] = [
        (f"{row['layer']} ({row['pattern']})", ", ".join(row["matrices"]), f"{row['parameters']:,}",
         f"{row['kl']:.3g}", "bfloat16" if row["layer"] in kept else content["format"])
        for row in rows
    ]  # fmt: skip
    title = f"What rounding one layer alone costs, KL in nats a token ({content['sensitivity_tokens']:,} tokens)"
    return title, ("layer", "matrices", "parameters", "KL", "stored as"), cells


def cards(content: Mapping[str, Any]) -> tuple[tuple[str, Table], ...]:
    """The tables of a rounded export's card."""
    shown = [needs_table(content)] + ([sensitivity_table(content)] if "sensitivity" in content else [])
    return tuple((f"{title}:", (list(columns), [list(row) for row in rows])) for title, columns, rows in shown)


def check_tables(folder: Path, content: Mapping[str, Any]) -> list[Shown]:
    """What export.json says, in tables; earlier versions wrote less into it."""
    tables: list[Shown] = [(f"Exported to {folder}", ("check", ""), check_rows(content))]
    further = {"sensitivity": sensitivity_table, "needs": needs_table}
    return tables + [shown(content) for name, shown in further.items() if name in content]


def check_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    text = text_rows(content["text"]) if "text" in content else []
    return [*logit_rows(content), *text]


def logit_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    own = content.get("quantised") or content.get("gguf")
    if own is not None:
        logits = f"{own['relative_rms']:.1e} relative RMS, KL {own['kl']:.2g} nats"
        rows: list[tuple[str, ...]] = [("logits beside the source's", logits)]
        if "gguf" in content:
            return [(own["file"], gib(own["bytes"])), *rows, ("pre-tokenizer", own["pre_tokenizer"])]
        return [("weights", f"{gib(own['bytes'])}, {gib(own['bytes_bfloat16'])} in bfloat16"), *rows]
    theirs = content["transformers"]
    rows = [("read back", content["read_back"]), ("transformers", theirs.get("note", ""))]
    if theirs["relative_rms"] is not None:
        rows[1] = (f"{theirs['class']} {theirs['version']}", f"{theirs['relative_rms']:.1e} relative RMS")
    if "dt_floor_transformers" in theirs:
        rows += [
            (f"  both with dt >= {theirs['dt_floor_transformers']:g}", "as transformers has it"),
            (f"  ours with dt >= {theirs['dt_floor']:g}", f"{theirs['relative_rms_own_clamps']:.1e} relative RMS"),
        ]
    return rows
