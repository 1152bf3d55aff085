"""Batches of X-rays: decoded, augmented and weighted, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.augmentation import Augmentation
from training.image_cache import ImageFile
from utils import Preprocessing, balanced_weights, derived_generator


class XrayDataset(Dataset):
    """Images and targets by the batch: `dataset[rows]` is ((B, 1, S, S) uint8, targets) for (B,) row numbers.

    Args:
        paths: N image files.
        targets: (N,) class indices, which come as (B,) int64; or (N, C) of 0 and 1, which come as (B, C) float32.
        preprocessing: how an image is read and resized.
        images: the resized images; without them each file is read whenever a batch needs it, on all cores.
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
        if not len(rows):  # a process may have no image of a last batch
            size = self.preprocessing.image_size
            return torch.empty(0, 1, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            paths = [self.paths[row] for row in rows.tolist()]
            return torch.stack(list(pool.map(self.preprocessing.read, paths)))


class Share(NamedTuple):
    """Which part of every batch this process computes: part `index` (from 0) of `of` parts."""

    index: int = 0
    of: int = 1

    def slice(self, number: int) -> slice:
        """Return this process's rows of a batch of `number`. Shares differ by one row at most."""
        each, more = divmod(number, self.of)
        start = self.index * each + min(self.index, more)
        return slice(start, start + each + (self.index < more))


WHOLE = Share()


class Batch(NamedTuple):
    """A process's share of a batch, on the process's device.

    Attributes:
        images: (b, 3, S, S) float32, channels last in memory, b ≥ 0.
        targets: (b,) or (b, …).
        rows: the places of the images among all images of the epoch.
    """

    images: Tensor
    targets: Tensor
    rows: slice


@dataclass(eq=False)
class Batches:
    """The batches of a dataset. Their order and the views of their images depend on the seed and the epoch alone.

    Therefore a training that was broken off goes on with the batch that would have been next, and each of several
    processes takes its share of the same batch. A shuffled epoch leaves out a last batch of a single image, or of
    fewer images than there are processes, because batch normalisation cannot train on a single image.

    Attributes:
        dataset: `dataset[rows]` is (images, targets) for (B,) row numbers.
        batch_size: images a batch, over all processes.
        seed: what the order and the views are drawn from; None keeps the order of the dataset.
        weights: (N,) weights by which images are drawn with replacement; None shows each image once.
        augment: what makes random views of the images, None for none.
        prepare: what makes network inputs of the images, on their device.
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
        """Return (N,) the image at each place of an epoch."""
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
    """Return the batches of "train", "train_plain", "val" and "test".

    "train" is augmented and shuffled. The others keep the order of their images and show them as at inference;
    "train_plain" has the training images.

    Args:
        rows: the paths and the targets of "train", "val" and "test", see `XrayDataset`.
        preprocessing: how images are read, resized and normalised.
        num_classes: how many classes the targets have.
        batch_size: images a batch, over all processes.
        augment: what makes random views of the training images.
        oversample: whether training images are drawn so that classes are equally frequent.
        seed: what the order and the views are drawn from.
        images: the resized images of each split, None to read the files in every epoch.
    """
    sets = {
        split: XrayDataset(paths, targets, preprocessing, images=images and images[split])
        for split, (paths, targets) in rows.items()
    }
    sets["train_plain"] = train = sets.pop("train")
    weights = balanced_weights(train.targets.tolist(), num_classes) if oversample else None
    plain = {name: Batches(dataset, batch_size, prepare=preprocessing.normalise) for name, dataset in sets.items()}
    return plain | {"train": replace(plain["train_plain"], seed=seed, weights=weights, augment=augment)}
