"""Checks that the work directory can take what is written into it."""

from mmengine.config import Config
from torch import nn

from ..walk import walk
from ..writing import check_file, check_folder

_OTHER = 'give another folder by --work-dir'


def check_work_dir(cfg: Config, model: nn.Module) -> None:
    """Writes where the checkpoints will be, and reserves the room for one of them.

    What is written goes away at once. A folder that does not exist yet is judged by
    the nearest one above it.

    Args:
        cfg (Config): The resolved config.
        model (Module): Its model.

    Raises:
        CommandError: Nothing can be written there, or no file of a checkpoint's size.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = {'work_dir': cfg.work_dir}
    if hook.get('out_dir') and '://' not in hook['out_dir']:
        folders['default_hooks.checkpoint.out_dir'] = hook['out_dir']
    size = _checkpoint_bytes(cfg, model)
    for key, folder in folders.items():
        check_folder(key, folder, size, _OTHER)


def check_results(cfg: Config, model: nn.Module) -> None:
    """Writes where an evaluation will: the work directory, and what its metrics name.

    Args:
        cfg (Config): The resolved config.
        model (Module): Not needed.

    Raises:
        CommandError: Nothing can be written there.
    """
    check_folder('work_dir', cfg.work_dir, remedy=_OTHER)
    for path, node in walk(cfg.get('test_evaluator'), 'test_evaluator'):
        for name in ('out_file_path', 'outfile_prefix'):
            if node.get(name):
                check_file(f'{path}.{name}', node[name])


def _checkpoint_bytes(cfg: Config, model: nn.Module) -> int:
    """The model's bytes and those of the optimizer's state, as far as its type tells."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer', {})
    states = 2 if 'Adam' in str(optimizer.get('type')) else bool(optimizer.get('momentum'))
    weights = sum(value.nbytes for value in model.state_dict().values())
    return weights + states * sum(p.nbytes for p in model.parameters() if p.requires_grad)
