"""Choose test images and explain them: the Grad-CAM figures of notebook 3."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from cams.methods import METHODS
from cams.panels import CamPanel, CamRow, draw_cam_grid, draw_grad_cams
from datasets import XrayTable
from datasets.table import NO_FINDING, relative_paths
from evaluation.map_cases import FindLungs, MapCase, lungs_of, map_case, refuse_other_answer, stored_probabilities
from evaluation.map_report import MapReport, cases_of
from evaluation.predictions import Predictions, decide
from evaluation.report import Results
from inference.explanations import explain
from inference.trained_networks import TrainedNetwork
from utils import read_mask, read_xray

MOST_FINDINGS = 6  # rows of a figure that can still be read
OF_A_KIND = 4  # images of one kind in the figure of the mistakes
METHOD_ROWS = 3  # X-rays in the figure of the methods
Kinds = Mapping[str, tuple[np.ndarray, int]]  # kind -> paths of its test images below the data root, class of the maps


def examples(results: Results) -> Figure | Markdown:
    """Return one test image of each class with every network's map for that class."""
    reported = results.test[results.example].reported
    images = picked_rows(results.table.subset("test"), reported, seed=results.study.seed)
    stored = {title: stored_probabilities(results.test[title], results.table) for title in results.networks}
    rows = []
    for image in images.to_dict("records"):
        label = int(image["label"])  # if the image has several findings, the rarest of them
        cases = {title: map_case(results.table, image, label, by_path) for title, by_path in stored.items()}
        panels = {title: cam_panel(results.networks[title], case) for title, case in cases.items()}
        rows.append(_row(cases[results.example], panels))
    return _figure(rows)


def both_classes(results: Results) -> Figure | Markdown:
    """Return two test images of each of two classes, with the maps for the predicted and for the other class."""
    if results.positive is None:
        return Markdown("*This study does not have two classes.*")
    table, seed, trained = results.table, results.study.seed, results.networks[results.example]
    stored = stored_probabilities(results.test[results.example], table)
    rows = []
    for image in table.subset("test").groupby("label").sample(2, random_state=seed).to_dict("records"):
        case = map_case(table, image, int(image["label"]), stored)
        panels = [cam_panel(trained, case._replace(class_index=i)) for i in range(2)]
        shown = table.classes.index(panels[0].predicted)
        predicted, other = panels[shown], table.classes[1 - shown]
        unmarked = panels[1 - shown]._replace(predicted=other, probability=1 - predicted.probability, correct=None)
        rows.append(_row(case, {"the predicted class": predicted, "the other class": unmarked}))
    return _figure(rows, results.example)


def mistakes(results: Results) -> Figure | Markdown:
    """Return test images that the example classified correctly or wrongly, by kind (see `outcomes`)."""
    test, trained = results.test[results.example], results.networks[results.example]
    kinds = outcomes(test, results.table.classes, positive=results.positive)
    samples = cam_samples(trained, results.table, test, kinds, seed=results.study.seed)
    if not samples:
        return Markdown("*No test image has a finding.*")
    fig = Figure(figsize=(10, 2.75 * len(samples)), layout="constrained")
    fig.suptitle(results.example)
    return draw_cam_grid(fig, samples)


def methods(results: Results, maps: MapReport) -> Figure | Markdown:
    """Return a few test images with the example's maps by every method of the study."""
    subject = results.networks[results.example], cases_of(results, results.example), results.study.maps.methods
    return _figure(method_rows(*subject, find_lungs=maps.find_lungs, seed=results.study.seed), results.example)


def _figure(rows: Sequence[CamRow], title: str = "") -> Figure | Markdown:
    if not rows:
        return Markdown("*No test image was classified correctly, or has a finding.*")
    fig = Figure(figsize=(2.3 * (1 + len(rows[0].panels)) + 1.6, 2.6 * len(rows)), layout="constrained")
    fig.suptitle(title)
    return draw_grad_cams(fig, rows)


def _row(case: MapCase, panels: Mapping[str, CamPanel], find_lungs: FindLungs = None) -> CamRow:
    """Return a row of a figure: an X-ray, its panels, its class, and the outlines of its lesion, lungs and boxes."""
    xray = read_xray(case.path)
    lesion = None if case.lesion is None else read_mask(case.lesion, xray.shape)
    boxes = case.boxes if lesion is None else ()  # the outline of a lesion says more than its box
    return CamRow(xray, case.label, panels, lesion, lungs_of(case, xray, find_lungs), boxes)


def cam_panel(trained: TrainedNetwork, case: MapCase, *, method: str = "gradcam") -> CamPanel:
    """Return a panel: a network's map of an X-ray and the predicted class (for several findings: the class of the map).

    Args:
        trained: the network.
        case: the X-ray, the class of the map, and the stored (C,) probabilities. Its label is the true class.
        method: a name of `cams.methods.METHODS`.

    Raises:
        ValueError: the network's probabilities for the X-ray are not the stored ones.
    """
    xray, card, stored = read_xray(case.path), trained.card, case.probabilities
    explanation = explain(trained, xray, case.class_index, method=method)
    refuse_other_answer(trained, case.path, explanation.probabilities, stored)
    decision = decide(stored[None], card.thresholds, multilabel=card.multilabel)[0]
    shown = case.class_index if card.multilabel else int(decision)
    correct = bool(decision[shown]) if card.multilabel else card.classes[shown] == case.label
    if np.isnan(stored[shown]):
        correct = None  # the network does not report the finding
    seen = None if trained.lungs is None else trained.lungs(xray)
    return CamPanel(explanation.maps[0], card.classes[shown], float(stored[shown]), correct, seen)


def picked_rows(test: pd.DataFrame, reported: np.ndarray, *, seed: int) -> pd.DataFrame:
    """Return one test image of each class, drawn by `seed`: of the `reported` classes, (C,) bool, the
    `MOST_FINDINGS` most frequent ones.
    """
    with_class = test[np.append(reported, False)[test["label"]]]
    frequent = with_class["label"].value_counts().index[:MOST_FINDINGS]
    return with_class[with_class["label"].isin(frequent)].groupby("label").sample(1, random_state=seed)


def outcomes(predictions: Predictions, classes: Sequence[str], *, positive: int | None = None) -> Kinds:
    """Return, by kind of test image, the paths of its images below the data root and the class of their maps.

    - Two classes: true and false positives and negatives; class `positive` is the positive one. Maps: predicted class.
    - More classes: for each class, the images that were wrongly called this class. Maps: this class.
    - Several findings: for each of the most frequent reported findings, the images that have it. Maps: this finding.
    """
    paths, targets, predicted = predictions.paths, predictions.targets, predictions.predicted
    if predictions.multilabel:
        counts = np.where(predictions.reported, targets.sum(axis=0), 0)
        frequent = [i for i in np.argsort(-counts, kind="stable")[:MOST_FINDINGS].tolist() if counts[i]]
        return {classes[i]: (paths[targets[:, i] == 1], i) for i in frequent}
    if len(classes) > 2:
        return {
            f"wrongly called {name}": (paths[(predicted == i) & (targets != i)], i) for i, name in enumerate(classes)
        }
    kinds = {}
    for sign, i in (("positive", positive), ("negative", 1 - positive)):
        kinds[f"true {sign}"] = paths[(predicted == i) & (targets == i)], i
        kinds[f"false {sign}"] = paths[(predicted == i) & (targets != i)], i
    return kinds


def cam_samples(
    trained: TrainedNetwork, table: XrayTable, predictions: Predictions, kinds: Kinds, *, seed: int
) -> dict[str, list[CamRow]]:
    """Return up to `OF_A_KIND` explained test images of each kind, of different patients.

    Args:
        trained: the network.
        table: the study's images.
        predictions: the network's predictions on the test split.
        kinds: what `outcomes` returns.
        seed: fixes the draw.

    Raises:
        ValueError: the network's probabilities for an image are not those of its predictions.
    """
    test, stored = table.subset("test"), stored_probabilities(predictions, table)
    images = test.set_index(relative_paths(test["path"], table.root).to_numpy())
    rng, samples = np.random.default_rng(seed), {}
    for name, (paths, class_index) in kinds.items():
        drawn = images.loc[rng.permutation(paths)].drop_duplicates("patient")[:OF_A_KIND]
        samples[name] = []
        for image in drawn.to_dict("records"):
            findings = ", ".join(finding for finding in table.classes if table.multilabel and image[finding])
            truth = findings or [*table.classes, NO_FINDING][int(image["label"])]
            case = map_case(table, image, class_index, stored)._replace(label=truth, lesion=None, lung=None)
            samples[name].append(_row(case, {name: cam_panel(trained, case)}))
    return samples


def method_rows(
    trained: TrainedNetwork, cases: Sequence[MapCase], names: Sequence[str], *, seed: int, find_lungs: FindLungs = None
) -> list[CamRow]:
    """Return `METHOD_ROWS` cases, drawn by `seed`, with a panel for each method. A class is repeated only after every
    class was shown.
    """
    order = np.random.default_rng(seed).permutation(len(cases))
    shuffled = pd.DataFrame({"case": order, "label": [cases[i].class_index for i in order]})
    shuffled["turn"] = shuffled.groupby("label").cumcount()
    rows = []
    for case in (cases[i] for i in shuffled.sort_values(["turn", "label"])["case"][:METHOD_ROWS]):
        panels = {METHODS[name].title: cam_panel(trained, case, method=name) for name in names}
        rows.append(_row(case, panels, find_lungs))
    return rows
