"""--cfg-options: how values arrive, and that every key names something."""

import argparse
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from told import told
from tool import CONFIGS

pytest.importorskip('mmpretrain')

from mmubn.cli.cfg_options import OptionAction, merge_options, option, parse_value
from mmubn.cli.errors import CommandError

SCOPE = 'mmpretrain'


def parse(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=OptionAction)
    return parser.parse_args(argv).cfg_options


@pytest.mark.parametrize(
    'text',
    ['1', '1e-3', 'True', 'false', 'None', 'a', '', 'a,b', '1,2', '(1,2)', '[1,2]', '[a,b]', '(1,)',
     '(a,)', '[(1,2),[a,b],c]', '[[1,2],[3]]', 'a=b', 'mmdet::x.py', '[]', '()'],
)  # fmt: skip
def test_values_without_spaces_are_mmengines(text):
    value, theirs = parse_value(text), DictAction._parse_iterable(text)
    assert (value, type(value)) == (theirs, type(theirs))


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('my weights/x.pth', 'my weights/x.pth'),
        (' 3 ', 3),
        ('(333, 200)', (333, 200)),
        ('[a b, c]', ['a b', 'c']),
        ("['a b', 'c, d']", ['a b', 'c, d']),
        ("'a, b'", 'a, b'),
        ('"it\'s"', "it's"),
        ("it's", "it's"),
        ("'1'", '1'),
        ('runs(1,2)/x.pth', 'runs(1,2)/x.pth'),
        ('(a, b),(c, d)', [('a', 'b'), ('c', 'd')]),
        ('[v1] run/x.pth', '[v1] run/x.pth'),
        ("[{'type': 'EMAHook'}]", [dict(type='EMAHook')]),
        ('"dict(b=1)"', 'dict(b=1)'),
        ('{}.pth', '{}.pth'),
        ('{}_{}', '{}_{}'),
        ('{name}/{epoch}', '{name}/{epoch}'),
    ],
)
def test_spaces_and_quotes_survive(text, value):
    assert parse_value(text) == value


@given(st.text(st.characters(blacklist_characters='\0', blacklist_categories=('Cs',))))
def test_advice_arrives_as_it_was_meant(value):
    argv = shlex.split(option('load_from', value))
    assert parse('--cfg-options', *argv) == dict(load_from=value)


def test_options_given_twice_add_up():
    assert parse('--cfg-options', 'a=1', 'b=2', '--cfg-options', 'b=3') == dict(a=1, b=3)


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('weights/x.pth', 'is not KEY=VALUE; put quotes around'),
        ('=3', 'is not KEY=VALUE; put quotes around'),
        ('a=dict(b=1)', r'a: dict\(b=1\) is a dict, .* set its keys, as a.NAME=V'),
        ("a={'b': 1}", r"a: {'b': 1} is a dict, which would"),
        ('a=[dict(b=1)]', r'a: \[dict\(b=1\)\] is a dict, .* as "a=\[{\'type\': \'NAME\'}\]"'),
        ('a=[1', r'a: \[1 has a bracket without its other half; .* as \'a="\[1"\''),
    ],
)
def test_what_is_no_option(text, reason):
    with pytest.raises(CommandError, match=reason):
        parse('--cfg-options', 'load_from=my', text)


def config() -> Config:
    folder = 'data/a'
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    loader = dict(
        batch_size=4,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='CustomDataset', data_root=folder, pipeline=pipeline),
    )
    return Config(
        dict(
            data_root=folder,
            model=dict(
                type='ImageClassifier',
                backbone=dict(type='ResNet', depth=18, norm_cfg=dict(type='UBN'), init_cfg=None),
                head=dict(type='LinearClsHead', num_classes=2, loss=dict(type='CrossEntropyLoss')),
                train_cfg=dict(augments=dict(type='Mixup', alpha=0.8), probabilities=1),
            ),
            train_dataloader=loader,
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='CondensationHook', interval=20)],
        )
    )


@pytest.mark.parametrize(
    ('key', 'reason'),
    [
        ('optim_wraper.optimizer.lr', "the config has no 'optim_wraper', did you mean"),
        ('optim_wrapper.optimizer.rate', "optim_wrapper.optimizer takes no 'rate'"),
        ('optim_wrapper.optimizer.momentun', "did you mean 'momentum'?"),
        ('lr', "the config has no 'lr', did you mean 'optim_wrapper.optimizer.lr'?"),
        ('model.backbon.depth', "model takes no 'backbon', did you mean 'backbone'?"),
        ('model.backbone.deph', "model.backbone takes no 'deph', did you mean 'depth'?"),
        ('model.depth', "model takes no 'depth', did you mean 'model.backbone.depth'?"),
        ('model.head.loss.loss_wieght', "did you mean 'loss_weight'?"),
        ('model.train_cfg.augment', "model.train_cfg has no 'augment', did you mean 'augments'?"),
        ('train_dataloader.dataset.indicies', "did you mean 'indices'?"),
        ('train_dataloader.dataset.pipeline.2.type', 'is a list of 2; its items are'),
        ('train_dataloader.dataset.pipeline.type', 'is a list of 2; its items are'),
        ('model.backbone.depth.x', "model.backbone.depth is 18 and has no 'x'"),
        ('default_hooks.checkpont.interval', "did you mean 'checkpoint'?"),
        ('default_hooks.checkpoint.intervall', "did you mean 'interval'?"),
        ('custom_hooks.0.interva', "did you mean 'interval'?"),
        ('data_root', 'is read with the config file and not after it; set train_dataloader.'),
        ('param_scheduler.0.type', 'the config has no list param_scheduler; a list is written'),
        ('custom_hooks.0._delete_', 'an item of a list cannot be deleted; set its keys, or write'),
        ('model', '3 cannot replace a dict; set its keys, as model.type=...'),
        ('model.backbone.norm_cfg', 'cannot replace a dict; set its keys'),
        ('train_dataloader.dataset.pipeline', 'cannot replace a list of dicts; set their keys'),
    ],
)  # fmt: skip
def test_a_key_that_names_nothing(key, reason):
    line = told(merge_options, config(), {key: 3})
    assert line.startswith(f'--cfg-options {key}: ')
    assert reason in line


@pytest.mark.parametrize(
    'key',
    [
        'load_from',
        'randomness.seed',
        'auto_scale_lr.base_batch_size',
        'train_cfg.max_epochs',
        'model.backbone.norm_cfg.fct',
        'model.backbone.num_stages',
        'model.backbone.init_cfg.type',
        'train_dataloader.dataset.indices',
        'train_dataloader.dataset.metainfo.classes',
        'train_dataloader.num_workers',
        'optim_wrapper.clip_grad.max_norm',
        'optim_wrapper.optimizer.momentum',
        'optim_wrapper.optimiser.lr',  # for check_config, which knows OptimWrapper
        'default_hooks.checkpoint.max_keep_ckpts',
        'custom_hooks.0.threshold',
    ],
)
def test_keys_that_the_config_has_not_yet(key, capsys):
    cfg = config()
    merge_options(cfg, {key: 3})
    value = cfg
    for part in key.split('.'):
        value = value[int(part) if part.isdigit() else part]
    assert value == 3
    assert not capsys.readouterr().err


def test_a_word_for_a_number():
    with pytest.raises(CommandError, match=r"lr: 'fast' cannot replace the number 0\.1"):
        merge_options(config(), {'optim_wrapper.optimizer.lr': 'fast'})
    cfg = config()
    cfg.optim_wrapper.loss_scale = 512
    merge_options(cfg, {'optim_wrapper.loss_scale': 'dynamic', 'model.backbone.depth': None})


def test_what_nobody_can_judge_is_said(capsys):
    merge_options(config(), {'model.train_cfg.own': 3})
    line = "warning: --cfg-options model.train_cfg.own: model.train_cfg had no 'own'; it is added"
    assert capsys.readouterr().err.strip() == line


def test_a_dict_in_place_of_none_or_of_a_list():
    cfg = config()
    key = 'model.backbone.init_cfg'
    merge_options(cfg, {f'{key}.type': 'Pretrained', f'{key}.checkpoint': 'x.pth'})
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='x.pth')
    cfg.model.backbone.init_cfg = [dict(type='Kaiming', layer='Conv2d')]
    new = {f'{key}.type': 'Pretrained', f'{key}.checkpoint': 'x'}
    with pytest.raises(CommandError, match='is a list of 1; its items are'):
        merge_options(cfg, new)
    merge_options(cfg, {f'{key}._delete_': True, **new})
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='x')


@pytest.mark.parametrize('name', ['demo/mask_rcnn_r18_ubn_scenes', 'cifar10/resnet18_ubn_cifar10'])
def test_what_the_documents_set_is_accepted(name, capsys):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        merge_options(
            cfg,
            {
                'model.backbone.init_cfg': None,
                'model.backbone.norm_cfg.type': 'SyncUBN',
                'train_cfg.max_epochs': 1,
                'train_dataloader.dataset.indices': 8,
                'train_dataloader.num_workers': 8,
            },
        )
    assert not capsys.readouterr().err
