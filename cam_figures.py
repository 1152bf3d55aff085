"""Choose test images and explain them: what the Grad-CAM figures of notebook 3 show."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from datasets import XrayTable
from datasets.table import NO_FINDING, relative_paths
from grad_cam import explain
from plot_utils import CamPanel, CamSample
from predictions import Predictions
from trained_networks import TrainedNetwork
from utils import read_xray

MOST_FINDINGS = 6  # rows of a figure that can still be read


class Outcome(NamedTuple):
    """Test images of one kind, by path below the data root, and the class whose map they are shown with."""

    paths: list[str]
    class_index: int


def cam_panel(trained: TrainedNetwork, xray: np.ndarray, class_index: int) -> CamPanel:
    """Return what one network makes of an (H, W) uint8 X-ray, with its map for a class; over the lungs alone
    where the network sees no more. Of several findings it is titled with the one that the map is for.
    """
    said, card = explain(trained, xray, class_index), trained.card
    seen = None if trained.lungs is None else trained.lungs(xray)
    shown = class_index if card.multilabel else int(card.decide(torch.from_numpy(said.probabilities[None])))
    probability = float(said.probabilities[shown])
    title = f"{card.classes[shown]} {probability:.2f}" if card.multilabel else None
    return CamPanel(said.maps[0], card.classes[shown], probability, image=seen, title=title)


def picked_rows(test: pd.DataFrame, num_classes: int, *, seed: int) -> pd.DataFrame:
    """Return one test image a class, drawn by `seed`; of many findings those `MOST_FINDINGS` that are most
    frequent, and none without a finding.
    """
    known = test[test["label"] < num_classes]
    frequent = known["label"].value_counts().index[:MOST_FINDINGS]
    return known[known["label"].isin(frequent)].groupby("label").sample(1, random_state=seed)


def outcomes(said: Predictions, classes: Sequence[str], *, positive: int = 1) -> dict[str, Outcome]:
    """Return the kinds of test images to look at, by name.

    Of two classes the true and false positives and negatives of class `positive`, with the predicted class; of more
    those that were wrongly called each class; of several findings those that have each of the most frequent
    ones, with the finding.
    """
    if said.multilabel:
        frequent = np.argsort(-said.targets.sum(axis=0), kind="stable")[:MOST_FINDINGS]
        has = {classes[i]: Outcome(list(said.paths[said.targets[:, i] == 1]), int(i)) for i in frequent}
        return {name: outcome for name, outcome in has.items() if outcome.paths}
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
    *,
    each: int,
    seed: int,
) -> dict[str, list[CamSample]]:
    """Return up to `each` explained test images of each kind, drawn by `seed`, with the boxes of the shown class
    where the data has them.
    """
    test = table.subset("test")
    rows = test.set_index(relative_paths(test["path"], table.root).to_numpy())
    rng = np.random.default_rng(seed)
    return {
        name: [
            _sample(trained, table, rows.loc[path], outcome.class_index)
            for path in _one_a_patient(rng.permutation(np.array(outcome.paths, dtype=object)), rows)[:each]
        ]
        for name, outcome in kinds.items()
    }


def _one_a_patient(paths: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """Return the paths without the later ones of a patient: the same chest twice shows nothing new."""
    return list(rows.loc[list(paths)].drop_duplicates("patient").index)


def _sample(trained: TrainedNetwork, table: XrayTable, row: pd.Series, class_index: int) -> CamSample:
    xray, classes = read_xray(row["path"]), trained.card.classes
    said = explain(trained, xray, class_index)
    decided = trained.card.decide(torch.from_numpy(said.probabilities[None]))[0]
    if table.multilabel:  # of the finding that is shown, whatever else was found
        shown, correct = class_index, bool(decided[class_index])
        truth = ", ".join(name for name in classes if row[name]) or NO_FINDING
    else:
        shown, correct, truth = int(decided), None, classes[int(row["label"])]
    boxes = table.boxes[(table.boxes["path"] == row["path"]) & (table.boxes["label"] == class_index)]
    return CamSample(
        image=xray if trained.lungs is None else trained.lungs(xray),
        map=said.maps[0],
        predicted=classes[shown],
        truth=truth,
        probability=float(said.probabilities[shown]),
        boxes=boxes[["x", "y", "width", "height"]].to_numpy(float),
        correct=correct,
    )
