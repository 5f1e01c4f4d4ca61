"""What a PEFT adapter of low rank (LoRA) adds to the weights of its base, read rows by rows: W + s B A.

A folder of PEFT has adapter_config.json and adapter_model.safetensors, whose tensors are called as the base's, after
`base_model.model.`: `NAME.lora_A.weight` [r, K] and `NAME.lora_B.weight` [N, r] of a matrix [N, K],
`NAME.lora_embedding_A` [r, V] and `NAME.lora_embedding_B` [D, r] of a table [V, D], which gets the transpose of B A,
and whole tensors that stand in the place of the base's (`modules_to_save`). s is lora_alpha / r, with use_rslora
lora_alpha / sqrt(r); `rank_pattern` and `alpha_pattern` name modules with others. (huggingface/peft 0.21,
src/peft/tuners/lora/layer.py and model.py.)

What adds anything else is refused, with how PEFT itself merges it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .families.family import StoredTensor, published_name
from .shards import ADAPTER_SETTINGS, ADAPTER_WEIGHTS
from .stored import DTYPES, Header, StoredPlace, merge_first, read_headers

if TYPE_CHECKING:
    from .config import HybridConfig

MERGED = "limbeck-adapter"  # where it lies in a folder of its base's weights, with which it is merged
FIRST = "base_model.model."
LOW_RANK = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base's weights, too
# Fields that make something else of A and B, or change the model around them, unless they are off.
OTHERWISE = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8}
AT_ONCE = 2**20  # numbers of the product in memory


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank factors A and B of one stored matrix, or (`table`) of a table of embeddings, and s."""

    a: Header
    b: Header
    scale: float
    table: bool

    def added(self, rows: Tensor, begin: int) -> Tensor:
        """Rows of the weight, from row `begin` on, with what the adapter adds, in their dtype: the sum is of float64
        and rounded once."""
        left, right = (self.a.read().mT, self.b.read().mT) if self.table else (self.b.read(), self.a.read())
        left, right = left[begin : begin + len(rows)].double(), right.double()
        result, step = torch.empty_like(rows), max(1, AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            result[part] = rows[part].double() + self.scale * (left[part] @ right)
        return result


@dataclasses.dataclass(frozen=True)
class Adapter:
    """By published names: what is added to tensors of the base, and those that stand in the place of its."""

    added: Mapping[str, LowRank]
    replaced: Mapping[str, Header]

    def place(self, known: str, place: StoredPlace) -> StoredPlace:
        """Where a tensor of the base lies once the adapter is merged."""
        if known in self.replaced:
            header = self.replaced[known]
            place = StoredPlace(header.file, header.name, DTYPES[header.dtype])
        return dataclasses.replace(place, low_rank=self.added.get(known))


def read_adapter(folder: Path, config: HybridConfig, expected: Mapping[str, StoredTensor]) -> Adapter:
    """The adapter of a folder, for a base of this config with the tensors `expected`. Raises InputError for one that is
    not of low rank, or not of this base."""
    settings = read_settings(folder)
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise InputError(f"{folder / ADAPTER_WEIGHTS} is missing; have the adapter saved again, in safetensors")
    pairs, replaced = dict[str, dict[str, Header]](), dict[str, Header]()
    for header in read_headers([folder / ADAPTER_WEIGHTS]):
        known, part = role_of(folder, config, header, expected)
        if part in pairs.get(known, {}) or (not part and known in replaced):
            raise InputError(f"{header.file}: {header.name} is there in two spellings; expected it once")
        if part:
            pairs.setdefault(known, {})[part] = header
        elif header.shape != expected[known].shape or header.dtype not in DTYPES:
            raise merge_first(folder, f"{header.name} is {header.dtype} {list(header.shape)}, and the base has"
                                      f" {list(expected[known].shape)} there")  # fmt: skip
        else:
            replaced[known] = header
    added = {known: low_rank(folder, settings, pair, expected[known].shape) for known, pair in pairs.items()}
    if not added and not replaced:
        raise InputError(f"{folder / ADAPTER_WEIGHTS} has no tensor; have the adapter saved again")
    return Adapter(added, replaced)


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError for a kind of adapter that is not merged here."""
    from .schema import AdapterSettings, read_as

    settings = DEFAULTS | read_as(AdapterSettings, folder / ADAPTER_SETTINGS)
    if settings["peft_type"] != "LORA":
        raise merge_first(folder, f"peft_type is {settings['peft_type']!r}, and only 'LORA' is merged on reading")
    for name in OTHERWISE:
        if settings.get(name):
            raise merge_first(folder, f"{name} is set, which is not merged on reading")
    if settings.get("bias", "none") != "none":
        raise merge_first(folder, f"bias is {settings['bias']!r}, and only 'none' is merged on reading")
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise merge_first(folder, f"init_lora_weights is {start!r}, which changes the base, too")
    return settings


def role_of(
    folder: Path, config: HybridConfig, header: Header, expected: Mapping[str, StoredTensor]
) -> tuple[str, str]:
    """The published name of the base's tensor that one of an adapter is for, and which of its factors it is: "A", "B",
    with "embedding_" before it of a table, or "", where it takes its place. Raises InputError."""
    name = header.name.removeprefix(FIRST)
    factor = LOW_RANK.fullmatch(name)
    stored = f"{factor[1]}.weight" if factor else name.replace(".base_layer.", ".")
    known = published_name(config, stored)
    outer = config.family_record.outer
    if config.tie_word_embeddings and known in (outer["lm_head.weight"], outer["embeddings.weight"]):
        raise merge_first(folder, f"{header.name} is of embeddings that are the head, too")
    if known not in expected or name == header.name:
        raise merge_first(folder, f"{header.name} is of no tensor that the base has")
    return known, f"{factor[2] or ''}{factor[3]}" if factor else ""


def low_rank(folder: Path, settings: Mapping[str, Any], pair: Mapping[str, Header], shape: tuple[int, ...]) -> LowRank:
    """The factors of one matrix of that shape. Raises InputError unless they fit it, and each other."""
    first = next(iter(pair.values()))
    table = "embedding_A" in pair
    a, b = (pair.get(f"embedding_{part}" if table else part) for part in "AB")
    if a is None or b is None or len(pair) != 2:
        raise InputError(f"{first.file}: {first.name} is alone; expected lora_A and lora_B of each module")
    sizes, rank = (shape[::-1] if table else shape), a.shape[0]
    if len(shape) != 2 or a.shape != (rank, *sizes[1:]) or b.shape != (*sizes[:1], rank) or not rank:
        raise merge_first(folder, f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} do not make {list(shape)}")
    for header in (a, b):
        if header.dtype not in DTYPES:
            raise InputError(f"{header.file}: tensor {header.name} has dtype {header.dtype}; expected one of"
                             f" {', '.join(DTYPES)}")  # fmt: skip
    module = LOW_RANK.fullmatch(a.name.removeprefix(FIRST))
    assert module is not None
    own = named_in(folder, settings, "rank_pattern", module[1], settings["r"])
    if own != rank:
        raise InputError(f"{a.file}: {a.name} has rank {rank}, and {ADAPTER_SETTINGS} says {own}")
    alpha = named_in(folder, settings, "alpha_pattern", module[1], settings["lora_alpha"])
    return LowRank(a, b, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), table)


def named_in(folder: Path, settings: Mapping[str, Any], pattern: str, module: str, default: float) -> float:
    """What a pattern says of a module, by its name or its end: the first that does, as PEFT has it, which takes them
    for regular expressions. Raises InputError for one that is more than a name."""
    for expression, value in (settings.get(pattern) or {}).items():
        name = expression.replace("\\.", ".")
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise merge_first(folder, f"{pattern} has {expression!r}, and only names of modules are read there")
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default
