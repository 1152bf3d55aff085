"""Training, validation and test sets by patient: stratified, drawn by a seed, each patient in one set only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import XrayTable, first_patients, patients_of, refuse_images, target_names, with_classes


def split_by_patient(table: XrayTable, *, val: float, test: float, seed: int) -> XrayTable:
    """Return the table with every image in "train", "val" or "test", whole patients at a time.

    The splits of the source stay. A missing one is drawn from the source's "train", or from the images without a
    split. A patient counts for the class that most of its images have; in a multi-label table, for its rarest finding.
    If a finding has too few patients to put one into every split, they all go to "train".

    Args:
        table: not split, or with some of the splits.
        val: below 1 a fraction of each class's images, from 1 on a number of images in each class. If each patient has
            one image, the size is exact; else it differs by at most half a patient in each class, see
            `table.first_patients`.
        test: size of the test set, in the same unit as `val`.
        seed: seed of the draw.

    Raises:
        ValueError: a class has too few patients to put one into every split.
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
    """Return patient -> split for the patients of one class that are not for training.

    `images` has the number of images of each patient, in random order; `sizes` has the sizes of the splits. Raises
    ValueError if the patients are too few for these splits and for training.
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
        # At least one patient is left for each remaining split and for train.
        chosen = first_patients(images, target)[: len(images) - remaining]
        split_of |= dict.fromkeys(chosen, split)
        images = images.drop(index=chosen)
    return split_of


def boxes_held_out(table: XrayTable) -> XrayTable:
    """Return the split table where all images of patients with a box are in "test".

    Boxes score the maps of a network, which must not have been trained on these patients.
    """
    boxed = table.frame.loc[table.frame["path"].isin(table.boxes["path"]), "patient"]
    split = table.frame["split"].mask(table.frame["patient"].isin(boxed), "test")
    return replace(table, frame=table.frame.assign(split=split))


def split_into_folds(table: XrayTable, *, folds: int, fold: int, test: float, seed: int) -> XrayTable:
    """Return the table with one part of all images outside the test in "val" and the other parts in "train".

    The test images are those of `split_by_patient`, the same for every fold. All other images, also the source's
    validation images, are divided by patient into parts with nearly the same shares of the classes. Each part is "val"
    in exactly one fold.

    Args:
        table: not split yet, except by the source.
        folds: number of parts.
        fold: number of the part for validation, from 1.
        test: size of the test set, as in `split_by_patient`.
        seed: seed of the draws.

    Raises:
        ValueError: a class has fewer patients than there are folds.
    """
    frame = table.frame.assign(split=table.frame["split"].replace("val", "train"))
    table = split_by_patient(replace(table, frame=frame), val=0, test=test, seed=seed)
    rest = table.frame[table.frame["split"] == "train"]
    patients = patients_of(rest, no_finding=table.no_finding)
    counts = patients["label"].value_counts()
    fewest = counts.min()
    if not table.multilabel and fewest < folds:
        name = table.classes[counts.idxmin()]
        raise ValueError(f"class {name!r} has {fewest} patients to train on: take {fewest} folds at most")
    part = _parts(patients, folds, np.random.default_rng(seed))
    validation = table.frame["patient"].map(part) == fold
    return replace(table, frame=table.frame.assign(split=table.frame["split"].mask(validation, "val")))


def _parts(patients: pd.DataFrame, folds: int, rng: np.random.Generator) -> dict[str, int]:
    """Return patient -> part, 1 to `folds`; the parts have nearly the same number of images of each class.

    Patients with the most images come first. Each goes to the part that has the fewest images of the patient's class.
    (scikit-learn's StratifiedGroupKFold compares standard deviations instead: ten seconds for 30,000 patients.)
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
    """Return the multi-label table with only a share of the training images without a finding, drawn by `seed`.

    `keep` is that share, above 0 and at most 1. Validation and test keep all their images, so that scores stay
    comparable.
    """
    if not table.multilabel:
        raise ValueError("only multi-label data has images without a finding: set keep_without_finding = 1")
    frame = table.frame
    healthy = frame.loc[(frame["split"] == "train") & (frame["label"] == table.no_finding), "path"]
    # Sorted, so that the draw does not depend on the order of the rows.
    shuffled = np.random.default_rng(seed).permutation(np.sort(healthy.to_numpy(object)))
    dropped = shuffled[round(keep * len(shuffled)) :]
    note = f"{len(healthy) - len(dropped)} of {len(healthy)} training images without a finding are kept"
    return table.of_images(~frame["path"].isin(dropped), note=note)


def splits_frame(table: XrayTable) -> pd.DataFrame:
    """Return the content of `splits.csv`: a row per image, columns `path` (below the data root), `patient`, `label` and
    `split`. `target_names` explains the labels.
    """
    frame = table.frame[["patient", "label", "split"]].assign(label=target_names(table))
    frame.insert(0, "path", table.relative_paths().to_numpy())
    return frame.sort_values("path", ignore_index=True)


def apply_splits(table: XrayTable, path: Path, classes: tuple[str, ...]) -> XrayTable:
    """Return the images listed in a file `splits.csv`, in its order, with its splits and with `classes`.

    The labels come from the table. They must be the same as in the file.

    Args:
        table: the whole table, neither limited nor split.
        path: the file `splits.csv` of a run folder.
        classes: the classes that the networks of the run were trained on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a class or an image is missing, or a label has changed since.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    saved = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.multilabel:
        if not set(classes) <= set(table.classes):
            raise ValueError(f"{path} is about other findings than {', '.join(table.classes)}: train again")
        table = with_classes(table, classes)
    elif not saved["label"].isin(classes).all():
        raise ValueError(f"{path} is about other classes than {', '.join(classes)}: train again")
    rows = table.frame.set_index(table.relative_paths().to_numpy())
    missing = saved.loc[~saved["path"].isin(rows.index), "path"]
    remedy = "train again, or give the data_root that was used"
    refuse_images(missing, f"of {path} are not in {table.root}", remedy)
    frame = rows.loc[saved["path"]].reset_index(drop=True).assign(split=saved["split"].astype(object))
    boxes = table.boxes[table.boxes["path"].isin(frame["path"])].reset_index(drop=True)
    table = replace(table, frame=frame, boxes=boxes)
    now, before = pd.Series(target_names(table)), saved["label"]
    if table.multilabel:  # the order in which findings are written does not matter
        now, before = (names.str.split("|").map(frozenset) for names in (now, before))
    refuse_images(saved.loc[now != before, "path"], f"of {path} have other labels now", "train again")
    return table if table.multilabel else with_classes(table, classes)
