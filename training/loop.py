"""The training loop: a network, batches and a study's settings in; the best weights and a history out."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from networks import set_training_mode
from studies.settings import Phase, Training
from training.batches import Batches
from training.checkpoints import Checkpoints, StopRequests, TrainingState
from training.devices import autocast_options, in_order
from training.frozen_features import can_be_cached, feature_batches
from training.objectives import SINGLE_LABEL, Objective
from training.optimisation import Optimisation, Setup
from training.processes import Processes, put_rows, synchronise_batch_norms
from utils import resolve_device

# The number of batches after which several processes agree whether to stop or to save. On GPUs this makes them wait.
AGREE_EVERY = {"cpu": 1, "cuda": 20}


@dataclass(frozen=True)
class FineTuned:
    """What a training gives besides the trained network.

    Attributes:
        history: a row for each epoch, with losses, scores and learning rate.
        timing: a row for each epoch, with seconds and images per second.
        best_epoch: the epoch (from 1) with the best validation result.
        asked_to_stop: whether Ctrl-C or SIGTERM came after the last batch.
    """

    history: pd.DataFrame
    timing: pd.DataFrame
    best_epoch: int
    asked_to_stop: bool


def fine_tune(
    network: nn.Module,
    batches: Mapping[str, Batches],
    *,
    training: Training,
    objective: Objective = SINGLE_LABEL,
    loss_weights: Tensor | None = None,
    device: str = "auto",
    title: str = "",
    on_epoch: Callable[[pd.DataFrame], None] = lambda history: None,
    checkpoints: Checkpoints | None = None,
    alone: bool = False,
) -> FineTuned:
    """Train a network in place and leave it in eval mode with its best weights.

    Each phase of `training` starts from the best weights so far. It ends after its last epoch, or when the validation
    loss (or `training.select`) has not got better for `patience` epochs in a row.

    The state is saved in `checkpoints` after epochs, every `training.checkpoint_minutes` within an epoch, on Ctrl-C or
    SIGTERM, and when an image cannot be read. The next call goes on from it and gives the same weights (on a CPU to
    the last bit).

    Each of several processes (`accelerate launch`) takes its share of every batch. Losses, scores and early stopping
    use the images of all processes; batch normalisation does so on GPUs.

    An epoch's train loss and score are measured while the weights change, with dropout and augmentation. They may
    therefore be worse than those of validation.

    Args:
        network: made by `networks.build_network`.
        batches: "train" and "val".
        training: the settings of the study.
        objective: the loss, and the score that is shown beside it.
        loss_weights: weights of the training loss; also of the validation loss if the objective says so.
        device: "auto", "cpu", "cuda" or "mps".
        title: the name of the network in printed lines.
        on_epoch: called in the main process after each epoch, with the history so far.
        checkpoints: where the state and temporary files of features are saved; None saves no state.
        alone: whether this process trains by itself although others were launched with it.

    Raises:
        FloatingPointError: a loss is not finite.
        OSError: a state cannot be saved.
        KeyboardInterrupt: Ctrl-C or SIGTERM came before the last epoch was done; the state is saved.
    """
    processes = Processes(resolve_device(device), alone=alone)
    network.to(processes.device, memory_format=torch.channels_last)
    weights = None if loss_weights is None else loss_weights.to(processes.device)
    setup = Setup(network, training, objective, weights, processes, title)
    loop = _Loop(setup, TrainingState(network, processes, checkpoints), on_epoch)
    synchronise_batch_norms(network, processes)
    with nullcontext() if checkpoints is None else loop.requests.heard():
        loop.run(batches)
    loop.state.restore_best()
    network.requires_grad_(True).eval()
    progress = loop.state.progress
    asked_to_stop, _ = processes.agreed(loop.requests.asked, False)
    return FineTuned(pd.DataFrame(progress.rows), pd.DataFrame(progress.times), progress.best_epoch, asked_to_stop)


class _Loop:
    """The order of events in a training: phases, epochs, batches, and when to save and to stop."""

    def __init__(self, setup: Setup, state: TrainingState, on_epoch: Callable[[pd.DataFrame], None]) -> None:
        self.setup, self.state, self.on_epoch = setup, state, on_epoch
        self.processes, self.requests = setup.processes, StopRequests()
        self.phases = setup.training.all_phases
        self.optimisation: Optimisation | None = None  # None between two phases

    @property
    def _phase(self) -> Phase:
        return self.phases[self.state.progress.phase - 1]

    @property
    def _name(self) -> str:
        """The present phase and epoch in words."""
        progress, number = self.state.progress, len(self.phases)
        phase = f" phase {progress.phase}/{number} ({self._phase.trainable})" if number > 1 else ""
        return f"{self.setup.title}{phase} epoch {progress.epoch}/{self._phase.epochs}"

    def run(self, batches: Mapping[str, Batches]) -> None:
        """Train the phases that are left."""
        if self.state.resume():
            progress, folder = self.state.progress, self.state.checkpoints.folder
            step = f" and {progress.step} batches" if progress.step else ""
            self.processes.say(f"{self.setup.title}: going on after {len(progress.rows)} epochs{step} ({folder})")
        while self.state.progress.phase <= len(self.phases):
            self._run_phase(batches)

    def _run_phase(self, batches: Mapping[str, Batches]) -> None:
        setup, state, phase, number = self.setup, self.state, self._phase, self.state.progress.phase
        if (state.progress.epoch, state.progress.step) == (1, 0):
            state.restore_best()
        self._set_mode()
        module, inputs = setup.network, nullcontext(batches)
        if phase.trainable == "head" and setup.training.cache_features and can_be_cached(batches["train"]):
            module = setup.network.get_submodule(setup.network.head_name)
            folder = None if state.checkpoints is None else state.checkpoints.folder
            inputs = feature_batches(setup, batches, folder, self._save_or_stop)
        with inputs as batches:
            steps = len(batches["train"].sizes(self.processes.share))
            self.optimisation = Optimisation(setup, module, phase, steps)
            state.resume_phase(self.optimisation)
            while state.progress.phase == number:
                self._run_epoch(batches)

    def _set_mode(self) -> None:
        frozen = self.setup.training.frozen_batch_norm
        set_training_mode(self.setup.network, trainable=self._phase.trainable, frozen_batch_norm=frozen)

    def _run_epoch(self, batches: Mapping[str, Batches]) -> None:
        """Train and validate for an epoch, record it, and go on to the next one."""
        progress, patience = self.state.progress, self.setup.training.patience
        try:
            train = self._train(batches["train"])
            val = self._validate(batches["val"])
        except (ValueError, OSError):  # such as an image that cannot be read
            if not self.processes.several:  # only one process may have the error, so several cannot agree to save
                self._save_or_stop(every=0)
            raise
        self._record(train, val)
        waited = progress.waited
        if waited >= patience:
            self.processes.say(f"{self.setup.title}: stopped, no better on validation for {waited} epochs")
        if waited >= patience or progress.epoch == self._phase.epochs:
            progress.phase, progress.epoch, progress.phase_best, progress.waited = progress.phase + 1, 1, math.inf, 0
            self.optimisation = None
        else:
            progress.epoch += 1
        if self.processes.is_main:
            self.on_epoch(pd.DataFrame(progress.rows))
        self._save_or_stop(every=None)

    def _train(self, batches: Batches) -> dict[str, float]:
        """Learn from the batches of the epoch that are left; return its loss, score and images per second."""
        state, processes, share = self.state, self.processes, self.processes.share
        progress, device = state.progress, processes.device
        self._set_mode()  # validation leaves everything in eval mode
        if progress.step == 0:
            progress.rate = self.optimisation.optimizer.param_groups[0]["lr"]
        sizes = batches.sizes(share)
        began, images_left = time.perf_counter(), sum(sizes[progress.step :])
        epoch = batches.epoch(len(progress.rows) + 1, start=progress.step, device=device, share=share)
        bar = processes.bar(epoch, self._name, len(sizes), initial=progress.step)
        for batch in bar:
            step, (outputs, loss) = progress.step, self.optimisation.step(batch)
            put_rows(state.epoch_outputs, sum(sizes), batch.rows, outputs=outputs, targets=batch.targets)
            sum_of_losses = loss[None] * sizes[step] / share.of
            put_rows(state.epoch_outputs, len(sizes), slice(step, step + 1), losses=sum_of_losses)
            progress.step += 1
            if not bar.disable:
                bar.set_postfix_str(f"loss {loss:.3f}")
            if device.type == "cpu":  # on a GPU this check would make the program wait
                self._refuse_infinite()
            if not processes.several or progress.step % AGREE_EVERY[device.type] == 0:
                self._save_or_stop(every=60 * self.setup.training.checkpoint_minutes)
        self._refuse_infinite()
        processes.copy_from_main(self.setup.network.buffers())  # batch statistics may differ between processes
        whole = {key: processes.summed(tensor).cpu() for key, tensor in state.epoch_outputs.items()}
        return {
            "loss": float(whole["losses"].double().sum()) / sum(sizes),
            "score": self.setup.objective.score(whole["outputs"], whole["targets"]),
            "speed": images_left / (time.perf_counter() - began) if images_left else math.nan,
        }

    def _validate(self, batches: Batches) -> dict[str, float]:
        objective, weights, autocast = self.setup.objective, self.setup.loss_weights, self.setup.autocast
        outputs, targets = _outputs(self.optimisation.module, batches, self.processes, autocast, self._save_or_stop)
        weights = weights.cpu() if objective.weighted_validation and weights is not None else None
        return {"loss": float(objective.loss(outputs, targets, weights)), "score": objective.score(outputs, targets)}

    def _record(self, train: Mapping[str, float], val: Mapping[str, float]) -> None:
        """Add an epoch to the history, tell the schedule, and print the epoch's line."""
        progress, score = self.state.progress, self.setup.objective.score_name
        if not math.isfinite(val["loss"]):
            raise self._not_finite("validation")
        row = {"epoch": len(progress.rows) + 1, "phase": progress.phase, "learning_rate": progress.rate}
        row |= {"train_loss": train["loss"], f"train_{score}": train["score"]}
        row |= {"val_loss": val["loss"], f"val_{score}": val["score"]}
        value = -val["score"] if self.setup.training.select == "auc" else val["loss"]
        value = math.inf if math.isnan(value) else value  # NaN if no label has an area under the ROC curve
        self.optimisation.end_epoch(value)
        self.state.record(row, value, train["speed"])
        self.processes.say(
            f"{self._name}  train loss {train['loss']:.4f} {score} {train['score']:.3f}  "
            f"val loss {val['loss']:.4f} {score} {val['score']:.3f}  {progress.times[-1]['seconds']:.0f} s, "
            f"{train['speed']:.0f} images/s{'  best' if progress.best_epoch == row['epoch'] else ''}"
        )

    # --- when to save, and when to stop ---

    def _save_or_stop(self, every: float | None = math.inf) -> None:
        """Save when a state is due (see `Checkpoints.due`) or a signal asks to stop.

        Raises:
            KeyboardInterrupt: a signal asks to stop, and the training is not done.
        """
        checkpoints, done = self.state.checkpoints, self.state.progress.phase > len(self.phases)
        if checkpoints is None:
            return
        stop, save = self.processes.agreed(self.requests.asked, done or checkpoints.due(every))
        if stop or save:
            self._refuse_infinite()
            self.state.save(self.optimisation)
        if stop and not done:
            raise KeyboardInterrupt(
                f"stopped in {self._name}: its state is in {checkpoints.folder}, run the same again to go on"
            )

    def _refuse_infinite(self) -> None:
        """Raise FloatingPointError for the first batch of the epoch whose loss is not finite."""
        finite = self.state.epoch_outputs.get("losses", torch.zeros(1)).isfinite()
        if not finite.all():
            raise self._not_finite(f"batch {int(finite.int().argmin()) + 1}")

    def _not_finite(self, where: str) -> FloatingPointError:
        checkpoints, epoch = self.state.checkpoints, len(self.state.progress.rows) + 1
        saved = checkpoints is not None and checkpoints.exists
        last = f" (with --restart; what was saved before is in {checkpoints.folder})" if saved else ""
        return FloatingPointError(
            f"{self.setup.title} epoch {epoch}: the loss is not finite ({where}); set a lower learning_rate or "
            f'precision = "fp32"{last}'
        )


def _outputs(
    module: nn.Module, batches: Batches, processes: Processes, autocast: dict, before_batch: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Return outputs (N, …) and targets (N, …) of all images, in their order, on the CPU.

    Each process computes its share in eval mode, and all get the result.
    """
    module.eval()
    tensors: dict[str, Tensor] = {}
    with torch.inference_mode(), torch.autocast(**autocast):
        for batch in batches.epoch(device=processes.device, share=processes.share):
            before_batch()
            outputs = module(in_order(batch.images)).float()
            put_rows(tensors, len(batches.dataset), batch.rows, outputs=outputs, targets=batch.targets)
        return processes.summed(tensors["outputs"]).cpu(), processes.summed(tensors["targets"]).cpu()


def predict_logits(network: nn.Module, batches: Batches, *, device: str | torch.device = "cpu") -> Tensor:
    """Return (N, outputs) float32 logits of a network in eval mode, in the images' order, computed in fp32.

    Each of several processes computes its share, and all get the result.
    """
    processes = Processes(torch.device(device))
    autocast = autocast_options("fp32", processes.device)
    return _outputs(network.to(processes.device), batches, processes, autocast, before_batch=lambda: None)[0]
