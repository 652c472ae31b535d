"""``--cfg-options``: how values are written, and that they name something."""

import argparse
import ast
import re
import shlex
from typing import Any, Collection, Dict, Iterator, List, Optional, Sequence, Tuple

from mmengine import registry as roots
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope, Registry

from ..walk import walk
from .config_check import RUNNER_KEYS
from .errors import CommandError, user_error, warn
from .lookup import Arguments, did_you_mean, find_class

# In a config or in Python.
_DICT = re.compile(r"""\s*(\[?\s*dict\(|\{\s*(['"].*:.*)?\}\s*$)""", re.DOTALL)
_REGISTRIES = [value for value in vars(roots).values() if isinstance(value, Registry)]


class OptionAction(DictAction):
    """mmengine's ``DictAction``, which would take the spaces out of every value.

    A value in quotes or brackets that Python can read is what Python reads. Everything
    else is mmengine's: numbers, ``True``, ``None``, ``a,b`` for a list, else a string.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: Optional[str] = None,
    ) -> None:
        """Adds the values to those given before."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for text in values:
            key, value = split_option(text)
            options[key] = parse_value(value)
        setattr(namespace, self.dest, options)


def split_option(text: str) -> Tuple[str, str]:
    """The key and the value of ``KEY=VALUE``.

    Raises:
        CommandError: The text is something else, or the value would not arrive as it is meant.
    """
    key, equals, value = text.partition('=')
    key = key.strip()
    if not equals or not key:
        raise CommandError(
            f'--cfg-options: {text!r} is not KEY=VALUE; put quotes around a value with '
            f"spaces, as in 'KEY=a b'"
        )
    if _half_open(value):
        raise CommandError(
            f'--cfg-options {key}: {value} has a bracket without its other half; text with '
            f"""brackets is written in quotes, as '{key}="{value}"'"""
        )
    if _DICT.match(value):
        raise CommandError(
            f'--cfg-options {key}: {value} is a dict, which would arrive as text; set its keys, as '
            f"{key}.NAME=VALUE, or write a list of dicts as \"{key}=[{{'type': 'NAME'}}]\""
        )
    return key, value


def _half_open(text: str) -> bool:
    """Whether it begins as a list does, and has a bracket without its other half."""
    text = text.strip()
    return text[:1] in ('[', '(') and any(text.count(a) != text.count(b) for a, b in ('[]', '()'))


def parse_value(text: str) -> Any:
    """What the text of an option stands for."""
    text = text.strip()
    if text[:1] in ('"', "'", '[', '('):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None  # as in [a, b]
        if isinstance(value, (list, tuple)):
            return value if text[0] in '[(' else list(value)
        if isinstance(value, str) and text[0] in '"\'':
            return value
    parts = _split(text)
    if len(parts) > 1:
        return [parse_value(part) for part in parts if part.strip()]
    if text[:1] + text[-1:] in ('[]', '()'):
        values = [parse_value(part) for part in _split(text[1:-1]) if part.strip()]
        return tuple(values) if text[0] == '(' else values
    return DictAction._parse_int_float_bool(text)


def _split(text: str) -> List[str]:
    """At the commas outside of brackets."""
    parts, depth = [''], 0
    for character in text:
        depth += (character in '([') - (character in ')]')
        if character == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return parts


def option(key: str, value: str) -> str:
    """``KEY=VALUE`` as a shell takes it, for a string that must arrive as it is."""
    plain = parse_value(value) == value and not _half_open(value) and not _DICT.match(value)
    return shlex.quote(f'{key}={value if plain else repr(value)}')


def merge_options(cfg: Config, options: Dict[str, Any]) -> None:
    """Lays the options over the config, each of which must name something in it.

    A key that the config has not yet must be an argument of what its dict builds, or, at
    the top, one that mmengine reads. Of ``norm_cfg`` the layers know the keys.

    Args:
        cfg (Config): Changed in place; its default scope must be in force.
        options (dict): From dotted keys to values.

    Raises:
        CommandError: A key names nothing, or a value replaces dicts.
    """
    before = Config(cfg.to_dict())
    merged = dict(options)
    for key in options:
        *way, last = key.split('.')
        if last == '_delete_' and way and _has(before, way):
            parent = _look_up(before, way[:-1])
            if isinstance(parent, (list, tuple)):
                raise CommandError(
                    f'--cfg-options {key}: an item of a list cannot be deleted; set its keys, '
                    'or write the list in the config file'
                )
            parent[way[-1]] = None  # what stood there goes
    for key, value in options.items():
        for path in _check_way(before, key):
            merged[f'{path}._delete_'] = True
        _check_top(before, key)
        _check_replaced(before, key, value)
    with user_error(KeyError, TypeError, AttributeError, of='--cfg-options'):
        cfg.merge_from_dict(merged)
    for key in options:
        _check_added(before, cfg, key)


def _check_way(cfg: Config, key: str) -> Iterator[str]:
    """Whether the values on the way to ``key`` can hold it; yields those with None instead."""
    node, parts = cfg, key.split('.')
    for depth, part in enumerate(parts):
        path = '.'.join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise CommandError(
                    f'--cfg-options {key}: {path} is a list of {len(node)}; '
                    f'its items are {path}.0 to {path}.{len(node) - 1}'
                )
            node = node[int(part)]
        elif isinstance(node, (dict, Config)):
            if part not in node:
                if any(later.isdigit() for later in parts[depth + 1 :]):
                    absent = '.'.join(parts[: depth + 1])
                    raise CommandError(
                        f'--cfg-options {key}: the config has no list {absent}; a list is written '
                        'whole, in the config file'
                    )
                return
            node = node[part]
        elif node is None:
            yield path
            return
        else:
            raise CommandError(f"--cfg-options {key}: {path} is {node!r} and has no '{part}'")


def _check_top(cfg: Config, key: str) -> None:
    name = key.split('.')[0]
    if name not in cfg and name not in RUNNER_KEYS:
        hint = _nearest(cfg, '', name, {*cfg, *RUNNER_KEYS})
        raise CommandError(f"--cfg-options {key}: the config has no '{name}'{hint}")
    if name in RUNNER_KEYS and name != 'custom_imports':
        return
    text = f'--cfg-options {key}: {name} is read with the config file and not after it'
    places = [
        f'{path}.{name}'
        for top in cfg
        if top in RUNNER_KEYS
        for path, node in walk(cfg[top], top)
        if name in node and node[name] == cfg.get(name)
    ]
    if places:
        or_root = ', or give --data-root DIR' if name == 'data_root' else ''
        raise CommandError(f'{text}; set {", ".join(places)}{or_root}')
    warn(text)


def _check_replaced(cfg: Config, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return
    old = _look_up(cfg, key.split('.'))
    if isinstance(old, dict) and old:
        example = f'{key}.{"type" if "type" in old else next(iter(old))}=...'
        raise CommandError(
            f'--cfg-options {key}: {value!r} cannot replace a dict; set its keys, as {example}'
        )
    if isinstance(old, (list, tuple)) and any(isinstance(item, dict) for item in old):
        raise CommandError(
            f'--cfg-options {key}: {value!r} cannot replace a list of dicts; set their keys, as '
            f'{key}.0.type=...'
        )
    number = isinstance(old, (int, float)) and not isinstance(old, bool)
    # A loss scale may be 'dynamic'; of norm_cfg the layers know the values.
    if number and isinstance(value, str) and not {'loss_scale', 'norm_cfg'} & {*key.split('.')}:
        raise CommandError(f'--cfg-options {key}: {value!r} cannot replace the number {old}')


def _check_added(before: Config, after: Config, key: str) -> None:
    """A key that the config had not: whether what stands around it takes it."""
    parts = key.split('.')
    depth = next((d for d in range(len(parts)) if not _has(before, parts[: d + 1])), None)
    if depth is None or depth == 0 or parts[depth] in ('_delete_', '_scope_', 'type'):
        return
    place, name = '.'.join(parts[:depth]), parts[depth]
    node, old = _look_up(after, parts[:depth]), _look_up(before, parts[:depth])
    if not isinstance(node, dict) or place in RUNNER_KEYS - {'model', 'default_hooks'}:
        return  # check_config looks at these
    if place.endswith('norm_cfg') or not old:
        return  # check_norms looks at these; or everything in it is new
    classes = _classes(node)
    if any(name in takes.names for takes in classes):
        return
    known = {*old, *(n for takes in classes for n in takes.names)}
    if classes and not any(takes.is_open for takes in classes):
        hint = _nearest(before, place, name, known)
        raise CommandError(f"--cfg-options {key}: {place} takes no '{name}'{hint}")
    hint = did_you_mean(name, known, cutoff=0.85)
    if hint:
        raise CommandError(f"--cfg-options {key}: {place} has no '{name}'{hint}")
    warn(f"--cfg-options {key}: {place} had no '{name}'; it is added")


def _nearest(cfg: Config, place: str, name: str, known: Collection[str]) -> str:
    """A key that looks like it, or one of the same name further inside."""
    tops = [place] if place else [top for top in cfg if top in RUNNER_KEYS]
    for top in tops:
        for path, node in walk(_look_up(cfg, top.split('.')), top):
            if name in node and path != place:
                return f", did you mean '{path}.{name}'?"
    return did_you_mean(name, known)


_NOTHING = object()


def _has(cfg: Any, parts: Sequence[str]) -> bool:
    return _look_up(cfg, parts, _NOTHING) is not _NOTHING


def _look_up(node: Any, parts: Sequence[str], default: Any = None) -> Any:
    """What stands there; the default where nothing does."""
    for part in parts:
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, (dict, Config)) and part in node:
            node = node[part]
        else:
            return default
    return node


def _classes(node: dict) -> List[Arguments]:
    """What the dict may build, in any registry: their names overlap."""
    if 'type' not in node:
        return []
    found = [find_class(node, roots.MODELS)]  # imports the scope's registries
    scope = DefaultScope.get_current_instance()
    found += [
        find_class(node, registry)
        for registry in _REGISTRIES
        if scope is None or scope.scope_name in (registry.scope, *registry.children)
    ]
    return [Arguments(build) for build in dict.fromkeys(found) if build is not None]
