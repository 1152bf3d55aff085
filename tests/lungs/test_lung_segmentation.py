"""Pairs are found and split, lung models are trained and saved, masks are checked, applied and stored."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage
from sklearn.metrics import f1_score

from datasets.phantom import CLASSES, draw_phantoms, write_phantom
from lung_segmentation import main
from lungs.masking import LungMasking, dilated
from lungs.segmentation import (
    LungSegmenter,
    Pair,
    dice,
    find_pairs,
    implausible,
    load_segmenter,
    patient_group,
    save_segmenter,
    score_pairs,
    split_pairs,
    two_lungs,
    unet,
)
from networks import build_network
from studies.loading import PROJECT
from studies.settings import NetworkTraining
from training import lung_model
from training.lung_model import default_segmenter, fit, untrained_segmenter
from utils import derived_generator, read_mask, read_xray

DATA_ROOT = os.environ.get("DATA_ROOT")
BRIEF = NetworkTraining(epochs=1, image_size=32, batch_size=4, learning_rate=3e-3, precision="fp32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """48 phantoms of 64 px, none of them in the fixture `unseen`."""
    root = tmp_path_factory.mktemp("lungs") / "phantom"
    write_phantom(root, images_per_class=dict.fromkeys(CLASSES, 12), size=64, seed=0)
    return find_pairs(root)


@pytest.fixture(scope="module")
def unseen():
    return draw_phantoms(np.arange(16) % len(CLASSES), seed=99, size=64)


@pytest.fixture(scope="module")
def segmenter(pairs):
    return fit(
        untrained_segmenter(), pairs[:40], BRIEF.model_copy(update={"epochs": 8, "image_size": 64, "batch_size": 8})
    )


@pytest.fixture(scope="module")
def untrained():
    return replace(untrained_segmenter(seed=1), image_size=32)


@pytest.fixture(scope="module")
def folder(untrained, tmp_path_factory):
    """A folder with a saved model; tests must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "lungs"
    save_segmenter(folder, untrained)
    return folder


def blobs(seed, shape=(60, 80)):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return noise > 0.02


def put(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8), value, np.uint8))


# --- pairs -----------------------------------------------------------------------------------------------


def test_pairs_are_images_and_masks_of_one_stem_in_any_of_the_layouts(tmp_path):
    for name in ("images/a.jpg", "masks/a.png", "images/no-mask.png", "masks/no-image.png"):
        put(tmp_path / "flat" / name)
    for name in ("COVID/images/COVID-1.png", "COVID/masks/COVID-1.png", "Normal/images/Normal-1.png"):
        put(tmp_path / "classes" / name)
    for name in ("CXR_png/x.png", "images/CHN_1_0.png", "masks/CHN_1_0_mask.png"):
        put(tmp_path / "suffix" / name)
    mask_names = {pair.image.relative_to(tmp_path).as_posix(): pair.mask.name for pair in find_pairs(tmp_path)}
    assert mask_names == {
        "flat/images/a.jpg": "a.png",
        "classes/COVID/images/COVID-1.png": "COVID-1.png",
        "suffix/images/CHN_1_0.png": "CHN_1_0_mask.png",
    }


def test_phantom_has_a_pair_for_every_image(pairs):
    assert len(pairs) == len({pair.group for pair in pairs}) == 12 * len(CLASSES)
    assert all(str(pair.image).replace("/images/", "/masks/") == str(pair.mask) for pair in pairs)


def test_folder_without_pairs_is_an_error_with_the_remedy(tmp_path):
    put(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"put files of the same names into images/ and masks/"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("covid-19-pneumonia-evolution-over-a-week-1-day0-PA", "covid-19-pneumonia-evolution-over-a-week-1-day3"),
        ("x-ards-admission", "x-ards-day-1", "x-ards-day-2"),
        ("y-rapidly-progressive-12-hours", "y-rapidly-progressive-3-days", "y-rapidly-progressive-admission"),
        ("auntminnie-a-2020_Vietnam", "auntminnie-b-2020_Vietnam"),
        ("ryct.2020200034.fig2", "ryct.2020200034.fig5-day0"),
        ("main.pdf-000-fig1a", "main.pdf-000-fig1b"),
        ("lancet-case2a", "lancet-case2b"),
        ("nejmoa2001191_f4", "nejmoa2001191_f5-PA"),
        ("gr1_lrg-a", "gr1_lrg-b"),
        ("all14238-fig-0001-m-b", "all14238-fig-0002-m-d"),
    ],
)
def test_images_of_one_patient_are_one_group(names):
    assert len({patient_group(name) for name in names}) == 1


def test_names_with_a_number_alone_are_different_patients():
    names = ["COVID-1", "COVID-12", "Normal-1", "covid-19-pneumonia-12", "covid-19-pneumonia-30-PA", "fig1", "a"]
    assert len({patient_group(name) for name in names}) == len(names)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("test", [1, 4, 8])
def test_split_keeps_groups_whole_and_never_holds_out_a_larger_part_than_needed(seed, test):
    sizes = (5, 3, 3, 2)
    four_groups = [Pair(Path(f"{g}{i}"), Path(), g) for g, n in zip("abcd", sizes, strict=True) for i in range(n)]
    train, held_out = split_pairs(four_groups, test=test, seed=seed)
    assert 1 <= len(held_out) <= max(test, min(sizes))
    assert test - len(held_out) < max(sizes)
    assert not {p.group for p in train} & {p.group for p in held_out}
    assert sorted(train + held_out) == sorted(four_groups)


def test_one_large_group_is_not_held_out_in_place_of_many_small_ones():
    pairs = [Pair(Path(f"{i}"), Path(), "large" if i < 60 else f"small{i}") for i in range(100)]
    assert [len(split_pairs(pairs, test=19, seed=seed)[1]) for seed in range(8)] == [19] * 8


def test_split_differs_between_seeds_and_not_within_one(pairs):
    halves = [split_pairs(pairs, test=12, seed=seed) for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]
    assert [len(test) for _, test in halves] == [12, 12, 12]


@pytest.mark.parametrize("test", [0, 2])
def test_split_that_leaves_a_side_empty_is_refused(test):
    with pytest.raises(ValueError, match="give more pairs or another --test"):
        split_pairs([Pair(Path("a"), Path("a"), "a"), Pair(Path("b"), Path("b"), "b")], test=test, seed=0)


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_dice_is_scikit_learns_f1(seed):
    first, second = blobs(seed), blobs(seed + 10)
    assert dice(first, second) == pytest.approx(f1_score(second.ravel(), first.ravel()))


def test_two_empty_masks_agree_and_an_empty_one_agrees_with_nothing_else():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert dice(empty, empty) == 1
    assert dice(empty, full) == 0


@pytest.mark.parametrize("seed", range(4))
def test_two_lungs_are_the_largest_two_parts_with_scipys_holes_filled(seed):
    mask = blobs(seed)
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    filled = [ndimage.binary_fill_holes(parts == number) for number in range(1, count + 1)]
    # A part in a hole of another part is filled with that hole, so it does not count.
    outer = [f for f in filled if not any((f & g).sum() == f.sum() < g.sum() for g in filled)]
    outer.sort(key=lambda part: -part.sum())
    assert count > 2
    np.testing.assert_array_equal(two_lungs(mask), outer[0] | outer[1])


def test_small_parts_are_no_lungs():
    mask = np.zeros((100, 100), bool)
    mask[20:80, 10:40] = True
    mask[50:55, 70:75] = True  # 0.25 % of the image
    lungs = two_lungs(mask)
    assert lungs[20:80, 10:40].all()
    assert lungs.sum() == 60 * 30
    assert not two_lungs(np.zeros((10, 10), bool)).any()


@pytest.mark.parametrize("margin", [0.0, 0.03, 0.1])
def test_dilated_mask_is_what_scipys_distance_says(margin):
    mask = two_lungs(blobs(1))
    expected = ndimage.distance_transform_edt(~mask) <= margin * 80
    assert (dilated(mask, margin) != expected).mean() < 1e-3
    assert not dilated(np.zeros((5, 5), bool), margin).any()


def test_implausible_masks_have_a_reason():
    mask = np.zeros((100, 100), bool)
    assert implausible(mask) == "no lung found"
    mask[10:90, 5:40] = True
    assert implausible(mask) == "one lung only"
    assert implausible(mask | mask[:, ::-1]) is None
    assert implausible(~np.zeros((100, 100), bool)) == "lungs cover 100% of the image"
    corner = mask | mask[:, ::-1]
    corner[:12, 90:] = True
    assert implausible(corner) == implausible(corner[:, ::-1]) == "lungs reach into an upper corner"
    mask[:] = False
    mask[40:60, 45:55] = True
    assert implausible(mask) == "lungs cover only 2.0% of the image"


def test_true_lungs_of_phantoms_are_plausible():
    phantoms = draw_phantoms(np.arange(64) % len(CLASSES), seed=5, size=64)
    assert [implausible(mask) for mask in phantoms.lung_masks] == [None] * 64


@pytest.mark.skipif(DATA_ROOT is None, reason="DATA_ROOT does not name a folder with covid-chestxray in it")
def test_true_lungs_of_patients_are_plausible_and_pairs_are_split_by_patient():
    real = find_pairs(Path(DATA_ROOT) / "covid-chestxray")
    train, test = split_pairs(real, test=19, seed=0)
    assert len(test) == 19
    assert not {pair.group for pair in train} & {pair.group for pair in test}
    for pair in real:
        mask = read_mask(pair.mask, read_xray(pair.image).shape)
        assert implausible(mask) is None, pair.mask
        assert dice(two_lungs(mask), mask) > 0.99  # hand-drawn masks have holes of a few pixels


# --- learning --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_segmenter_finds_lungs_of_phantoms_it_has_not_seen_better_than_the_average_mask(segmenter, pairs, unseen):
    pairs_of_masks = zip(unseen.images, unseen.lung_masks, strict=True)
    scores = [dice(segmenter.predict(image), mask) for image, mask in pairs_of_masks]
    average = np.mean([read_xray(pair.mask) > 0 for pair in pairs[:40]], axis=0) > 0.5
    chance = [dice(average, mask) for mask in unseen.lung_masks]
    assert np.mean(scores) > np.mean(chance) + 0.03


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (200, 120)])
@pytest.mark.slow
def test_a_mask_has_the_size_of_its_xray(segmenter, unseen, shape):
    mask = segmenter.predict(cv2.resize(unseen.images[0], shape[::-1]))
    assert (mask.shape, mask.dtype) == (shape, bool)


@pytest.mark.slow
def test_exposure_hardly_changes_a_mask(segmenter, unseen):
    dim = (unseen.images * 0.6 + 20).astype(np.uint8)
    pairs = zip(unseen.images, dim, strict=True)
    assert min(dice(segmenter.predict(image), segmenter.predict(dark)) for image, dark in pairs) > 0.97


def test_augmentation_moves_image_and_mask_together(unseen):
    masks = torch.from_numpy(unseen.lung_masks)[:, None] * torch.tensor(255, dtype=torch.uint8)
    views = lung_model.PairViews()
    draws = views.draw(len(masks), derived_generator(0, "views"))
    moved = views(torch.cat([masks, masks], dim=1), draws).numpy()
    for lungs, (image, mask) in zip(unseen.lung_masks, moved, strict=True):
        assert dice(image > image.max() / 2, mask > 127.5) > 0.98
        assert dice(lungs, mask > 127.5) < 0.999


def test_an_xray_and_its_mask_have_the_same_views_in_a_batch(pairs):
    """If the mask is also given as the X-ray, the two stay alike in every batch."""
    same = [Pair(pair.mask, pair.mask, pair.group) for pair in pairs[:6]]
    batches = lung_model.PairBatches(lung_model.decoded(same, 64), 4, seed=0, augment=lung_model.PairViews())
    for batch in batches.epoch(1):
        assert batch.targets.dtype == torch.bool
        assert batch.images.shape == batch.targets.shape
        for image, mask in zip(batch.images.numpy(), batch.targets.numpy(), strict=True):
            assert dice(image > (image.max() + image.min()) / 2, mask) > 0.98


@pytest.mark.slow
def test_same_seed_same_weights_and_the_callers_random_numbers_stay(pairs):
    state = torch.random.get_rng_state()
    starts = [untrained_segmenter(seed=seed) for seed in (0, 0, 1)]
    first, second, third = (fit(start, pairs[:8], BRIEF).fingerprint for start in starts)
    assert first == second != third
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("size", [64, 128])
def test_masks_to_train_on_lie_where_their_xrays_show_the_lungs(tmp_path, size):
    pairs = []
    for k in range(8):
        xray = np.zeros((512, 512), np.uint8)
        cv2.circle(xray, (180 + 17 * k, 256), 130 - 9 * k, 255, cv2.FILLED)
        cv2.imwrite(str(tmp_path / f"{k}.png"), xray)
        pairs.append(Pair(tmp_path / f"{k}.png", tmp_path / f"{k}.png", str(k)))  # the lungs alone are white
    moved = []
    for picture, _ in lung_model.decoded(pairs, size):
        assert picture.shape == (2, size, size)
        assert set(picture[1].unique().tolist()) == {0, 255}
        seen, truth = (ndimage.center_of_mass(channel.numpy()) for channel in picture)
        moved.append(np.subtract(seen, truth))
    assert np.abs(moved).max() < 0.2  # of a pixel of the network
    assert np.abs(np.mean(moved, axis=0)).max() < 0.05


@pytest.mark.slow
def test_training_goes_on_from_the_start(segmenter, pairs):
    gentle = BRIEF.model_copy(update={"image_size": 64, "learning_rate": 1e-6})
    before = segmenter.fingerprint
    after = fit(segmenter, pairs[:8], gentle)
    assert replace(segmenter).fingerprint == before != after.fingerprint
    assert after.origin["start"]["fingerprint"] == before
    for key, value in after.network.named_parameters():
        assert (value - segmenter.network.get_parameter(key)).abs().max() < 1e-4


@pytest.mark.slow
def test_validation_dice_is_that_of_pairs_that_were_not_trained_on(segmenter, pairs):
    _, val = split_pairs(pairs[:40], test=5, seed=0)
    assert segmenter.validation["pairs"] == len(val) == 5
    assert segmenter.validation["dice"] == pytest.approx(score_pairs(segmenter, val)["dice"].mean(), abs=0.01)


@pytest.mark.slow
def test_one_pair_is_too_few_to_train_on(untrained, pairs):
    with pytest.raises(ValueError, match="give more pairs"):
        fit(untrained, pairs[:1], BRIEF)


@pytest.mark.slow
def test_scores_are_those_of_each_pair(segmenter, pairs):
    scores = score_pairs(segmenter, pairs[40:43])
    assert list(scores.columns) == ["path", "group", "dice", "iou"]
    for row, pair in zip(scores.itertuples(), pairs[40:43], strict=True):
        predicted = segmenter.predict(read_xray(pair.image))
        truth = read_xray(pair.mask) > 0
        assert (row.path, row.group) == (str(pair.image), pair.group)
        assert row.dice == pytest.approx(f1_score(truth.ravel(), predicted.ravel()), abs=1e-3)
        assert row.iou == pytest.approx(row.dice / (2 - row.dice))


# --- on disk ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loaded_segmenter_predicts_the_same_masks(segmenter, unseen, tmp_path):
    save_segmenter(tmp_path, segmenter)
    loaded = load_segmenter(tmp_path)
    assert loaded.fingerprint == segmenter.fingerprint
    for xray in unseen.images[:4]:
        np.testing.assert_array_equal(loaded.predict(xray), segmenter.predict(xray))
    about = json.loads((tmp_path / "model.json").read_text())
    assert (about["kind"], about["encoder"], about["image_size"]) == ("lung segmentation", "resnet18", 64)
    assert about["origin"]["train_pairs"] == 35
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.json", None),
        ("model.safetensors", None),
        ("model.json", b'{"kind": "lung segm'),
        ("model.json", b'{"architecture": "resnet18"}'),
        ("model.json", b"[]"),
        ("model.safetensors", b"broken"),
    ],
)
def test_missing_or_damaged_model_is_one_line_with_the_remedy(folder, tmp_path, name, content):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=r"python lung_segmentation.py fit") as caught:
        load_segmenter(tmp_path)
    assert "\n" not in str(caught.value)


def test_older_models_whose_files_do_not_name_their_decoder_channels_still_load(unseen, tmp_path):
    network = unet("resnet18", (256, 128, 64, 32, 16)).eval()
    older = LungSegmenter(network, "resnet18", 32, decoder_channels=(256, 128, 64, 32, 16))
    save_segmenter(tmp_path, older)
    about = json.loads((tmp_path / "model.json").read_text())
    assert about.pop("decoder_channels") == [256, 128, 64, 32, 16]
    (tmp_path / "model.json").write_text(json.dumps(about))
    loaded = load_segmenter(tmp_path)
    assert loaded.fingerprint == older.fingerprint
    assert loaded.decoder_channels == (256, 128, 64, 32, 16)
    np.testing.assert_array_equal(loaded.predict(unseen.images[0]), older.predict(unseen.images[0]))


def test_a_model_is_saved_with_its_decoder_channels(untrained, folder):
    assert json.loads((folder / "model.json").read_text())["decoder_channels"] == [128, 64, 32, 16, 16]
    assert load_segmenter(folder).fingerprint == untrained.fingerprint


def test_weights_of_another_model_are_noticed(folder, tmp_path):
    save_segmenter(tmp_path, untrained_segmenter(seed=2))
    (tmp_path / "model.json").write_bytes((folder / "model.json").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        load_segmenter(tmp_path)


@pytest.mark.slow
def test_default_segmenter_is_trained_once_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lung_model, "PHANTOMS", 8)
    monkeypatch.setattr(lung_model, "PHANTOM_TRAINING", BRIEF)
    first = default_segmenter(tmp_path / "lungs")
    printed = capsys.readouterr().out
    assert "training a small one" in printed
    assert "python lung_segmentation.py fit --pairs DIR" in printed
    second = default_segmenter(tmp_path / "lungs")
    printed = capsys.readouterr().out  # the warning comes at every load
    assert "training a small one" not in printed
    assert "synthetic phantom alone" in printed
    assert first.fingerprint == second.fingerprint
    assert second.origin["data"] == "synthetic phantom"
    assert second.knows == "a lung model that knows the synthetic phantom only"


@pytest.mark.slow
def test_a_stopgap_whose_phantoms_may_be_a_studys_patients_is_trained_again(segmenter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lung_model, "PHANTOMS", 8)
    monkeypatch.setattr(lung_model, "PHANTOM_TRAINING", BRIEF)
    older = replace(segmenter, origin={"data": "synthetic phantom", "seed": 0})
    save_segmenter(tmp_path, older)
    again = default_segmenter(tmp_path)
    first_line = capsys.readouterr().out.splitlines()[0]
    assert "phantoms that may be a study's patients" in first_line
    assert "training a small one" in first_line
    assert again.origin["phantom_seed"] == 2**63
    assert again.fingerprint == default_segmenter(tmp_path).fingerprint != older.fingerprint
    assert "training a small one" not in capsys.readouterr().out
    save_segmenter(tmp_path, segmenter)  # it was trained on pairs
    assert default_segmenter(tmp_path).fingerprint == segmenter.fingerprint


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.slow
def test_phantoms_to_train_on_are_no_patients_of_a_studys_phantom(tmp_path, seed):
    pairs = lung_model.phantom_pairs(tmp_path / "training", 40, image_size=64, seed=seed)
    assert len(pairs) == 40
    # A patient's lungs are the same whatever the disease, so each patient is drawn once.
    study = draw_phantoms(np.arange(80) % len(CLASSES), seed=seed, size=64)
    lungs = {mask.tobytes() for mask in study.lung_masks}
    images = {image.tobytes() for image in study.images}
    assert len(lungs) == len(images) == 80
    assert not lungs & {(read_xray(pair.mask) > 0).tobytes() for pair in pairs}
    assert not images & {read_xray(pair.image).tobytes() for pair in pairs}


@pytest.mark.slow
def test_predicting_needs_none_of_the_heavy_libraries(folder):
    code = f"""
import sys, pathlib, numpy
from lungs.masking import LungMasking
from lungs.segmentation import load_segmenter
LungMasking(load_segmenter(pathlib.Path({str(folder)!r})))(numpy.zeros((64, 64), numpy.uint8))
heavy = {{"pandas", "sklearn", "matplotlib", "scipy", "pydantic", "seaborn", "accelerate"}} & set(sys.modules)
assert not heavy, heavy
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_one_of_two_launched_processes_trains_the_lung_model_and_both_go_on(tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        f"""
import pathlib, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch
from training import lung_model
from training.processes import accelerator_on
lung_model.PHANTOMS = 8
lung_model.PHANTOM_TRAINING = lung_model.NetworkTraining(epochs=1, image_size=32, batch_size=4)
processes = accelerator_on(torch.device("cpu"))
with processes.main_process_first():
    segmenter = lung_model.default_segmenter(pathlib.Path({str(tmp_path / "lungs")!r}))
print("done", accelerator_on(torch.device("cpu")).num_processes, segmenter.fingerprint)
"""
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--num_machines", "1", "--mixed_precision", "no", str(script)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert out.count("training a small one") == 1
    assert out.count(f"done 2 {load_segmenter(tmp_path / 'lungs').fingerprint}") == 2


# --- masking ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_lungs_and_a_margin_are_left(segmenter, unseen):
    masking = LungMasking(segmenter)
    for xray in unseen.images:
        mask, reason = masking.mask_of(xray)
        left = masking(xray)
        grown = ndimage.distance_transform_edt(~mask) <= 0.03 * 64
        assert reason is None
        assert left.dtype == np.uint8
        np.testing.assert_array_equal(left, np.where(grown, xray, 0))
        assert 0 < (left == 0).mean() < 1


@pytest.mark.slow
def test_xray_without_lungs_comes_back_whole_and_is_listed(segmenter, unseen, tmp_path):
    nothing = np.zeros((64, 64), np.uint8)
    masking = LungMasking(segmenter, tmp_path / "cache")
    np.testing.assert_array_equal(masking(nothing), nothing)
    files = [tmp_path / "nothing.png", tmp_path / "chest.png"]
    for file, xray in zip(files, (nothing, unseen.images[0]), strict=True):
        cv2.imwrite(str(file), xray)
    failures = masking.failures(files)
    reason = masking.mask_of(nothing).reason
    assert reason is not None
    assert failures == {str(files[0]): reason}


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_each_image_is_predicted_once_whatever_its_path(untrained, unseen, tmp_path, monkeypatch, where):
    predicted = []
    predict = type(untrained).predict
    monkeypatch.setattr(type(untrained), "predict", lambda self, xray: predicted.append(xray) or predict(self, xray))
    masking = LungMasking(untrained, tmp_path / "cache" if where == "disk" else None)
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file, xray in zip(files, unseen.images, strict=False):
        cv2.imwrite(str(file), xray)
    masking.failures(files)
    assert len(predicted) == 5
    masks = [masking.mask_of(xray).mask for xray in unseen.images[:7]]
    assert len(predicted) == 7
    for xray, mask in zip(unseen.images, masks, strict=False):
        np.testing.assert_array_equal(mask, predict(untrained, xray))


def stored_files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.slow
def test_stored_mask_is_used_and_a_damaged_one_is_predicted_again(segmenter, unseen, tmp_path):
    xray = unseen.images[0]
    masking = LungMasking(segmenter, tmp_path)
    mask = masking.mask_of(xray).mask
    (file,) = stored_files(tmp_path)
    good = file.read_bytes()
    planted = np.zeros((64, 64), np.uint8)
    planted[10:50, 10:20] = 255
    cv2.imwrite(str(file), planted)
    np.testing.assert_array_equal(masking.mask_of(xray).mask, planted > 0)
    other_size = cv2.imencode(".png", planted[:32])[1].tobytes()
    for bad in (b"", b"no picture", good[: len(good) // 2], good[:60] + b"\0" * 9 + good[69:], other_size):
        file.write_bytes(bad)
        np.testing.assert_array_equal(masking.mask_of(xray).mask, mask)
        assert file.read_bytes() == good


@pytest.mark.slow
def test_each_segmenter_and_shape_has_its_own_stored_masks(segmenter, untrained, unseen, tmp_path):
    xray = unseen.images[0]
    for number, (model, image) in enumerate(
        [(segmenter, xray), (untrained, xray), (segmenter, xray.reshape(32, 128))], start=1
    ):
        LungMasking(model, tmp_path).mask_of(image)
        assert len(stored_files(tmp_path)) == number


@pytest.mark.slow
def test_two_processes_may_fill_one_cache(folder, pairs, tmp_path):
    root = pairs[0].image.parents[2]
    code = f"""
import pathlib
from lungs.masking import LungMasking
from lungs.segmentation import find_pairs, load_segmenter
masking = LungMasking(load_segmenter(pathlib.Path({str(folder)!r})), pathlib.Path({str(tmp_path)!r}))
masking.failures([pair.image for pair in find_pairs(pathlib.Path({str(root)!r}))[:12]])
"""
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    masking = LungMasking(load_segmenter(folder), tmp_path)
    for pair in pairs[:12]:
        masking.mask_of(read_xray(pair.image))
    assert len(stored_files(tmp_path)) == 12


# --- command line ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line_trains_scores_saves_and_predicts(pairs, tmp_path, capsys):
    root = pairs[0].image.parents[2]
    model, masks = tmp_path / "model", tmp_path / "masks"
    small = ["--epochs", "1", "--image-size", "32", "--device", "cpu", "--test", "8"]
    assert main(["fit", "--pairs", str(root), "--phantom", "8", *small, "-o", str(model)]) == 0
    out = capsys.readouterr().out
    assert "40 pairs to train on and to choose the epoch, 8 held out" in out
    assert "held out: Dice 0." in out
    about = json.loads((model / "model.json").read_text())
    assert about["validation"]["pairs"] == 8
    assert f"held out: Dice {about['validation']['dice']:.3f} (" in out
    assert about["origin"]["start"]["data"] == "synthetic phantom"
    assert load_segmenter(model).knows == "a lung model that learnt from 35 X-rays with lung masks"
    image = pairs[0].image
    assert main(["predict", "-m", str(model), "-i", str(image), str(tmp_path / "none.png"), "-o", str(masks)]) == 1
    written = cv2.imread(str(masks / image.name), cv2.IMREAD_UNCHANGED)
    predicted = load_segmenter(model).predict(read_xray(image))
    np.testing.assert_array_equal(written, predicted.astype(np.uint8) * 255)
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "-o", "x"], "give --pairs DIR, --phantom N, or both"),
        (["fit", "--pairs", "nowhere", "-o", "x"], "images/ and masks/"),
        (["fit", "--start", "nowhere", "--pairs", "nowhere", "-o", "x"], "python lung_segmentation.py fit"),
        (["predict", "-m", "nowhere", "-i", "a.png", "-o", "x"], "python lung_segmentation.py fit"),
        (["predict", "-m", "nowhere", "-i", "1/a.png", "2/a.png", "-o", "x"], "two X-rays of one name"),
    ],
)
def test_command_line_refuses_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def xrays(unseen, tmp_path):
    """A folder with three X-rays."""
    for name, image in zip(("a.jpg", "b.png", "c.png"), unseen.images, strict=False):
        put(tmp_path / "xrays" / name)
        cv2.imwrite(str(tmp_path / "xrays" / name), image)
    return tmp_path / "xrays"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def predict(folder, output, *images):
    return main(["predict", "-m", str(folder), "-o", str(output), "-i", *map(str, images)])


def test_masks_are_written_again_over_masks_and_an_edited_one_is_kept(folder, xrays, tmp_path, capsys):
    images, masks = sorted(xrays.iterdir()), tmp_path / "masks"
    assert predict(folder, masks, *images) == 0
    first = contents(masks)
    assert sorted(first) == ["a.png", "b.png", "c.png"]
    assert predict(folder, masks, *images) == 0
    assert contents(masks) == first
    cv2.imwrite(str(masks / "b.png"), 255 - cv2.imread(str(masks / "b.png"), cv2.IMREAD_UNCHANGED))
    edited = contents(masks)
    capsys.readouterr()
    assert predict(folder, masks, *images) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("b.png is there and is no mask of this command's: choose another -o")
    assert contents(masks) == edited


@pytest.mark.parametrize("place", ["beside", "itself", "hard link", "symlink", "dangling", "loop", "mask"])
def test_only_masks_are_replaced(folder, xrays, tmp_path, capsys, place):
    given, masks = xrays / "b.png", tmp_path / "masks"
    masks.mkdir()
    if place == "beside":  # the mask of a.jpg would be named a.png, which is another X-ray
        given, masks = xrays / "a.jpg", xrays
        (xrays / "c.png").rename(xrays / "a.png")
    elif place == "itself":
        (tmp_path / "other name").symlink_to(xrays)
        masks = tmp_path / "other name"
    elif place == "hard link":
        os.link(xrays / "c.png", masks / "b.png")
    elif place == "mask":  # a mask is given as an X-ray
        predict(folder, xrays / "masks", given)
        given, masks = xrays / "masks" / "b.png", xrays / "masks"
        capsys.readouterr()
    else:
        target = {"symlink": xrays / "c.png", "dangling": "nowhere", "loop": "b.png"}[place]
        (masks / "b.png").symlink_to(target)
    before, names = contents(xrays), sorted(path.name for path in masks.iterdir())
    masks_before = contents(masks)
    assert predict(folder, masks, given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is there and is no mask of this command's: choose another -o")
    assert (contents(xrays), contents(masks)) == (before, masks_before)
    assert sorted(path.name for path in masks.iterdir()) == names


def test_each_loop_of_links_is_one_line_on_stderr_and_the_other_images_are_done(folder, xrays, tmp_path, capsys):
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert predict(folder, tmp_path / "masks", tmp_path / "loop.png", xrays / "b.png") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(contents(tmp_path / "masks")) == ["b.png"]
    assert predict(folder, tmp_path / "loop.png", xrays / "b.png") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_full_disk_stops_in_one_line_and_leaves_whole_masks_only(folder, xrays, tmp_path, capsys):
    masks, images = tmp_path / "masks", sorted(xrays.iterdir())
    assert predict(folder, masks, images[0]) == 0
    before = contents(masks)
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        status = predict(folder, masks, *images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.png cannot be written (File too large)" in line
    assert contents(masks) == before


@pytest.mark.parametrize(
    "files",
    [
        {"model.json": b'{"architecture": "resnet18"}', "model.safetensors": b"weights"},
        {"model.json": b"[]"},
        {"model.json": b'{"kind": "lung segm'},
        {"model.safetensors": b"weights"},
    ],
)
def test_model_that_is_no_lung_model_is_not_replaced_and_nothing_is_trained(pairs, tmp_path, capsys, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    root = str(pairs[0].image.parents[2])
    assert main(["fit", "--pairs", root, "-o", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert f"the model in {tmp_path} is no lung model: choose another folder" in printed.err
    assert contents(tmp_path) == files


def test_a_lung_model_whose_saving_was_killed_before_its_end_is_replaced(untrained, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lungs.segmentation.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save_segmenter(tmp_path, untrained)
    with pytest.raises(FileNotFoundError, match=r"is missing.*run python lung_segmentation.py fit"):
        load_segmenter(tmp_path)
    save_segmenter(tmp_path, untrained)
    assert load_segmenter(tmp_path).fingerprint == untrained.fingerprint


def test_weights_of_a_classifier_alone_are_not_replaced(untrained, tmp_path):
    save_file(build_network("small_cnn", 2).state_dict(), tmp_path / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is no lung model"):
        save_segmenter(tmp_path, untrained)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_other_files_beside_a_lung_model_stay_when_it_is_replaced(segmenter, untrained, tmp_path):
    save_segmenter(tmp_path, segmenter)
    (tmp_path / "model.tmp").write_text("notes")
    save_segmenter(tmp_path, untrained)
    assert load_segmenter(tmp_path).fingerprint == untrained.fingerprint
    assert (tmp_path / "model.tmp").read_text() == "notes"
