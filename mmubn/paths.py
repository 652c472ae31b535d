"""Where the project's files lie that are no Python modules."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

# The folder that holds configs/ and tools/: the checkout, or what an installation copied of it.
ROOT = _PACKAGE.parent if (_PACKAGE.parent / 'model-index.yml').is_file() else _PACKAGE / '.mim'
