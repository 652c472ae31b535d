"""The configs of the project, each read once: of most of them several tests have a question."""

from functools import cache

from mmengine.config import Config
from tool import CONFIGS


@cache
def _read(name: str) -> dict:
    return Config.fromfile(CONFIGS / name).to_dict()


def resolved(name: str) -> Config:
    """The config of a file in configs/, to be changed at will."""
    return Config(_read(name))
