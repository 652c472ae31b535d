"""Packaging. ``pip install .`` needs torch alone; ``pip install '.[mm]'`` adds the tested line."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION: dict = {}
exec((ROOT / 'mmubn' / 'version.py').read_text(), VERSION)


class BuildWithConfigs(build_py):
    """Ships configs/, tools/ and model-index.yml as mmubn/.mim, where `mim` and mmengine look.

    A checkout has links there, for whoever imports the package from it: by an editable
    installation, PYTHONPATH, or tools/dist_train.sh.
    """

    def run(self):
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / 'mmubn'
        shutil.rmtree(package, ignore_errors=True)  # what an older build left goes into no wheel
        super().run()
        target = package / '.mim'
        target.mkdir(exist_ok=True)
        for name in ('configs', 'tools', 'model-index.yml'):
            source = ROOT / name
            if source.is_file():
                shutil.copy(source, target / name)
            else:
                ignore = shutil.ignore_patterns('__pycache__', 'build', '*.egg-info')
                shutil.copytree(source, target / name, dirs_exist_ok=True, ignore=ignore)


setup(
    name='mmubn',
    version=VERSION['__version__'],
    description='Unified Batch Normalization for MMDetection, MMPretrain and plain PyTorch',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.11',  # the one that is tested most
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    keywords='batch normalization, PyTorch, MMDetection, MMPretrain, OpenMMLab',
    packages=find_packages(include=['mmubn', 'mmubn.*']),
    package_data={'mmubn': ['py.typed'], 'mmubn.ops': ['cpp/*'], 'mmubn.reproduce': ['*.csv']},
    install_requires=['torch>=2.1'],
    extras_require={
        # The line of OpenMMLab packages that this project is tested with. The upstream
        # packages share its import names and serve as well, so none is a requirement. pip builds
        # mmcv without operators here: tools/mmcv_ops brings them, or mmcv is compiled.
        'mm': [
            'onedl-mmengine>=0.10.12',
            'onedl-mmcv>=2.3.6',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmpretrain>=1.3.6',
            'pycocotools>=2.0.11',
        ],
        'test': [
            'pytest',
            'pytest-xdist',
            'hypothesis',
            'ruff',
            'timm',
            'onnx',
            'onnxscript',
            'onnxruntime',
            'openvino',
        ],
    },
    cmdclass={'build_py': BuildWithConfigs},
)
