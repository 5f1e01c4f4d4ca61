"""What vLLM's own code makes of the cache, as a program of its own: `python vllm_sizes.py REQUEST.json ANSWER.json`, in
vLLM's environment.

It knows nothing of limbeck: the request names folders with a config.json, loads (context, dtype of the SSM states, mode
of the Mamba cache) and bytes of memory for the cache. A model is made of each config without memory for its weights;
its layers say what they hold and keep, and vLLM's allocator shares the memory out. A rank of several is the first
one's, of a group that is told so. (Experts keep nothing, and the build for CPUs
refuses those of Nemotron, so that something else stands in their place.) That build has another default for
blocks than one for GPUs, so that what a platform decides is requested of FlashAttention and of the base of all
platforms, which that for CUDA leaves as it is.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

UNLIMITED = 2**30


def built(folder: str, ranks: int = 1) -> tuple[Any, int]:
    """vLLM's config, the layers of the model in it, and the parameters of a rank, without those of experts."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import nemotron_h, registry
    from vllm.utils.torch_utils import set_default_torch_dtype

    given = EngineArgs(folder, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", enforce_eager=True)
    # It looks at a class in a process of its own, for the sake of GPUs: an import of vLLM for each.
    with mock.patch.object(registry, "_run_in_subprocess", lambda look: look()):
        config = given.create_engine_config()
    config.parallel_config.tensor_parallel_size = ranks
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        begin_processes(ranks)
        with torch.device("meta"), mock.patch.object(nemotron_h, "NemotronHMoE", no_experts):
            model = initialize_model(config)
    return config, sum(parameter.numel() for parameter in model.parameters())


def no_experts(*_: Any, **__: Any) -> Any:
    """A module without weights that has any attribute of a mixture."""
    from torch import nn

    class Nothing(nn.Module):
        def __getattr__(self, name: str) -> int:
            return 0

    return Nothing()


def begin_processes(ranks: int) -> None:
    """The process group that layers ask for their part: of one, which answers for the first of `ranks`."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment, parallel_state

    place = Path(tempfile.gettempdir()) / f"vllm-sizes-{os.getpid()}"
    init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.get_tp_group().world_size = 1
    ensure_model_parallel_initialized(1, 1)
    parallel_state.get_tp_group().world_size = ranks


def prepare(config: Any, context: int, ssm_dtype: str, mode: str) -> None:
    """The config as it is for a load, where a GPU's platform has chosen the block."""
    from vllm.config import CacheConfig
    from vllm.model_executor.models.config import MambaModelConfig
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    cache = config.cache_config
    cache.block_size, cache.user_specified_block_size = CacheConfig.DEFAULT_BLOCK_SIZE, False
    cache.mamba_ssm_cache_dtype, cache.enable_prefix_caching = ssm_dtype, mode != "none"
    cache.mamba_cache_mode, cache.mamba_block_size, cache.mamba_page_size_padded = "none", None, None
    cache.kv_cache_layout = "LBHNC"
    config.model_config.max_model_len = context
    if config.model_config.is_hybrid:
        MambaModelConfig.verify_and_update_config(config)
        assert cache.mamba_cache_mode == mode
    with mock.patch.object(Platform, "_find_non_ssm_backends", lambda config: [FlashAttentionBackend]):
        Platform.update_block_size_for_backend(config)


def layer_specs(config: Any) -> dict[str, Any]:
    from vllm.config.vllm import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    return {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}


def most_sequences(kv_config: Any) -> int:
    """The largest --max-num-seqs with which graphs of decoding are captured; `UNLIMITED` where there is none."""
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    def works(count: int) -> bool:
        compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
        try:
            compilation.resolve_cudagraph_mode_and_sizes(
                AttentionCGSupport.ALWAYS, "FLASH_ATTN", kv_cache_config=kv_config, max_num_reqs=count
            )
        except ValueError as error:
            assert "exceeds available Mamba cache blocks" in str(error)
            return False
        return True

    low, high = 0, UNLIMITED
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low


def sizes(config: Any, context: int, ssm_dtype: str, mode: str, memory: int) -> dict[str, Any]:
    from vllm.v1.core import kv_cache_utils as utils

    prepare(config, context, ssm_dtype, mode)
    specs = layer_specs(config)
    groups = utils.get_kv_cache_groups(config, dict(specs))
    block, request = (
        utils._pool_bytes_per_block(config, groups),
        utils._max_memory_usage_bytes_from_groups(config, groups),
    )
    blocks = utils.get_kv_cache_config_from_groups(config, groups, memory)
    try:
        utils.get_kv_cache_configs(config, [specs], [memory])
        starts = True
    except ValueError:
        starts = False
    config.model_config.max_model_len = UNLIMITED
    longest = utils._estimate_max_model_len_from_groups(config, groups, memory - block)
    return {
        "block_size": config.cache_config.block_size, "bytes_per_block": block, "bytes_per_request": request,
        "blocks_per_request": request // block, "blocks": blocks.num_blocks, "starts": starts,
        "largest_max_num_seqs": most_sequences(blocks), "largest_max_model_len": longest,
    }  # fmt: skip


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, folder in request["folders"].items():
        config, _ = built(folder)
        found[name] = [sizes(config, **load, memory=request["memory"]) for load in request["loads"]]
        print(name, flush=True)
    for name, counts in request.get("ranks", {}).items():
        for ranks in counts:
            config, parameters = built(request["folders"][name], ranks)
            own = sizes(config, **request["loads"][0], memory=request["memory"])
            found[f"{name} x {ranks}"] = own | {"parameters": parameters}
            print(name, ranks, flush=True)
    Path(sys.argv[2]).write_text(json.dumps(found))
