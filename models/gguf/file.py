"""Writing and reading a GGUF file by the `gguf` package: rows by rows, so that memory holds a piece of a tensor (the
whole of those that llama.cpp has in another form)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..axes import Role
from ..checkpoint import Checkpoint, row_blocks
from ..config import HybridConfig
from ..errors import InputError
from ..shards import check_disk
from ..streamed import StreamedLM
from ..tensors import as_bytes, is_finite, saying_where
from .layout import Entry, entries, layout_of, numbers_of

if TYPE_CHECKING:
    from .vocabulary import Vocabulary

# dtype= -> the name of gguf.GGMLQuantizationType, and of gguf.LlamaFileType.
KINDS_OF_FILE = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
MATRICES = (Role.MATRIX, Role.TABLE, Role.EXPERTS)  # the others, small, stay in float32, as llama.cpp expects


def gguf_package() -> ModuleType:
    """Raises InputError where it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError("format=gguf needs the gguf package: pip install 'limbeck[gguf]'") from None
    return gguf


def kind_of(entry: Entry, dtype: str) -> str:
    """The name of the type that a tensor is stored as. Blocks of 32 numbers have to fit into a row; where they do not,
    it is bfloat16."""
    if entry.spec.role not in MATRICES:
        return "F32"
    kind = KINDS_OF_FILE[dtype][0]
    return "BF16" if kind == "Q8_0" and entry.shape[-1] % 32 else kind


def encoded(rows: Tensor, kind: str, name: str) -> Any:
    """Rows of numbers as the bytes of a type. Raises InputError where a number is beyond its range."""
    gguf = gguf_package()
    rows = rows.float()
    if kind == "Q8_0":
        return gguf.quants.quantize(rows.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if not is_finite(rows.to(dtype)):
        raise InputError(f"export: tensor {name} reaches {rows.abs().max():.4g}, beyond float16; take dtype=bfloat16")
    return as_bytes(rows.to(dtype))


def pieces(checkpoint: Checkpoint, entry: Entry) -> Iterator[Tensor]:
    """A tensor in its form, in runs of rows."""
    if entry.form is not None:
        yield entry.form.written(checkpoint.config, checkpoint.tensor(entry.spec.name)).contiguous()
        return
    for start, stop in row_blocks(entry.spec.shape, checkpoint.stored[entry.spec.name].dtype):
        yield checkpoint.rows(entry.spec.name, start, stop)


def write_gguf(path: Path, checkpoint: Checkpoint, vocabulary: Vocabulary, dtype: str, name: str) -> None:
    """Writes a file of that name in an existing folder. Raises InputError, and DiskError where the disk does not take
    it."""
    gguf, config = gguf_package(), checkpoint.config
    plan, extra = list(entries(config)), layout_of(config).extra(config)
    with saying_where(path), contextlib.closing(gguf.GGUFWriter(path, layout_of(config).architecture)) as writer:
        write_numbers(writer, config, vocabulary, dtype, name)
        for entry in plan:
            declare(writer, entry.name, entry.shape, kind_of(entry, dtype))
        for label, tensor in extra.items():
            declare(writer, label, tuple(tensor.shape), "F32")
        check_disk(path.parent, sum(info.nbytes for info in writer.tensors[0].values()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry in plan:
            for rows in pieces(checkpoint, entry):
                file.write(encoded(rows, kind_of(entry, dtype), entry.spec.name))
            writer.write_padding(file, writer.tensors[0][entry.name].nbytes)
        for label, tensor in extra.items():
            file.write(as_bytes(tensor))
            writer.write_padding(file, writer.tensors[0][label].nbytes)


def declare(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    gguf = gguf_package()
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, number)


def write_numbers(writer: Any, config: HybridConfig, vocabulary: Vocabulary, dtype: str, name: str) -> None:
    gguf = gguf_package()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[KINDS_OF_FILE[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_values(writer, f"{layout_of(config).architecture}.", numbers_of(config))
    add_values(writer, "tokenizer.ggml.", vocabulary.ggml)
    if vocabulary.chat_template is not None:
        add_values(writer, "tokenizer.", {"chat_template": vocabulary.chat_template})


def add_values(writer: Any, prefix: str, values: Mapping[str, Any]) -> None:
    """Whole numbers are unsigned there, 32 bits wide; in lists they have a sign."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in values.items():
        add[type(value)](prefix + key, value)


class GgufWeights:
    """The tensors of a file by our names, each read when it is wanted."""

    def __init__(self, path: Path, config: HybridConfig) -> None:
        self.gguf, self.config = gguf_package(), config
        self.stored = {tensor.name: tensor for tensor in self.gguf.GGUFReader(path).tensors}
        self.entries = {entry.spec.name: entry for entry in entries(config)}

    def kind(self, name: str) -> str:
        """The type that a tensor is stored as."""
        return self.stored[self.entries[name].name].tensor_type.name

    def tensor(self, name: str) -> Tensor:
        """Its numbers in our form, float32."""
        entry = self.entries[name]
        tensor = self.stored[entry.name]
        values = self.gguf.quants.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
        ours = torch.from_numpy(values.copy()).reshape(entry.shape)
        if entry.form is not None:
            ours = entry.form.read(self.config, ours)
        return ours.contiguous()


def open_gguf(path: Path, config: HybridConfig, device: torch.device | str = "cpu") -> StreamedLM:
    """A model of a file's weights, in float32."""
    weights = GgufWeights(path, config)
    return StreamedLM(config, lambda name: weights.tensor(name).to(device))
