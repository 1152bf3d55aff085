"""The training loop: a network, batches and a study's settings in; the best weights and a history out."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from networks import set_training_mode
from studies.settings import Phase, Training
from training.batches import Batches
from training.checkpoints import Checkpoints, NotSaved, StopRequests, TrainingState
from training.devices import CHANNELS_LAST, autocast_options, in_order
from training.frozen_features import can_be_cached, feature_batches
from training.objectives import SINGLE_LABEL, Objective
from training.optimisation import Optimisation, Setup
from training.processes import Processes, SharedRows, synchronise_batch_norms
from utils import resolve_device

# After how many batches several processes agree on whether to stop or to save: to ask a GPU is to wait for it.
AGREE_EVERY = {"cpu": 1, "cuda": 20}


@dataclass(frozen=True)
class FineTuned:
    """What a training leaves beside the network, which has its best weights.

    Attributes:
        history: a row an epoch, of what was learnt.
        timing: a row an epoch, of how long it took.
        best_epoch: the epoch (from 1) that was the best on validation.
        asked_to_stop: whether Ctrl-C or SIGTERM came when no batch was left to stop after.
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
    scratch: Path | None = None,
    alone: bool = False,
) -> FineTuned:
    """Train a network in place and leave it, in eval mode, with its best weights.

    Each phase of `training` starts from the best weights so far. It ends when the validation loss (or
    `training.select`) has not got better for `patience` epochs in a row. The schedules of the learning rate are:

    - "constant";
    - "one_cycle": up to the learning rate over the first 30 % of the steps, then down to almost 0 (Smith & Topin 2018);
    - "plateau": a tenth of the rate whenever validation has not got better for `plateau_patience` epochs.

    The whole state is saved in `checkpoints` at the ends of epochs, every `training.checkpoint_minutes` within an
    epoch, on Ctrl-C or SIGTERM, and when images cannot be read. A training that finds such a state goes on from
    there, to the same weights, on a CPU to the last bit.

    A phase that trains the head alone leaves the rest of the network as it is, normalisation statistics and dropout
    too. Where it can, it computes the features of the rest once (`frozen_features`).

    Each of several processes (`accelerate launch`) takes its share of every batch. Losses, scores and early stopping
    are over all processes, on GPUs batch normalisation too.

    Train loss and score are those of the epoch while the weights change, with dropout and augmentation on. They may
    therefore be worse than those of validation.

    Args:
        network: the network, see `networks.build_network`.
        batches: "train" and "val".
        training: the settings of the study.
        objective: the loss, and the score that is shown beside it.
        loss_weights: weights of the training loss, and of the validation loss where the objective says so.
        device: "auto", "cpu", "cuda" or "mps". `devices` has the rule by which a network is computed on it.
        title: the name of the network in what is printed.
        on_epoch: called with the history so far after each epoch, in the main process.
        checkpoints: where the state is saved, None for nowhere.
        scratch: the folder for the files of features, None for the system's.
        alone: whether this process trains by itself although others were launched with it.

    Raises:
        FloatingPointError: a loss is not finite.
        OSError: a state cannot be saved.
        KeyboardInterrupt: Ctrl-C or SIGTERM came before the last epoch was done; the state is saved.
    """
    processes = Processes(resolve_device(device), alone=alone)
    network.to(processes.device, memory_format=CHANNELS_LAST)
    weights = None if loss_weights is None else loss_weights.to(processes.device)
    setup = Setup(network, training, objective, weights, processes, title)
    loop = _Loop(setup, TrainingState(network, processes, checkpoints), on_epoch)
    synchronise_batch_norms(network, processes)
    with nullcontext() if checkpoints is None else loop.requests.heard():
        loop.run(batches, scratch)
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
        self.optimisation: Optimisation | None = None  # None between two phases

    @property
    def _phase(self) -> Phase:
        return self.setup.training.all_phases[self.state.progress.phase - 1]

    @property
    def _name(self) -> str:
        """The present phase and epoch, for people."""
        progress, phases = self.state.progress, len(self.setup.training.all_phases)
        phase = f" phase {progress.phase}/{phases} ({self._phase.trainable})" if phases > 1 else ""
        return f"{self.setup.title}{phase} epoch {progress.epoch}/{self._phase.epochs}"

    def run(self, batches: Mapping[str, Batches], scratch: Path | None) -> None:
        """Train all phases that are left."""
        progress = self.state.resume()
        if progress is not None:
            title, folder = self.setup.title, self.state.checkpoints.folder
            step = f" and {progress.step} batches" if progress.step else ""
            self.processes.say(f"{title}: going on after {len(progress.rows)} epochs{step} ({folder})")
        while self.state.progress.phase <= len(self.setup.training.all_phases):
            self._run_phase(batches, scratch)

    def _run_phase(self, batches: Mapping[str, Batches], scratch: Path | None) -> None:
        setup, state, phase = self.setup, self.state, self._phase
        number = state.progress.phase
        if (state.progress.epoch, state.progress.step) == (1, 0):
            state.restore_best()
        state.started = time.perf_counter()
        self._set_mode(phase)
        module, inputs = setup.network, nullcontext(batches)
        if phase.trainable == "head" and setup.training.cache_features and can_be_cached(batches["train"]):
            module = setup.network.get_submodule(setup.network.head_name)
            inputs = feature_batches(setup, batches, scratch, self._save_or_stop)
        with inputs as batches:
            steps = len(batches["train"].sizes(self.processes.share))
            self.optimisation = Optimisation(setup, module, phase, steps)
            state.resume_phase(self.optimisation)
            while state.progress.phase == number:
                self._run_epoch(batches)

    def _set_mode(self, phase: Phase) -> None:
        frozen = self.setup.training.frozen_batch_norm
        set_training_mode(self.setup.network, trainable=phase.trainable, frozen_batch_norm=frozen)

    def _run_epoch(self, batches: Mapping[str, Batches]) -> None:
        """Train and validate for an epoch, record it, and go on to the next one."""
        state, training, name, phase = self.state, self.setup.training, self._name, self._phase
        try:
            train = self._train(batches["train"], phase)
            val = self._validate(batches["val"])
        except NotSaved:
            raise
        except (ValueError, OSError):  # such as an image that cannot be read
            if state.checkpoints is not None and not self.processes.several:  # they would have to agree
                self._save()
            raise
        self._record(train, val, name)
        waited = state.progress.waited
        if waited >= training.patience:
            self.processes.say(f"{self.setup.title}: stopped, no better on validation for {waited} epochs")
        if waited >= training.patience or state.progress.epoch == phase.epochs:
            state.start_next_phase()
            self.optimisation = None
        else:
            state.progress.epoch += 1
        if self.processes.is_main:
            self.on_epoch(pd.DataFrame(state.progress.rows))
        self._save_or_stop(every=None)

    def _train(self, batches: Batches, phase: Phase) -> dict[str, float]:
        """Learn from the batches of the epoch that are left; return its loss, score and images a second."""
        setup, state, processes = self.setup, self.state, self.processes
        progress, share = state.progress, processes.share
        self._set_mode(phase)  # validation leaves everything in eval mode
        if progress.step == 0:
            progress.rate = self.optimisation.optimizer.param_groups[0]["lr"]
        sizes = batches.sizes(share)
        numbers = {"outputs": sum(sizes), "targets": sum(sizes), "losses": len(sizes)}
        state.epoch_outputs = state.epoch_outputs or {key: SharedRows(n) for key, n in numbers.items()}
        began, images_left = time.perf_counter(), sum(sizes[progress.step :])
        place = {"start": progress.step, "device": processes.device, "share": share}
        epoch = batches.epoch(len(progress.rows) + 1, **place)
        quiet = None if processes.is_main else True  # None: quiet where no terminal is
        bar = tqdm(epoch, self._name, len(sizes), leave=False, disable=quiet, initial=progress.step)
        for batch in bar:
            step, (outputs, loss) = progress.step, self.optimisation.step(batch)
            state.epoch_outputs["outputs"].put(batch.rows, outputs)
            state.epoch_outputs["targets"].put(batch.rows, batch.targets)
            state.epoch_outputs["losses"].put(slice(step, step + 1), loss[None] * sizes[step] / share.of)
            progress.step += 1
            if not bar.disable:
                bar.set_postfix_str(f"loss {loss:.3f}")
            if processes.device.type == "cpu":  # to ask a GPU is to wait for it
                self._refuse_infinite()
            if not processes.several or progress.step % AGREE_EVERY[processes.device.type] == 0:
                self._save_or_stop(every=60 * setup.training.checkpoint_minutes)
        self._refuse_infinite()
        processes.copy_from_main(setup.network.buffers())  # where each process has normalised its own share
        whole = {key: processes.summed(rows.tensor).cpu() for key, rows in state.epoch_outputs.items()}
        loss = float(whole["losses"].double().sum()) / sum(sizes)
        score = setup.objective.score(whole["outputs"], whole["targets"])
        speed = images_left / (time.perf_counter() - began) if images_left else math.nan
        return {"loss": loss, "score": score, "speed": speed}

    def _validate(self, batches: Batches) -> dict[str, float]:
        objective, weights = self.setup.objective, self.setup.loss_weights
        module, autocast = self.optimisation.module, self.setup.autocast
        outputs, targets = _outputs(module, batches, self.processes, autocast, self._save_or_stop)
        weights = weights.cpu() if objective.weighted_validation and weights is not None else None
        loss = float(objective.loss(outputs, targets, weights))
        return {"loss": loss, "score": objective.score(outputs, targets)}

    def _record(self, train: Mapping[str, float], val: Mapping[str, float], name: str) -> None:
        """Add an epoch to the history, tell the schedule, and print the epoch's line."""
        progress, score = self.state.progress, self.setup.objective.score_name
        if not math.isfinite(val["loss"]):
            raise self._not_finite("validation")
        row = {"epoch": len(progress.rows) + 1, "phase": progress.phase, "learning_rate": progress.rate}
        for side, result in (("train", train), ("val", val)):
            row |= {f"{side}_loss": result["loss"], f"{side}_{score}": result["score"]}
        value = -val["score"] if self.setup.training.select == "auc" else val["loss"]
        value = math.inf if math.isnan(value) else value  # no label has positive images to rank
        self.optimisation.end_epoch(value)
        self.state.record(row, value, train["speed"])
        seconds, best = progress.times[-1]["seconds"], progress.best_epoch == len(progress.rows)
        self.processes.say(
            f"{name}  train loss {train['loss']:.4f} {score} {train['score']:.3f}  "
            f"val loss {val['loss']:.4f} {score} {val['score']:.3f}  "
            f"{seconds:.0f} s, {train['speed']:.0f} images/s{'  best' if best else ''}"
        )

    # --- when to save, and when to stop ---

    def _save_or_stop(self, every: float | None = math.inf) -> None:
        """Save when a state is due or a signal asks to stop. Stop in the latter case, unless the training is done.

        A state is due `every` so many seconds, see `Checkpoints.due`.
        """
        checkpoints = self.state.checkpoints
        if checkpoints is None:
            return
        done = self.state.progress.phase > len(self.setup.training.all_phases)
        stop, save = self.processes.agreed(self.requests.asked, done or checkpoints.due(every))
        if stop or save:
            self._save()
        if stop and not done:
            where = f"stopped in {self._name}: its state is in {checkpoints.folder}"
            raise KeyboardInterrupt(f"{where}, run the same again to go on")

    def _save(self) -> None:
        self._refuse_infinite()
        self.state.save(self.optimisation)

    def _refuse_infinite(self) -> None:
        """Raise FloatingPointError for the first batch of the epoch whose loss is not finite."""
        losses = self.state.epoch_outputs.get("losses", SharedRows(0)).tensor
        if losses is not None and not losses.isfinite().all():
            raise self._not_finite(f"batch {int(losses.isfinite().int().argmin()) + 1}")

    def _not_finite(self, where: str) -> FloatingPointError:
        checkpoints, last = self.state.checkpoints, ""
        if checkpoints is not None and checkpoints.exists:
            last = f" (with --restart; what was saved before is in {checkpoints.folder})"
        return FloatingPointError(
            f"{self.setup.title} epoch {len(self.state.progress.rows) + 1}: the loss is not finite ({where}); "
            f'set a lower learning_rate or precision = "fp32"{last}'
        )


def _outputs(
    module: nn.Module,
    batches: Batches,
    processes: Processes,
    autocast: Mapping[str, object],
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return outputs (N, …) and targets (N, …) of all images, in their order, on the CPU.

    Each process computes its share, in eval mode, and all have the result.
    """
    module.eval()
    outputs, targets = SharedRows(len(batches.dataset)), SharedRows(len(batches.dataset))
    with torch.inference_mode():
        for batch in batches.epoch(device=processes.device, share=processes.share):
            before_batch()
            if len(batch.images) or outputs.tensor is None:  # a process may have no image of a last batch
                with torch.autocast(**autocast):
                    outputs.put(batch.rows, module(in_order(batch.images)).float())
                targets.put(batch.rows, batch.targets)
        return processes.summed(outputs.tensor).cpu(), processes.summed(targets.tensor).cpu()


def predict_logits(network: nn.Module, batches: Batches, *, device: str | torch.device = "cpu") -> Tensor:
    """Return the (N, outputs) float32 of a network in eval mode, in the images' order, at full precision.

    Each of several processes computes its share, and all have the result.
    """
    processes = Processes(torch.device(device))
    autocast = autocast_options("fp32", processes.device)
    return _outputs(network.to(processes.device), batches, processes, autocast)[0]
