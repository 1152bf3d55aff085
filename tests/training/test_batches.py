"""Batches: the seed and the epoch decide their order and their views, and shares miss no image."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_STUDY
from PIL import Image
from torch.utils.data import TensorDataset

from datasets import XrayTable
from studies.loading import load_study
from training.augmentation import Augmentation
from training.batches import Batches, Share, XrayDataset
from training.prepared_images import prepared_images
from utils import Preprocessing, balanced_weights


def write_greys(folder, number):
    """Write images that are all 0, all 10, all 20, … and return their paths."""
    paths = [str(folder / f"{i}.png") for i in range(number)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((20, 20), 10 * i, dtype=np.uint8)).save(path)
    return paths


def numbers(number, **options):
    """Return batches of the numbers from 0 on: each image is its own row number."""
    values = torch.arange(float(number))
    return Batches(TensorDataset(values, values), 4, **options)


def test_weighted_draws_take_each_class_equally_often_with_replacement():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    drawn = numbers(1000, seed=0, weights=balanced_weights(labels, 3)).chosen(1)
    counts = np.bincount(np.asarray(labels)[drawn], minlength=3)
    assert len(drawn) == 1000
    # Binomial with p = 1/3: four standard deviations are 60.
    assert np.abs(counts - 1000 / 3).max() < 60
    assert len(set(drawn.tolist())) < 1000
    with pytest.raises(ValueError, match="class 1"):
        balanced_weights([0, 2, 2], 3)


def test_an_epoch_shows_every_image_once_in_an_order_that_seed_and_epoch_decide():
    batches = numbers(18, seed=5)
    first, again, second = ([batch.images for batch in batches.epoch(number)] for number in (1, 1, 2))
    assert [len(images) for images in first] == batches.sizes() == [4, 4, 4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(18))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), torch.cat([batch.images for batch in numbers(18, seed=6).epoch(1)]))
    assert torch.equal(torch.cat([batch.images for batch in numbers(18).epoch(1)]), torch.arange(18.0))


def test_a_resumed_epoch_goes_on_with_the_batches_that_are_left():
    whole, rest = (list(numbers(18, seed=5).epoch(3, start=start)) for start in (0, 2))
    assert len(rest) == 3
    for expected, batch in zip(whole[2:], rest, strict=True):
        assert torch.equal(expected.images, batch.images)
        assert expected.rows == batch.rows


@pytest.mark.parametrize(("processes", "batches"), [(1, 4), (2, 4), (3, 4), (4, 3)])
def test_processes_share_each_batch_and_every_image_has_one_process(processes, batches):
    shares = [list(numbers(15, seed=1).epoch(1, share=Share(index, processes))) for index in range(processes)]
    whole = list(numbers(15, seed=1).epoch(1))[:batches]  # a last batch of three images is too small for four processes
    assert {len(share) for share in shares} == {len(whole)}
    for parts, batch in zip(zip(*shares, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert max(len(part.images) for part in parts) - min(len(part.images) for part in parts) <= 1


def test_views_depend_on_seed_epoch_and_batch_and_not_on_the_process():
    pictures = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8)
    augment = Augmentation(horizontal_flip=True, rotation=20, brightness=0.3)
    batches = Batches(TensorDataset(pictures, torch.arange(10)), 5, seed=2, augment=augment)
    whole = [batch.images for batch in batches.epoch(4)]
    halves = [[batch.images for batch in batches.epoch(4, share=Share(i, 2))] for i in (0, 1)]
    assert torch.equal(torch.cat(whole), torch.cat([part for pair in zip(*halves, strict=True) for part in pair]))
    assert torch.equal(whole[1], next(batches.epoch(4, start=1)).images)
    order = batches.chosen(4)
    assert not torch.equal(torch.cat(whole), pictures[order].float())


def test_only_training_images_are_augmented_and_resampled(tmp_path):
    paths = write_greys(tmp_path, 17)
    splits = ["train"] * 13 + ["val"] * 2 + ["test"] * 2
    labels = [0] * 10 + [1] * 3 + [0, 1] + [1, 0]
    frame = pd.DataFrame({"path": paths, "patient": paths, "split": splits, "label": labels})
    table = XrayTable(frame, ("grey", "white"), tmp_path, has_patient_ids=False)
    study_file = tmp_path / "study.toml"
    study_file.write_text(
        TINY_STUDY.replace("horizontal_flip = true", "brightness = 0.5").replace(
            "batch_size = 8", 'batch_size = 4\nbalance = "oversample"'
        )
    )
    preprocessing = Preprocessing(16, (0, 0, 0), (1, 1, 1))
    batches = prepared_images(load_study(study_file), table, "resnet18", preprocessing, tmp_path).batches
    assert batches["train"].sizes() == [4, 4, 4]  # a last batch of one image is left out
    means = {
        name: torch.cat([batch.images.mean((1, 2, 3)) for batch in each.epoch(1)]) * 255
        for name, each in batches.items()
    }
    assert not torch.isin(means["train"].round(), torch.arange(13) * 10.0).all()
    torch.testing.assert_close(means["train_plain"], torch.arange(13) * 10.0)
    torch.testing.assert_close(means["val"], torch.tensor([130.0, 140.0]))
    assert [label for batch in batches["test"].epoch() for label in batch.targets.tolist()] == [1, 0]
    drawn = torch.cat([batch.targets for epoch in range(1, 40) for batch in batches["train"].epoch(epoch)])
    assert 0.4 < drawn.double().mean() < 0.6  # 3 of 13 without resampling


def test_targets_of_several_labels_arrive_as_rows_of_0_and_1(tmp_path):
    paths = write_greys(tmp_path, 2)
    targets = np.array([[1, 0, 1], [0, 0, 1]], dtype=np.uint8)
    dataset = XrayDataset(paths, targets, Preprocessing(16, (0, 0, 0), (1, 1, 1)))
    batch_targets = dataset[torch.tensor([1, 0])][1]
    assert batch_targets.dtype == torch.float32
    assert batch_targets.tolist() == targets[::-1].tolist()


def test_the_order_and_the_views_have_different_random_numbers():
    drawn = []

    class Recorder:
        def draw(self, number, generator):
            drawn.append(torch.randperm(10, generator=generator).tolist())
            return Augmentation().draw(number, generator)

        def __call__(self, images, draws):
            return images

    images = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(10))
    for seed in range(3):
        batches = Batches(data, 5, seed=seed, augment=Recorder())
        for epoch in range(4):
            drawn.clear()
            assert len(list(batches.epoch(epoch))) == len(drawn) == 2
            assert batches.chosen(epoch).tolist() not in drawn


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_have_every_row_once_and_differ_by_one_row_at_most(processes):
    for number in range(30):
        shares = [range(number)[Share(index, processes).slice(number)] for index in range(processes)]
        assert [row for share in shares for row in share] == list(range(number))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
