"""The figures of a token against dense float64, and the promise that no [T, V] is ever there."""

from __future__ import annotations

import pytest
import torch
from limbeck.kernels.linear_figures import linear_figures
from limbeck.kernels.linear_kl import linear_kl
from limbeck.tests.helpers import Largest
from torch import Tensor


def drawn(tokens: int, vocabulary: int, noise: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Teacher's hidden states and head, a student's near them, and labels, some of them ignored."""
    hidden, head = torch.randn(tokens, 24, dtype=dtype), 0.4 * torch.randn(vocabulary, 24, dtype=dtype)
    labels = torch.randint(vocabulary, (tokens,))
    labels[::7] = -100
    other = hidden + noise * torch.randn_like(hidden)
    return [hidden, head, other[:, :20].contiguous(), head[:, :20].contiguous(), labels]


@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), ((1, 3, None), (37, 61, 5), (64, 997, 64), (19, 4, None)))
def test_dense(tokens: int, vocabulary: int, chunk: int | None) -> None:
    hidden, head, other, narrow, labels = drawn(tokens, vocabulary, 0.3)
    own, found = linear_figures([(other, narrow)], hidden, head, labels, chunk_tokens=chunk)
    p, q = (hidden @ head.T).softmax(-1), (other @ narrow.T).softmax(-1)
    counted = labels >= 0
    at = labels.clamp_min(0)[:, None]
    top = min(5, vocabulary)
    rank = [1 + int((q[t] > q[t, p[t].argmax()]).sum()) for t in range(tokens)]
    five = [
        len({*p[t].argsort(descending=True)[:top].tolist()} & {*q[t].argsort(descending=True)[:top].tolist()}) / top
        for t in range(tokens)
    ]
    expected = {
        "cross_entropy": -q.gather(1, at)[:, 0].log(), "kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1), "overlap": torch.minimum(p, q).sum(-1),
        "rank": torch.tensor(rank), "top5": torch.tensor(five, dtype=torch.float64), "choice": q.argmax(-1),
        "confidence": q.amax(-1),
    }  # fmt: skip
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values * counted, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(own.choice, p.argmax(-1) * counted) and torch.equal(own.overlap, counted.double())
    assert own.kl.abs().max() == 0 and torch.equal(own.rank, counted.long())
    again = linear_figures([(hidden, head)], hidden, head, labels)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)), "a model is its own teacher"


def test_it_is_what_linear_kl_gives_and_more_exact() -> None:
    """Small divergences in float32, where the plain sum loses digits."""
    hidden, head, other, narrow, labels = drawn(200, 3000, 0.0, torch.float32)
    other, narrow = hidden + 0.01 * torch.randn_like(hidden), head
    exact = linear_figures([(other.double(), narrow.double())], hidden.double(), head.double(), labels)[1]
    found = linear_figures([(other, narrow)], hidden, head, labels)[1]
    plain = linear_kl(other, narrow, hidden, head, labels=labels)
    assert plain.cross_entropy is not None
    torch.testing.assert_close(found.cross_entropy, plain.cross_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.kl, plain.kl, rtol=0, atol=3e-6)
    error, plain_error = ((kl.double() - exact.kl).abs().max() for kl in (found.kl, plain.kl))
    assert error < 1e-7 and error < plain_error
    assert (found.kl >= 0).all() and (found.reverse_kl >= 0).all()


def test_no_logits_of_all_tokens() -> None:
    """Tensors in the pass stay within [chunk, V]."""
    hidden, head, other, narrow, labels = drawn(300, 500, 0.1, torch.float32)
    with Largest() as largest:
        linear_figures([(other, narrow)], hidden, head, labels, chunk_tokens=16)
    assert 0 < largest.numel <= max(16 * 500, head.numel()) < 300 * 500 / 10


def test_what_does_not_fit_is_said() -> None:
    hidden, head, other, narrow, labels = drawn(6, 9, 0.1)
    with pytest.raises(ValueError, match="vocabulary of 8"):
        linear_figures([(other, narrow[:8])], hidden, head, labels)
    with pytest.raises(ValueError, match="5 tokens"):
        linear_figures([(other[:5], narrow)], hidden, head, labels)
    with pytest.raises(ValueError, match="labels have shape"):
        linear_figures([(other, narrow)], hidden, head, labels[:4])
    with pytest.raises(ValueError, match="model 1"):
        linear_figures([(other, head)], hidden, head, labels)


def test_no_tokens_have_no_figures() -> None:
    hidden, head, other, narrow, labels = drawn(4, 11, 0.3)
    found = linear_figures([(other[:0], narrow)], hidden[:0], head, labels[:0])
    assert len(found) == 2 and all(len(column) == 0 for figures in found for column in figures)
