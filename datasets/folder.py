"""A user's own data: one folder for each class; folders `train/`, `val/` and `test/` above the classes are optional."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

from datasets.table import XrayTable, image_files, image_frame, refuse_empty, subfolder

# Split -> the names that its folder may have; case does not matter.
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def read_folder(
    root: Path, *, classes: Sequence[str] = (), patient_pattern: str | re.Pattern[str] | None = None
) -> XrayTable:
    r"""Return the table of the images in `<root>/<class>/` or in `<root>/<train|val|test>/<class>/`.

    The splits are those of the folders; `split_by_patient` draws a missing one.

    Args:
        root: the folder of the classes or of the splits.
        classes: the class folders to read, in this order (default: all, by name).
        patient_pattern: a regular expression to search in the file's name. Its first group is the patient:
            `"^(p\d+)_"` for `p017_lateral.png`. Without it each image is its own patient.

    Raises:
        FileNotFoundError: there are no such folders.
        ValueError: a class has no image, or the pattern does not match a file's name.
    """
    root = root.absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give a folder with one folder of images for each class")
    folders = {split: subfolder(root, names) for split, names in SPLIT_FOLDERS.items()}
    tops = {split: folder for split, folder in folders.items() if folder} or {None: root}
    names = tuple(classes) or _class_names(tops)
    rows = [
        (str(path), _patient(path, root, patient_pattern), label, split)
        for split, top in tops.items()
        for label, name in enumerate(names)
        for path in image_files(top / name)
    ]
    if not rows:
        raise FileNotFoundError(f"no images in {root}: it needs one folder of PNG or JPEG files for each class")
    frame = image_frame(**pd.DataFrame(rows, columns=["path", "patient", "label", "split"], dtype=object))
    refuse_empty(names, frame["label"], root)
    return XrayTable(frame=frame, classes=names, root=root, has_patient_ids=patient_pattern is not None)


def _class_names(tops: dict[str | None, Path]) -> tuple[str, ...]:
    names = sorted({path.name for top in tops.values() for path in top.iterdir() if image_files(path)})
    for first, second in pairwise(sorted(names, key=str.lower)):
        if first.lower() == second.lower():
            raise ValueError(f"class folders are called both {first} and {second}: use one spelling")
    return tuple(names)


def _patient(path: Path, root: Path, pattern: str | re.Pattern[str] | None) -> str:
    if pattern is None:
        return path.relative_to(root).with_suffix("").as_posix()
    match = re.search(pattern, path.name)
    if not match or not match.group(1):
        raise ValueError(f"patient_pattern {re.compile(pattern).pattern!r} finds no patient in the name {path.name!r}")
    return match.group(1)
