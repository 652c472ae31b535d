"""Layers that compute more than their type says, which nothing that replaces them may lose."""

from mmubn import UBN


class ActivatedUBN(UBN):
    """By its class."""

    def forward(self, x):
        return super().forward(x).relu()


def with_forward(norm):
    """By a function on the layer itself."""
    forward = norm.forward
    norm.forward = lambda x: 3 * forward(x)
    return norm
