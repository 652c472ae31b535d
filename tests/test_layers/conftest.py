"""Fixtures of the layer tests."""

import pytest
from against_reference import LAYERS


@pytest.fixture(params=LAYERS)
def make_layer(request):
    """Builds one of the layers for a number of channels."""
    return LAYERS[request.param]
