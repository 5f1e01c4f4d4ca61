"""How the SSM states of a served model may be kept: bytes, what vLLM 0.32 has of it, and what it was measured to cost.

Sources: vllm/config/cache.py (MambaDType: float32, float16, bfloat16) and vllm/config/mamba.py (stochastic rounding of
float16, on NVIDIA's cards alone: by Triton at compute capability 10.x, else by FlashInfer), vLLM 0.32; the scales of
states of one byte, a float32 number a head and channel, as vllm-project/vllm#40012 and #52962 propose them; accuracy
lost by Nemotron 3 Super in percent, from NVIDIA's report on Nemotron 3 Ultra.
"""

from __future__ import annotations

import dataclasses

import torch

from ..device import DTYPES
from .hardware import Hardware


@dataclasses.dataclass(frozen=True)
class StateFormat:
    """The dtype of a number, whether vLLM keeps states so, whether rounding is stochastic (unbiased; else to the
    nearest), and the accuracy lost in percent (None: no figure is published)."""

    dtype: torch.dtype
    in_vllm: bool
    stochastic: bool = False
    lost: float | None = None


STATE_FORMATS = {
    "float32": StateFormat(torch.float32, True),
    "bfloat16": StateFormat(torch.bfloat16, True),
    "float16": StateFormat(torch.float16, True, lost=2.3),
    "float16_stochastic": StateFormat(torch.float16, True, stochastic=True, lost=0.3),
    "int8": StateFormat(torch.int8, False, lost=2.9),
    "int8_stochastic": StateFormat(torch.int8, False, stochastic=True, lost=0.0),
    "float8_e4m3fn": StateFormat(torch.float8_e4m3fn, False, lost=12.7),
    "float64": StateFormat(torch.float64, False),
}
IN_VLLM = tuple(name for name, form in STATE_FORMATS.items() if form.in_vllm)


def runs_here(name: str) -> bool:
    """Whether limbeck's own inference path keeps states so: rounded to the nearest, without scales."""
    return name in DTYPES


def vllm_refusal(name: str, card: Hardware) -> str:
    """Why vLLM does not keep states so on a card; "" where it does."""
    form = STATE_FORMATS[name]
    if not form.in_vllm:
        return f"vLLM 0.32 keeps no SSM states in {name}; it has fit.ssm_dtype={', '.join(IN_VLLM)}"
    if form.stochastic and card.device != "cuda":
        return "vLLM 0.32 rounds SSM states stochastically on NVIDIA's cards alone; give fit.ssm_dtype=float16"
    return ""


def state_flags(name: str, card: Hardware) -> list[str]:
    """The arguments of `vllm serve` for states that it keeps."""
    form = STATE_FORMATS[name]
    found = [f"--mamba-ssm-cache-dtype {str(form.dtype).removeprefix('torch.')}"]
    if form.stochastic:
        found.append("--enable-mamba-cache-stochastic-rounding")
        if int(float(card.compute_capability or 9)) != 10:
            found.append("--mamba-backend flashinfer")
    return found


def state_caution(name: str) -> str:
    """What states kept so were measured to cost; "" where nothing is published."""
    form = STATE_FORMATS[name]
    if form.lost is None:
        return ""
    rounding = "stochastically" if form.stochastic else "to the nearest"
    kept = str(form.dtype).removeprefix("torch.")
    return (
        f"SSM states rounded {rounding} to {kept} cost Nemotron 3 Super {form.lost:g}% of its accuracy (NVIDIA's"
        " report on Nemotron 3 Ultra); another model's cost is not known until it is measured"
    )
