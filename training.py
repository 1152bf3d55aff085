"""The training loop: a network, loaders and a study's settings in, the best weights and a history out."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from frozen_features import can_be_cached, feature_loaders
from metrics import mean_auc
from networks import class_logits, resolve_device, set_training_mode
from studies import Phase, Training


@dataclass(frozen=True)
class FineTuned:
    """What a training leaves beside the network, which has its best weights: a row an epoch, and which
    epoch (from 1) was the best on validation.
    """

    history: pd.DataFrame
    best_epoch: int


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for "auto": bf16 where the device has units for it, since emulation is slower
    than fp32 (measured at half the speed on a processor with AVX-512 but without AVX512-BF16).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    return "fp32"


def single_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of (N, C) logits, or of one logit z a row, for (N,) class indices; `weights`
    (C,) weigh the classes.

    For one logit it is the binary cross-entropy of sigmoid(z), as a softmax of (-z/2, z/2).
    """
    return functional.cross_entropy(class_logits(outputs), targets, weight=weights)


def multi_label_loss(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy of (N, C) logits for (N, C) of 0 and 1; `weights` (2, C) weigh each
    label's negatives (row 0) and positives (row 1), see `utils.label_weights`.
    """
    weight = None if weights is None else torch.where(targets > 0.5, weights[1], weights[0])
    return functional.binary_cross_entropy_with_logits(outputs, targets, weight=weight)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose highest logit is that of the true class."""
    return float((class_logits(outputs).argmax(dim=1) == targets).double().mean())


def macro_auc(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean over labels of the area under the ROC curve."""
    return mean_auc(targets.numpy(), outputs.numpy())


@dataclass(frozen=True)
class Objective:
    """What a network is trained for: a loss of (outputs, targets, weights) and the score shown beside it.

    `weighted_validation`: whether the validation loss has the weights too. Without them the loss of several rare
    labels is another quantity, several times as large; of one class an image it is the usual cross-entropy.
    """

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    weighted_validation: bool


SINGLE_LABEL = Objective(single_label_loss, accuracy, "accuracy", weighted_validation=False)
MULTI_LABEL = Objective(multi_label_loss, macro_auc, "auc", weighted_validation=True)


def fine_tune(
    network: nn.Module,
    loaders: Mapping[str, DataLoader],
    *,
    training: Training,
    objective: Objective = SINGLE_LABEL,
    loss_weights: Tensor | None = None,
    device: str = "auto",
    title: str = "",
    on_epoch: Callable[[pd.DataFrame], None] = lambda history: None,
    scratch: Path | None = None,
) -> FineTuned:
    """Train a network in place and leave it, in eval mode, with its best weights.

    `loaders` has "train" and "val", each of ((B, 3, S, S), targets) batches. Each phase of `training` starts
    from the best weights so far and ends when the validation loss (or `training.select`) has not got better
    for `patience` epochs in a row. Schedules: "constant"; "one_cycle" (Smith & Topin 2018: up to the learning
    rate over the first 30 % of the steps, then down to almost 0); "plateau" (a tenth of the rate whenever
    validation has not got better for `plateau_patience` epochs). `loss_weights` weigh the training loss, and
    the validation loss where the objective says so. `on_epoch` gets the history so far after each epoch.

    A phase that trains the head alone leaves the rest as it is, normalisation statistics and dropout too, and
    computes the rest's features once where it can (`frozen_features`), in files in `scratch`.

    Train loss and score are over the epoch while the weights change, with dropout and augmentation on; so
    they may lie below the validation's. Raises FloatingPointError on a loss that is not finite.
    """
    engine = _Engine(network, training, objective, loss_weights, resolve_device(device), title, on_epoch)
    for number, phase in enumerate(training.stretches, start=1):
        engine.restore_best()
        started = time.perf_counter()
        frozen = phase.trainable == "head"
        set_training_mode(network, trainable=phase.trainable, frozen_batch_norm=training.frozen_batch_norm)
        if frozen and training.cache_features and can_be_cached(loaders["train"]):
            context = {"device": engine.device, "autocast": engine.autocast}
            network.to(engine.device)
            with feature_loaders(network, loaders, folder=scratch, title=title, **context) as features:
                head = network.get_submodule(network.head_name)
                engine.run(number, phase, head, features, started=started)
        else:
            engine.run(number, phase, network, loaders, started=started)
    engine.restore_best()
    network.requires_grad_(True)
    network.eval()
    return FineTuned(pd.DataFrame(engine.rows), engine.best_epoch)


class _Engine:
    """The state of a training that outlives a phase: the history, the best weights, and where it runs."""

    def __init__(
        self,
        network: nn.Module,
        training: Training,
        objective: Objective,
        loss_weights: Tensor | None,
        device: torch.device,
        title: str,
        on_epoch: Callable[[pd.DataFrame], None],
    ) -> None:
        self.network, self.training, self.objective = network, training, objective
        self.title, self.on_epoch = title, on_epoch
        self.accelerator = _accelerator(device)
        self.device = self.accelerator.device
        half = resolve_precision(training.precision, self.device) == "bf16"
        self.autocast = {"device_type": self.device.type, "dtype": torch.bfloat16, "enabled": half}
        self.loss_weights = None if loss_weights is None else loss_weights.to(self.device)
        self.rows: list[dict[str, object]] = []
        self.best_epoch, self.best_value, self.best_state = 0, math.inf, {}
        network.to(memory_format=torch.channels_last)

    def restore_best(self) -> None:
        """Go back to the best weights so far, if there are any."""
        if self.best_state:
            self.network.load_state_dict(self.best_state)

    def run(
        self,
        number: int,
        phase: Phase,
        module: nn.Module,
        loaders: Mapping[str, DataLoader],
        *,
        started: float,
    ) -> None:
        """Train `module`, the whole network or its head, for a phase that began at the time `started`: what was
        done for it since then, such as computing features, counts as part of its first epoch.
        """
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _optimizer(learning, self.training, phase.learning_rate, self.device)
        model, optimizer, train, val = self.accelerator.prepare(
            module, optimizer, loaders["train"], loaders["val"]
        )
        schedule = _Schedule(optimizer.optimizer, self.training, phase, len(train))
        phase_best, waited = math.inf, 0
        several = len(self.training.stretches)
        stretch = f" phase {number}/{several} ({phase.trainable})" if several > 1 else ""
        for epoch in range(1, phase.epochs + 1):
            name = f"{self.title}{stretch} epoch {epoch}/{phase.epochs}"
            rate, training_since = optimizer.param_groups[0]["lr"], time.perf_counter()
            # Before each epoch: validation leaves everything in eval mode.
            set_training_mode(
                self.network,
                trainable=phase.trainable,
                frozen_batch_norm=self.training.frozen_batch_norm,
            )
            fitted = self._train_epoch(model, train, optimizer, schedule, name)
            seconds = time.perf_counter() - training_since
            checked = self._validate(model, val)
            self._record(number, rate, fitted, checked, started, len(train.dataset) / seconds)
            started = time.perf_counter()
            value = -checked["score"] if self.training.select == "auc" else checked["loss"]
            value = math.inf if math.isnan(value) else value  # no positive image of any label to rank
            schedule.after_epoch(value)
            if value < self.best_value or not self.best_epoch:
                self._keep_best(value)
            phase_best, waited = (value, 0) if value < phase_best else (phase_best, waited + 1)
            best = self.best_epoch == len(self.rows)
            tqdm.write(_epoch_line(name, self.rows[-1], self.objective.score_name, best=best))
            self.on_epoch(pd.DataFrame(self.rows))
            if waited >= self.training.patience:
                tqdm.write(f"{self.title}: stopped, no better on validation for {waited} epochs")
                break

    def _keep_best(self, value: float) -> None:
        self.best_epoch, self.best_value = len(self.rows), value
        state = self.network.state_dict()
        self.best_state = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}

    def _train_epoch(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        optimizer: torch.optim.Optimizer,
        schedule: "_Schedule",
        name: str,
    ) -> dict[str, float]:
        outputs, targets, losses = [], [], []
        bar = tqdm(batches, desc=name, leave=False, disable=not sys.stderr.isatty(), unit="batch")
        for images, wanted in bar:
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(**self.autocast):
                output = model(images)
            loss = self.objective.loss(output.float(), wanted, self.loss_weights)
            optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
            optimizer.step()
            schedule.after_step()
            outputs.append(output.detach().float())
            targets.append(wanted)
            losses.append(loss.detach() * len(wanted))
            if not bar.disable:
                bar.set_postfix_str(f"loss {float(loss):.3f}")
        everything, truth = torch.cat(outputs).cpu(), torch.cat(targets).cpu()
        mean = float(torch.stack(losses).double().sum()) / len(truth)
        return {"loss": mean, "score": self.objective.score(everything, truth)}

    def _validate(self, model: nn.Module, batches: DataLoader) -> dict[str, float]:
        outputs, targets = _outputs(model, batches, self.device, self.autocast)
        weights = self.loss_weights if self.objective.weighted_validation else None
        loss = float(self.objective.loss(outputs, targets, None if weights is None else weights.cpu()))
        return {"loss": loss, "score": self.objective.score(outputs, targets)}

    def _record(
        self,
        phase: int,
        rate: float,
        fitted: Mapping[str, float],
        checked: Mapping[str, float],
        started: float,
        images_per_second: float,
    ) -> None:
        epoch, score = len(self.rows) + 1, self.objective.score_name
        if not (math.isfinite(fitted["loss"]) and math.isfinite(checked["loss"])):
            raise FloatingPointError(
                f"{self.title} epoch {epoch}: the loss is not finite; set a lower learning_rate or "
                'precision = "fp32"'
            )
        self.rows.append(
            {
                "epoch": epoch,
                "phase": phase,
                "learning_rate": rate,
                "train_loss": fitted["loss"],
                f"train_{score}": fitted["score"],
                "val_loss": checked["loss"],
                f"val_{score}": checked["score"],
                "seconds": time.perf_counter() - started,
                "images_per_second": images_per_second,
            }
        )


def _accelerator(device: torch.device) -> Accelerator:
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    # The first Accelerator of a process would fix the device for all; a notebook may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu")


def _optimizer(
    parameters: list[nn.Parameter], training: Training, rate: float, device: torch.device
) -> torch.optim.Optimizer:
    options = {"lr": rate, "weight_decay": training.weight_decay, "fused": device.type != "mps"}
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return torch.optim.Adam(parameters, **options)


class _Schedule:
    """How the learning rate goes on: some schedules step with every batch, one with what
    validation says (the lower the better).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, training: Training, phase: Phase, batches: int
    ) -> None:
        self._by_step = self._by_value = None
        if training.schedule == "one_cycle":
            # Adam's betas stay as they are: cycling the momentum is a habit from SGD.
            self._by_step = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=phase.learning_rate,
                total_steps=phase.epochs * batches,
                cycle_momentum=False,
            )
        elif training.schedule == "plateau":
            # torch waits for one epoch more than it is told.
            # A relative threshold would be one in the wrong direction for a negative AUC.
            self._by_value = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer,
                factor=0.1,
                patience=training.plateau_patience - 1,
                threshold=0,
                threshold_mode="abs",
            )

    def after_step(self) -> None:
        if self._by_step is not None:
            self._by_step.step()

    def after_epoch(self, value: float) -> None:
        if self._by_value is not None:
            self._by_value.step(value)


def _outputs(
    model: nn.Module, batches: DataLoader, device: torch.device, autocast: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    model.eval()
    outputs, targets = [], []
    with torch.inference_mode():
        for images, wanted in batches:
            images = images.to(device)
            if images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(**autocast):
                outputs.append(model(images).float().cpu())
            targets.append(wanted.cpu())
    return torch.cat(outputs), torch.cat(targets)


def predict_logits(network: nn.Module, batches: DataLoader, *, device: str | torch.device = "cpu") -> Tensor:
    """Return the (N, outputs) float32 of a network in eval mode, in the loader's order, at full precision."""
    full = {"device_type": torch.device(device).type, "dtype": torch.bfloat16, "enabled": False}
    return _outputs(network, batches, torch.device(device), full)[0]


def _epoch_line(name: str, row: Mapping[str, object], score: str, *, best: bool) -> str:
    return (
        f"{name}  train loss {row['train_loss']:.4f} {score} {row[f'train_{score}']:.3f}  "
        f"val loss {row['val_loss']:.4f} {score} {row[f'val_{score}']:.3f}  "
        f"{row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s{'  best' if best else ''}"
    )
