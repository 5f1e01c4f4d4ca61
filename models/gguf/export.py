"""A checkpoint as a GGUF file for llama.cpp, read back and compared with its source before it appears."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckFailed
from ..export import divergence, logits_of, relative_rms
from ..streamed import open_streamed
from .file import GgufWeights, open_gguf, write_gguf
from .vocabulary import read_vocabulary

# How far a number of Q8_0 may be, whose block has the largest number by 127 as its step: by half a step, and by what
# rounding the step to float16 changes in up to 127 of them, a part of the step or, where that is subnormal, 2**-25.
STEP_ERROR, SUBNORMAL_ERROR = 0.5 + 127 * 2**-11, 127 * 2**-25


@dataclasses.dataclass(frozen=True)
class GgufAgreement:
    """What a GGUF file holds beside its source, in float32 arithmetic: logits of random tokens in relative RMS,
    KL(source || file) in nats a token; the file's name and bytes, the pre-tokenizer it names, whether llama.cpp makes
    the `same_text` into the same tokens, and what is otherwise."""

    file: str
    bytes: int
    pre_tokenizer: str
    relative_rms: float
    kl: float
    same_text: bool
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The comparison in a sentence or two."""
        text = (
            f"Read back before it was published, `{self.file}` gives the source's logits up to"
            f" {self.relative_rms:.1e} relative RMS (KL {self.kl:.2g} nats a token) in float32 arithmetic."
        )
        return "\n".join((text, *self.notes))


def gguf_path(folder: Path, dtype: str) -> Path:
    return folder / f"model-{dtype}.gguf"


def write_gguf_export(
    folder: Path, source: Path, dtype: str, *, pre_tokenizer: str | None, check_tokens: int, seed: int
) -> GgufAgreement:
    """Fills an existing folder with one file, and compares it tensor by tensor: in float types the source's numbers
    rounded, to the bit; in q8_0 each number within a step of its block.

    Raises CheckFailed, and InputError for what llama.cpp cannot run or a dtype cannot hold.
    """
    checkpoint = open_checkpoint(source)
    vocabulary = read_vocabulary(source, checkpoint.config, pre_tokenizer)
    path = gguf_path(folder, dtype)
    write_gguf(path, checkpoint, vocabulary, dtype, source.resolve().name)
    check_tensors(path, checkpoint)
    ids = torch.randint(checkpoint.config.vocab_size, (1, check_tokens), generator=torch.Generator().manual_seed(seed))
    logits = [logits_of(open_streamed(source), ids), logits_of(open_gguf(path, checkpoint.config), ids)]
    rms, kl = relative_rms(*logits), divergence(*logits)
    size, same_text = path.stat().st_size, vocabulary.same_text
    return GgufAgreement(path.name, size, vocabulary.pre, rms, kl, same_text, vocabulary.notes)


def check_tensors(path: Path, checkpoint: Checkpoint) -> None:
    """Raises CheckFailed at the first tensor that is not the checkpoint's within its type."""
    weights = GgufWeights(path, checkpoint.config)
    for name, entry in weights.entries.items():
        kind, ours, expected = weights.kind(name), weights.tensor(name), checkpoint.tensor(name).float()
        if entry.form is not None:
            expected = entry.form.read(checkpoint.config, entry.form.written(checkpoint.config, expected))
        if kind == "Q8_0":
            blocks = (ours - expected).unflatten(-1, (-1, 32)).abs().amax(-1)
            steps = expected.unflatten(-1, (-1, 32)).abs().amax(-1) / 127
            right = bool((blocks <= STEP_ERROR * steps + SUBNORMAL_ERROR).all())
        else:
            right = torch.equal(ours, rounded(expected, kind))
        if not right:
            raise CheckFailed(f"export: tensor {entry.spec.name} of {path.name} is not the source's in {kind}")


def rounded(tensor: Tensor, kind: str) -> Tensor:
    return tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
