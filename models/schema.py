"""What content that is not ours has to be, by pydantic, and what is said of content that is not: one line with the
place, the value, and what would be right. Fields of a config.json follow from the family's record and HybridConfig's
annotations; tokenizer files, adapters, indices and generation_config.json stand here.

Imported where something is checked: pydantic takes its time, and text is read without it.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from .errors import InputError
from .foreign import LARGEST, LARGEST_WIDTH, MOST_LAYERS, SETTINGS, read_object, shown
from .hints import guess_option
from .quantities import with_quantities
from .rope import ROPE_SCALINGS

if TYPE_CHECKING:
    from .families.family import Family

EXPECTED = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "string": "a text",
    "bool": "true or false", "path": "a path", "dict": "an object", "model": "an object", "list": "a list",
    "none": "null", "tuple": "a list",
}  # fmt: skip
Checked = TypeVar("Checked")
Width = Annotated[int, Field(ge=0, le=LARGEST_WIDTH)]
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # -1 stands for none in some files
Count = Annotated[int, Field(ge=0, le=2**40)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Words = Annotated[list[str], Field(max_length=MOST_LAYERS)]
Limit = Annotated[list[float | Mapping[str, Any]], Field(min_length=2, max_length=2)]
Blocks = Annotated[list[Mapping[str, Any]], Field(max_length=MOST_LAYERS)]  # of Puzzle's layers
# Fields of a config.json that are not in HybridConfig by that name, or are written otherwise there.
WRITTEN: dict[str, Any] = {
    "num_hidden_layers": Annotated[int, Field(ge=1, le=MOST_LAYERS)],
    "hybrid_override_pattern": Annotated[str, Field(max_length=MOST_LAYERS)],
    "layers_block_type": Words, "layer_types": Words, "max_position_embeddings": Count,
    "bos_token_id": TokenId | list[TokenId], "eos_token_id": TokenId | list[TokenId], "pad_token_id": TokenId,
    "scoring_func": str, "moe_router_score_function": str,
    "hidden_act": str, "mlp_hidden_act": str, "mamba_hidden_act": str,
    "use_bias": bool, "mlp_bias": bool, "attention_bias": bool, "mamba_proj_bias": bool, "use_sliding_window": bool,
    "time_step_limit": Limit, "mamba_dt_limit": Limit, "rope_theta": Real, "license": str | list[str],
    "n_shared_experts": Width, "num_nextn_predict_layers": Width, "mtp_layers_block_type": Words,
    "mtp_hybrid_override_pattern": Annotated[str, Field(max_length=MOST_LAYERS)],
    "mamba_d_head": Width | str, "mamba_d_ssm": Width, "mamba_expand": Real, "projectors_bias": bool,
    "position_embedding_type": str, "logits_scaling": Real, "embedding_multiplier": Real, "residual_multiplier": Real,
    "attention_multiplier": Real, "attention_in_multiplier": Real, "attention_out_multiplier": Real,
    "key_multiplier": Real, "lm_head_multiplier": Real, "ssm_in_multiplier": Real, "ssm_out_multiplier": Real,
    "mlp_multipliers": list[Real], "ssm_multipliers": list[Real], "block_configs": Blocks, "mtp_block_configs": Blocks,
}  # fmt: skip
OF_HINTS: dict[Any, Any] = {int: Width, float: Real, bool: bool, str: str}


class Read(BaseModel):
    """Content that is read from a file; what is not known of it stays."""

    model_config = ConfigDict(strict=True, extra="allow")


class AddedToken(Read):
    content: str | None = None


class NamedTemplate(Read):
    name: str
    template: str


class TokenizerSettings(Read):
    """tokenizer_config.json."""

    bos_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    pad_token: str | AddedToken | None = None
    unk_token: str | AddedToken | None = None
    chat_template: str | list[NamedTemplate] | None = None


class GenerationSettings(Read):
    """generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None


class AdapterSettings(Read):
    """adapter_config.json of PEFT, what is read of one of low rank."""

    peft_type: str
    base_model_name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    r: Annotated[int, Field(ge=1, le=LARGEST_WIDTH)] = 8
    lora_alpha: Real = 8
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]] | None = None
    alpha_pattern: dict[str, Real] | None = None


class ShardIndex(Read):
    """model.safetensors.index.json: the file of each tensor, in the same folder."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\x00]+\.safetensors$")]]


def read_as(schema: type[BaseModel], path: Path, largest: int = SETTINGS) -> dict[str, Any]:
    """The object of a JSON file, once it is as the schema says. Raises InputError."""
    content = read_object(path, largest)
    conform(schema, content, f"{path}: ")
    return content


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises InputError."""
    return typing.cast(dict[str, str], read_as(ShardIndex, path, LARGEST)["weight_map"])


def conform(schema: Any, content: Any, where: str) -> Any:
    """The content as pydantic reads it. Raises InputError, which begins with `where`."""
    try:
        return adapter(schema).validate_python(content)
    except ValidationError as error:
        raise InputError(where + complaint(error.errors(include_url=False), content)) from None


@functools.cache
def adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def complaint(errors: Sequence[Any], content: Any) -> str:
    """One line for pydantic's errors: those of the first place, since a union has one for each of its members."""
    place, value = place_of(errors[0], content)
    own = [error for error in errors if place_of(error, content)[0] == place]
    if errors[0]["type"] == "missing":
        return f"{place} is missing"
    expected = " or ".join(dict.fromkeys(expectation(error) for error in own))
    return f"{place} is {shown(value)}; expected {expected}" if place else f"expected {expected}"


def place_of(error: Any, content: Any) -> tuple[str, Any]:
    """The place of an error, and what stands there; the names of a union's members, which pydantic's place has too, are
    left out."""
    place = ""
    for key in error["loc"]:
        if isinstance(content, Mapping) and key in content:
            content, place = content[key], f"{place}.{key}" if place else str(key)
        elif isinstance(content, (list, tuple)) and isinstance(key, int) and key < len(content):
            content, place = content[key], f"{place}[{key}]"
        elif error["type"] == "missing" and key == error["loc"][-1]:
            place = f"{place}.{key}" if place else str(key)
    return place, content


def expectation(error: Any) -> str:
    """What would be right, of one of pydantic's errors."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"at least {context['ge']:g}" if "ge" in context else f"at most {context['le']}"
    if kind == "greater_than":
        return f"at least {context['gt'] + 1}" if isinstance(context["gt"], int) else f"more than {context['gt']:g}"
    if kind == "less_than":
        return f"less than {context['lt']}"
    known = kind.endswith("_type") or kind == "finite_number"
    return EXPECTED.get(kind.partition("_")[0], error["msg"]) if known else str(error["msg"])


def check_config(hf: Mapping[str, Any], family: Family, config: type) -> None:
    """Raises InputError where a field of a config.json has not the type or range of the HybridConfig field that it
    spells, or of `WRITTEN`. `config` is the class that has the fields; null says that a field is not there."""
    conform(config_schema(family, config), hf, "config: ")


@functools.cache
def config_schema(family: Family, config: type) -> type[BaseModel]:
    """The schema of a family's config.json."""
    hints = typing.get_type_hints(config)
    fields = {
        name: OF_HINTS.get(without_none(hints[field]), Any)
        for field, spellings in family.spellings.items()
        for name in spellings
    }
    rope = rope_schema()
    return loose(f"{family.architecture}Fields", fields | WRITTEN | {"rope_parameters": rope, "rope_scaling": rope})


def rope_schema() -> type[BaseModel]:
    """The schema of what a config.json says of rotary positions, from the records of rope.py."""
    fields: dict[str, Any] = {"rope_type": str, "type": str, "rope_theta": Real, "partial_rotary_factor": Real}
    for kind in ROPE_SCALINGS.values():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            fields[field.name] = OF_HINTS.get(without_none(hints[field.name]), Any)
    return loose("RopeFields", fields | {"original_max_position_embeddings": Count})


def loose(name: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    """A schema whose fields may be null, or not there."""
    return create_model(name, __base__=Read, **{field: (kind | None, None) for field, kind in fields.items()})  # type: ignore[call-overload]


def without_none(hint: Any) -> Any:
    """The type of a field that may be none as well."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if isinstance(hint, UnionType) and len(members) == 1 else hint


def checked(cls: type[Checked], where: str, **options: Any) -> Checked:
    """A dataclass of options. Raises InputError where one is none of its fields, or of another type."""
    own_types = getattr(cls, "option_types", None)  # of a target: its widths are options, and no fields
    known = [field.name for field in dataclasses.fields(cls)] if own_types is None else list(own_types())  # type: ignore[arg-type]
    for name in options.keys() - set(known):
        raise InputError(f"{where}: {name} is no option here{guess_option(name, known)}; known: {', '.join(known)}")
    try:
        found = TypeAdapter(cls).validate_python(with_quantities(options))
    except ValidationError as error:
        first = error.errors()[0]
    else:
        read = {**vars(found), **getattr(found, "widths", {})}
        for name, value in options.items():  # pydantic takes True for 1
            if isinstance(value, bool) and not isinstance(read.get(name, value), bool):
                raise InputError(f"{where}: {name} is {value}; expected a number")
        return found
    if isinstance(own := first.get("ctx", {}).get("error"), InputError):
        raise own
    raise InputError(f"{where}: {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}")
