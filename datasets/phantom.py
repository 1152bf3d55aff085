"""A synthetic chest X-ray data set whose lungs, lesions and shortcuts are known exactly, in memory or on disk.

It needs no download, and a map of a network can be scored against the true place of a lesion. How one chest is drawn
is in `datasets/phantom_anatomy.py`.

    python -m datasets.phantom ROOT --images-per-class 250 --size 224 --seed 0
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from datasets.phantom_anatomy import Chest, draw_chest

GENERATOR_VERSION = 1  # goes up whenever the same seed gives another picture
FOLDERS = {
    "COVID-19": "COVID",
    "Lung Opacity": "Lung_Opacity",
    "Normal": "Normal",
    "Viral Pneumonia": "Viral Pneumonia",
}
CLASSES = tuple(FOLDERS)
SMALLEST_BOX = 0.0015  # of the image's area; smaller parts of a mask get no box
SMALLEST_SIZE = 32  # px
CHUNK = 64  # images that are held in memory while a data set is written
WHAT = "synthetic chest radiographs, drawn by datasets/phantom.py; no patient is shown"


class Box(NamedTuple):
    """A box: its upper left corner and its size, as fractions of the image."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Phantoms:
    """N radiographs of S x S px and what is known of them; row 0 is the top, column 0 the patient's right."""

    images: np.ndarray  # (N, S, S) uint8, 0 = black = little attenuation
    labels: np.ndarray  # (N,) int64, index into CLASSES
    lung_masks: np.ndarray  # (N, S, S) bool, both lungs, without the heart and the parts below the diaphragm
    lesion_masks: np.ndarray  # (N, S, S) bool, inside the lungs, empty for Normal
    shortcut_masks: np.ndarray  # (N, S, S) bool, the planted marker, outside the lungs


def draw_phantoms(
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int,
    patients: Sequence[int] | np.ndarray | None = None,
    size: int = 224,
    shortcut_class: str | None = None,
    shortcut_probability: float = 1.0,
) -> Phantoms:
    """Return one radiograph for each of N labels.

    An image depends only on (seed, patient, label, size, shortcut), not on the images drawn with it. Anatomy,
    exposure, noise and side marker depend only on (seed, patient): drawn again as Normal, a patient has the same chest
    without the disease. The bytes are the same on one machine with the same versions of NumPy and OpenCV.

    Args:
        labels: (N,) indices into CLASSES.
        seed: of all random numbers.
        patients: (N,) whole numbers from 0 (default: 0 to N - 1).
        size: side of the square images, pixels, at least 32.
        shortcut_class: the class in which a white square or disc is planted near a corner (default: none).
        shortcut_probability: 0-1, the share of its images with the shortcut.

    Raises:
        ValueError: a size below 32 px, an unknown class, a probability outside 0-1.
    """
    labels = np.asarray(labels, dtype=np.int64)
    patients = np.arange(len(labels)) if patients is None else np.asarray(patients)
    if size < SMALLEST_SIZE:
        raise ValueError(f"A phantom of {size} px shows nothing: size must be at least {SMALLEST_SIZE}")
    if not 0 <= shortcut_probability <= 1:
        raise ValueError(f"A shortcut probability lies between 0 and 1, not {shortcut_probability}")
    if shortcut_class is not None:
        refuse_unknown_classes([shortcut_class])

    def draw(label: int, patient: int) -> Chest:
        chance = shortcut_probability if CLASSES[label] == shortcut_class else 0.0
        return draw_chest(CLASSES[label], patient, seed=seed, size=size, shortcut_chance=chance)

    # One image at a time, so that its arrays stay in the cache. NumPy and OpenCV release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chests = list(pool.map(draw, labels.tolist(), patients.tolist()))

    def stacked(field: str, kind: type) -> np.ndarray:
        return np.array([getattr(chest, field) for chest in chests], kind).reshape(-1, size, size)

    masks = (stacked(field, bool) for field in ("lung_mask", "lesion_mask", "shortcut_mask"))
    return Phantoms(stacked("image", np.uint8), labels, *masks)


def lesion_boxes(mask: np.ndarray) -> list[Box]:
    """Return a box round each connected part of the (H, W) bool mask, the largest part first."""
    height, width = mask.shape
    _, _, (_, *parts), _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = [part.tolist() for part in parts if part[cv2.CC_STAT_AREA] >= SMALLEST_BOX * mask.size]
    large.sort(key=lambda part: -part[cv2.CC_STAT_AREA])
    return [Box(x / width, y / height, w / width, h / height) for x, y, w, h, _ in large]


def write_phantom(
    root: Path,
    *,
    images_per_class: Mapping[str, int],
    size: int,
    seed: int,
    shortcut_class: str | None = None,
    shortcut_probability: float = 1.0,
) -> None:
    """Write a synthetic data set in the layout of the COVID-19 Radiography Database, complete or not at all.

    - `<Folder>/images/<Folder>-<k>.png`, k = 1, 2, ...: 8-bit grey.
    - `<Folder>/masks/` (lungs), `<Folder>/lesions/` and, with a shortcut, `<Folder>/shortcuts/`: 0 or 255, same names.
    - `boxes.csv`: path, label, x, y, width, height (fractions of the image).
    - `phantom.json`: the settings. Where `root` holds a phantom of the same settings, nothing is done.

    A larger set begins with the images of a smaller one.

    Args:
        root: folder to make.
        images_per_class: class -> number of images; a class that is not listed has none.
        size: as in `draw_phantoms`, and so are the others.
        seed: of all random numbers.
        shortcut_class: the class with a planted marker (default: none).
        shortcut_probability: 0-1, the share of its images with the marker.

    Raises:
        ValueError: the settings cannot be drawn, or `root` holds a phantom of other settings.
        FileExistsError: `root` holds something else.
    """
    refuse_unknown_classes(images_per_class)
    counts = {name: images_per_class.get(name, 0) for name in CLASSES}
    if min(counts.values()) < 0:
        raise ValueError(f"Numbers of images cannot be negative: {counts}")
    drawing = {"size": size, "seed": seed, "shortcut_class": shortcut_class}
    drawing["shortcut_probability"] = float(shortcut_probability)
    draw_phantoms([], **drawing)  # refuses what cannot be drawn before a folder is made
    settings = {"what": WHAT, "generator_version": GENERATOR_VERSION, "images_per_class": counts, **drawing}
    settings["shortcut_elsewhere"] = 0.0  # part of the settings of generator version 1
    if is_written(root, settings):
        return
    with complete_or_absent(root) as folder:
        boxes = [row for name in CLASSES for row in write_class(folder, name, counts[name], drawing)]
        with open(folder / "boxes.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", *Box._fields), *boxes])
        (folder / "phantom.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def refuse_unknown_classes(names: Iterable[str]) -> None:
    """Raise ValueError for a name outside CLASSES."""
    unknown = sorted(set(names) - set(CLASSES))
    if unknown:
        raise ValueError(f"No class {', '.join(unknown)} in the phantom: choose from {', '.join(CLASSES)}")


def is_written(root: Path, settings: dict[str, object]) -> bool:
    """Return whether `root` holds the phantom of these settings; an error where it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / "phantom.json").is_file():
        raise FileExistsError(f"{root} exists and is no phantom: choose another folder, or move it away")
    written = json.loads((root / "phantom.json").read_text(encoding="utf-8"))
    other = sorted(key for key in settings.keys() | written.keys() if settings.get(key) != written.get(key))
    if other:
        remedy = "choose another folder, or delete it"
        raise ValueError(f"{root} holds a phantom with another {', '.join(other)}: {remedy}")
    return True


@contextmanager
def complete_or_absent(root: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it becomes `root` if the block succeeds, else it is deleted."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        folder = Path(unfinished) / root.name
        folder.mkdir()
        yield folder
        if root.is_dir():
            root.rmdir()  # empty; not every system can rename onto it
        folder.rename(root)


def write_class(root: Path, name: str, count: int, drawing: Mapping) -> list[tuple]:
    """Write `count` images of class `name` and their masks; return their rows of boxes.csv.

    `drawing` holds the keyword arguments of draw_phantoms.
    """
    label, folder, rows = CLASSES.index(name), FOLDERS[name], []
    kinds = ("images", "masks", "lesions", "shortcuts")[: 3 if drawing["shortcut_class"] is None else 4]
    for kind in kinds:
        (root / folder / kind).mkdir(parents=True)
    for first in range(0, count, CHUNK):
        numbers = np.arange(first, min(first + CHUNK, count))
        # Every image is another patient: one anatomy must not be in training and in test.
        patients = numbers * len(CLASSES) + label
        drawn = draw_phantoms(np.full(len(numbers), label), patients=patients, **drawing)
        pictures = zip(drawn.images, drawn.lung_masks, drawn.lesion_masks, drawn.shortcut_masks, strict=True)
        for number, chest in zip(numbers + 1, pictures, strict=True):
            file = f"{folder}-{number}.png"
            for kind, picture in zip(kinds, chest, strict=False):  # without a shortcut there is no file for it
                grey = picture if kind == "images" else picture * np.uint8(255)
                (root / folder / kind / file).write_bytes(cv2.imencode(".png", grey)[1].tobytes())
            rows += [(f"{folder}/images/{file}", name, *box) for box in lesion_boxes(chest[2])]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a data set from the command line, or exit with status 2 and the reason."""
    parser = argparse.ArgumentParser(description="Write synthetic chest X-rays with known lungs and lesions.")
    parser.add_argument("root", type=Path, help="folder to make")
    parser.add_argument("--images-per-class", type=int, default=250)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortcut-class", choices=CLASSES, help="plant a bright marker in this class")
    parser.add_argument("--shortcut-probability", type=float, default=1.0)
    options = vars(parser.parse_args(arguments))
    options["images_per_class"] = dict.fromkeys(CLASSES, options["images_per_class"])
    try:
        write_phantom(options.pop("root"), **options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
