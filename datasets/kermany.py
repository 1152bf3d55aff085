"""Chest X-rays of children of one to five years: normal, bacterial or viral pneumonia (Kermany et al. 2018, Cell 172,
Mendeley Data 10.17632/rscbjbr9sj). The source splits its 5,856 images into train, val and test.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.kaggle import download_command
from datasets.table import XrayTable, image_files, image_frame, refuse_empty, refuse_unknown, subfolder

# Class -> the kinds of its images; a file's name tells the kind.
CLASS_KINDS = {"Normal": ["normal"], "Pneumonia": ["bacteria", "virus"], "Bacterial": ["bacteria"], "Viral": ["virus"]}
# Class folder -> pattern of its file names: `NORMAL2-IM-0381-0001.jpeg`, `personN_bacteria_M.jpeg`. A patient is `IM-N`
# or `personN`. The source does not say whether `personN_bacteria` and `personN_virus` are one person. They count as one
# patient, because one patient under two ids could be in two splits.
FOLDER_NAMES = {
    "NORMAL": re.compile(r"(?P<patient>(?:NORMAL\d*-)?IM-\d+)-"),
    "PNEUMONIA": re.compile(r"(?P<patient>person\d+)_(?P<kind>bacteria|virus)_"),
}
# Split folder of the source -> split of the table.
OFFICIAL_SPLITS = {"train": "train", "val": "train", "test": "test"}
DOWNLOAD = download_command("paultimothymooney/chest-xray-pneumonia")


def read_kermany(root: Path, *, classes: Sequence[str] = ()) -> XrayTable:
    """Return the table of the images in `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg`.

    The splits are the source's, with one exception. Its 16 validation images count as train,
    because they are too few to choose the best epoch. `split_by_patient` draws the validation images from train. The
    notes have the numbers.

    Args:
        root: the folder of the splits, or the folder that holds it as `chest_xray`.
        classes: some of `CLASS_KINDS` (default: "Normal" and "Pneumonia"); images of no class are left out.

    Raises:
        FileNotFoundError: train or test is missing; the message has the command that gets the data.
        ValueError: classes are unknown or share images, or a file's name has no patient or kind.
    """
    wanted = tuple(classes) or ("Normal", "Pneumonia")
    refuse_unknown(wanted, CLASS_KINDS, "classes")
    labels = {kind: label for label, name in enumerate(wanted) for kind in CLASS_KINDS[name]}
    if len(labels) < sum(len(CLASS_KINDS[name]) for name in wanted):
        raise ValueError(f"some of the classes {', '.join(wanted)} share images: Pneumonia is Bacterial and Viral")
    root = root.absolute()
    root = next((top for top in (root, root / "chest_xray") if (top / "train").is_dir()), root)
    images = _read_images(root)
    if not {"train", "test"} <= set(images["folder"]):
        raise FileNotFoundError(f"no train and test images of Kermany et al. in {root}: get them with: {DOWNLOAD}")
    chosen = images[images["kind"].isin(labels)].reset_index(drop=True)
    frame = image_frame(**chosen[["path", "patient", "split"]], label=chosen["kind"].map(labels))
    refuse_empty(wanted, frame["label"], root)
    notes = _notes(images, chosen, wanted)
    return XrayTable(frame=frame, classes=wanted, root=root, has_patient_ids=True, notes=notes)


def _read_images(root: Path) -> pd.DataFrame:
    """Return a row per image: `path`, `patient`, `split`, `kind` and `folder` (the source's split)."""
    rows = []
    for folder, split in OFFICIAL_SPLITS.items():
        for name, pattern in FOLDER_NAMES.items():
            top = subfolder(root / folder, [name.lower()])
            for path in image_files(top) if top else []:
                match = pattern.match(path.name)
                if match is None:
                    raise ValueError(f"{path} has no patient or kind in its name: use the source's file names")
                # The test set numbers its patients from 1 again, so the split is part of the id.
                patient = f"{split}/{match['patient']}"
                rows.append((str(path), patient, split, match.groupdict().get("kind", "normal"), folder))
    return pd.DataFrame(rows, columns=["path", "patient", "split", "kind", "folder"])


def _notes(images: pd.DataFrame, chosen: pd.DataFrame, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the notes of the table: `images` are all of the source, `chosen` are those in the table."""
    validation = int(chosen["folder"].eq("val").sum())
    numbers = chosen[["split", "patient"]].drop_duplicates()["patient"].str.partition("/")[2]
    shared = int(numbers.duplicated().sum())
    left_out = len(images) - len(chosen)
    remarks = {
        f"{validation} official validation images count as train: too few to choose the best epoch": validation,
        f"{shared} patient numbers occur in both train and test and are read as different patients: the source "
        "says that no test patient is in train": shared,
        f"{left_out} images that are not {' or '.join(classes)} are left out": left_out,
    }
    return tuple(remark for remark, number in remarks.items() if number)
