"""Fine-tuning a study: every setting is used, one seed gives the same bytes, and no result is lost."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from layouts import write_chestxray14
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

import finetune
from evaluation.predictions import read_predictions
from finetune import fine_tune_study, main
from inference.explanations import explain
from inference.trained_networks import TrainedNetwork, load_network
from lungs.segmentation import save_segmenter
from studies.loading import load_study, load_table
from studies.settings import NetworkTraining
from training.lung_model import phantom_segmenter, untrained_segmenter
from utils import read_xray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_study(tiny_study):
    """The study of the tiny phantom with a network that is trained within a second."""
    return tiny_study.overridden(networks=("small_cnn",), image_size=32, epochs=1)


@pytest.fixture(scope="module")
def train_small(small_study, tmp_path_factory):
    """A function that trains the small study with other settings, and returns its run folder."""
    table = load_table(small_study)

    def train(runs=None, **changes):
        study = small_study.overridden(**changes)
        runs = runs or tmp_path_factory.mktemp("small")
        return fine_tune_study(study, table, "small_cnn", runs=runs, device="cpu")

    return train


def test_run_folder_holds_exactly_the_documented_files(trained_run, tiny_study):
    assert {path.name for path in trained_run.iterdir()} - {"tensorboard"} == {
        "model.safetensors",
        "model.json",
        "history.csv",
        "timing.csv",
        "splits.csv",
        "predictions_train.csv",
        "predictions_val.csv",
        "predictions_test.csv",
    }
    assert list(trained_run.parent.iterdir()) == [trained_run]
    card = json.loads((trained_run / "model.json").read_text())
    assert card["classes"] == ["COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"]
    assert card["origin"]["seed"] == tiny_study.seed
    assert card["origin"]["images"] == {"train": 24, "val": 8, "test": 8}
    assert card["origin"]["parameters"] == 11_178_564
    assert str(tiny_study.data.root) not in json.dumps(card)


def test_saved_predictions_match_the_saved_model(trained_run, tiny_study):
    network, card, _ = load_network(trained_run)
    predictions = pd.read_csv(trained_run / "predictions_test.csv")
    images = torch.stack(
        [
            TrainedNetwork(None, card).preprocessing(read_xray(tiny_study.data.root / path))
            for path in predictions["path"]
        ]
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


def test_one_seed_gives_the_same_weights_file_and_another_seed_gives_another(train_small, small_study):
    first = train_small()
    torch.rand(7)  # earlier random numbers must not matter
    assert digest(train_small()) == digest(first)
    assert digest(train_small(seed=small_study.seed + 1)) != digest(first)


def test_a_failed_training_leaves_the_older_results_unchanged(train_small, tmp_path, monkeypatch):
    folder = train_small(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "save_network", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_small(tmp_path, seed=9)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    assert list(folder.parent.iterdir()) == [folder]  # the unfinished results are deleted


def test_temperature_is_fitted_on_the_validation_images(train_small, small_study, monkeypatch):
    calls = []
    monkeypatch.setattr(finetune, "fit_temperature", lambda logits, targets: calls.append((logits, targets)) or 2.5)
    network, card, _ = load_network(train_small())
    ((logits, targets),) = calls
    rows = load_table(small_study).subset("val")
    images = torch.stack([TrainedNetwork(None, card).preprocessing(read_xray(path)) for path in rows["path"]])
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images).numpy(), atol=1e-4)
    np.testing.assert_array_equal(targets, rows["label"])
    assert card.temperature == 2.5


def test_every_setting_of_a_study_reaches_the_training(tiny_study, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    arguments = {}

    def capture(network, batches, **options):
        arguments.update(options, network=network, batches=batches)
        raise Stop

    monkeypatch.setattr(finetune, "fine_tune", capture)
    table = load_table(tiny_study)

    def settings(**changes):
        with pytest.raises(Stop):
            fine_tune_study(tiny_study.overridden(**changes), table, "resnet18", runs=tmp_path, device="cpu")
        return arguments

    plain = settings(balance="none")
    assert plain["batches"]["train"].weights is None
    assert plain["batches"]["train"].seed == tiny_study.seed
    assert plain["loss_weights"] is None
    weighted = settings(balance="loss", schedule="one_cycle", patience=7, learning_rate=0.5, batch_size=3)
    counts = table.counts()["train"].to_numpy()
    np.testing.assert_allclose(weighted["loss_weights"], counts.sum() / (4 * counts), rtol=1e-6)
    training = weighted["training"]
    assert (training.schedule, training.patience, training.learning_rate) == ("one_cycle", 7, 0.5)
    assert weighted["batches"]["train"].batch_size == 3
    labels = torch.tensor(table.targets("train"))
    sampled = settings(balance="oversample", temporary_batch_norm=True, residual_gain=0.25, epochs=9)
    shares = [sampled["batches"]["train"].weights[labels == c].sum() for c in range(4)]
    np.testing.assert_allclose(shares, 1)  # every class has the same weight in sum
    assert sampled["loss_weights"] is None
    assert sampled["training"].epochs == 9
    norms = [module for module in sampled["network"].modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 40  # a ResNet-18 has 20; one more follows each of its 20 convolutions
    assert (sampled["network"].layer4[1].bn2.weight == 0.25).all()
    assert sampled["batches"]["train"].augment.horizontal_flip
    assert sampled["batches"]["val"].augment is None


@pytest.fixture
def study_file(tiny_study):
    return str(tiny_study.data.root.parent / "tiny.toml")


def test_options_of_the_command_line_reach_the_training(study_file, tmp_path, capsys):
    status = main(
        f"{study_file} --runs {tmp_path} --epochs 1 --limit 24 --device cpu --batch-size 5 --image-size 40 "
        "--seed 4 --networks lenet5".split()
    )
    assert status == 0
    card = load_network(tmp_path / "tiny-limit24" / "lenet5").card
    assert card.image_size == 40
    assert card.origin["study"]["training"]["batch_size"] == 5
    assert (card.origin["seed"], sum(card.origin["images"].values())) == (4, 24)
    assert card.validation["epochs"] == 1
    assert "LeNet-5: 61,496 parameters for 4 classes, weights none, 40 px" in capsys.readouterr().out


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
    command = [study_file if argument == "STUDY" else argument for argument in arguments]
    assert main([*command, "--runs", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("model.json"))


ORDERED = """
title = "Ordered"
[data]
reader = "covid_radiography"
root = "ROOT"
classes = CLASSES
[split]
val = 0.2
test = 0.2
[preprocessing]
image_size = 32
[networks.lenet5]
[training]
weights = "none"
epochs = 1
batch_size = 8
learning_rate = 1e-12
balance = "none"
precision = "fp32"
"""


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """A folder for the studies of `trained_with`: all tests share the trained networks in it."""
    return tmp_path_factory.mktemp("ordered")


@pytest.fixture
def trained_with(phantom_root, ordered, capsys):
    """Train on some classes of the phantom; return the run folder, the validation losses, and the printed text.

    The learning rate is almost zero, so the losses are those of the starting weights.
    """

    def train(name, classes, *arguments, options=""):
        text = ORDERED.replace("CLASSES", json.dumps(classes)).replace("ROOT", str(phantom_root))
        (ordered / f"{name}.toml").write_text(text + options)
        command = [str(ordered / f"{name}.toml"), "--runs", str(ordered / "runs"), "--device", "cpu"]
        capsys.readouterr()
        status = main([*command, *arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        folder = ordered / "runs" / name / "lenet5"
        return folder, pd.read_csv(folder / "history.csv")["val_loss"].tolist(), captured.out

    return train


LUNGS = ("COVID-19", "Lung Opacity", "Normal")


def logits_of(folder):
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load_network(folder).network(images)


def test_the_head_of_starting_weights_is_kept_for_the_same_classes(trained_with):
    folder, losses, printed = trained_with("first", LUNGS)
    assert "head:" not in printed
    for number, weights in enumerate((folder, folder / "model.safetensors", "first/lenet5")):
        again, new_losses, printed = trained_with(f"again{number}", LUNGS, "--weights", str(weights))
        assert "LeNet-5: head: kept\n" in printed
        torch.testing.assert_close(logits_of(again), logits_of(folder))
        assert new_losses == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize(("first", "options"), [("first", ""), ("hidden", "hidden_units = [8]")])
def test_the_outputs_of_starting_weights_are_reordered_like_the_classes(trained_with, first, options):
    folder, _, _ = trained_with(first, LUNGS, options=options)
    order = [2, 0, 1]
    classes = [LUNGS[i] for i in order]
    other, _, printed = trained_with(f"turned_{first}", classes, "--weights", f"{first}/lenet5", options=options)
    assert f"LeNet-5: head: reordered (in the weights: {', '.join(LUNGS)})\n" in printed
    torch.testing.assert_close(logits_of(other), logits_of(folder)[:, order])
    settings = json.loads((other / "model.json").read_text())["origin"]["study"]["training"]
    assert settings["weights"] == f"{first}/lenet5"


def test_a_single_output_changes_its_sign_when_its_two_classes_are_swapped(trained_with):
    options = 'head = "sigmoid"'
    folder, _, _ = trained_with("one", LUNGS[::2], options=options)
    other, _, printed = trained_with("one_turned", LUNGS[::-2], "--weights", "one/lenet5", options=options)
    assert "LeNet-5: head: reordered" in printed
    torch.testing.assert_close(logits_of(other), -logits_of(folder))
    _, _, printed = trained_with("pair", LUNGS[::2], "--weights", "one/lenet5")
    assert "LeNet-5: head: new (that of the weights has another form)\n" in printed


def test_a_head_of_other_or_unknown_classes_is_replaced_and_the_rest_is_kept(trained_with, tmp_path):
    folder, _, _ = trained_with("first", LUNGS)
    file = tmp_path / "alone.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    first = load_network(folder).network.classifier
    for name, weights, classes, message in (
        ("foreign", "first/lenet5", (*LUNGS[:2], "Viral Pneumonia"), f"that of the weights is for {', '.join(LUNGS)}"),
        ("unknown", str(file), LUNGS, "no model.json beside the weights names its classes"),
    ):
        other, _, printed = trained_with(name, classes, "--weights", weights, "--seed", "1")
        assert f"LeNet-5: head: new ({message})\n" in printed
        started = load_network(other).network.classifier
        torch.testing.assert_close(started.fc2.weight, first.fc2.weight)
        assert (started.fc3.weight - first.fc3.weight).abs().amax(1).min() > 0.01


def test_weights_of_another_architecture_are_refused_before_training(trained_with, study_file, tmp_path, capsys):
    folder, _, _ = trained_with("first", LUNGS)
    for weights in (str(folder), str(folder / "model.safetensors")):
        assert main([study_file, "--weights", weights, "--runs", str(tmp_path / "other")]) == 2
        message = capsys.readouterr().err
        assert message == f"finetune.py: the weights {weights} are of lenet5, not of resnet18\n"
    assert not (tmp_path / "other").exists()


def test_a_training_never_replaces_the_weights_that_it_starts_from(trained_with, ordered, capsys):
    folder, _, _ = trained_with("first", LUNGS)
    before = (folder / "model.safetensors").read_bytes()
    command = [str(ordered / "first.toml"), "--runs", str(ordered / "runs"), "--weights", "first/lenet5"]
    assert main(command) == 2
    assert "would replace them: give another --runs" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before


def test_history_goes_to_tensorboard_where_it_is_installed(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("val_loss")]
    expected = pd.read_csv(trained_run / "history.csv")["val_loss"]
    np.testing.assert_allclose(logged, expected, rtol=1e-6)


def test_limited_study_is_trained_under_its_own_name(study_file, tmp_path):
    study = load_study(study_file, limit=24, epochs=1).overridden(image_size=32, networks=("lenet5",))
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=tmp_path, device="cpu")
    assert folder == tmp_path / "tiny-limit24" / "lenet5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "auc"}, "several labels"),
        ({"threshold": "youden"}, "two classes, not 4"),
        ({"head": "sigmoid"}, "two classes apart, not 4"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_refused_before_the_training(tiny_study, tmp_path, changes, message):
    study = tiny_study.overridden(**changes)
    with pytest.raises(ValueError, match=message):
        fine_tune_study(study, load_table(study), "resnet18", runs=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


MULTI_LABEL = """
title = "Findings"
[data]
reader = "chestxray14"
root = "data"
[split]
val = 0.2
test = 0.2
keep_without_finding = 0.5
[preprocessing]
image_size = 32
[training]
weights = "none"
epochs = 2
batch_size = 16
learning_rate = 1e-3
select = "auc"
balance = "loss"
threshold = "f1"
keep_checkpoints = true
precision = "fp32"
[networks.lenet5]
"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """A study of 14 findings; an image may have several."""
    folder = tmp_path_factory.mktemp("findings")
    write_chestxray14(folder / "data", size=40)
    (folder / "mine.toml").write_text(MULTI_LABEL)
    return load_study(folder / "mine.toml")


def test_a_study_of_several_findings_saves_checkpoints_thresholds_and_labels(findings, tmp_path):
    study = findings
    table = load_table(study)
    folder = fine_tune_study(study, table, "lenet5", runs=tmp_path / "runs", device="cpu")
    network, card, _ = load_network(folder)
    assert (card.multilabel, card.head, len(card.thresholds)) == (True, "sigmoid", 14)
    epochs = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in epochs] == ["epoch_01.safetensors", "epoch_02.safetensors"]
    checkpoint = load_file(epochs[card.validation["best_epoch"] - 1])
    assert all(torch.equal(checkpoint[key], value) for key, value in network.state_dict().items())
    history = pd.read_csv(folder / "history.csv")
    assert card.validation["auc"] == history["val_auc"].max()
    predictions = read_predictions(folder / "predictions_val.csv", card.classes, multilabel=True)
    np.testing.assert_array_equal(predictions.targets, table.targets("val"))
    ranked = [c for c in range(14) if 0 < predictions.targets[:, c].sum() < len(predictions.targets)]
    areas = [roc_auc_score(predictions.targets[:, c], predictions.probabilities[:, c]) for c in ranked]
    assert np.mean(areas) == pytest.approx(card.validation["auc"], abs=1e-6)
    for c in ranked:  # no other threshold gives a better F1 on validation
        scores = predictions.probabilities[:, c]
        chosen = f1_score(predictions.targets[:, c], scores >= card.thresholds[c])
        assert chosen == pytest.approx(max(f1_score(predictions.targets[:, c], scores >= t) for t in scores), abs=1e-9)


def test_findings_without_examples_are_named_and_not_reported(findings, tmp_path, capsys):
    study = findings.overridden(epochs=1)
    table = load_table(study)
    frame = table.frame.copy()
    frame.loc[frame["split"] == "train", "Edema"] = 0
    frame.loc[frame["split"] == "val", "Mass"] = 0
    table = replace(table, frame=frame)
    folder = fine_tune_study(study, table, "lenet5", runs=tmp_path / "runs", device="cpu")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert "not reported: Edema" in warnings[0]
    assert "never predicted: Mass" in warnings[1]
    network, card, _ = load_network(folder)
    assert card.unreported == ("Edema",)
    assert card.undecided == ("Mass",)
    without = [name for name, t in zip(card.classes, card.thresholds, strict=True) if t is None]
    assert without == [name for name in card.classes if name in ("Edema", "Mass")]
    for split in ("train", "val", "test"):
        frame = pd.read_csv(folder / f"predictions_{split}.csv")
        assert list(frame.columns[frame.isna().all()]) == ["Edema"]
        assert frame.drop(columns="Edema").notna().all(axis=None)
    predictions = read_predictions(
        folder / "predictions_val.csv", card.classes, multilabel=True, thresholds=card.thresholds
    )
    ranked = [c for c, name in enumerate(card.classes) if name not in without and predictions.targets[:, c].any()]
    areas = [roc_auc_score(predictions.targets[:, c], predictions.probabilities[:, c]) for c in ranked]
    assert np.mean(areas) == pytest.approx(card.validation["auc"], abs=1e-6)
    assert not predictions.predicted[:, [card.classes.index(name) for name in without]].any()
    # An unreported finding is never the most probable one.
    network.classifier[-1].bias.data[card.classes.index("Edema")] = 99
    answer = explain(TrainedNetwork(network, card), read_xray(table.frame["path"][0]))
    assert card.classes[answer.classes[0]] != "Edema"
    frame = table.frame.assign(**dict.fromkeys(table.classes, 0))
    with pytest.raises(ValueError, match="no training image has any of Atelectasis"):
        fine_tune_study(study, replace(table, frame=frame), "lenet5", runs=tmp_path / "none", device="cpu")


def test_thresholds_are_chosen_for_the_positive_class_of_the_study(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("abnormal", "healthy")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.normal(110 + 20 * label, 30, (32, 32)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "mine.toml").write_text(
        """
        title = "Positive is the first class"
        data = { reader = "folder", root = "images" }
        split = { val = 0.4, test = 0.2 }
        preprocessing.image_size = 32
        training = { weights = "none", epochs = 1, learning_rate = 1e-3, threshold = "f1" }
        networks.lenet5 = {}
        """
    )
    study = load_study(tmp_path / "mine.toml")
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=tmp_path / "runs", device="cpu")
    assert "the positive class is 'abnormal'" in capsys.readouterr().out
    card = load_network(folder).card
    assert (card.positive, card.positive_index, card.thresholds[1]) == ("abnormal", 0, None)
    predictions = read_predictions(folder / "predictions_val.csv", card.classes, thresholds=card.thresholds)
    chosen = f1_score(predictions.targets, predictions.predicted, pos_label=0)
    scores = predictions.probabilities[:, 0]
    best = max(f1_score(predictions.targets, np.where(scores >= t, 0, 1), pos_label=0) for t in scores)
    assert chosen == pytest.approx(best, abs=1e-12)


def test_a_network_for_masked_lungs_sees_masked_lungs_in_training_and_at_inference(
    phantom_root, tmp_path, capsys, monkeypatch
):
    (tmp_path / "mine.toml").write_text(
        f"""
        title = "Lungs"
        data = {{ reader = "covid_radiography", root = "{phantom_root}" }}
        preprocessing = {{ image_size = 32, lung_model = "lungs" }}
        split = {{ val = 0.2, test = 0.2 }}
        training = {{ weights = "none", epochs = 1, learning_rate = 1e-3 }}
        networks.lenet5 = {{}}
        """
    )
    training = NetworkTraining(epochs=3, image_size=64, batch_size=8, learning_rate=1e-3)
    save_segmenter(tmp_path / "runs" / "lungs", phantom_segmenter(untrained_segmenter(), 40, training))
    study = load_study(tmp_path / "mine.toml")
    folder = fine_tune_study(study, load_table(study), "lenet5", runs=tmp_path / "runs", device="cpu")
    capsys.readouterr()
    assert fine_tune_study(study, load_table(study), "lenet5", runs=tmp_path / "runs", device="cpu") == folder
    assert "is finished, with the same settings and images" in capsys.readouterr().out
    trained = load_network(folder)
    predictions = pd.read_csv(folder / "predictions_test.csv")
    xray = read_xray(phantom_root / predictions["path"][0])
    masked = trained.lungs(xray)
    failed = pd.read_csv(folder / "lungs_failed.csv")["path"].tolist()
    assert ((masked != xray).mean() > 0.2) == (predictions["path"][0] not in failed)
    with torch.no_grad():
        logits = trained.network(trained.preprocessing(xray)[None])
    answer = trained.card.probabilities(logits)[0].numpy()
    np.testing.assert_allclose(answer, predictions.loc[0, list(trained.card.classes)].to_numpy(float), atol=1e-4)
