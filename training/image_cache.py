"""The X-rays of a dataset, decoded and resized once into a memory-mapped file that every epoch reads."""

import functools
import hashlib
import mmap
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from utils import Preprocessing, flush

VERSION = 2  # of the file format: raise it when the format or `Preprocessing.read` changes
SHOWN = 20  # an error names at most this many unreadable images
CHUNK = 256  # the number of images that are decoded between two writes


class CacheFailed(OSError):
    """A file cannot be written: the disk has no room, or permission is missing."""


class ImageFile:
    """The resized X-rays of one split, in a memory-mapped file: the system frees its pages when memory is short.

    Args:
        file: the file with the images of all splits.
        paths: the images of this split; `images(rows)` returns those of `paths[rows]`.
        all_paths: the images in the file, in its order.
    """

    def __init__(self, file: Path, paths: Sequence[str], all_paths: Sequence[str]) -> None:
        self.file = file
        places = {path: place for place, path in enumerate(all_paths)}
        self._places = np.array([places[path] for path in paths], dtype=np.int64)
        # Opened here and kept open: another process may replace the file by a newer one.
        self._array = np.load(file, mmap_mode="r")

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return (B, 1, S, S) uint8 images. Raises ValueError where the file is damaged."""
        places = self._places[np.asarray(rows)]
        pixels, checksums = self._array["pixels"][places], self._array["checksum"][places]
        if hasattr(mmap, "MADV_DONTNEED"):
            # Otherwise the process keeps all pages that it has read (up to 2 MB around each image), and a large file
            # fills its memory.
            self._array.base.madvise(mmap.MADV_DONTNEED)
        if [zlib.crc32(image) for image in pixels] != checksums.tolist():
            raise ValueError(f"{self.file} is damaged, perhaps by a crash: delete it and start again")
        return torch.from_numpy(pixels)[:, None]


def cached(
    paths: dict[str, Sequence[str]], preprocessing: Preprocessing, folder: Path, *, title: str = "images"
) -> dict[str, ImageFile]:
    """Return the resized images of each split, from one file in `folder` for all splits.

    The next call with the same images and preprocessing uses the file again. If the size, a time or the real path of
    an image has changed, a new file replaces it. Other images and other preprocessings have their own files. The file
    appears when it is complete. If two processes need it at the same time, one makes it and the other waits.

    Args:
        paths: the image files of each split.
        preprocessing: how they are read and resized.
        folder: where the file is kept.
        title: the name of the images in printed lines.

    Raises:
        CacheFailed: the file cannot be written.
        ValueError, FileNotFoundError: images cannot be read.
    """
    names = sorted({path for split in paths.values() for path in split})
    kind = _digest([preprocessing.key, *names])
    state = _digest([f"{VERSION}", *_states(names)])
    file = folder / f"{kind}-{preprocessing.image_size}px-{state}.npy"
    if not _is_whole(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.with_name(f".{kind}.lock")):
                if not _is_whole(file):
                    _write(file, names, preprocessing, title=title)
                    for old in set(file.parent.glob(f"{kind}-*")) - {file}:
                        old.unlink(missing_ok=True)
        except (CacheFailed, FileNotFoundError):
            raise
        except OSError as error:
            raise CacheFailed(f"cannot write {file.parent}: {error.strerror}") from None
    return {split: ImageFile(file, split_paths, names) for split, split_paths in paths.items()}


def _is_whole(file: Path) -> bool:
    """Return whether the file exists and has the number of bytes that its header says."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return file.stat().st_size == array.offset + array.nbytes


def _states(names: Sequence[str]) -> Iterator[str]:
    """Yield the size, the times of change and the real path of each file."""
    real_folder = functools.cache(os.path.realpath)  # resolving the path of every file takes long
    for name in names:
        folder, file = os.path.split(name)
        place = os.path.realpath(name) if os.path.islink(name) else os.path.join(real_folder(folder), file)
        stat = os.stat(name)
        # A changed file can have its old time of modification (mtime), but not its old ctime.
        yield f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {place}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _locked(file: Path) -> FileLock:
    """Return a lock, acquired; print a line if another process has it."""
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print("another process is decoding these images: waiting for it", file=sys.stderr)
        return lock.acquire()


def _write(file: Path, names: Sequence[str], preprocessing: Preprocessing, *, title: str) -> None:
    """Decode and resize all images on all cores; the file gets its name when it is complete."""
    size = preprocessing.image_size
    print(f"{title}: decoding {len(names):,} images to {size} px, once", flush=True)
    unreadable: list[str] = []

    def resized(name: str) -> np.ndarray:
        try:
            return preprocessing.read(name).numpy()
        except ValueError as error:
            unreadable.append(str(error))
            return np.zeros((1, size, size), np.uint8)

    record = np.dtype([("pixels", np.uint8, (size, size)), ("checksum", "<u4")])
    header = {"descr": record.descr, "fortran_order": False, "shape": (len(names),)}
    bar = tqdm(total=len(names), desc=f"{title}: decoding", unit="image", leave=False, disable=None)
    unfinished = file.with_suffix(".part")  # a killed process may have left one: it is overwritten
    try:
        with open(unfinished, "wb") as stream, bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            np.lib.format.write_array_header_1_0(stream, header)
            reserve(stream, len(names) * record.itemsize, "images")
            for start in range(0, len(names), CHUNK):
                images = list(pool.map(resized, names[start : start + CHUNK]))
                stream.write(np.array([(image[0], zlib.crc32(image)) for image in images], record))
                bar.update(len(images))
        flush(unfinished)
        if unreadable:
            shown = "; ".join(unreadable[:SHOWN] + ["…"] * (len(unreadable) > SHOWN))
            count = f" ({len(unreadable)} such images: remove or repair them)"
            raise ValueError(shown + count * (len(unreadable) > 1))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def reserve(stream: BinaryIO, number: int, content: str) -> None:
    """Reserve `number` more bytes on the disk for a new file, where the system can do that.

    Raises:
        CacheFailed: the disk has no room. The message names the `content` of the file.
    """
    stream.flush()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, stream.tell() + number)
    except OSError as error:
        folder = Path(stream.name).parent
        raise CacheFailed(f"no room for {number / 1e9:.2g} GB of {content} in {folder}: {error.strerror}") from None
