"""The commands that serve a model as an estimate has it: vLLM's, llama.cpp's, and transformers' of its own server.

Sources: `vllm.flags`; llama.cpp, tools/server/README.md (--ctx-size is shared out over --parallel requests,
ggml-org/llama.cpp#11681) and src/llama-model.cpp (recurrent states are float32); transformers 5.23, cli/serve.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import HybridConfig
from ..errors import InputError
from ..gguf.export import gguf_path
from ..gguf.layout import layout_of
from ..hub import HUB, HubModel
from ..named import SHIPPED, names
from .fit import Estimate

UNKNOWN = "MODEL"
LLAMA_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def serving_rows(estimate: Estimate, model: str) -> list[tuple[str, str]]:
    """A command for each program, or why it has none; `model` is what model= names."""
    return [
        ("vLLM", estimate.vllm_refusal() or vllm_command(estimate, model)),
        ("llama.cpp", llama_refusal(estimate) or llama_command(estimate, model)),
        ("transformers", transformers_refusal(estimate) or transformers_command(estimate, model)),
    ]


def served_name(model: str) -> tuple[str, str]:
    """What programs take a model by, a path or OWNER/NAME, and its revision of the hub ("": none stated); `UNKNOWN` for
    a named config, whose weights are nowhere."""
    if model.startswith(HUB):
        parsed = HubModel.parse(model)
        return parsed.name, parsed.revision or ""
    if model in SHIPPED:
        return str(SHIPPED[model]), ""
    return (UNKNOWN if model in names("model") else model), ""


def vllm_command(estimate: Estimate, model: str) -> str:
    name, revision = served_name(model)
    given = [f"--revision {shlex.quote(revision)}"] if revision else []
    return " ".join(["vllm serve", shlex.quote(name), *given, *estimate.vllm_flags()])


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
        layout_of(config).numbers(config)
    except InputError as error:
        return str(error)
    return ""


def llama_command(estimate: Estimate, model: str) -> str:
    """The export, and the server on its file; all layers on a GPU where there is one."""
    fit, (name, _) = estimate.fit, served_name(model)
    own = model if name != UNKNOWN else UNKNOWN
    dtype = fit.weight_dtype
    flags = [
        f"--model {gguf_path(Path('gguf'), dtype)}", f"--ctx-size {fit.length * fit.batch}", f"--parallel {fit.batch}",
        f"--batch-size {fit.chunk}", f"--ubatch-size {fit.chunk}",
        f"--n-gpu-layers {999 if estimate.hardware.device == 'cuda' else 0}",
    ]  # fmt: skip
    if estimate.memory.kv:
        kept = LLAMA_DTYPES[fit.kv_dtype]
        flags += [f"--cache-type-k {kept}", f"--cache-type-v {kept}"]
    export = f"limbeck export model={shlex.quote(own)} output=gguf format=gguf dtype={dtype}"
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
    return f"transformers serve {shlex.quote(place)} --dtype {fit.weight_dtype} --device {estimate.hardware.device}"
