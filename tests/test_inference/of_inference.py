"""The layers that the tests of mmubn.inference prepare."""

from mmubn import layers

KINDS = [kind for kind in layers.__all__ if kind != 'SyncUBN']  # which is UBN there
