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
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler, default_collate

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

    def resize(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image, or what `lungs` leaves of it, as a (1, S, S) uint8 tensor."""
        from torchvision.transforms.v2 import functional

        if self.lungs is not None:
            image = self.lungs(image)
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
    image_size: int,
    *,
    horizontal_flip: bool = False,
    smallest_crop: float = 1.0,
    rotation: float = 0.0,
    translation: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    brightness: float = 0.0,
    contrast: float = 0.0,
) -> Callable[[Tensor], Tensor] | None:
    """Return the random transform of (1, S, S) uint8 training images, or None where there is nothing to do.

    `smallest_crop`: a window with this share of the image's area, or any up to the whole, is enlarged to
    S = `image_size` (aspect kept within 10 %). `rotation`: up to so many degrees to either side.
    `translation`: up to this share of the side, along either axis. `scale`: a factor from the first to the
    second. What these three uncover is black. `brightness`, `contrast`: factors from 1 - b to 1 + b. Draws
    from torch's global generator: seed it (`seed_everything`) for the same images again.
    """
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = []
    if smallest_crop < 1:
        steps.append(v2.RandomResizedCrop(image_size, scale=(smallest_crop, 1), ratio=(0.9, 1.1)))
    if rotation or translation or scale != (1.0, 1.0):
        shift = (translation, translation) if translation else None
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(rotation, translate=shift, scale=scale, interpolation=bilinear, fill=0))
    if brightness or contrast:
        steps.append(v2.ColorJitter(brightness=brightness, contrast=contrast))
    if horizontal_flip:
        steps.append(RandomFlip())
    if not steps:
        return None
    return steps[0] if len(steps) == 1 else v2.Compose(steps)


class RandomFlip(torch.nn.Module):
    """A horizontal flip of every second image, at random. It has two views only, so what a frozen network
    makes of each need be computed only once.
    """

    views = 2

    def draw(self) -> int:
        """Return which view is next, from torch's global generator."""
        return int(torch.rand(()) < 0.5)

    def view(self, image: Tensor, number: int) -> Tensor:
        """Return (…, H, W) as it is for view 0, flipped for view 1."""
        return image.flip(-1) if number else image

    def forward(self, image: Tensor) -> Tensor:
        """Return a view at random."""
        return self.view(image, self.draw())


class XrayDataset(Dataset):
    """Images and targets for a DataLoader: item i is ((1, S, S) uint8, target); give the loader `collate`, which
    normalises whole batches (image by image takes as long as a small network does).

    `targets` are (N,) class indices, or (N, C) of 0 and 1, which become (C,) float32. Each file is decoded
    and resized once a process; the (1, S, S) uint8 result is kept in memory until `cache_bytes` are used,
    after which further images are read anew each time.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        preprocessing: Preprocessing,
        *,
        augment: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 2 * 1024**3,
    ) -> None:
        if len(paths) != len(targets):
            raise ValueError(f"{len(paths)} images but {len(targets)} labels")
        self.paths, self.targets = list(paths), np.asarray(targets)
        self.preprocessing, self.augment = preprocessing, augment
        self._cached: dict[int, Tensor] = {}
        self._cache_length = cache_bytes // preprocessing.image_size**2

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        image = self.resized(index)
        if self.augment is not None:
            image = self.augment(image)
        return image, self.target(index)

    def collate(self, samples: Sequence[tuple[Tensor, int | Tensor]]) -> tuple[Tensor, Tensor]:
        """Return (B, 3, S, S) float32 normalised images and (B,) or (B, C) targets of B items."""
        images, targets = zip(*samples, strict=True)
        return self.preprocessing.normalise(torch.stack(images)), default_collate(targets)

    def resized(self, index: int) -> Tensor:
        """Return (1, S, S) uint8, the image before augmentation and normalisation."""
        image = self._cached.get(index)
        if image is None:
            image = self.preprocessing.resize(read_xray(self.paths[index]))
            if len(self._cached) < self._cache_length:
                self._cached[index] = image
        return image

    def target(self, index: int) -> int | Tensor:
        """Return the class index, or (C,) float32 of 0 and 1."""
        target = self.targets[index]
        return int(target) if target.ndim == 0 else torch.from_numpy(target.astype(np.float32))

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


def label_weights(targets: np.ndarray) -> Tensor:
    """Return (2, C) weights for a multi-label loss over (N, C) of 0 and 1: row 0 for the negatives of each
    label, its share of positives; row 1 for its positives, its share of negatives.

    So both sides of every label weigh the same in sum (Rajpurkar et al. 2017, arXiv:1711.05225, section 2.1).
    """
    share = torch.tensor(np.asarray(targets, dtype=np.float64)).mean(dim=0)
    return torch.stack([share, 1 - share]).float()


def make_loaders(
    rows: Mapping[str, tuple[Sequence[str], Sequence[int] | np.ndarray]],
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    batch_size: int,
    augment: Callable[[Tensor], Tensor] | None,
    oversample: bool,
    num_workers: int,
    generator: torch.Generator,
) -> dict[str, DataLoader]:
    """Return loaders of (images (B, 3, S, S), targets (B,) or (B, C)): "train", "train_plain", "val", "test".

    `rows` has the paths and the targets of each split (see `XrayDataset`). "train" is augmented and either shuffled or
    drawn by `balanced_sampler`; the others keep their order and show images as at inference.
    """
    sets = {split: XrayDataset(paths, targets, preprocessing) for split, (paths, targets) in rows.items()}
    train = sets["train"]
    train.augment = augment
    sampler = balanced_sampler(train.targets, num_classes, generator) if oversample else None
    loaders = {
        "train": DataLoader(
            train,
            batch_size=batch_size,
            collate_fn=train.collate,
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
            options = {"batch_size": batch_size, "num_workers": num_workers}
            loaders[name] = DataLoader(dataset, collate_fn=dataset.collate, **options)
    return loaders


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath may still use the legacy generator
    torch.manual_seed(seed)
