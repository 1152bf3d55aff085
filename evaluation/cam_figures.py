"""Choose test images and explain them: the Grad-CAM figures of notebook 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from cams.methods import METHODS
from cams.panels import CamPanel, CamRow, draw_cam_grid, draw_grad_cams
from datasets import XrayTable
from datasets.table import NO_FINDING, relative_paths
from evaluation.map_cases import MapCase, lungs_of, refuse_other_answer, stored_probabilities
from evaluation.map_report import FindLungs, MapReport, cases_of
from evaluation.predictions import Predictions, decide
from evaluation.report import Results
from inference.explanations import explain
from inference.trained_networks import TrainedNetwork
from utils import read_mask, read_xray

MOST_FINDINGS = 6  # rows of a figure that can still be read
OF_A_KIND = 4  # mistakes of one kind in a figure
METHOD_ROWS = 3  # X-rays in the figure of the methods


class Outcome(NamedTuple):
    """Test images of one kind, by path below the data root, and the class whose map they are shown with."""

    paths: list[str]
    class_index: int


def examples(results: Results) -> Figure | Markdown:
    """Return one test image of each class with every network's map for that class."""
    answers = results.test[results.example]
    images = picked_rows(results.table.subset("test"), answers.reported, seed=results.study.seed)
    stored = {title: stored_probabilities(results.test[title], results.table) for title in results.networks}
    rows = []
    for case in (_case(results.table, image) for image in images.to_dict("records")):
        panels = {
            title: cam_panel(network, case._replace(probabilities=stored[title][case.path]))
            for title, network in results.networks.items()
        }
        rows.append(_row(case, panels))
    return _figure(rows)


def both_classes(results: Results) -> Figure | Markdown:
    """Return two test images of each of two classes, with the maps for the predicted and for the other class."""
    if results.positive is None:
        return Markdown("*This study does not have two classes.*")
    table, seed, trained = results.table, results.study.seed, results.networks[results.example]
    stored = stored_probabilities(results.test[results.example], table)
    rows = []
    for image in table.subset("test").groupby("label").sample(2, random_state=seed).to_dict("records"):
        case = _case(table, image)._replace(probabilities=stored[image["path"]])
        panels = {name: cam_panel(trained, case._replace(class_index=i)) for i, name in enumerate(table.classes)}
        predicted = panels[panels[table.classes[0]].predicted]
        (other,) = set(table.classes) - {predicted.predicted}
        unmarked = {"predicted": other, "probability": 1 - predicted.probability, "correct": None}
        both = {"the predicted class": predicted, "the other class": panels[other]._replace(**unmarked)}
        rows.append(_row(case, both))
    return _figure(rows, results.example)


def mistakes(results: Results) -> Figure | Markdown:
    """Return test images that the shown network classified correctly or wrongly, by kind (see `outcomes`)."""
    answers, trained = results.test[results.example], results.networks[results.example]
    kinds = outcomes(answers, results.table.classes, positive=results.positive)
    samples = cam_samples(trained, results.table, answers, kinds, seed=results.study.seed)
    if not samples:
        return Markdown("*No test image has a finding.*")
    fig = Figure(figsize=(10, 2.75 * len(samples)), layout="constrained")
    fig.suptitle(results.example)
    return draw_cam_grid(fig, samples)


def methods(results: Results, maps: MapReport) -> Figure | Markdown:
    """Return a few test images with the shown network's maps by every method of the study."""
    trained, names = results.networks[results.example], results.study.maps.methods
    cases = cases_of(results, results.example)
    rows = method_rows(trained, cases, names, find_lungs=maps.find_lungs, seed=results.study.seed)
    return _figure(rows, results.example)


def _figure(rows: Sequence[CamRow], title: str = "") -> Figure | Markdown:
    if not rows:
        return Markdown("*No test image was classified correctly, or has a finding.*")
    fig = Figure(figsize=(2.3 * (1 + len(rows[0].panels)) + 1.6, 2.6 * len(rows)), layout="constrained")
    fig.suptitle(title)
    return draw_grad_cams(fig, rows)


def _case(table: XrayTable, image: Mapping[str, object]) -> MapCase:
    """Return an image of a table with its class (of several findings, the rarest) and its masks."""
    index = int(image["label"])
    subject = image["path"], image["patient"], index, table.classes[index]
    return MapCase(*subject, lesion=image["lesion"], lung=image["mask"])


def _row(case: MapCase, panels: Mapping[str, CamPanel], find_lungs: FindLungs = None) -> CamRow:
    """Return the panels of an X-ray with all that is known of where to look."""
    xray = read_xray(case.path)
    lesion = None if case.lesion is None else read_mask(case.lesion, xray.shape)
    return CamRow(xray, case.label, panels, lesion, lungs_of(case, xray, find_lungs), case.boxes)


def cam_panel(trained: TrainedNetwork, case: MapCase, *, method: str = "gradcam") -> CamPanel:
    """Return a network's map of an X-ray, with the class that it predicted; of several findings, with that of the map.

    Args:
        trained: the network.
        case: an X-ray, the class of the map, the (C,) probabilities that were stored for it and, as label, its true
            class.
        method: a name of `cams.methods.METHODS`.

    Raises:
        ValueError: the network gives the X-ray other probabilities than those that were stored.
    """
    xray, card, stored = read_xray(case.path), trained.card, case.probabilities
    answer = explain(trained, xray, case.class_index, method=method)
    refuse_other_answer(trained, case.path, answer.probabilities, stored)
    decided = decide(stored[None], card.thresholds, multilabel=card.multilabel)[0]
    shown = case.class_index if card.multilabel else int(decided)
    correct = bool(decided[shown]) if card.multilabel else card.classes[shown] == case.label
    if np.isnan(stored[shown]):
        correct = None  # the network does not report the finding
    seen = None if trained.lungs is None else trained.lungs(xray)
    return CamPanel(answer.maps[0], card.classes[shown], float(stored[shown]), correct, seen)


def picked_rows(test: pd.DataFrame, reported: np.ndarray, *, seed: int) -> pd.DataFrame:
    """Return one test image of each class, drawn by `seed`. Of many findings those `MOST_FINDINGS` are shown that are
    most frequent among the `reported` ones, (C,) bool.
    """
    with_class = test[np.append(reported, False)[test["label"]]]
    frequent = with_class["label"].value_counts().index[:MOST_FINDINGS]
    return with_class[with_class["label"].isin(frequent)].groupby("label").sample(1, random_state=seed)


def outcomes(answers: Predictions, classes: Sequence[str], *, positive: int | None = None) -> dict[str, Outcome]:
    """Return the kinds of test images to look at, by name.

    - Two classes: the true and false positives and negatives of class `positive`, with the predicted class.
    - More classes: the images that were wrongly called each class, with that class.
    - Several findings: the images that have each of the most frequent reported ones, with the finding.
    """
    paths = np.asarray(answers.paths)
    if answers.multilabel:
        counts = np.where(answers.reported, answers.targets.sum(axis=0), 0)
        frequent = [i for i in np.argsort(-counts, kind="stable")[:MOST_FINDINGS].tolist() if counts[i]]
        return {classes[i]: Outcome(list(paths[answers.targets[:, i] == 1]), i) for i in frequent}
    kinds = {f"wrongly called {name}": (i, False) for i, name in enumerate(classes)}
    if len(classes) == 2:
        kinds = {
            f"{is_right} {sign}": (i, is_right == "true")
            for sign, i in (("positive", positive), ("negative", 1 - positive))
            for is_right in ("true", "false")
        }
    right = answers.predicted == answers.targets
    return {
        name: Outcome(list(paths[(answers.predicted == i) & (right == is_right)]), i)
        for name, (i, is_right) in kinds.items()
    }


def cam_samples(
    trained: TrainedNetwork, table: XrayTable, answers: Predictions, kinds: Mapping[str, Outcome], *, seed: int
) -> dict[str, list[CamRow]]:
    """Return up to `OF_A_KIND` explained test images of each kind, drawn by `seed`, one of a patient, with the boxes of
    the shown class.

    Raises ValueError where the network gives an image other probabilities than its `inference.answers`.
    """
    test, stored = table.subset("test"), stored_probabilities(answers, table)
    images = test.set_index(relative_paths(test["path"], table.root).to_numpy())
    rng, samples = np.random.default_rng(seed), {}
    for name, kind in kinds.items():
        drawn = images.loc[list(rng.permutation(np.array(kind.paths, dtype=object)))]
        of_patients = drawn.drop_duplicates("patient")[:OF_A_KIND].to_dict("records")
        cases = [_sample(table, image, kind.class_index) for image in of_patients]
        cases = [case._replace(probabilities=stored[case.path]) for case in cases]
        samples[name] = [_row(case, {name: cam_panel(trained, case)}) for case in cases]
    return samples


def _sample(table: XrayTable, image: Mapping[str, object], class_index: int) -> MapCase:
    """Return a case of any class, with all that is true of the image as its label and the boxes of the class."""
    findings = [name for name in table.classes if table.multilabel and image[name]]
    truth = ", ".join(findings) or NO_FINDING if table.multilabel else table.classes[int(image["label"])]
    boxes = table.boxes[(table.boxes["path"] == image["path"]) & (table.boxes["label"] == class_index)]
    fractions = boxes[["x", "y", "width", "height"]].to_numpy(float)
    return MapCase(image["path"], image["patient"], class_index, truth, boxes=fractions)


def method_rows(
    trained: TrainedNetwork, cases: Sequence[MapCase], names: Sequence[str], *, seed: int, find_lungs: FindLungs = None
) -> list[CamRow]:
    """Return `METHOD_ROWS` cases, drawn by `seed`, one of each class first, with a panel for each method."""
    order = np.random.default_rng(seed).permutation(len(cases))
    shuffled = pd.DataFrame({"case": order, "label": [cases[i].class_index for i in order]})
    shuffled["turn"] = shuffled.groupby("label").cumcount()
    drawn = [cases[i] for i in shuffled.sort_values(["turn", "label"])["case"][:METHOD_ROWS]]
    return [
        _row(case, {METHODS[name].title: cam_panel(trained, case, method=name) for name in names}, find_lungs)
        for case in drawn
    ]
