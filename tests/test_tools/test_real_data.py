"""The main config on real COCO images, at reduced size."""

import re
import tarfile
from pathlib import Path

import pytest
from tool import ROOT, run_tool

pytest.importorskip('mmdet')
pytest.importorskip('pycocotools')


@pytest.fixture
def coco128(real_data, tmp_path, monkeypatch):
    """The folder ``coco128`` in the working directory."""
    archive = real_data / 'coco128.tar'
    if not archive.is_file():
        pytest.skip(f'no {archive}')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter='data')
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures('coco128')
def test_main_config_trains_and_evaluates():
    config = str(ROOT / 'configs' / 'mask_rcnn_r50_ubn_1x_coco.py')
    options = [
        'model.backbone.init_cfg=None',
        'train_cfg.max_epochs=1',
        'randomness.seed=0',
        'train_dataloader.dataset.indices=4',
        'val_dataloader.dataset.indices=2',
        'train_dataloader.dataset.pipeline.2.scale=(160,96)',
        'val_dataloader.dataset.pipeline.1.scale=(160,96)',
        # A net after two steps is sure of nothing; without detections there is no AP.
        'model.test_cfg.rcnn.score_thr=0.0',
        'model.test_cfg.rpn.max_per_img=50',
    ]
    argv = [config, '--data-root', 'coco128', '--eval-on-train', '--cfg-options', *options]
    run_tool('train', *argv)
    run = Path('work_dirs/mask_rcnn_r50_ubn_1x_coco')
    assert (run / 'epoch_1.pth').is_file()
    log = next(run.glob('*/*.log')).read_text()
    assert 'UBN: 53 layers built, 42 train' in log
    assert 'coco/segm_mAP' in next(run.glob('*/vis_data/scalars.json')).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures('coco128')
def test_both_norms_of_table_6_in_the_small_detector():
    config = str(ROOT / 'configs' / 'mask_rcnn_r18_small_coco.py')
    rows = ['table6', '--config', config, '--work-dir', 'runs']
    options = ['train_dataloader.dataset.indices=8', 'val_dataloader.dataset.indices=4']
    options += ['model.test_cfg.rcnn.score_thr=0.0']
    arguments = ['--epochs', '1', '--seeds', '1', '--data-root', 'coco128', '--eval-on-train']
    run_tool('reproduce', 'run', *rows, *arguments, '--cfg-options', *options)
    run_tool('reproduce', 'report', *rows, '--out', 'out')
    text = Path('out/report.md').read_text()
    assert re.search(r'\| UBN \| loss \|  \|  \|  \| \d\.\d\d \| 1 done \|', text)
    assert Path('out/table6_loss.png').is_file()
