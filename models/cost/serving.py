"""The commands that serve a model as an estimate has it: vLLM's, llama.cpp's, and transformers' of its own server.

Sources: `vllm.flags`; llama.cpp, tools/server/README.md (--ctx-size is shared out over --parallel requests,
ggml-org/llama.cpp#11681) and src/llama-model.cpp (recurrent states are float32); transformers 5.23, cli/serve.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config import HybridConfig
from ..errors import InputError
from ..foreign import own_path
from ..gguf.export import gguf_path
from ..gguf.layout import numbers_of
from ..gguf.vocabulary import read_vocabulary, text_notes
from ..hub import HUB, HubModel
from ..named import SHIPPED, is_adapter, is_here, model_folder, names
from ..shards import ADAPTER_SETTINGS
from .fit import Estimate

UNKNOWN, MERGED = "MODEL", "merged"
PRE_TOKENIZER = "gpt-2"  # for a tokenizer that cuts text as none of llama.cpp's does
LLAMA_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def serving_rows(estimate: Estimate, model: str) -> list[tuple[str, str]]:
    """A command for each program, or why it has none; `model` is what model= names."""
    return [
        ("vLLM", estimate.vllm_refusal() or vllm_command(estimate, model)),
        ("llama.cpp", llama_refusal(estimate) or llama_served(estimate, model)),
        ("transformers", transformers_refusal(estimate) or transformers_command(estimate, model)),
    ]


def serving_cautions(rows: Sequence[tuple[str, str]]) -> list[str]:
    """What to know of the commands of `serving_rows`, in sentences."""
    given = any(f"pre_tokenizer={PRE_TOKENIZER}" in command for _, command in rows)
    return list(text_notes({}, PRE_TOKENIZER, same_cuts=False)) if given else []


def own_name(model: str) -> str:
    """What model= names, as a shell takes it that is given it in quotes: `~` resolved; `UNKNOWN` for a named config,
    whose weights are nowhere."""
    if model.startswith(HUB) or is_here(model):
        return str(own_path(model)) if model.startswith("~") else model
    return UNKNOWN if model in names("model") else model


def served_name(model: str) -> tuple[str, str]:
    """What programs take a model by, a path or OWNER/NAME, and its revision of the hub ("": none stated); see
    `own_name`. Of an adapter it is the folder that `export_first` makes."""
    if adapts(model):
        return MERGED, ""
    if model.startswith(HUB):
        parsed = HubModel.parse(model)
        return parsed.name, parsed.revision or ""
    if model in SHIPPED and not is_here(model):
        return str(SHIPPED[model]), ""
    return own_name(model), ""


def hub_snapshot(model: str, file: str) -> Path | None:
    """The folder of the hub's cache that has a file of a model; nothing is fetched."""
    import huggingface_hub

    parsed = HubModel.parse(model)
    found = huggingface_hub.try_to_load_from_cache(parsed.name, file, revision=parsed.revision)
    return Path(found).parent if isinstance(found, str) else None


def adapts(model: str) -> bool:
    """Whether what model= names is an adapter, which is no model that a server opens."""
    if not model.startswith(HUB):
        return is_here(model) and is_adapter(own_path(model))
    return hub_snapshot(model, ADAPTER_SETTINGS) is not None and hub_snapshot(model, "config.json") is None


def export_first(estimate: Estimate, model: str) -> str:
    """The command, with `&&`, that makes of an adapter a folder that servers open; "" for what is one."""
    if not adapts(model):
        return ""
    dtype = estimate.fit.weight_dtype
    given = f" dtype={dtype}" if dtype in LLAMA_DTYPES and dtype != "bfloat16" else ""
    return f"limbeck export model={shlex.quote(own_name(model))} output={MERGED}{given} && "


def vllm_command(estimate: Estimate, model: str) -> str:
    name, revision = served_name(model)
    given = [f"--revision {shlex.quote(revision)}"] if revision else []
    command = " ".join(["vllm serve", shlex.quote(name), *given, *estimate.vllm_flags()])
    return export_first(estimate, model) + command


def pre_tokenizer_option(estimate: Estimate, model: str) -> str:
    """The option that `limbeck export format=gguf` needs for a model's tokenizer, " pre_tokenizer=NAME", as far as it
    is here; "" where it needs none. Raises InputError where no option helps."""
    try:
        folder = hub_snapshot(model, "tokenizer.json") if model.startswith(HUB) else model_folder(model)
    except InputError:  # a named config
        return ""
    if folder is None:
        return ""
    try:
        read_vocabulary(folder, estimate.config)
    except InputError:
        read_vocabulary(folder, estimate.config, PRE_TOKENIZER)
        return f" pre_tokenizer={PRE_TOKENIZER}"
    return ""


def llama_refusal(estimate: Estimate) -> str:
    """Why llama.cpp does not serve an estimate as it is; "" where it does."""
    fit = estimate.fit
    if why := gguf_refusal(estimate.config):
        return why
    if estimate.held is not None:
        return "weights that are quantised in other layouts become plain in a GGUF file, which is another size"
    if fit.weight_dtype not in LLAMA_DTYPES:
        return f"a GGUF file has no {fit.weight_dtype}; it has fit.weight_dtype={', '.join(LLAMA_DTYPES)}"
    if estimate.memory.kv and fit.kv_dtype not in LLAMA_DTYPES:
        return f"llama.cpp keeps no keys and values in {fit.kv_dtype}; it has fit.kv_dtype={', '.join(LLAMA_DTYPES)}"
    if estimate.memory.ssm and fit.ssm_dtype != "float32":
        return f"llama.cpp keeps SSM states in float32; fit.ssm_dtype is {fit.ssm_dtype}"
    if fit.tensor_parallel > 1:
        return f"llama.cpp shares a model out otherwise than vLLM; fit.tensor_parallel is {fit.tensor_parallel}"
    return ""


def gguf_refusal(config: HybridConfig) -> str:
    """Why `limbeck export format=gguf` does not write such a model; "" where it does."""
    try:
        numbers_of(config)
    except InputError as error:
        return str(error)
    return ""


def llama_served(estimate: Estimate, model: str) -> str:
    """The command, or why the model's tokenizer has no place in a GGUF file."""
    try:
        return llama_command(estimate, model, pre_tokenizer_option(estimate, model))
    except InputError as error:
        return str(error)


def llama_command(estimate: Estimate, model: str, option: str = "") -> str:
    """The export, and the server on its file; all layers on a GPU where there is one."""
    fit, dtype = estimate.fit, estimate.fit.weight_dtype
    flags = [
        f"--model {gguf_path(Path('gguf'), dtype)}", f"--ctx-size {fit.length * fit.batch}", f"--parallel {fit.batch}",
        f"--batch-size {fit.chunk}", f"--ubatch-size {fit.chunk}",
        f"--n-gpu-layers {999 if estimate.hardware.device == 'cuda' else 0}",
    ]  # fmt: skip
    if estimate.memory.kv:
        kept = LLAMA_DTYPES[fit.kv_dtype]
        flags += [f"--cache-type-k {kept}", f"--cache-type-v {kept}"]
    export = f"limbeck export model={shlex.quote(own_name(model))} output=gguf format=gguf dtype={dtype}{option}"
    return f"{export} && llama-server {' '.join(flags)}"


def transformers_refusal(estimate: Estimate) -> str:
    """Why transformers does not serve an estimate as it is; "" where it does."""
    fit = estimate.fit
    if estimate.memory.kv and fit.kv_dtype != fit.weight_dtype:
        return (
            f"transformers keeps keys and values in the weights' dtype; fit.kv_dtype is {fit.kv_dtype},"
            f" fit.weight_dtype {fit.weight_dtype}"
        )
    if fit.tensor_parallel > 1:
        return f"transformers' server is one GPU's; fit.tensor_parallel is {fit.tensor_parallel}"
    return ""


def transformers_command(estimate: Estimate, model: str) -> str:
    """Its caches grow with what it is sent: there is no context or batch to give."""
    (name, revision), fit = served_name(model), estimate.fit
    place = f"{name}@{revision}" if revision else name
    command = f"transformers serve {shlex.quote(place)} --dtype {fit.weight_dtype}"
    return export_first(estimate, model) + f"{command} --device {estimate.hardware.device}"
