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

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from utils import Preprocessing

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
        self._open()  # at once: another process may put a newer file in its place

    def __len__(self) -> int:
        return len(self._places)

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return (B, 1, S, S) uint8 images. Raises ValueError where the disk has lost what was written."""
        places = self._places[np.asarray(rows)]
        chosen, checksums = self._array["pixels"][places], self._array["checksum"][places]
        if hasattr(mmap, "MADV_DONTNEED"):
            # Mapped pages count as this process's memory, up to 2 MB around each image: a large file would fill it.
            self._map.madvise(mmap.MADV_DONTNEED)
        if [zlib.crc32(image) for image in chosen] != checksums.tolist():
            raise ValueError(
                f"{self.file} is damaged, as by a crash: delete it, then start again: it is made anew"
            )
        return torch.from_numpy(chosen)[:, None]

    def _open(self) -> None:
        with self.file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._array = np.frombuffer(self._map, dtype, offset=stream.tell()).reshape(shape)


def cached(
    paths: dict[str, Sequence[str]], preprocessing: Preprocessing, folder: Path, *, title: str = "images"
) -> dict[str, ImageFile]:
    """Return, for each split's paths, their resized images, from one file in `folder` for them all.

    The file is found again by the images' names, sizes and times, by where links lead, and by the preprocessing. Where
    images have changed on the disk it is made anew, in place of the old one; other images, or another preprocessing,
    have a file of their own. It appears when it is complete. Of two processes that want it at once, one makes it and
    the other waits.

    Raises CacheFailed where it cannot be written; ValueError or FileNotFoundError for images that cannot be read.
    """
    names = sorted({path for split in paths.values() for path in split})
    kind = _digest([preprocessing.key, *names])
    state = _digest([f"{VERSION}", *_states(names)])
    file = Path(folder) / f"{kind}-{preprocessing.image_size}px-{state}.npy"
    if not _whole(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _alone(file.with_name(f".{kind}.lock")):
                if not _whole(file):
                    _write(file, names, preprocessing, title=title)
                    for old in set(file.parent.glob(f"{kind}-*")) - {file}:
                        old.unlink(missing_ok=True)
        except (CacheFailed, FileNotFoundError):
            raise
        except OSError as error:
            raise CacheFailed(f"cannot write {file.parent}: {error.strerror}") from None
    return {split: ImageFile(file, own, names) for split, own in paths.items()}


def _whole(file: Path) -> bool:
    """Return whether the file is there with as many bytes as it should have."""
    try:
        ImageFile(file, [], [])
    except (OSError, ValueError):
        return False
    return True


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
    unfinished = file.with_suffix(".part")  # one that a killed process left is written over
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
    try:
        with open(unfinished, "wb") as stream, bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            np.lib.format.write_array_header_1_0(stream, header)
            stream.flush()
            try:  # better now than after an hour of decoding
                reserve(stream.fileno(), stream.tell() + len(names) * record.itemsize)
            except OSError as error:
                room = len(names) * record.itemsize / 1e9
                raise CacheFailed(
                    f"no room for {room:.2g} GB of images in {file.parent}: {error.strerror}"
                ) from None
            for start in range(0, len(names), CHUNK):
                images = list(pool.map(resized, names[start : start + CHUNK]))
                records = np.empty(len(images), record)
                records["pixels"] = np.concatenate(images)
                records["checksum"] = [zlib.crc32(image) for image in images]
                stream.write(records)
                bar.update(len(images))
            stream.flush()
            os.fsync(stream.fileno())
        if unreadable:
            more = f" ({len(unreadable)} such images: remove them or put them right)"
            shown = "; ".join(unreadable[:SHOWN] + ["…"] * (len(unreadable) > SHOWN))
            raise ValueError(shown + (more if len(unreadable) > 1 else ""))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def reserve(descriptor: int, number: int) -> None:
    """Give an open, empty file so many bytes, where the system can; raise OSError if the disk has no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, number)
