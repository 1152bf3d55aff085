"""Choose test images and explain them: what the Grad-CAM figures of notebook 3 show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cam_methods import METHODS
from datasets import XrayTable
from datasets.table import NO_FINDING, relative_paths
from explanations import explain
from map_cases import MapCase, lungs_of, refuse_other_answer, stored_probabilities
from plot_utils import CamPanel, CamRow, CamSample
from predictions import Predictions, decide
from trained_networks import TrainedNetwork
from utils import read_mask, read_xray

if TYPE_CHECKING:
    from lung_masking import LungMask

MOST_FINDINGS = 6  # rows of a figure that can still be read


class Outcome(NamedTuple):
    """Test images of one kind, by path below the data root, and the class whose map they are shown with."""

    paths: list[str]
    class_index: int


def cam_panel(
    trained: TrainedNetwork,
    path: str,
    class_index: int,
    stored: Mapping[str, np.ndarray],
    *,
    method: str = "gradcam",
) -> CamPanel:
    """Return one network's map of an X-ray in a file for a class, over the lungs alone where the network sees no more,
    and what was predicted by the `stored_probabilities`. Of several findings it is titled with the one that the map
    is for, with – where the network does not report it.

    Raises ValueError where the network now says something else than is stored.
    """
    image, map_, decided = _explained(trained, path, class_index, stored, method)
    card = trained.card
    shown = class_index if card.multilabel else int(decided)
    probability = float(stored[path][shown])
    said = "–" if np.isnan(probability) else f"{probability:.2f}"
    title = f"{card.classes[shown]} {said}" if card.multilabel else None
    return CamPanel(map_, card.classes[shown], probability, image=image, title=title)


def _explained(
    trained: TrainedNetwork,
    path: str,
    class_index: int,
    stored: Mapping[str, np.ndarray],
    method: str = "gradcam",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the (H, W) X-ray that a network sees, its map for a class, and what is decided by the stored
    probabilities: a class index, or (C,) bool of several findings.
    """
    xray, card = read_xray(path), trained.card
    said = explain(trained, xray, class_index, method=method)
    refuse_other_answer(trained, path, said.probabilities, stored[path])
    decided = decide(stored[path][None], card.thresholds, multilabel=card.multilabel)[0]
    return xray if trained.lungs is None else trained.lungs(xray), said.maps[0], decided


def picked_rows(test: pd.DataFrame, reported: np.ndarray, *, seed: int) -> pd.DataFrame:
    """Return one test image a class, drawn by `seed`; of many findings those `MOST_FINDINGS` that are most
    frequent among the `reported` ones, (C,) bool, and none without a finding.
    """
    known = test[np.append(reported, False)[test["label"]]]
    frequent = known["label"].value_counts().index[:MOST_FINDINGS]
    return known[known["label"].isin(frequent)].groupby("label").sample(1, random_state=seed)


def outcomes(said: Predictions, classes: Sequence[str], *, positive: int | None = None) -> dict[str, Outcome]:
    """Return the kinds of test images to look at, by name.

    Of two classes the true and false positives and negatives of class `positive`, with the predicted class; of more
    those that were wrongly called each class; of several findings those that have each of the most frequent
    ones, with the finding.
    """
    if said.multilabel:
        counts = np.where(said.reported, said.targets.sum(axis=0), 0)
        frequent = np.argsort(-counts, kind="stable")[:MOST_FINDINGS]
        return {
            classes[i]: Outcome(list(said.paths[said.targets[:, i] == 1]), int(i))
            for i in frequent
            if counts[i]
        }
    right, predicted = said.predicted == said.targets, said.predicted
    if len(classes) == 2:
        cells = {
            "true positive": (positive, True),
            "false positive": (positive, False),
            "true negative": (1 - positive, True),
            "false negative": (1 - positive, False),
        }
    else:
        cells = {f"wrongly called {name}": (i, False) for i, name in enumerate(classes)}
    return {
        name: Outcome(list(said.paths[(predicted == i) & (right == is_right)]), i)
        for name, (i, is_right) in cells.items()
    }


def cam_samples(
    trained: TrainedNetwork,
    table: XrayTable,
    kinds: Mapping[str, Outcome],
    said: Predictions,
    *,
    each: int,
    seed: int,
) -> dict[str, list[CamSample]]:
    """Return up to `each` explained test images of each kind, drawn by `seed`, with the network's predictions `said`,
    by which they are of that kind, and the boxes of the shown class where the data has them.

    Raises ValueError where the network now says something else.
    """
    test = table.subset("test")
    rows = test.set_index(relative_paths(test["path"], table.root).to_numpy())
    stored = stored_probabilities(said, table)
    rng = np.random.default_rng(seed)
    return {
        name: [
            _sample(trained, table, rows.loc[path], outcome.class_index, stored)
            for path in _one_a_patient(rng.permutation(np.array(outcome.paths, dtype=object)), rows)[:each]
        ]
        for name, outcome in kinds.items()
    }


def _one_a_patient(paths: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """Return the paths without the later ones of a patient: the same chest twice shows nothing new."""
    return list(rows.loc[list(paths)].drop_duplicates("patient").index)


def _sample(
    trained: TrainedNetwork,
    table: XrayTable,
    row: pd.Series,
    class_index: int,
    stored: Mapping[str, np.ndarray],
) -> CamSample:
    classes = trained.card.classes
    image, map_, decided = _explained(trained, row["path"], class_index, stored)
    if table.multilabel:  # of the finding that is shown, whatever else was found
        shown, correct = class_index, bool(decided[class_index])
        truth = ", ".join(name for name in classes if row[name]) or NO_FINDING
    else:
        shown, correct, truth = int(decided), None, classes[int(row["label"])]
    boxes = table.boxes[(table.boxes["path"] == row["path"]) & (table.boxes["label"] == class_index)]
    return CamSample(
        image=image,
        map=map_,
        predicted=classes[shown],
        truth=truth,
        probability=float(stored[row["path"]][shown]),
        boxes=boxes[["x", "y", "width", "height"]].to_numpy(float),
        correct=correct,
    )


def method_rows(
    trained: TrainedNetwork,
    cases: Sequence[MapCase],
    methods: Sequence[str],
    *,
    most: int,
    find_lungs: Callable[[np.ndarray], LungMask] | None = None,
    seed: int,
) -> list[CamRow]:
    """Return a row a case, drawn by `seed`, one of a class first, with a panel a method and all that is known of
    where to look; `find_lungs` as `score_maps` takes it.
    """
    order = np.random.default_rng(seed).permutation(len(cases))
    shuffled = pd.DataFrame({"case": order, "label": [cases[i].class_index for i in order]})
    shuffled["turn"] = shuffled.groupby("label").cumcount()
    rows = []
    for case in (cases[i] for i in shuffled.sort_values(["turn", "label"])["case"][:most]):
        xray, stored = read_xray(case.path), {case.path: case.probabilities}
        panels = {
            METHODS[name].title: cam_panel(trained, case.path, case.class_index, stored, method=name)
            for name in methods
        }
        lesion = None if case.lesion is None else read_mask(case.lesion, xray.shape)
        lung = lungs_of(case, xray, find_lungs)
        rows.append(CamRow(xray, case.label, panels, lesion=lesion, lung=lung, boxes=case.boxes))
    return rows
