"""What one of several GPUs holds of a model that vLLM shares out over them (--tensor-parallel-size).

Source: vllm-project/vllm 0.32. Heads of a Mamba mixer with their convolution and groups (a single group is copied to
all ranks): layers/mamba/mamba_mixer2.py, mamba_utils.py; query heads, key-value heads (fewer than ranks are copied),
neurons: layers/linear.py; neurons of every expert, as it is without --enable-expert-parallel: layers/fused_moe/
config.py; rows of embedding and head, their number padded: layers/vocab_parallel_embedding.py. Norms over the stream,
routers, latent projections and the biases of what writes the stream are whole on every rank. So a rank holds what a
narrower model does, states, keys and values among it, and every formula of `cost` is true of that model's config.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ..config import HybridConfig
from ..errors import InputError
from ..layer import Sharing

VOCABULARY_MULTIPLE = 64  # that embedding and head are padded to
MOST_RANKS = 128  # of those that a message names


@functools.lru_cache(maxsize=1024)
def rank_config(config: HybridConfig, ranks: int) -> HybridConfig:
    """The config whose model is what a rank holds; all ranks hold as much. Multi-token prediction is left out, which
    vLLM loads for a speculative config alone. Of one rank the config itself. Raises InputError where the units of a
    layer, or the vocabulary, do not share out over so many."""
    if ranks == 1:
        return config
    for name, units, sharing in shared_units(config):
        if sharing.each(units, ranks) is None:
            raise InputError(
                f"tensor_parallel is {ranks}: {name} ({units:,}) does not share out over so many GPUs as vLLM does it;"
                f" give {sizes_text(config)}"
            )
    fields = {field: sharing for kind in config.kinds for field, sharing in kind.ranks.items()}
    widths = {field: sharing.each(getattr(config, field), ranks) for field, sharing in fields.items()}
    variants = tuple((letter, width // ranks, chosen) for letter, width, chosen in config.variants)
    return config.replace(
        **widths, variants=variants, vocab_size=padded_vocabulary(config) // ranks, mtp_steps=0, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def padded_vocabulary(config: HybridConfig) -> int:
    """Rows of embedding and head over all ranks."""
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def shared_units(config: HybridConfig) -> Iterator[tuple[str, int, Sharing]]:
    """What is shared out: its name, how many units there are, and how."""
    for kind in dict.fromkeys(config.kinds):
        yield from ((field, getattr(config, field), sharing) for field, sharing in kind.ranks.items())
    yield from (("moe_intermediate_size", width, Sharing.EQUAL) for _, width, _ in config.variants)
    yield "vocab_size, padded", padded_vocabulary(config), Sharing.EQUAL


def rank_counts(config: HybridConfig) -> list[int]:
    """The numbers of GPUs that a model can be shared out over, up to `MOST_RANKS`."""
    units = list(shared_units(config))
    counts = range(1, MOST_RANKS + 1)
    return [count for count in counts if all(how.each(size, count) is not None for _, size, how in units)]


def sizes_text(config: HybridConfig) -> str:
    """Those numbers as a message says them."""
    *others, last = map(str, rank_counts(config))
    return f"{', '.join(others)} or {last}" if others else last
