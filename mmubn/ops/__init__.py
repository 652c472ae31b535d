"""The functions behind the layers. They need torch alone."""

from .backend import BACKENDS
from .interface import Buffers, Parameters, Settings
from .similarity import mean_cosine_similarity
from .ubn import ubn

__all__ = ['BACKENDS', 'Buffers', 'Parameters', 'Settings', 'mean_cosine_similarity', 'ubn']
