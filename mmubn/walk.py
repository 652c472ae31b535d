"""Goes through a config."""

import inspect
from typing import Any, Iterator, Tuple


def walk(node: Any, path: str) -> Iterator[Tuple[str, dict]]:
    """Yields every dict in ``node``, itself included, with its dotted path.

    The paths are those ``--cfg-options`` understands, list positions included.

    Args:
        node: A value of a config: dict, list, tuple or anything else.
        path (str): The path of ``node``.

    Example:
        >>> list(walk(dict(a=[dict(b=1)]), 'x'))
        [('x', {'a': [{'b': 1}]}), ('x.a.0', {'b': 1})]
    """
    if isinstance(node, dict):
        yield path, node
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    for key, value in children:
        yield from walk(value, f'{path}.{key}')


def each(node: Any, path: str) -> Iterator[Tuple[str, Any]]:
    """Yields what a config has alone or in a list, such as its evaluators, with the path of each.

    Of None and of an empty dict it yields nothing.
    """
    if isinstance(node, (list, tuple)):
        yield from ((f'{path}.{index}', child) for index, child in enumerate(node))
    elif node is not None and node != {}:
        yield path, node


def type_name(node: dict) -> str:
    """What a dict of a config is to become: the name of its ``type``, without a scope.

    A config of pure Python has the class itself there. Empty without a ``type``.
    """
    kind = node.get('type', '')
    return kind.__name__ if inspect.isclass(kind) else str(kind).split('.')[-1]


def hook_nodes(cfg: dict) -> Iterator[Tuple[str, Any]]:
    """What the config has for each hook, with its dotted path."""
    for name, node in (cfg.get('default_hooks') or {}).items():
        if node is not None:
            yield f'default_hooks.{name}', node
    yield from each(cfg.get('custom_hooks'), 'custom_hooks')
