"""Chest X-rays of children of one to five years, normal, or with bacterial or viral pneumonia (Kermany et al. 2018,
Cell 172, Mendeley Data 10.17632/rscbjbr9sj): 5,856 images, split by the source into train, val and test.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.table import XrayTable, image_files, image_frame, refuse_empty, refuse_unknown, subfolder

# Class -> the kinds of image that belong to it; the files' names tell the kind.
CLASS_KINDS = {
    "Normal": ("normal",),
    "Pneumonia": ("bacteria", "virus"),
    "Bacterial": ("bacteria",),
    "Viral": ("virus",),
}
# Folder in a split's folder -> the names of its files: `personN_bacteria_M.jpeg`, `NORMAL2-IM-0381-0001.jpeg`.
# A patient is `personN` or `IM-N`. `personN_bacteria` and `personN_virus` count as one patient, because the source does
# not say whether they are: one patient under two ids could be in two splits.
FOLDER_NAMES = {
    "NORMAL": re.compile(r"(?P<patient>(?:NORMAL\d*-)?IM-\d+)-"),
    "PNEUMONIA": re.compile(r"(?P<patient>person\d+)_(?P<kind>bacteria|virus)_"),
}
# The source's split -> the table's.
OFFICIAL_SPLITS = {"train": "train", "val": "train", "test": "test"}
TOP_FOLDER = "chest_xray"
DOWNLOAD = (
    'pip install kagglehub && python -c "import kagglehub; kagglehub.dataset_download('
    "'paultimothymooney/chest-xray-pneumonia', output_dir='data')\""
)


def read_kermany(root: Path, *, classes: Sequence[str] = ()) -> XrayTable:
    """Return the table of the images in `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    The splits are the source's, except that its 16 validation images, too few to choose anything by, count as train:
    `split_by_patient` draws the validation from train. The table's notes tell all this with numbers.

    Args:
        root: the folder of the splits, or the folder that holds it as `chest_xray`.
        classes: some of `CLASS_KINDS` (default: "Normal" and "Pneumonia"); images of no class are left out.

    Raises:
        FileNotFoundError: train or test is missing; the message has the command that gets the data.
        ValueError: classes are unknown or share images, or a file's name tells no kind and no patient.
    """
    wanted = tuple(classes) or ("Normal", "Pneumonia")
    labels = _labels(wanted)
    root = root.absolute()
    root = next((top for top in (root, root / TOP_FOLDER) if (top / "train").is_dir()), root)
    images = _read_images(root)
    if not {"train", "test"} <= set(images["folder"]):
        raise FileNotFoundError(f"no train and test images of Kermany et al. in {root}: get them with: {DOWNLOAD}")
    chosen = images[images["kind"].isin(labels)].reset_index(drop=True)
    columns = chosen[["path", "patient", "split"]].to_dict("series")
    frame = image_frame(**columns, label=chosen["kind"].map(labels))
    refuse_empty(wanted, frame["label"], root)
    notes = _notes(images, chosen, wanted)
    return XrayTable(frame=frame, classes=wanted, root=root, has_patient_ids=True, notes=notes)


def _labels(classes: tuple[str, ...]) -> dict[str, int]:
    """Return the index of the class of every kind of image that is in one of `classes`."""
    refuse_unknown(classes, CLASS_KINDS, "classes")
    labels: dict[str, int] = {}
    for label, name in enumerate(classes):
        for kind in CLASS_KINDS[name]:
            if kind in labels:
                raise ValueError(f"{classes[labels[kind]]} and {name} share images: choose one of them")
            labels[kind] = label
    return labels


def _read_images(root: Path) -> pd.DataFrame:
    """Return a row an image: `path`, `patient`, `split`, `kind`, and `folder`, the source's split."""
    rows = []
    for folder, split in OFFICIAL_SPLITS.items():
        for name, pattern in FOLDER_NAMES.items():
            top = subfolder(root / folder, [name.lower()])
            for path in image_files(top) if top else []:
                match = pattern.match(path.name)
                if match is None:
                    raise ValueError(f"{path} tells no patient and kind by its name: give it the source's name")
                # The numbering begins again in the test set, so a number alone is no patient.
                patient = f"{split}/{match['patient']}"
                rows.append((str(path), patient, split, match.groupdict().get("kind", "normal"), folder))
    return pd.DataFrame(rows, columns=["path", "patient", "split", "kind", "folder"])


def _notes(images: pd.DataFrame, chosen: pd.DataFrame, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a reader of the table must know, with numbers: of all `images` those `chosen` are in it."""
    validation = int(chosen["folder"].eq("val").sum())
    numbers = chosen["patient"].str.partition("/")[2].groupby(chosen["split"]).agg(set)
    shared = len(numbers.get("train", set()) & numbers.get("test", set()))
    left_out = len(images) - len(chosen)
    remarks = {
        f"{validation} official validation images count as train: too few to choose anything by": validation,
        f"{shared} patient numbers occur in both train and test and are read as different patients: the source "
        "says that its test patients are others": shared,
        f"{left_out} images that are not {' or '.join(classes)} are left out": left_out,
    }
    return tuple(remark for remark, number in remarks.items() if number)
