"""A user's own data: one folder a class, with or without `train/`, `val/`, `test/` above the classes."""

import re
from collections.abc import Sequence
from pathlib import Path

from datasets.table import XrayTable, image_files, image_frame, refuse_empty, subfolder

# Split -> the names that its folder may have; case does not matter.
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def read_folder(
    root: Path, *, classes: Sequence[str] = (), patient_pattern: str | re.Pattern[str] | None = None
) -> XrayTable:
    r"""Return the table of the images in `<root>/<class>/` or in `<root>/<train|val|test>/<class>/`.

    The table has the splits of the tree; a missing split is left to `split_by_patient`.

    Args:
        root: the folder of the classes or of the splits.
        classes: the class folders to read, in this order (default: all, by name).
        patient_pattern: a regular expression that is searched in the file's name; its first group is the patient:
            `"^(p\d+)_"` for `p017_lateral.png`. Without it each image is its own patient.

    Raises:
        FileNotFoundError: there is no such tree.
        ValueError: a class has no image, or a name in which the pattern finds no patient.
    """
    root = root.absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the folder that holds one folder of images a class")
    tops = _split_folders(root) or {None: root}
    names = tuple(classes) or _class_names(tops)
    rows = []
    for split, top in tops.items():
        for label, name in enumerate(names):
            for path in image_files(top / name):
                rows.append((str(path), _patient(path, root, patient_pattern), label, split))
    if not rows:
        raise FileNotFoundError(f"no images in {root}: it must hold one folder of PNG or JPEG files a class")
    paths, patients, labels, splits = zip(*rows, strict=True)
    refuse_empty(names, labels, root)
    frame = image_frame(path=paths, patient=patients, split=splits, label=labels)
    return XrayTable(frame=frame, classes=names, root=root, has_patient_ids=patient_pattern is not None)


def _split_folders(root: Path) -> dict[str | None, Path]:
    folders = {split: subfolder(root, names) for split, names in SPLIT_FOLDERS.items()}
    return {split: folder for split, folder in folders.items() if folder is not None}


def _class_names(tops: dict[str | None, Path]) -> tuple[str, ...]:
    folders = {path.name for top in tops.values() for path in top.iterdir() if image_files(path)}
    spellings: dict[str, str] = {}
    for name in sorted(folders):
        first = spellings.setdefault(name.lower(), name)
        if first != name:
            raise ValueError(f"class folders are called both {first} and {name}: use one spelling")
    return tuple(sorted(folders))


def _patient(path: Path, root: Path, pattern: str | re.Pattern[str] | None) -> str:
    if pattern is None:
        return path.relative_to(root).with_suffix("").as_posix()
    match = re.search(pattern, path.name)
    if not match or not match.groups() or not match.group(1):
        text = re.compile(pattern).pattern
        raise ValueError(f"patient_pattern {text!r} finds no patient in the name {path.name!r}")
    return match.group(1)
