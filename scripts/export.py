"""`limbeck export`: a checkpoint in the dtype and shards asked for, read back and compared before it appears."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import load_model, open_checkpoint, stream_tensors, write_checkpoint
from ..models.config import HybridConfig
from ..models.cost import count_parameters
from ..models.errors import CheckFailed
from ..models.folder import write_json
from .inputs import model_folder, torch_dtype
from .show import read_json, result, table
from .stage import run_stage

PARITY = 1e-4


@dataclasses.dataclass(frozen=True)
class Options:
    model: str
    output: Path
    dtype: str
    max_shard_bytes: int
    check_tokens: int
    seed: int


def run(options: Options) -> None:
    source = model_folder(options.model)
    run_stage(
        options.output,
        name="export",
        inputs={"model": source},
        options={name: getattr(options, name) for name in ("dtype", "max_shard_bytes", "check_tokens", "seed")},
        make=lambda folder, facts: fill(folder, source, options),
    )
    show(options.output)
    result(options.output, {"model": str(options.output)})


def fill(folder: Path, source: Path, options: Options) -> None:
    """Writes the folder, reads it again and compares logits: with the source rounded to the same dtype they have to
    be the same to the bit; transformers, where it is installed, has to agree too. Raises CheckFailed."""
    checkpoint = open_checkpoint(source)
    dtype = torch_dtype(options.dtype)
    write_checkpoint(
        folder,
        checkpoint.config,
        stream_tensors(checkpoint),
        dtype=dtype,
        tokenizer_from=source,
        max_shard_bytes=options.max_shard_bytes,
    )
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(checkpoint.config.vocab_size, (1, options.check_tokens), generator=generator)
    rounded = load_model(source, dtype).float()
    again = load_model(folder)
    with torch.no_grad():
        logits = again(ids)
        if not torch.equal(rounded(ids), logits):
            worst = (rounded(ids) - logits).abs().max().item()
            raise CheckFailed(f"export: logits of the folder read back differ from the source's by up to {worst:.3g}")
    parity = transformers_parity(folder, ids, logits, checkpoint.config)
    if parity["relative_rms"] is not None and parity["relative_rms"] > PARITY:
        raise CheckFailed(
            f"export: transformers' logits differ by {parity['relative_rms']:.3g} relative RMS ({parity})"
        )
    write_json(folder / "export.json", {"dtype": options.dtype, "read_back": "identical", "transformers": parity})
    card(folder, checkpoint.config, options.dtype)


def transformers_parity(folder: Path, ids: Tensor, logits: Tensor, config: HybridConfig) -> dict[str, Any]:
    """How far transformers' native class is from our logits on the same folder, and which lower limit of dt each has:
    transformers clamps at `time_step_min` in prefill, the published code and ours at `time_step_limit`."""
    limits = {"dt_floor": config.dt_limit[0], "dt_floor_transformers": config.extra.get("time_step_min", 0.001)}
    if importlib.util.find_spec("transformers") is None:
        return limits | {"relative_rms": None, "note": "transformers is not installed"}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = theirs(ids, use_cache=False).logits
    error = ((found - logits).square().mean() / logits.square().mean()).sqrt().item()
    return limits | {"relative_rms": error, "version": transformers.__version__, "class": type(theirs).__name__}


def card(folder: Path, config: HybridConfig, dtype: str) -> None:
    """A model card: what this is and how to open it."""
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags: [limbeck, pruned, nemotron_h]
---
# A compressed hybrid Mamba-2/Transformer

{count_parameters(config):,} parameters in {dtype}; {config.num_layers} layers, `{config.pattern}`.
Made by limbeck; `limbeck.json` says from what, `selection.json` of the pruning stage which units were kept. The
licence is that of the base model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
""",
        encoding="utf-8",
    )


def show(folder: Path) -> None:
    found = read_json(folder / "export.json")
    theirs = found["transformers"]
    parity = theirs.get("note") or f"{theirs['relative_rms']:.1e} relative RMS ({theirs['class']})"
    table(f"Exported to {folder}", ("check", ""), [("read back", found["read_back"]), ("transformers", parity)])
