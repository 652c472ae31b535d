"""Images in class folders, decoded once."""

import os
import pickle
import random
from typing import Iterator, List, Tuple

import cv2
import mmcv
import numpy as np
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.custom import get_samples
from tqdm import tqdm

from .class_folders import class_folders, is_foreign


class CachedImageFolder(CustomDataset):
    """Images in class folders that stand decoded in memory, as CIFAR's archives do.

    Samples have ``img``, uint8 (H, W, 3) in RGB, beside ``img_path`` and ``gt_label``, so
    pipelines are those of mmpretrain's CIFAR datasets: without ``LoadImageFromFile``, and
    with a data preprocessor whose ``to_rgb`` is off. Classes are numbered in the order of
    their names, which is CIFAR's. Hidden folders, ``__MACOSX`` and their like are no classes
    (:mod:`~mmubn.datasets.class_folders`). The samples come in a shuffled order, always the
    same, so that the first ones (``indices=N``) are of all classes, as they are in the
    archives. Only these are decoded.

    Workers that are forked share the memory; each process of a distributed run has its
    own.

    Args:
        extensions (Sequence[str]): Of the image files. Default: as ``CustomDataset``,
            and ``.tiff``, ``.jfif`` and WebP.
        max_gib (float): What the decoded images may take, in GiB. Reading them takes no more
            than that, and less than 1 KiB for each image's path and label. Default: 4.
        **kwargs: Those of mmpretrain's ``CustomDataset``.

    Raises:
        MemoryError: The images take more than ``max_gib``.
        ValueError: A file cannot be decoded, ``classes`` are not as many as the folders, or
            there is no image.
    """

    def __init__(
        self,
        *args,
        extensions=(
            *('.jpg', '.jpeg', '.jfif', '.png', '.webp'),
            *('.tif', '.tiff', '.bmp', '.ppm', '.pgm'),
        ),
        max_gib: float = 4.0,
        **kwargs,
    ) -> None:
        self.max_gib = max_gib
        super().__init__(*args, extensions=extensions, **kwargs)

    def load_data_list(self) -> List[dict]:
        """Paths and labels of all images, shuffled."""
        data_list = super().load_data_list()
        random.Random(0).shuffle(data_list)
        return data_list

    def _find_samples(self) -> list:
        # As mmpretrain's, which takes every folder for a class.
        if not self.with_label:
            return super()._find_samples()
        classes = class_folders(self.img_prefix)
        self.folder_to_idx = {name: index for index, name in enumerate(classes)}
        samples, empty = get_samples(self.img_prefix, self.folder_to_idx, self.is_valid_file)
        if self.CLASSES is None:
            self._metainfo['classes'] = tuple(classes)
        elif len(self.CLASSES) != len(classes):
            raise ValueError(
                f'{self.img_prefix} has {len(classes)} class folders, and classes names '
                f'{len(self.CLASSES)}'
            )
        if not samples:
            raise ValueError(
                f'no image in the class folders of {self.img_prefix}; images end with '
                f'{", ".join(sorted(self.extensions))}'
            )
        if empty:
            logger = MMLogger.get_current_instance()
            logger.warning(f'no image in {self.img_prefix} of {", ".join(sorted(empty))}')
        return samples

    def is_valid_file(self, filename: str) -> bool:
        """Whether it is an image, and not in a hidden folder."""
        folders = os.path.dirname(filename).split(os.sep)
        return super().is_valid_file(filename) and not any(map(is_foreign, folders))

    def full_init(self) -> None:
        """Finds the images, takes the ``indices`` of them and decodes these."""
        if self._fully_initialized:
            return
        super().full_init()  # if it serialises, it decodes
        if not self.serialize_data:
            self._fully_initialized = False  # as long as an image may be broken
            self.data_list = list(self._decoded())
            self._fully_initialized = True

    def _serialize_data(self) -> Tuple[np.ndarray, np.ndarray]:
        """As mmengine's, but with one image at a time beside the bytes of all.

        Returns:
            tuple[ndarray, ndarray]: The bytes of all samples, uint8, and where each ends, int64.
        """
        packed, ends = bytearray(), []  # it grows in place: what is spare takes no memory
        for info in self._decoded():
            packed += pickle.dumps(info, protocol=4)
            ends.append(len(packed))
        self.data_list.clear()
        return np.frombuffer(packed, np.uint8), np.asarray(ends, np.int64)

    def _decoded(self) -> Iterator[dict]:
        """The samples with their images, one after another."""
        used = 0
        progress = tqdm(
            self.data_list,
            desc=f'decoding {self.img_prefix}',
            mininterval=1,
            disable=not is_main_process(),
        )
        for info in progress:
            try:
                image = mmcv.imread(info['img_path'], channel_order='rgb')
            except cv2.error as error:
                raise ValueError(f'{info["img_path"]} is not a whole image') from error
            used += image.nbytes
            if used > self.max_gib * 2**30:
                raise MemoryError(
                    f'the images in {self.img_prefix} take more than {self.max_gib} GiB decoded: '
                    "raise max_gib, or use type='CustomDataset' with LoadImageFromFile first in "
                    'its pipeline'
                )
            yield {**info, 'img': image}
