"""Data sets that mmpretrain lacks; :mod:`mmubn` registers each that is named here.

What draws the demo's scenes and the studies' stands beside them.
"""

from ..lazy import getter

_MODULES = {'CachedImageFolder': 'cached_image_folder', 'Shapes': 'shapes'}
__all__ = [*_MODULES]
__getattr__ = getter(__name__, _MODULES)
