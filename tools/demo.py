"""Sums up a run of `make demo`: held-out AP, training time, condensation of each norm layer."""

import argparse
import json
from pathlib import Path
from typing import Optional, Sequence

from mmubn.cli.errors import CommandError, command
from mmubn.demo import condensation, held_out_ap, training_time
from mmubn.runs import read_condensation


@command
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads the work dir and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='--work-dir of the training')
    work_dir = parser.parse_args(argv).work_dir
    tests = sorted((work_dir / 'test').glob('*/*.json'))
    if not tests:
        raise CommandError(f'{work_dir / "test"}: no evaluation; run `make demo` first')
    try:
        print(f'\nDemo in {work_dir}: {training_time(work_dir)}')
        print(held_out_ap(json.loads(tests[-1].read_text())))
        print(condensation(read_condensation(work_dir)))
    except (OSError, ValueError) as error:
        raise CommandError(f'{work_dir}: {error}: run `make demo` again') from error
    print(f'Drawn on held-out images (left truth, right prediction): {work_dir / "predictions"}')


if __name__ == '__main__':
    main()
