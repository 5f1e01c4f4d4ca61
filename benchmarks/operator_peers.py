"""The operators beside those of other packages: mamba_ssm's Triton kernels and transformers' torch path.

    python -m limbeck.benchmarks.operator_peers [--cases 8]

On a GPU ours and mamba_ssm's are Triton kernels in float32. Without one both run in Triton's interpreter with
TRITON_INTERPRET=1 (bit-exact to IEEE float32, slow); without that, ours is the torch path and mamba_ssm is left out. A
copy of mamba_ssm on PYTHONPATH without its compiled extension is enough, with einops beside it. Each line gives the
largest relative RMS difference over the cases, of values and of every gradient: ours and theirs from the float64
recurrence (kernels/reference.py), and one from the other. Exit code 3 where ours is off the recurrence by more than
1e-5 in a value or 1e-4 in a gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import random
import sys
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from limbeck.kernels.causal_conv1d import causal_conv1d
from limbeck.kernels.norm import gated_rms_norm
from limbeck.kernels.reference import causal_conv1d_reference, gated_rms_norm_reference, ssd_scan_reference
from limbeck.kernels.ssd import ssd_scan
from limbeck.kernels.state_update import state_update
from limbeck.models.provenance import provenance
from torch import Tensor
from torch.nn import functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


def drawn_scan(seed: int) -> Inputs:
    """x, B and C as slices of one tensor; lengths off the chunk; an initial state in every second case."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    groups = draw.choice((1, 2, 4))
    heads, head_dim, state = groups * draw.choice((1, 2)), draw.choice((16, 32, 64, 80)), draw.choice((16, 32, 64))
    batch, tokens = draw.choice((1, 2)), draw.randint(1, 70)
    sizes = (heads * head_dim, groups * state, groups * state)
    x, B, C = normal(batch, tokens, sum(sizes)).split(sizes, -1)
    return {
        "x": x.unflatten(-1, (heads, head_dim)), "dt": normal(batch, tokens, heads),
        "A": -torch.rand(heads, generator=generator) * 8 - 1e-3, "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)), "D": normal(heads), "dt_bias": normal(heads) - 2,
        "initial_state": normal(batch, heads, head_dim, state) if seed % 2 else None,
    }  # fmt: skip


def drawn_packed_scan(seed: int) -> Inputs:
    """The same, with documents of a few tokens, numbered along the row."""
    found = drawn_scan(2 * seed)
    starts = torch.rand(found["dt"].shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.15
    return found | {"seq_idx": starts.cumsum(1).to(torch.int32)}


def drawn_conv(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, channels = 1 + seed * 9 % 70, 48 + 16 * (seed % 3)
    wide = torch.randn(2, tokens, channels + 32, generator=generator)
    weight, bias = torch.randn(channels, 4, generator=generator), torch.randn(channels, generator=generator)
    return {"x": wide[..., 16:-16], "weight": weight, "bias": bias}


def drawn_norm(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(2, 1 + seed * 5 % 30, 4 * (32 + 16 * (seed % 4)), generator=generator) for _ in range(2))
    return {"x": x, "z": z, "weight": torch.randn(x.shape[-1], generator=generator)}


def drawn_step(seed: int) -> Inputs:
    """One token of a drawn scan of at least one token, from a state."""
    found = drawn_scan(2 * seed + 1)
    for name in ("x", "dt", "B", "C"):
        found[name] = found[name][:, :1]
    return found


def our_scan(inputs: Inputs) -> Outputs:
    return ssd_scan(**inputs, dt_softplus=True, chunk_size=32, return_final_state=True)


def true_scan(inputs: Inputs) -> Outputs:
    return ssd_scan_reference(**inputs, dt_softplus=True)


def our_step(inputs: Inputs) -> Outputs:
    state = inputs["initial_state"].clone()
    x, dt, B, C = (inputs[name][:, 0] for name in ("x", "dt", "B", "C"))
    y = state_update(state, x, dt, inputs["A"], B, C, D=inputs["D"], dt_bias=inputs["dt_bias"], dt_softplus=True)
    return y[:, None], state


def mamba_ssm_scan(inputs: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = dict(inputs)
    named = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
    inputs["initial_states"] = inputs.pop("initial_state")
    return mamba_chunk_scan_combined(*named, chunk_size=32, dt_softplus=True, return_final_states=True, **inputs)


def step_of(op: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    """A step whose rates are given for every number of the state, as both packages want them."""
    state = inputs["initial_state"].clone()
    _, heads, size, width = state.shape
    x, dt, B, C = (inputs[name][:, 0] for name in ("x", "dt", "B", "C"))
    A, D, dt_bias = inputs["A"][:, None, None], inputs["D"][:, None], inputs["dt_bias"][:, None]
    y = op(
        state, x, dt[..., None].expand(-1, heads, size), A.expand(heads, size, width), B, C, D.expand(heads, size),
        dt_bias=dt_bias.expand(heads, size), dt_softplus=True,
    )  # fmt: skip
    return y[:, None], state


def mamba_ssm_step(inputs: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return step_of(selective_state_update, inputs)


def mamba_ssm_norm(inputs: Inputs) -> Outputs:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    x, z, weight = inputs["x"], inputs["z"], inputs["weight"]
    return (rmsnorm_fn(x, weight, None, z=z, eps=EPS, group_size=x.shape[-1] // 4, norm_before_gate=False),)


def transformers_scan(inputs: Inputs) -> Outputs:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    inputs = dict(inputs)
    named = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
    inputs["initial_states"] = inputs.pop("initial_state")
    # Wrapped it would take mamba_ssm's kernels where that is installed, and be no peer of its own.
    return inspect.unwrap(mamba2_chunk_scan)(*named, 32, dt_softplus=True, return_final_states=True, **inputs)


def transformers_step(inputs: Inputs) -> Outputs:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_selective_state_update

    return step_of(inspect.unwrap(mamba2_selective_state_update), inputs)


def transformers_norm(inputs: Inputs) -> Outputs:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated

    width = inputs["x"].shape[-1]
    norm = NemotronHRMSNormGated(width, width // 4, eps=EPS)
    return (torch.func.functional_call(norm, {"weight": inputs["weight"]}, (inputs["x"], inputs["z"])),)


def torch_conv(inputs: Inputs) -> Outputs:
    """As transformers' torch path does it: nn.Conv1d, cut to the length."""
    x, weight = inputs["x"].transpose(1, 2), inputs["weight"]
    y = F.conv1d(x, weight[:, None], inputs["bias"], padding=weight.shape[1] - 1, groups=len(weight))
    return (F.silu(y[..., : x.shape[-1]]).transpose(1, 2),)


def our_conv(inputs: Inputs) -> Outputs:
    return (causal_conv1d(**inputs),)


def our_norm(inputs: Inputs) -> Outputs:
    return (gated_rms_norm(inputs["x"], inputs["z"], inputs["weight"], EPS, 4),)


def true_conv(inputs: Inputs) -> Outputs:
    return causal_conv1d_reference(**inputs)[:1]


def true_norm(inputs: Inputs) -> Outputs:
    return (gated_rms_norm_reference(inputs["x"], inputs["z"], inputs["weight"], EPS, 4),)


Op = Callable[[Inputs], Outputs]
# name, inputs, gradients wanted, truth, ours, {peer: theirs}
OPERATORS: tuple[tuple[str, Callable[[int], Inputs], bool, Op, Op, dict[str, Op]], ...] = (
    ("ssd_scan", drawn_scan, True, true_scan, our_scan,
     {"mamba_ssm": mamba_ssm_scan, "transformers": transformers_scan}),
    ("ssd_scan, packed", drawn_packed_scan, True, true_scan, our_scan, {"mamba_ssm": mamba_ssm_scan}),
    ("state_update", drawn_step, False, true_scan, our_step,
     {"mamba_ssm": mamba_ssm_step, "transformers": transformers_step}),
    ("gated_rms_norm", drawn_norm, True, true_norm, our_norm,
     {"mamba_ssm": mamba_ssm_norm, "transformers": transformers_norm}),
    ("causal_conv1d", drawn_conv, True, true_conv, our_conv, {"torch": torch_conv}),
)  # fmt: skip


def ran(op: Op, drawn: Inputs, dtype: torch.dtype, device: torch.device, gradients: bool) -> dict[str, Tensor]:
    """Values, and gradients of one drawn direction, in float64 on the CPU."""
    leaves = {
        name: value.detach().to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in drawn.items()
        if value is not None
    }
    if gradients:
        for value in leaves.values():
            value.requires_grad_(value.is_floating_point())
    inputs = {name: leaves.get(name) for name in drawn}
    values = op(inputs)
    found = {f"value {number}": value.detach() for number, value in enumerate(values)}
    if gradients:
        generator = torch.Generator().manual_seed(7)
        directions = [torch.randn(value.shape, generator=generator).to(device, value.dtype) for value in values]
        torch.autograd.backward(values, directions)
        found |= {f"d{name}": value.grad for name, value in leaves.items() if value.grad is not None}
    return {name: value.double().cpu() for name, value in found.items()}


def off(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, float]:
    """The largest relative RMS difference of a value and of a gradient."""
    worst = [0.0, 0.0]
    for name, value in expected.items():
        difference = ((found[name] - value).norm() / value.norm().clamp(min=1e-30)).item()
        worst[name[0] == "d"] = max(worst[name[0] == "d"], difference)
    return worst[0], worst[1]


@contextlib.contextmanager
def importable_mamba_ssm() -> Iterator[str | None]:
    """mamba_ssm's version where its Triton kernels can run here, else None. Its package imports a compiled extension
    that its Triton kernels do not need, so that a bare package of the same folder stands in where that is missing."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or not spec.submodule_search_locations or not (DEVICE.type == "cuda" or INTERPRETED):
        yield None
        return
    try:
        importlib.import_module("mamba_ssm")
    except ImportError:
        bare = types.ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = bare
        for name in ("ops", "ops.triton", "utils"):
            part = types.ModuleType(f"mamba_ssm.{name}")
            part.__path__ = [f"{place}/{name.replace('.', '/')}" for place in bare.__path__]
            sys.modules[part.__name__] = part
    try:
        version = importlib.metadata.version("mamba_ssm")
    except importlib.metadata.PackageNotFoundError:
        version = "unpacked sources"
    if DEVICE.type == "cuda":
        yield version
        return
    from triton.runtime.autotuner import Autotuner

    os.environ["MAMBA_DETERMINISTIC"] = "1"  # one configuration each: there is no device to tune them on
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (Autotuner, "do_bench", lambda self, call, quantiles: (0.0, 0.0, 0.0)),
        (torch.cuda, "device", lambda index: contextlib.nullcontext()),
        (torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=4)),
    )
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, name, stand_in in stand_ins:
            stack.enter_context(unittest.mock.patch.object(place, name, stand_in))
        yield version


def compared(cases: int, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """A line for each operator and peer wanted, printed as it is found."""
    for name, draw, gradients, truth, ours, peers in OPERATORS:
        for peer, theirs in peers.items():
            if peer not in wanted:
                continue
            worst = [(0.0, 0.0)] * 3
            for seed in range(cases):
                drawn = draw(seed)
                true = ran(truth, drawn, torch.float64, torch.device("cpu"), gradients)
                own = ran(ours, drawn, torch.float32, DEVICE, gradients)
                other = ran(theirs, drawn, torch.float32, DEVICE, gradients)
                pairs = (off(true, own), off(true, other), off(other, own))
                worst = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(worst, pairs, strict=True)]
            shown = " | ".join(f"{value:.1e}" + (f" / {slope:.1e}" if gradients else "") for value, slope in worst)
            print(f"| {name} | {peer} | {shown} |", flush=True)
            yield {"operator": name, "peer": peer, "differences": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8, help="drawn cases of each operator")
    parser.add_argument("--json", default="", help="write the table there, too")
    arguments = parser.parse_args()
    where = "GPU" if DEVICE.type == "cuda" else "Triton's interpreter" if INTERPRETED else "torch path"
    print(f"ours: {where}; {arguments.cases} cases")
    print("| operator | peer | ours to float64 | theirs to float64 | ours to theirs |\n|---|---|---|---|---|")
    with importable_mamba_ssm() as version:
        wanted = ("transformers", "torch", *(() if version is None else ("mamba_ssm",)))
        lines = list(compared(arguments.cases, wanted))
    facts = provenance() | {"mamba_ssm": version}
    print(facts)
    if arguments.json:
        with open(arguments.json, "w") as stream:
            json.dump({"facts": facts, "lines": lines}, stream, indent=1)
    if any(line["differences"][0][0] > 1e-5 or line["differences"][0][1] > 1e-4 for line in lines):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
