"""Training, validation and test sets by patient: stratified, drawn by a seed, each patient in one set only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import XrayTable, first_patients, patients_of, rarest_findings, target_names


def split_by_patient(table: XrayTable, *, val: float, test: float, seed: int) -> XrayTable:
    """Return the table with every image in "train", "val" or "test", whole patients at a time.

    The splits of the source stay. A missing one is drawn from the source's "train", or from the images without a
    split. A patient counts for the class that most of its images have; in a multi-label table, for its rarest finding.
    A finding too rare for every split to get a patient is left to train.

    Args:
        table: not split, or with some of the splits.
        val: below 1 a fraction of each class's images, from 1 on a number of images a class. With one image a patient
            the size is exact; else it is met within half a patient a class, see `table.first_patients`.
        test: likewise.
        seed: of the draw.

    Raises:
        ValueError: a class has too few patients for every split to get one.
    """
    present = set(table.frame["split"].dropna())
    sizes = {split: size for split, size in (("test", test), ("val", val)) if split not in present and size > 0}
    frame = table.frame.copy()
    free = frame["split"].isna() | (frame["split"] == "train")
    patients = patients_of(frame[free], no_finding=table.no_finding)
    split_of = dict.fromkeys(patients.index, "train")
    rng = np.random.default_rng(seed)
    for label, group in patients.groupby("label"):
        images = group["images"].iloc[rng.permutation(len(group))]
        try:
            split_of |= _held_out(images, sizes)
        except ValueError as error:
            if not table.multilabel:
                raise ValueError(f"class {table.classes[label]!r} has {error}") from None
    frame.loc[free, "split"] = frame.loc[free, "patient"].map(split_of)
    empty = set(sizes) - set(frame["split"])
    if empty:
        raise ValueError(f"{len(table)} images are too few to fill {' and '.join(sorted(empty))}: take more")
    return replace(table, frame=frame)


def _held_out(images: pd.Series, sizes: Mapping[str, float]) -> dict[str, str]:
    """Return patient -> split for those patients of one class who are not for training.

    `images` are the numbers of images of the patients, in random order; `sizes` the sizes of the splits. Raises
    ValueError where the patients are too few for all these splits and for training.
    """
    if len(images) <= len(sizes):
        splits = ", ".join(("train", *sizes))
        raise ValueError(f"{len(images)} patients: at least {len(sizes) + 1} are needed, one each for {splits}")
    total, split_of = int(images.sum()), {}
    targets = {split: max(1, round(size * total) if size < 1 else int(size)) for split, size in sizes.items()}
    if sum(targets.values()) >= total:
        text = " and ".join(f"{size} for {split}" for split, size in sizes.items())
        raise ValueError(f"{total} images: none is left to train on beside {text}")
    for remaining, (split, target) in zip(range(len(targets), 0, -1), targets.items(), strict=True):
        # At least one patient stays for each of the remaining splits, train among them.
        chosen = first_patients(images, target)[: len(images) - remaining]
        split_of |= dict.fromkeys(chosen, split)
        images = images.drop(index=chosen)
    return split_of


def boxes_held_out(table: XrayTable) -> XrayTable:
    """Return the split table with all images of patients who have a box in "test".

    Boxes are there to score the maps of networks that have not seen the patient.
    """
    frame = table.frame.copy()
    boxed = frame.loc[frame["path"].isin(table.boxes["path"]), "patient"]
    frame.loc[frame["patient"].isin(boxed), "split"] = "test"
    return replace(table, frame=frame)


def split_into_folds(table: XrayTable, *, folds: int, fold: int, test: float, seed: int) -> XrayTable:
    """Return the table with one part of all images outside the test in "val" and the other parts in "train".

    The test images are those of `split_by_patient` (the source's own, else drawn), the same for every fold. All others,
    with the source's validation images, are divided by patient into parts with nearly the same shares of the classes:
    each image is in "val" in exactly one fold.

    Args:
        table: not split yet, except by the source.
        folds: number of parts.
        fold: the part that validates, from 1.
        test: size of the test set, as in `split_by_patient`.
        seed: of the draws.

    Raises:
        ValueError: a class has fewer patients than there are folds.
    """
    undivided = table.frame.assign(split=table.frame["split"].mask(table.frame["split"] == "val", "train"))
    table = split_by_patient(replace(table, frame=undivided), val=0, test=test, seed=seed)
    rest = table.frame[table.frame["split"] == "train"]
    patients = patients_of(rest, no_finding=table.no_finding)
    counts = patients["label"].value_counts()
    if not table.multilabel and counts.min() < folds:
        raise ValueError(
            f"class {table.classes[counts.idxmin()]!r} has {counts.min()} patients to train on: take {counts.min()} "
            "folds at most"
        )
    part = _parts(patients, folds, np.random.default_rng(seed))
    chosen = rest["patient"].map(part) == fold
    frame = table.frame.copy()
    frame.loc[chosen.index[chosen], "split"] = "val"
    return replace(table, frame=frame)


def _parts(patients: pd.DataFrame, folds: int, rng: np.random.Generator) -> dict[str, int]:
    """Return patient -> part, 1 to `folds`; the parts have nearly the same number of images of each class.

    Each patient, those with most images first, goes to the part that has the fewest images of its class.
    (scikit-learn's StratifiedGroupKFold does the same by standard deviations: ten seconds for 30,000 patients.)
    """
    part: dict[str, int] = {}
    total = [0] * folds
    for _, group in patients.groupby("label"):
        order = group["images"].iloc[rng.permutation(len(group))].sort_values(ascending=False, kind="stable")
        of_class = [0] * folds
        for patient, images in order.items():
            smallest = min(zip(of_class, total, range(folds), strict=True))[-1]
            part[patient] = smallest + 1
            of_class[smallest] += images
            total[smallest] += images
    return part


def thinned(table: XrayTable, *, keep: float, seed: int) -> XrayTable:
    """Return the multi-label table with a share of the training images that have no finding, drawn by `seed`.

    `keep` is that share, above 0 and at most 1. Validation and test keep all their images, because results are judged
    by them.
    """
    if not table.multilabel:
        raise ValueError("only multi-label data has images without a finding to thin out: leave `keep` at 1")
    frame = table.frame
    healthy = frame.loc[(frame["split"] == "train") & (frame["label"] == len(table.classes)), "path"]
    # Sorted, so that the draw does not depend on the order of the rows.
    shuffled = np.random.default_rng(seed).permutation(np.sort(healthy.to_numpy(object)))
    dropped = shuffled[round(keep * len(shuffled)) :]
    note = f"{len(healthy) - len(dropped)} of {len(healthy)} training images without a finding are kept"
    return table.of_images(~frame["path"].isin(dropped), note=note)


def splits_frame(table: XrayTable) -> pd.DataFrame:
    """Return the content of `splits.csv`, a row an image: path below the data root, patient, label, split.

    The labels are written as `target_names` writes them.
    """
    frame = table.frame[["patient", "label", "split"]].assign(label=target_names(table))
    frame.insert(0, "path", table.relative_paths().to_numpy())
    return frame.sort_values("path", ignore_index=True)


def apply_splits(table: XrayTable, path: Path, classes: tuple[str, ...]) -> XrayTable:
    """Return the images that a file `splits.csv` lists, in its order, with its splits and with `classes`.

    The labels or findings are the table's, and must be those of the file.

    Args:
        table: the whole table, neither limited nor split.
        path: the file `splits.csv` of a run folder.
        classes: the classes that the networks of the run were trained on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a class or an image is missing, or a label or finding is another one now.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    saved = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.multilabel:
        if not set(classes) <= set(table.classes):
            raise ValueError(f"{path} is about other findings than {', '.join(table.classes)}: train again")
        table = _with_classes(table, classes)
    elif not saved["label"].isin(classes).all():
        raise ValueError(f"{path} is about other classes than {', '.join(classes)}: train again")
    rows = table.frame.set_index(table.relative_paths().to_numpy())
    missing = saved.loc[~saved["path"].isin(rows.index), "path"]
    if len(missing):
        raise ValueError(
            f"{len(missing)} images of {path} are not in {table.root}, for example {missing.iloc[0]}: "
            "train again, or give the data_root that was used"
        )
    frame = rows.loc[saved["path"]].reset_index(drop=True).assign(split=saved["split"].astype(object))
    boxes = table.boxes[table.boxes["path"].isin(frame["path"])].reset_index(drop=True)
    table = replace(table, frame=frame, boxes=boxes)
    _refuse_changed_labels(table, saved, path)
    return table if table.multilabel else _with_classes(table, classes)


def _with_classes(table: XrayTable, classes: tuple[str, ...]) -> XrayTable:
    """Return the table with `classes`, in their order; no image of a single-label table may have another one."""
    labels = {index: classes.index(name) for index, name in enumerate(table.classes) if name in classes}
    boxes = table.boxes.assign(label=table.boxes["label"].map(labels)).dropna(subset="label")
    boxes = boxes.astype({"label": "int64"}).reset_index(drop=True)
    if table.multilabel:
        findings = table.frame[list(classes)]
        others = table.frame.drop(columns=list(table.classes)).assign(label=rarest_findings(findings))
        return replace(table, frame=pd.concat([others, findings], axis=1), classes=classes, boxes=boxes)
    frame = table.frame.assign(label=table.frame["label"].map(labels).astype("int64"))
    return replace(table, frame=frame, classes=classes, boxes=boxes)


def _refuse_changed_labels(table: XrayTable, saved: pd.DataFrame, path: Path) -> None:
    now, before = pd.Series(target_names(table)), saved["label"]
    if table.multilabel:  # the order in which findings are written does not matter
        now, before = (names.str.split("|").map(frozenset) for names in (now, before))
    changed = saved.loc[now != before, "path"]
    if len(changed):
        raise ValueError(
            f"{len(changed)} images of {path} have other labels now, for example {changed.iloc[0]}: train again"
        )
