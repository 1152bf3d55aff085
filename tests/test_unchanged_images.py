"""A training is of one set of images: what changes or goes while it runs, or afterwards, is named."""

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
    """Write a picture of 32 px with its own grain; those of one grey value are equally large files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(len(str(path))).integers(0, 20, (32, 32))
    Image.fromarray((grey + grain).astype(np.uint8)).save(path, "BMP")


@pytest.fixture
def study(tmp_path):
    """A study of ten dark and ten bright pictures, uncompressed, in a folder of its own."""
    for number in range(10):
        write(tmp_path / "xrays" / "bright" / f"{number}.bmp", 200)
        write(tmp_path / "xrays" / "dark" / f"{number}.bmp", 30)
    (tmp_path / "own.toml").write_text(STUDY)
    return load_study(tmp_path / "own.toml")


def overwrite(path, grey=90):
    """Give a picture another content, of the same size and with the same time of its last change."""
    before = os.stat(path)
    write(path, grey)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def train(study, **options):
    runs = study.data.root.parent / "runs"
    return fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu", **options)


def once_trained(monkeypatch, act):
    """Call `act` when the last epoch is done and the results are not written yet."""
    real = finetune.fine_tune

    def then(*args, **options):
        done = real(*args, **options)
        act()
        return done

    monkeypatch.setattr(finetune, "fine_tune", then)


def test_a_fingerprint_is_of_the_content_whatever_size_and_time_say(study):
    before = data_fingerprint(load_table(study))
    assert data_fingerprint(load_table(study)) == before
    picture = study.data.root / "dark" / "3.bmp"
    content = picture.read_bytes()
    overwrite(picture)
    assert data_fingerprint(load_table(study)) != before
    picture.write_bytes(content)
    assert data_fingerprint(load_table(study)) == before


def test_images_that_change_in_training_are_named_and_the_record_is_that_of_its_start(study, capsys, monkeypatch):
    before = data_fingerprint(load_table(study))
    picture = study.data.root / "dark" / "3.bmp"
    once_trained(monkeypatch, lambda: overwrite(picture))
    folder = train(study)
    printed = capsys.readouterr().out
    assert f"WARNING: 1 of 20 images have changed since the training of LeNet-5 began, the first: {picture} has" in printed
    assert json.loads((folder / "model.json").read_text())["origin"]["data_fingerprint"] == before
    with pytest.raises(ValueError, match=r"have changed since .*lenet5 was trained: put them back, or train again"):
        read_runs(study, folder.parent.parent, read_images(study))


def test_results_of_images_that_may_have_been_seen_in_both_versions_are_never_taken_for_good(
    study, monkeypatch, capsys
):
    study = study.overridden(cache_images=False)
    picture = study.data.root / "dark" / "3.bmp"
    content = picture.read_bytes()
    once_trained(monkeypatch, lambda: overwrite(picture))
    folder = train(study)
    picture.write_bytes(content)
    with pytest.raises(ValueError, match="have changed"):
        read_runs(study, folder.parent.parent, read_images(study))
    capsys.readouterr()
    train(study)
    assert "is finished" not in capsys.readouterr().out


def test_an_image_that_changes_while_images_are_decoded_is_not_trained_on(study, monkeypatch):
    real, picture = prepared_images.cached, study.data.root / "dark" / "3.bmp"

    def then(*args, **options):
        images = real(*args, **options)
        overwrite(picture)
        return images

    monkeypatch.setattr(prepared_images, "cached", then)
    with pytest.raises(ValueError, match="have changed while they were decoded: train again"):
        train(study)
    monkeypatch.undo()
    before = data_fingerprint(load_table(study))
    folder = train(study)
    assert json.loads((folder / "model.json").read_text())["origin"]["data_fingerprint"] == before


def test_an_image_that_cannot_be_read_is_not_said_to_be_absent(study):
    table, picture = load_table(study), study.data.root / "dark" / "3.bmp"
    picture.unlink()
    picture.mkdir()
    with pytest.raises(OSError, match=r"cannot be read: .*3\.bmp"):
        data_fingerprint(table)


def test_images_that_are_deleted_in_training_cost_nothing_where_they_are_cached(study, capsys, monkeypatch):
    whole = train(study)
    expected = (whole / "predictions_test.csv").read_bytes()
    root = study.data.root
    once_trained(monkeypatch, lambda: shutil.rmtree(root / "dark"))
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=root.parent / "other", device="cpu")
    assert (folder / "predictions_test.csv").read_bytes() == expected
    printed = capsys.readouterr().out
    assert "WARNING: 10 of 20 images have changed since the training of LeNet-5 began, the first: " in printed
    assert "0.bmp is gone. Put them back, or train again" in printed


def test_images_that_are_deleted_in_training_keep_its_state_where_they_are_not_cached(study, monkeypatch):
    study = study.overridden(cache_images=False)
    expected = (train(study) / "model.safetensors").read_bytes()
    table, runs = load_table(study), study.data.root.parent / "other"
    picture = Path(table.subset("test")["path"][0])
    content = picture.read_bytes()
    once_trained(monkeypatch, picture.unlink)
    with pytest.raises(FileNotFoundError, match="no such file"):
        fine_tune_study(study, table, "lenet5", runs=runs, device="cpu")
    assert (runs / "own" / "lenet5" / "resume" / "state.pt").is_file()
    picture.write_bytes(content)
    monkeypatch.undo()
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu")
    assert (folder / "model.safetensors").read_bytes() == expected


def test_a_training_does_not_go_on_with_other_images(study, capsys, monkeypatch):
    runs = study.data.root.parent / "runs"
    save = Checkpoints.save

    def broken_off(self, state):
        save(self, state)
        raise KeyboardInterrupt("stopped")

    command = [str(study.data.root.parent / "own.toml"), "--runs", str(runs), "--device", "cpu"]
    monkeypatch.setattr(Checkpoints, "save", broken_off)
    assert main(command) == 130
    monkeypatch.undo()
    overwrite(study.data.root / "bright" / "0.bmp")
    capsys.readouterr()
    assert main(command) == 2
    errors = capsys.readouterr().err
    assert "holds an unfinished training on other images: their content, their labels or their splits" in errors
    assert "start anew with --restart" in errors
    assert main([*command, "--restart"]) == 0


def test_images_that_change_after_the_training_are_refused_beside_its_predictions(study, capsys):
    folder = train(study)
    read_runs(study, folder.parent.parent, read_images(study))
    write(study.data.root / "bright" / "new.bmp", 200)  # was not trained on
    read_runs(study, folder.parent.parent, read_images(study))
    overwrite(study.data.root / "bright" / "7.bmp")
    with pytest.raises(ValueError, match="have changed since"):
        read_runs(study, folder.parent.parent, read_images(study))


def test_a_run_that_does_not_record_the_content_is_not_called_changed(study, capsys):
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
    """Put the pictures of a class, by "split/class", into folders of the split."""
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
    assert not (root.parent / "runs" / "own").exists()


def test_a_class_without_validation_images_is_named(study, capsys):
    root = study.data.root
    divided(root, {"train/bright": 6, "train/dark": 6, "val/bright": 2, "test/bright": 2, "test/dark": 2})
    train(study.overridden(balance="none"))
    assert "WARNING: no validation image of dark: nothing is chosen by that class" in capsys.readouterr().out


# --- a network that does not learn ---


def test_a_network_that_did_not_learn_is_remarked_on_and_one_that_did_is_not(study, capsys):
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
