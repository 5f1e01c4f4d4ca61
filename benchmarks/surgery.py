"""Prunes a checkpoint of the 12B's exact size to the 9B's by streaming, beside plain reading and writing of the bytes.

    python -m limbeck.benchmarks.surgery FOLDER [--small] [--rounds 1] [--model 12b|nano] [--layers 0]

FOLDER is made, holds up to 61 GB while it runs (--small: 0.1 GB), and is removed at the end. Weights and scores are
random; the order of layers is the one that gives the published pattern. `--model nano`: Nemotron 3 Nano 30B-A3B to the
widths of recipe=nemotron-3-nano-22b, all of its 52 layers (up to 152 GB) or the first `--layers`. Every round drops the
files from the page cache, times `limbeck prune` in a process of its own (its start, its hashing of the inputs and its
syncing included), drops them again, and times plain code that reads the same source bytes and writes and syncs as many
bytes as the output has. Peak memory is the process's high-water mark, pages of mapped files included, polled from
/proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import open_checkpoint, row_blocks, write_checkpoint
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters, num_tensors
from limbeck.models.folder import atomic_folder
from limbeck.models.named import model_config
from limbeck.models.provenance import provenance
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.prune.width_metrics import RandomScores
from torch import Tensor

# The published models (NVIDIA-NeMo/Megatron-Bridge, NVIDIA/Model-Optimizer), and what the 9B has to come out as.
WIDTHS = {
    "model_type": "nemotron_h", "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
    "chunk_size": 128, "vocab_size": 131072, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 12,
}  # fmt: skip
BEFORE = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
AFTER = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
REMOVED = (7, 52, 8, 48, 17, 18)
TARGET = {"layers": 56, "hidden_size": 4480, "intermediate_size": 15680}
PARAMETERS, TENSORS = 8_888_227_328, 341
NANO = {"hidden_size": 2304, "n_routed_experts": 104, "moe_shared_expert_intermediate_size": 3072}
BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class Surgery:
    """A config, what it is pruned to, and in which order its layers go."""

    config: HybridConfig
    target: dict[str, int]
    removed: tuple[int, ...] = ()

    def check(self, found: HybridConfig, names: int) -> None:
        expected = self.config.replace(**{name: size for name, size in self.target.items() if name != "layers"})
        if not self.removed:
            assert found.pattern == expected.pattern
            assert count_parameters(found) == count_parameters(expected) and names == len(tensor_table(expected))
            return
        assert found.pattern == AFTER and found.num_layers == 56 and num_tensors(found) == TENSORS == names
        assert found.hidden_size == expected.hidden_size and found.intermediate_size == expected.intermediate_size
        assert found.hidden_size < TARGET["hidden_size"] or count_parameters(found) == PARAMETERS


def nano(layers: int, small: bool) -> Surgery:
    """The first layers of Nemotron 3 Nano (0: all), as recipe=nemotron-3-nano-22b cuts them."""
    config, shrink = model_config("nemotron-3-nano-30b-a3b"), 8 if small else 1
    content = config.to_hf()
    pattern = config.pattern[: layers or None]
    content |= {"hybrid_override_pattern": pattern, "layers_block_type": None, "num_hidden_layers": len(pattern)}
    for name in ("hidden_size", "moe_intermediate_size", "moe_shared_expert_intermediate_size"):
        content[name] //= shrink
    if small:
        content |= {"vocab_size": 2048, "mamba_num_heads": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = {name: size // (1 if name == "n_routed_experts" else shrink) for name, size in NANO.items()}
    return Surgery(HybridConfig.from_hf({key: value for key, value in content.items() if value is not None}), target)


def twelve(small: bool) -> Surgery:
    target = {name: value // (16 if small and name != "layers" else 1) for name, value in TARGET.items()}
    return Surgery(config_of(small), target, REMOVED)


def config_of(small: bool) -> HybridConfig:
    shrink = 16 if small else 1
    found = HybridConfig.from_hf(
        WIDTHS
        | {"hybrid_override_pattern": BEFORE, "hidden_size": 5120 // shrink, "intermediate_size": 20480 // shrink}
    )
    return found.replace(vocab_size=2048, mamba_num_heads=8, num_attention_heads=8) if small else found


def random_tensors(config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """Every (name, rows): one block of random numbers, over and over, each time begun elsewhere."""
    noise = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    begin = 0
    for name, axes in tensor_table(config).items():
        for start, stop in row_blocks(axes.shape, torch.bfloat16):
            size = (stop - start) * (axes.numel // axes.shape[0])
            begin = (begin + 7919) % 2**16
            parts = [noise[begin : begin + size]]
            while (left := size - sum(len(part) for part in parts)) > 0:
                parts.append(noise[:left])
            yield name, torch.cat(parts).reshape(stop - start, *axes.shape[1:])


def make_inputs(folder: Path, case: Surgery, shard: int) -> None:
    """The source checkpoint, tokenizer-less, and its scores."""
    config = case.config
    with atomic_folder(folder / "source") as source:
        write_checkpoint(source, config, random_tensors(config), dtypes=torch.bfloat16, max_shard_bytes=shard)
    order = LayerScores(case.removed, (0.0,) * len(case.removed))
    save_scores(folder / "scores", Scores(RandomScores(0).scores(config), order))


def drop_cache(folder: Path) -> None:
    """Asks the system to forget what it holds of the files below."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def prune(folder: Path, target: dict[str, int], shard: int) -> tuple[float, dict[str, int]]:
    """Seconds of the command, and its peaks of resident bytes: in all, and without the pages of mapped files."""
    words = [f"model={folder / 'source'}", f"scores={folder / 'scores'}", f"output={folder / 'pruned'}"]
    words += [f"target.{name}={value}" for name, value in target.items()] + [f"max_shard_bytes={shard}"]
    peaks: dict[str, int] = {}
    clock = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "limbeck.scripts.run.main", "prune", *words], stdout=sys.stderr)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        for name in ("VmHWM", "RssAnon"):
            found = re.search(rf"{name}:\s+(\d+) kB", status)
            if found:
                peaks[name] = max(peaks.get(name, 0), int(found[1]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0, "limbeck prune failed"
    return time.perf_counter() - clock, peaks


def plain(folder: Path) -> float:
    """Seconds to read the source's files and to write and sync as many bytes as the output's."""
    buffer = bytearray(BLOCK)
    clock = time.perf_counter()
    for path in weights_of(folder / "source"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    copy = folder / "plain"
    copy.mkdir()
    for path in weights_of(folder / "pruned"):
        with (copy / path.name).open("wb", buffering=0) as file:
            for left in range(path.stat().st_size, 0, -BLOCK):
                file.write(memoryview(buffer)[: min(left, BLOCK)])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - clock
    shutil.rmtree(copy)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder to make, and to remove")
    parser.add_argument("--small", action="store_true", help="a trial at a sixteenth of the widths")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--model", choices=("12b", "nano"), default="12b")
    parser.add_argument("--layers", type=int, default=0, help="of nano: the first so many; 0: all")
    options = parser.parse_args()
    folder = options.folder
    case = twelve(options.small) if options.model == "12b" else nano(options.layers, options.small)
    config = case.config
    shard = 2 * 10**7 if options.small else 5 * 10**9
    folder.mkdir(parents=True)
    try:
        (folder / "words").mkdir()
        make_inputs(folder, case, shard)
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            shutil.rmtree(folder / "pruned", ignore_errors=True)
            drop_cache(folder)
            seconds, peaks = prune(folder, case.target, shard)
            drop_cache(folder)
            rounds.append({"prune": seconds, "plain": plain(folder), **peaks})
        pruned = open_checkpoint(folder / "pruned")
        after = pruned.config
        case.check(after, len(pruned.names()))
        sizes = {name: sum(path.stat().st_size for path in weights_of(folder / name)) for name in ("source", "pruned")}
    finally:
        shutil.rmtree(folder)
    print(f"{config.pattern} -> {after.pattern}")
    print(f"{count_parameters(config):,} -> {count_parameters(after):,} parameters, {num_tensors(after)} tensors,")
    print(f"{sizes['source'] / 1e9:.2f} GB read, {sizes['pruned'] / 1e9:.2f} GB written\n")
    print("| limbeck prune, s | plain read and write, s | ratio | peak resident, GiB | of it anonymous, GiB |")
    print("|---|---|---|---|---|")
    for found in rounds:
        memory = f"{found['VmHWM'] / 2**30:.2f} | {found['RssAnon'] / 2**30:.2f}"
        print(f"| {found['prune']:.1f} | {found['plain']:.1f} | {found['prune'] / found['plain']:.2f} | {memory} |")
    facts = provenance()
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in facts.items()))
    if options.json:
        options.json.write_text(json.dumps({"rounds": rounds, "bytes": sizes, "provenance": facts}, indent=1))


if __name__ == "__main__":
    main()
