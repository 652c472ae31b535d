"""Checks that class folders hold images, and are numbered alike in every split."""

import errno
import os
import os.path as osp
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from mmengine.fileio import list_from_file

from ..datasets.class_folders import class_folders, foreign_folders, is_foreign
from .errors import CommandError, listed, warn
from .lookup import did_you_mean

# Files that are asked for more than their names: of a million on a network it takes minutes.
_MOST_ASKED = 100_000


class Folders(NamedTuple):
    """A data set whose classes are the folders in ``root``, and where the config names it."""

    path: str
    root: str
    names: List[str]


class Numbered(NamedTuple):
    """The labels that images have by their folder, and the folder or file that says so."""

    path: str
    place: str
    labels: Dict[str, int]


def read_folders(path: str, node: dict, dataset: Any) -> Optional[Folders]:
    """The class folders of a data set of mmpretrain's ``CustomDataset``.

    Args:
        path (str): Where the data set stands in the config.
        node (dict): What stands there.
        dataset (CustomDataset): The data set, not yet loaded.

    Returns:
        Folders: None where its labels come from an annotation file, or it has none.

    Raises:
        CommandError: A folder would be taken for a class that is none, a link leads to itself,
            or ``classes`` does not fit the folders.
    """
    root = dataset.img_prefix
    if not dataset.with_label or dataset.ann_file:
        return None
    if not osp.isdir(root):
        raise CommandError(f'{path}: no folder {root}; it must hold a folder for each class')
    for name in os.listdir(root):
        _check_link(path, osp.join(root, name))
    foreign = foreign_folders(root)
    if foreign and not skips_foreign(type(dataset)):
        raise CommandError(
            f'{path}: {node["type"]} takes the folder {osp.join(root, foreign[0])} for a class, '
            'and numbers all later classes wrongly; delete it'
        )
    names = class_folders(root)
    if not names:
        raise CommandError(f'{path}: no class folders in {root}; it must hold one for each class')
    classes = dataset.metainfo.get('classes')
    if classes is not None:
        _check_named(path, root, names, list(classes))
    return Folders(path, root, names)


def skips_foreign(kind: type) -> bool:
    """Whether it is CachedImageFolder, which is not imported for this: mmpretrain would be too."""
    return any(base.__name__ == 'CachedImageFolder' for base in kind.__mro__)


def _check_named(path: str, root: str, names: List[str], classes: List[str]) -> None:
    if len(classes) != len(names):
        raise CommandError(
            f'{path}: {root} has {len(names)} class folders, {listed(names)}, and the config names '
            f'{len(classes)} classes, {listed(classes)}; give metainfo=dict(classes=...) the names '
            'of the folders, in their order'
        )
    shifted = first_shift(classes, names)
    if shifted is not None:
        raise CommandError(
            f"{path}.metainfo.classes: '{shifted}' is class {classes.index(shifted)} here, and its "
            f'folder in {root} is class {names.index(shifted)}: folders are numbered in the order '
            'of their names; write the classes in this order, or leave them out'
        )


def first_shift(names: Sequence[str], others: Sequence[str]) -> Optional[str]:
    """The first name that stands in both, at another place."""
    places = {name: place for place, name in enumerate(others)}
    return next((n for place, n in enumerate(names) if places.get(n, place) != place), None)


def check_alike(found: Sequence[Folders]) -> None:
    """Compares the class folders of the splits; the first is the one that counts.

    Raises:
        CommandError: They differ.
    """
    for other in found[1:]:
        first = found[0]
        if other.names == first.names:
            continue
        lacking = [name for name in first.names if name not in other.names]
        more = [name for name in other.names if name not in first.names]
        parts = [f'{other.root} lacks {listed(lacking)}'] if lacking else []
        parts += [f'{"and" if lacking else other.root} also has {listed(more)}'] if more else []
        near = did_you_mean(more[0], lacking) if more and lacking else ''
        raise CommandError(
            f'{other.path}: the class folders are not those of {first.path} ({first.root}): '
            f'{" ".join(parts)}{near}; every split numbers its own folders, so that the labels '
            'would be shifted: give both the same folders, an empty one where a class has no image'
        )


def check_images(folders: Folders, dataset: Any) -> int:
    """Looks for images in the class folders. A folder may be empty, as long as not all are.

    Of what is not read there is a line on stderr: files beside images, and folders with
    images that count as those of a program.

    Args:
        folders (Folders): The class folders of a data set.
        dataset (CustomDataset): The data set.

    Returns:
        int: The number of images, before ``indices`` takes some of them.

    Raises:
        CommandError: A folder has files and no image, all are empty, an image has no bytes or is
            a link to nothing, a link leads back, a folder cannot be opened, or images would be
            read that a program left there.
    """
    number, suffixes = 0, tuple(sorted(dataset.extensions))
    readable = f'the suffixes that are read are {", ".join(suffixes)}'
    unread, example = 0, ''
    skips = skips_foreign(type(dataset))
    for name in folders.names:
        place, before, others = osp.join(folders.root, name), number, []
        for file, foreign in _files(folders.path, place, skips):
            if not file.lower().endswith(suffixes):
                _check_link(folders.path, file)
                others += [] if foreign else [file]
                continue
            if foreign:
                raise CommandError(
                    f'{folders.path}: {type(dataset).__name__} reads {file} as an image of '
                    f"'{name}'; delete the folder {osp.dirname(file)}"
                )
            number += 1
            if number <= _MOST_ASKED:
                _check_image(folders.path, file)
        if number == before and others:
            raise CommandError(
                f'{folders.path}: no file in {place} is read, such as {others[0]}; {readable}'
            )
        if others:
            unread, example = unread + len(others), example or others[0]
    if not number:
        raise CommandError(
            f'{folders.path}: no image in any of the class folders in {folders.root}; {readable}'
        )
    if unread:
        warn(
            f'{folders.path}: {unread} files in the class folders of {folders.root} are not read, '
            f'such as {example}; {readable}: set {folders.path}.extensions where others are images'
        )
    if skips:
        _tell_skipped(folders, suffixes)
    return number


def _check_image(path: str, file: str) -> None:
    if not osp.isfile(file):
        raise CommandError(
            f'{path}: {file} is no file that can be read, such as a link to nothing, so it would '
            'be left out without a word; put the file there, or delete it'
        )
    if osp.getsize(file) == 0:
        raise CommandError(f'{path}: {file} is empty; copy it anew, or delete it')


def _tell_skipped(folders: Folders, suffixes: Tuple[str, ...]) -> None:
    """Warns of folders that are no classes by their names, and hold images."""
    skipped = [
        name
        for name in foreign_folders(folders.root)
        if _holds_images(osp.join(folders.root, name), suffixes)
    ]
    if skipped:
        warn(
            f'{folders.path}: the folders {listed(skipped)} in {folders.root} hold images and are '
            'no classes, since programs make folders with such names; rename a folder that is a '
            'class'
        )


def _holds_images(folder: str, suffixes: Tuple[str, ...]) -> bool:
    try:
        files = _files('', folder, skip_foreign=True)
        return any(file.lower().endswith(suffixes) for file, _ in files)
    except CommandError:  # what is skipped may have links of any kind
        return False


def _files(path: str, folder: str, skip_foreign: bool) -> Iterator[Tuple[str, bool]]:
    """The files that are not hidden, and whether they lie in a folder that a program made.

    Raises:
        CommandError: A folder lies in itself by a link, which mmengine follows until the system
            stops it; or one cannot be opened.
    """

    def refuse(error: OSError) -> None:
        raise CommandError(
            f'{path}: {error.filename} cannot be opened ({error.strerror}); let it be read, or '
            'remove it'
        ) from error

    above: Dict[str, Tuple[str, ...]] = {}  # the real folders that lead to each
    for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        before, real = above.get(osp.dirname(place), ()), osp.realpath(place)
        if real in before:
            _refuse_link(path, place)
        above[place] = (*before, real)
        if skip_foreign:
            inner[:] = [name for name in inner if not is_foreign(name)]
        # Told once for each folder: there may be millions of files.
        foreign = place != folder and any(map(is_foreign, osp.relpath(place, folder).split(os.sep)))
        for name in names:
            if not name.startswith('.'):
                yield osp.join(place, name), foreign


def _check_link(path: str, file: str) -> None:
    """Refuses a link that leads to itself, at which mmengine ends. One to nothing it leaves out."""
    if osp.islink(file):
        try:
            os.stat(file)
        except OSError as error:
            if error.errno == errno.ELOOP:
                _refuse_link(path, file)


def _refuse_link(path: str, place: str) -> None:
    while not osp.islink(place):
        place = osp.dirname(place)
    raise CommandError(
        f'{path}: {place} is a link that leads back to itself or to a folder that it lies in; '
        'delete it'
    )


def read_labels(path: str, dataset: Any) -> Dict[str, int]:
    """The label of each file in the annotation file of a data set.

    Raises:
        CommandError: A line is not ``FILE LABEL``, or a file is missing.
    """
    labels: Dict[str, int] = {}
    key, file = f'{path}.ann_file', dataset.ann_file
    for number, line in enumerate(lines_of(key, file), 1):
        name, _, label = line.strip().rpartition(' ')
        if not name or not label.isdecimal():
            raise CommandError(
                f'{key}: line {number} of {file} is {line.strip()!r}, not FILE LABEL with a '
                'number from 0 on'
            )
        labels[name] = int(label)
    if not labels:
        raise CommandError(f'{key}: {file} is empty')
    missing = missing_files(dataset.img_prefix, labels)
    if missing:
        raise CommandError(
            f'{path}.data_prefix: {dataset.img_prefix} has no {missing[0]}; {len(missing)} of '
            f'{len(labels)} images of {file} are missing'
        )
    classes = dataset.metainfo.get('classes')
    top = max(labels, key=labels.get)
    if classes is not None and labels[top] >= len(classes):
        raise CommandError(
            f'{key}: {file} labels {top} {labels[top]}, and metainfo has {len(classes)} classes, '
            f'0 to {len(classes) - 1}; number the labels from 0, or name all classes'
        )
    return labels


def missing_files(prefix: str, names: Iterable[str]) -> List[str]:
    """Those of ``names`` that are no files in ``prefix``.

    Each folder is listed once. A link that leads to no file is none.
    """
    there: Dict[str, Dict[str, bool]] = {}
    missing, links = [], 0
    for name in names:
        path = osp.join(prefix, name)
        folder, base = osp.split(path)
        if folder not in there:
            there[folder] = _entries(folder or '.')
        is_link = there[folder].get(base)
        links += bool(is_link)
        if is_link is None or (is_link and links <= _MOST_ASKED and not osp.isfile(path)):
            missing.append(name)
    return missing


def _entries(folder: str) -> Dict[str, bool]:
    """Whether each entry of a folder is a link; nothing where there is no folder."""
    if not osp.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_symlink() for entry in entries}


def lines_of(key: str, file: str) -> List[str]:
    """The lines of a text file, as mmengine reads them.

    Raises:
        CommandError: It is not written in UTF-8.
    """
    try:
        return list_from_file(file)
    except UnicodeDecodeError as error:
        raise CommandError(f'{key}: {file} is no UTF-8 ({error}); save it as that') from error


def labels_of_folders(labels: Dict[str, int]) -> Dict[str, int]:
    """Of the labels of files, those of folders whose files all have one."""
    found: Dict[str, Set[int]] = {}
    for file, label in labels.items():
        found.setdefault(osp.basename(osp.dirname(file)), set()).add(label)
    return {name: min(own) for name, own in found.items() if name and len(own) == 1}


def check_numbers(found: Sequence[Numbered]) -> None:
    """Compares the labels of folders of one name.

    Raises:
        CommandError: They differ.
    """
    known: Dict[str, Tuple[int, str]] = {}
    for data in found:
        for name, label in data.labels.items():
            other, place = known.setdefault(name, (label, data.place))
            if other != label:
                raise CommandError(
                    f"{data.path}: '{name}' is class {label} by {data.place}, and class {other} by "
                    f'{place}; number the classes alike in every split (folders are numbered from '
                    '0 in the order of their names)'
                )
