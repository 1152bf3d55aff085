"""A training belongs to one set of images. Images that change or vanish during it or later are named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from datasets import data_fingerprint
from evaluation.runs import read_runs, read_seeds
from finetune import fine_tune_study, main
from studies.loading import load_study, load_table, read_images
from training import prepared_images
from training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

STUDY = """
title = "Dark or bright"
positive = "bright"
[data]
reader = "folder"
root = "xrays"
[split]
val = 0.2
test = 0.2
[preprocessing]
image_size = 32
[training]
weights = "none"
epochs = 1
batch_size = 4
learning_rate = 1e-3
precision = "fp32"
[networks.lenet5]
"""


def write(path, grey):
    """Write a picture of 32 px with its own noise. All files have the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 20, (32, 32))
    Image.fromarray((grey + noise).astype(np.uint8)).save(path, "BMP")


@pytest.fixture
def study(tmp_path):
    """A study of ten dark and ten bright uncompressed pictures."""
    for number in range(10):
        write(tmp_path / "xrays" / "bright" / f"{number}.bmp", 200)
        write(tmp_path / "xrays" / "dark" / f"{number}.bmp", 30)
    (tmp_path / "brightness.toml").write_text(STUDY)
    return load_study(tmp_path / "brightness.toml")


def overwrite(path, grey=90):
    """Replace the content of a picture; its size and modification time stay the same."""
    before = os.stat(path)
    write(path, grey)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def train(study, **options):
    runs = study.data.root.parent / "runs"
    return fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu", **options)


def after_training(monkeypatch, act):
    """Call `act` after the last epoch, before the results are written."""
    fine_tune = finetune.fine_tune

    def fine_tune_and_act(*args, **options):
        course = fine_tune(*args, **options)
        act()
        return course

    monkeypatch.setattr(finetune, "fine_tune", fine_tune_and_act)


def test_a_fingerprint_changes_with_the_content_even_if_size_and_time_do_not(study):
    before = data_fingerprint(load_table(study))
    assert data_fingerprint(load_table(study)) == before
    picture = study.data.root / "dark" / "3.bmp"
    content = picture.read_bytes()
    overwrite(picture)
    assert data_fingerprint(load_table(study)) != before
    picture.write_bytes(content)
    assert data_fingerprint(load_table(study)) == before


def test_images_that_change_in_training_are_named_and_the_first_fingerprint_is_recorded(study, capsys, monkeypatch):
    before = data_fingerprint(load_table(study))
    picture = study.data.root / "dark" / "3.bmp"
    after_training(monkeypatch, lambda: overwrite(picture))
    folder = train(study)
    printed = capsys.readouterr().out
    assert (
        f"WARNING: 1 of 20 images have changed since the training of LeNet-5 began, the first: {picture} has" in printed
    )
    assert json.loads((folder / "model.json").read_text())["origin"]["data_fingerprint"] == before
    with pytest.raises(ValueError, match=r"have changed since .*lenet5 was trained: put them back, or train again"):
        read_runs(study, folder.parent.parent, read_images(study))


def test_results_of_images_that_changed_between_epochs_never_count_as_finished(study, monkeypatch, capsys):
    study = study.overridden(cache_images=False)
    picture = study.data.root / "dark" / "3.bmp"
    content = picture.read_bytes()
    after_training(monkeypatch, lambda: overwrite(picture))
    folder = train(study)
    picture.write_bytes(content)
    with pytest.raises(ValueError, match="have changed"):
        read_runs(study, folder.parent.parent, read_images(study))
    capsys.readouterr()
    train(study)
    assert "is finished" not in capsys.readouterr().out


def test_an_image_that_changes_while_images_are_decoded_is_not_trained_on(study, monkeypatch):
    cached, picture = prepared_images.cached, study.data.root / "dark" / "3.bmp"

    def cached_and_overwritten(*args, **options):
        images = cached(*args, **options)
        overwrite(picture)
        return images

    monkeypatch.setattr(prepared_images, "cached", cached_and_overwritten)
    with pytest.raises(ValueError, match="changed while they were decoded: train again"):
        train(study)
    monkeypatch.undo()
    before = data_fingerprint(load_table(study))
    folder = train(study)
    assert json.loads((folder / "model.json").read_text())["origin"]["data_fingerprint"] == before


def test_an_unreadable_image_is_not_reported_as_missing(study):
    table, picture = load_table(study), study.data.root / "dark" / "3.bmp"
    picture.unlink()
    picture.mkdir()
    with pytest.raises(OSError, match=r"cannot be read: .*3\.bmp"):
        data_fingerprint(table)


def test_deleting_images_during_training_changes_no_result_if_they_are_cached(study, capsys, monkeypatch):
    expected = (train(study) / "predictions_test.csv").read_bytes()
    root = study.data.root
    after_training(monkeypatch, lambda: shutil.rmtree(root / "dark"))
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=root.parent / "other", device="cpu")
    assert (folder / "predictions_test.csv").read_bytes() == expected
    printed = capsys.readouterr().out
    assert "WARNING: 10 of 20 images have changed since the training of LeNet-5 began, the first: " in printed
    assert "0.bmp is gone. Put them back, or train again" in printed


def test_deleting_images_during_training_keeps_its_state_if_they_are_not_cached(study, monkeypatch):
    study = study.overridden(cache_images=False)
    expected = (train(study) / "model.safetensors").read_bytes()
    table, runs = load_table(study), study.data.root.parent / "other"
    picture = Path(table.subset("test")["path"][0])
    content = picture.read_bytes()
    after_training(monkeypatch, picture.unlink)
    with pytest.raises(FileNotFoundError, match="no such file"):
        fine_tune_study(study, table, "lenet5", runs=runs, device="cpu")
    assert (runs / "brightness" / "lenet5" / "resume" / "state.pt").is_file()
    picture.write_bytes(content)
    monkeypatch.undo()
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu")
    assert (folder / "model.safetensors").read_bytes() == expected


def test_a_training_does_not_continue_on_other_images(study, capsys, monkeypatch):
    runs = study.data.root.parent / "runs"
    save = Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        raise KeyboardInterrupt("stopped")

    command = [str(study.data.root.parent / "brightness.toml"), "--runs", str(runs), "--device", "cpu"]
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    assert main(command) == 130
    monkeypatch.undo()
    overwrite(study.data.root / "bright" / "0.bmp")
    capsys.readouterr()
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert "holds an unfinished training on other images: their content, their labels or their splits" in errors
    assert "start anew with --restart" in errors
    assert main([*command, "--restart"]) == 0


def test_images_that_changed_after_the_training_are_refused_with_its_predictions(study, capsys):
    folder = train(study)
    read_runs(study, folder.parent.parent, read_images(study))
    write(study.data.root / "bright" / "new.bmp", 200)  # not used in the training
    read_runs(study, folder.parent.parent, read_images(study))
    overwrite(study.data.root / "bright" / "7.bmp")
    with pytest.raises(ValueError, match="have changed since"):
        read_runs(study, folder.parent.parent, read_images(study))


def test_a_run_without_a_content_fingerprint_is_not_reported_as_changed(study, capsys):
    folder = train(study)
    card = json.loads((folder / "model.json").read_text())
    card["origin"]["data_fingerprint"] = "0123456789abcdef"  # as older versions wrote it
    (folder / "model.json").write_text(json.dumps(card))
    capsys.readouterr()
    for read in (read_runs, read_seeds):
        read(study, folder.parent.parent, read_images(study))
    assert capsys.readouterr().out == (
        f"LeNet-5 ({folder}) does not record what was in its images: they may have changed since\n"
    )


# --- classes without images ---


def divided(root, folders):
    """Move the pictures into folders of splits; `folders` says how many: "split/class" -> number."""
    pictures = {name: sorted((root / name).iterdir()) for name in ("bright", "dark")}
    for place, number in folders.items():
        target = root / place
        target.mkdir(parents=True)
        for path in pictures[target.name][:number]:
            path.rename(target / path.name)
        pictures[target.name] = pictures[target.name][number:]
    for name in pictures:
        shutil.rmtree(root / name)


@pytest.mark.parametrize("balance", ["none", "loss", "oversample"])
def test_a_class_without_training_images_is_refused_by_name(study, balance):
    root = study.data.root
    divided(root, {"train/bright": 6, "val/bright": 2, "val/dark": 2, "test/bright": 2, "test/dark": 2})
    with pytest.raises(ValueError, match=r"no training image of dark: add some, .* leave the class out \(classes"):
        train(study.overridden(balance=balance))
    assert not (root.parent / "runs" / "brightness").exists()


def test_a_class_without_validation_images_is_named_in_a_warning(study, capsys):
    root = study.data.root
    divided(root, {"train/bright": 6, "train/dark": 6, "val/bright": 2, "test/bright": 2, "test/dark": 2})
    train(study.overridden(balance="none"))
    assert "WARNING: no validation image of dark: nothing is chosen by that class" in capsys.readouterr().out


# --- a network that does not learn ---


def test_only_a_network_that_has_not_learnt_gets_a_warning(study, capsys):
    warning = "WARNING: LeNet-5 has hardly learnt anything: its lowest validation loss is "
    folder = train(study.overridden(learning_rate=1e-12))
    printed = capsys.readouterr().out
    assert warning in printed
    assert f"the same answer for every image has {np.log(2):.4f}" in printed
    card = json.loads((folder / "model.json").read_text())
    assert card["validation"]["uninformed_loss"] == pytest.approx(np.log(2))
    learnt = train(study.overridden(learning_rate=1e-2, epochs=8))
    assert "WARNING" not in capsys.readouterr().out
    assert json.loads((learnt / "model.json").read_text())["validation"]["loss"] < 0.3
