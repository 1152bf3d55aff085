"""Decode once: the X-rays of a dataset, resized, in one memory-mapped file that every epoch reads from."""

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

VERSION = 2  # of what the files hold: to be raised when that or `Preprocessing.read` changes
SHOWN = 20  # unreadable images that are named
CHUNK = 256  # images that are decoded between two writes


class CacheFailed(OSError):
    """The file could not be written, for want of room or of permission: go on without it."""


class ImageFile:
    """Resized X-rays in a file: `images(rows)` are those of the paths at these places in `paths`.

    The file is mapped, not read: what of it is in memory is the system's page cache, which it takes back when
    it needs room.
    """

    def __init__(self, file: Path, paths: Sequence[str], all_paths: Sequence[str]) -> None:
        """`all_paths`: those that the file holds, in its order."""
        self.file = file
        places = {path: place for place, path in enumerate(all_paths)}
        self._places = np.array([places[path] for path in paths], dtype=np.int64)
        # Opened at once: another process may put a newer file in its place.
        self._array = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._places)

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return (B, 1, S, S) uint8 images. Raises ValueError where the disk has lost what was written."""
        places = self._places[np.asarray(rows)]
        chosen, checksums = self._array["pixels"][places], self._array["checksum"][places]
        if hasattr(mmap, "MADV_DONTNEED"):
            # Mapped pages count as this process's memory, up to 2 MB around each image: a large file would fill it.
            self._array._mmap.madvise(mmap.MADV_DONTNEED)
        if [zlib.crc32(image) for image in chosen] != checksums.tolist():
            raise ValueError(
                f"{self.file} is damaged, as by a crash: delete it, then start again: it is made anew"
            )
        return torch.from_numpy(chosen)[:, None]


def cached(
    paths: dict[str, Sequence[str]], preprocessing: Preprocessing, folder: Path, *, title: str = "images"
) -> dict[str, ImageFile]:
    """Return the resized images of each split, from one file in `folder` for all splits.

    The file is found again by the names, sizes and times of the images, by where links lead, and by the preprocessing.
    Where images have changed on the disk, a new file replaces the old one. Other images, or another preprocessing, have
    a file of their own. The file appears when it is complete. When two processes want it at the same time, one makes
    it and the other waits.

    Args:
        paths: the image files of each split.
        preprocessing: how they are read and resized.
        folder: where the file is kept.
        title: what is decoded, in what is printed.

    Raises:
        CacheFailed: the file cannot be written.
        ValueError, FileNotFoundError: images cannot be read.
    """
    names = sorted({path for split in paths.values() for path in split})
    kind = _digest([preprocessing.key, *names])
    state = _digest([f"{VERSION}", *_states(names)])
    file = Path(folder) / f"{kind}-{preprocessing.image_size}px-{state}.npy"
    if not _is_whole(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _alone(file.with_name(f".{kind}.lock")):
                if not _is_whole(file):
                    _write(file, names, preprocessing, title=title)
                    for old in set(file.parent.glob(f"{kind}-*")) - {file}:
                        old.unlink(missing_ok=True)
        except (CacheFailed, FileNotFoundError):
            raise
        except OSError as error:
            raise CacheFailed(f"cannot write {file.parent}: {error.strerror}") from None
    return {split: ImageFile(file, own, names) for split, own in paths.items()}


def _is_whole(file: Path) -> bool:
    """Return whether the file is there with as many bytes as it should have."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return file.stat().st_size == array.offset + array.nbytes


def _states(names: Sequence[str]) -> Iterator[str]:
    """Yield size, times of change and true place of each file."""
    real_folder = functools.cache(os.path.realpath)  # to resolve each of very many files takes long
    for name in names:
        folder, file = os.path.split(name)
        place = os.path.realpath(name) if os.path.islink(name) else os.path.join(real_folder(folder), file)
        stat = os.stat(name)
        # Copying can keep the first time, but not the second.
        yield f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {place}"


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _alone(file: Path) -> FileLock:
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print("another process is decoding these images: waiting for it", file=sys.stderr)
        return lock.acquire()


def _write(file: Path, names: Sequence[str], preprocessing: Preprocessing, *, title: str) -> None:
    """Decode and resize all images, on all cores, into a file that takes its name when it is complete."""
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
    unfinished = file.with_suffix(".part")  # written over where a killed process has left one
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
            count = f" ({len(unreadable)} such images: remove them or put them right)"
            raise ValueError(shown + count * (len(unreadable) > 1))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def reserve(stream: BinaryIO, number: int, content: str) -> None:
    """Reserve `number` bytes on the disk behind what a new file holds, where the system can.

    Raises:
        CacheFailed: the disk has no room for this `content`.
    """
    stream.flush()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, stream.tell() + number)
    except OSError as error:
        folder = Path(stream.name).parent
        raise CacheFailed(
            f"no room for {number / 1e9:.2g} GB of {content} in {folder}: {error.strerror}"
        ) from None
