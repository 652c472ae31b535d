"""The sigmoid focal loss against its definition; mmcv has no operator for it on a CPU."""

import math

import formulas
import pytest
import torch
from mmcv.ops import sigmoid_focal_loss
from torch.autograd import gradcheck

SETTINGS = [(2.0, 0.25), (0.0, 0.5), (0.5, 0.75)]


@pytest.fixture
def target():
    return torch.tensor([0, 2, 3, 1, 3, 0])  # of 3 classes; 3 is the background


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(('gamma', 'alpha'), SETTINGS)
def test_forward(gamma, alpha, weighted, target):
    logits = 4 * torch.randn(6, 3, dtype=torch.float64)
    logits[0] = torch.tensor([-90.0, 90.0, 0.0])
    weight = torch.tensor([0.5, 1, 3], dtype=torch.float64) if weighted else None
    expected = formulas.sigmoid_focal_loss(logits, target, gamma, alpha, weight)
    for dtype in (torch.float64, torch.float32):
        narrow = weight if weight is None else weight.to(dtype)
        actual = sigmoid_focal_loss(logits.to(dtype), target, gamma, alpha, narrow, 'none')
        torch.testing.assert_close(actual, expected.to(dtype))
    mean = sigmoid_focal_loss(logits, target, gamma, alpha, weight, 'mean')
    torch.testing.assert_close(mean, expected.sum() / 6)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(('gamma', 'alpha'), SETTINGS)
def test_gradient(gamma, alpha, weighted, target):
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 1, 3], dtype=torch.float64) if weighted else None
    for reduction in ('mean', 'sum'):
        assert gradcheck(
            lambda x, r=reduction: sigmoid_focal_loss(x, target, gamma, alpha, weight, r), logits
        )


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_gradient_where_the_sigmoid_is_0_or_1(gamma, target):
    logits = torch.full((6, 3), 200.0)
    logits[3:] *= -1
    logits.requires_grad_()
    sigmoid_focal_loss(logits, target, gamma, 0.25).backward()
    assert logits.grad.isfinite().all()
    wrong = logits.grad.nonzero().tolist()  # each confidently wrong logit, and no other
    assert wrong == [[0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2], [3, 1], [5, 0]]


def test_a_logit_that_is_infinitely_wrong(target):
    """Mmcv's formula with the smallest float32 in place of a probability of 0."""
    logits = torch.zeros(6, 3)
    logits[0, 0], logits[2, 1] = -float('inf'), float('inf')
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    least = -math.log(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(loss[0, 0], torch.tensor(0.25 * least))
    torch.testing.assert_close(loss[2, 1], torch.tensor(0.75 * least))
    loss.sum().backward()
    assert logits.grad[0, 0] == -0.25
    assert logits.grad[2, 1] == 0.75


def test_half_precision(target):
    logits = torch.randn(6, 3).bfloat16().requires_grad_()
    wide = logits.detach().float().requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    expected = sigmoid_focal_loss(wide, target, 2.0, 0.25, None, 'none')
    assert loss.dtype == torch.bfloat16
    assert torch.equal(loss, expected.bfloat16())
    upstream = torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, wide, upstream.float())
    assert torch.equal(gradient, expected_gradient.bfloat16())
