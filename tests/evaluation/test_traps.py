"""Planted shortcuts and copies are found, and data without them gives no alarm."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from datasets.phantom import CLASSES, draw_phantoms
from evaluation import intervals, traps
from evaluation.traps import (
    border_pixels,
    brightness,
    duplicate_table,
    file_features,
    file_table,
    near_duplicates,
    probe_table,
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)


def thumbnails(shortcut=None, size=32, number=240):
    labels = np.arange(number) % 4
    options = {} if shortcut is None else {"shortcut_class": shortcut, "shortcut_probability": 1.0}
    return labels, draw_phantoms(labels, seed=5, size=size, **options).images


def probe(labels, images):
    patients = np.arange(len(labels))
    return probe_table({"border": border_pixels(images)}, labels, patients, CLASSES, seed=0)


@pytest.mark.slow
def test_planted_corner_marker_is_found_in_the_border_and_not_without_it():
    planted = probe(*thumbnails("Normal")).loc["border"]
    innocent = probe(*thumbnails()).loc["border"]
    assert planted["low"] > 0.6
    assert innocent["low"] < 0.55
    assert innocent["high"] < planted["low"]


def test_probe_on_noise_is_at_chance_and_on_the_label_perfect():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = {"noise": rng.normal(size=(300, 5)), "label": np.eye(3)[labels]}
    table = probe_table(features, labels, np.arange(300), ["a", "b", "c"], seed=0)
    assert table.loc["noise", "low"] < 0.5 < table.loc["noise", "high"]
    assert table.loc["label", "roc_auc"] == 1


def test_images_of_one_patient_are_never_in_both_fit_and_held_out_fold():
    # The features name the patient and nothing else. They help only if a patient is in two folds.
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 60)[patients]
    table = probe_table({"patient": np.eye(60)[patients]}, labels, patients, ["a", "b"], seed=0)
    assert table.loc["patient", "roc_auc"] < 0.6


def file_probe(labels, sizes, *, formats="PNG"):
    files = pd.DataFrame({"width": 224, "height": 224, "bytes": sizes, "format": formats, "mode": "L"})
    raw = files[["width", "height", "bytes"]].to_numpy()
    features = {"files": file_features(files), "raw sizes": raw}
    return probe_table(features, labels, np.arange(len(labels)), ["a", "b"], seed=0)


def test_sizes_of_files_that_give_a_class_away_are_found_whatever_their_distribution():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    heavy = np.where(labels == 0, 10_000, 8_000) * rng.lognormal(0, 0.05, 400)
    heavy[-10:] = 5e7  # ten very large files; the other files of their class are small
    table = file_probe(labels, heavy.astype(int))
    assert table.loc["raw sizes", "high"] < 0.5
    assert table.loc["files", "low"] > 0.95
    assert table.loc["files", "shortcut"]
    middle = np.where(labels == 0, rng.choice([5_000, 20_000], 400), 10_000) * rng.lognormal(0, 0.05, 400)
    assert file_probe(labels, middle.astype(int)).loc["files", "low"] > 0.95


def test_formats_that_give_a_class_away_are_found():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    table = file_probe(labels, rng.integers(5_000, 9_000, 200), formats=np.where(labels == 0, "PNG", "JPEG"))
    assert table.loc["files", "roc_auc"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_uninformative_files_are_at_chance_even_if_a_few_are_very_large(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 300)
    table = file_probe(labels, (5_000 * (1 + rng.pareto(0.7, 300))).astype(int))
    assert table.loc["files", "low"] < 0.5 < table.loc["files", "high"]
    assert not table.loc["files", "shortcut"]


@pytest.mark.parametrize("seed", range(3))
def test_a_constant_feature_is_at_chance_for_any_folds(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 12, 60)
    labels = (np.arange(12) % 3 == 0).astype(int)[patients]
    table = probe_table({"same": np.ones((60, 1))}, labels, patients, ["a", "b"], seed=0)
    assert table.loc["same", "roc_auc"] == 0.5


def test_a_feature_that_is_always_wrong_is_a_shortcut_too():
    # Images come in equal pairs of different classes: what the probe learns from one is wrong for the other.
    labels = np.arange(80) % 2
    features = {"twins": np.repeat(np.eye(40), 2, axis=0)}
    table = probe_table(features, labels, np.arange(80), ["a", "b"], seed=0)
    assert table.loc["twins", "high"] < 0.4
    assert table.loc["twins", "shortcut"]


def test_files_are_described_by_their_content_not_by_their_suffix(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    Image.new("L", (7, 9)).save(tmp_path / "b.jpg", "PNG")
    table = file_table([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")])
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jpg", "b.jpg")]
    assert table.to_numpy().tolist() == [[30, 20, sizes[0], "JPEG", "RGB"], [7, 9, sizes[1], "PNG", "L"]]


def test_border_is_the_rim_and_brightness_mean_and_deviation():
    images = np.zeros((2, 8, 8))
    images[:, 2:-2, 2:-2] = 9
    assert border_pixels(images).shape == (2, 64 - 16)
    assert not border_pixels(images).any()
    assert brightness(images)[0] == pytest.approx([9 * 16 / 64, images[0].std()])


def test_altered_copies_are_found_and_different_patients_are_not(monkeypatch):
    _, images = thumbnails(number=60)
    darker = np.clip(images[:5] * 0.8 + 10, 0, 255)
    noisy = np.clip(images[5:10] + np.random.default_rng(0).normal(0, 3, images[5:10].shape), 0, 255)
    groups = near_duplicates(np.concatenate([images, darker, noisy]))
    assert len(set(groups[:60])) == 60
    assert groups[60:].tolist() == groups[:10].tolist()
    monkeypatch.setattr(traps, "CHUNK", 7)
    assert near_duplicates(np.concatenate([images, darker, noisy])).tolist() == groups.tolist()


def test_copies_across_splits_and_labels_are_counted():
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    splits = ["train", "train", "train", "test", "val", "test", "test", "val"]
    labels = [0, 0, 1, 1, 0, 0, 1, 0]
    assert duplicate_table(groups, splits, labels).tolist() == [7, 5, 3]
