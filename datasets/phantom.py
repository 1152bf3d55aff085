"""A synthetic chest X-ray data set whose lungs, lesions and shortcuts are known exactly, in memory or on disk.

It stands in for patients where there is nothing to download, and lets localisation be scored against the truth.
How one chest is drawn is in `datasets/phantom_anatomy.py`.

    python -m datasets.phantom ROOT --images-per-class 250 --size 224 --seed 0
"""

import argparse
import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
SMALLEST_BOX = 0.0015  # of the image's area: crumbs of a mask get no box
SMALLEST_SIZE = 32
WHAT = "synthetic chest radiographs, drawn by datasets/phantom.py; no patient is shown"


class Box(NamedTuple):
    """A box as fractions of the image: corner at the upper left, then size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Phantoms:
    """N radiographs of S x S px with their known answers; row 0 is the top, column 0 the patient's right."""

    images: np.ndarray  # (N, S, S) uint8, 0 = black = little attenuation
    labels: np.ndarray  # (N,) int64, index into CLASSES
    lung_masks: np.ndarray  # (N, S, S) bool, both lungs without heart and what lies below the domes
    lesion_masks: np.ndarray  # (N, S, S) bool, inside the lungs, empty for Normal
    shortcut_masks: np.ndarray  # (N, S, S) bool, the planted marker, outside the lungs


def shortcut_rates(shortcut_class: str | None, probability: float, elsewhere: float) -> list[float]:
    """The chance 0-1 of the planted marker for every class, in the order of CLASSES."""
    for chance in (probability, elsewhere):
        if not 0 <= chance <= 1:
            raise ValueError(f"A shortcut probability lies between 0 and 1, not {chance}")
    if shortcut_class is None:
        return [0.0] * len(CLASSES)
    if shortcut_class not in CLASSES:
        raise ValueError(
            f"No class {shortcut_class!r} to plant a shortcut in: choose one of {', '.join(CLASSES)}"
        )
    return [probability if name == shortcut_class else elsewhere for name in CLASSES]


def draw_phantoms(
    labels: Sequence[int] | np.ndarray,
    *,
    seed: int,
    patients: Sequence[int] | np.ndarray | None = None,
    size: int = 224,
    shortcut_class: str | None = None,
    shortcut_probability: float = 1.0,
    shortcut_elsewhere: float = 0.0,
) -> Phantoms:
    """Radiographs of (N,) `labels`, indices into CLASSES, of (N,) `patients`, any numbers from 0 (default 0..N-1).

    An image depends only on (seed, patient, label, size, shortcut), not on the others drawn with it. Anatomy,
    exposure, noise and side marker depend only on (seed, patient): drawn again as Normal, a patient is the same
    chest without the disease. Bytes are repeatable on one machine with one version of NumPy and OpenCV.

    The shortcut, a white square or disc near a corner, is planted in `shortcut_class` with `shortcut_probability`
    and in every other class with `shortcut_elsewhere`; with no class there is none. Raises ValueError for a label
    outside CLASSES, lengths that differ, a size below 32 px, an unknown class, a probability outside 0-1.
    """
    labels = np.asarray(labels, dtype=np.int64)
    patients = np.arange(len(labels)) if patients is None else np.asarray(patients, dtype=np.int64)
    if labels.ndim != 1 or labels.shape != patients.shape:
        raise ValueError(f"One patient a label: got labels {labels.shape} and patients {patients.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(CLASSES)):
        raise ValueError(
            f"Labels are indices 0-{len(CLASSES) - 1} into phantom.CLASSES, got {labels.min()}..{labels.max()}"
        )
    if size < SMALLEST_SIZE:
        raise ValueError(f"A phantom of {size} px shows nothing: size must be at least {SMALLEST_SIZE}")
    rates = shortcut_rates(shortcut_class, shortcut_probability, shortcut_elsewhere)

    def draw(label: int, patient: int) -> Chest:
        return draw_chest(CLASSES[label], patient, seed=seed, size=size, shortcut_chance=rates[label])

    # One image at a time, for its arrays stay in the cache; NumPy and OpenCV let threads run side by side.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chests = list(pool.map(draw, labels.tolist(), patients.tolist()))

    def stacked(field: str, kind: type) -> np.ndarray:
        return np.array([getattr(chest, field) for chest in chests], kind).reshape(-1, size, size)

    masks = (stacked(field, bool) for field in ("lung_mask", "lesion_mask", "shortcut_mask"))
    return Phantoms(stacked("image", np.uint8), labels, *masks)


def lesion_boxes(mask: np.ndarray) -> list[Box]:
    """Boxes round the connected parts of the (H, W) bool mask, largest first; below SMALLEST_BOX none."""
    height, width = mask.shape
    _, _, (_, *parts), _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    kept = [part.tolist() for part in parts if part[cv2.CC_STAT_AREA] >= SMALLEST_BOX * mask.size]
    kept.sort(key=lambda part: -part[cv2.CC_STAT_AREA])
    return [Box(x / width, y / height, w / width, h / height) for x, y, w, h, _ in kept]


def write_phantom(
    root: Path,
    *,
    images_per_class: Mapping[str, int],
    size: int,
    seed: int,
    shortcut_class: str | None = None,
    shortcut_probability: float = 1.0,
    shortcut_elsewhere: float = 0.0,
) -> None:
    """Write a synthetic data set under `root` in the layout of the COVID-19 Radiography Database, all or nothing.

    For k = 1, 2, ...: `<Folder>/images/<Folder>-<k>.png` (8 bit grey) and, under the same name and 0 or 255,
    `<Folder>/masks/` (lungs), `<Folder>/lesions/` and, where a shortcut is planted, `<Folder>/shortcuts/`.
    `boxes.csv` has path, label, x, y, width, height (fractions of the image); `phantom.json` the settings. A
    larger set begins with the smaller one. If `root` holds these very settings, nothing is done.

    Raises ValueError for settings that cannot be drawn or a phantom with other settings, FileExistsError for
    anything else at `root`.
    """
    check_counts(images_per_class)
    drawing = {
        "size": int(size),
        "seed": int(seed),
        "shortcut_class": shortcut_class,
        "shortcut_probability": float(shortcut_probability),
        "shortcut_elsewhere": float(shortcut_elsewhere),
    }
    draw_phantoms([], **drawing)  # refuses what cannot be drawn before a folder is made
    counts = {name: int(images_per_class.get(name, 0)) for name in CLASSES}
    settings = {"what": WHAT, "generator_version": GENERATOR_VERSION, "images_per_class": counts, **drawing}
    if already_there(Path(root), settings):
        return
    with complete_or_absent(Path(root)) as folder:
        boxes = [row for name in CLASSES for row in write_class(folder, name, counts[name], drawing)]
        with open(folder / "boxes.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "label", *Box._fields), *boxes])
        (folder / "phantom.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_counts(images_per_class: Mapping[str, int]) -> None:
    """Raise ValueError for a name outside CLASSES or a negative number of images."""
    unknown = sorted(set(images_per_class) - set(CLASSES))
    if unknown:
        raise ValueError(f"No class {', '.join(unknown)} in the phantom: choose from {', '.join(CLASSES)}")
    if min(images_per_class.values(), default=0) < 0:
        raise ValueError(f"Numbers of images cannot be negative: {dict(images_per_class)}")


def already_there(root: Path, settings: dict) -> bool:
    """Whether `root` holds the phantom of these settings; an error if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    described = root / "phantom.json"
    if not described.is_file():
        raise FileExistsError(f"{root} exists and is no phantom: choose another folder, or move it away")
    found = json.loads(described.read_text(encoding="utf-8"))
    differing = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
    if differing:
        raise ValueError(
            f"{root} holds a phantom with another {', '.join(differing)}: choose another folder, or delete it"
        )
    return True


@contextmanager
def complete_or_absent(root: Path) -> Iterator[Path]:
    """A new folder beside `root` to write into: it becomes `root` if the block succeeds, else it is deleted."""
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp makes it private
        if root.is_dir():
            root.rmdir()  # an empty folder; not every system renames onto one
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_class(root: Path, name: str, count: int, drawing: Mapping, chunk: int = 64) -> list[tuple]:
    """Write `count` images of class `name` and their masks under `root`; return their rows of boxes.csv.

    `drawing` holds the keyword arguments of draw_phantoms; `chunk` images are held in memory at a time.
    """
    label, folder, rows = CLASSES.index(name), FOLDERS[name], []
    kinds = ("images", "masks", "lesions", "shortcuts")[: 3 if drawing["shortcut_class"] is None else 4]
    for kind in kinds:
        (root / folder / kind).mkdir(parents=True)
    for first in range(0, count, chunk):
        numbers = np.arange(first, min(first + chunk, count))
        # Every image is another patient, or one anatomy would be seen in training and in test.
        patients = numbers * len(CLASSES) + label
        drawn = draw_phantoms(np.full(len(numbers), label), patients=patients, **drawing)
        pictures = zip(drawn.images, drawn.lung_masks, drawn.lesion_masks, drawn.shortcut_masks, strict=True)
        for number, chest in zip(numbers + 1, pictures, strict=True):
            file = f"{folder}-{number}.png"
            for kind, picture in zip(kinds, chest, strict=False):  # no shortcut asked for: no file for it
                grey = picture if kind == "images" else picture * np.uint8(255)
                (root / folder / kind / file).write_bytes(cv2.imencode(".png", grey)[1].tobytes())
            rows += [(f"{folder}/images/{file}", name, *box) for box in lesion_boxes(chest[2])]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: write a data set, or exit with status 2 and the reason why not."""
    parser = argparse.ArgumentParser(
        description="Write a synthetic chest X-ray data set with known lungs and lesions."
    )
    parser.add_argument("root", type=Path, help="folder to make")
    parser.add_argument("--images-per-class", type=int, default=250)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shortcut-class", choices=CLASSES, help="plant a bright corner marker in this class"
    )
    parser.add_argument("--shortcut-probability", type=float, default=1.0)
    options = vars(parser.parse_args(arguments))
    options["images_per_class"] = dict.fromkeys(CLASSES, options["images_per_class"])
    try:
        write_phantom(options.pop("root"), **options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
