"""Forward, training step and cached decoding beside transformers' NemotronHForCausalLM, on this CPU, in one run.

    python -m limbeck.benchmarks.cpu_vs_transformers [--rounds 5] [--json FILE] [--decode] [--processor-time]

Both run the same 28 M parameters in float32; decoding is that of the shipped model too, by `generate` on their side and
by the engine's steps on ours, between the first new token and the last. `--decode` measures that alone, and
`--processor-time` counts the process's time instead of the clock's: for one thread on a busy machine. The two take
turns, round by round, and each figure is the median of its rounds. Memory is the highest resident size during the work
above the size with the model loaded and eight tokens run through it, each measured in a fresh process of its own. The
training step is forward, cross-entropy and backward.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from limbeck.kernels.linear_kl import linear_cross_entropy
from limbeck.models.checkpoint import load_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Hardware
from limbeck.models.cost.speed import Load, roofline
from limbeck.models.cost.timing import this_cpu
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.decode import Decoder, lay_out
from limbeck.models.generate.generate import prefill
from limbeck.models.hybrid import HybridLM
from limbeck.models.provenance import provenance

CONFIG = HybridConfig(
    pattern="M-M-M-*-M-M-",
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    n_groups=4,
    ssm_state_size=128,
)
SHAPES = ((2, 1024), (1, 4096))
DECODE_PROMPT, DECODE_TOKENS = 128, 64
PREFILL_CHUNK = 32
SIDES = ("limbeck", "transformers")


def load(side: str) -> torch.nn.Module:
    """One side's model; the weights are the same, drawn by transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**CONFIG.to_hf())
    theirs = transformers.NemotronHForCausalLM(config).eval()
    if side == "transformers":
        return theirs
    ours = HybridLM(CONFIG)
    ours.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    return ours.eval()


def forward(model: torch.nn.Module, side: str, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        _ = model(tokens) if side == "limbeck" else model(tokens, use_cache=False).logits


def training_step(model: torch.nn.Module, side: str, tokens: torch.Tensor) -> None:
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    if isinstance(model, HybridLM):
        hidden = model.hidden_states(tokens).flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.head_weight, labels.flatten()).loss
    else:
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    model.zero_grad(set_to_none=True)


now = time.perf_counter


def decode(model: HybridLM, tokens: torch.Tensor, steps: int = DECODE_TOKENS) -> float:
    """Seconds of a greedy step of ours after the prompt, as the engine takes it: every token goes to the host."""
    batch, length = tokens.shape
    with torch.inference_mode():
        cache = Cache(model.config, batch, length + steps + 1)
        decoder = Decoder(model, cache, pack=True)
        token = prefill(model, tokens, cache, PREFILL_CHUNK).argmax(-1).tolist()
        token = decoder.step(token).argmax(-1).tolist()  # makes the step ready
        clock = now()
        for _ in range(steps):
            token = decoder.step(token).argmax(-1).tolist()
        return (now() - clock) / steps


def decode_theirs(model: Any, tokens: torch.Tensor, steps: int = DECODE_TOKENS) -> float:
    """Seconds of a greedy step of transformers' cached `generate`."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:  # the prompt, then every new token of the batch
            self.times.append(now())

        def end(self) -> None:
            pass

    clock, count = Clock(), steps + 1
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
    )
    return (clock.times[-1] - clock.times[1]) / steps


def decode_pair(name: str) -> tuple[HybridLM, Any]:
    """Ours, laid out for decoding, and theirs, with the same weights."""
    if name == "28 M":
        ours, theirs = load("limbeck"), load("transformers")
    else:
        import transformers

        zoo = Path(__file__).parents[1] / "models" / "zoo"
        ours = load_model(zoo, torch.float32)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(zoo, dtype=torch.float32).eval()
    assert isinstance(ours, HybridLM)
    lay_out(ours)
    return ours, theirs


def decode_rows(rounds: int) -> list[dict[str, Any]]:
    """Decoding side by side, and the share of the memory's bandwidth (as a sum over 256 MiB reads it, in the same
    minute) that our step reaches: weights, caches read, states read and written."""
    rows = []
    print(f"{'decoding':24} {'limbeck tok/s':>14} {'generate':>10} {'ratio':>6} {'GB/s':>6} {'of bandwidth':>13}")
    for name in ("shipped", "28 M"):
        ours, theirs = decode_pair(name)
        for batch in (1, 8):
            ids = torch.randint(3, ours.config.vocab_size, (batch, DECODE_PROMPT))
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            bandwidth = []
            for _ in range(rounds + 1):
                times["limbeck"].append(decode(ours, ids))
                times["transformers"].append(decode_theirs(theirs, ids))
                bandwidth.append(this_cpu(now).bandwidth_gb_s)
            middle = {side: statistics.median(times[side][1:]) for side in SIDES}
            # As many bytes as a step takes, at 1 GB/s and with products for nothing.
            probe = Hardware("1 GB/s", 0, 0, 1.0, 1e9)
            limit = roofline(
                ours.config, probe, Load(DECODE_PROMPT, DECODE_TOKENS, batch), torch.float32, torch.float32
            )
            assert limit is not None
            reached = limit.step_seconds / middle["limbeck"]  # GB/s
            share = reached / statistics.median(bandwidth)
            rate = {side: batch / middle[side] for side in SIDES}
            ratio = rate["limbeck"] / rate["transformers"]
            label = f"{name}, batch {batch}"
            speeds = f"{rate['limbeck']:14.0f} {rate['transformers']:10.0f} {ratio:6.2f}"
            print(f"{label:24} {speeds} {reached:6.1f} {share:13.0%}")
            row = {"work": f"decode {label}", "tokens_per_second": rate, "ratio": ratio}
            rows.append(row | {"gb_per_second": reached, "of_bandwidth": share})
    return rows


def seconds(work: Callable[[], Any]) -> float:
    clock = time.perf_counter()
    own = work()
    return own if isinstance(own, float) else time.perf_counter() - clock


def works(side: str, model: torch.nn.Module) -> dict[str, tuple[int, Callable[[], Any]]]:
    """What is timed: name -> (tokens, call)."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, tuple[int, Callable[[], Any]]] = {}
    for batch, length in SHAPES:
        ids = torch.randint(CONFIG.vocab_size, (batch, length), generator=generator)
        found[f"forward {batch} x {length}"] = (ids.numel(), functools.partial(forward, model, side, ids))
        found[f"training step {batch} x {length}"] = (ids.numel(), functools.partial(training_step, model, side, ids))
    return found


def flops(tokens: int, training: bool) -> float:
    """Matrix products of forward (x3 with backward) by the cost model, at short context."""
    from limbeck.models.cost.speed import flops_per_token

    return flops_per_token(CONFIG, 0) * tokens * (3 if training else 1)


def matmul_peak() -> float:
    """float32 FLOP/s of one 2048^3 product, the best of ten."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(a, a)) for _ in range(10))


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def peak_memory(side: str, name: str) -> int:
    """Bytes above the loaded model at the worst moment of one call, read every half millisecond."""
    model = load(side)
    _, work = works(side, model)[name]
    few = torch.randint(CONFIG.vocab_size, (1, 8))
    {"forward": forward, "training": training_step}[name.split()[0]](model, side, few)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the eight tokens have left
    before = resident()
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(highest, resident()) - before


def compare_forward(rounds: int) -> list[dict[str, Any]]:
    """Forward and training step side by side."""
    models = {side: load(side) for side in SIDES}
    jobs = {side: works(side, models[side]) for side in SIDES}
    ids = torch.randint(CONFIG.vocab_size, (2, 200))
    with torch.inference_mode():
        ours, theirs = models["limbeck"](ids), models["transformers"](ids).logits
    error = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    print(f"logits agree to a relative RMS of {error:.1e}\n")
    peak = matmul_peak()
    rows: list[dict[str, Any]] = []
    print(
        f"{'work':28} {'limbeck tok/s':>14} {'transformers':>14} {'ratio':>6} {'of matmul peak':>15} {'memory MiB':>18}"
    )
    for name, (tokens, _) in jobs["limbeck"].items():
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for side in SIDES:
            jobs[side][name][1]()
        for _ in range(rounds):
            for side in SIDES:
                times[side].append(seconds(jobs[side][name][1]))
        rate = {side: tokens / statistics.median(times[side]) for side in SIDES}
        command = [sys.executable, "-m", "limbeck.benchmarks.cpu_vs_transformers", "--peak"]
        memory = {
            side: int(subprocess.run([*command, side, name], check=True, capture_output=True, text=True).stdout)
            for side in SIDES
        }
        share = flops(tokens, name.startswith("training")) * rate["limbeck"] / tokens / peak
        ratio = rate["limbeck"] / rate["transformers"]
        mib = {side: memory[side] / 2**20 for side in SIDES}
        print(
            f"{name:28} {rate['limbeck']:14.0f} {rate['transformers']:14.0f} {ratio:6.2f} {share:15.0%}"
            f" {mib['limbeck']:8.0f} / {mib['transformers']:6.0f} ({mib['limbeck'] / mib['transformers']:.2f})"
        )
        rows.append({"work": name, "tokens_per_second": rate, "ratio": ratio, "of_matmul_peak": share, "bytes": memory})
    print(f"one 2048^3 product: {peak / 1e9:.0f} GFLOP/s\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--decode", action="store_true", help="decoding alone")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--processor-time", action="store_true", help="of decoding, instead of the clock's")
    options = parser.parse_args()
    if options.processor_time:
        global now
        now = time.process_time
    if options.peak:
        print(peak_memory(*options.peak))
        return
    rows = [] if options.decode else compare_forward(options.rounds)
    rows += decode_rows(options.rounds)
    facts = provenance() | {"machine": platform.machine()}
    print("\n" + "\n".join(f"{key}: {value}" for key, value in facts.items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "provenance": facts}, indent=1))


if __name__ == "__main__":
    main()
