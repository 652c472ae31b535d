"""The experiments: their rows, configs and values."""

from mmengine.config import Config
from tool import read_csv

from mmubn.paths import ROOT
from mmubn.reproduce.experiments import EXPERIMENTS, ROWS, select
from mmubn.reproduce.plot import PLOTS
from mmubn.reproduce.rows import PAPER
from mmubn.reproduce.run import make_setting

SMALL = ROOT / 'configs' / 'cifar10' / 'resnet18_small_cifar10.py'


def test_every_row_has_a_config():
    assert {row.experiment for row in ROWS} == set(EXPERIMENTS)
    for row in ROWS:
        assert (ROOT / 'configs' / row.config).is_file(), row.label


def test_configs_have_the_norm_that_the_rows_say():
    rows = select(['table3'], ['*ResNet-50*'], one_network=False)
    rows += select(['table6'], ['*R50, UBN'], one_network=False)
    rows += select(['hosts-detection'], ['*R50*'], one_network=False)
    assert {row.base for row in rows} == {row.base for row in ROWS}
    for row in rows:
        cfg = Config.fromfile(ROOT / 'configs' / row.config)
        norm_cfg = cfg.model.backbone.norm_cfg
        norm_cfg.pop('requires_grad', None)
        assert norm_cfg == row.norm_cfg
        before = cfg.to_dict()
        cfg.merge_from_dict(dict(row.options))
        assert cfg.to_dict() == before


def test_labels_are_unique_and_each_rectified_row_has_its_baseline():
    labels = [(row.experiment, row.label) for row in ROWS]
    assert len(set(labels)) == len(labels)
    for row in ROWS:
        if row.norm != 'BN' and row.experiment != 'table7':  # which has no BN
            assert sum(r.is_baseline_of(row) for r in ROWS) == 1, row.label


def test_papers_values_are_those_of_the_csv():
    values = {(row.experiment, row.label): row.paper for row in ROWS}
    assert values['table3', 'CIFAR-100, ResNet-50, UBN'] == {'top1': 78.67, 'top5': 94.4}
    assert values['table7', 'CIFAR-10, ResNet-18, UBN, batch 64'] == {'top1': 94.9}
    assert values['table8', 'CIFAR-10, ResNet-50, UBN'] == {'train_seconds': 3606, 'epochs': 73}
    mask = values['table6', 'COCO, Mask R-CNN R50, BN']
    assert (mask['bbox_AP'], mask['segm_APl']) == (34.0, 46.4)
    assert len(read_csv(PAPER)) == sum(len(paper) for paper in values.values())


def test_one_network_keeps_the_norms_of_the_first():
    rows = select(['table3'], [], one_network=True)
    assert [row.norm for row in rows] == ['IN', 'GN', 'BN', 'IEBN', 'RBN', 'BNET', 'UBN']
    assert {row.model for row in rows} == {'ResNet-50'}


def test_rows_that_say_the_same_share_their_runs():
    rows = {(row.experiment, row.label): row for row in ROWS}
    for a, b in (
        (('table4', 'CIFAR-10, ResNet-50, BN'), ('figure5', 'CIFAR-10, ResNet-50, BN')),
        (
            ('table4', 'CIFAR-10, ResNet-101, UBN'),
            ('figure6', 'CIFAR-10, ResNet-101, UBN, FCT 0.15'),
        ),
    ):
        assert make_setting(rows[a]) == make_setting(rows[b])
    every = {(r.config, str(r.norm_cfg), str(r.extra)) for r in ROWS}
    assert len({make_setting(r).name for r in ROWS}) == len(every)


def test_the_small_network_takes_every_norm():
    rows = select(['table3', 'figure5', 'ours'], [], one_network=True)
    settings = {s.name: s for s in (make_setting(r, SMALL) for r in rows)}
    groups = settings['resnet18_small_cifar10-GN'].options['model.backbone.norm_cfg.num_groups']
    assert groups == 8  # of 16 channels
    base = Config.fromfile(SMALL).to_dict()
    for setting in settings.values():
        cfg = Config(base)
        cfg.merge_from_dict(dict(setting.options))
        assert cfg.model.backbone.norm_cfg.type == setting.norm


def test_plots_and_contrasts_name_what_there_is():
    assert {plot for e in EXPERIMENTS.values() for plot in e.plots} == set(PLOTS)
    for experiment in EXPERIMENTS.values():
        norms = {row.norm for row in experiment.rows}
        assert norms >= {norm for pair in experiment.contrasts for norm in pair}
