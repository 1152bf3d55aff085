"""From a file on disk to a batch: reading an X-ray, transforms, sampling, seeding.

Stands under the command line too, so it imports nothing but NumPy, Pillow and torch at the top.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augmentation import Augmentation

if TYPE_CHECKING:
    from image_cache import ImageFile

# Bits that X-ray detectors and their converters store in a 16-bit file.
STORED_BITS = (8, 10, 12, 14, 16)
# What is opened; Pillow would hand other files to programs such as Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF tag; Pillow minds it in 8-bit files only


def read_xray(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the image in a file as (H, W) uint8, 0 = black, whatever its mode on disk.

    8-bit greyscale comes back as it is stored; RGB, palette and CMYK by ITU-R 601 luma; transparent parts
    on black; 16-bit and 32-bit integer greyscale scaled from the smallest of 8, 10, 12, 14, 16 bits that
    holds its maximum (a 12-bit detector's image in a 16-bit file would otherwise be almost black), floating
    point greyscale from its own minimum and maximum. EXIF orientation is applied.

    Raises FileNotFoundError for a missing file and ValueError for one that is no readable image.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    try:
        with Image.open(path, formats=FORMATS) as image:
            grey = _grey(ImageOps.exif_transpose(image))
            wide = image.mode.startswith(("I", "F"))
            inverted = wide and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
            return 255 - grey if inverted else grey
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: give a PNG, JPEG, TIFF or BMP") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read, is it damaged? ({error})") from None


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return _scaled_integers(np.asarray(image).astype(np.int64))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        return np.round((values - low) / max(high - low, np.finfo(float).tiny) * 255).astype(np.uint8)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("L")).copy()


def _scaled_integers(values: np.ndarray) -> np.ndarray:
    high = int(values.max())
    bits = next((bits for bits in STORED_BITS if high < 2**bits), None)
    full = 2**bits - 1 if bits else high
    return np.round(values.clip(min=0) * (255 / full)).astype(np.uint8)


@dataclass(frozen=True)
class Preprocessing:
    """What an X-ray goes through before a network sees it, in training and at inference alike.

    `lungs`, where given, returns an (H, W) uint8 X-ray with all but its lungs blackened (see
    `lung_masking.LungMasking`). Then the image is resized to a square of `image_size` pixels (bilinear,
    anti-aliased; the aspect is not kept, as in the published projects), repeated over three channels and
    normalised by `mean` and `std`, which are in units of the 0–1 range.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lungs: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def key(self) -> str:
        """What decoded and resized images depend on beside their files; `lungs` needs a `key` of its own."""
        return f"{self.image_size} px, lungs {'whole' if self.lungs is None else self.lungs.key}"

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Return the image in a file as a (1, S, S) uint8 tensor: what `resize` makes of `read_xray`'s."""
        return self.resize(read_xray(path))

    def resize(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image, or what `lungs` leaves of it, as a (1, S, S) uint8 tensor."""
        from torchvision.transforms.v2 import functional

        if self.lungs is not None:
            image = self.lungs(image)
        size = [self.image_size, self.image_size]
        return functional.resize(torch.from_numpy(image)[None], size, antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        """Return (…, 1, S, S) images of 0 to 255 as (…, 3, S, S) float32 on the same device, channels last in
        memory: convolutions are faster on that.
        """
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        return ((images / 255).movedim(-3, -1) - mean).div_(std).movedim(-1, -3)

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image as a network's input, (3, S, S) float32."""
        return self.normalise(self.resize(image))


def read_mask(path: str | os.PathLike[str], shape: tuple[int, int]) -> np.ndarray:
    """Return a mask file as (H, W) bool of the given shape: True where it is not black.

    A mask may have another size than its X-ray (in the COVID-19 Radiography Database 256 against 299).
    """
    return resized_mask(read_xray(path) > 0, shape)


def resized_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an (H, W) bool mask in another shape: True where it covers at least half of a pixel.

    Its outline stays where it was; by nearest neighbour it would move by up to half a pixel.
    """
    import cv2

    return cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5


def thumbnails(paths: Sequence[str], size: int = 32) -> np.ndarray:
    """Return (N, size, size) uint8 small versions of the X-rays, each pixel the mean of what it covers."""
    import cv2

    return np.stack(
        [cv2.resize(read_xray(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths]
    )


class XrayDataset(Dataset):
    """Images and targets by the batch: `dataset[rows]` is ((B, 1, S, S) uint8, targets) for B row numbers.

    `targets` are (N,) class indices, which come as (B,) int64, or (N, C) of 0 and 1, as (B, C) float32. Images come
    from `images`, resized already (`image_cache.ImageFile`); without it each file is decoded and resized, on all
    cores, when it is asked for, and kept in memory until `cache_bytes` are used.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        preprocessing: Preprocessing,
        *,
        images: ImageFile | None = None,
        cache_bytes: int = 1024**3,
    ) -> None:
        if len(paths) != len(targets):
            raise ValueError(f"{len(paths)} images but {len(targets)} labels")
        self.paths, self.preprocessing, self._file = list(paths), preprocessing, images
        values = torch.from_numpy(np.array(targets))
        self.targets = values.float() if values.ndim == 2 else values.long()
        self._kept: dict[int, Tensor] = {}
        self._most_kept = cache_bytes // preprocessing.image_size**2

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
            return torch.stack(list(pool.map(self._image, rows.tolist())))

    def _image(self, row: int) -> Tensor:
        image = self._kept.get(row)
        if image is None:
            image = self.preprocessing.read(self.paths[row])
            if len(self._kept) < self._most_kept:
                self._kept[row] = image
        return image


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


class Batches:
    """The batches of a dataset (its items are (images, targets) of given rows), in an order that is a function of
    `seed` and epoch alone, and so are the views of `augment`. So a training that was broken off can go on with the
    batch that would have been next, and several processes can each take their share of one and the same batch.

    Without a seed images keep their order. `weights` (N,) draw images with replacement, each in proportion to its
    own. `prepare` makes network inputs of images on their device. A last batch of a single image, or of fewer than
    there are processes, is left out of a shuffled epoch: batch normalisation cannot train on one.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int | None = None,
        weights: Tensor | None = None,
        augment: Augmentation | None = None,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
        num_workers: int = 0,
    ) -> None:
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.seed, self.weights, self.augment, self.prepare = seed, weights, augment, prepare

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
        sizes = self.sizes(share)
        places, own = 0, []
        for size in sizes:
            part = share.slice(size)
            own.append(slice(places + part.start, places + part.stop))
            places += size
        order = self.chosen(number)
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # the dataset makes batches itself, which is faster
            sampler=[order[rows] for rows in own[start:]],
            num_workers=self.num_workers,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # the global one is the network's: what a resumed epoch draws must not vary
        )
        for step, (images, targets) in enumerate(loader, start):
            rows = own[step]
            images, targets = (part.to(device, non_blocking=True) for part in (images, targets))
            if self.augment is not None:
                draws = self.augment.draw(sizes[step], derived_generator(self.seed, "views", number, step))
                images = self.augment(images, draws.rows(share.slice(sizes[step])))
            yield Batch(self.prepare(images), targets, rows)


def class_counts(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (C,) how often each class occurs. Raises ValueError where one does not occur at all."""
    counts = torch.bincount(torch.as_tensor(list(labels)), minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"no training image of class {int(counts.argmin())}: nothing to balance it with")
    return counts


def balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (N,) float64 weights with which a weighted draw takes each class equally often: 1 / the number of
    images of the image's class.
    """
    return 1.0 / class_counts(labels, num_classes)[torch.as_tensor(list(labels))].double()


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (C,) weights for a loss, N / (C · n_c): their mean over the images is 1 (King & Zeng 2001;
    scikit-learn's "balanced").
    """
    counts = class_counts(labels, num_classes)
    return (counts.sum() / (num_classes * counts)).float()


def label_weights(targets: np.ndarray) -> Tensor:
    """Return (2, C) weights for a multi-label loss over (N, C) of 0 and 1: row 0 for the negatives of each
    label, its share of positives; row 1 for its positives, its share of negatives.

    So both sides of every label weigh the same in sum (Rajpurkar et al. 2017, arXiv:1711.05225, section 2.1). A
    label that all or none of the images have weighs nothing on either side, in validation too.
    """
    share = torch.tensor(np.asarray(targets, dtype=np.float64)).mean(dim=0)
    return (torch.stack([share, 1 - share]) * (share * (1 - share) > 0)).float()


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
    num_workers: int = 0,
) -> dict[str, Batches]:
    """Return the batches of "train", "train_plain", "val" and "test": (b, 3, S, S) images with their targets.

    `rows` has the paths and the targets of each split, `images` their decoded images where there are any (see
    `XrayDataset`). "train" is augmented and either shuffled or drawn so that classes are equally frequent; the
    others keep their order and show images as at inference.
    """
    ready = images or dict.fromkeys(rows)
    sets = {
        split: XrayDataset(paths, targets, preprocessing, images=ready[split])
        for split, (paths, targets) in rows.items()
    }
    options = {"prepare": preprocessing.normalise, "num_workers": num_workers}
    train = sets["train"]
    weights = balanced_weights(train.targets.tolist(), num_classes) if oversample else None
    plain = {
        name: Batches(dataset, batch_size, **options)
        for name, dataset in (sets | {"train_plain": train}).items()
        if name != "train"
    }
    return plain | {
        "train": Batches(train, batch_size, seed=seed, weights=weights, augment=augment, **options)
    }


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath may still use the legacy generator
    torch.manual_seed(seed)


def derived_seed(seed: int, use: str, *numbers: int) -> int:
    """Return a seed for one use of random numbers, such as "order", at an epoch, a batch, …: unrelated ones for
    different uses, numbers and seeds.
    """
    # Of the text, in which no two of them look alike: sequences of numbers are padded with zeros.
    text = " ".join([str(seed), use, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def derived_generator(seed: int, use: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, use, *numbers))
