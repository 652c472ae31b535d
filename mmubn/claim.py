"""Claims a file for one process."""

from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def claim(file: IO) -> bool:
    """Claims an open file until it is closed or the process ends, however that ends.

    Processes that are forked from this one have no part in the claim. It ends, too, where
    this process opens the file once more and closes that.

    Args:
        file (file object): Open for writing.

    Returns:
        bool: False where another process has it. True where the file system has no locks.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    return True
