"""Packed rows: every document has the losses, and the gradients, that it has in a row of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from limbeck.distill.text.packing import Batch, Packing, tokenize
from limbeck.distill.text.records import Document
from limbeck.kernels.causal_conv1d import causal_conv1d
from limbeck.kernels.linear_kl import linear_cross_entropy
from limbeck.kernels.ssd import ssd_scan
from limbeck.models.hybrid import HybridLM
from limbeck.models.tokenizer import Tokenizer, train_tokenizer
from limbeck.tests.helpers import assert_close, dense_config, random_model, tiny_config
from torch import Tensor

TEXTS = [f"# {i}\nvalue = {'x' * (7 * i % 31)} + {i}\n" + "again\n" * (i % 4) for i in range(24)]
MODELS = {
    "SSM and convolution": tiny_config(vocab_size=300, pattern="M"),
    "attention": tiny_config(vocab_size=300, pattern="*"),
    "attention with positions": dense_config(0, "qwen3").replace(vocab_size=300, pattern="*"),
    "MLP": tiny_config(vocab_size=300, pattern="-"),
    "layers of one kind": tiny_config(vocab_size=300, pattern="MMM"),
    "all together": tiny_config(vocab_size=300, pattern="M-M*-M*"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def packed(tokenizer: Tokenizer) -> Batch:
    """Rows of several documents, some cut at a row's end."""
    corpus = tokenize([Document(str(i), text) for i, text in enumerate(TEXTS)], tokenizer)
    rows = Packing(corpus, torch.randperm(len(corpus)).numpy(), 45)
    return rows.batch(range(min(6, len(rows))))


def pieces(batch: Batch) -> list[tuple[int, slice]]:
    """(row, columns) of each stretch of one document."""
    found = []
    for row, seq_idx in enumerate(batch.seq_idx):
        cuts = [0, *(1 + torch.nonzero(seq_idx[1:] != seq_idx[:-1])[:, 0]).tolist(), len(seq_idx)]
        found += [(row, slice(a, b)) for a, b in itertools.pairwise(cuts)]
    return found


def model_of(kind: str, dtype: torch.dtype, again: bool) -> HybridLM:
    """A model in training; `again`: with activation checkpointing, so that each layer runs twice."""
    model = random_model(MODELS[kind], 1, dtype)
    for block in model.layers:
        block.recompute = again
    return model


def losses(model: HybridLM, ids: Tensor, labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Cross-entropy of each token [B, T], 0 where it has no label."""
    hidden = model.hidden_states(ids, seq_idx=seq_idx).flatten(0, 1)
    found = linear_cross_entropy(hidden, model.head_weight, labels.flatten())
    return found.cross_entropy.view(ids.shape)


@pytest.mark.parametrize("again", (False, True))
@pytest.mark.parametrize("kind", MODELS)
def test_packed_losses_are_those_of_documents_alone(kind: str, again: bool, packed: Batch) -> None:
    model = model_of(kind, torch.float32, again)
    together = losses(model, packed.input_ids, packed.labels, packed.seq_idx)
    assert len(pieces(packed)) > 2 * len(packed.input_ids)
    for row, columns in pieces(packed):
        alone = losses(model, packed.input_ids[row : row + 1, columns], packed.labels[row : row + 1, columns], None)
        assert (alone > 0).sum() >= alone.numel() - 1
        torch.testing.assert_close(together[row, columns], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_no_document_moves_the_loss_of_another(kind: str, packed: Batch) -> None:
    """Other tokens in one document, and all other losses stay as they are but for the last bits (the scan sums decays
    over a whole chunk and takes differences); its own do not."""
    model = random_model(MODELS[kind], 1, torch.float64)
    before = losses(model, packed.input_ids, packed.labels, packed.seq_idx)
    for row, columns in pieces(packed)[::2]:
        changed = packed.input_ids.clone()
        changed[row, columns] = (changed[row, columns] + 17) % 300
        after = losses(model, changed, packed.labels, packed.seq_idx)
        own = torch.zeros_like(before, dtype=torch.bool)
        own[row, columns] = True
        assert (before[~own] - after[~own]).abs().max() < 1e-12
        assert not torch.equal(before[own], after[own]) or columns.stop - columns.start == 1


@pytest.mark.parametrize("again", (False, True))
@pytest.mark.parametrize("kind", ("SSM and convolution", "attention with positions", "all together"))
def test_no_gradient_crosses_a_boundary(kind: str, again: bool, packed: Batch) -> None:
    """The gradients of all weights from packed rows are the sums over the documents alone."""
    model = model_of(kind, torch.float64, again)
    hidden = model.hidden_states(packed.input_ids, seq_idx=packed.seq_idx).flatten(0, 1)
    labels = packed.labels.flatten()
    linear_cross_entropy(hidden, model.head_weight, labels, normalizer=1.0).loss.backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for row, columns in pieces(packed):
        hidden = model.hidden_states(packed.input_ids[row : row + 1, columns])[0]
        linear_cross_entropy(hidden, model.head_weight, packed.labels[row, columns], normalizer=1.0).loss.backward()
    alone = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    for name, expected in alone.items():
        ratio = 1e-6 if name.endswith("A_log") else 1e-12  # the gradient of A is summed in float32
        assert_close(name, expected, together[name], ratio)


def test_convolution_alone(packed: Batch) -> None:
    x, weight, bias = torch.randn(6, 45, 10), torch.randn(10, 4), torch.randn(10)
    together = causal_conv1d(x, weight, bias, seq_idx=packed.seq_idx)
    for row, columns in pieces(packed):
        alone = causal_conv1d(x[row : row + 1, columns], weight, bias)
        torch.testing.assert_close(together[row, columns], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", (4, 16, 64))
def test_scan_alone(chunk_size: int, packed: Batch) -> None:
    """Documents that begin within a chunk, at its first token, and cover several."""
    heads, width, groups, state = 4, 3, 2, 5
    x, dt = torch.randn(6, 45, heads, width), torch.rand(6, 45, heads)
    b, c = torch.randn(2, 6, 45, groups, state)
    a = -torch.rand(heads)
    together = ssd_scan(x, dt, a, b, c, chunk_size=chunk_size, seq_idx=packed.seq_idx)
    for row, columns in pieces(packed):
        here = (slice(row, row + 1), columns)
        alone = ssd_scan(x[here], dt[here], a, b[here], c[here], chunk_size=chunk_size)
        torch.testing.assert_close(together[row, columns], alone[0], rtol=1e-5, atol=1e-5)
