"""From a trained model to one that is used. Needs torch alone."""

from .prepare import PreparedLayer, prepare_for_inference

__all__ = ['PreparedLayer', 'prepare_for_inference']
