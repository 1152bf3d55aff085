"""Batches of X-rays: decoded, augmented, weighted, in an order that the seed and the epoch alone decide."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augmentation import Augmentation
from image_cache import ImageFile
from utils import Preprocessing, balanced_weights, derived_generator


class XrayDataset(Dataset):
    """Images and targets by the batch: `dataset[rows]` is ((B, 1, S, S) uint8, targets) for B row numbers.

    `targets` are (N,) class indices, which come as (B,) int64, or (N, C) of 0 and 1, as (B, C) float32. Images come
    from `images`, resized already (`image_cache.ImageFile`); without it each file is decoded and resized, on all
    cores, whenever it is asked for.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        preprocessing: Preprocessing,
        *,
        images: ImageFile | None = None,
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
        if not len(rows):  # of a last batch, one of several processes may have none
            size = self.preprocessing.image_size
            return torch.empty(0, 1, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = [self.paths[row] for row in rows.tolist()]
            return torch.stack(list(pool.map(self.preprocessing.read, paths)))


class Share(NamedTuple):
    """Which part of every batch is this process's: the `index`-th (from 0) of `of`."""

    index: int = 0
    of: int = 1

    def slice(self, number: int) -> slice:
        """Return the rows of a batch of `number` that are this process's; shares differ by one row at most."""
        each, more = divmod(number, self.of)
        start = self.index * each + min(self.index, more)
        return slice(start, start + each + (self.index < more))


WHOLE = Share()


class Batch(NamedTuple):
    """A process's share of a batch on its device: `images` (b, 3, S, S) float32 in channels-last order, their
    `targets`, and their places `rows` among all images of the epoch.
    """

    images: Tensor
    targets: Tensor
    rows: slice


@dataclass(eq=False)
class Batches:
    """The batches of a dataset (its items are (images, targets) of given rows), in an order that is a function of
    `seed` and epoch alone, and so are the views of `augment`. So a training that was broken off can go on with the
    batch that would have been next, and several processes can each take their share of one and the same batch.

    Without a seed images keep their order. `weights` (N,) draw images with replacement, each in proportion to its
    own. `prepare` makes network inputs of images on their device. A last batch of a single image, or of fewer than
    there are processes, is left out of a shuffled epoch: batch normalisation cannot train on one.
    """

    dataset: Dataset
    batch_size: int
    _: KW_ONLY
    seed: int | None = None
    weights: Tensor | None = None
    augment: Augmentation | None = None
    prepare: Callable[[Tensor], Tensor] = lambda images: images

    def sizes(self, share: Share = WHOLE) -> list[int]:
        """Return how many images each batch of an epoch has, over all processes."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        left_out = self.seed is not None and whole and rest < max(2, share.of)
        return [self.batch_size] * whole + ([] if left_out or not rest else [rest])

    def chosen(self, epoch: int) -> Tensor:
        """Return (N,) which image stands at each place of an epoch."""
        number = len(self.dataset)
        if self.seed is None:
            return torch.arange(number)
        generator = derived_generator(self.seed, "order", epoch)
        if self.weights is None:
            return torch.randperm(number, generator=generator)
        return torch.multinomial(self.weights, number, replacement=True, generator=generator)

    def epoch(
        self,
        number: int = 0,
        *,
        start: int = 0,
        device: torch.device | str = "cpu",
        share: Share = WHOLE,
    ) -> Iterator[Batch]:
        """Yield a process's share of the batches of an epoch, from the `start`-th batch on."""
        sizes, order = self.sizes(share), self.chosen(number)
        parts = [(share.slice(size), end - size) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        rows = [slice(first + part.start, first + part.stop) for part, first in parts]
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # the dataset makes batches itself, which is faster
            sampler=[order[places] for places in rows[start:]],
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # the global one is the network's: what a resumed epoch draws must not vary
        )
        for step, (images, targets) in enumerate(loader, start):
            images, targets = (part.to(device, non_blocking=True) for part in (images, targets))
            if self.augment is not None:
                draws = self.augment.draw(sizes[step], derived_generator(self.seed, "views", number, step))
                images = self.augment(images, draws.rows(parts[step][0]))
            yield Batch(self.prepare(images), targets, rows[step])


def make_batches(
    rows: Mapping[str, tuple[Sequence[str], Sequence[int] | np.ndarray]],
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    augment: Augmentation | None,
    oversample: bool,
    seed: int,
    images: Mapping[str, ImageFile] | None = None,
) -> dict[str, Batches]:
    """Return the batches of "train", "train_plain", "val" and "test": (b, 3, S, S) images with their targets.

    `rows` has the paths and the targets of each split, `images` their decoded images where there are any (see
    `XrayDataset`). "train" is augmented and either shuffled or drawn so that classes are equally frequent; the
    others keep their order and show images as at inference.
    """
    sets = {
        split: XrayDataset(paths, targets, preprocessing, images=images and images[split])
        for split, (paths, targets) in rows.items()
    }
    sets["train_plain"] = train = sets.pop("train")
    weights = balanced_weights(train.targets.tolist(), num_classes) if oversample else None
    plain = {
        name: Batches(dataset, batch_size, prepare=preprocessing.normalise) for name, dataset in sets.items()
    }
    return plain | {"train": replace(plain["train_plain"], seed=seed, weights=weights, augment=augment)}
