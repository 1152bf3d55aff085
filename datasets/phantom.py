"""A synthetic chest X-ray data set, in memory or on disk. The places of lungs, lesions and shortcuts are known exactly.

It needs no download. A network's maps can be compared with the true places of the lesions.
`datasets/phantom_anatomy.py` draws one chest.

    python -m datasets.phantom ROOT --images-per-class 250 --size 224 --seed 0
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from datasets.covid_radiography import FOLDERS
from datasets.phantom_anatomy import draw_chest
from datasets.table import BOX_COLUMNS, refuse_unknown

GENERATOR_VERSION = 1  # raise it when the same seed gives another picture
CLASSES = tuple(FOLDERS)
SMALLEST_BOX = 0.0015  # share of the image's area; smaller parts of a mask get no box
SMALLEST_SIZE = 32  # px
CHUNK = 64  # number of images in memory while a data set is written
WHAT = "synthetic chest radiographs, drawn by datasets/phantom.py; no patient is shown"


@dataclass(frozen=True)
class Phantoms:
    """N radiographs of S x S px with their labels and masks; row 0 is the top, column 0 the patient's right."""

    images: np.ndarray  # (N, S, S) uint8, 0 = black = little attenuation
    labels: np.ndarray  # (N,) int64, index into CLASSES
    lung_masks: np.ndarray  # (N, S, S) bool, both lungs, without the parts behind heart and diaphragm
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
    exposure, noise and side marker depend only on (seed, patient). So one patient has the same chest with every
    disease and without. The bytes are the same on one machine with the same versions of NumPy and OpenCV.

    Args:
        labels: (N,) indices into CLASSES.
        seed: seed of all random numbers.
        patients: (N,) patient numbers from 0 (default: 0 to N - 1).
        size: side of the square images, pixels, at least 32.
        shortcut_class: the class in which a white square or disc is planted near a corner (default: none).
        shortcut_probability: 0-1, the probability that an image of that class has the shortcut.

    Raises:
        ValueError: a size below 32 px, an unknown class, a probability outside 0-1.
    """
    labels = np.asarray(labels, dtype=np.int64)
    patients = np.arange(len(labels)) if patients is None else np.asarray(patients)
    if size < SMALLEST_SIZE:
        raise ValueError(f"A phantom of {size} px shows nothing: size must be at least {SMALLEST_SIZE}")
    if not 0 <= shortcut_probability <= 1:
        raise ValueError(f"A shortcut probability lies between 0 and 1, not {shortcut_probability}")
    refuse_unknown({shortcut_class} - {None}, CLASSES, "classes of the phantom")

    def draw(label: int, patient: int) -> tuple[np.ndarray, ...]:
        chance = shortcut_probability if CLASSES[label] == shortcut_class else 0.0
        return draw_chest(CLASSES[label], patient, seed=seed, size=size, shortcut_chance=chance)

    # One image at a time, so that its arrays stay in the processor's cache. NumPy and OpenCV release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chests = list(pool.map(draw, labels.tolist(), patients.tolist()))

    kinds = enumerate((np.uint8, bool, bool, bool))
    images, *masks = (np.array([chest[k] for chest in chests], kind).reshape(-1, size, size) for k, kind in kinds)
    return Phantoms(images, labels, *masks)


def lesion_boxes(mask: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Return a box for each connected part of the (H, W) bool mask, the largest part first; tiny parts get none.

    A box is (x, y, width, height) as fractions of the image; x and y are its upper left corner.
    """
    height, width = mask.shape
    _, _, (_, *parts), _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = [part.tolist() for part in parts if part[cv2.CC_STAT_AREA] >= SMALLEST_BOX * mask.size]
    large.sort(key=lambda part: -part[cv2.CC_STAT_AREA])
    return [(x / width, y / height, w / width, h / height) for x, y, w, h, _ in large]


def write_phantom(
    root: Path,
    *,
    images_per_class: Mapping[str, int],
    size: int,
    seed: int,
    shortcut_class: str | None = None,
    shortcut_probability: float = 1.0,
) -> None:
    """Write a synthetic data set in the layout of the COVID-19 Radiography Database; a failure leaves nothing behind.

    - `<Folder>/images/<Folder>-<k>.png`, k = 1, 2, ...: 8-bit grey.
    - `<Folder>/masks/` (lungs), `<Folder>/lesions/` and, with a shortcut, `<Folder>/shortcuts/`: 0 or 255, same names.
    - `boxes.csv`: path, label, x, y, width, height (fractions of the image).
    - `phantom.json`: the settings. If `root` has a phantom of the same settings, nothing is done.

    A larger set begins with the images of a smaller one.

    Args:
        root: folder to make.
        images_per_class: class -> number of images; a class that is not listed has none.
        size: side of the square images, pixels, at least 32.
        seed: seed of all random numbers.
        shortcut_class: the class with a planted marker (default: none).
        shortcut_probability: 0-1, the probability that an image of that class has the marker.

    Raises:
        ValueError: the settings are not allowed, or `root` has a phantom of other settings.
        FileExistsError: `root` has other content.
    """
    refuse_unknown(images_per_class, CLASSES, "classes of the phantom")
    counts = {name: images_per_class.get(name, 0) for name in CLASSES}
    if min(counts.values()) < 0:
        raise ValueError(f"Numbers of images cannot be negative: {counts}")
    shortcut = {"shortcut_class": shortcut_class, "shortcut_probability": float(shortcut_probability)}
    drawing = {"size": size, "seed": seed, **shortcut}
    draw_phantoms([], **drawing)  # refuses wrong settings before a folder is made
    settings = {"what": WHAT, "generator_version": GENERATOR_VERSION, "images_per_class": counts, **drawing}
    settings["shortcut_elsewhere"] = 0.0  # part of the settings of generator version 1
    if is_written(root, settings):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        folder = Path(unfinished) / root.name
        boxes = [row for name in CLASSES for row in write_class(folder, name, counts[name], drawing)]
        with open(folder / "boxes.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([BOX_COLUMNS, *boxes])
        (folder / "phantom.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if root.is_dir():
            root.rmdir()  # it is empty here; not every system can rename a folder onto an empty one
        folder.rename(root)


def is_written(root: Path, settings: dict[str, object]) -> bool:
    """Return whether `root` has the phantom of these settings; raise an error if it has any other content."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / "phantom.json").is_file():
        raise FileExistsError(f"{root} exists and has no phantom: choose another folder, or move it away")
    written = json.loads((root / "phantom.json").read_text(encoding="utf-8"))
    other = sorted(key for key in settings.keys() | written.keys() if settings.get(key) != written.get(key))
    if other:
        raise ValueError(f"{root} has a phantom with another {', '.join(other)}: choose another folder, or delete it")
    return True


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
        # Every image shows a different patient: one anatomy must not be both in training and in test.
        patients = numbers * len(CLASSES) + label
        drawn = draw_phantoms(np.full(len(numbers), label), patients=patients, **drawing)
        pictures = zip(drawn.images, drawn.lung_masks, drawn.lesion_masks, drawn.shortcut_masks, strict=True)
        for number, chest in zip(numbers + 1, pictures, strict=True):
            file = f"{folder}-{number}.png"
            for kind, picture in zip(kinds, chest, strict=False):  # without a shortcut, `kinds` has no "shortcuts"
                grey = picture if kind == "images" else picture * np.uint8(255)
                (root / folder / kind / file).write_bytes(cv2.imencode(".png", grey)[1].tobytes())
            rows += [(f"{folder}/images/{file}", name, *box) for box in lesion_boxes(chest[2])]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a data set from the command line, or exit with status 2 and the reason."""
    parser = argparse.ArgumentParser(description="Write synthetic chest X-rays with known lungs and lesions.")
    parser.add_argument("root", type=Path, help="folder to make")
    for option, default in (("images-per-class", 250), ("size", 224), ("seed", 0), ("shortcut-probability", 1.0)):
        parser.add_argument(f"--{option}", type=type(default), default=default)
    parser.add_argument("--shortcut-class", choices=CLASSES, help="plant a bright marker in this class")
    options = vars(parser.parse_args(arguments))
    options["images_per_class"] = dict.fromkeys(CLASSES, options["images_per_class"])
    try:
        write_phantom(options.pop("root"), **options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
