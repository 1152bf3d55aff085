"""Train, validation and test sets by patient: stratified, seeded, and never two sides for one patient."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.table import XrayTable, first_patients, patients_of, rarest_findings, target_names


def split_by_patient(table: XrayTable, *, val: float, test: float, seed: int) -> XrayTable:
    """Return the table with every image in "train", "val" or "test", whole patients at a time.

    `val` and `test` are fractions of each class's images (below 1) or numbers of images a class (1 and
    more). Splits that the source brings are kept; a missing one is drawn from the source's "train" (or from
    the images without a split). A patient counts for the class that most of its images have. With one
    image a patient the sizes are exact; with several they are met within half a patient a class, whether patients have
    few images or many (see `table.first_patients`).

    In a multi-label table a patient counts for its rarest finding, and a finding too rare for every split to
    get a patient of its stratum is left to train.

    Raises ValueError where a class has too few patients for every split to get one.
    """
    given = set(table.frame["split"].dropna())
    wanted = {
        split: size for split, size in (("test", test), ("val", val)) if split not in given and size > 0
    }
    frame = table.frame.copy()
    free = frame["split"].isna() | (frame["split"] == "train")
    patients = patients_of(frame[free], no_finding=_no_finding(table))
    side = dict.fromkeys(patients.index, "train")
    rng = np.random.default_rng(seed)
    for label, group in patients.groupby("label"):
        order = group["images"].iloc[rng.permutation(len(group))]
        try:
            side |= _held_out(order, wanted)
        except ValueError as error:
            if not table.multilabel:
                raise ValueError(f"class {table.classes[label]!r} has {error}") from None
    frame.loc[free, "split"] = frame.loc[free, "patient"].map(side)
    empty = set(wanted) - set(frame["split"])
    if empty:
        raise ValueError(f"{len(table)} images are too few to fill {' and '.join(sorted(empty))}: take more")
    return replace(table, frame=frame)


def _no_finding(table: XrayTable) -> int | None:
    """Return the label of images without any finding, None in a single-label table."""
    return len(table.classes) if table.multilabel else None


def _held_out(images: pd.Series, wanted: Mapping[str, float]) -> dict[str, str]:
    """Return the split of each patient of one class that is not for training, from their numbers of `images`, in random
    order.

    Raises ValueError where they are too few for all the splits `wanted` and for training.
    """
    if len(images) <= len(wanted):
        raise ValueError(
            f"{len(images)} patients: at least {len(wanted) + 1} are needed, one each for train, "
            f"{', '.join(wanted)}"
        )
    total, side = int(images.sum()), {}
    targets = {
        split: max(1, round(size * total) if size < 1 else int(size)) for split, size in wanted.items()
    }
    if sum(targets.values()) >= total:
        sizes = " and ".join(f"{size} for {split}" for split, size in wanted.items())
        raise ValueError(f"{total} images: none is left to train on beside {sizes}")
    for following, (split, target) in zip(range(len(targets), 0, -1), targets.items(), strict=True):
        # One patient at least is left for each split that follows, train among them.
        chosen = first_patients(images, target)[: len(images) - following]
        side |= dict.fromkeys(chosen, split)
        images = images.drop(index=chosen)
    return side


def boxes_held_out(table: XrayTable) -> XrayTable:
    """Return the split table with every image of a patient who has a box in "test": boxes are there to score maps
    with, of networks that have not seen the patient.
    """
    frame = table.frame.copy()
    boxed = frame.loc[frame["path"].isin(table.boxes["path"]), "patient"]
    frame.loc[frame["patient"].isin(boxed), "split"] = "test"
    return replace(table, frame=frame)


def split_into_folds(table: XrayTable, *, folds: int, fold: int, test: float, seed: int) -> XrayTable:
    """Return the table with the part number `fold`, from 1, of `folds` in "val" and the others in "train".

    The test images are those of `split_by_patient` (the source's own, else drawn), the same for every fold.
    All others, with the source's validation images, are divided by patient into parts with nearly the same
    shares of the classes: each is in "val" in exactly one fold.

    Raises ValueError where a class has fewer patients than there are folds, or the fold is none of them.
    """
    if not 1 <= fold <= folds or folds < 2:
        raise ValueError(f"fold {fold} of {folds}: folds are two or more and numbered from 1")
    undivided = table.frame["split"].mask(table.frame["split"] == "val", "train")
    table = split_by_patient(
        replace(table, frame=table.frame.assign(split=undivided)), val=0, test=test, seed=seed
    )
    rest = table.frame[table.frame["split"] == "train"]
    patients = patients_of(rest, no_finding=_no_finding(table))
    if not table.multilabel and (few := patients["label"].value_counts()).min() < folds:
        raise ValueError(
            f"class {table.classes[few.idxmin()]!r} has {few.min()} patients to train on: take {few.min()} folds "
            "at most"
        )
    part = _parts(patients, folds, np.random.default_rng(seed))
    chosen = rest["patient"].map(part) == fold
    frame = table.frame.copy()
    frame.loc[chosen.index[chosen], "split"] = "val"
    return replace(table, frame=frame)


def _parts(patients: pd.DataFrame, folds: int, rng: np.random.Generator) -> dict[str, int]:
    """Return the part, 1 to `folds`, of each patient; the parts have equally many images of each class, nearly.

    The next patient, those with most images first, goes to the part that has the fewest images of its class.
    (scikit-learn's StratifiedGroupKFold does the same by standard deviations: ten seconds for 30,000 patients.)
    """
    part: dict[str, int] = {}
    total = [0] * folds
    for _, group in patients.groupby("label"):
        order = group["images"].iloc[rng.permutation(len(group))].sort_values(ascending=False, kind="stable")
        here = [0] * folds
        for patient, images in order.items():
            lightest = min(range(folds), key=lambda k, here=here: (here[k], total[k]))
            part[patient] = lightest + 1
            here[lightest] += images
            total[lightest] += images
    return part


def thinned(table: XrayTable, *, keep: float, seed: int) -> XrayTable:
    """Return the multi-label table with the share `keep` of the training images that have no finding, chosen by
    `seed`; validation and test, by which results are judged, keep all of theirs.
    """
    if not table.multilabel:
        raise ValueError("only multi-label data has images without a finding to thin out: leave `keep` at 1")
    if not 0 < keep <= 1:
        raise ValueError(f"the share of images to keep is above 0 and at most 1, not {keep}")
    frame = table.frame
    healthy = frame.loc[(frame["split"] == "train") & (frame["label"] == len(table.classes)), "path"]
    # In the order of the paths, so that the order of the rows decides nothing.
    shuffled = np.random.default_rng(seed).permutation(np.sort(healthy.to_numpy(object)))
    dropped = shuffled[round(keep * len(shuffled)) :]
    note = f"{len(healthy) - len(dropped)} of {len(healthy)} training images without a finding are kept"
    return table.of_images(~frame["path"].isin(dropped), note=note)


def splits_frame(table: XrayTable) -> pd.DataFrame:
    """Return one row an image, by path relative to the data root: what `splits.csv` in a run folder holds.

    The label is spelt as `target_names` does.
    """
    frame = table.frame[["patient", "label", "split"]].assign(label=target_names(table))
    frame.insert(0, "path", table.relative_paths().to_numpy())
    return frame.sort_values("path", ignore_index=True)


def apply_splits(table: XrayTable, path: Path, classes: tuple[str, ...]) -> XrayTable:
    """Return the images that the file `splits.csv` lists, in its order, with its splits and with `classes`, which
    are those that the networks were trained on.

    The labels or findings are the table's, and must be those of the file. Give it the whole table, neither limited
    nor split. Raises FileNotFoundError or ValueError where the file, a class or an image is missing, or a label or
    finding is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run notebook 2 or finetune.py first")
    saved = pd.read_csv(path, dtype=str, keep_default_na=False)
    if table.multilabel:
        table = _with_findings(table, path, classes)
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
    if table.multilabel:
        table = replace(table, frame=frame, boxes=boxes)
        _refuse_other_findings(table, saved, path)
        return table
    own = np.array(table.classes)[frame["label"]]
    if (own != saved["label"]).any():
        turned = saved.loc[own != saved["label"], "path"]
        raise ValueError(
            f"{len(turned)} images of {path} have other labels now, for example {turned.iloc[0]}: train again"
        )
    labels = saved["label"].map({name: index for index, name in enumerate(classes)})
    frame = frame.assign(label=labels.astype("int64"))
    boxes = boxes.assign(label=boxes["path"].map(frame.set_index("path")["label"]))
    return replace(table, frame=frame, classes=classes, boxes=boxes)


def _with_findings(table: XrayTable, path: Path, classes: tuple[str, ...]) -> XrayTable:
    """Return the multi-label table with the findings `classes`, some of its own, in that order."""
    if not set(classes) <= set(table.classes):
        raise ValueError(f"{path} is about other findings than {', '.join(table.classes)}: train again")
    findings = table.frame[list(classes)]
    others = [column for column in table.frame if column not in table.classes]
    frame = pd.concat([table.frame[others].assign(label=rarest_findings(findings)), findings], axis=1)
    names = table.boxes["label"].map(dict(enumerate(table.classes)))
    boxes = table.boxes.assign(label=names.map({name: index for index, name in enumerate(classes)}))
    boxes = boxes[names.isin(classes)].astype({"label": "int64"}).reset_index(drop=True)
    return replace(table, frame=frame, classes=classes, boxes=boxes)


def _refuse_other_findings(table: XrayTable, saved: pd.DataFrame, path: Path) -> None:
    now = pd.Series(target_names(table)).str.split("|").map(frozenset)  # in whatever order they were spelt
    differing = saved.index[saved["label"].str.split("|").map(frozenset) != now]
    if len(differing):
        raise ValueError(
            f"{len(differing)} images of {path} have other findings now, for example "
            f"{saved['path'][differing[0]]}: train again"
        )
