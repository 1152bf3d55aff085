"""ChestX-ray14 of the NIH Clinical Center (Wang et al. 2017, CVPR, "ChestX-ray8"): 112,120 frontal X-rays of 30,805
patients. An image has any number of fourteen findings, which were extracted from radiologists' reports by software.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.kaggle import download_command
from datasets.table import NO_FINDING, XrayTable, image_frame, no_boxes, rarest_findings, refuse_images, refuse_unknown

# In the paper's order.
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
BOX_NAMES = {"Infiltrate": "Infiltration"}  # name in the list of boxes -> name in the table of labels
BOX_SIZE = 1024  # px: the boxes refer to images of this size, whatever the size of the files
OFFICIAL_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
BOX_LIST = "BBox_List_2017.csv"
NIH = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
DOWNLOAD = f"{download_command('nih-chest-xrays/data', 'data/ChestX-ray14')}, or from {NIH}"


def read_chestxray14(root: Path, *, classes: Sequence[str] = (), official_split: bool = False) -> XrayTable:
    """Return the multi-label table of the images in a folder, with the boxes of `BBox_List_2017.csv` if it exists.

    Images that are listed but have no file are left out; the notes have their number.

    Args:
        root: the folder with `Data_Entry_2017*.csv` (or `.csv.gz`), and the images in `images/` or in
            `images_001/images/` and so on.
        classes: the findings to read, in this order (default: all fourteen).
        official_split: take the splits from the source's lists. `train_val_list.txt` is "train";
            `split_by_patient` draws the validation images from it.

    Raises:
        FileNotFoundError: the labels, the images or the official lists are missing; the message says how to get them.
        ValueError: a finding is unknown, an image has no label, a patient id differs from that in the file's name, or a
            box is not four numbers.
    """
    wanted = tuple(classes) or FINDINGS
    refuse_unknown(wanted, FINDINGS, "findings")
    root = root.absolute()
    entries = _read_entries(root)
    paths = entries["image"].map(_image_paths(root))
    if paths.isna().all():
        raise FileNotFoundError(f"no images of ChestX-ray14 in {root}: get them with: {DOWNLOAD}")
    entries = entries[paths.notna()].assign(path=paths.dropna()).reset_index(drop=True)
    unlabelled = entries.loc[entries["findings"].isna(), "image"]
    refuse_images(unlabelled, "have no label in the table", f"name their findings there, or write {NO_FINDING}")
    findings = _findings(entries["findings"])
    chosen = findings[list(wanted)]
    boxes = _read_boxes(root, entries.set_index("image")["path"], wanted)
    splits = _official_splits(root, entries["image"]) if official_split else None
    label = rarest_findings(chosen)
    frame = image_frame(path=entries["path"], patient=entries["image"].str[:8], split=splits, label=label)
    frame = pd.concat([frame, chosen], axis=1)
    missing, others = paths.isna().sum(), int((findings.any(axis=1) & ~chosen.any(axis=1)).sum())
    remarks = {
        f"{missing} of {len(paths)} listed images have no file and are left out": missing,
        f"{others} images have other findings only and count as images without a finding": others,
    }
    notes = tuple(remark for remark, number in remarks.items() if number)
    return XrayTable(frame, wanted, root, has_patient_ids=True, multilabel=True, boxes=boxes, notes=notes)


def _read_entries(root: Path) -> pd.DataFrame:
    """Return the newest table of labels, a row per image: `image` (file name), `findings` (joined by |), `patient`."""
    tables = [path for path in root.glob("Data_Entry_2017*") if path.name.endswith((".csv", ".csv.gz"))]
    if not tables:
        raise FileNotFoundError(f"no Data_Entry_2017.csv of ChestX-ray14 in {root}: get it with: {DOWNLOAD}")
    path = max(tables)  # the corrected table is called Data_Entry_2017_v2020
    names = {"Image Index": "image", "Finding Labels": "findings", "Patient ID": "patient"}
    entries = pd.read_csv(path, usecols=list(names), dtype={"Patient ID": "int64"}, index_col=False)
    entries = entries.rename(columns=names)
    differing = entries[entries["image"].str[:8] != entries["patient"].astype(str).str.zfill(8)]
    rule = "a name must begin with the patient's id in 8 digits: get the file again"
    refuse_images(differing["image"], f"in {path.name} have another patient id than their name", rule)
    return entries


def _image_paths(root: Path) -> dict[str, str]:
    """Return the path of every file in the image folders, by name."""
    folders = [root / "images", *sorted(root.glob("images_*/images"))]
    return {entry.name: entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}


def _findings(texts: pd.Series) -> pd.DataFrame:
    """Return a uint8 0/1 column per finding of FINDINGS, from texts such as "Effusion|Mass" or "No Finding"."""
    codes, combinations = pd.factorize(texts)  # there are only a few hundred different texts
    findings = [set(text.split("|")) - {NO_FINDING} for text in combinations]
    refuse_unknown(set().union(*findings), FINDINGS, "findings in the table of labels")
    table = np.array([[name in names for name in FINDINGS] for names in findings], dtype=np.uint8)
    return pd.DataFrame(table[codes], columns=list(FINDINGS))


def _official_splits(root: Path, images: pd.Series) -> pd.Series:
    split_of: dict[str, str] = {}
    for name, split in OFFICIAL_LISTS.items():
        if not (root / name).is_file():
            raise FileNotFoundError(f"no {name} in {root}: get it from {NIH}, or set official_split = false")
        split_of |= dict.fromkeys((root / name).read_text(encoding="utf-8").split(), split)
    splits = images.map(split_of)
    remedy = "get the lists again, or set official_split = false"
    refuse_images(images[splits.isna()], f"are in neither {' nor '.join(OFFICIAL_LISTS)}", remedy)
    return splits


def _read_boxes(root: Path, paths: pd.Series, classes: tuple[str, ...]) -> pd.DataFrame:
    if not (root / BOX_LIST).is_file():
        return no_boxes()
    # Columns are read by position: the header "Bbox [x,y,w,h],,," has commas inside a name, and more columns than some
    # rows.
    sides = ["x", "y", "width", "height"]
    boxes = pd.read_csv(root / BOX_LIST, header=None, usecols=range(2 + len(sides)))
    boxes = boxes.set_axis(["image", "label", *sides], axis=1).replace({"label": BOX_NAMES})
    boxes = boxes[boxes["image"] != "Image Index"].copy()  # some versions of the list have no header
    boxes[sides] = boxes[sides].apply(pd.to_numeric, errors="coerce")
    unreadable = boxes.loc[boxes[sides].isna().any(axis=1), "image"]
    refuse_images(unreadable, f"in {BOX_LIST} have a box that is not four numbers", "correct these lines")
    refuse_unknown(boxes["label"], FINDINGS, f"findings in {BOX_LIST}")
    boxes = boxes[boxes["image"].isin(paths.index) & boxes["label"].isin(classes)].reset_index(drop=True)
    labels = boxes["label"].map(classes.index).astype("int64")
    return pd.DataFrame({"path": boxes["image"].map(paths), "label": labels}).join(boxes[sides] / BOX_SIZE)
