"""Fixtures that several test modules share."""

import os
import traceback
from functools import lru_cache
from pathlib import Path

# One thread: the tensors are small, and threads that wait for one another spin. Read when
# torch is imported, here and in the subprocesses of the tests.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# With deterministic algorithms, older torch refuses cuBLAS without it. Read by cuBLAS.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest
import torch
from tool import saved_figures, version

# Without a GPU the Triton kernels run in Triton's interpreter. Read when triton is imported.
os.environ.setdefault('TRITON_INTERPRET', '0' if torch.cuda.is_available() else '1')


def pytest_runtest_setup(item):
    marker = item.get_closest_marker('newer_torch')
    if marker and version(torch.__version__) <= version(marker.kwargs.get('than', '2.1')):
        pytest.skip(f'torch {torch.__version__}: {marker.args[0]}')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leave_a_lost_gpu():
    """After an illegal access all that a process asks of a GPU fails: xdist starts another."""
    yield
    if torch.cuda.is_initialized() and 'PYTEST_XDIST_WORKER' in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            traceback.print_exc()
            os._exit(1)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='session')
def metafiles_read_once():
    """Quick configs: mmengine reads all metafiles of a package for each base there."""
    from mmengine.config import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, 'load', lru_cache(maxsize=None)(utils.load))
        yield


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get('MMUBN_DATA')
    if folder is None:
        pytest.skip('no real data: MMUBN_DATA names no folder')
    return Path(folder)


@pytest.fixture(scope='session')
def quick_interpreter():
    """Leaves out what Triton's interpreter repeats at each call of one device function by another.

    It patches Triton's language. The launch has done so already for all functions that see the
    language by the same name.
    """
    interpreter = pytest.importorskip('triton.runtime.interpreter')
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


@pytest.fixture(scope='session')
def boolean_masks():
    """Keeps scalars of the interpreter boolean where they are spread over a block.

    A comparison has the type of what was compared there, so its block was one of int32. Triton 3.9
    refuses it as a mask. A GPU is not concerned.
    """
    interpreter = pytest.importorskip('triton.runtime.interpreter')
    create_splat = interpreter.InterpreterBuilder.create_splat

    def splat(self, block, scalar):
        if scalar.data.dtype == bool:
            scalar = interpreter.TensorHandle(scalar.data, interpreter.tl.int1)
        return create_splat(self, block, scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, 'create_splat', splat)
        yield


@pytest.fixture(scope='session')
def kernel_device(quick_interpreter, boolean_masks) -> str:
    """Where the Triton kernels run in these tests; skipped where Triton cannot compile them."""
    pytest.importorskip('triton', minversion='3.3')
    return 'cpu' if os.environ['TRITON_INTERPRET'] == '1' else 'cuda'


@pytest.fixture
def on_kernel_device(kernel_device):
    """Makes tensors there unless a test says otherwise."""
    with torch.device(kernel_device):
        yield


@pytest.fixture
def drawn() -> dict:
    """The figures that the test saves, by the names of their files."""
    with saved_figures() as found:
        yield found
