"""Which images the Grad-CAM figures show, and with which map."""

import numpy as np
import pytest
from layouts import write_chestxray14

from cam_figures import cam_panel, cam_samples, method_rows, outcomes, picked_rows
from cam_scores import MapCase
from explanations import explain
from finetune import fine_tune_study
from predictions import Predictions
from studies import load_study, load_table
from trained_networks import load_network
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


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """A table of several findings and a network trained on it for an epoch."""
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
    return table, load_network(fine_tune_study(study, table, "lenet5", runs=folder / "runs", device="cpu"))


def test_samples_of_several_findings_show_the_finding_with_its_map_and_boxes(findings):
    table, trained = findings
    test = table.subset("test")
    paths = test["path"].str.slice(len(str(table.root)) + 1).to_numpy()
    said = Predictions(table.targets("test"), np.zeros((len(test), 14)), paths, paths)
    kinds = outcomes(said, table.classes)
    assert len(kinds) == 6
    samples = cam_samples(trained, table, kinds, each=2, seed=0)
    boxed = 0
    for name, shown in samples.items():
        assert 0 < len(shown) <= 2
        for sample in shown:
            assert sample.predicted == name in sample.truth
            assert sample.map.shape == sample.image.shape
            boxed += len(sample.boxes)
    assert boxed <= len(table.boxes)
    rows = picked_rows(test, np.ones(14, bool), seed=0)
    assert len(rows) <= 6
    assert rows["label"].is_unique
    kept = np.arange(14) != rows["label"].iloc[0]
    assert rows["label"].iloc[0] not in picked_rows(test, kept, seed=0)["label"].tolist()


def test_panel_of_several_findings_is_titled_with_the_finding_of_the_map(findings):
    table, trained = findings
    xray = read_xray(table.frame["path"][0])
    panel = cam_panel(trained, xray, 3)
    said = explain(trained, xray, 3)
    assert panel.title == f"Infiltration {said.probabilities[3]:.2f}"
    np.testing.assert_array_equal(panel.map, said.maps[0])


def test_rows_of_methods_show_each_finding_once_before_any_twice(findings):
    table, trained = findings
    test = table.subset("test")
    none = np.zeros((0, 4))
    cases = [
        MapCase(path, "p", index, table.classes[index], boxes=none)
        for path, index in zip(test["path"], [0, 0, 0, 1, 1, 2], strict=False)
    ]
    rows = method_rows(trained, cases, ["gradcam", "layercam"], most=4, seed=0)
    assert {row.truth for row in rows[:3]} == set(table.classes[:3])
    assert len(rows) == 4
    for row in rows:
        assert list(row.panels) == ["Grad-CAM", "LayerCAM"]
        index = table.classes.index(row.truth)
        expected = explain(trained, row.image, index, method="layercam")
        np.testing.assert_array_equal(row.panels["LayerCAM"].map, expected.maps[0])
