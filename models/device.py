"""Devices and dtypes by the names that options give them."""

from __future__ import annotations

import torch

from .dtype_names import dtype_name
from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    known = dtype_name(name)
    if known not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}, and bf16, fp16, fp32 for short")
    return DTYPES[known]


def training_dtype(name: str) -> torch.dtype:
    """`torch_dtype` of what is trained. Raises InputError for float16."""
    if (dtype := torch_dtype(name)) == torch.float16:
        raise InputError(
            "dtype=float16 loses gradients: those of a mean over many tokens are below its smallest numbers; train with"
            " dtype=bfloat16 or float32 (a teacher may have distill.teacher_dtype=float16)"
        )
    return dtype


def torch_device(name: str) -> torch.device:
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one. Raises InputError where torch has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: torch {torch.__version__} sees no GPU here; use device=cpu")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()  # which "meta" makes, too, and does not have
        except (RuntimeError, NotImplementedError, AssertionError):
            raise InputError(f"device {name!r}: torch {torch.__version__} has none here; use device=cpu") from None
    return device
