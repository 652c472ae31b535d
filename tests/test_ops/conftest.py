"""Makes Triton's interpreter quicker."""

import pytest


@pytest.fixture(scope='session', autouse=True)
def _patch_the_language_once():
    """The interpreter patches Triton's language at each call of one device function by another.

    The launch has done so already for all functions that see the language by the same name.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # the tests of other backends need no Triton
        interpreter = None
    if not hasattr(interpreter, '_patch_lang'):
        yield
        return
    patched = set()

    def call(self, *arguments, **keywords):
        module = self.fn.__module__
        if module not in patched and not module.startswith('mmubn'):
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, '__call__', call)
        yield
