"""A user's own data: one folder a class, with or without `train/`, `val/`, `test/` above the classes."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.table import XrayTable, image_files, subfolder

# Names, without regard to case, that the folder of a split may have.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read_folder(
    root: Path, *, classes: Sequence[str] = (), patient_pattern: str | re.Pattern[str] | None = None
) -> XrayTable:
    r"""Read `<root>/<class>/*.png|jpg|…` or `<root>/<train|val|test>/<class>/*.png|jpg|…`.

    `classes` names the class folders to read and their order (default: all, by name). `patient_pattern` is
    a regular expression whose first group, searched in the file's name, is the patient's id: `"^(p\d+)_"`
    for `p017_lateral.png`. Without it each image is its own patient. Where the tree has splits they are the
    table's; splits that it lacks are left to `split_by_patient`.

    Raises FileNotFoundError where there is no such tree, ValueError for a class that is not there or a name
    in which the pattern finds no patient.
    """
    root = root.absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds one folder of images a class")
    tops = _split_folders(root) or {None: root}
    names = tuple(classes) or _class_names(tops)
    rows = []
    for split, top in tops.items():
        for label, name in enumerate(names):
            folder = top / name
            for path in image_files(folder) if folder.is_dir() else []:
                rows.append((str(path), _patient(path, root, patient_pattern), split, label))
    present = {label for *_, label in rows}
    if not rows or not names:
        raise FileNotFoundError(f"no images in {root}: it must hold one folder of PNG or JPEG files a class")
    absent = [name for label, name in enumerate(names) if label not in present]
    if absent:
        raise ValueError(f"no images of {', '.join(absent)} in {root}: mend `classes` or the folder")
    frame = pd.DataFrame(rows, columns=["path", "patient", "split", "label"]).assign(mask=None, lesion=None)
    frame = frame.astype({"split": object, "mask": object, "lesion": object})
    return XrayTable(frame=frame, classes=names, root=root, has_patient_ids=patient_pattern is not None)


def _split_folders(root: Path) -> dict[str | None, Path]:
    found = {split: subfolder(root, names) for split, names in SPLIT_FOLDERS.items()}
    return {split: folder for split, folder in found.items() if folder is not None}


def _class_names(tops: dict[str | None, Path]) -> tuple[str, ...]:
    folders = {
        path.name for top in tops.values() for path in top.iterdir() if path.is_dir() and image_files(path)
    }
    spelt = {}
    for name in sorted(folders):
        if spelt.setdefault(name.lower(), name) != name:
            raise ValueError(
                f"class folders are called both {spelt[name.lower()]} and {name}: use one spelling"
            )
    return tuple(sorted(folders))


def _patient(path: Path, root: Path, pattern: str | None) -> str:
    if pattern is None:
        return path.relative_to(root).with_suffix("").as_posix()
    found = re.search(pattern, path.name)
    if not found or not found.groups() or not found.group(1):
        raise ValueError(f"patient_pattern {pattern!r} finds no patient in the name {path.name!r}")
    return found.group(1)
