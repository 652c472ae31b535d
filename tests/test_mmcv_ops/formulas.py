"""mmcv's operators written out in float64, one element at a time."""

import math

import torch
import torch.nn.functional as F


def iou(a, b, offset=0):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    common = width * height
    return common / (sum(areas) - common) if common else 0.0


def nms(boxes, scores, threshold, offset=0):
    """The kept indices, best first; equal scores in the order of the input."""
    boxes, scores = boxes.double().tolist(), scores.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset=0):
    """Bodla et al. 2017: the kept indices and their decayed scores, best first."""
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    left, kept = set(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        kept.append((best, scores[best]))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == 'linear' else 0
            if scores[i] < min_score:
                left.remove(i)
    return kept


def interpolate(plane, y, x):
    """Bilinear, the border repeated for one pixel, zero beyond it."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return float(upper * (1 - dy) + lower * dy)


def roi_align(x, rois, bins, scale, ratio, aligned):
    """He et al. 2017: the mean of ``ratio``² samples a bin; 0 is as many as the bin has pixels."""
    x, rois = x.double(), rois.double()
    y = x.new_zeros(len(rois), x.size(1), *bins)
    shift = 0.5 if aligned else 0.0
    for r, (image, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (side * scale - shift for side in box)
        least = 0.0 if aligned else 1.0
        height, width = max(bottom - top, least) / bins[0], max(right - left, least) / bins[1]
        rows, columns = (ratio or math.ceil(side) for side in (height, width))
        for c in range(x.size(1)):
            for i in range(bins[0]):
                for j in range(bins[1]):
                    samples = [
                        interpolate(
                            x[int(image), c],
                            top + (i + (a + 0.5) / rows) * height,
                            left + (j + (b + 0.5) / columns) * width,
                        )
                        for a in range(rows)
                        for b in range(columns)
                    ]
                    y[r, c, i, j] = sum(samples) / len(samples) if samples else 0.0
    return y


def deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """Zhu et al. 2019: each tap of the kernel reads at its own offset, times its mask."""
    (n, channels, height, width), (c_out, _, k_h, k_w) = x.shape, weight.shape
    out_h, out_w = offset.shape[2:]
    offset = offset.view(n, deform_groups, k_h * k_w, 2, out_h, out_w)
    columns = []
    for g in range(deform_groups):
        planes = x.view(n, deform_groups, -1, height, width)[:, g]
        for tap in range(k_h * k_w):
            rows = torch.arange(out_h) * stride[0] - padding[0] + tap // k_w * dilation[0]
            cols = torch.arange(out_w) * stride[1] - padding[1] + tap % k_w * dilation[1]
            at_y = rows[:, None] + offset[:, g, tap, 0]
            at_x = cols[None, :] + offset[:, g, tap, 1]
            grid = torch.stack(
                [2 * at_x / (width - 1) - 1, 2 * at_y / (height - 1) - 1], dim=-1
            )  # grid_sample's coordinates; outside is zero
            read = F.grid_sample(planes, grid, align_corners=True)
            columns.append(
                read * mask.view(n, deform_groups, k_h * k_w, out_h, out_w)[:, g, tap, None]
            )
    taps = torch.stack(columns).view(deform_groups, k_h * k_w, n, -1, out_h, out_w)
    taps = taps.permute(2, 0, 3, 1, 4, 5).reshape(n, groups, channels // groups, -1, out_h, out_w)
    weight = weight.view(groups, c_out // groups, channels // groups, -1)
    y = torch.einsum('ngckhw,gock->ngohw', taps, weight).reshape(n, c_out, out_h, out_w)
    return y if bias is None else y + bias[:, None, None]


def sigmoid_focal_loss(logits, target, gamma, alpha, weight=None):
    """Lin et al. 2017, −α (1 − q)^γ log q with q the probability of the truth.

    As in mmcv, q counts as the smallest float32 where it is less.
    """
    loss = torch.zeros(logits.shape, dtype=torch.float64)
    for n, label in enumerate(target.tolist()):
        for c in range(logits.size(1)):
            z = float(logits[n, c]) * (1 if c == label else -1)
            # log sigmoid(z), also where sigmoid(z) is 0 in float64
            log_q = -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))
            log_q = max(log_q, math.log(torch.finfo(torch.float32).tiny))
            factor = alpha if c == label else 1 - alpha
            if weight is not None and 0 <= label < len(weight):
                factor *= float(weight[label])
            loss[n, c] = -factor * (-math.expm1(log_q)) ** gamma * log_q
    return loss
