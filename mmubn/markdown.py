"""Tables in Markdown."""

from typing import Iterable, List, Sequence


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> List[str]:
    """The lines of a table: its header, the rule below it, and its rows."""
    lines = [f'| {" | ".join(map(str, cells))} |' for cells in (header, *rows)]
    return [lines[0], '|---' * len(header) + '|', *lines[1:]]
