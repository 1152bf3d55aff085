"""Traps: a planted one is found, and an innocent data set is not accused."""

import numpy as np
import pytest

from datasets.phantom import CLASSES, draw_phantoms
from traps import border_pixels, brightness, duplicate_table, near_duplicates, probe_table


def thumbnails(shortcut=None, size=32, number=240):
    labels = np.arange(number) % 4
    options = {} if shortcut is None else {"shortcut_class": shortcut, "shortcut_probability": 1.0}
    return labels, draw_phantoms(labels, seed=5, size=size, **options).images


def probe(labels, images):
    patients = np.arange(len(labels))
    return probe_table({"border": border_pixels(images)}, labels, patients, CLASSES, resamples=200)


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
    table = probe_table(features, labels, np.arange(300), ["a", "b", "c"], resamples=200)
    assert table.loc["noise", "low"] < 0.5 < table.loc["noise", "high"]
    assert table.loc["label", "roc_auc"] == 1


def test_images_of_one_patient_are_never_in_fit_and_check_at_once():
    # Features that name the patient and nothing else: only a leak between folds could use them.
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(60), 5)
    labels = rng.integers(0, 2, 60)[patients]
    table = probe_table({"who": np.eye(60)[patients]}, labels, patients, ["a", "b"], resamples=50)
    assert table.loc["who", "roc_auc"] < 0.6


def test_border_is_the_rim_and_brightness_mean_and_deviation():
    images = np.zeros((2, 8, 8))
    images[:, 2:-2, 2:-2] = 9
    assert border_pixels(images, rim=2).shape == (2, 64 - 16)
    assert not border_pixels(images, rim=2).any()
    assert brightness(images)[0] == pytest.approx([9 * 16 / 64, images[0].std()])


def test_altered_copies_are_found_and_different_patients_are_not():
    _, images = thumbnails(number=60)
    darker = np.clip(images[:5] * 0.8 + 10, 0, 255)
    noisy = np.clip(images[5:10] + np.random.default_rng(0).normal(0, 3, images[5:10].shape), 0, 255)
    groups = near_duplicates(np.concatenate([images, darker, noisy]))
    assert len(set(groups[:60])) == 60
    assert groups[60:].tolist() == groups[:10].tolist()
    chunked = near_duplicates(np.concatenate([images, darker, noisy]), chunk=7)
    assert chunked.tolist() == groups.tolist()


def test_copies_across_splits_and_labels_are_counted():
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 3])
    splits = ["train", "train", "train", "test", "val", "test", "test", "val"]
    labels = [0, 0, 1, 1, 0, 0, 1, 0]
    assert duplicate_table(groups, splits, labels).tolist() == [7, 5, 3]
