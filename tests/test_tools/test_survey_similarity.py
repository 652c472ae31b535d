"""tools/survey_similarity.py: a config of each host, a run, bad input."""

from pathlib import Path

import pytest
import torch
from tool import ROOT, read_csv, run_tool

from mmubn.runs import COLUMNS


def survey(*argv) -> dict:
    run_tool('survey_similarity', *map(str, argv), '--out', 'out')
    return {row['layer']: row for row in read_csv(Path('out/similarity_survey.csv'))}


@pytest.mark.parametrize('norm', ['BN', 'UBN'])
def test_a_classifier(project, capsys, drawn, norm):
    arguments = ['--cfg-options', 'model.backbone.norm_cfg._delete_=True']
    arguments += [f'model.backbone.norm_cfg.type={norm}']
    rows = survey('tiny.py', '--data-root', 'images', '--batches', 2, *arguments)
    assert len(rows) == 20
    layers, gates = drawn['similarity_survey.png'].axes
    similarities = [float(row['similarity']) for row in rows.values()]
    assert layers.lines[0].get_xdata() == pytest.approx(similarities, abs=1e-4)
    shut = [key for key in next(iter(rows.values())) if key.startswith('shut_at_')]
    counts = [sum(row[key] == 'True' for row in rows.values()) for key in shut]
    assert list(gates.lines[0].get_ydata()) == counts
    out = capsys.readouterr().out
    assert 'ImageClassifier, 2 training batches' in out
    assert 'backbone.layer4.1.bn2' in out
    assert not Path('work_dirs').exists()


def test_a_detector(tmp_path, monkeypatch, capsys):
    from mmubn.datasets.scenes import make_scenes

    monkeypatch.chdir(tmp_path)
    make_scenes('scenes', num_train=4, num_val=1, size=64)
    config = ROOT / 'configs' / 'demo' / 'mask_rcnn_r18_ubn_scenes.py'
    options = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
    options += ['model.backbone.norm_eval=True', 'train_dataloader.batch_size=2']
    rows = survey(config, '--data-root', 'scenes', '--batches', 2, '--cfg-options', *options)
    assert {name.split('.')[0] for name in rows} == {'backbone'}
    assert 'layers are held in evaluation mode (norm_eval=True' in capsys.readouterr().out


def test_of_a_checkpoint_it_takes_the_weights(project):
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile('tiny.py').model)
    model.backbone.bn1.bias.data.fill_(100)  # every feature behind is alike
    torch.save(model.state_dict(), 'alike.pth')
    before = survey('tiny.py', '--data-root', 'images', '--batches', 1)
    after = survey('tiny.py', '--data-root', 'images', '--batches', 1, '--checkpoint', 'alike.pth')
    name = 'backbone.layer1.0.bn1'
    assert float(after[name]['similarity']) > max(0.99, float(before[name]['similarity']))


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('run').mkdir()
    Path('run/condensation.csv').write_text(
        f'{",".join(COLUMNS)}\n1,9,a,UBN,train/input,0.2,0.3,1\n'
    )
    for source in ('run', 'run/condensation.csv'):
        assert survey(source)['a']['shut_at_0.2'] == 'True'
    assert 'warning: from fct=0.2 on most gates would be shut (1 of 1)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (dict(model=dict(weight=torch.ones(1))), "has its weights under 'model', and mmengine"),
        (dict(state_dict={}), 'does not fit the model of tiny.py: '),
        (dict(state_dict={'other.weight': torch.ones(1)}), 'does not fit the model of tiny.py: '),
    ],
)
def test_a_checkpoint_that_does_not_fit(project, fails, content, reason):
    torch.save(content, 'x.pth')
    data = ('tiny.py', '--data-root', 'images')
    line = fails('survey_similarity', *data, '--checkpoint', 'x.pth')
    assert line.startswith(f'error: --checkpoint: x.pth {reason}')
    if 'state_dict' in content:  # to start from, it must fit in the norm layers
        line = fails('survey_similarity', *data, '--cfg-options', 'load_from=x.pth')
        assert line.startswith('error: load_from: x.pth does not fit the norm layers')


def test_batches_are_counted_from_1(capsys):
    with pytest.raises(SystemExit, match='2'):
        run_tool('survey_similarity', 'tiny.py', '--batches', '0')
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith('error: argument --batches: must be at least 1, got 0')


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('images',), 'images/condensation.csv: no such file; train with custom_hooks='),
        (('images', '--checkpoint', 'x.pth'), '--checkpoint: needs a config; images has what a'),
        (('images', '--batches', '2'), '--batches: needs a config; images has what a run recorded'),
        (('tiny.py', '--data-root', 'images', '--checkpoint', 'x.pth'), '--checkpoint: no file x'),
        # Before the data is looked for.
        (('tiny.py', '--layers', '('), "tiny.py: layers='(' is no regular"),
        (('tiny.py', '--layers', 'nothing'), "tiny.py: layers='nothing'"),
        (
            (
                *('tiny.py', '--data-root', 'images', '--cfg-options', 'randomness=None'),
                'train_dataloader.batch_size=1',
            ),
            'tiny.py: no similarity in 8 batches',
        ),
    ],
)
def test_bad_input_is_one_line(project, fails, argv, message):
    assert fails('survey_similarity', *argv).startswith(f'error: {message}')
