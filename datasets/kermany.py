"""Chest X-rays of children of one to five years, normal, or with bacterial or viral pneumonia (Kermany et al. 2018,
Cell 172, Mendeley Data 10.17632/rscbjbr9sj): 5,856 images, split by the source into train, val and test.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from datasets.table import XrayTable, image_files, subfolder

# Class -> the kinds of image that belong to it, as the files' names tell them.
CLASS_KINDS: dict[str, frozenset[str]] = {
    "Normal": frozenset({"normal"}),
    "Pneumonia": frozenset({"bacteria", "virus"}),
    "Bacterial": frozenset({"bacteria"}),
    "Viral": frozenset({"virus"}),
}
# A folder below a split's -> what its files are called: `personN_bacteria_M.jpeg`, `NORMAL2-IM-0381-0001.jpeg`.
# A patient is `personN` or `IM-N`. `personN_bacteria` and `personN_virus` count as one patient: the source does not
# say whether they are, and a patient taken for two could stand on both sides of a split.
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
    """Read `{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg` in the folder `root`, or in `chest_xray` inside it.

    `classes`, of `CLASS_KINDS`, are "Normal" and "Pneumonia" by default; images of none of them are left out.
    The split is the source's but for its 16 validation images, too few to choose anything by: they count as
    train, of which `split_by_patient` draws the validation. The table's notes tell all this with numbers.

    Raises FileNotFoundError, with the command that gets the data, where train or test is not found; ValueError
    for classes that are unknown or share images, and for a file whose name tells no kind and no patient.
    """
    wanted = tuple(classes) or ("Normal", "Pneumonia")
    labels = _labels(wanted)
    root = root.absolute()
    root = next((top for top in (root, root / TOP_FOLDER) if (top / "train").is_dir()), root)
    found = pd.concat([_split_frame(root, source, split) for source, split in OFFICIAL_SPLITS.items()])
    if not {"train", "test"} <= set(found["source"]):
        raise FileNotFoundError(
            f"no train and test images of Kermany et al. in {root}: get them with: {DOWNLOAD}"
        )
    label = found["kind"].map(labels)
    frame = found.assign(label=label)[label.notna()].astype({"label": "int64"}).reset_index(drop=True)
    absent = [name for i, name in enumerate(wanted) if not frame["label"].eq(i).any()]
    if absent:
        raise ValueError(f"no images of {', '.join(absent)} in {root}: mend `classes` or the folder")
    return XrayTable(
        frame=frame.drop(columns=["kind", "source"]),
        classes=wanted,
        root=root,
        has_patient_ids=True,
        notes=_notes(found, frame, wanted),
    )


def _labels(classes: tuple[str, ...]) -> dict[str, int]:
    """Return the index of the class of every kind of image that is in one of `classes`."""
    unknown = set(classes) - set(CLASS_KINDS)
    if unknown:
        raise ValueError(f"unknown classes {sorted(unknown)}: choose from {', '.join(CLASS_KINDS)}")
    labels: dict[str, int] = {}
    for label, name in enumerate(classes):
        for kind in CLASS_KINDS[name]:
            if kind in labels:
                raise ValueError(f"{classes[labels[kind]]} and {name} share images: choose one of them")
            labels[kind] = label
    return labels


def _split_frame(root: Path, source: str, split: str) -> pd.DataFrame:
    rows = []
    for folder, names in FOLDER_NAMES.items():
        top = subfolder(root / source, [folder.lower()]) if (root / source).is_dir() else None
        for path in image_files(top) if top else []:
            told = names.match(path.name)
            if told is None:
                raise ValueError(f"{path} tells no patient and kind by its name: give it the source's name")
            # The numbering begins again in the test set, so that a number alone is no patient.
            patient = f"{split}/{told['patient']}"
            rows.append((str(path), patient, split, told.groupdict().get("kind", "normal"), source))
    frame = pd.DataFrame(rows, columns=["path", "patient", "split", "kind", "source"], dtype=object)
    return frame.assign(mask=None, lesion=None).astype({"mask": object, "lesion": object})


def _notes(found: pd.DataFrame, frame: pd.DataFrame, classes: tuple[str, ...]) -> tuple[str, ...]:
    validation = int(frame["source"].eq("val").sum())
    numbers: Mapping[str, set[str]] = {
        split: set(patients.str.partition("/")[2]) for split, patients in frame.groupby("split")["patient"]
    }
    shared = len(numbers.get("train", set()) & numbers.get("test", set()))
    left_out = len(found) - len(frame)
    remarks = {
        f"{validation} official validation images count as train: too few to choose anything by": validation,
        f"{shared} patient numbers occur in both train and test and are read as different patients: the source "
        "says that its test patients are others": shared,
        f"{left_out} images that are not {' or '.join(classes)} are left out": left_out,
    }
    return tuple(remark for remark, number in remarks.items() if number)
