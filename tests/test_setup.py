"""What a build of the package has in it."""

import subprocess
import sys
from pathlib import Path

from tool import ROOT


def test_a_build_has_the_configs_and_nothing_of_an_older_one(tmp_path):
    package = tmp_path / 'mmubn'
    stale = [package / 'gone.py', package / '.mim/configs/gone.py']
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    build = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert not any(file.exists() for file in stale)
    built = {path.relative_to(package) for path in package.rglob('*.py')}
    modules = {p.relative_to(ROOT / 'mmubn') for p in (ROOT / 'mmubn').glob('[a-z]*/**/*.py')}
    assert modules <= built
    for folder in ('configs', 'tools'):
        files = {
            p.relative_to(ROOT) for p in (ROOT / folder).rglob('*.py') if 'build' not in p.parts
        }
        assert {Path('.mim') / file for file in files} <= built
    assert (package / '.mim/model-index.yml').is_file()
    assert list(package.glob('ops/cpp/*.cpp'))
    assert (package / 'py.typed').is_file()  # else type checkers take no annotation of ours
