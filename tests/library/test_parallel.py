"""Work over the cores: order, laziness, errors; and the questions about whole tensors."""

from __future__ import annotations

import pytest
import torch

from library.parallel import over_cores
from networks.tools.comparing import is_finite, same_values


def test_results_come_in_order_and_few_items_are_read_before_their_turn():
    read, before = [], torch.get_num_threads()

    def items():
        for number in range(50):
            read.append(number)
            yield number

    found = []
    for result in over_cores(lambda number: number * number, items()):
        found.append(result)
        assert len(read) <= len(found) + before + 2
    assert found == [number * number for number in range(50)]
    assert torch.get_num_threads() == before


def test_the_first_error_ends_it():
    def work(number):
        if number > 1:
            raise ValueError(number)
        return number

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="^2$"):
        list(over_cores(work, range(9)))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_found(dtype):
    tensor = torch.ones(3, 4).to(dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        with_bad = torch.ones(3, 4)
        with_bad[1, 2] = bad
        assert not is_finite(with_bad.to(dtype))


def test_same_values():
    tensor = torch.randn(4, 6)
    assert same_values(tensor, tensor.clone())
    assert same_values(tensor.t(), tensor.t().contiguous())
    assert same_values(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_values(tensor, tensor.double())
    assert not same_values(tensor, tensor.reshape(6, 4))
    assert not same_values(tensor, tensor + 1e-3)
    assert same_values(torch.tensor(2.0), torch.tensor(2.0))
