"""nms, batched_nms and soft_nms against their definitions, and against the compiled ones."""

import formulas
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, soft_nms


def draw(n, ties=False):
    boxes = 60 * torch.rand(n, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.rand(n)
    return boxes, (scores * 4).round() / 4 if ties else scores


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('n', [0, 1, 150])
def test_nms(n, offset, dtype):
    boxes, scores = (value.to(dtype) for value in draw(n))
    kept, indices = nms(boxes, scores, 0.4, offset)
    assert indices.tolist() == formulas.nms(boxes, scores, 0.4, offset)
    assert len(indices) < n or n < 2
    assert torch.equal(kept, torch.cat([boxes[indices], scores[indices, None]], 1))
    assert kept.dtype == dtype


def test_an_overlap_of_just_the_threshold():
    """0.6 in float32 is more than in float64, in which 6 / 10 is the threshold and stays."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    scores = torch.tensor([0.9, 0.8])
    for dtype in (torch.float32, torch.float64):
        assert nms(boxes.to(dtype), scores.to(dtype), 0.6)[1].tolist() == [0, 1]


def test_nms_without_ties_ignores_the_order_of_the_boxes():
    boxes, scores = draw(150)
    order = torch.randperm(150)
    assert torch.equal(nms(boxes, scores, 0.4)[0], nms(boxes[order], scores[order], 0.4)[0])


def test_nms_limits():
    """A threshold on the score, a limit of boxes, boxes without area, NumPy in and out."""
    boxes, scores = draw(100)
    kept, indices = nms(boxes.numpy(), scores.numpy(), 0.4, score_threshold=0.5, max_num=5)
    assert isinstance(kept, np.ndarray)
    expected = [i for i in formulas.nms(boxes, scores, 0.4) if scores[i] > 0.5][:5]
    assert indices.tolist() == expected
    point = torch.tensor([[3.0, 3, 3, 3]]).repeat(4, 1)
    assert nms(point, torch.arange(4.0), 0.5)[1].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_of_half_precision_is_that_of_its_values(dtype):
    """Areas of 256 x 256 and more overflow float16; more than 2048 ranks would collide in it."""
    boxes, scores = draw(3000)
    boxes, scores = (boxes * 8).to(dtype), scores.to(dtype)
    assert torch.equal(nms(boxes, scores, 0.5)[1], nms(boxes.float(), scores.float(), 0.5)[1])


@pytest.mark.parametrize('split', [10000, 50], ids=['at once', 'class by class'])
def test_batched_nms(split):
    boxes, scores = draw(150)
    classes = torch.randint(3, (150,))
    _, kept = batched_nms(boxes, scores, classes, dict(iou_threshold=0.4, split_thr=split))
    expected = []
    for c in range(3):
        of_class = (classes == c).nonzero()[:, 0]
        indices = formulas.nms(boxes[of_class], scores[of_class], 0.4)
        expected += of_class[indices].tolist()
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i])


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_soft_nms(dtype, method, offset):
    boxes, scores = (value.to(dtype) for value in draw(120))
    arguments = (0.3, 0.5, 0.02, method, offset)
    kept, indices = soft_nms(boxes, scores, *arguments)
    expected = formulas.soft_nms(boxes, scores, *arguments)
    assert indices.tolist() == [i for i, _ in expected]
    assert len(indices) < 120
    assert torch.equal(kept[:, :4], boxes[indices])
    decayed = torch.tensor([score for _, score in expected], dtype=dtype)
    torch.testing.assert_close(kept[:, 4], decayed, rtol=1e-5, atol=1e-6)
    assert len(set(kept[:, 4].tolist())) == len(kept)


def test_soft_nms_leaves_its_input_alone():
    boxes, scores = draw(20)
    before = boxes.clone(), scores.clone()
    soft_nms(boxes, scores)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])
    assert len(soft_nms(boxes[:0], scores[:0])[1]) == 0


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('n', [1, 40, 3000])
@pytest.mark.parametrize('threshold', [0.5, 0.6])
def test_nms_equals_the_compiled_one(compiled, ext, threshold, n, ties, offset):
    boxes, scores = draw(n, ties)
    for drawn in (boxes, boxes.div(6).round()):  # whole numbers: overlaps of just the threshold
        expected = compiled.nms(drawn, scores, threshold, offset)
        assert torch.equal(ext.nms(drawn, scores, threshold, offset), expected)


@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('ties', [False, True])
def test_soft_nms_equals_the_compiled_one(compiled, ext, ties, method):
    boxes, scores = draw(200, ties)
    results = []
    for module in (compiled, ext):
        rows = torch.zeros(200, 5)
        results.append((module.softnms(boxes, scores, rows, 0.3, 0.5, 0.01, method, 0), rows))
    (expected, expected_rows), (indices, rows) = results
    assert torch.equal(indices, expected)
    n = len(indices)
    torch.testing.assert_close(rows[:n], expected_rows[:n], rtol=1e-5, atol=1e-6)
