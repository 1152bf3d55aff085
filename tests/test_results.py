"""Results on disk: what belongs together is found, and what does not is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
from layouts import write_kermany
from sklearn.metrics import roc_auc_score

from finetune import main
from results import ensembles, out_of_fold, read_runs, with_ensembles
from studies import load_study

STUDY = """
title = "Folds"
[data]
reader = "kermany"
root = "data"
[split]
folds = 3
[preprocessing]
image_size = 32
[training]
weights = "none"
head = "sigmoid"
epochs = 1
batch_size = 16
learning_rate = 1e-3
threshold = "youden"
[networks.lenet5]
"""


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A study's file and its runs: folds 1 and 2 of 3, of one network each."""
    folder = tmp_path_factory.mktemp("folds")
    write_kermany(folder / "data")
    (folder / "mine.toml").write_text(STUDY)
    for fold in "12":
        assert main([str(folder / "mine.toml"), "--runs", str(folder / "runs"), "--fold", fold]) == 0
    return folder


def test_the_folds_share_the_test_images_and_no_validation_image(folds):
    runs = read_runs(load_study(folds / "mine.toml"), folds / "runs")
    assert list(runs) == ["LeNet-5, fold 1", "LeNet-5, fold 2"]
    first, second = (run.splits().set_index("path")["split"] for run in runs.values())
    assert set(first.index[first == "test"]) == set(second.index[second == "test"])
    assert not set(first.index[first == "val"]) & set(second.index[second == "val"])
    assert 0.25 < (first == "val").sum() / (first != "test").sum() < 0.42


def test_an_ensemble_is_the_mean_of_its_members(folds):
    study = load_study(folds / "mine.toml")
    runs = read_runs(study, folds / "runs")
    assert ensembles(study, runs) == {"LeNet-5, ensemble of 2 folds": list(runs)}
    said = with_ensembles(study, runs)["LeNet-5, ensemble of 2 folds"]
    files = [pd.read_csv(run.folder / "predictions_test.csv").set_index("path") for run in runs.values()]
    mean = (files[0]["Pneumonia"] + files[1]["Pneumonia"].reindex(files[0].index)) / 2
    np.testing.assert_allclose(pd.Series(said.probabilities[:, 1], said.paths)[mean.index], mean)
    assert roc_auc_score(said.targets, said.probabilities[:, 1]) == pytest.approx(
        roc_auc_score(files[0]["target"] == "Pneumonia", mean)
    )
    thresholds = np.array([run.card.thresholds for run in runs.values()])
    np.testing.assert_allclose(said.thresholds, thresholds.mean(axis=0))


def test_a_network_that_the_file_does_not_name_is_found_and_other_test_images_are_refused(folds, tmp_path):
    shutil.copytree(folds / "runs", tmp_path / "runs")
    own = tmp_path / "runs" / "mine" / "small_cnn"
    shutil.copytree(tmp_path / "runs" / "mine-fold1" / "lenet5", own)
    study = load_study(folds / "mine.toml")
    assert "Small CNN" in read_runs(study, tmp_path / "runs")
    splits = pd.read_csv(own / "splits.csv")
    splits.loc[splits["split"] == "test", "split"] = "train"
    splits.to_csv(own / "splits.csv", index=False)
    with pytest.raises(ValueError, match="tested on other images"):
        read_runs(study, tmp_path / "runs")


def test_out_of_fold_predictions_are_those_of_the_images_that_a_fold_did_not_train_on(folds):
    runs = read_runs(load_study(folds / "mine.toml"), folds / "runs")
    said = out_of_fold(runs)
    assert list(said) == list(runs)
    for run, predictions in zip(runs.values(), said.values(), strict=True):
        splits = run.splits()
        assert set(predictions.paths) == set(splits.loc[splits["split"] == "val", "path"])


def test_folds_of_a_network_that_the_file_does_not_name_are_found(folds, tmp_path):
    (tmp_path / "mine.toml").write_text(STUDY.replace("lenet5", "resnet18"))
    shutil.copytree(folds / "runs", tmp_path / "runs")
    assert "LeNet-5, fold 2" in read_runs(load_study(tmp_path / "mine.toml"), tmp_path / "runs")


def test_a_study_without_results_says_how_to_get_them(folds, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trained network of mine \(lenet5\).*run notebook 2"):
        read_runs(load_study(folds / "mine.toml"), tmp_path)
