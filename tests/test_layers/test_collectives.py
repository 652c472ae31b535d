"""What a training step of Mask R-CNN R-50 sends, from which docs/distributed.md starts."""

import functools

import pytest
import torch
from processes import Traffic, in_processes
from tool import CONFIGS
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip('mmdet')

CONFIG = CONFIGS / 'mask_rcnn_r50_ubn_1x_coco.py'


def step(norm, rank, world):
    """Numbers and calls of the layers, and bytes of the gradients that DDP averages."""
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(init_cfg=None)
    cfg.model.backbone.norm_cfg.type = norm
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    data = model.data_preprocessor(demo_mm_inputs(1, [[3, 64, 64]], with_mask=True), True)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    buckets = []

    def count(state, bucket):
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(distributed.group.WORLD, bucket)

    wrapped.register_comm_hook(None, count)
    for _ in range(2):  # DDP makes its buckets in the first
        buckets.clear()
        with Traffic() as forward:
            losses = wrapped(**data, mode='loss')
        loss, _ = model.parse_losses(losses)
        with Traffic() as backward:
            loss.backward()
    training = [m.num_features for m in model.modules() if hasattr(m, 'fct') and m.training]
    return dict(
        layers=len(training),
        channels=sum(training),
        forward=(forward.calls, forward.numbers),
        # The hook's own go through the function that is counted.
        reduces=backward.calls['all_reduce'] - len(buckets),
        reduced=backward.numbers['all_reduce'] - sum(buckets) // 4,
        gathers_backward=backward.calls['all_gather'],
        buckets=len(buckets),
        gradient_bytes=sum(buckets),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['UBN', 'SyncUBN'])
def test_mask_rcnn_r50(tmp_path, norm):
    for result in in_processes(functools.partial(step, norm), 2, tmp_path):
        # Of 53 layers: stem and first stage are frozen.
        assert (result['layers'], result['channels']) == (42, 25_088)
        if norm == 'UBN':
            assert result['forward'] == ({}, {})
            assert (result['reduces'], result['reduced']) == (0, 0)
        else:
            assert result['forward'] == (dict(all_gather=42), dict(all_gather=50_302))
            assert (result['reduces'], result['reduced']) == (42, 50_176)
        assert result['gathers_backward'] == 0
        assert (result['buckets'], result['gradient_bytes']) == (6, 177_888_192)
        assert result['buffer_bytes'] == 213_140
