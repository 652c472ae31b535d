"""What the start-up check says of models that can and that cannot train their UBNs."""

import importlib
import re

import pytest
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn
from toy_runner import ToyImages, ToyNet, hook_of, loader, log_of, make_runner

import mmubn
from mmubn.hooks import UBNCheckHook
from mmubn.hooks.ubn_check_hook import without_effect

HOOK = dict(type='UBNCheckHook')


class Held(ToyNet):
    """Keeps a part in evaluation mode or frozen whenever training mode is set."""

    def __init__(self, evaluate=(), freeze=()):
        super().__init__()
        self.more = nn.ModuleList([mmubn.RBN(8), mmubn.UBN(8)])
        self.evaluate, self.freeze = evaluate, freeze

    def train(self, mode=True):
        super().train(mode)
        for name in self.evaluate:
            self.get_submodule(name).eval()
        for name in self.freeze:
            self.get_submodule(name).requires_grad_(False)
        return self


def checked(tmp_path, model, **settings):
    options = dict(epochs=1, val=False, log_level='INFO')
    runner = make_runner(tmp_path, model, hooks=[dict(HOOK, **settings)], **options)
    runner.call_hook('before_train')
    return re.search(r'- (\w+) - ((?:\w+, )*UBN: .*)', log_of(runner)).groups()


def test_all_train(tmp_path):
    model = ToyNet()
    model.stem[1] = mmubn.UBN(8)
    assert checked(tmp_path, model) == ('INFO', 'UBN: 2 layers built, 2 train')


def test_sync_ubn_counts(tmp_path):
    model = ToyNet()
    model.stem[1] = mmubn.SyncUBN(8)
    assert checked(tmp_path, model) == ('INFO', 'SyncUBN, UBN: 2 layers built, 2 train')


def test_batch_norms_beside_ours_are_listed(tmp_path):
    expected = 'UBN: 1 layers built, 1 train; 1 other batch norms: BatchNorm2d'
    assert checked(tmp_path, ToyNet()) == ('INFO', expected)


def test_some_are_held(tmp_path):
    model = Held(evaluate=['norm', 'more.0'], freeze=['more.0'])
    # Only what the model's own train() does holds them, not the mode it came in.
    model.requires_grad_(True).eval()
    assert checked(tmp_path, model) == (
        'INFO',
        'RBN, UBN: 3 layers built, 2 train, 1 of them with frozen statistics (norm_eval=True), '
        '1 frozen (frozen_stages or requires_grad=False)'
        '; 1 other batch norms: BatchNorm2d',
    )


def test_none_can_train(tmp_path):
    held = ['norm', 'more.0', 'more.1']
    level, line = checked(tmp_path, Held(evaluate=held, freeze=held))
    assert level == 'WARNING'
    assert line.startswith('RBN, UBN: 3 layers built, 0 train, 3 frozen (frozen_stages or')
    assert line.endswith(
        'None of RBN, UBN can train: set frozen_stages=-1 in the backbone and requires_grad=True '
        'in norm_cfg.'
    )


def test_without_gradients_the_statistics_move(tmp_path):
    level, line = checked(tmp_path, Held(freeze=['norm', 'more.0', 'more.1']))
    assert level == 'WARNING'
    assert '0 train, 3 without gradients whose statistics move (requires_grad=False)' in line


def test_all_with_frozen_statistics(tmp_path):
    level, line = checked(tmp_path, Held(evaluate=['norm', 'more.0', 'more.1']))
    assert level == 'WARNING'
    assert line.startswith('RBN, UBN: 3 layers built, 3 train, 3 of them with frozen statistics')
    assert line.endswith(
        'No batch statistics and no gate anywhere; set norm_eval=False in the backbone for those.'
    )


def test_frozen_statistics_on_purpose(tmp_path):
    held = ['norm', 'more.0', 'more.1']
    assert checked(tmp_path / 'all', Held(evaluate=held), frozen_statistics=True) == (
        'INFO',
        'RBN, UBN: 3 layers built, 3 train, 3 of them with frozen statistics (norm_eval=True)'
        '; 1 other batch norms: BatchNorm2d',
    )
    level, line = checked(tmp_path / 'some', Held(evaluate=held[:2]), frozen_statistics=True)
    assert level == 'WARNING'
    assert line.endswith(
        'frozen_statistics=True, but 1 have statistics that train; set norm_eval=True in the '
        'backbone for those.'
    )


class HoldsBatchNorm2d(ToyNet):
    """norm_eval as some backbones have it."""

    norm_eval = True

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_norm_eval_without_effect_is_told(tmp_path):
    runner = make_runner(tmp_path, HoldsBatchNorm2d(), hooks=[HOOK], epochs=1, val=False)
    runner.call_hook('before_train')
    (line,) = [line for line in log_of(runner).splitlines() if 'norm_eval' in line]
    assert 'WARNING' in line
    expected = 'model: norm_eval=True has no effect on 1 of the 1 layers of UBN: HoldsBatchNorm2d'
    assert expected in line


@pytest.mark.parametrize(
    ('library', 'kind', 'settings'),
    [
        ('mmpretrain', 'ShuffleNetV2', {}),
        ('mmpretrain', 'EfficientNet', dict(arch='b0')),
        ('mmpretrain', 'EfficientNetV2', dict(arch='b0')),
        ('mmpretrain', 'ResNet', dict(depth=18)),
        ('mmdet', 'EfficientNet', dict(arch='b0')),
        ('mmdet', 'ResLayer', dict(depth=18)),
        ('mmdet', 'ResNet', dict(depth=18)),
    ],
)
def test_backbones_whose_norm_eval_has_no_effect_on_ours(library, kind, settings):
    pytest.importorskip(library)
    models = importlib.import_module(f'{library}.registry').MODELS
    importlib.import_module(f'{library}.models')
    model = models.build(
        dict(type=f'{library}.{kind}', norm_cfg=dict(type='UBN'), norm_eval=True, **settings)
    )
    model.train()
    # Which of them the docs name.
    assert bool(list(without_effect(model))) == (kind != 'ResNet')


class Configured(ToyNet):
    """Takes a config whose norm it does not build."""

    def __init__(self, neck):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)


def run_config(tmp_path, model, **options):
    MODELS.register_module(module=Configured, force=True)
    DATASETS.register_module(module=ToyImages, force=True)
    cfg = Config(
        dict(
            model=model,
            work_dir=str(tmp_path),
            train_dataloader=loader(dict(type='ToyImages')),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            custom_hooks=[HOOK],
            log_level='ERROR',
            experiment_name=tmp_path.name,
            **options,
        )
    )
    Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('kind', ['UBN', 'mmubn.UBN', 'RBN'])
def test_replaced_layers_are_an_error_that_names_key_and_type(tmp_path, kind):
    neck = [dict(norm_cfg=dict(type='BN')), dict(norm_cfg=dict(type=kind, fct=0.15))]
    expected = (
        rf"model.neck.1.norm_cfg asks for '{kind.split('.')[-1]}', but the model has no such "
        'layer; it has 2 BatchNorm2d.*: remove sync_bn= or convert_sync_batchnorm.$'
    )
    with pytest.raises(RuntimeError, match=expected):
        run_config(tmp_path, dict(type='Configured', neck=neck))


def test_config_without_ubn_passes(tmp_path):
    # An unused variable of the config asks for nothing.
    neck = dict(norm_cfg=dict(type='BN'))
    run_config(tmp_path, dict(type='Configured', neck=neck), norm_cfg=dict(type='UBN'))


def test_minimal_config_passes(tmp_path):
    model = ToyNet()
    model.norm = nn.BatchNorm2d(8)
    model = convert_sync_batchnorm(model).eval()
    runner = make_runner(tmp_path, model, hooks=[HOOK], epochs=1, val=False)
    hook_of(runner, UBNCheckHook).before_train(runner)
