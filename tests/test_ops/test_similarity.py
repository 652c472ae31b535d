"""The similarity of a batch: that of the N x N matrix, without one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmubn.ops import mean_cosine_similarity, reference


@pytest.mark.parametrize('shape', [(2, 8), (64, 300), (9, 3, 7, 5)])
def test_equals_the_matrix(shape):
    for offset in (0.0, 0.5):
        x = torch.randn(shape, dtype=torch.double) + offset
        torch.testing.assert_close(mean_cosine_similarity(x), reference.mean_cosine_similarity(x))
    strided = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.double)[..., ::2]
    torch.testing.assert_close(
        mean_cosine_similarity(strided), reference.mean_cosine_similarity(strided)
    )


def test_zero_vectors_have_no_similarity():
    x = torch.randn(6, 3, 4, 4, dtype=torch.double)
    x[[1, 4]] = 0
    torch.testing.assert_close(mean_cosine_similarity(x), reference.mean_cosine_similarity(x))
    assert mean_cosine_similarity(torch.zeros(4, 3, 2, 2)) == 0


def test_overflowing_norm_is_no_similarity():
    huge = torch.full((4, 3, 8, 8), 1e20)
    assert mean_cosine_similarity(huge).isnan()
    assert mean_cosine_similarity(huge.double()) == pytest.approx(1)


@pytest.mark.parametrize('given', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_by_norms_of_any_dtype(dtype, given):
    """A kernel that took their bytes for its own dtype would read beyond them."""
    x = torch.randn(8, 16, 5, 5).to(dtype)
    squared_norm = x.flatten(1).double().square().sum(1).to(given)
    actual = mean_cosine_similarity(x, squared_norm)
    expected = mean_cosine_similarity(x.double(), squared_norm.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_is_on_the_device_of_its_input():
    x = torch.randn(4, 3, 2, 2)
    with torch.device('meta'):
        assert mean_cosine_similarity(x).device == x.device


class Moved(TorchDispatchMode):
    """Counts the numbers that all operators read and write, and the largest output."""

    def __init__(self):
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, result))
        sizes = [value.numel() for value in flat if isinstance(value, torch.Tensor)]
        # Views cost nothing.
        if not func.is_view:
            self.numbers += sum(sizes)
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
        return result


def work(function, batch, numbers=1 << 18):
    """Numbers moved, largest tensor made and matrix FLOPs, each by numbers of the input."""
    x = torch.randn(batch, numbers // batch)
    with Moved() as moved, FlopCounterMode(display=False) as flops:
        function(x)
    return tuple(v / numbers for v in (moved.numbers, moved.largest, flops.get_total_flops()))


def test_has_no_quadratic_term():
    for batch in (8, 64, 1024):
        moved, largest, flops = work(mean_cosine_similarity, batch)
        assert moved <= 6
        assert largest <= 1
        assert flops <= 2
    moved, largest, flops = work(reference.mean_cosine_similarity, 1024)
    assert largest == 4  # the matrix: this count would see it
    assert flops == 2 * 1024
