"""Product codes of kernels (survey 19): exactness, storage, and descent on the error of responses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from karui.numerics.product_codes import Quadratic, code_bits, corrected, product_code, stored_bytes
from karui.numerics.regression import Moments

pytestmark = pytest.mark.paper(19)


def planted(filters: int = 12, channels: int = 8, taps: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(filters, channels, taps).double()


def inputs(kernel: Tensor, rows: int = 400) -> tuple[Tensor, Quadratic]:
    seen = kernel[0].numel()
    x = torch.randn(rows, seen).double() @ torch.diag(torch.linspace(0.1, 3, seen).double())
    x[:, 0] = 0  # a dead input
    return x, Quadratic.of(Moments.of(x, x @ kernel.flatten(1).T), None)


def test_enough_codewords_are_exact() -> None:
    kernel = planted()
    distinct = torch.randn(5, 4).double()
    few = distinct[torch.randint(5, (12, 2, 3))].permute(0, 1, 3, 2).flatten(1, 2)
    for one, words in ((kernel, 36), (few, 5), (few, 9)):
        torch.testing.assert_close(product_code(one, 4, words).kernel(), one)


def test_codebooks_are_shared_by_the_positions_of_the_kernel_and_not_by_subspaces() -> None:
    code = product_code(planted(), 4, 6)
    assert code.books.shape == (2, 6, 4)
    assert code.codes.shape == (12, 2, 3)
    made = code.kernel()
    for n, m, t in ((0, 0, 0), (5, 1, 2), (11, 0, 1)):
        torch.testing.assert_close(made[n, 4 * m : 4 * m + 4, t], code.books[m, code.codes[n, m, t]])


def test_storage_follows_the_formulas() -> None:
    assert stored_bytes(9216, 4, 32, 4096, 1) == 1_179_648 + 5_898_240
    assert 4 * 9216 * 4096 / stored_bytes(9216, 4, 32, 4096, 1) == pytest.approx(21.3, abs=0.05)
    assert stored_bytes(256, 8, 128, 384, 9) == 4 * 256 * 128 + 9 * 384 * 32 * 7 // 8
    assert [code_bits(words) for words in (1, 2, 16, 17, 256)] == [1, 1, 4, 5, 8]


def test_the_error_from_moments_is_the_error_of_responses() -> None:
    kernel = planted()
    x, _ = inputs(kernel)
    bias = torch.randn(12).double()
    wanted = x @ kernel.flatten(1).T + bias
    other = kernel + 0.1 * torch.randn_like(kernel)
    found = Quadratic.of(Moments.of(x, wanted), bias).error(other)
    assert found == pytest.approx(float((x @ (other - kernel).flatten(1).T).square().sum()), rel=1e-9)


def test_no_half_step_raises_the_error_and_together_they_halve_it() -> None:
    kernel = planted(32, 8, 4)
    x = torch.randn(400, 6).double() @ torch.randn(6, 32).double()  # few directions, as real activations have
    wanted = Quadratic.of(Moments.of(x, x @ kernel.flatten(1).T), None)
    start = product_code(kernel, 4, 8)
    errors, names = [wanted.error(start.kernel())], []

    def watch(name: str, error: float) -> None:
        names.append(name)
        errors.append(error)

    found = corrected(start, wanted, sweeps=3, watch=watch)
    assert names[:4] == ["codewords", "codes"] * 2
    assert len(names) == 3 * 2 * 2 * 2
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]
    assert found.codes.max() < 8


def test_codewords_are_the_least_squares_solution_and_codes_the_best_of_all() -> None:
    kernel = planted(10, 4, 1)
    x, wanted = inputs(kernel)
    start = product_code(kernel, 2, 3)
    found = corrected(start, wanted, sweeps=1, turns=1)
    # By the paper's own formulas, for a linear layer: codewords of the first subspace, with the codes at the start.
    responses, rest = x @ kernel[:, :, 0].T, x[:, 2:] @ start.kernel()[:, 2:, 0].T
    left = responses - rest
    words = []
    for k in range(3):
        mean = left[:, start.codes[:, 0, 0] == k].mean(1)
        words.append(torch.linalg.lstsq(x[:, 1:2], mean[:, None]).solution[0, 0])  # the other input is dead
    torch.testing.assert_close(found.books[0, :, 1], torch.stack(words), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.books[0, :, 0], start.books[0, :, 0])  # as no response shows it
    errors = (left[:, :, None] - (x[:, :2] @ found.books[0].T)[:, None, :]).square().sum(0)
    assert torch.equal(found.codes[:, 0, 0], errors.argmin(1))


def test_isotropic_inputs_keep_codewords_of_the_weights_size() -> None:
    kernel = planted(16, 12, 1)
    x = torch.randn(40, 12).double()
    x[:, :4] *= 1e-3  # inputs that hardly occur here
    moments = Moments.of(x, x @ kernel.flatten(1).T)
    held = moments.with_isotropic(kernel.flatten(1), 0.01 * float(x.square().mean()))
    start, plain, held = product_code(kernel, 4, 4), Quadratic.of(moments, None), Quadratic.of(held, None)
    free, kept = (corrected(start, wanted, sweeps=4).kernel() for wanted in (plain, held))
    seen = torch.randn(400, 12).double()  # where they do occur
    lost = [float((seen @ (made - kernel).flatten(1).T).norm()) for made in (free, kept, start.kernel())]
    assert lost[1] < 0.7 * lost[0]
    assert lost[1] < 1.2 * lost[2]
