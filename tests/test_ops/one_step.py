"""A step of a backend by itself, on random values; and how two steps compare."""

import torch

from mmubn.ops import Buffers, Parameters

CALIBRATION = ('center_weight', 'scale_weight', 'scale_bias')


def random_parameters(channels, kernel_size, dtype=torch.float64, without=()):
    """Of a layer that has all but some."""
    shapes = dict.fromkeys(Parameters._fields, (channels,))
    shapes['kernel'] = (channels, 1, kernel_size, kernel_size)
    values = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if kernel_size == 1:
        without = (*without, 'kernel')
    return Parameters(**values)._replace(**dict.fromkeys(without))


def random_buffers(channels, dtype=torch.float64, gate=False):
    """Of a layer in training."""
    return Buffers(
        running_mean=torch.randn(channels, dtype=dtype),
        running_var=torch.rand(channels, dtype=dtype) + 0.5,
        num_batches_tracked=torch.tensor(3),
        running_similarity=torch.tensor(0.4, dtype=dtype),
        gate=torch.tensor(gate),
    )


def copy(buffers):
    return Buffers(*[None if value is None else value.clone() for value in buffers])


def run_step(backend, x, dy, parameters, buffers, settings, stride=1, ranks=1):
    """Everything that a step hands out, by name; with several ranks others have rows, too.

    The buffers that it moves are not among it.
    """
    image_mean = row = rows = None
    if settings.training:
        image_mean, row = backend.measure(x, parameters.center_weight, stride)
        rows = torch.stack([row, *[row * torch.rand_like(row) for _ in range(ranks - 1)]])
    y, image_mean, statistics = backend.normalize(
        x, image_mean, rows, parameters, buffers, settings
    )
    known = statistics, parameters._replace(bias=None), settings
    sums = backend.backward_sums(x, dy, image_mean, *known)
    d_statistics = sums.d_statistics * 2  # as if another process had the same
    dx, d_center_weight = backend.backward_input(x, statistics, d_statistics, *known[1:], sums)
    gradients = sums.gradients._replace(center_weight=d_center_weight)
    return dict(
        row=row,
        y=y,
        image_mean=image_mean,
        statistics=statistics,
        d_statistics=sums.d_statistics,
        dx=dx,
        **{f'd_{name}': value for name, value in gradients._asdict().items()},
    )


def assert_same(actual, expected, **tolerance):
    """Tensors and None: in dicts, or in tuples, by name where they have names."""
    if not isinstance(expected, dict):
        names = getattr(expected, '_fields', range(len(expected)))
        actual, expected = dict(zip(names, actual)), dict(zip(names, expected))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(got, wanted, msg=lambda m, n=name: f'{n}: {m}', **tolerance)
