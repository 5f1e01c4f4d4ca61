"""What an export keeps of held-out text: bits per byte of it and of its source, in float32 arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import InputError
from ...models.hybrid import HybridLM
from ..gap.measure import TEACHER, measure_gap
from ..gap.statistics import Estimate
from ..text.packing import Batch

EVALUATE_TOKENS = 16384
EXPORT = "export"


@dataclasses.dataclass(frozen=True)
class TextAgreement:
    """Figures of an export (`exported`) and of its source on the same tokens of a validation split: bits per byte, and
    by how many the export has more; KL(source || export) in nats a token, and the share of tokens whose argmax is the
    source's."""

    tokens: int
    text_bytes: int
    documents: int
    source: Estimate
    exported: Estimate
    more: Estimate
    kl: Estimate
    agreement: Estimate


def text_agreement(source: HybridLM, exported: HybridLM, batches: Sequence[Batch]) -> TextAgreement:
    """Both models on held-out rows. Raises InputError where these hold no token that counts."""
    if not any(int(batch.n_bytes[batch.labels >= 0].sum()) for batch in batches):
        raise InputError("data= holds no held-out token; give more text, or evaluate_tokens=0")
    report = measure_gap(source, {EXPORT: exported}, batches)
    own, difference = report.models[EXPORT], report.differences[0]
    return TextAgreement(
        report.tokens, report.text_bytes, report.documents, report.models[TEACHER].bits_per_byte, own.bits_per_byte,
        difference.bits_per_byte, own.kl, own.agreement,
    )  # fmt: skip


def evaluated_tokens(given: int | None, data: bool) -> int:
    """How many held-out tokens an export is measured on: 16,384 where there is text, unless it is told. Raises
    InputError where there is none to measure on."""
    if given and not data:
        raise InputError(f"evaluate_tokens={given} needs data=, whose held-out text is measured")
    return (EVALUATE_TOKENS if given is None else given) if data else 0


def text_sentence(text: Mapping[str, Any]) -> str:
    """For the card, of a `TextAgreement` as export.json has it."""
    more = text["more"]
    interval = "" if more["low"] is None else f" (95% interval {more['low']:+.4f} to {more['high']:+.4f})"
    return (
        f"\nOn {text['tokens']:,} tokens of held-out text ({text['text_bytes']:,} bytes, {text['documents']:,}"
        f" documents) it takes {text['exported']['value']:.4f} bits per byte, its source {text['source']['value']:.4f}:"
        f" a difference of {more['value']:+.4f}{interval}, KL {text['kl']['value']:.2g} nats a token."
    )


def text_rows(text: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"bits per byte of {text['tokens']:,} held-out tokens", f"{text['exported']['value']:.4f}"),
        ("  of the source", f"{text['source']['value']:.4f}"),
        ("  KL on that text, argmax alike", f"{text['kl']['value']:.2g} nats, {text['agreement']['value']:.1%}"),
    ]
