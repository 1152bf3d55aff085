"""Train, validation and test sets by patient: stratified, seeded, and never two sides for one patient."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import XrayTable, patients_of


def split_by_patient(table: XrayTable, *, val: float, test: float, seed: int) -> XrayTable:
    """Return the table with every image in "train", "val" or "test", whole patients at a time.

    `val` and `test` are fractions of each class's images (below 1) or numbers of images a class (1 and
    more). Splits that the source brings are kept; a missing one is drawn from the source's "train" (or from
    the images without a split). A patient counts for the class that most of its images have. With one
    image a patient the sizes are exact; with several they are met as nearly as whole patients allow.

    Raises ValueError where a class has too few patients for every split to get one.
    """
    given = set(table.frame["split"].dropna())
    wanted = {
        split: size for split, size in (("test", test), ("val", val)) if split not in given and size > 0
    }
    frame = table.frame.copy()
    free = frame["split"].isna() | (frame["split"] == "train")
    assigned = _assign_patients(frame[free], wanted, table.classes, np.random.default_rng(seed))
    frame.loc[free, "split"] = frame.loc[free, "patient"].map(assigned)
    return replace(table, frame=frame)


def _assign_patients(
    pool: pd.DataFrame, wanted: Mapping[str, float], classes: tuple[str, ...], rng: np.random.Generator
) -> dict[str, str]:
    patients = patients_of(pool)
    side = dict.fromkeys(patients.index, "train")
    for label, group in patients.groupby("label"):
        order = group.iloc[rng.permutation(len(group))]
        if len(order) <= len(wanted):
            raise ValueError(
                f"class {classes[label]!r} has {len(order)} patients: at least {len(wanted) + 1} are needed, "
                f"one each for train, {', '.join(wanted)}"
            )
        total = int(order["images"].sum())
        for split, size in wanted.items():
            target = max(1, round(size * total) if size < 1 else int(size))
            chosen = _fill(order["images"], target)
            side.update(dict.fromkeys(chosen, split))
            order = order.drop(index=chosen)
        if order.empty:
            raise ValueError(
                f"class {classes[label]!r} has {total} images: none is left to train on beside "
                + " and ".join(f"{size} for {split}" for split, size in wanted.items())
            )
    return side


def _fill(images: pd.Series, target: int) -> list[str]:
    """Return patients, in their order, whose images together come to `target` without passing it.

    Where even one passes it, the patient with the fewest images: better a few too many than an empty split.
    """
    chosen, count = [], 0
    for patient, number in images.items():
        if count + number <= target:
            chosen.append(patient)
            count += int(number)
    return chosen or [images.idxmin()]


def splits_frame(table: XrayTable) -> pd.DataFrame:
    """Return one row an image, by path relative to the data root: what `splits.csv` in a run folder holds."""
    frame = table.frame[["patient", "label", "split"]].copy()
    frame.insert(0, "path", table.relative_paths().to_numpy())
    frame["label"] = frame["label"].map(dict(enumerate(table.classes)))
    return frame.sort_values("path", ignore_index=True)


def apply_splits(table: XrayTable, path: Path, classes: tuple[str, ...]) -> XrayTable:
    """Return the images that the file `splits.csv` lists, in its order, with its splits and its labels as
    indices into `classes`, which are those that the networks were trained on.

    Give it the whole table, neither limited nor split. Raises FileNotFoundError or ValueError where the file,
    a class or an image is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    saved = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not saved["label"].isin(classes).all():
        raise ValueError(f"{path} is about other classes than {', '.join(classes)}: train again")
    rows = table.frame.set_index(table.relative_paths().to_numpy())
    missing = saved.loc[~saved["path"].isin(rows.index), "path"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} images of {path} are not in {table.root}, for example {missing.iloc[0]}: "
            "train again, or give the data_root that was used"
        )
    labels = saved["label"].map({name: index for index, name in enumerate(classes)})
    frame = rows.loc[saved["path"]].reset_index(drop=True)
    frame = frame.assign(split=saved["split"].astype(object), label=labels.astype("int64"))
    boxes = table.boxes[table.boxes["path"].isin(frame["path"])].reset_index(drop=True)
    boxes = boxes.assign(label=boxes["path"].map(frame.set_index("path")["label"]))
    return replace(table, frame=frame, classes=classes, boxes=boxes)
