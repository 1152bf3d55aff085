"""Runs on disk: those of one study are read together, and those that do not fit are refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from layouts import write_kermany
from sklearn.metrics import roc_auc_score

from evaluation.metrics import METRICS
from evaluation.runs import ensembles, out_of_fold, read_runs, read_seeds, seed_scores, seed_spread, with_ensembles
from finetune import fine_tune_study, main
from studies.loading import load_study, load_table, read_images

pytestmark = pytest.mark.slow

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
    write_kermany(folder / "data", size=40, per_kind={"train": 15, "val": 2, "test": 6})
    (folder / "mine.toml").write_text(STUDY)
    for fold in "12":
        assert main([str(folder / "mine.toml"), "--runs", str(folder / "runs"), "--fold", fold]) == 0
    return folder


def runs_of(study, runs):
    return read_runs(study, runs, read_images(study))


def seeds_of(study, runs):
    return read_seeds(study, runs, read_images(study))


def test_the_folds_share_the_test_images_and_no_validation_image(folds):
    runs = runs_of(load_study(folds / "mine.toml"), folds / "runs")
    assert list(runs) == ["LeNet-5, fold 1", "LeNet-5, fold 2"]
    assert [(run.study, run.fold, run.seed) for run in runs.values()] == [("mine", 1, 0), ("mine", 2, 0)]
    first, second = (run.splits().set_index("path")["split"] for run in runs.values())
    assert set(first.index[first == "test"]) == set(second.index[second == "test"])
    assert not set(first.index[first == "val"]) & set(second.index[second == "val"])
    assert 0.25 < (first == "val").sum() / (first != "test").sum() < 0.42


def test_an_ensemble_is_the_mean_of_its_members(folds):
    study = load_study(folds / "mine.toml")
    runs = runs_of(study, folds / "runs")
    assert ensembles(study, runs) == {"LeNet-5, ensemble of 2 folds": list(runs)}
    predictions = with_ensembles(study, runs)["LeNet-5, ensemble of 2 folds"]
    files = [pd.read_csv(run.folder / "predictions_test.csv").set_index("path") for run in runs.values()]
    mean = (files[0]["Pneumonia"] + files[1]["Pneumonia"].reindex(files[0].index)) / 2
    np.testing.assert_allclose(pd.Series(predictions.probabilities[:, 1], predictions.paths)[mean.index], mean)
    assert roc_auc_score(predictions.targets, predictions.probabilities[:, 1]) == pytest.approx(
        roc_auc_score(files[0]["target"] == "Pneumonia", mean)
    )
    thresholds = np.array([run.card.thresholds for run in runs.values()], dtype=float)
    np.testing.assert_allclose(predictions.thresholds, thresholds.mean(axis=0))


def test_a_network_that_the_file_does_not_name_is_found_and_other_test_images_are_refused(folds, tmp_path):
    shutil.copytree(folds / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "mine" / "small_cnn"
    shutil.copytree(tmp_path / "runs" / "mine-fold1" / "lenet5", folder)
    study = load_study(folds / "mine.toml")
    assert "Small CNN" in runs_of(study, tmp_path / "runs")
    splits = pd.read_csv(folder / "splits.csv")
    splits.loc[splits["split"] == "test", "split"] = "train"
    splits.to_csv(folder / "splits.csv", index=False)
    with pytest.raises(ValueError, match="were tested on other images or classes: train one of them again"):
        runs_of(study, tmp_path / "runs")


def test_a_comparison_with_a_study_of_other_images_is_refused(folds, tmp_path):
    shutil.copytree(folds / "runs" / "mine-fold1", tmp_path / "runs" / "theirs")
    splits = pd.read_csv(tmp_path / "runs" / "theirs" / "lenet5" / "splits.csv")
    text = STUDY.replace('root = "data"', f'root = "{folds / "data"}"')
    (tmp_path / "own.toml").write_text('compare = ["theirs"]' + text)
    study = load_study(tmp_path / "own.toml")
    assert list(runs_of(study, tmp_path / "runs")) == ["theirs"]  # a study without runs of its own is allowed
    splits["path"] = "elsewhere/" + splits["path"]
    splits.to_csv(tmp_path / "runs" / "theirs" / "lenet5" / "splits.csv", index=False)
    refusal = r"images of .*theirs/lenet5/splits.csv are not in .*data.*: train again, or give the data_root"
    with pytest.raises(ValueError, match=refusal) as caught:
        runs_of(study, tmp_path / "runs")
    assert "\n" not in str(caught.value)


def test_runs_of_images_that_were_relabelled_since_are_refused(folds, tmp_path):
    shutil.copytree(folds / "runs" / "mine-fold1", tmp_path / "runs" / "mine")
    study = load_study(folds / "mine.toml")
    assert list(runs_of(study, tmp_path / "runs")) == ["LeNet-5"]
    images = read_images(study)
    turned = replace(images, frame=images.frame.assign(label=1 - images.frame["label"]))
    with pytest.raises(ValueError, match=r"images of .*splits.csv have other labels now, for example .*train again"):
        read_runs(study, tmp_path / "runs", turned)


def test_out_of_fold_predictions_are_those_of_the_images_that_a_fold_did_not_train_on(folds):
    runs = runs_of(load_study(folds / "mine.toml"), folds / "runs")
    by_title = out_of_fold(runs)
    assert list(by_title) == list(runs)
    for run, predictions in zip(runs.values(), by_title.values(), strict=True):
        splits = run.splits()
        assert set(predictions.paths) == set(splits.loc[splits["split"] == "val", "path"])


def test_folds_of_a_network_that_the_file_does_not_name_are_found(folds):
    study = load_study(folds / "mine.toml").overridden(networks=("resnet18",))
    assert "LeNet-5, fold 2" in runs_of(study, folds / "runs")


def test_a_study_without_results_says_how_to_get_them(folds, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trained network of mine \(lenet5\).*run notebook 2"):
        runs_of(load_study(folds / "mine.toml"), tmp_path)


@pytest.fixture(scope="module")
def repeats(folds):
    """The folder of the study's repeats with the seeds 2 and 11, and of fold 1 with the seed 2."""
    study, runs = load_study(folds / "mine.toml"), folds / "repeats"
    for repeat in (study.repeated(2), study.repeated(11), study.overridden(fold=1).repeated(2)):
        fine_tune_study(repeat, load_table(repeat), "lenet5", runs=runs, device="cpu")
    return runs


def as_own_run(repeats, tmp_path, *, seed):
    """Return the study's own run folder, a copy of seed 2's run with another seed in its card. Copy all runs too."""
    shutil.copytree(repeats, tmp_path / "runs")
    folder = tmp_path / "runs" / "mine" / "lenet5"
    shutil.copytree(repeats / "mine-seed2" / "lenet5", folder)
    card = json.loads((folder / "model.json").read_text())
    card["origin"]["seed"] = seed
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def test_the_lowest_seed_stands_in_for_a_network_that_the_study_itself_did_not_train(folds, repeats):
    runs = runs_of(load_study(folds / "mine.toml"), repeats)
    assert {title: run.folder.parent.name for title, run in runs.items()} == {
        "LeNet-5": "mine-seed2",
        "LeNet-5, fold 1": "mine-fold1-seed2",
    }
    assert [(run.study, run.fold, run.seed) for run in runs.values()] == [("mine", None, 2), ("mine", 1, 2)]


def test_the_runs_of_a_network_are_keyed_by_seed_with_its_own_run_first(folds, repeats, tmp_path):
    study = load_study(folds / "mine.toml")
    assert [list(by_seed) for by_seed in seeds_of(study, repeats).values()] == [[2, 11], [2]]
    folder = as_own_run(repeats, tmp_path, seed=5)
    shutil.copytree(folder, tmp_path / "runs" / "mine-seed3x" / "lenet5")  # another study, not a repeat
    by_seed = seeds_of(study, tmp_path / "runs")["LeNet-5"]
    assert list(by_seed) == [5, 2, 11]
    assert by_seed[5].folder == folder == runs_of(study, tmp_path / "runs")["LeNet-5"].folder


def test_a_repeat_with_the_seed_of_the_study_itself_does_not_count(folds, repeats, tmp_path):
    folder = as_own_run(repeats, tmp_path, seed=11)
    by_seed = seeds_of(load_study(folds / "mine.toml"), tmp_path / "runs")["LeNet-5"]
    assert list(by_seed) == [11, 2]
    assert by_seed[11].folder == folder


def test_repeats_share_test_images_and_differ_in_their_predictions(folds, repeats):
    first, second = seeds_of(load_study(folds / "mine.toml"), repeats)["LeNet-5"].values()
    assert first.splits().equals(second.splits())
    a, b = first.predictions("test"), second.predictions("test")
    np.testing.assert_array_equal(a.paths, b.paths)
    assert np.abs(a.probabilities - b.probabilities).max() > 1e-4


def test_seeds_that_were_tested_on_other_images_are_refused(folds, repeats, tmp_path):
    folder = as_own_run(repeats, tmp_path, seed=5)
    splits = pd.read_csv(folder / "splits.csv")
    splits.loc[splits["split"] == "test", "split"] = "train"
    splits.to_csv(folder / "splits.csv", index=False)
    with pytest.raises(ValueError, match=r"LeNet-5, seed 5 \(.* and LeNet-5, seed 2 \(.*were tested on other images"):
        seeds_of(load_study(folds / "mine.toml"), tmp_path / "runs")


def as_architecture(folder, name):
    """Copy a run folder; the copy, beside it, is of another architecture."""
    shutil.copytree(folder, folder.with_name(name))
    card = json.loads((folder / "model.json").read_text()) | {"architecture": name}
    (folder.with_name(name) / "model.json").write_text(json.dumps(card))


def test_a_network_that_is_not_in_the_file_is_shown_but_in_no_ensemble_of_the_study(folds, repeats, tmp_path):
    shutil.copytree(repeats, tmp_path / "runs", ignore=shutil.ignore_patterns("mine-fold*"))
    for name in ("small_cnn", "resnet18"):
        as_architecture(tmp_path / "runs" / "mine-seed2" / "lenet5", name)
    study = load_study(folds / "mine.toml")
    runs = runs_of(study, tmp_path / "runs")
    assert list(runs) == ["LeNet-5", "ResNet-18", "Small CNN"]
    assert ensembles(study, runs) == {}
    both = study.overridden(networks=("lenet5", "small_cnn"))
    assert ensembles(both, runs) == {"Ensemble of 2": ["LeNet-5", "Small CNN"]}


def test_spread_over_seeds_is_that_of_the_scores_of_hand_made_predictions(folds, repeats, tmp_path):
    shutil.copytree(repeats, tmp_path / "runs")
    for seed, correct in ((2, 3), (11, 4)):
        # The first `correct` of 2 normal and 3 ill images are classified correctly at a threshold of 0.5.
        folder = tmp_path / "runs" / f"mine-seed{seed}" / "lenet5"
        target = np.array([0, 0, 1, 1, 1])
        ill = np.where((np.arange(5) < correct) == (target == 1), 0.9, 0.2)
        frame = pd.DataFrame({"path": list("abcde"), "patient": list("abcde")})
        frame["target"] = np.array(["Normal", "Pneumonia"])[target]
        frame = frame.assign(Normal=1 - ill, Pneumonia=ill)
        frame.to_csv(folder / "predictions_test.csv", index=False)
        card = json.loads((folder / "model.json").read_text()) | {"thresholds": [0.5, 0.5]}
        (folder / "model.json").write_text(json.dumps(card))
    scores = seed_scores(seeds_of(load_study(folds / "mine.toml"), tmp_path / "runs"))
    assert list(scores.columns) == list(METRICS)
    accuracy, recall = [3 / 5, 4 / 5], [(1 + 1 / 3) / 2, (1 + 2 / 3) / 2]
    np.testing.assert_allclose(scores.loc["LeNet-5", "accuracy"], accuracy)
    np.testing.assert_allclose(scores.loc["LeNet-5", "recall"], recall)
    spread = seed_spread(scores)
    for metric, values in (("accuracy", accuracy), ("recall", recall)):
        expected = [np.mean(values), np.std(values, ddof=1), min(values), max(values), 2]
        np.testing.assert_allclose(spread.loc[("LeNet-5", metric)].tolist(), expected)
    assert spread.loc[("LeNet-5, fold 1", "accuracy"), "seeds"] == 1
    assert np.isnan(spread.loc[("LeNet-5, fold 1", "accuracy"), "std"])
