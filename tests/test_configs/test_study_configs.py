"""The configs of the studies, and the options that their rows and stages add."""

from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.datasets.categories import CIFAR10_CATEGORIES
from resolved import resolved
from tool import CONFIGS
from torch.nn.modules.batchnorm import _BatchNorm
from weights import trained

from mmubn.reproduce.experiments import EXPERIMENTS
from mmubn.reproduce.run import as_arguments, make_setting
from mmubn.reproduce.run_study import _at, pretraining_setting

pytestmark = pytest.mark.skipif(find_spec('mmdet') is None, reason='no mmdet')
STUDIES = {name: e.study for name, e in EXPERIMENTS.items() if e.study is not None}


def rows(experiment: str) -> list:
    return list(EXPERIMENTS[experiment].rows)


def config(setting, **more) -> Config:
    """As train.py has it, through the command line's own form of the options."""
    from mmubn.cli.options import load_config, make_parser

    options = as_arguments({**setting.options, **more})
    arguments = [str(setting.config), '--cfg-options', *options] if options else [setting.config]
    return load_config(make_parser('').parse_args(arguments))


OWN = [*CONFIGS.glob('demo/*.py'), *CONFIGS.glob('studies/*.py'), *CONFIGS.rglob('*_small_*.py')]


@pytest.mark.parametrize('file', OWN, ids=lambda file: file.stem)
def test_auto_scale_lr_leaves_a_recipe_of_ours_as_it_is(file):
    cfg = resolved(str(file.relative_to(CONFIGS)))
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size


def test_a_child_of_the_small_coco_config_names_its_classes():
    base = CONFIGS / 'mask_rcnn_r18_small_coco.py'
    own = f"_base_ = '{base}'\ntrain_dataloader=dict(dataset=dict(metainfo=dict(classes=('cat',))))"
    assert Config.fromstring(own, '.py').train_dataloader.dataset.metainfo.classes == ('cat',)
    assert not Config.fromfile(base).train_dataloader.dataset.metainfo


def test_classes_are_cifars():
    cfg = config(make_setting(rows('batches-of-two')[0]))
    assert cfg.classes == CIFAR10_CATEGORIES
    assert cfg.model.roi_head.bbox_head.num_classes == 10


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory) -> dict:
    """Norm -> file of a pretrained classifier, with numbers that tell it from a fresh one."""
    folder = tmp_path_factory.mktemp('pretrained')
    found = {}
    for kind in ('BN', 'GN'):
        setting = pretraining_setting(STUDIES['batches-of-two'], kind)
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = trained(MODELS.build(config(setting).model))
        found[kind] = folder / f'{kind}.pth'
        torch.save(dict(state_dict=model.state_dict()), found[kind])
    return found


PRETRAINED = [*rows('batches-of-two'), *rows('fine-tuning')]


@pytest.mark.parametrize('row', PRETRAINED, ids=lambda row: f'{row.experiment}, {row.name}')
def test_a_network_starts_from_the_pretrained_backbone(row, checkpoints):
    study = STUDIES[row.experiment]
    more = {}
    if row.pretrained:
        init_cfg = dict(
            type='Pretrained', checkpoint=checkpoints[row.pretrained], prefix='backbone.'
        )
        more = {f'model.backbone.init_cfg.{key}': value for key, value in init_cfg.items()}
    cfg = config(make_setting(row), **more)
    assert cfg.train_dataloader.batch_size == (row.batch_size or (2 if row.detects else 64))
    theirs = config(pretraining_setting(study, row.pretrained or 'BN'))
    pixels = cfg.model.data_preprocessor if row.detects else cfg.data_preprocessor
    for key in ('mean', 'std'):
        assert pixels[key] == theirs.data_preprocessor[key]
    with DefaultScope.overwrite_default_scope('mmdet' if row.detects else 'mmpretrain'):
        backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    x = torch.randn(2, 3, 32, 32)
    if row.pretrained:
        original = torch.load(checkpoints[row.pretrained])['state_dict']
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            other = MODELS.build(theirs.model)
        other.load_state_dict(original)
        with torch.no_grad():
            for model in (other, backbone):
                model.eval()  # mmpretrain's returns nothing
            expected = other.backbone(x)[-1]
            torch.testing.assert_close(backbone(x)[-1], expected, rtol=1e-3, atol=1e-4)
    backbone.train()
    kept = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and not m.training]
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    if 'frozen' in row.norm:
        assert kept == norms
    elif row.detects and row.pretrained and row.base != 'GN':
        assert len(kept) == 1 + 5  # the stem, and of the first stage 4 and a downsampling
    elif not row.detects:
        assert not kept
    assert bool(frozen) == (row.detects and bool(row.pretrained))


@pytest.mark.parametrize('name', STUDIES)
def test_tuning_changes_the_split_and_what_is_tuned_alone(name):
    study = STUDIES[name]
    row = rows(name)[0]
    setting = make_setting(row)
    point = study.points[0]
    tuned = config(_at(setting, point, study.validation))
    plain = config(setting)
    plain.merge_from_dict({**study.validation, **point})
    assert tuned.to_dict() == plain.to_dict()


CLASSIFICATIONS = [row for name in STUDIES for row in rows(name) if not row.detects]


@pytest.mark.parametrize(
    'row', CLASSIFICATIONS, ids=lambda row: f'{row.experiment}, {row.model}, {row.name}'
)
def test_the_tuning_of_a_classifier_keeps_its_images_apart(row):
    cfg = config(_at(make_setting(row), {}, STUDIES[row.experiment].validation))
    train, val = (cfg[f'{split}_dataloader'].dataset for split in ('train', 'val'))
    images = list(range(50000))
    assert train.split == val.split == 'train'
    assert not {*images[: train.indices]} & {*images[val.indices :]}


def test_longer_training_is_four_times_the_steps():
    def steps(row):
        cfg = config(make_setting(row))
        assert cfg.param_scheduler.end == cfg.train_cfg.max_epochs
        loader = cfg.train_dataloader
        return cfg.train_cfg.max_epochs * loader.dataset.indices // loader.batch_size

    short = {row.batch_size: steps(row) for row in rows('small-batches-tuned')}
    assert short == {8: 5000, 64: 625}
    assert [steps(row) for row in rows('longer-training')] == [4 * short[64]] * 4
    assert [steps(row) for row in rows('longer-small-batches')] == [4 * short[8]] * 2


def test_small_batches_scale_the_learning_rate():
    for row in rows('small-batches'):
        cfg = config(make_setting(row))
        lr, batch = cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size
        assert lr / batch == pytest.approx(0.1 / 64)
        assert cfg.model.backbone.norm_cfg == row.norm_cfg
