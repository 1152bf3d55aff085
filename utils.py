"""From a file on disk to a batch: reading an X-ray, transforms, sampling, seeding.

Stands under the command line too, so it imports nothing but NumPy, Pillow and torch at the top.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augmentation import Augmentation

if TYPE_CHECKING:
    from image_cache import ImageFile

# Bits that X-ray detectors and their converters store in a 16-bit file.
STORED_BITS = (8, 10, 12, 14, 16)
FEW = 1000  # one pixel in so many does not decide how bright the others are
NO_VALUE = 1e30  # nothing that is measured is so large; writers put ±3.4e38 where there is no value
# What is opened; Pillow would hand other files to programs such as Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
# TIFF tags.
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # Pillow minds it in 8-bit files only
SAMPLE_FORMAT, UNSIGNED, SIGNED = 339, 1, 2
STRIPS, TILES = (273, 279), (324, 325)  # offsets and lengths
# By Pillow's mode and the tag: what Pillow delivers as int32 and as uint8.
STORED_AS = {("I", UNSIGNED): np.uint32, ("L", SIGNED): np.int8}
RUN_LENGTHS = (1, 2)  # compression of a BMP
# A JPEG's markers, and bytes that stand for no pixels of it.
START_OF_SCAN, END_OF_JPEG, FOREIGN_BYTES = 0xDA, b"\xff\xd9", bytes.fromhex("5aa533cc") * 8


def read_xray(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the image in a file as (H, W) uint8, 0 = black, whatever its mode on disk.

    8-bit greyscale comes back as it is stored; RGB, palette and CMYK by ITU-R 601 luma; transparent parts
    on black; what has more than 8 bits as `_scaled` says. EXIF orientation is applied. Of several pages the first is
    read, and a line on stderr says so, once a file.

    Damage is refused where a file shows it: missing data, a wrong checksum in PNG and deflated TIFF, JPEG data that do
    not reach the last pixel. Files without checksums can hold wrong pixels that nothing shows. A BMP of run lengths is
    refused: any damage shifts its pixels, and Pillow fills up what is missing.

    Raises FileNotFoundError for a missing file and ValueError for one that is no readable image.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    try:
        # By its path, Pillow would map the file, and scramble a TIFF that is stored turned.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            grey = _grey(image, file)
            _check_whole(image, file)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: give a PNG, JPEG, TIFF or BMP") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{path} cannot be read, is it damaged? ({error})") from None
    if pages > 1:
        _say_once(f"{path} holds {pages} images: the first is read")
    return grey


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _grey(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """Return an image that is opened, but not loaded yet, as (H, W) uint8; `file` is where it is stored."""
    tags = getattr(image, "tag_v2", {})
    stored = STORED_AS.get((image.mode, tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]))
    deep_colour = image.mode in ("RGB", "RGBA") and ";16" in str(image.tile)
    image = ImageOps.exif_transpose(image)
    if stored or image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        return _scaled(
            values.view(stored) if stored else values, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        )
    if deep_colour:
        return _scaled(_deep_luma(image, file))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("L")).copy()


def _deep_luma(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """Return (H, W) uint16 of colours with 16 bits a channel, of which Pillow keeps 8 (in `image`, upright)."""
    import cv2

    file.seek(0)
    values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_ANYDEPTH)  # upright too
    if values is None or values.dtype != np.uint16 or values.shape != image.size[::-1]:
        raise ValueError("16 bits a colour, of a kind that is not read: save it as 16-bit greyscale")
    if image.mode == "RGBA":
        values = np.round(values * (np.asarray(image.getchannel("A")) / 255)).astype(np.uint16)
    return values


def _scaled(values: np.ndarray, *, inverted: bool = False) -> np.ndarray:
    """Return (H, W) uint8 of values of any number type.

    Integers are scaled from the smallest of 8, 10, 12, 14, 16 bits that holds all but one in a thousand of them (a
    12-bit detector's image in a 16-bit file would otherwise be almost black, and so would one with a few hot pixels).
    What lies above comes out white; a marker that is larger than that counts as part of the image. Signed integers
    count from their minimum. Integers of more than 16 bits and floating point span their own range; one in a thousand
    may lie beyond either end. Values that are not finite, or beyond ±1e30, are left out of it and come out 0.

    `inverted`: the highest value is black. Raises ValueError where no value is finite.
    """
    known = np.abs(values) < NO_VALUE
    finite = values[known]
    if not finite.size:
        raise ValueError("none of its pixels has a finite value")
    few = finite.size // FEW
    low, high = map(float, np.partition(finite, [few, -1 - few])[[few, -1 - few]])
    if values.dtype.kind in "iu":
        start = min(low, 0)
        bits = next((bits for bits in STORED_BITS if high - start < 2**bits), None)
        low, high = (low, high) if bits is None else (start, start + 2**bits - 1)
    scaled = (np.where(known, values, low) - low) * (255 / ((high - low) or 1))
    grey = np.round(scaled.clip(0, 255)).astype(np.uint8)
    return np.where(known, 255 - grey if inverted else grey, 0)


def _check_whole(image: Image.Image, file: BinaryIO) -> None:
    """Raise an error where an image that Pillow could load from a file shows that the file is damaged."""
    compression = image.info.get("compression")
    file.seek(0)
    if image.format == "PNG":
        Image.open(file, formats=["PNG"]).verify()
    elif image.format == "BMP" and compression in RUN_LENGTHS:
        raise ValueError("a BMP of run lengths does not show damage: save it as PNG")
    elif image.format == "TIFF" and "deflate" in compression:
        for offsets, lengths in (STRIPS, TILES):
            for offset, length in zip(
                image.tag_v2.get(offsets, ()), image.tag_v2.get(lengths, ()), strict=True
            ):
                file.seek(offset)
                zlib.decompress(file.read(length))
    elif image.format in ("JPEG", "MPO"):
        # The data of a whole JPEG are used up by its last pixel: what is put after them changes nothing. Where some are
        # lost, it is taken for pixels.
        data = file.read()
        end = _end_of_jpeg(data)
        with Image.open(io.BytesIO(data[:end] + FOREIGN_BYTES + data[end:]), formats=["JPEG"]) as longer:
            if ImageChops.difference(longer, image).getbbox():
                raise ValueError("its data do not reach the last pixel")


def _end_of_jpeg(data: bytes) -> int:
    """Return where the end marker of the first image in a JPEG file stands."""
    place = 2
    while data[place + 1] != START_OF_SCAN:  # before it, a thumbnail may have markers of its own
        padding = data[place + 1] == 0xFF
        place += 1 if padding else 2 + int.from_bytes(data[place + 2 : place + 4])
    end = data.find(END_OF_JPEG, place)
    if end < 0:
        raise ValueError("its end is missing")
    return end


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
