"""The functions behind the layers. They need torch alone."""

from .similarity import mean_cosine_similarity
from .ubn import batch_statistics, image_mean, image_moments, ubn

__all__ = ['batch_statistics', 'image_mean', 'image_moments', 'mean_cosine_similarity', 'ubn']
