"""Types of the numbers on a command line, for argparse."""

import argparse
import math


def positive(text: str) -> float:
    """The type of an option that is a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'must be positive and finite, got {text}')
    return value


def count(text: str) -> int:
    """The type of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {text}')
    return value
