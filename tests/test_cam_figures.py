"""Which images the Grad-CAM figures show, and with which map."""

from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from layouts import write_chestxray14

from cam_figures import cam_panel, cam_samples, method_rows, outcomes, picked_rows
from cam_scores import MapCase, map_cases, score_maps, stored_probabilities
from datasets.table import XrayTable, no_boxes
from explanations import explain
from finetune import fine_tune_study
from networks import build_network
from predictions import Predictions, read_predictions
from study_loading import load_study, load_table
from trained_networks import ModelCard, TrainedNetwork, load_network
from utils import read_xray


def test_outcomes_of_two_classes_are_the_cells_of_the_confusion_matrix():
    targets, scores = np.array([1, 0, 0, 1, 1, 0]), np.array([0.9, 0.8, 0.1, 0.65, 0.2, 0.65])
    paths = np.array([f"{i}.png" for i in range(6)])
    said = Predictions(targets, np.stack([1 - scores, scores], axis=1), paths, paths, np.array([0.3, 0.7]))
    kinds = outcomes(said, ("Normal", "Pneumonia"), positive=1)
    assert {name: (outcome.paths, outcome.class_index) for name, outcome in kinds.items()} == {
        "true positive": (["0.png"], 1),
        "false positive": (["1.png"], 1),
        "true negative": (["2.png", "5.png"], 0),  # 0.65 is below the threshold
        "false negative": (["3.png", "4.png"], 0),
    }
    mirrored = outcomes(said, ("Pneumonia", "Normal"), positive=0)
    assert mirrored["true positive"] == (["2.png", "5.png"], 0)
    assert mirrored["false negative"] == (["1.png"], 1)


def test_outcomes_of_more_classes_are_the_mistakes_by_what_they_were_called():
    targets = np.array([0, 1, 2, 2])
    probabilities = np.eye(3)[[0, 2, 2, 1]]
    paths = np.array(list("abcd"))
    kinds = outcomes(Predictions(targets, probabilities, paths, paths), ("x", "y", "z"))
    assert {name: outcome.paths for name, outcome in kinds.items()} == {
        "wrongly called x": [],
        "wrongly called y": ["d"],
        "wrongly called z": ["b"],
    }


CLASSES = ("Normal", "Covid")


@pytest.fixture
def nearly_decided(tmp_path):
    """A network, a table of four X-rays without the disease, and predictions that call the first one ill: by less than
    rounding, for the network itself now calls it healthy.
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
    said = Predictions(np.zeros(4, np.int64), probabilities, np.array(list("abcd")), names, thresholds)
    return trained, table, said


def test_figures_show_the_predictions_by_which_their_images_were_chosen(nearly_decided):
    trained, table, said = nearly_decided
    kinds = outcomes(said, CLASSES, positive=1)
    first = table.frame["path"][0]
    assert "0.png" in kinds["false positive"].paths
    kinds = {"false positive": kinds["false positive"]._replace(paths=["0.png"])}
    ((sample,),) = cam_samples(trained, table, kinds, said, each=4, seed=0).values()
    panel = cam_panel(trained, first, 1, stored_probabilities(said, table))
    for shown in (sample, panel):
        assert (shown.predicted, shown.probability) == ("Covid", said.probabilities[0, 1])
    np.testing.assert_array_equal(sample.map, explain(trained, read_xray(first), 1).maps[0])


def test_an_image_or_a_network_that_has_changed_since_its_predictions_is_refused(nearly_decided):
    trained, table, said = nearly_decided
    cases = map_cases(table, said._replace(targets=said.predicted), most=4, seed=0)
    score_maps(trained, cases, methods=["gradcam"], faithful=2, steps=1, seed=0)
    first = table.frame["path"][0]
    cv2.imwrite(first, np.zeros((40, 40), np.uint8))
    kinds = {
        "false positive": outcomes(said, CLASSES, positive=1)["false positive"]._replace(paths=["0.png"])
    }
    with pytest.raises(ValueError, match=r"0\.png: lenet5 says .* has changed"):
        cam_panel(trained, first, 1, stored_probabilities(said, table))
    with pytest.raises(ValueError, match="has changed"):
        cam_samples(trained, table, kinds, said, each=4, seed=0)
    with pytest.raises(ValueError, match="has changed"):
        score_maps(trained, cases, methods=["gradcam"], faithful=2, steps=1, seed=0)
    with pytest.raises(ValueError, match="has changed"):
        method_rows(trained, cases, ["gradcam"], most=4, seed=0)
    fewer = said._replace(paths=said.paths[:3], probabilities=said.probabilities[:3])
    with pytest.raises(ValueError, match=r"lack .*3\.png"):
        stored_probabilities(fewer, table)


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """A table of several findings, a network trained on it for an epoch, and its test predictions as written."""
    folder = tmp_path_factory.mktemp("findings")
    write_chestxray14(folder / "data", size=40)
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
    said = read_predictions(run / "predictions_test.csv", table.classes, multilabel=True)
    return table, load_network(run), said


def test_samples_of_several_findings_show_the_finding_with_its_map_and_boxes(findings):
    table, trained, said = findings
    test = table.subset("test")
    kinds = outcomes(said, table.classes)
    assert len(kinds) == 6
    samples = cam_samples(trained, table, kinds, said, each=2, seed=0)
    boxed = 0
    for name, shown in samples.items():
        assert 0 < len(shown) <= 2
        for sample in shown:
            assert sample.predicted == name in sample.truth
            assert sample.probability in said.probabilities[:, table.classes.index(name)]
            assert sample.map.shape == sample.image.shape
            boxed += len(sample.boxes)
    assert boxed <= len(table.boxes)
    rows = picked_rows(test, np.ones(14, bool), seed=0)
    assert len(rows) <= 6
    assert rows["label"].is_unique
    kept = np.arange(14) != rows["label"].iloc[0]
    assert rows["label"].iloc[0] not in picked_rows(test, kept, seed=0)["label"].tolist()


def test_panel_of_several_findings_is_titled_with_the_finding_of_the_map(findings):
    table, trained, said = findings
    stored = stored_probabilities(said, table)
    path = next(iter(stored))
    panel = cam_panel(trained, path, 3, stored)
    assert panel.title == f"Infiltration {stored[path][3]:.2f}"
    np.testing.assert_array_equal(panel.map, explain(trained, read_xray(path), 3).maps[0])


def test_a_finding_that_is_not_reported_hides_no_other_answer_of_the_network(findings):
    table, trained, said = findings
    unlearnt = trained._replace(card=replace(trained.card, unreported=table.classes[:1]))
    path, probabilities = next(iter(stored_probabilities(said, table).items()))
    probabilities = np.r_[np.nan, probabilities[1:]]
    assert cam_panel(unlearnt, path, 3, {path: probabilities}).probability == probabilities[3]
    assert cam_panel(unlearnt, path, 0, {path: probabilities}).title == f"{table.classes[0]} –"
    probabilities[5] += 0.2
    with pytest.raises(ValueError, match="has changed"):
        cam_panel(unlearnt, path, 3, {path: probabilities})


def test_rows_of_methods_show_each_finding_once_before_any_twice(findings):
    table, trained, said = findings
    cases = [
        MapCase(path, "p", index, table.classes[index], probabilities=probabilities)
        for (path, probabilities), index in zip(
            stored_probabilities(said, table).items(), [0, 0, 0, 1, 1, 2], strict=False
        )
    ]
    rows = method_rows(trained, cases, ["gradcam", "layercam"], most=4, seed=0)
    assert {row.truth for row in rows[:3]} == set(table.classes[:3])
    assert len(rows) == 4
    for row in rows:
        assert list(row.panels) == ["Grad-CAM", "LayerCAM"]
        index = table.classes.index(row.truth)
        expected = explain(trained, row.image, index, method="layercam")
        np.testing.assert_array_equal(row.panels["LayerCAM"].map, expected.maps[0])
