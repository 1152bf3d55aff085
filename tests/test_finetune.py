"""Fine-tuning: it learns, stops, keeps the best, repeats itself to the byte and loses nothing."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import finetune
from finetune import fine_tune, fine_tune_study, main, predict_logits, resolve_precision
from networks import load_network
from studies import load_study, load_table
from utils import read_xray


class Linear(nn.Module):
    """A softmax regression on the mean grey value: small enough for closed-form expectations."""

    def __init__(self, classes=2):
        super().__init__()
        self.head = nn.Linear(1, classes)

    def forward(self, images):
        return self.head(images.mean((1, 2, 3))[:, None])


def loader(values, labels, **options):
    images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return DataLoader(TensorDataset(images, torch.tensor(labels)), batch_size=4, **options)


def run(model, loaders, **options):
    settings = {"epochs": 5, "learning_rate": 0.05, "patience": 5, "device": "cpu", "precision": "fp32"}
    return fine_tune(model, loaders, **(settings | options))


SEPARABLE = ([-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0], [0, 0, 0, 0, 1, 1, 1, 1])


def test_a_separable_problem_is_learnt():
    torch.manual_seed(0)
    model = Linear()
    done = run(model, {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)}, epochs=60, patience=60)
    assert done.history["val_accuracy"].iloc[-1] == 1
    assert done.history["val_loss"].iloc[-1] < 0.5 * done.history["val_loss"].iloc[0]
    assert (predict_logits(model, loader(*SEPARABLE)).argmax(1) == torch.tensor(SEPARABLE[1])).all()


def test_training_stops_and_keeps_the_weights_of_the_lowest_validation_loss():
    # Validation labels are the opposite: every step that helps in training harms here.
    torch.manual_seed(0)
    model = Linear()
    opposite = (SEPARABLE[0], [1 - label for label in SEPARABLE[1]])
    loaders = {"train": loader(*SEPARABLE), "val": loader(*opposite)}
    done = run(model, loaders, epochs=50, patience=3)
    assert len(done.history) == done.best_epoch + 3 < 50
    assert done.best_epoch == int(done.history["val_loss"].idxmin()) + 1
    logits = predict_logits(model, loader(*opposite))
    kept = nn.functional.cross_entropy(logits, torch.tensor(opposite[1])).item()
    assert kept == pytest.approx(done.history["val_loss"].min(), rel=1e-5)
    assert not model.training


def test_history_has_a_row_an_epoch_with_the_contracted_columns():
    seen = []
    done = run(
        Linear(),
        {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)},
        epochs=3,
        on_epoch=lambda history: seen.append(len(history)),
    )
    assert seen == [1, 2, 3]
    assert done.history.columns.tolist() == [
        "epoch",
        "phase",
        "learning_rate",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "seconds",
        "images_per_second",
    ]


def test_one_cycle_rises_and_falls_and_constant_stays():
    loaders = {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)}
    rates = {
        s: run(Linear(), loaders, epochs=10, schedule=s).history["learning_rate"]
        for s in ("constant", "one_cycle")
    }
    assert rates["constant"].eq(0.05).all()
    assert rates["one_cycle"].idxmax() in (2, 3, 4)
    assert rates["one_cycle"].iloc[-1] < 0.2 * rates["one_cycle"].max() <= 0.2 * 0.05 + 1e-9


def test_loss_weights_shift_the_decision_to_the_rare_class():
    # The same grey value for both classes, 3 : 1. Unweighted the rare class gets p = 1/4, balanced 1/2.
    data = ([1.0] * 8, [0, 0, 0, 1, 0, 0, 0, 1])
    found = {}
    for name, weights in (("plain", None), ("balanced", torch.tensor([8 / 12, 8 / 4]))):
        torch.manual_seed(0)
        model = Linear()
        loaders = {"train": loader(*data), "val": loader(*data)}
        run(model, loaders, epochs=300, patience=300, learning_rate=0.05, loss_weights=weights)
        # The loss of the last epoch is what is trained; the best by unweighted validation loss is kept.
        found[name] = predict_logits(model, loader(*data)).softmax(1)[0, 1].item()
    assert found["plain"] == pytest.approx(0.25, abs=0.02)
    assert found["balanced"] > found["plain"]


def test_a_loss_that_is_not_finite_is_named():
    loaders = {"train": loader([float("nan")] * 8, SEPARABLE[1]), "val": loader(*SEPARABLE)}
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        run(Linear(), loaders)


def test_bf16_is_chosen_only_where_the_processor_has_units_for_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    assert resolve_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": True})
    assert resolve_precision("auto", cpu) == "bf16"
    assert resolve_precision("fp32", cpu) == "fp32"


def test_bf16_training_learns_too():
    torch.manual_seed(0)
    done = run(
        Linear(),
        {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)},
        epochs=40,
        patience=40,
        precision="bf16",
    )
    assert done.history["val_accuracy"].iloc[-1] == 1


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
    network, card = load_network(trained_run)
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
    network, card = load_network(fine_tune_study(tiny_study, table, "resnet18", runs=tmp_path, device="cpu"))
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
    assert (weighted["schedule"], weighted["patience"], weighted["learning_rate"]) == ("one_cycle", 7, 0.5)
    assert weighted["loaders"]["train"].batch_size == 3
    sampled = settings(balance="oversample", temporary_batch_norm=True, residual_gain=0.25, epochs=9)
    assert isinstance(sampled["loaders"]["train"].sampler, torch.utils.data.WeightedRandomSampler)
    assert sampled["loss_weights"] is None
    assert sampled["epochs"] == 9
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
