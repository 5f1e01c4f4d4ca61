"""Weights rounded for serving, in compressed-tensors' published layout: fp8 and w8a8 with a scale a row, whose
activations the server rounds token by token, w4a16 with a scale for each group of columns of a row.

Rounding is to the nearest, by the largest number of a row or group, unless the caller has rounded on data
(prune/calibration.py). Attention, latent projections, routers, convolutions, embeddings and the head stay as they are
(arXiv 2601.20088 keeps these, too), and whole layers that are named.
Scales are rounded to bfloat16 before the weights are, so that every reader gives the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axes import PRECISE, Role, TensorSpec
from .checkpoint import Checkpoint, open_checkpoint, stream_rows
from .companions import companions, copy_companions
from .config import HybridConfig
from .errors import CheckFailed, InputError
from .export import check_files, divergence, logits_of, relative_rms, state_length
from .families.family import scattered, stored_tensors, tensor_table_of
from .folder import write_json
from .rounding import ROUNDINGS, Rounding
from .shards import SHARD_BYTES, check_disk, shared_out, write_index
from .streamed import open_streamed
from .tensors import Form, TensorFile
from .tokenizer import state_begin

F8 = torch.float8_e4m3fn
AHEAD = "mtp."  # how the layers of multi-token prediction begin, which stay
ROWS = 32  # vLLM's kernel for 4 bits on a CPU (0.32) takes multiples of it
GROUPS = (128, 64, 32)  # columns that have one scale, the widest that goes into every row
KEPT = re.compile(r"(^|\.)([qkvo]_proj|fc\d_latent_proj)\.")  # of a layer's parts: attention, latent projections


class RoundedWeight(NamedTuple):
    """A stored weight in a format: its `numbers` [N, K] in units of their scales, and `scale` [N, groups], bfloat16."""

    numbers: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """What a reader makes of it, [N, K] float32."""
        numbers = self.numbers.float()
        return numbers * self.scale.float().repeat_interleave(numbers.shape[-1] // self.scale.shape[-1], -1)


Calibrated = Callable[[str], RoundedWeight]  # a stored tensor's name -> what data made of it


def compressed_tensors() -> Any:
    """The library's module of schemes. Raises InputError where it is not installed."""
    try:
        from compressed_tensors import quantization
    except ModuleNotFoundError:
        raise InputError(
            "format=fp8, w8a8 and w4a16 need compressed-tensors: pip install 'limbeck[quantised]'"
        ) from None
    return quantization


def is_rounded(spec: TensorSpec) -> bool:
    """Whether a tensor of the table is one that a format rounds."""
    if spec.layer is None or spec.role not in (Role.MATRIX, Role.EXPERTS):
        return False
    return KEPT.search(spec.part) is None


def rounded_names(config: HybridConfig, rounding: Rounding, kept: Container[int] = ()) -> set[str]:
    """The stored tensors that are rounded, none of the layers `kept`. Of 4 bits all of a kind stay where one has rows
    that kernels do not take. Raises InputError where a family stores one beside others in one tensor."""
    table, names = tensor_table_of(config), set[str]()
    for name, stored in stored_tensors(config).items():
        chosen = {is_rounded(table[piece.ours]) for piece in stored.pieces}
        if True in chosen:
            if len(stored.shape) != 2 or len(chosen) > 1:
                raise InputError(
                    f"{config.family} stores {name} as one stack, which no quantised layout has; take format=hf or gguf"
                )
            names.add(name)
    odd = {module_end(name) for name in names if rounding.grouped and stored_tensors(config)[name].shape[0] % ROWS}
    return {name for name in names if module_end(name) not in odd and layer_of(config, name) not in kept}


def layer_of(config: HybridConfig, name: str) -> int | None:
    """The layer of ours that a stored tensor belongs to."""
    return tensor_table_of(config)[stored_tensors(config)[name].pieces[0].ours].layer


def module_end(name: str) -> str:
    """The last part of a stored weight's module, such as "in_proj"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def group_of(config: HybridConfig, names: set[str]) -> int:
    """Columns of a group. Raises InputError where none of `GROUPS` goes into every row."""
    if not names:
        raise InputError(f"format=w4a16 needs matrices of a multiple of {ROWS} rows; no layer has one")
    widths = {stored_tensors(config)[name].shape[1] for name in names}
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    odd = next(width for width in sorted(widths) if width % GROUPS[-1])
    raise InputError(f"format=w4a16 needs rows of a multiple of {GROUPS[-1]} numbers; one has {odd}")


def scales_of(weight: Tensor, rounding: Rounding, group: int) -> Tensor:
    """[..., N, groups] of a weight [..., N, K], bfloat16: rounded up where it is below what the largest number needs,
    so that none is cut off."""
    scale = weight.unflatten(-1, (-1, group)).abs().amax(-1) / rounding.largest
    near = scale.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    return torch.where(near.float() < scale, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def rounded(weight: Tensor, rounding: Rounding, group: int) -> Tensor:
    """What a reader makes of a weight [N, K] that was stored in a format, in float32."""
    return rounded_weight(weight, rounding, group).values()


def rounded_weight(weight: Tensor, rounding: Rounding, group: int) -> RoundedWeight:
    """A weight [N, K] (float32) at the nearest numbers of a format."""
    scale = scales_of(weight, rounding, group)
    return RoundedWeight(nearest(weight / scale.float().repeat_interleave(group, 1), rounding), scale)


def rounded_input(x: Tensor, rounding: Rounding) -> Tensor:
    """x [..., K] as a server's products read it: each token rounded by a scale of its own."""
    scale = (x.float().abs().amax(-1, keepdim=True) / rounding.largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (nearest(x.float() / scale, rounding) * scale).to(x.dtype)


def nearest(numbers: Tensor, rounding: Rounding) -> Tensor:
    """Scaled float32 numbers at those of a format, in float32."""
    if rounding.kind == "float":
        return numbers.clamp(-rounding.largest, rounding.largest).to(F8).float()
    return numbers.round().clamp(-rounding.largest - 1, rounding.largest)


def quantised_tensors(name: str, weight: Tensor, rounding: Rounding, group: int) -> dict[str, Tensor]:
    """What a weight [N, K] is stored as, to the nearest."""
    return stored_form(name, rounded_weight(weight.float(), rounding, group), rounding)


def stored_form(name: str, weight: RoundedWeight, rounding: Rounding) -> dict[str, Tensor]:
    """The tensors of a file that hold a rounded weight."""
    module = name.removesuffix(".weight")
    if rounding.kind == "float":
        return {name: weight.numbers.to(F8), f"{module}.weight_scale": weight.scale}
    whole = weight.numbers.to(torch.int8)
    if rounding.bits == 8:
        return {name: whole, f"{module}.weight_scale": weight.scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed, shape = pack_to_int32(whole, rounding.bits), torch.tensor(whole.shape)
    return {f"{module}.weight_packed": packed, f"{module}.weight_scale": weight.scale, f"{module}.weight_shape": shape}


def forms_of(
    checkpoint: Checkpoint, names: set[str], rounding: Rounding, group: int | None
) -> Iterator[dict[str, Form]]:
    """What each weight is stored as, with dtypes and shapes: those of one rounded row tell the rest."""
    for name, stored in stored_tensors(checkpoint.config).items():
        if name not in names:
            spec = tensor_table_of(checkpoint.config)[stored.pieces[0].ours]
            yield {name: (torch.float32 if spec.role in PRECISE else torch.bfloat16, stored.shape)}
            continue
        (rows, columns), forms = stored.shape, dict[str, Form]()
        for key, tensor in quantised_tensors(name, torch.zeros(1, columns), rounding, group or columns).items():
            one_row = not key.endswith("_shape")
            forms[key] = (tensor.dtype, (rows, *tensor.shape[1:]) if one_row else tuple(tensor.shape))
        yield forms


def whole_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, put together of the rows of ours that lie in it."""
    config, shapes = checkpoint.config, {name: each.shape for name, each in stored_tensors(checkpoint.config).items()}
    parts: dict[str, Tensor] = {}
    left: dict[str, int] = {}
    done: dict[str, int] = {}
    for ours, rows in stream_rows(checkpoint):
        start = done.get(ours, 0)
        done[ours] = start + len(rows)
        for name, row, part in scattered(config, ours, start, rows):
            if name not in parts:
                parts[name] = torch.empty(shapes[name], dtype=part.dtype)
                left[name] = parts[name].numel()
            flat = parts[name].flatten(0, -2) if parts[name].dim() > 1 else parts[name]
            flat[row : row + len(part)] = part
            left[name] -= part.numel()
            if not left[name]:
                yield name, parts.pop(name)


def scheme_of(config: HybridConfig, names: set[str], rounding: Rounding, group: int | None) -> dict[str, Any]:
    """config.json's quantization_config, as the library writes it."""
    library = compressed_tensors()
    how = {"strategy": "group", "group_size": group} if rounding.grouped else {"strategy": "channel"}
    weights = library.QuantizationArgs(num_bits=rounding.bits, type=rounding.kind, symmetric=True, **how)
    inputs = library.QuantizationArgs(
        num_bits=rounding.bits, type=rounding.kind, symmetric=True, strategy="token", dynamic=True
    )
    scheme = library.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs if rounding.activations else None
    )
    content = library.QuantizationConfig(
        config_groups={"group_0": scheme}, format=rounding.layout, quantization_status="compressed",
        ignore=ignored_modules(config, names),
    ).to_dict()  # fmt: skip
    return {key: value for key, value in content.items() if value is not None}


def ignored_modules(config: HybridConfig, names: set[str]) -> list[str]:
    """The modules that stay, by the ends of their names, which readers spell with a first part of their own; those of
    layers that stay, where others of the kind are rounded, by all but that part."""
    table, stays, single = tensor_table_of(config), set[str](), set[str]()
    goes = {module_end(name) for name in names}
    for name, stored in stored_tensors(config).items():
        role = table[stored.pieces[0].ours].role
        if name in names or name.startswith(AHEAD) or role not in (Role.MATRIX, Role.EXPERTS, Role.ROUTER):
            continue
        if module_end(name) in goes:
            single.add(module_pattern(name))
        else:
            stays.add(module_end(name))
    ahead = {f"re:{re.escape(AHEAD)}.*"} if config.mtp_steps else set()
    ends = (f"re:.*\\.{last}$" for last in stays if last != "lm_head")
    return sorted({"lm_head", *ahead, *single, *ends})


def module_pattern(name: str) -> str:
    """A regular expression for the module of a stored weight, and of those that are its like in the same layer (its
    experts)."""
    parts, numbered = [], False
    for part in name.removesuffix(".weight").split(".")[1:]:
        parts.append(r"\d+" if part.isdigit() and numbered else re.escape(part))
        numbered |= part.isdigit()
    return "re:.*\\." + "\\.".join(parts) + "$"


@dataclasses.dataclass(frozen=True)
class QuantisedAgreement:
    """What a quantised folder holds beside its source in float32 arithmetic, activations as they are: logits of random
    tokens in relative RMS, KL(source || folder) in nats a token; bytes of the weights, and of the source's in
    bfloat16."""

    bytes: int
    bytes_bfloat16: int
    relative_rms: float
    kl: float

    def sentence(self, name: str) -> str:
        return (
            f"Read back before it was published, the weights in {name} give the source's logits up to"
            f" {self.relative_rms:.1e} relative RMS (KL {self.kl:.2g} nats a token on random tokens), with activations"
            f" as they are; {self.bytes:,} bytes, {self.bytes_bfloat16:,} in bfloat16."
        )


def write_quantised(
    folder: Path,
    source: Path,
    name: str,
    *,
    check_tokens: int,
    seed: int,
    kept: Container[int] = (),
    calibrated: Calibrated | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> QuantisedAgreement:
    """Fills an existing folder with files of weights, reads it again, and compares every tensor and the logits.
    The layers `kept` stay in bfloat16; the others are `calibrated`'s, or to the nearest.

    Raises CheckFailed, and InputError where the family or a width cannot be stored so.
    """
    checkpoint, rounding = open_checkpoint(source), ROUNDINGS[name]
    config = checkpoint.config
    names = rounded_names(config, rounding, kept)
    check_files(source, config)
    group = group_of(config, names) if rounding.grouped else None
    content = config.to_hf() | {"torch_dtype": "bfloat16"}
    content |= {"quantization_config": scheme_of(config, names, rounding, group)}
    shards = shared_out(forms_of(checkpoint, names, rounding, group), max_shard_bytes)
    check_disk(folder, sum(shard.bytes for shard in shards))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(TensorFile(folder / shard.file, shard.forms)) for shard in shards]
        place = {key: (file, form[0]) for file, shard in zip(files, shards, strict=True)
                 for key, form in shard.forms.items()}  # fmt: skip
        for stored, weight in whole_tensors(checkpoint):
            if stored not in names:
                tensors = {stored: weight.to(place[stored][1])}
            elif calibrated is not None:
                tensors = stored_form(stored, calibrated(stored), rounding)
            else:
                tensors = quantised_tensors(stored, weight, rounding, group or weight.shape[1])
            for key, tensor in tensors.items():
                place[key][0].write(key, tensor)
    write_index(folder, shards)
    write_json(folder / "config.json", content)
    copy_companions(companions(source), folder)
    state_length(folder, config)
    state_begin(folder)
    after = open_checkpoint(folder)
    check_steps(after, checkpoint, rounding, calibrated is not None)
    if calibrated is not None:
        check_calibrated(after, calibrated)
    ids = torch.randint(config.vocab_size, (1, check_tokens), generator=torch.Generator().manual_seed(seed))
    expected, logits = logits_of(open_streamed(source), ids), logits_of(open_streamed(folder), ids)
    plain = sum(2 * math.prod(each.shape) for each in stored_tensors(config).values())
    written = sum((folder / shard.file).stat().st_size for shard in shards)
    return QuantisedAgreement(written, plain, relative_rms(expected, logits),
                              divergence(expected, logits))  # fmt: skip


def check_calibrated(after: Checkpoint, calibrated: Calibrated) -> None:
    """Raises CheckFailed unless every rounded tensor is read as calibration left it."""
    places = {name: place for stored in after.stored.values() for name, place in stored.places.items()}
    for name, place in places.items():
        if place.quantised is not None:
            expected = calibrated(name).values().to(place.dtype)
            if not torch.equal(place.rows(0, len(expected)), expected):
                raise CheckFailed(f"export: tensor {name} read back is not what calibration made of it")


def check_steps(after: Checkpoint, before: Checkpoint, rounding: Rounding, calibrated: bool) -> None:
    """Raises CheckFailed unless every rounded number lies within half a step of the source's (unless that is left to
    `check_calibrated`), and what stays is the source's in bfloat16. (Of float8 half a step is a sixteenth of the
    number; at the smallest, 2**-10 of a scale.)"""
    for name in before.names():
        plain = all(place.quantised is None for place in after.stored[name].places.values())
        if calibrated and not plain:
            continue
        source, found = before.tensor(name).float(), after.tensor(name).float()
        if plain:
            right = torch.equal(found, source.to(after.stored[name].dtype).float())
        else:
            largest = source.abs().amax(-1, keepdim=True) / rounding.largest
            step = source.abs() / 16 + largest * 2**-9 if rounding.kind == "float" else largest * 0.51
            # A scale is up to 2**-7 above what the largest number needs, and numbers are read in bfloat16.
            right = bool(((found - source).abs() <= 1.02 * step + source.abs() * 2**-8).all())
        if not right:
            raise CheckFailed(f"export: tensor {name} read back is not the source's, rounded")
