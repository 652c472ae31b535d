"""What tools/train.py and tools/test.py share: options, preflight checks, launching.

mmengine builds and runs everything; this package stands before it, so that bad input
costs one line and not a half-written work directory. It needs mmengine and mmcv;
:mod:`mmubn.cli.errors` and :mod:`mmubn.cli.argument_types` need torch alone.
"""
