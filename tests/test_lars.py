"""LARS: a step in proportion to the weights, by hand."""

import pytest
import torch
from torch import nn

from tutorial_moco.checkpoint import pack, unpack
from tutorial_moco.lars import LARS


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


def test_a_matrix_moves_a_thousandth_of_its_length_and_a_bias_by_its_gradient():
    matrix, bias = parameter([3.0, 4.0]), parameter(1.0, 2.0)
    optimizer = LARS([matrix, bias], lr=2.0, momentum=0.5)
    matrix.grad, bias.grad = torch.tensor([[0.0, 10.0]]), torch.tensor([0.1, 0.0])
    optimizer.step()
    torch.testing.assert_close(matrix.data, torch.tensor([[3.0, 4.0 - 2 * 0.001 * 5]]))
    torch.testing.assert_close(bias.data, torch.tensor([1.0 - 2 * 0.1, 2.0]))
    matrix.grad, bias.grad = torch.zeros(1, 2), torch.zeros(2)
    optimizer.step()  # goes on with half the speed
    torch.testing.assert_close(matrix.data, torch.tensor([[3.0, 4.0 - 2 * 0.001 * 5 * 1.5]]))
    torch.testing.assert_close(bias.data, torch.tensor([1.0 - 2 * 0.1 * 1.5, 2.0]))


def test_weight_decay_is_for_matrices_and_comes_before_the_length():
    matrix, bias = parameter([3.0, 4.0]), parameter(1.0)
    optimizer = LARS([matrix, bias], lr=1.0, weight_decay=0.5)
    matrix.grad, bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(matrix.data, torch.tensor([[3.0, 4.0]]) * (1 - 0.001))
    assert bias.item() == 1.0


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[1.0, 1.0]]])
def test_of_no_length_nothing_is_divided(values):
    matrix = parameter(*values)
    optimizer = LARS([matrix], lr=1.0)
    matrix.grad = torch.zeros(1, 2) if matrix.any() else torch.ones(1, 2)
    optimizer.step()
    assert matrix.isfinite().all()
    torch.testing.assert_close(matrix.data, torch.tensor(values) - matrix.grad)


def test_the_length_of_a_gradient_does_not_matter():
    moved = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.randn(4, 5))
        optimizer = LARS([matrix], lr=1.0)
        for _ in range(3):
            matrix.grad = scale * torch.randn(4, 5)
            optimizer.step()
        moved.append(matrix.data)
    torch.testing.assert_close(*moved)


def test_saved_and_put_back_it_goes_on_the_same():
    def steps(optimizer, matrix, n):
        for step in range(n):
            matrix.grad = torch.full((2, 2), float(step + 1))
            optimizer.step()

    straight = nn.Parameter(torch.ones(2, 2))
    steps(first := LARS([straight], lr=1.0), straight, 2)
    again = nn.Parameter(straight.detach().clone())
    second = LARS([again], lr=1.0)
    unpack({name: tensor.clone() for name, tensor in pack(optimizer=first).items()}, optimizer=second)
    steps(first, straight, 2)
    steps(second, again, 2)
    assert torch.equal(straight, again)
