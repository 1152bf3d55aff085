"""From a file on disk to a batch: reading an X-ray, transforms, sampling, seeding.

Stands under the command line too, so it imports nothing but NumPy, Pillow and torch at the top.
"""

import copy
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

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

    The image is resized to a square of `image_size` pixels (bilinear, anti-aliased; the aspect is not kept,
    as in the published projects), repeated over three channels and normalised by `mean` and `std`, which
    are in units of the 0–1 range.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def resize(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image as a (1, S, S) uint8 tensor."""
        from torchvision.transforms.v2 import functional

        size = [self.image_size, self.image_size]
        return functional.resize(torch.from_numpy(image)[None], size, antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        """Return (…, 1, S, S) uint8 images as (…, 3, S, S) float32 on the same device."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images / 255 - mean) / std

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image as a network's input, (3, S, S) float32."""
        return self.normalise(self.resize(image))


def read_mask(path: str | os.PathLike[str], shape: tuple[int, int]) -> np.ndarray:
    """Return a mask file as (H, W) bool of the given shape, nearest neighbour: True where it is not black.

    A mask may have another size than its X-ray (in the COVID-19 Radiography Database 256 against 299).
    """
    import cv2

    mask = (read_xray(path) > 0).astype(np.uint8)
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def thumbnails(paths: Sequence[str], size: int = 32) -> np.ndarray:
    """Return (N, size, size) uint8 small versions of the X-rays, each pixel the mean of what it covers."""
    import cv2

    return np.stack(
        [cv2.resize(read_xray(path), (size, size), interpolation=cv2.INTER_AREA) for path in paths]
    )


def augmentation(
    image_size: int, *, horizontal_flip: bool = False, smallest_crop: float = 1.0
) -> Callable[[Tensor], Tensor] | None:
    """Return the random transform of (1, S, S) uint8 training images, or None where there is nothing to do.

    `smallest_crop`: a window with this share of the image's area, or any up to the whole, is enlarged to
    S = `image_size` (aspect kept within 10 %). Draws from torch's global generator: seed it
    (`seed_everything`) for the same images again.
    """
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = []
    if smallest_crop < 1:
        steps.append(v2.RandomResizedCrop(image_size, scale=(smallest_crop, 1), ratio=(0.9, 1.1)))
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(p=0.5))
    return v2.Compose(steps) if steps else None


class XrayDataset(Dataset):
    """Images and labels for a DataLoader: item i is ((3, S, S) float32, label).

    Each file is decoded and resized once a process; the (1, S, S) uint8 result is kept in memory until
    `cache_bytes` are used, after which further images are read anew each time.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 2 * 1024**3,
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"{len(paths)} images but {len(labels)} labels")
        self.paths, self.labels = list(paths), [int(label) for label in labels]
        self.preprocessing, self.augment = preprocessing, augment
        self._cached: dict[int, Tensor] = {}
        self._cache_length = cache_bytes // preprocessing.image_size**2

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._cached.get(index)
        if image is None:
            image = self.preprocessing.resize(read_xray(self.paths[index]))
            if len(self._cached) < self._cache_length:
                self._cached[index] = image
        if self.augment is not None:
            image = self.augment(image)
        return self.preprocessing.normalise(image), self.labels[index]

    def plain(self) -> "XrayDataset":
        """Return the same images without augmentation; decoded images are shared, not kept twice."""
        dataset = copy.copy(self)
        dataset.augment = None
        return dataset


def class_counts(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (C,) how often each class occurs. Raises ValueError where one does not occur at all."""
    counts = torch.bincount(torch.as_tensor(list(labels)), minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"no training image of class {int(counts.argmin())}: nothing to balance it with")
    return counts


def balanced_sampler(
    labels: Sequence[int], num_classes: int, generator: torch.Generator
) -> WeightedRandomSampler:
    """Return a sampler that draws, with replacement, each class equally often; an epoch keeps its length.

    Weight of an image: 1 / the number of images of its class.
    """
    weights = 1.0 / class_counts(labels, num_classes)[torch.as_tensor(list(labels))].double()
    return WeightedRandomSampler(weights.tolist(), len(weights), replacement=True, generator=generator)


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (C,) weights for a loss, N / (C · n_c): their mean over the images is 1 (King & Zeng 2001;
    scikit-learn's "balanced").
    """
    counts = class_counts(labels, num_classes)
    return (counts.sum() / (num_classes * counts)).float()


def make_loaders(
    rows: Mapping[str, Mapping[str, Sequence]],
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    augment: Callable[[Tensor], Tensor] | None,
    oversample: bool,
    num_workers: int,
    generator: torch.Generator,
) -> dict[str, DataLoader]:
    """Return loaders of (images (B, 3, S, S), labels (B,)): "train", "train_plain", "val" and "test".

    `rows` has the columns `path` and `label` of each split. "train" is augmented and either shuffled or
    drawn by `balanced_sampler`; the others keep their order and show images as at inference.
    """
    sets = {split: XrayDataset(r["path"], r["label"], preprocessing) for split, r in rows.items()}
    train = sets["train"]
    train.augment = augment
    sampler = balanced_sampler(train.labels, num_classes, generator) if oversample else None
    loaders = {
        "train": DataLoader(
            train,
            batch_size=batch_size,
            sampler=sampler,
            shuffle=sampler is None,
            generator=generator,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,  # they hold the decoded images
            drop_last=len(train) % batch_size == 1,  # batch normalisation cannot train on a single image
        )
    }
    for name, dataset in (sets | {"train_plain": train.plain()}).items():
        if name != "train":
            loaders[name] = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    return loaders


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath may still use the legacy generator
    torch.manual_seed(seed)
