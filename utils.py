"""Helpers from the image file to the batch: reading, transforms, weights of images and classes, seeds, safe writing.

The command line must start quickly, so only NumPy, Pillow and torch are imported at the top.
"""

import contextlib
import functools
import hashlib
import io
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

# The formats that are opened. Pillow would pass other files to programs such as Ghostscript.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

# The numbers of bits that X-ray detectors and file converters use in a 16-bit file.
STORED_BITS = (8, 10, 12, 14, 16)
PIXELS_PER_OUTLIER = 1000  # one pixel in a thousand may lie outside the range that becomes 0 to 255
NO_VALUE = 1e30  # larger than any measured value; a pixel without a value is often stored as ±3.4e38

# TIFF tags and their values.
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # Pillow inverts 8-bit files itself, but no others
SAMPLE_FORMAT, UNSIGNED, SIGNED = 339, 1, 2
STRIPS, TILES = (273, 279), (324, 325)  # the offsets of the parts of the image, and their lengths
# Number types that Pillow reads as int32 and as uint8. Key: Pillow's mode and the sample format.
STORED_AS = {("I", UNSIGNED): np.uint32, ("L", SIGNED): np.int8}

RUN_LENGTHS = (1, 2)  # compressions of a BMP file
# JPEG markers, and bytes that belong to no image.
START_OF_SCAN, END_OF_JPEG, FOREIGN_BYTES = 0xDA, b"\xff\xd9", bytes.fromhex("5aa533cc") * 8
# What Pillow raises for damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, zlib.error, Image.DecompressionBombError)

UNFINISHED = ".xraycam-"  # names of files that are being written begin with it


def read_xray(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the image in a file as (H, W) uint8, 0 = black, whatever its mode on disk.

    - 8-bit greyscale: as stored
    - RGB, palette and CMYK: ITU-R 601 luma; transparent parts: on black
    - more than 8 bits: `_scaled` chooses the range that becomes 0 to 255
    - EXIF orientation: applied
    - several pages: the first page; one line on stderr for each file says so

    Damage that can be detected is refused: missing data, a wrong checksum in PNG and deflated TIFF, JPEG data that end
    before the last pixel. In a file without checksums, wrong pixels cannot be detected. Every run-length BMP is
    refused, because damage shifts all of its later pixels and Pillow fills in missing data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no readable image.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    try:
        # Pillow gets a file object. It memory-maps a file that is given as a path, and then scrambles a rotated TIFF.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            grey = _grey(image, file)
            _check_whole(image, file)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that can be read: give a PNG, JPEG, TIFF or BMP") from None
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read, is it damaged? ({error})") from None
    if pages > 1:
        _print_once(f"{path} holds {pages} images: the first is read")
    return grey


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _grey(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """Return an image that is opened but not loaded as (H, W) uint8; `file` is its open file."""
    tags = getattr(image, "tag_v2", {})
    stored = STORED_AS.get((image.mode, tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]))
    deep_colour = image.mode in ("RGB", "RGBA") and ";16" in str(image.tile)
    image = ImageOps.exif_transpose(image)
    if stored or image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        return _scaled(values.view(stored or values.dtype), inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    if deep_colour:
        return _scaled(_deep_luma(image, file))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("L")).copy()


def _deep_luma(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """Return (H, W) uint16 luma of an image with 16 bits per colour. Pillow's `image` has only 8 bits."""
    import cv2

    file.seek(0)
    # OpenCV applies the orientation too.
    values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_ANYDEPTH)
    if values is None or values.dtype != np.uint16 or values.shape != image.size[::-1]:
        raise ValueError("this kind of image with 16 bits a colour is not supported: save it as 16-bit greyscale")
    if image.mode == "RGBA":
        values = np.round(values * (np.asarray(image.getchannel("A")) / 255)).astype(np.uint16)
    return values


def _scaled(values: np.ndarray, *, inverted: bool = False) -> np.ndarray:
    """Return (H, W) uint8 of values of any number type.

    - Integers of up to 16 bits: the range has the fewest bits (8, 10, 12, 14 or 16) that hold at least 99.9 % of the
      values. Without this rule a 12-bit image in a 16-bit file, or an image with a few hot pixels, would be
      almost black. Values above the range become white. The range starts at 0, or at the lowest value if that is
      negative (one value in a thousand may lie below).
    - Larger integers and floating point: the range goes from the smallest to the largest value. At each end, one value
      in a thousand may lie outside.
    - Values that are not finite or exceed ±1e30 become black and do not affect the range.

    Args:
        values: (H, W) numbers.
        inverted: The highest value is black.

    Raises:
        ValueError: No value is finite.
    """
    valid = np.abs(values) < NO_VALUE
    measured = values[valid]
    if not measured.size:
        raise ValueError("none of its pixels has a finite value")
    outliers = measured.size // PIXELS_PER_OUTLIER
    ends = [outliers, -1 - outliers]
    low, high = map(float, np.partition(measured, ends)[ends])
    start = min(low, 0)
    sizes = [2**bits for bits in STORED_BITS if high - start < 2**bits]
    if values.dtype.kind in "iu" and sizes:
        low, high = start, start + sizes[0] - 1
    scaled = (np.where(valid, values, low) - low) * (255 / ((high - low) or 1))
    grey = np.round(scaled.clip(0, 255)).astype(np.uint8)
    return np.where(valid, 255 - grey if inverted else grey, 0)


def _check_whole(image: Image.Image, file: BinaryIO) -> None:
    """Raise an error if the file of an image is damaged although Pillow could load it."""
    compression = image.info.get("compression")
    file.seek(0)
    if image.format == "PNG":
        Image.open(file, formats=["PNG"]).verify()
    elif image.format == "BMP" and compression in RUN_LENGTHS:
        raise ValueError("damage in a BMP of run lengths cannot be detected: save it as PNG")
    elif image.format == "TIFF" and "deflate" in compression:
        for tags in (STRIPS, TILES):
            offsets, lengths = (image.tag_v2.get(tag, ()) for tag in tags)
            for offset, length in zip(offsets, lengths, strict=True):
                file.seek(offset)
                zlib.decompress(file.read(length))
    elif image.format in ("JPEG", "MPO"):
        # Bytes before the end marker do not change the picture of a complete JPEG. If data are missing, the decoder
        # reads these bytes as pixels, and the picture changes.
        data = file.read()
        end = _end_of_jpeg(data)
        with Image.open(io.BytesIO(data[:end] + FOREIGN_BYTES + data[end:]), formats=["JPEG"]) as longer:
            if ImageChops.difference(longer, image).getbbox():
                raise ValueError("its data do not reach the last pixel")


def _end_of_jpeg(data: bytes) -> int:
    """Return the position of the end marker of the first image in a JPEG file."""
    place = 2
    while data[place + 1] != START_OF_SCAN:  # a thumbnail, which may come first, has markers too
        is_padding = data[place + 1] == 0xFF
        place += 1 if is_padding else 2 + int.from_bytes(data[place + 2 : place + 4])
    end = data.find(END_OF_JPEG, place)
    if end < 0:
        raise ValueError("its end is missing")
    return end


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an X-ray to the network's input, the same in training and at inference.

    1. `lungs`, if given, blackens everything outside the lungs.
    2. The image is resized to a square: bilinear, anti-aliased. The aspect ratio is not kept.
    3. The grey channel is repeated three times and normalised.

    Attributes:
        image_size: Side of the square in pixels.
        mean: Mean of each channel, in units of the 0–1 range.
        std: Standard deviation of each channel, in the same units.
        lungs: Function from (H, W) uint8 X-rays to X-rays that are black outside the lungs (`lungs.masking`).
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lungs: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def key(self) -> str:
        """The settings that the resized images depend on, as text."""
        return f"{self.image_size} px, lungs {'whole' if self.lungs is None else self.lungs.key}"

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Return the image in a file, resized, as a (1, S, S) uint8 tensor."""
        return self.resize(read_xray(path))

    def resize(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image as a (1, S, S) uint8 tensor, with `lungs` applied."""
        from torchvision.transforms.v2 import functional

        if self.lungs is not None:
            image = self.lungs(image)
        return functional.resize(torch.from_numpy(image)[None], [self.image_size] * 2, antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        """Return (…, 1, S, S) images of 0 to 255 as (…, 3, S, S) float32 on the same device.

        The memory order is channels last, which makes convolutions faster.
        """
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        return ((images / 255).movedim(-3, -1) - mean).div_(std).movedim(-1, -3)

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return an (H, W) uint8 image as the network's input, (3, S, S) float32."""
        return self.normalise(self.resize(image))


def read_mask(path: str | os.PathLike[str], shape: tuple[int, int]) -> np.ndarray:
    """Return a mask file as (H, W) bool of the given shape, True where it is not black.

    A mask may be smaller than its X-ray (in the COVID-19 Radiography Database 256 and 299 pixels).
    """
    return resized_mask(read_xray(path) > 0, shape)


def resized_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return an (H, W) bool mask in another shape, True where the mask covers at least half of the pixel.

    Nearest-neighbour resizing would move its outline by up to half a pixel.
    """
    import cv2

    return cv2.resize(mask.astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5


def class_counts(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return the (C,) number of images of each class. Raises ValueError for a class without images."""
    counts = torch.bincount(torch.as_tensor(list(labels)), minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"no training image of class {int(counts.argmin())}: its weight would be infinite")
    return counts


def balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (N,) float64 sampling weights, 1 / n_c: a weighted draw takes each class equally often."""
    return 1.0 / class_counts(labels, num_classes)[torch.as_tensor(list(labels))].double()


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return (C,) loss weights, N / (C · n_c), whose mean over the images is 1 (King & Zeng 2001)."""
    counts = class_counts(labels, num_classes)
    return (counts.sum() / (num_classes * counts)).float()


def label_weights(targets: np.ndarray) -> Tensor:
    """Return the (2, C) weights of a multi-label loss: row 0 for negatives, row 1 for positives.

    The weight of a negative is the label's share of positives. The weight of a positive is the share of negatives. So
    both have the same total weight (Rajpurkar et al. 2017, arXiv:1711.05225, section 2.1). If all images or
    none have a label, its weight is 0, also in validation.

    Args:
        targets: (N, C) of 0 and 1.
    """
    share = torch.tensor(np.asarray(targets, dtype=np.float64)).mean(dim=0)
    return (torch.stack([share, 1 - share]) * (share * (1 - share) > 0)).float()


def derived_seed(seed: int, use: str, *numbers: int) -> int:
    """Return a seed for one use of random numbers.

    The seed is unrelated to that of another use (such as "order"), other numbers (epoch, batch, …) or another `seed`.
    """
    # The text is hashed, because generators that are seeded with lists treat [1] and [1, 0] alike.
    text = " ".join([str(seed), use, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def derived_generator(seed: int, use: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, use, *numbers))


def write_whole(file: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Replace a file completely or not at all, even at a kill or a power cut.

    Args:
        file: The file to write. Its folder must exist.
        content: Text, bytes, or a function that gets a path and writes the content there.
    """
    # The name is random, because two processes may write the same file. It does not contain the file's own name, which
    # may already be as long as the file system allows.
    unfinished = file.with_name(f"{UNFINISHED}{os.urandom(8).hex()}.tmp")
    try:
        if callable(content):
            unfinished.touch()
            mode = unfinished.stat().st_mode
            content(unfinished)
            unfinished.chmod(mode)  # safetensors makes files that only their owner can read
        else:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(unfinished)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    flush(file.parent)  # the new name must survive a power cut too


def remove_unfinished(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove the temporary files that killed processes left in a folder.

    Args:
        folder: Where `write_whole` wrote.
        older_than: Keep files that were changed within this number of seconds; other processes may be writing them.
    """
    for file in folder.glob(f"{UNFINISHED}*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
            if not older_than or file.stat().st_mtime < time.time() - older_than:
                file.unlink()


def flush(path: Path) -> None:
    """Wait until the content of a file, or the list of names of a folder, is on the disk. Does nothing on Windows."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device with this name; "auto" is the first CUDA GPU, else Apple's GPU, else the CPU.

    Raises ValueError for a device that is unknown or absent.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    # torch raises different errors for unknown and for absent devices.
    with contextlib.suppress(RuntimeError, AssertionError, NotImplementedError):
        named = torch.device(device)
        if named.type in ("cpu", "cuda", "mps"):
            torch.empty(0, device=named)
            return named
    raise ValueError(f"no device {device!r} on this machine: try --device cpu")
