"""The files of the command line: the X-rays, their overlays, and the table of predictions."""

import contextlib
import hashlib
import itertools
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from inference.resumable_table import ResumableTable, Share, cell
from inference.trained_networks import ModelCard
from utils import IMAGE_SUFFIXES, write_whole

TABLE = "predictions.csv"
OVERLAY_SUFFIXES = (".png", ".jpg", ".jpeg")
# Every overlay starts with a comment: this text and the `xray_id` of its X-ray.
MARK, ID_LENGTH = b"Software\0xraycam overlay_cam.py of ", 16
# The comment is inserted after the size, which comes first in every PNG file, and after the header of the JPEG files
# that OpenCV writes.
PLACE_IN_PNG, PLACE_IN_JPEG = 33, 20


class Job(NamedTuple):
    """An X-ray's file, the files of its overlays, and the `problem` of a file that is known to be unusable."""

    image: Path
    overlays: Sequence[Path]
    problem: str | None = None

    def source(self) -> list[str]:
        """Return the X-ray's size and time of change. A later run compares them to see whether it has changed."""
        if not os.path.exists(self.image):
            return ["", ""]
        status = self.image.stat()
        return [str(status.st_size), datetime.fromtimestamp(status.st_mtime, UTC).isoformat()]

    def written(self) -> list[str]:
        """Return the first overlay's name and the sizes of all overlays. A later run compares them to see damage."""
        sizes = [str(path.stat().st_size) if overlay_source(path) else "" for path in self.overlays]
        return [self.overlays[0].name, "|".join(sizes) if all(sizes) else ""]


# --- overlays -----------------------------------------------------------------------------------------------


def xray_id(image: Path) -> bytes:
    """Return the text that names an X-ray in its overlays: a hash of the path, which does not reveal it."""
    return hashlib.sha256(os.fsencode(os.path.abspath(image))).hexdigest()[:ID_LENGTH].encode()


def overlay_source(path: Path) -> bytes:
    """Return the `xray_id` of the X-ray that an overlay shows; b"" for a file that is no overlay."""
    if not os.path.isfile(path):
        return b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(128).partition(MARK)[2][:ID_LENGTH]
    return b""


def check_replaceable(path: Path) -> None:
    """Raise ValueError where an overlay would replace a file that is no overlay."""
    if os.path.lexists(path) and not overlay_source(path):
        raise ValueError(f"{path} is there and is no overlay of this program: move it, or give another -o")


def write_overlay(path: Path, picture: np.ndarray, image: Path) -> None:
    """Write a picture as a PNG or JPEG file that carries the mark of an overlay.

    Args:
        path: The file; its suffix is one of `OVERLAY_SUFFIXES`.
        picture: (H, W, 3) uint8 RGB.
        image: The X-ray's file.

    Raises:
        ValueError: A file that is no overlay has this name, or the format cannot hold the picture.
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, pixels = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not encoded:  # JPEG files have at most 65,500 pixels a side
        raise ValueError(f"cannot write {path}")
    content, text = pixels.tobytes(), MARK + xray_id(image)
    if path.suffix.lower() == ".png":
        place, chunk = PLACE_IN_PNG, b"tEXt" + text
        comment = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    else:
        place, comment = PLACE_IN_JPEG, b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text
    check_replaceable(path)
    write_whole(path, content[:place] + comment + content[place:])


def names_file(output: Path | None) -> bool:
    """Return whether `-o` names a file for one overlay, not a folder."""
    return bool(output is not None and output.suffix and not os.path.isdir(output))


def overlay_paths(images: Sequence[Path], output: Path | None, endings: Sequence[str]) -> list[list[Path]]:
    """Return the files of each image's overlays, one for each ending.

    They are `<name>_cam<ending>.png` in the folder `output` (default: the working folder), or have the name of `output`
    where it is a PNG or JPEG file. The name gets a number if a file of this name is an X-ray, or the overlay of
    another X-ray (one of the same name in another folder, or one of an earlier command).

    Raises:
        ValueError: `output` is one file for several images, or of another format.
    """
    if names_file(output):
        if output.suffix.lower() not in OVERLAY_SUFFIXES:
            raise ValueError(f"cannot write {output.suffix} files: give -o a .png or .jpg file or a folder")
        if len(images) > 1:
            raise ValueError(f"{output} can hold one image's overlay only: give -o a folder")
        return [[output.with_stem(f"{output.stem}{ending}") for ending in endings]]
    # Only these X-rays can have an overlay's name. A comparison with all images would take long.
    xrays = {os.path.abspath(image) for image in images if "_cam" in image.stem}
    paths: dict[Path, list[Path]] = {}  # for each image; the key is the path without an ending
    numbers = defaultdict(lambda: itertools.chain([""], (f"_{number}" for number in itertools.count(2))))
    for image in images:
        for number in numbers[image.stem]:
            base = (output or Path()) / f"{image.stem}{number}_cam.png"
            overlays = [base.with_stem(f"{base.stem}{ending}") for ending in endings]
            is_free = base not in paths and xrays.isdisjoint(map(os.path.abspath, overlays))
            if is_free and {overlay_source(path) for path in overlays} <= {b"", xray_id(image)}:
                break
        paths[base] = overlays
    return list(paths.values())


# --- images -------------------------------------------------------------------------------------------------


def images_in(inputs: Sequence[Path]) -> tuple[list[Path], dict[Path, str], list[str]]:
    """Return the X-rays among the inputs: the files, and the images in the folders, without overlays.

    Args:
        inputs: Files and folders.

    Returns:
        - the images; a folder without images, or one that cannot be read, is among them
        - the problem of each such folder
        - a line about each kind of skipped files

    Raises:
        ValueError: There is no X-ray.
    """
    images, problems, overlays, others = {}, {}, [], []
    for path in inputs:
        try:
            candidates, other_names = _in_folder(path) if os.path.isdir(path) else ([path], [])
        except (ValueError, OSError) as error:
            candidates, other_names, problems[path] = [path], [], str(error)
        others += other_names
        for file in candidates:
            if overlay_source(file):
                overlays.append(file.name)
            else:
                images.setdefault(os.path.abspath(file), file)
    if not images:
        raise ValueError(f"no X-rays were given, but overlays of this program: {_first_names(overlays)}")
    if problems.keys() >= set(images.values()):
        raise ValueError(next(iter(problems.values())))
    kinds = {"overlays of this program": overlays, "not PNG, JPEG, TIFF or BMP": others}
    lines = [f"{len(names)} skipped, {kind}: {_first_names(names)}" for kind, names in kinds.items() if names]
    return list(images.values()), problems, lines


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a folder's images and the names of its other files, without hidden files and prediction tables."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not os.path.isdir(path)]
    if not images:
        raise ValueError(f"no images in the folder {folder}: sub-folders are not searched; give PNG, JPEG, TIFF or BMP")
    others = {*paths}.difference(images)
    return images, sorted(path.name for path in others if not path.match("predictions*.csv"))


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# --- the table ----------------------------------------------------------------------------------------------


def model_settings(folders: Sequence[Path], cards: Sequence[ModelCard], lungs: Path | None) -> dict[str, object]:
    """Return fingerprints of the networks in run folders and of all lung models: their own, and the one in `lungs`."""
    lung_models = [folder / "lungs" for folder, card in zip(folders, cards, strict=True) if card.lung_masking]
    lung_models += [] if lungs is None else [lungs]
    return {"models": [*map(_fingerprint, folders)], "lungs": [*map(_fingerprint, lung_models)]}


def _fingerprint(folder: Path) -> list[object]:
    weights = (folder / "model.safetensors").stat()  # the weights are not read: that takes longer than an image
    card = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    return [card, weights.st_size, weights.st_mtime_ns]


class PredictionTable(ResumableTable):
    """The table of predictions in a folder: a row for each image.

    Args:
        output: The folder.
        card: The card of the networks.
        settings: What the rows depend on, in types that JSON has.
        share: This process's share of the images.
    """

    def __init__(self, output: Path, card: ModelCard, settings: Mapping[str, object], share: Share) -> None:
        columns = ["image", "findings" if card.multilabel else "predicted", *card.classes]
        columns += ["lungs", "in_lungs", "overlay", "overlay_bytes", "bytes", "changed", "error"]
        super().__init__(output / TABLE, columns, settings, share)

    def remaining(self, jobs: Sequence[Job], own_jobs: Sequence[Job]) -> list[Job]:
        """Open the table of all jobs; return those of this process's own jobs that remain.

        Two kinds of rows are removed: those of own images that must be done again, and those of images whose overlay
        will be replaced by that of another image. Raises ValueError or OSError as `resume` does.
        """
        images = {cell(job.overlays[0].name): cell(os.path.abspath(job.image)) for job in jobs}
        remaining = {cell(os.path.abspath(job.image)): job for job in own_jobs}

        def keep(row: list[str]) -> bool:
            image, state = row[0], row[-5:-1]
            if images.get(state[0], image) != image:
                return False
            if image not in remaining:
                return True
            job = remaining[image]
            current = [cell(value) for value in (*job.written(), *job.source())]
            if "" not in current and current == state:
                del remaining[image]
                return True
            for path in job.overlays if current[0] == state[0] else ():
                if os.path.isfile(path) and not path.stat().st_size:
                    path.unlink()  # another program emptied it, so nothing is lost
            return False

        self.resume(keep)
        return list(remaining.values())

    def write(self, record: Mapping[str, object], state: Sequence[str]) -> None:
        """Append the row of an image.

        Args:
            record: The record of `inference.answers.answer`; or only "image" and "error", if the image failed.
            state: The job's `written` and `source`.
        """
        image = os.path.abspath(record["image"])
        if "error" in record:
            return self.append([image, *[None] * (len(self.columns) - 2), record["error"]])
        decision = record["predicted"] if "predicted" in record else "|".join(record["findings"])
        probabilities = [None if p is None else f"{p:.4f}" for p in record["probabilities"].values()]
        lungs = [record.get("lungs"), record["maps"][0].get("in_lungs")]
        return self.append([image, decision or "No Finding", *probabilities, *lungs, *state, None])
