"""Bad input costs one line, a nonzero exit code and no work directory."""

import subprocess
import sys
import types

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tool import ROOT, run_tool

COCO = str(ROOT / 'configs' / 'mask_rcnn_r50_ubn_1x_coco.py')
DATA = ('tiny.py', '--data-root', 'images')
NORM, INIT = 'model.backbone.norm_cfg', 'model.backbone.init_cfg'
MOVE = '--data-root DIR points every dataset and evaluator at another folder'
FILE = 'give the path of a .pth file'


@pytest.mark.parametrize(
    ('options', 'line'),
    [
        (f'{NORM}.fctt=0.2', f"{NORM}: UBN got an unknown key 'fctt', did you mean 'fct'?"),
        (f'{NORM}.kernel_size=2', f'{NORM}: kernel_size must be a positive odd integer, got 2'),
        (
            f'{NORM}.type=UBNN',
            f"{NORM}: no norm layer is registered as 'UBNN', did you mean 'UBN'?",
        ),
        (f'{NORM}=None', f"{NORM}: None is no norm layer; write dict(type='UBN', ...)"),
        (
            f'{INIT}.type=Pretrained {INIT}.checkpoint=none.pth',
            f'{INIT}.checkpoint: no file none.pth; train without by --cfg-options {INIT}=None, or '
            f'from a local file by --cfg-options {INIT}.checkpoint=FILE',
        ),
        (
            f'{INIT}.type=Pretrained {INIT}.checkpoint=torchvision://resnet51',
            f'{INIT}.checkpoint: torchvision://resnet51 names no known model; train without by '
            f'--cfg-options {INIT}=None, or from a local file by --cfg-options '
            f'{INIT}.checkpoint=FILE',
        ),
        ('load_from=none.pth', f'load_from: no file none.pth; {FILE}'),
        (
            'optim_wrapper.optimizer.nesterov=True',
            'optim_wrapper.optimizer: SGD: Nesterov momentum requires a momentum and zero '
            'dampening',
        ),
        (
            'optim_wraper.optimizer.lr=9',
            "--cfg-options optim_wraper.optimizer.lr: the config has no 'optim_wraper', did you "
            "mean 'optim_wrapper'?",
        ),
        (
            'val_evaluator.topk="[1"',
            "val_evaluator.topk: must be whole numbers, as 1,5, got '[1'",
        ),
        (
            'default_hooks.condensation.type=CondensationHook default_hooks.condensation.layers=a(',
            "default_hooks.condensation: layers='a(' is no regular expression: missing ), "
            'unterminated subpattern at position 1',
        ),
        (
            'train_cfg.max_epoch=2',
            "train_cfg: EpochBasedTrainLoop takes no 'max_epoch', did you mean 'max_epochs'?",
        ),
    ],
)
def test_bad_settings(project, fails, options, line):
    assert fails('train', *DATA, '--cfg-options', *options.split()) == f'error: {line}'


def test_unreachable_pretrained_weights(project, fails):
    # Nothing listens on the port of the discard service.
    source = 'http://127.0.0.1:9/resnet.pth'
    options = (f'{INIT}.type=Pretrained', f'{INIT}.checkpoint={source}')
    line = fails('train', *DATA, '--cfg-options', *options)
    assert line.startswith(f'error: {INIT}.checkpoint: cannot fetch {source} (<urlopen error ')
    assert f'--cfg-options {INIT}=None' in line


def test_missing_data(project, fails):
    key = 'train_dataloader.dataset.data_root'
    assert fails('train', 'tiny.py') == f'error: {key}: no folder no/such/place; {MOVE}'
    line = 'error: --data-root: nowhere is not a folder'
    assert fails('train', 'tiny.py', '--data-root', 'nowhere') == line


def test_missing_split(project, fails):
    (project / 'images' / 'val').rename(project / 'images' / 'other')
    line = (
        f'error: val_dataloader.dataset.data_prefix: no folder images/val; {MOVE}, '
        '--eval-on-train evaluates on the training images'
    )
    assert fails('train', *DATA) == line


def test_missing_coco_annotations(project, fails):
    pytest.importorskip('mmdet')
    (project / 'coco').mkdir()
    line = (
        'error: train_dataloader.dataset.ann_file: no file '
        f'coco/annotations/instances_train2017.json; {MOVE}'
    )
    assert fails('train', COCO, '--data-root', 'coco') == line


def test_missing_checkpoint(project, fails):
    assert fails('train', *DATA, '--resume', 'x.pth') == f'error: --resume: no file x.pth; {FILE}'
    line = f'error: checkpoint: no file x.pth; {FILE}'
    assert fails('test', 'tiny.py', 'x.pth', '--data-root', 'images') == line


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'epoch,1', b'hello', b'Fx\n', 'half'])
def test_broken_checkpoint(project, fails, content):
    if content == 'half':
        torch.save(dict(state_dict=dict(weight=torch.zeros(1000))), 'x.pth')
        content = (project / 'x.pth').read_bytes()[:2000]
    (project / 'x.pth').write_bytes(content)
    line = fails('test', 'tiny.py', 'x.pth', '--data-root', 'images')
    assert line.startswith('error: checkpoint: x.pth is not a whole checkpoint (')


def test_a_checkpoint_of_objects(project, fails, monkeypatch):
    """As those of YOLOv5, whose classes are not here."""
    there = types.ModuleType('models')
    there.Net = type('Net', (torch.nn.Linear,), dict(__module__='models'))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'models', there)
        torch.save(dict(model=there.Net(2, 2)), 'x.pth')
    assert fails('train', *DATA, '--cfg-options', 'load_from=x.pth') == (
        'error: load_from: x.pth holds objects of code that is not installed here (No module named '
        "'models'); on a machine that has it, save model.state_dict() to a file"
    )


def save_weights(depth: int, norm: str = 'UBN', **meta) -> None:
    cfg = Config.fromfile('tiny.py')
    init_default_scope('mmpretrain')
    cfg.model.backbone.depth = depth
    cfg.model.backbone.norm_cfg = dict(type=norm)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), **meta), 'x.pth')


# Depth 34 has 8 blocks more, each of two convolutions and two UBN of 10 entries; mmengine
# does not count a missing num_batches_tracked.
@pytest.mark.parametrize(
    ('saved', 'built', 'difference'),
    [
        (34, 18, '176 keys unknown to the model (backbone.layer1.2.conv1.weight)'),
        (18, 34, '160 keys missing (backbone.layer1.2.conv1.weight)'),
    ],
)
def test_checkpoint_of_another_depth(project, fails, saved, built, difference):
    save_weights(saved)
    argv = ('x.pth', '--data-root', 'images', '--cfg-options', f'model.backbone.depth={built}')
    line = fails('test', 'tiny.py', *argv)
    assert line == (
        f'error: checkpoint: x.pth does not fit the model of tiny.py: {difference}; '
        'give the config it was trained with'
    )


def test_checkpoint_of_another_width(project, fails):
    save_weights(18, meta=dict(iter=1, epoch=1))
    width = 'model.head.in_channels=32'
    line = fails('train', *DATA, '--resume', 'x.pth', '--cfg-options', width)
    assert 'does not fit the model' in line
    assert '1 keys of another shape (head.fc.weight)' in line


# Depth 34 has 16 layers more, each with 10 entries. RBN lacks the kernel and the running
# similarity in 20 layers, IEBN the center_weight too.
@pytest.mark.parametrize(
    ('depth', 'norm', 'option', 'difference'),
    [
        (
            34,
            'UBN',
            'randomness.seed=0',
            '160 keys unknown to the model (backbone.layer1.2.bn1.weight)',
        ),
        (18, 'UBN', 'model.backbone.depth=34', '144 keys missing (backbone.layer1.2.bn1.weight)'),
        (18, 'RBN', 'resume=False', '40 keys missing (backbone.bn1.kernel)'),
        (
            18,
            'UBN',
            'model.backbone.base_channels=4',
            'keys of another shape (backbone.layer1.0.bn1.weight)',
        ),
    ],
)
def test_start_from_another_backbone(project, fails, depth, norm, option, difference):
    save_weights(depth, norm)
    line = fails('train', *DATA, '--cfg-options', 'load_from=x.pth', option)
    start = 'error: load_from: x.pth does not fit the norm layers of the backbone in tiny.py: '
    assert line.startswith(start)
    assert difference in line
    assert line.endswith('; give a checkpoint of its depth and norm type, or one with BatchNorm')


def test_start_of_batch_norm_from_ubn(project, fails):
    save_weights(18)
    config = project / 'tiny.py'
    config.write_text(config.read_text().replace("type='UBN', fct=0.15", "type='BN'"))
    line = fails('train', *DATA, '--cfg-options', 'load_from=x.pth')
    assert 'does not fit the norm layers of the backbone in tiny.py: 100 keys unknown' in line


@pytest.mark.parametrize(
    ('depth', 'norm', 'difference'),
    [
        (34, 'UBN', '160 keys unknown to the model (layer1.2.bn1.weight)'),
        (18, 'IEBN', '60 keys missing (bn1.kernel)'),
    ],
)
def test_pretrained_of_another_backbone(project, fails, depth, norm, difference):
    save_weights(depth, norm)
    options = (f'{INIT}.type=Pretrained', f'{INIT}.checkpoint=x.pth', f'{INIT}.prefix=backbone.')
    assert fails('train', *DATA, '--cfg-options', *options) == (
        f'error: {INIT}.checkpoint: x.pth does not fit the norm layers of model.backbone: '
        f'{difference}; give weights of its depth and norm type, or train without by '
        f'--cfg-options {INIT}=None, or from a local file by --cfg-options {INIT}.checkpoint=FILE'
    )


def test_pretrained_by_a_whole_model_without_prefix(project, fails):
    save_weights(18)
    options = (f'{INIT}.type=Pretrained', f'{INIT}.checkpoint=x.pth')
    line = fails('train', *DATA, '--cfg-options', *options)
    assert '180 keys missing (bn1.weight)' in line
    remedy = f'; take the backbone of a whole model by --cfg-options {INIT}.prefix=backbone.'
    assert line.endswith(remedy)


def test_weights_cannot_be_resumed(project, fails):
    save_weights(18)
    line = (
        'error: --resume: x.pth holds weights alone; start from it by --cfg-options load_from=x.pth'
    )
    assert fails('train', *DATA, '--resume', 'x.pth') == line


def test_other_options(project, fails):
    line = 'error: auto_scale_lr.enable=True: the config has no auto_scale_lr.base_batch_size'
    assert fails('train', *DATA, '--auto-scale-lr').startswith(line)
    line = 'error: model.backbone: invalid depth 17 for resnet (backbones/resnet.py, line '
    assert fails('train', *DATA, '--cfg-options', 'model.backbone.depth=17').startswith(line)
    line = 'error: --out x.json: predictions go into a .pkl file'
    assert fails('test', 'tiny.py', 'x.pth', '--out', 'x.json') == line
    line = 'error: --show: the config has no default_hooks.visualization'
    assert fails('test', 'tiny.py', 'x.pth', '--show', *NO_HOOKS) == line
    line = 'error: --launcher pytorch: start by torchrun or tools/dist_train.sh'
    assert fails('train', *DATA, '--launcher', 'pytorch') == line


NO_HOOKS = ('--cfg-options', 'default_hooks=None')
DUMP = ('_delete_=True', 'type=DumpResults', 'out_file_path=file/x.pkl')


@pytest.mark.parametrize(
    ('tool', 'argv', 'option'),
    [
        ('train', ('--work-dir', 'file/run'), 'work_dir'),
        ('train', ('--work-dir', 'tiny.py/run'), 'work_dir'),
        ('train', ('--work-dir', '/proc/run'), 'work_dir'),
        ('test', ('--work-dir', 'file/run'), 'work_dir'),
        ('test', ('--show-dir', 'file/x'), '--show-dir'),
        ('test', ('--out', 'file/x.pkl'), '--out'),
        (
            'test',
            ('--cfg-options', *(f'test_evaluator.{key}' for key in DUMP)),
            'test_evaluator.out_file_path',
        ),
        ('similarity_options', ('--csv', 'file/x.csv'), '--csv'),
        ('similarity_options', ('--work-dir', 'file/run'), 'work_dir'),
        # Without hooks, as mmengine takes it.
        ('train', ('--work-dir', 'file/run', *NO_HOOKS), 'work_dir'),
        ('similarity_options', ('--work-dir', 'file/run', *NO_HOOKS), 'work_dir'),
        ('survey_similarity', ('--out', 'file'), '--out'),
        ('reproduce', ('--work-dir', 'file'), '--work-dir'),
        ('reproduce', ('--out', 'file'), '--out'),
    ],
)
def test_places_that_cannot_be_written(project, fails, tool, argv, option):
    # A file stands where a folder has to; root may write everywhere else.
    (project / 'file').touch()
    others = dict(test=('tiny.py', 'x.pth', *DATA[1:]), reproduce=('run', 'table3', '--small'))
    if tool == 'test':
        save_weights(18)
    line = fails(tool, *others.get(tool, DATA), *argv)
    assert line.startswith(f'error: {option}: cannot write to /')


def test_results_that_have_no_place(project, fails):
    save_weights(18)
    for name in ('folder', 'folder.pkl'):
        (project / name).mkdir()
    test = ('test', 'tiny.py', 'x.pth', *DATA[1:])
    line = 'error: --out folder: metrics go into a file of .json, .yaml, .yml, .pkl'
    assert fails(*test, '--out', 'folder', '--out-item', 'metrics').startswith(line)
    line = 'error: --out: folder.pkl is a folder; name a file'
    assert fails(*test, '--out', 'folder.pkl') == line


def test_advice_with_spaces(project, fails):
    (project / 'my weights').mkdir()
    save_weights(18)
    (project / 'x.pth').rename(project / 'my weights' / 'x.pth')
    line = fails('train', *DATA, '--resume', 'my weights/x.pth')
    assert line.endswith("start from it by --cfg-options 'load_from=my weights/x.pth'")
    # It gets past load_from, and to the next mistake.
    more = ('load_from=my weights/x.pth', 'default_hooks.checkpoint.out_dir=tiny.py/x')
    line = fails('train', *DATA, '--cfg-options', *more)
    assert line.startswith('error: default_hooks.checkpoint.out_dir: cannot write to ')


def test_mistakes_in_the_config(project, fails):
    config = project / 'tiny.py'
    config.write_text(config.read_text().replace('model = dict(', 'no_model = dict('))
    assert fails('train', *DATA) == 'error: config tiny.py: model is left out'


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('model = dict(\n', 'config tiny.py: line '),
        ('model = ResNet\n', "NameError: name 'ResNet' is not defined"),
        ("_base_ = 'none.py'\n", 'none.py'),
        ("_base_ = 'mmdet::none/none.py'\n", 'none.py'),
        ("_base_ = 'mmnone::a/b.py'\n", 'mmnone'),
        ("_base_ = 'tiny.py'\n", 'it is its own _base_, or a base of it is'),
        ("custom_imports = dict(imports=['nosuch'])\n", 'ImportError: Failed to import nosuch'),
        ('a = 1 / 0\n', 'ZeroDivisionError: division by zero'),
        ('a = [].foo\n', "AttributeError: 'list' object has no attribute 'foo'"),
        ('assert False\n', 'AssertionError: no reason is given'),
    ],
)
def test_config_that_cannot_be_read(project, fails, text, line):
    (project / 'tiny.py').write_text(text)
    told = fails('train', *DATA)
    assert told.startswith('error: config tiny.py: ')
    assert line in told


@pytest.mark.parametrize(
    ('name', 'content'),
    [('latin.py', b'# caf\xe9\n'), ('broken.json', b'{'), ('broken.yaml', b'a: [1')],
)
def test_config_of_another_format(project, fails, name, content):
    (project / name).write_bytes(content)
    assert fails('train', name).startswith(f'error: config {name}: ')


def test_class_folders_that_differ(project, fails):
    (project / 'images' / 'val' / 'bright').rename(project / 'images' / 'val' / 'light')
    line = fails('train', *DATA)
    assert line.startswith('error: val_dataloader.dataset: the class folders are not those of ')


def test_as_a_process(project):
    argv = [sys.executable, str(ROOT / 'tools' / 'train.py'), 'none.py']
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'error: config: no file none.py; the project has its own in configs/\n'


def test_other_errors_keep_their_traceback(project, fails, monkeypatch):
    option = '--cfg-options', 'model.backbone.type=NoBackbone'
    assert fails('train', *DATA, *option).startswith('error: model: NoBackbone is not in the ')
    # mmengine tells the runs of one second apart by the config's name.
    (project / 'tiny.py').rename(project / 'other.py')

    def broken(*arguments, **settings):
        raise RuntimeError('a bug')

    monkeypatch.setattr('mmpretrain.models.ImageClassifier.__init__', broken)
    with pytest.raises(RuntimeError, match='a bug'):
        run_tool('train', 'other.py', *DATA[1:])
