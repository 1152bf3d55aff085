"""Fine-tuning a study: all settings arrive, it repeats itself to the byte and loses nothing."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import finetune
from finetune import fine_tune_study, main
from networks import load_network
from studies import load_study, load_table
from utils import read_xray


def test_run_folder_holds_all_that_was_promised(trained_run, tiny_study):
    assert {path.name for path in trained_run.iterdir()} - {"tensorboard"} == {
        "model.safetensors",
        "model.json",
        "history.csv",
        "splits.csv",
        "predictions_train.csv",
        "predictions_val.csv",
        "predictions_test.csv",
    }
    assert not list(trained_run.parent.glob(".*"))
    card = json.loads((trained_run / "model.json").read_text())
    assert card["classes"] == ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]
    assert card["origin"]["seed"] == tiny_study.seed
    assert card["origin"]["images"] == {"train": 24, "val": 8, "test": 8}
    assert card["origin"]["parameters"] == 11_178_564
    assert str(tiny_study.data.root) not in json.dumps(card)


def test_saved_predictions_are_what_the_saved_model_says(trained_run, tiny_study):
    network, card, _ = load_network(trained_run)
    predictions = pd.read_csv(trained_run / "predictions_test.csv")
    images = torch.stack(
        [card.preprocessing(read_xray(tiny_study.data.root / path)) for path in predictions["path"]]
    )
    with torch.no_grad():
        probabilities = card.probabilities(network(images)).numpy()
    np.testing.assert_allclose(predictions[list(card.classes)], probabilities, atol=1e-4)
    table = load_table(tiny_study)
    targets = table.subset("test")["label"].map(dict(enumerate(table.classes)))
    assert predictions["target"].tolist() == targets.tolist()


def test_splits_of_the_run_do_not_share_images(trained_run):
    splits = pd.read_csv(trained_run / "splits.csv")
    assert splits["path"].is_unique
    assert splits["split"].value_counts().to_dict() == {"train": 24, "val": 8, "test": 8}
    for split in ("train", "val", "test"):
        predicted = pd.read_csv(trained_run / f"predictions_{split}.csv")["path"]
        assert set(predicted) == set(splits.loc[splits["split"] == split, "path"])


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_model_file_and_another_seed_another(trained_run, tiny_study, tmp_path):
    table = load_table(tiny_study)
    torch.rand(7)  # whatever was drawn before must not matter
    again = fine_tune_study(tiny_study, table, "resnet18", runs=tmp_path / "a", device="cpu")
    other = tiny_study.overridden(seed=tiny_study.seed + 1)
    different = fine_tune_study(other, table, "resnet18", runs=tmp_path / "b", device="cpu")
    assert digest(again) == digest(trained_run)
    assert digest(different) != digest(trained_run)


def test_a_training_that_breaks_off_leaves_the_older_result_as_it_was(tiny_study, tmp_path, monkeypatch):
    table = load_table(tiny_study)
    folder = fine_tune_study(tiny_study, table, "resnet18", runs=tmp_path, device="cpu")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "save_network", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fine_tune_study(tiny_study.overridden(seed=9), table, "resnet18", runs=tmp_path, device="cpu")
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    assert not list(tmp_path.rglob(".*"))  # what was unfinished is gone


def test_temperature_is_fitted_on_the_validation_images(tiny_study, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        finetune, "fit_temperature", lambda logits, targets: seen.append((logits, targets)) or 2.5
    )
    table = load_table(tiny_study)
    network, card, _ = load_network(
        fine_tune_study(tiny_study, table, "resnet18", runs=tmp_path, device="cpu")
    )
    ((logits, targets),) = seen
    rows = table.subset("val")
    images = torch.stack([card.preprocessing(read_xray(path)) for path in rows["path"]])
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images).numpy(), atol=1e-4)
    np.testing.assert_array_equal(targets, rows["label"])
    assert card.temperature == 2.5


def test_every_setting_of_a_study_reaches_the_training(tiny_study, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    seen = {}

    def capture(network, loaders, **options):
        seen.update(options, network=network, loaders=loaders)
        raise Stop

    monkeypatch.setattr(finetune, "fine_tune", capture)
    table = load_table(tiny_study)

    def settings(**changes):
        with pytest.raises(Stop):
            fine_tune_study(tiny_study.overridden(**changes), table, "resnet18", runs=tmp_path, device="cpu")
        return seen

    plain = settings(balance="none")
    assert isinstance(plain["loaders"]["train"].sampler, torch.utils.data.RandomSampler)
    assert plain["loss_weights"] is None
    weighted = settings(balance="loss", schedule="one_cycle", patience=7, learning_rate=0.5, batch_size=3)
    counts = table.counts()["train"].to_numpy()
    np.testing.assert_allclose(weighted["loss_weights"], counts.sum() / (4 * counts), rtol=1e-6)
    training = weighted["training"]
    assert (training.schedule, training.patience, training.learning_rate) == ("one_cycle", 7, 0.5)
    assert weighted["loaders"]["train"].batch_size == 3
    sampled = settings(balance="oversample", temporary_batch_norm=True, residual_gain=0.25, epochs=9)
    assert isinstance(sampled["loaders"]["train"].sampler, torch.utils.data.WeightedRandomSampler)
    assert sampled["loss_weights"] is None
    assert sampled["training"].epochs == 9
    norms = [module for module in sampled["network"].modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 40  # the 20 of a ResNet-18 and one more behind each of its 20 convolutions
    assert (sampled["network"].layer4[1].bn2.weight == 0.25).all()
    assert sampled["loaders"]["train"].dataset.augment is not None
    assert sampled["loaders"]["val"].dataset.augment is None


@pytest.fixture
def study_file(tiny_study):
    return str(tiny_study.data.root.parent / "tiny.toml")


def test_script_trains_what_it_is_told(study_file, tmp_path, capsys):
    status = main(
        f"{study_file} --runs {tmp_path} --epochs 1 --limit 24 --device cpu --batch-size 5 --image-size 40 "
        "--seed 4 --networks resnet18".split()
    )
    assert status == 0
    card = load_network(tmp_path / "tiny-limit24" / "resnet18").card
    assert card.image_size == 40
    assert card.origin["study"]["training"]["batch_size"] == 5
    assert (card.origin["seed"], sum(card.origin["images"].values())) == (4, 24)
    assert card.validation["epochs"] == 1
    assert "11,178,564 parameters for 4 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no study 'nonsense'"),
        (["STUDY", "--networks", "alexnet"], "unknown network 'alexnet'"),
        (["STUDY", "--weights", "gone.pth"], "no weights file gone.pth"),
        (["STUDY", "--device", "gpu"], "no device 'gpu'"),
        (["STUDY", "--epochs", "0"], "'epochs'"),
        (["STUDY", "--seed", "-1"], "'seed'"),
        (["STUDY", "--data-root", "nowhere"], "kagglehub"),
        (["STUDY", "--networks", "resnet18,vgg16", "--weights", "w.pth"], "holds one network's weights"),
        (["STUDY", "--networks", "resnet81"], "did you mean 'resnet18'"),
    ],
)
def test_bad_calls_end_with_status_2_and_a_message(study_file, tmp_path, capsys, arguments, message):
    given = [study_file if argument == "STUDY" else argument for argument in arguments]
    assert main([*given, "--runs", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("model.json"))


def test_history_goes_to_tensorboard_where_it_is_installed(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("val_loss")]
    expected = pd.read_csv(trained_run / "history.csv")["val_loss"]
    np.testing.assert_allclose(written, expected, rtol=1e-6)


def test_quick_study_is_trained_under_its_own_name(study_file, tmp_path):
    study = load_study(study_file, quick=True).overridden(image_size=32)
    folder = fine_tune_study(study, load_table(study), "resnet18", runs=tmp_path, device="cpu")
    assert folder == tmp_path / "tiny-quick" / "resnet18"
