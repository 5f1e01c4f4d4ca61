"""llama.cpp itself, as the PyPI package xllamacpp builds it: its C interface (include/llama.h), by ctypes.

Parameters go by value and end in fields that differ from version to version, so that they are opaque here but for two:
the length of the context, and the types of keys and values, which stand after two pointers that are null.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

F32 = 0  # ggml_type


class Parameters(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * 1024),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def library() -> Any:
    """The shared library, its functions declared. Skips the test where the package is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp (llama.cpp for Python) is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(path))
    pointer, integers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
    for name, answer, *given in (
        ("llama_model_default_params", Parameters),
        ("llama_context_default_params", Parameters),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, Parameters),
        ("llama_init_from_model", pointer, pointer, Parameters),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", ctypes.c_int32, pointer),
        ("llama_vocab_bos", ctypes.c_int32, pointer),
        ("llama_vocab_eos", ctypes.c_int32, pointer),
        ("llama_vocab_get_add_bos", ctypes.c_bool, pointer),
        ("llama_batch_init", Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_batch_free", None, Batch),
        ("llama_decode", ctypes.c_int32, pointer, Batch),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, ctypes.c_bool),
        ("llama_tokenize", ctypes.c_int32, pointer, ctypes.c_char_p, ctypes.c_int32, integers, ctypes.c_int32,
         ctypes.c_bool, ctypes.c_bool),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = answer, given
    lib.llama_log_set(QUIET, None)
    return lib


class LlamaCpp:
    """A GGUF file opened on the CPU, one sequence, keys and values in float32."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self.lib = library()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        parameters = self.lib.llama_context_default_params()
        content = bytearray(bytes(parameters.content))
        places, choices = bytes(16) + struct.pack("ii", 1, 1), struct.pack("iiii", -1, -1, -1, -1)
        assert content[:4] == struct.pack("I", 512) and content.count(places) == content.count(choices) == 1
        struct.pack_into("III", content, 0, context, context, context)
        struct.pack_into("ii", content, content.index(places) + 16, F32, F32)
        struct.pack_into("i", content, content.index(choices) + 12, 0)
        ctypes.memmove(parameters.content, bytes(content), len(content))
        self.context = self.lib.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp makes no context of {path}"
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: Sequence[int], past: int = 0) -> Tensor:
        """Logits [T, V] of tokens that follow `past` others."""
        batch, size = self.lib.llama_batch_init(len(ids), 0, 1), self.lib.llama_vocab_n_tokens(self.vocab)
        batch.n_tokens = len(ids)
        for place, number in enumerate(ids):
            batch.token[place], batch.pos[place] = number, past + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        assert self.lib.llama_decode(self.context, batch) == 0
        rows = [self.lib.llama_get_logits_ith(self.context, place)[:size] for place in range(len(ids))]
        self.lib.llama_batch_free(batch)
        return torch.tensor(rows)

    def logits(self, ids: Sequence[int]) -> Tensor:
        self.clear()
        return self.decode(ids)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` most probable tokens after a prompt, one by one."""
        self.clear()
        last, chosen = self.decode(ids)[-1], []
        for step in range(count):
            chosen.append(int(last.argmax()))
            last = self.decode(chosen[-1:], len(ids) + step)[-1]
        return chosen

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids as the file says them, with what it adds."""
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 8))()
        count = self.lib.llama_tokenize(self.vocab, content, len(content), ids, len(ids), special, False)
        assert count >= 0
        return list(ids[:count])
