"""Tensors in safetensors files, read rows by rows: where they lie, and how those that are quantised become numbers.

Quantised weights are recognised by the tensors beside them, as the libraries that write them call these:
- float8 (`weight` F8_E4M3): times `weight_scale` or `weight_scale_inv`, one number, one a row, a group or a block
  (DeepSeek's and transformers' "fp8", ModelOpt's FP8, compressed-tensors' "float-quantized", FP8_BLOCK among it);
- int8 (`weight` I8): times `weight_scale`, less `weight_zero_point` before where there is one ("int-quantized");
- 4 or 8 bits packed into int32 (`weight_packed`, `weight_shape`): the low bits first, half the range above zero, times
  `weight_scale` of a group of columns ("pack-quantized"); a packed `weight_zero_point` runs down the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError
from .foreign import SETTINGS, check_regular, read_object
from .shards import ADAPTER_SETTINGS
from .tensors import DTYPES as ALL_DTYPES
from .tensors import is_finite

if TYPE_CHECKING:
    from .lora import LowRank

DTYPES = {name: dtype for name, dtype in ALL_DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
QUANTISED = {"F8_E4M3": "float8", "I8": "int8"}
SCALE_DTYPES = (*DTYPES, "F8_E8M0")  # powers of two, which torch has as numbers; in U8 they would be exponents
SCALES = ("_scale", "_scale_inv")  # after the weight's name
PACKED, SHAPE, ZERO = "_packed", "_shape", "_zero_point"
# Of activations and caches, which no weight needs.
UNUSED = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "input_zero_point", "weight_g_idx")
BLOCK = 128  # of rows and columns that one `weight_scale_inv` is for, where config.json does not say


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of one of its tensors; `numbers` are what it holds, where that is known without the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    numbers: tuple[int, ...] | None = None

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop-1 of the first dimension."""
        if self.numbers is not None:
            return torch.tensor(self.numbers)[start:stop]
        with open_file(self.file) as file:
            return file.get_slice(self.name)[start:stop] if self.shape else file.get_tensor(self.name)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The weight's numbers, their scales, and what is taken off first; `block` rows and columns have one scale, `bits`
    is their width where they are packed."""

    numbers: Header
    scale: Header
    zero: Header | None
    shape: tuple[int, ...]
    block: tuple[int, int]
    bits: int | None
    kind: str

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin..end-1 of the weight [N, K], float32."""
        numbers = self.numbers.read(begin, end)
        q = numbers.float() if self.bits is None else unpacked(numbers, self.bits, self.shape[1]).float()
        if self.zero is not None:
            q = q - self.spread(self.zero_points(self.zero), begin, end)
        scale = self.scales()
        each = self.spread(scale, begin, end)
        if (scale == 0).any() and ((each == 0) & (q != 0)).any():
            raise self.wrong_scale("zero, of numbers that are not")
        return q * each

    def scales(self) -> Tensor:
        """As they are stored, float32. Raises InputError where one is none."""
        scale = self.scale.read().float()
        wrong = scale[~(torch.isfinite(scale) & (scale >= 0))]
        if len(wrong):
            raise self.wrong_scale("NaN" if wrong.isnan().any() else f"{wrong[0]:g}")
        return scale

    def wrong_scale(self, what: str) -> InputError:
        return InputError(f"{self.scale.file}: tensor {self.scale.name} has a scale of {what}; expected finite numbers"
                          " above zero (zero of zeros alone)")  # fmt: skip

    def zero_points(self, zero: Header) -> Tensor:
        stored, packed = zero.read(), self.bits is not None and zero.dtype == "I32"
        return (unpacked(stored.mT, self.bits, self.shape[0]).mT if self.bits and packed else stored).float()

    def spread(self, values: Tensor, begin: int, end: int) -> Tensor:
        """One number for each of rows begin..end-1 and columns of the weight, of [], [1], [N], or [rows, columns] of
        blocks."""
        if values.numel() == 1:
            return values.reshape(1, 1)
        if values.dim() == 1:
            return values[begin:end, None]
        rows = torch.arange(begin, end) // (self.block[0] if values.shape[0] > 1 else self.shape[0])
        columns = torch.arange(self.shape[1]) // (self.block[1] if values.shape[1] > 1 else self.shape[1])
        return values[rows][:, columns]


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Numbers [N, columns] of int32 words [N, columns x bits / 32], the low bits first, half their range below zero."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)[..., :columns] - 2 ** (bits - 1)


@dataclasses.dataclass(frozen=True)
class StoredPlace:
    """Where a stored tensor lies: the file, its name there, the dtype that it is read in, what it is quantised as, and
    what an adapter adds to it."""

    file: Path
    name: str
    dtype: torch.dtype
    quantised: Quantised | None = None
    low_rank: LowRank | None = None

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin..end-1, counted as by `families.family.Piece`. Raises InputError where they hold NaN or
        infinity."""
        if self.quantised is not None:
            tensor = self.quantised.rows(begin, end).to(self.dtype)
        else:
            tensor = plain_rows(self.file, self.name, begin, end)
        if self.low_rank is not None:
            tensor = self.low_rank.added(tensor, begin)
        if not is_finite(tensor):
            kind = "NaN" if torch.isnan(tensor).any() else "infinity"
            added = "" if self.low_rank is None else f" with what {self.low_rank.a.file} adds"
            raise InputError(f"{self.file}: tensor {self.name}{added} holds {kind}; expected finite numbers")
        return tensor


def plain_rows(path: Path, name: str, begin: int, end: int) -> Tensor:
    with open_file(path) as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        each = math.prod(shape[1:-1])
        first = begin // each
        tensor = part[first : -(-end // each)]
    return tensor.flatten(0, -2)[begin - first * each : end - first * each] if len(shape) > 1 else tensor


def open_file(path: Path) -> Any:
    """A safetensors file, memory-mapped. Raises InputError where it is not a whole one."""
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        what = "is empty" if not size else f"is truncated or no safetensors file ({size} bytes: {error})"
        raise InputError(f"{path} {what}; copy it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def read_headers(files: Sequence[Path]) -> Iterator[Header]:
    """Every tensor of the files. Raises InputError."""
    for path in files:
        with open_file(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield Header(path, name, part.get_dtype(), tuple(part.get_shape()))


def is_companion(name: str, names: Mapping[str, Header]) -> bool:
    """Whether a tensor belongs to a quantised weight, or to activations that were quantised with one. Raises InputError
    where it is beside a weight that is not quantised."""
    for ending in (*SCALES, SHAPE, ZERO):
        weight = name.removesuffix(ending)
        if weight != name and weight + PACKED in names:
            return True
        if weight != name and weight in names:
            header = names[weight]
            if header.dtype in DTYPES:
                raise InputError(
                    f"{names[name].file}: tensor {name} is beside {weight} of dtype {header.dtype}, which is not"
                    f" quantised; expected a weight of {' or '.join(QUANTISED)}, or no {name}"
                )
            return True
    return name.rpartition(".")[2] in UNUSED


def quantised_weight(header: Header, names: Mapping[str, Header], settings: Mapping[str, Any]) -> Quantised | None:
    """How a tensor is quantised, None where it is not; `settings` are config.json's quantization_config. Raises
    InputError where what is beside it is missing, contradicts it, or its layout is not known."""
    packed = header.name.endswith(PACKED)
    if not packed and header.dtype not in QUANTISED:
        return None
    weight = header.name.removesuffix(PACKED)
    where = f"{header.file}: tensor {header.name}"
    scale = scale_of(header, weight, names)
    if packed and (weight + SHAPE not in names or header.dtype != "I32"):
        raise InputError(
            f"{where} is packed in a way that is not known; expected int32, and {weight + SHAPE} beside it"
        )
    shape, bits = header.shape if weight + SHAPE not in names else stated_shape(names[weight + SHAPE]), None
    if packed:
        bits = next((bits for bits in (4, 8) if header.shape == (shape[0], -(-shape[1] * bits // 32))), None)
        if bits is None:
            raise InputError(f"{where} has shape {list(header.shape)}, which is no {list(shape)} of 4 or 8 bits")
    elif shape != header.shape:
        raise InputError(f"{where} has shape {list(header.shape)}, but {weight + SHAPE} says {list(shape)}")
    if f"{weight.rpartition('.')[0]}.weight_g_idx" in names:
        raise InputError(f"{where} has its columns in another order (weight_g_idx), which is not read")
    if len(shape) != 2:
        raise InputError(f"{where} is quantised and has {len(shape)} dimensions; expected 2")
    block, zero = block_of(scale, shape, settings), names.get(weight + ZERO)
    if zero is not None:
        check_zero(zero, header, scale, bits)
    kind = f"int{bits}, packed" if packed else QUANTISED[header.dtype]
    return Quantised(header, scale, zero, shape, block, bits, kind)


def scale_of(header: Header, weight: str, names: Mapping[str, Header]) -> Header:
    """The one scale beside a quantised weight. Raises InputError."""
    beside = [names[weight + ending] for ending in SCALES if weight + ending in names]
    where = f"{header.file}: tensor {header.name} has dtype {header.dtype}"
    if len(beside) != 1:
        count = "two scales" if beside else "no scale"
        raise InputError(f"{where} and {count}; expected {weight + SCALES[0]} or {weight + SCALES[1]} beside it")
    (scale,) = beside
    if scale.dtype not in SCALE_DTYPES:
        raise InputError(
            f"{scale.file}: tensor {scale.name} has dtype {scale.dtype}, and is no scale that is read; expected one of"
            f" {', '.join(SCALE_DTYPES)}"
        )
    return scale


def stated_shape(header: Header) -> tuple[int, ...]:
    """What a `weight_shape` says. Raises InputError."""
    if header.dtype not in ("I32", "I64") or header.shape != (2,):
        raise InputError(
            f"{header.file}: tensor {header.name} has dtype {header.dtype} and shape {list(header.shape)}; expected two"
            " whole numbers, rows and columns"
        )
    return tuple(int(size) for size in header.read())


def check_zero(zero: Header, header: Header, scale: Header, bits: int | None) -> None:
    """Raises InputError unless a `weight_zero_point` is of a weight's dtype and its scale's shape; of packed numbers it
    may be packed too, down the rows."""
    whole = [(dtype, scale.shape) for dtype in ("I8", *([] if bits else [header.dtype]))]
    if bits and len(scale.shape) == 2:
        whole.append(("I32", (-(-scale.shape[0] * bits // 32), scale.shape[1])))
    if (zero.dtype, zero.shape) not in whole:
        expected = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in dict.fromkeys(whole))
        raise InputError(
            f"{zero.file}: tensor {zero.name} is {zero.dtype} {list(zero.shape)}, beside a scale"
            f" {list(scale.shape)}; expected {expected}"
        )


def block_of(scale: Header, shape: tuple[int, ...], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a weight that one of its scales is for. Raises InputError where they do not fit."""
    stated = stated_blocks(settings)
    for rows, columns in stated or ([(BLOCK, BLOCK)] if scale.name.endswith("_inv") else []):
        if scale.shape == (-(-shape[0] // rows), -(-shape[1] // columns)):
            return rows, columns
    if math.prod(scale.shape) == 1 or scale.shape == (shape[0],):
        return shape[0], shape[1]
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if groups and scale.shape[0] in (1, shape[0]) and shape[1] % groups == 0:
        return (1 if scale.shape[0] > 1 else shape[0]), shape[1] // groups
    raise InputError(
        f"{scale.file}: tensor {scale.name} has shape {list(scale.shape)}, which is no scale of a weight {list(shape)};"
        " expected one number, one a row, a group of columns or a block"
    )


def objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def stated_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of blocks as a quantization_config states them: DeepSeek's and transformers' "fp8" for all
    weights, compressed-tensors for each group of modules."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in objects(groups.values())] if isinstance(groups, dict) else []
    given = [each.get("block_structure") for each in objects(weights)]
    return [
        (each[0], each[1])
        for each in (settings.get("weight_block_size"), *given)
        if isinstance(each, list) and len(each) == 2 and all(isinstance(size, int) and size > 0 for size in each)
    ]


def quantization_of(path: Path) -> dict[str, Any]:
    """What a folder's config.json says of quantisation; nothing where it says nothing."""
    content = read_object(path / "config.json", SETTINGS)
    stated = content.get("quantization_config") or content.get("compression_config")
    return stated if isinstance(stated, dict) else {}


def states_tied(path: Path) -> bool:
    """Whether a folder's config.json says that the head is the embeddings."""
    return read_object(path / "config.json", SETTINGS).get("tie_word_embeddings") is True


def dtype_of_numbers(path: Path) -> torch.dtype:
    """The dtype that quantised weights are read in: what config.json says that the model computes in, else bfloat16."""
    content = read_object(path / "config.json", SETTINGS)
    stated = content.get("torch_dtype") or content.get("dtype")
    return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}.get(str(stated), torch.bfloat16)


def without_weights(path: Path, expected: str) -> InputError:
    """What to do about a folder that has no weights to be read, but may have others."""
    if (path / ADAPTER_SETTINGS).exists():
        raise merge_first(path, "it has no weights of its own; model= and limbeck.load read it with its base")
    others = sorted(file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}"))
    if others:
        return InputError(
            f"{path} has no safetensors, only {others[0]}, which runs code when it is read; have it saved again where"
            " you trust it: model.save_pretrained('SAVED', safe_serialization=True)"
        )
    return InputError(f"{path}: no weights; expected {expected}")


def merge_first(adapter: Path, why: str) -> InputError:
    """What to do about a PEFT adapter that is not merged on reading, and why it is not."""
    base = read_object(adapter / ADAPTER_SETTINGS, SETTINGS).get("base_model_name_or_path")
    code = f"M.from_pretrained('{adapter}').merge_and_unload().save_pretrained('MERGED')"
    return InputError(
        f"{adapter} is a PEFT adapter of {base}: {why}; merge it first, and put the tokenizer of {base} beside it:"
        f' python -c "from peft import AutoPeftModelForCausalLM as M; {code}"'
    )
