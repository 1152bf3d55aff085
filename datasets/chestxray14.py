"""ChestX-ray14 of the NIH Clinical Center (Wang et al. 2017, CVPR, "ChestX-ray8"): 112,120 frontal X-rays of
30,805 patients with fourteen findings, none, one or several an image, mined from the radiologists' reports.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import NO_FINDING, XrayTable, no_boxes, rarest_findings

# In the paper's order.
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
BOX_NAMES = {
    "Infiltrate": "Infiltration"
}  # what the list of boxes calls a finding -> what the labels call it
BOX_SIZE = 1024  # px: boxes are told in images of this size, whatever the size of the files
OFFICIAL_LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
BOX_LIST = "BBox_List_2017.csv"
NIH = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
DOWNLOAD = (
    'pip install kagglehub && python -c "import kagglehub; kagglehub.dataset_download('
    f"'nih-chest-xrays/data', output_dir='data/ChestX-ray14')\", or from {NIH}"
)


def read_chestxray14(root: Path, *, classes: Sequence[str] = (), official_split: bool = False) -> XrayTable:
    """Read `Data_Entry_2017*.csv` (or `.csv.gz`), and the images in `images/` or `images_001/images/` and so on,
    in the folder `root`, into a multi-label table.

    `classes` names the findings to read and their order (all fourteen by default). With `official_split` the
    source's lists make the splits: `train_val_list.txt` is "train", of which `split_by_patient` draws the
    validation. Boxes are those of `BBox_List_2017.csv`, where it is there. Rows without a file are left out and
    counted in the notes.

    Raises FileNotFoundError, with the way to get them, where the labels, the images or the official lists are
    not found; ValueError for an unknown finding, an image without a label, a patient id that is not that of the
    file's name, or a box that is not four numbers.
    """
    wanted = tuple(classes) or FINDINGS
    unknown = set(wanted) - set(FINDINGS)
    if unknown:
        raise ValueError(f"unknown findings {sorted(unknown)}: choose from {', '.join(FINDINGS)}")
    root = root.absolute()
    entries = _read_entries(root)
    paths = entries["image"].map(_image_paths(root))
    if paths.isna().all():
        raise FileNotFoundError(f"no images of ChestX-ray14 in {root}: get them with: {DOWNLOAD}")
    entries = entries[paths.notna()].assign(path=paths.dropna()).reset_index(drop=True)
    unlabelled = entries.loc[entries["findings"].isna(), "image"]
    if len(unlabelled):
        raise ValueError(
            f"{len(unlabelled)} images, for example {unlabelled.iloc[0]}, have no label in the table: name their "
            f"findings there, or write {NO_FINDING}"
        )
    findings = _findings(entries["findings"])
    chosen = findings[list(wanted)]
    frame = pd.DataFrame(
        {
            "path": entries["path"].astype(object),
            "patient": entries["image"].str[:8].astype(object),
            "split": _official_splits(root, entries["image"]) if official_split else None,
            "label": rarest_findings(chosen),
            "mask": None,
            "lesion": None,
        }
    ).astype({"split": object, "mask": object, "lesion": object})
    others = int((findings.any(axis=1) & ~chosen.any(axis=1)).sum())
    remarks = {
        f"{paths.isna().sum()} of {len(paths)} listed images have no file and are left out": paths.isna().any(),
        f"{others} images have other findings only and count as without any": others,
    }
    return XrayTable(
        frame=pd.concat([frame, chosen], axis=1),
        classes=wanted,
        root=root,
        has_patient_ids=True,
        multilabel=True,
        boxes=_read_boxes(root, entries.set_index("image")["path"], wanted),
        notes=tuple(remark for remark, holds in remarks.items() if holds),
    )


def _read_entries(root: Path) -> pd.DataFrame:
    """Return a row an image of the newest table of labels: `image` (file name), `findings` (joined by |)."""
    found = [path for path in root.glob("Data_Entry_2017*") if path.name.endswith((".csv", ".csv.gz"))]
    if not found:
        raise FileNotFoundError(f"no Data_Entry_2017.csv of ChestX-ray14 in {root}: get it with: {DOWNLOAD}")
    path = max(found)  # the correction is called Data_Entry_2017_v2020
    names = {"Image Index": "image", "Finding Labels": "findings", "Patient ID": "patient"}
    entries = pd.read_csv(path, usecols=list(names), dtype={"Patient ID": "int64"}, index_col=False).rename(
        columns=names
    )
    differing = entries["image"].str[:8] != entries["patient"].astype(str).str.zfill(8)
    if differing.any():
        first = entries[differing].iloc[0]
        raise ValueError(
            f"{path.name} gives {first['image']} to patient {first['patient']}, {int(differing.sum())} such rows: "
            "a name begins with its patient's id in 8 digits; get the file again"
        )
    return entries


def _image_paths(root: Path) -> dict[str, str]:
    """Return the path of every file in the folders of images, by name; each folder is listed once."""
    folders = [root / "images", *sorted(root.glob("images_*/images"))]
    return {entry.name: entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}


def _findings(texts: pd.Series) -> pd.DataFrame:
    """Return uint8 0/1, a column a finding of FINDINGS, from texts such as "Effusion|Mass" or "No Finding"."""
    codes, kinds = pd.factorize(texts)  # some hundred different ones; -1 would be a missing one
    named = [set(kind.split("|")) - {NO_FINDING} for kind in kinds]
    unknown = set().union(*named) - set(FINDINGS)
    if unknown:
        raise ValueError(
            f"the labels name unknown findings {sorted(unknown)}: known are {', '.join(FINDINGS)}"
        )
    table = np.array([[name in names for name in FINDINGS] for names in named], dtype=np.uint8)
    return pd.DataFrame(table[codes], columns=list(FINDINGS))


def _official_splits(root: Path, images: pd.Series) -> pd.Series:
    side: dict[str, str] = {}
    for name, split in OFFICIAL_LISTS.items():
        if not (root / name).is_file():
            raise FileNotFoundError(f"no {name} in {root}: get it from {NIH}, or set official_split = false")
        side |= dict.fromkeys((root / name).read_text(encoding="utf-8").split(), split)
    splits = images.map(side).astype(object)
    if splits.isna().any():
        raise ValueError(
            f"{splits.isna().sum()} images, for example {images[splits.isna()].iloc[0]}, are in none of "
            f"{' and '.join(OFFICIAL_LISTS)}: get the lists again, or set official_split = false"
        )
    return splits


def _read_boxes(root: Path, paths: pd.Series, classes: tuple[str, ...]) -> pd.DataFrame:
    if not (root / BOX_LIST).is_file():
        return no_boxes()
    # By position: the header, "Bbox [x,y,w,h],,,", has commas inside a name and more columns than some rows.
    sides = ["x", "y", "width", "height"]
    boxes = pd.read_csv(root / BOX_LIST, header=None, usecols=range(2 + len(sides)))
    boxes = boxes.set_axis(["image", "label", *sides], axis=1).replace({"label": BOX_NAMES})
    boxes = boxes[boxes["image"] != "Image Index"].copy()  # the header, where there is one
    boxes[sides] = boxes[sides].apply(pd.to_numeric, errors="coerce")
    unreadable = boxes.loc[boxes[sides].isna().any(axis=1), "image"]
    if len(unreadable):
        raise ValueError(f"{BOX_LIST}: a box of {unreadable.iloc[0]} is not four numbers: mend its line")
    unknown = set(boxes["label"]) - set(FINDINGS)
    if unknown:
        raise ValueError(
            f"{BOX_LIST} names unknown findings {sorted(unknown)}: known are {', '.join(FINDINGS)}"
        )
    boxes = boxes[boxes["image"].isin(paths.index) & boxes["label"].isin(classes)].reset_index(drop=True)
    if boxes.empty:
        return no_boxes()
    fractions = boxes[sides] / BOX_SIZE
    labels = boxes["label"].map({name: index for index, name in enumerate(classes)})
    named = pd.DataFrame({"path": boxes["image"].map(paths), "label": labels.astype("int64")})
    return pd.concat([named, fractions], axis=1)
