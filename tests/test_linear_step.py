"""One row times a weight, prepared: the sums of a float64 product, whatever the layout and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from limbeck.kernels.linear import laid_out
from limbeck.kernels.linear_step import PreparedRow, prepared_linear
from limbeck.tests.helpers import assert_close


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", ((24, 36), (36, 24), (6, 8), (8, 6), (50, 7), (7, 50), (1, 12), (12, 1)))
@pytest.mark.parametrize("stored", (laid_out, torch.Tensor.contiguous))
def test_sums(shape: tuple[int, int], stored, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = stored(torch.randn(shape, generator=generator))
    multiply = prepared_linear(weight, 1)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(1, shape[1], generator=generator)
            for _ in range(2):  # the second time x is known
                assert_close("y", x.double() @ weight.double().mT, multiply(x), 1e-6)
                x.mul_(-2)  # written anew where it lies, as buffers are


def test_what_is_prepared(threads: int) -> None:
    kinds = {rows: isinstance(prepared_linear(torch.randn(12, 24), rows), PreparedRow) for rows in (1, 2)}
    assert kinds == {1: threads > 1, 2: False}
    assert not PreparedRow.takes(torch.randn(12, 24).bfloat16(), 2) and not PreparedRow.takes(torch.randn(5, 24), 2)
    assert not PreparedRow.takes(torch.randn(24, 48)[::2, ::2], 2)
