"""The file that CondensationHook writes, kept apart from the tables of other trainings."""

import contextlib
import csv
import hashlib
import io
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any, Dict, List, Optional

from ..claim import claim
from ..runs import COLUMNS, TABLE, as_written, read_condensation


class CondensationTable:
    """Opens ``condensation.csv`` for one training and appends rows to it.

    Rows that the training does not go on from are kept: the old table then gets the name
    ``condensation_<time of its last change>.csv``. While one training writes the table,
    another in the same work directory writes ``condensation_<its own time stamp>.csv``.
    A kill at any byte leaves every row that was written before.

    Args:
        work_dir (Path): The work directory.
        stamp (str): The time stamp of the training.
        iteration (int): Where it goes on; 0 for a new one.
        digest (str): The ``digest`` of its table there; empty if its checkpoint has none,
            as those of older versions.

    Raises:
        ValueError: A training to be resumed finds a file that is no such table.

    Attributes:
        rows (list[dict]): Those up to ``iteration``, which the table begins with.
        notes (list[str]): What happened to the table of another training.
    """

    def __init__(self, work_dir: Path, stamp: str, iteration: int = 0, digest: str = '') -> None:
        self.rows: List[Dict[str, Any]] = []
        self.notes: List[str] = []
        path = work_dir / TABLE
        old: Optional[IO] = None
        if path.exists():
            old = path.open('a')
            if not claim(old):
                path = work_dir / f'condensation_{stamp}.csv'
                self.notes.append(
                    f'another training is writing {work_dir / TABLE}: condensation goes to {path}'
                )
            elif iteration:
                self._go_on_from(path, iteration, digest)
            elif path.read_text(errors='replace').strip() not in ('', ','.join(COLUMNS)):
                self.notes.append(f'{path} is of another training: kept as {_put_aside(path)}')
        # Replaced as a whole, under a lock that the new file has from its first moment on.
        partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
        self._file = partial.open('w', newline='')
        claim(self._file)
        self._hash = hashlib.sha256()
        csv.DictWriter(self._file, COLUMNS).writeheader()
        self.append(self.rows)
        os.replace(partial, path)
        if old is not None:
            old.close()

    def _go_on_from(self, path: Path, iteration: int, digest: str) -> None:
        found = read_condensation(path)
        source, self.rows, is_its_own = _own_table(path, found, iteration, digest)
        if digest and not is_its_own:
            self.notes.append(
                f'no table in {path.parent} has the rows that this training had written by '
                f'iteration {iteration}: it goes on from {source}, which comes nearest'
            )
        if source != path:
            self.notes.append(
                f'{path} is of another training: kept as {_put_aside(path)}; this one goes on '
                f'from {source}'
            )
        elif len(self.rows) < len(found):
            self.notes.append(
                f'{path} went beyond iteration {iteration}: kept as {_put_aside(path)}'
            )

    def append(self, rows: List[Dict[str, Any]]) -> None:
        """Writes rows at once; each whole one can be read should the rest be lost."""
        text = _text(rows)
        self._hash.update(text.encode())
        self._file.write(text)
        self._file.flush()

    @property
    def digest(self) -> str:
        """Of all rows so far: by it a checkpoint tells its table from those of others."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Ends the writing, and with it the claim on the file."""
        self._file.close()


def _text(rows: List[Dict[str, Any]]) -> str:
    text = io.StringIO(newline='')
    csv.DictWriter(text, COLUMNS).writerows(map(as_written, rows))
    return text.getvalue()


def _digest(rows: List[Dict[str, Any]]) -> str:
    return hashlib.sha256(_text(rows).encode()).hexdigest()


def _own_table(path: Path, found: List[Dict[str, Any]], iteration: int, digest: str) -> tuple:
    """The table of the training that goes on, its rows up to there, and whether the digest fits.

    A training that was started anew in the work directory, and broken off before its first
    checkpoint, has put aside the table of the one that is resumed now. Where no table has the
    digest, since it is not known or a crash took rows, the one that came nearest is taken.
    """
    tables = {path: found}
    for aside in sorted(path.parent.glob(f'{path.stem}_*.csv')):
        with contextlib.suppress(ValueError):
            tables[aside] = read_condensation(aside)
    kept = {
        table: [row for row in rows if row['iter'] <= iteration] for table, rows in tables.items()
    }
    for table, rows in kept.items():
        # A record of the end of an epoch comes after a checkpoint of its last iteration.
        before = [row for row in rows if row['iter'] < iteration]
        if digest in (_digest(rows), _digest(before)):
            return table, rows, True
    nearest = max(kept, key=lambda table: max((row['iter'] for row in kept[table]), default=-1))
    return nearest, kept[nearest], False


def _put_aside(path: Path) -> Path:
    """Gives a table a second name, by the time of its last change, and returns that."""
    stamp = time.strftime('%Y%m%d_%H%M%S', time.localtime(path.stat().st_mtime))
    aside = path.with_name(f'condensation_{stamp}.csv')
    while aside.exists():
        aside = aside.with_name(f'{aside.stem}_.csv')
    try:
        os.link(path, aside)
    except OSError:  # a file system without links
        shutil.copy2(path, aside)
    return aside
