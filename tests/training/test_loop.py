"""The training loop learns, stops, keeps the best weights, goes through its phases and freezes the right layers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

from networks import build_network
from studies.settings import Training
from training.augmentation import Augmentation
from training.batches import Batches, XrayDataset
from training.loop import fine_tune, predict_logits
from training.objectives import MULTI_LABEL, SINGLE_LABEL, multi_label_loss, single_label_loss, uninformed_loss
from utils import Preprocessing, label_weights


class Linear(nn.Module):
    """A softmax regression on the mean grey value: small enough for closed-form expectations."""

    head_name = "head"

    def __init__(self, classes=2):
        super().__init__()
        self.head = nn.Linear(1, classes)

    def forward(self, images):
        return self.head(images.mean((1, 2, 3))[:, None])


def loader(values, labels, **options):
    images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return Batches(TensorDataset(images, torch.tensor(labels)), 4, **options)


def run(model, loaders, *, loss_weights=None, objective=SINGLE_LABEL, on_epoch=lambda history: None, **settings):
    defaults = {"epochs": 5, "learning_rate": 0.05, "patience": 5, "precision": "fp32"}
    training = Training(**(defaults | settings))
    return fine_tune(
        model,
        loaders,
        training=training,
        objective=objective,
        loss_weights=loss_weights,
        device="cpu",
        on_epoch=on_epoch,
    )


SEPARABLE = ([-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0], [0, 0, 0, 0, 1, 1, 1, 1])


def test_a_separable_problem_is_learnt():
    torch.manual_seed(0)
    model = Linear()
    result = run(model, {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)}, epochs=60, patience=60)
    assert result.history["val_accuracy"].iloc[-1] == 1
    assert result.history["val_loss"].iloc[-1] < 0.5 * result.history["val_loss"].iloc[0]
    assert (predict_logits(model, loader(*SEPARABLE)).argmax(1) == torch.tensor(SEPARABLE[1])).all()


def test_training_stops_and_keeps_the_weights_of_the_lowest_validation_loss():
    # Validation labels are the opposite: every step that helps in training harms here.
    torch.manual_seed(0)
    model = Linear()
    opposite = (SEPARABLE[0], [1 - label for label in SEPARABLE[1]])
    loaders = {"train": loader(*SEPARABLE), "val": loader(*opposite)}
    result = run(model, loaders, epochs=50, patience=3)
    assert len(result.history) == result.best_epoch + 3 < 50
    assert result.best_epoch == int(result.history["val_loss"].idxmin()) + 1
    logits = predict_logits(model, loader(*opposite))
    best_loss = nn.functional.cross_entropy(logits, torch.tensor(opposite[1])).item()
    assert best_loss == pytest.approx(result.history["val_loss"].min(), rel=1e-5)
    assert not model.training


def test_history_has_a_row_for_each_epoch_and_fixed_columns():
    lengths = []
    result = run(
        Linear(),
        {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)},
        epochs=3,
        on_epoch=lambda history: lengths.append(len(history)),
    )
    assert lengths == [1, 2, 3]
    assert result.history.columns.tolist() == [
        "epoch",
        "phase",
        "learning_rate",
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
    ]
    assert result.timing.columns.tolist() == ["epoch", "seconds", "images_per_second"]
    assert result.timing["seconds"].gt(0).all()


def test_one_cycle_rises_and_falls_and_constant_stays():
    loaders = {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)}
    rates = {
        s: run(Linear(), loaders, epochs=10, schedule=s).history["learning_rate"] for s in ("constant", "one_cycle")
    }
    assert rates["constant"].eq(0.05).all()
    assert rates["one_cycle"].idxmax() in (2, 3, 4)
    assert rates["one_cycle"].iloc[-1] < 0.2 * rates["one_cycle"].max() <= 0.2 * 0.05 + 1e-9


def test_loss_weights_shift_the_decision_to_the_rare_class():
    # Both classes, 3 : 1, have the same grey value. The rare class gets p = 1/4 unweighted, 1/2 balanced.
    data = ([1.0] * 8, [0, 0, 0, 1, 0, 0, 0, 1])
    rare_class = {}
    for name, weights in (("plain", None), ("balanced", torch.tensor([8 / 12, 8 / 4]))):
        torch.manual_seed(0)
        model = Linear()
        loaders = {"train": loader(*data), "val": loader(*data)}
        run(model, loaders, epochs=100, patience=100, learning_rate=0.2, loss_weights=weights)
        # Training uses the weighted loss, but the epoch with the best unweighted validation loss is kept.
        rare_class[name] = predict_logits(model, loader(*data)).softmax(1)[0, 1].item()
    assert rare_class["plain"] == pytest.approx(0.25, abs=0.02)
    assert rare_class["balanced"] > rare_class["plain"]


def test_a_loss_that_is_not_finite_raises_an_error():
    loaders = {"train": loader([float("nan")] * 8, SEPARABLE[1]), "val": loader(*SEPARABLE)}
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        run(Linear(), loaders)


def test_bf16_training_learns_too():
    torch.manual_seed(0)
    result = run(
        Linear(), {"train": loader(*SEPARABLE), "val": loader(*SEPARABLE)}, epochs=40, patience=40, precision="bf16"
    )
    assert result.history["val_accuracy"].iloc[-1] == 1


def test_a_plateau_divides_the_learning_rate_by_ten_when_the_validation_loss_stops_falling():
    # Validation labels are the opposite: the loss rises from the first epoch on.
    torch.manual_seed(0)
    opposite = (SEPARABLE[0], [1 - label for label in SEPARABLE[1]])
    loaders = {"train": loader(*SEPARABLE), "val": loader(*opposite)}
    result = run(Linear(), loaders, epochs=7, patience=7, schedule="plateau", plateau_patience=2)
    assert result.best_epoch == 1
    np.testing.assert_allclose(result.history["learning_rate"], [0.05, 0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])


def test_the_loss_of_one_logit_is_the_binary_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(9, 1, generator=generator), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    expected = nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())
    torch.testing.assert_close(single_label_loss(outputs, targets), expected)


def test_positives_weigh_as_much_as_negatives_in_the_loss_of_several_labels():
    outputs = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0], [0.1, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    weights = label_weights(targets.numpy())
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    p = outputs.sigmoid()
    losses = -torch.where(targets == 1, weights[1] * p.log(), weights[0] * (1 - p).log())
    torch.testing.assert_close(multi_label_loss(outputs, targets, weights), losses.mean())


def test_a_label_that_all_or_no_images_have_has_weight_0():
    targets = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    assert label_weights(targets).tolist() == [[0, 0, 0.25], [0, 0, 0.75]]


def test_several_labels_are_learnt_and_the_best_epoch_has_the_highest_auc():
    torch.manual_seed(0)
    grey = torch.linspace(-2, 2, 16)
    targets = torch.stack([(grey > 0).float(), (grey < -0.3).float()], dim=1)
    images = grey[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    loaders = dict.fromkeys(("train", "val"), Batches(TensorDataset(images, targets), 4))
    model = Linear()
    result = run(model, loaders, objective=MULTI_LABEL, select="auc", epochs=30, patience=30)
    assert result.history["val_auc"].iloc[result.best_epoch - 1] == result.history["val_auc"].max() == 1
    scores = predict_logits(model, loaders["val"])
    assert [roc_auc_score(targets[:, c], scores[:, c]) for c in (0, 1)] == [1, 1]


class Xrays(XrayDataset):
    """Random pictures in place of files."""

    def __init__(self, number):
        super().__init__([""] * number, np.arange(number) % 2, Preprocessing(32, (0, 0, 0), (1, 1, 1)))
        self.pictures = torch.randint(0, 256, (number, 1, 32, 32), dtype=torch.uint8)

    def images(self, rows):
        return self.pictures[rows]


def xray_batches(number=24, augment=None):
    torch.manual_seed(5)
    train, val = Xrays(number), Xrays(8)
    normalise = train.preprocessing.normalise
    return {
        "train": Batches(train, 8, seed=3, augment=augment, prepare=normalise),
        "val": Batches(val, 8, prepare=normalise),
    }


FLIP = Augmentation(horizontal_flip=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hidden", "augment"),
    [("resnet18", (7,), FLIP), ("densenet121", (), None), ("lenet5", (5,), FLIP), ("lenet5", (5,), None)],
)
def test_training_on_cached_features_gives_the_weights_of_training_on_images(name, hidden, augment):
    results = []
    for cached in (True, False):
        loaders = xray_batches(augment=augment)
        torch.manual_seed(1)
        model = build_network(name, 2, hidden_units=hidden, dropout=0.5)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        settings = {"trainable": "head", "epochs": 2, "learning_rate": 1e-2, "cache_features": cached}
        result = run(model, loaders, **settings)
        results.append((model.state_dict(), result.history[["train_loss", "val_loss"]].to_numpy()))
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {key for key in before if key.startswith(f"{model.head_name}.")}
    (once, curve), (usual, expected) = results
    np.testing.assert_allclose(curve, expected, rtol=1e-4)
    for key, value in usual.items():
        torch.testing.assert_close(once[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_frozen_batch_normalisation_keeps_its_statistics_in_both_phases():
    loaders = xray_batches(augment=FLIP)
    torch.manual_seed(2)
    model = build_network("resnet18", 1, hidden_units=(), dropout=0.3)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}
    start = model.conv1.weight.detach().clone()
    moved = []  # by epoch; the weights at the end may be those of an early epoch

    def compare(history):
        same = all(torch.equal(m.running_mean, before[n][0]) for n, m in norms.items())
        same &= all(torch.equal(m.running_var, before[n][1]) for n, m in norms.items())
        moved.append((not same, not torch.equal(model.conv1.weight, start)))

    phases = [{"trainable": t, "epochs": 2, "learning_rate": 1e-3} for t in ("head", "all")]
    result = run(model, loaders, phases=phases, frozen_batch_norm=True, patience=9, on_epoch=compare)
    assert result.history["phase"].tolist() == [1, 1, 2, 2]
    assert result.history["epoch"].tolist() == [1, 2, 3, 4]
    assert moved == [(False, False), (False, False), (False, True), (False, True)]
    moved.clear()
    run(model, loaders, trainable="all", epochs=1, on_epoch=compare)  # without the setting, the statistics move
    assert moved == [(True, True)]


def test_computing_features_counts_as_training_time(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1e-6
        return now[0]

    class SlowXrays(Xrays):
        def images(self, rows):
            now[0] += len(rows)
            return super().images(rows)

    monkeypatch.setattr("training.loop.time.perf_counter", clock)
    loaders = xray_batches()
    loaders["train"].dataset = SlowXrays(24)
    model = build_network("lenet5", 2, hidden_units=())
    result = run(model, loaders, trainable="head", epochs=2)
    np.testing.assert_allclose(result.timing["seconds"], [24, 0], atol=1e-3)


def test_the_validation_loss_of_several_labels_has_the_weights_of_training():
    torch.manual_seed(0)
    grey = torch.linspace(-2, 2, 16)
    targets = torch.stack([(grey > 1.8).float(), (grey < -1.5).float()], dim=1)  # rare
    images = grey[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    loaders = dict.fromkeys(("train", "val"), Batches(TensorDataset(images, targets), 16))
    weights = label_weights(targets.numpy())
    settings = {"loss_weights": weights, "epochs": 1, "learning_rate": 1e-9}
    row = run(Linear(), loaders, objective=MULTI_LABEL, **settings).history.iloc[0]
    assert row["val_loss"] == pytest.approx(row["train_loss"], rel=1e-5)


def test_the_uninformed_loss_is_that_of_the_frequencies_of_the_classes():
    targets = torch.tensor([0, 0, 0, 1])
    four = {"targets": targets, "weights": torch.tensor([9.0, 1.0])}  # not used in validation
    three = {"targets": torch.tensor([0, 1, 2]), "weights": None}
    assert uninformed_loss(SINGLE_LABEL, torch.full((3,), 1 / 3), **three) == pytest.approx(np.log(3))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert uninformed_loss(SINGLE_LABEL, torch.tensor([0.75, 0.25]), **four) == pytest.approx(entropy)
    assert uninformed_loss(SINGLE_LABEL, torch.tensor([0.5, 0.5]), **four) == pytest.approx(np.log(2))
    labels = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.uint8)
    weights = torch.tensor([[0.25, 0.1], [0.75, 0.9]])
    expected = np.log(2) * np.mean([(0.75 + 3 * 0.25) / 4, 0.1])
    assert uninformed_loss(MULTI_LABEL, torch.full((2,), 0.5), labels, weights) == pytest.approx(expected)
    never = uninformed_loss(MULTI_LABEL, torch.tensor([0.25, 0.0]), labels, None)
    assert never == pytest.approx(entropy / 2, abs=1e-5)


def test_a_phase_starts_from_the_best_weights_of_the_one_before():
    # In the first phase every step harms validation, so its best epoch is its first.
    torch.manual_seed(0)
    opposite = (SEPARABLE[0], [1 - label for label in SEPARABLE[1]])
    loaders = {"train": loader(*SEPARABLE), "val": loader(*opposite)}
    phases = [{"epochs": 4, "learning_rate": 0.5}, {"epochs": 1, "learning_rate": 1e-9}]
    result = run(Linear(), loaders, phases=phases, patience=9)
    assert result.history["val_loss"].iloc[4] == pytest.approx(result.history["val_loss"].iloc[0], abs=1e-6)
    assert result.history["val_loss"].iloc[3] > result.history["val_loss"].iloc[0] + 0.1
