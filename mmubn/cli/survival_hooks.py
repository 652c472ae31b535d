"""Adds the hooks that a long training should have."""

from mmengine.config import Config


def add_survival_hooks(cfg: Config) -> None:
    """Adds ``NonFiniteHook`` and, to a config with a seed, ``EpochSeedHook``, if not there.

    Args:
        cfg (Config): Changed in place.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    wanted = ['NonFiniteHook']
    if (cfg.get('randomness') or {}).get('seed') is not None:
        wanted.append('EpochSeedHook')
    present = [hook.get('type') for hook in hooks]
    cfg.custom_hooks = [*hooks, *(dict(type=name) for name in wanted if name not in present)]
