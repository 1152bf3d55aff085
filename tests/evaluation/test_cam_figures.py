"""Which images the Grad-CAM figures show, and with which map."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from layouts import write_chestxray14

from datasets.table import XrayTable, no_boxes
from evaluation.cam_figures import cam_panel, cam_samples, method_rows, outcomes, picked_rows
from evaluation.cam_scores import MapScores, score_maps
from evaluation.figures import randomisation
from evaluation.map_cases import MapCase, map_cases, stored_probabilities
from evaluation.map_report import MapReport
from evaluation.predictions import Predictions, read_predictions
from finetune import fine_tune_study
from inference.explanations import explain
from inference.trained_networks import ModelCard, TrainedNetwork, load_network
from networks import build_network
from studies.loading import load_study, load_table
from studies.settings import Maps
from utils import read_xray


def test_outcomes_of_two_classes_are_the_cells_of_the_confusion_matrix():
    targets, scores = np.array([1, 0, 0, 1, 1, 0]), np.array([0.9, 0.8, 0.1, 0.65, 0.2, 0.65])
    paths = np.array([f"{i}.png" for i in range(6)])
    predictions = Predictions(targets, np.stack([1 - scores, scores], axis=1), paths, paths, np.array([0.3, 0.7]))
    kinds = outcomes(predictions, ("Normal", "Pneumonia"), positive=1)
    assert {name: (of_kind.tolist(), class_index) for name, (of_kind, class_index) in kinds.items()} == {
        "true positive": (["0.png"], 1),
        "false positive": (["1.png"], 1),
        "true negative": (["2.png", "5.png"], 0),  # 0.65 is below the threshold
        "false negative": (["3.png", "4.png"], 0),
    }
    mirrored = outcomes(predictions, ("Pneumonia", "Normal"), positive=0)
    assert mirrored["true positive"][0].tolist() == ["2.png", "5.png"]
    assert mirrored["false negative"][0].tolist() == ["1.png"]
    assert [class_index for _, class_index in mirrored.values()] == [0, 0, 1, 1]


def test_outcomes_of_more_classes_are_the_mistakes_by_predicted_class():
    targets = np.array([0, 1, 2, 2])
    probabilities = np.eye(3)[[0, 2, 2, 1]]
    paths = np.array(list("abcd"))
    kinds = outcomes(Predictions(targets, probabilities, paths, paths), ("x", "y", "z"))
    assert {name: of_kind.tolist() for name, (of_kind, _) in kinds.items()} == {
        "wrongly called x": [],
        "wrongly called y": ["d"],
        "wrongly called z": ["b"],
    }


CLASSES = ("Normal", "Covid")


@pytest.fixture
def nearly_decided(tmp_path):
    """A network, a table of four healthy X-rays, and predictions in which the first one is ill. The probabilities of
    the predictions and of the network differ by less than rounding, but the decision threshold lies between them.
    """
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths:
        cv2.imwrite(path, rng.integers(0, 255, (40, 40), dtype=np.uint8))
    frame = pd.DataFrame({"path": paths, "patient": list("abcd"), "label": 0, "split": "test"})
    frame = frame.assign(mask=None, lesion=None)
    table = XrayTable(frame=frame, classes=CLASSES, root=tmp_path, has_patient_ids=True, boxes=no_boxes())
    torch.manual_seed(0)
    card = ModelCard("lenet5", CLASSES, 32, (0.5,) * 3, (0.25,) * 3, "features.relu2")
    network = build_network("lenet5", 2).eval().requires_grad_(False)
    network.classifier.fc3.weight *= 50  # images that differ are told apart
    trained = TrainedNetwork(network, card)
    ill = np.array([explain(trained, read_xray(path)).probabilities[1] for path in paths], dtype=np.float64)
    threshold = ill[0] + 0.002
    ill[0] += 0.004
    probabilities, thresholds = np.stack([1 - ill, ill], axis=1), np.array([1 - threshold, threshold])
    trained = trained._replace(card=replace(card, thresholds=tuple(thresholds)))
    names = np.array([f"{i}.png" for i in range(4)])
    return trained, table, Predictions(np.zeros(4, np.int64), probabilities, np.array(list("abcd")), names, thresholds)


def test_figures_show_the_predictions_by_which_their_images_were_chosen(nearly_decided):
    trained, table, predictions = nearly_decided
    kinds = outcomes(predictions, CLASSES, positive=1)
    assert "0.png" in kinds["false positive"][0]
    kinds = {"false positive": (np.array(["0.png"]), kinds["false positive"][1])}
    ((row,),) = cam_samples(trained, table, predictions, kinds, seed=0).values()
    (panel,) = row.panels.values()
    assert (row.truth, panel.predicted, panel.correct) == ("Normal", "Covid", False)
    assert panel.probability == predictions.probabilities[0, 1]
    np.testing.assert_array_equal(panel.map, explain(trained, read_xray(table.frame["path"][0]), 1).maps[0])


def test_an_image_that_changed_after_its_predictions_were_written_is_refused(nearly_decided):
    trained, table, predictions = nearly_decided
    cases = map_cases(table, predictions._replace(targets=predictions.predicted), most=4, seed=0)
    (case,) = [case for case in cases if case.path == table.frame["path"][0]]
    cam_panel(trained, case)
    cv2.imwrite(case.path, np.zeros((40, 40), np.uint8))
    kinds = {"false positive": (np.array(["0.png"]), 1)}
    with pytest.raises(ValueError, match=r"0\.png: lenet5 says .* has changed"):
        cam_panel(trained, case)
    with pytest.raises(ValueError, match="has changed"):
        cam_samples(trained, table, predictions, kinds, seed=0)
    with pytest.raises(ValueError, match="has changed"):
        method_rows(trained, [case], ["gradcam"], seed=0)
    with pytest.raises(ValueError, match="has changed"):
        score_maps(trained, cases, Maps(methods=["gradcam"], faithful=2, steps=1), seed=0)
    fewer = predictions._replace(paths=predictions.paths[:3], probabilities=predictions.probabilities[:3])
    with pytest.raises(ValueError, match=r"lack .*3\.png"):
        stored_probabilities(fewer, table)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """A table of several findings, a network trained on it for an epoch, and its test predictions as written."""
    folder = tmp_path_factory.mktemp("findings")
    write_chestxray14(folder / "data", size=40, images=160)
    (folder / "mine.toml").write_text(
        """
        title = "Findings"
        data = { reader = "chestxray14", root = "data" }
        split = { val = 0.2, test = 0.3 }
        preprocessing.image_size = 32
        training = { weights = "none", epochs = 1, balance = "loss" }
        networks.lenet5 = {}
        """
    )
    study = load_study(folder / "mine.toml")
    table = load_table(study)
    run = fine_tune_study(study, table, "lenet5", runs=folder / "runs", device="cpu")
    return table, load_network(run), read_predictions(run / "predictions_test.csv", table.classes, multilabel=True)


@pytest.mark.slow
def test_samples_of_several_findings_show_the_finding_with_its_map_and_boxes(findings):
    table, trained, predictions = findings
    test = table.subset("test")
    kinds = outcomes(predictions, table.classes)
    assert len(kinds) == 6
    boxed = 0
    for name, rows in cam_samples(trained, table, predictions, kinds, seed=0).items():
        assert 0 < len(rows) <= 4
        for row in rows:
            (panel,) = row.panels.values()
            assert panel.predicted == name in row.truth
            assert panel.probability in predictions.probabilities[:, table.classes.index(name)]
            assert panel.map.shape == row.image.shape
            boxed += len(row.boxes)
    assert boxed <= len(table.boxes)
    rows = picked_rows(test, np.ones(14, bool), seed=0)
    assert len(rows) <= 6
    assert rows["label"].is_unique
    reported = np.arange(14) != rows["label"].iloc[0]
    assert rows["label"].iloc[0] not in picked_rows(test, reported, seed=0)["label"].tolist()


def case_of(table, predictions, index):
    path, probabilities = next(iter(stored_probabilities(predictions, table).items()))
    return MapCase(path, "p", index, table.classes[index], probabilities=probabilities)


@pytest.mark.slow
def test_panel_of_several_findings_names_the_finding_of_the_map_and_whether_it_is_correct(findings):
    table, trained, predictions = findings
    case = case_of(table, predictions, 3)
    panel = cam_panel(trained, case)
    assert (panel.predicted, panel.probability) == ("Infiltration", case.probabilities[3])
    assert panel.correct == (case.probabilities[3] >= 0.5)
    np.testing.assert_array_equal(panel.map, explain(trained, read_xray(case.path), 3).maps[0])


@pytest.mark.slow
def test_an_unreported_finding_hides_no_other_prediction(findings):
    table, trained, predictions = findings
    unlearnt = trained._replace(card=replace(trained.card, unreported=table.classes[:1]))
    case = case_of(table, predictions, 3)
    case = case._replace(probabilities=np.r_[np.nan, case.probabilities[1:]])
    assert cam_panel(unlearnt, case).probability == case.probabilities[3]
    unreported = cam_panel(unlearnt, case._replace(class_index=0))
    assert np.isnan(unreported.probability)
    assert unreported.correct is None
    case.probabilities[5] += 0.2
    with pytest.raises(ValueError, match="has changed"):
        cam_panel(unlearnt, case)


@pytest.mark.slow
def test_figure_of_methods_shows_three_findings_once_before_any_twice(findings):
    table, trained, predictions = findings
    stored = stored_probabilities(predictions, table).items()
    cases = [
        MapCase(path, "p", index, table.classes[index], probabilities=probabilities)
        for (path, probabilities), index in zip(stored, [0, 0, 0, 1, 1, 2], strict=False)
    ]
    rows = method_rows(trained, cases, ["gradcam", "layercam"], seed=0)
    assert {row.truth for row in rows} == set(table.classes[:3])
    for row in rows:
        assert list(row.panels) == ["Grad-CAM", "LayerCAM"]
        expected = explain(trained, row.image, table.classes.index(row.truth), method="layercam")
        np.testing.assert_array_equal(row.panels["LayerCAM"].map, expected.maps[0])


def test_randomisation_curves_start_at_one_and_show_the_mean_agreement():
    rows = [("a", 0.1, 0.2), ("a", 0.1, 0.4), ("a", 1.0, 0.5), ("a", 1.0, np.nan), ("b", 1.0, 0.9), ("b", 0.1, 1.0)]
    randomised = pd.DataFrame(rows, columns=["map", "share", "agreement"])
    maps = MapReport({"LeNet-5": MapScores(None, None, randomised)}, {}, None, "")
    results = SimpleNamespace(example="LeNet-5", study=SimpleNamespace(maps=SimpleNamespace(faithful=2)))
    (ax,) = randomisation(results, maps).axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["a"], [1, 0.3, 0.5])
    np.testing.assert_allclose(lines["b"], [1, 1, 0.9])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["nothing", "the head", "100%"]
