"""Batches of X-rays: decoded and augmented, in an order that depends only on the seed and the epoch."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from training.augmentation import Augmentation
from training.image_cache import ImageFile
from utils import Preprocessing, derived_generator


class XrayDataset(Dataset):
    """Images and targets: `dataset[rows]` is ((B, 1, S, S) uint8, targets) for (B,) row numbers.

    Args:
        paths: N image files.
        targets: (N,) class indices, returned as (B,) int64; or (N, C) of 0 and 1, returned as (B, C) float32.
        preprocessing: how an image is read and resized.
        images: the resized images; None reads the files again for every batch, on all cores.
    """

    def __init__(
        self, paths: Sequence[str], targets: ArrayLike, preprocessing: Preprocessing, *, images: ImageFile | None = None
    ) -> None:
        self.paths, self.preprocessing, self._file = list(paths), preprocessing, images
        values = torch.from_numpy(np.array(targets))
        self.targets = values.float() if values.ndim == 2 else values.long()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(rows), self.targets[rows]

    def images(self, rows: Tensor) -> Tensor:
        """Return (B, 1, S, S) uint8, the images before augmentation and normalisation."""
        if self._file is not None:
            return self._file.images(rows)
        size, paths = self.preprocessing.image_size, [self.paths[row] for row in rows.tolist()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            images = list(pool.map(self.preprocessing.read, paths))
        return torch.stack(images) if images else torch.empty(0, 1, size, size, dtype=torch.uint8)


class Share(NamedTuple):
    """The part of every batch that this process computes: number `index` (from 0) of `of` parts."""

    index: int = 0
    of: int = 1

    def slice(self, number: int) -> slice:
        """Return this process's rows in a batch of `number` images; shares differ by at most one row."""
        each, more = divmod(number, self.of)
        start = self.index * each + min(self.index, more)
        return slice(start, start + each + (self.index < more))


WHOLE = Share()


class Batch(NamedTuple):
    """A process's share of a batch, on the process's device.

    Attributes:
        images: (b, 3, S, S) float32, b ≥ 0; or (b, D) features.
        targets: (b,) or (b, …).
        rows: the positions of the images in the order of the epoch.
    """

    images: Tensor
    targets: Tensor
    rows: slice


@dataclass(eq=False)
class Batches:
    """The batches of a dataset. Their order and the views of their images depend only on the seed and the epoch.

    Therefore an interrupted training continues with the next batch, and several processes share the same batches. A
    shuffled epoch leaves out its last batch, unless it is the only one, in two cases: it has one image (batch
    normalisation cannot train on that), or it has fewer images than there are processes.

    Attributes:
        dataset: `dataset[rows]` is (images, targets) for (B,) row numbers.
        batch_size: images per batch, over all processes.
        seed: the seed of the order and the views; None keeps the order of the dataset.
        weights: (N,) weights for drawing images with replacement; None shows each image once.
        augment: makes random views of the images; None makes none.
        prepare: turns images into network inputs, on their device.
    """

    dataset: Dataset
    batch_size: int
    _: KW_ONLY
    seed: int | None = None
    weights: Tensor | None = None
    augment: Augmentation | None = None
    prepare: Callable[[Tensor], Tensor] = lambda images: images

    def sizes(self, share: Share = WHOLE) -> list[int]:
        """Return the number of images in each batch of an epoch, over all processes."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        left_out = self.seed is not None and whole and rest < max(2, share.of)
        return [self.batch_size] * whole + ([] if left_out or not rest else [rest])

    def chosen(self, epoch: int) -> Tensor:
        """Return (N,) row numbers of the dataset in the order of an epoch."""
        number = len(self.dataset)
        if self.seed is None:
            return torch.arange(number)
        generator = derived_generator(self.seed, "order", epoch)
        if self.weights is None:
            return torch.randperm(number, generator=generator)
        return torch.multinomial(self.weights, number, replacement=True, generator=generator)

    def epoch(
        self, number: int = 0, *, start: int = 0, device: torch.device | str = "cpu", share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yield a process's share of the batches of an epoch, from the `start`-th batch on."""
        order, on_gpu = self.chosen(number), torch.device(device).type == "cuda"
        for step, size in enumerate(self.sizes(share)[start:], start):
            part, first = share.slice(size), step * self.batch_size
            rows = slice(first + part.start, first + part.stop)
            tensors = (tensor.pin_memory() if on_gpu else tensor for tensor in self.dataset[order[rows]])
            images, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
            if self.augment is not None:
                draws = self.augment.draw(size, derived_generator(self.seed, "views", number, step))
                images = self.augment(images, draws.rows(part))
            yield Batch(self.prepare(images), targets, rows)
