"""The functions behind the layers. They need torch alone."""

from .backend import BACKENDS
from .similarity import mean_cosine_similarity
from .ubn import Statistics, batch_statistics, image_mean, image_moments, ubn

__all__ = [
    'BACKENDS',
    'Statistics',
    'batch_statistics',
    'image_mean',
    'image_moments',
    'mean_cosine_similarity',
    'ubn',
]
