"""What a check tells."""

from typing import Any, Callable

import pytest

from mmubn.cli.errors import CommandError


def told(function: Callable, *arguments: Any, **settings: Any) -> str:
    """The one line of the ``CommandError`` that the function raises."""
    with pytest.raises(CommandError) as caught:
        function(*arguments, **settings)
    assert '\n' not in str(caught.value)
    return str(caught.value)
