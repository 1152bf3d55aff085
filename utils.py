"""From a file on disk to a batch: reading an X-ray, transforms, sampling, seeding.

Stands under the command line too, so it imports nothing but NumPy, Pillow and torch at the top.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import random
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

# Bits that X-ray detectors and their converters store in a 16-bit file.
STORED_BITS = (8, 10, 12, 14, 16)
UNFINISHED = ".xraycam-"  # what the names of files that are being written begin with
FEW = 1000  # one pixel in so many does not decide how bright the others are
NO_VALUE = 1e30  # nothing that is measured is so large; writers put ±3.4e38 where there is no value
# What is opened; Pillow would hand other files to programs such as Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
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


def write_whole(file: Path, content: str | bytes | Mapping[str, object] | Callable[[Path], None]) -> None:
    """Write a file that is there completely or not at all, whatever happens: a text, bytes, what `torch.save`
    takes, or what a function writes into the path that it is given. The disk has it when this returns.
    """
    # A name of its own, as two processes may write one file at once; not made of the file's, which may be as long
    # as a name can be.
    unfinished = file.with_name(f"{UNFINISHED}{os.urandom(8).hex()}.tmp")
    try:
        if isinstance(content, str):
            content = content.encode()
        if isinstance(content, bytes):
            unfinished.write_bytes(content)
        elif isinstance(content, Mapping):
            with unfinished.open("wb") as stream:  # torch's own writer would hide why a disk refuses
                torch.save(content, stream)
        else:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            content(unfinished)
            unfinished.chmod(mode)  # safetensors' writer lets nobody but the owner read its file
        flush(unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    flush(file.parent)  # the new name, too, must outlive a power cut


def remove_unfinished(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what processes that were killed in `write_whole` have left in a folder. Where other processes may be
    writing into it, only what was last written to more than `older_than` seconds ago.
    """
    for left in folder.glob(f"{UNFINISHED}*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
            if not older_than or left.stat().st_mtime < time.time() - older_than:
                left.unlink()


def flush(path: Path) -> None:
    """Return when the disk has a file's content or a folder's names; does nothing where the system cannot tell."""
    if os.name == "posix":
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is the first CUDA GPU, else Apple's GPU, else the CPU.

    Raises ValueError for a device that is unknown or not there.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        named = torch.device(device)
        if named.type in ("cpu", "cuda", "mps"):
            torch.empty(0, device=named)
            return named
    except (RuntimeError, AssertionError, NotImplementedError):
        pass  # torch raises another type for each reason why a device is not there.
    raise ValueError(f"no device {device!r} on this machine: try --device cpu")
