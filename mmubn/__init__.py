"""Unified Batch Normalization (UBN, arXiv 2311.15993), for OpenMMLab and plain PyTorch.

Importing the package registers its types wherever mmengine is installed. The
layers and the functions behind them, :mod:`mmubn.layers` and :mod:`mmubn.ops`,
need torch alone.
"""

import importlib.util

from . import layers
from .condensation import record_condensation
from .convert import convert_norm
from .inference import prepare_for_inference
from .layers import *  # noqa: F403  it lists its types in __all__
from .similarity_survey import read_survey, survey_similarity
from .version import __version__

if importlib.util.find_spec('mmengine') is not None:
    from . import registration  # noqa: F401

__all__ = [
    *layers.__all__,
    '__version__',
    'convert_norm',
    'prepare_for_inference',
    'read_survey',
    'record_condensation',
    'survey_similarity',
]
