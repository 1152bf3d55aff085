"""The training loop: a network, batches and a study's settings in, the best weights and a history out."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from batches import Batches
from checkpoints import Checkpoints, NotSaved, device_random_state, on_cpu, random_states, set_random_states
from compute import CHANNELS_LAST, autocast_options, in_order
from frozen_features import can_be_cached, feature_batches
from networks import resolve_device, set_training_mode
from objectives import SINGLE_LABEL, Objective
from processes import accelerator_on, in_place, share_of, summed, synchronised
from study_settings import Phase, Training
from utils import derived_seed

# Batches between two looks of several processes at whether to stop or to save: asking a GPU means waiting for it.
AGREE_EVERY = {"cpu": 1, "cuda": 20}
PATIENCE = 3.0  # seconds between a first Ctrl-C and one that says that it was meant


@dataclass(frozen=True)
class FineTuned:
    """What a training leaves beside the network, which has its best weights: a row an epoch, how long each
    epoch took, and which epoch (from 1) was the best on validation.

    `asked_to_stop`: whether Ctrl-C or SIGTERM came when no batch was left to stop after.
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
) -> FineTuned:
    """Train a network in place and leave it, in eval mode, with its best weights.

    `batches` has "train" and "val". Each phase of `training` starts from the best weights so far and ends when the
    validation loss (or `training.select`) has not got better for `patience` epochs in a row. Schedules: "constant";
    "one_cycle" (Smith & Topin 2018: up to the learning rate over the first 30 % of the steps, then down to almost
    0); "plateau" (a tenth of the rate whenever validation has not got better for `plateau_patience` epochs).
    `loss_weights` weigh the training loss, and the validation loss where the objective says so. `on_epoch` gets the
    history so far after each epoch. It is computed as the rule in `compute` says.

    With `checkpoints` the whole state is kept after each epoch (of short ones after several: saving takes a twentieth
    of the time at most), every `training.checkpoint_minutes` within one, on Ctrl-C or SIGTERM, and when images
    cannot be read; a training that finds such a state goes on from there, to the same weights, on a CPU to
    the last bit.

    A phase that trains the head alone leaves the rest as it is, normalisation statistics and dropout too, and
    computes the rest's features once where it can (`frozen_features`), in files in `scratch`.

    Of several processes (`accelerate launch`) each takes its share of every batch; batch normalisation, losses,
    scores and early stopping are over all of them.

    Train loss and score are over the epoch while the weights change, with dropout and augmentation on; so
    they may lie below the validation's. Raises FloatingPointError on a loss that is not finite, OSError where a
    state cannot be saved, and KeyboardInterrupt, after saving, where it was asked to stop before its last epoch
    was done.
    """
    where = resolve_device(device)
    engine = _Engine(network, training, objective, loss_weights, where, title, on_epoch, checkpoints)
    with engine.stop_requests():
        engine.resume()
        for number, phase in enumerate(training.all_phases, start=1):
            if number >= engine.at.phase:
                _run_phase(engine, number, phase, batches, scratch)
    engine.restore_best()
    network.requires_grad_(True)
    network.eval()
    at = engine.at
    stop, _ = engine.agreed(engine.asked_to_stop, False)
    return FineTuned(pd.DataFrame(at.rows), pd.DataFrame(at.times), at.best_epoch, stop)


def _run_phase(
    engine: "_Engine", number: int, phase: Phase, batches: Mapping[str, Batches], scratch: Path | None
) -> None:
    network, training = engine.network, engine.training
    if engine.at.begins_phase:
        engine.restore_best()
    engine.started = time.perf_counter()
    set_training_mode(network, trainable=phase.trainable, frozen_batch_norm=training.frozen_batch_norm)
    if not (phase.trainable == "head" and training.cache_features and can_be_cached(batches["train"])):
        engine.run(number, phase, network, batches)
        return
    network.to(engine.device)
    with feature_batches(
        network,
        batches,
        accelerator=engine.accelerator,
        autocast=engine.autocast,
        folder=scratch,
        title=engine.title,
        each_batch=lambda: engine.stop_if_asked(f"{engine.title} phase {number}"),
    ) as features:
        engine.run(number, phase, network.get_submodule(network.head_name), features)


@dataclass
class _Place:
    """How far a training has come: `step` batches of the `epoch`-th epoch (from 1) of the `phase`-th phase are
    done, and what came of them; `rows` and `times` of the epochs before.
    """

    phase: int = 1
    epoch: int = 1
    step: int = 0
    phase_best: float = math.inf
    waited: int = 0
    best_epoch: int = 0
    best_value: float = math.inf
    seconds: float = 0.0
    rate: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    times: list[dict[str, float]] = field(default_factory=list)

    @property
    def begins_phase(self) -> bool:
        return self.epoch == 1 and self.step == 0


class _Rows:
    """Rows that come batch by batch, in one tensor that grows. Kept one by one, small tensors lie between large
    ones that come and go, and the memory that these leave cannot be used again: with 100,000 images, gigabytes.
    """

    def __init__(self) -> None:
        self._tensor, self._number = None, 0

    def append(self, rows: Tensor) -> None:
        """Add (b, …) rows, b ≥ 0."""
        end = self._number + len(rows)
        if self._tensor is None:
            self._tensor = rows.new_empty(max(end, 1024), *rows.shape[1:])
        elif end > len(self._tensor):
            longer = rows.new_empty(2 * end, *rows.shape[1:])
            longer[: self._number] = self.tensor
            self._tensor = longer
        self._tensor[self._number : end] = rows
        self._number = end

    def __bool__(self) -> bool:
        return self._tensor is not None

    @property
    def tensor(self) -> Tensor:
        """All rows so far."""
        return self._tensor[: self._number]


def _no_parts() -> dict[str, _Rows]:
    return {"outputs": _Rows(), "targets": _Rows(), "losses": _Rows()}


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
        checkpoints: Checkpoints | None,
    ) -> None:
        self.network, self.training, self.objective = network, training, objective
        self.title, self.on_epoch, self.checkpoints = title, on_epoch, checkpoints
        self.accelerator = accelerator_on(device)
        self.device, self.share = self.accelerator.device, share_of(self.accelerator)
        self.first = self.accelerator.is_main_process
        self.autocast = autocast_options(training.precision, self.device)
        self.loss_weights = None if loss_weights is None else loss_weights.to(self.device)
        self.at, self.best_state = _Place(), {}
        self.parts = _no_parts()
        self.optimizer, self.schedule = None, None
        self._resumed: dict[str, object] | None = None
        self.asked_to_stop, self.asked_at = False, 0.0
        self.saved_at, self.saving_took = time.perf_counter(), 0.0
        network.to(memory_format=CHANNELS_LAST)

    # --- what is kept on disk, and found again ---

    @contextmanager
    def stop_requests(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM be requests to stop after the present batch; a later Ctrl-C interrupts."""
        if self.checkpoints is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            # A launcher passes on the same request that the terminal sent, at once: that is no second one.
            if self.asked_to_stop and time.monotonic() - self.asked_at > PATIENCE and number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.asked_to_stop:
                self.asked_to_stop, self.asked_at = True, time.monotonic()
                print("stopping after this batch; once more, in a while, to stop at once", file=sys.stderr)

        # One that is ignored, as Ctrl-C in a shell's background, stays so.
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def resume(self) -> None:
        """Go back to the state that was saved last, if there is one."""
        state = None if self.checkpoints is None else self.checkpoints.saved()
        found = summed(self.accelerator, torch.tensor(float(state is not None), device=self.device))
        if 0 < float(found) < self.share.of:
            raise ValueError(f"{self.checkpoints.folder} must be on a disk that all machines share")
        if state is None:
            if self.share.index:
                # Each process draws its own dropout.
                torch.manual_seed(derived_seed(torch.initial_seed(), "dropout", self.share.index))
            return
        self.network.load_state_dict(state["network"])
        self.best_state, self.at = state["best_state"], _Place(**state["place"])
        self._resumed = state
        if self.first:
            epoch, batch = len(self.at.rows), f" and {self.at.step} batches" if self.at.step else ""
            tqdm.write(f"{self.title}: going on after {epoch} epochs{batch} ({self.checkpoints.folder})")

    def save(self) -> None:
        """Keep everything that is needed to go on from here."""
        started = time.perf_counter()
        if self.parts["losses"]:
            self._refuse_infinite(self.parts["losses"].tensor)
        here, drawn = [slice(self.share.index, self.share.index + 1)], {}
        for key, state in (("torch", torch.get_rng_state()), ("device", device_random_state(self.device))):
            if state is not None:  # what dropout draws, in each process
                row = state[None].to(self.device)
                drawn[key] = in_place(self.accelerator, row, here, self.share.of).cpu()
        parts = {key: self._over_processes(rows.tensor) for key, rows in self.parts.items() if rows}
        if self.first:
            self.checkpoints.save(
                {
                    "place": asdict(self.at) | {"seconds": self.at.seconds + started - self.started},
                    "best_epoch": self.at.best_epoch,
                    "best_state": self.best_state,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer and self.optimizer.state_dict(),
                    "schedule": self.schedule and self.schedule.state_dict(),
                    "parts": parts,
                    "random": random_states() | drawn,
                }
            )
        self.saved_at, self.saving_took = time.perf_counter(), time.perf_counter() - started

    def restore_best(self) -> None:
        """Go back to the best weights so far, if there are any."""
        if self.best_state:
            self.network.load_state_dict(self.best_state)

    # --- a phase ---

    def run(self, number: int, phase: Phase, module: nn.Module, batches: Mapping[str, Batches]) -> None:
        """Train `module`, the whole network or its head, for what is left of a phase."""
        train, val = batches["train"], batches["val"]
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with synchronised(module, self.accelerator):
            model, optimizer = self.accelerator.prepare(
                module, _optimizer(learning, self.training, phase.learning_rate, self.device)
            )
            self.optimizer = getattr(optimizer, "optimizer", optimizer)
            steps = len(train.sizes(self.share))
            self.schedule = _Schedule(self.optimizer, self.training, phase, steps)
            self._take_up()
            for epoch in range(self.at.epoch, phase.epochs + 1):
                name = self._name(number, phase, epoch)
                with self._kept_on_errors():
                    fitted = self._train_epoch(model, train, phase, name)
                    checked = self._validate(module, val, name)
                self._record(number, fitted, checked, name)
                over = self.at.waited >= self.training.patience
                if over and self.first:
                    tqdm.write(f"{self.title}: stopped, no better on validation for {self.at.waited} epochs")
                if over or epoch == phase.epochs:
                    self.at.phase, self.at.epoch = number + 1, 1
                    self.at.phase_best, self.at.waited = math.inf, 0
                    self.optimizer = self.schedule = None
                else:
                    self.at.epoch = epoch + 1
                self._after_epoch(name)
                if over:
                    break
        self.accelerator.free_memory()  # its own references to this phase's model and optimiser

    def _name(self, number: int, phase: Phase, epoch: int) -> str:
        several = len(self.training.all_phases)
        stretch = f" phase {number}/{several} ({phase.trainable})" if several > 1 else ""
        return f"{self.title}{stretch} epoch {epoch}/{phase.epochs}"

    def _take_up(self) -> None:
        """Give a phase that was broken off its optimiser, schedule, half epoch and random numbers back."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        # What all processes did so far is the first one's to report.
        rows = slice(None) if self.first else slice(0)
        for key, values in state["parts"].items():
            self.parts[key].append(values.to(self.device)[rows])
        # Clones: torch sets a generator from the start of the whole tensor, wherever the row is.
        drawn = {key: state["random"][key] for key in ("torch", "device") if key in state["random"]}
        own = {key: rows[self.share.index].clone() for key, rows in drawn.items()}
        set_random_states(state["random"] | own, self.device)

    def _train_epoch(self, model: nn.Module, batches: Batches, phase: Phase, name: str) -> dict[str, float]:
        # Before each epoch: validation leaves everything in eval mode.
        frozen = self.training.frozen_batch_norm
        set_training_mode(self.network, trainable=phase.trainable, frozen_batch_norm=frozen)
        if self.at.step == 0:
            self.at.rate = self.optimizer.param_groups[0]["lr"]
        sizes, order = batches.sizes(self.share), len(self.at.rows) + 1
        began, images = time.perf_counter(), sum(sizes[self.at.step :])
        epoch = batches.epoch(order, start=self.at.step, device=self.device, share=self.share)
        quiet = not (self.first and sys.stderr.isatty())
        bar = tqdm(epoch, name, len(sizes), initial=self.at.step, leave=False, disable=quiet, unit="batch")
        for batch in bar:
            loss = self._step(model, batch.images, batch.targets, sizes[self.at.step])
            self.at.step += 1
            if not quiet:
                bar.set_postfix_str(f"loss {loss:.3f}")
            self._keep_or_stop(name)
        self._refuse_infinite(self.parts["losses"].tensor)
        done = {key: self._over_processes(rows.tensor).cpu() for key, rows in self.parts.items()}
        mean = float(done["losses"].double().sum()) / sum(sizes)
        speed = images / (time.perf_counter() - began) if images else math.nan
        return {"loss": mean, "score": self.objective.score(done["outputs"], done["targets"]), "speed": speed}

    def _step(self, model: nn.Module, images: Tensor, targets: Tensor, number: int) -> Tensor:
        """Learn from this process's share of a batch of `number` images; return its loss."""
        with torch.autocast(**self.autocast):
            output = model(in_order(images))
        loss = self.objective.loss(output.float(), targets, self.loss_weights)
        if self.share.of > 1:
            # Gradients are averaged over the processes; so that they are those of the whole batch's mean:
            size = self.objective.size(targets, self.loss_weights).to(self.device)
            loss = loss * size / summed(self.accelerator, size) * self.share.of
        if self.device.type == "cpu":  # a GPU is not waited for: it is asked at the end of the epoch
            self._refuse_infinite(loss.detach()[None])
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.after_step()
        self.parts["outputs"].append(output.detach().float())
        self.parts["targets"].append(targets)
        self.parts["losses"].append(loss.detach()[None] * number / self.share.of)
        return loss.detach()

    def _validate(self, module: nn.Module, batches: Batches, name: str) -> dict[str, float]:
        look = lambda: self.stop_if_asked(name)  # noqa: E731
        outputs, targets = _outputs(module, batches, self.accelerator, self.autocast, each_batch=look)
        weights = self.loss_weights if self.objective.weighted_validation else None
        loss = float(self.objective.loss(outputs, targets, None if weights is None else weights.cpu()))
        return {"loss": loss, "score": self.objective.score(outputs, targets)}

    def _record(
        self, phase: int, fitted: Mapping[str, float], checked: Mapping[str, float], name: str
    ) -> None:
        """Add an epoch to the history, and keep its weights if they are the best."""
        at, score = self.at, self.objective.score_name
        if not math.isfinite(checked["loss"]):
            raise FloatingPointError(self._not_finite("validation"))
        row = {"epoch": len(at.rows) + 1, "phase": phase, "learning_rate": at.rate}
        for side, found in (("train", fitted), ("val", checked)):
            row |= {f"{side}_loss": found["loss"], f"{side}_{score}": found["score"]}
        at.rows.append(row)
        seconds = at.seconds + time.perf_counter() - self.started
        at.times.append({"epoch": row["epoch"], "seconds": seconds, "images_per_second": fitted["speed"]})
        self.parts = _no_parts()
        at.step, at.seconds, self.started = 0, 0.0, time.perf_counter()
        value = -checked["score"] if self.training.select == "auc" else checked["loss"]
        value = math.inf if math.isnan(value) else value  # no positive image of any label to rank
        self.schedule.after_epoch(value)
        if value < at.best_value or not at.best_epoch:
            at.best_epoch, at.best_value = len(at.rows), value
            self.best_state = on_cpu(self.network.state_dict())
        at.phase_best, at.waited = (value, 0) if value < at.phase_best else (at.phase_best, at.waited + 1)
        if self.first:
            best = at.best_epoch == len(at.rows)
            tqdm.write(_epoch_line(name, row | at.times[-1], score, best=best))

    # --- when to save, and when to stop ---

    def _after_epoch(self, name: str) -> None:
        if self.first:
            self.on_epoch(pd.DataFrame(self.at.rows))
        if self.checkpoints is None:
            return
        done = self.at.phase > len(self.training.all_phases)
        since = time.perf_counter() - self.saved_at
        stop, due = self.agreed(self.asked_to_stop, done or since > 20 * self.saving_took)
        if stop or due:
            self.save()
        if stop and not done:
            raise KeyboardInterrupt(self._stopped(name))

    @contextmanager
    def _kept_on_errors(self) -> Iterator[None]:
        """Save what is done so far where something cannot go on, such as an image that cannot be read."""
        try:
            yield
        except NotSaved:
            raise
        except (ValueError, OSError):
            if self.checkpoints is not None and self.share.of == 1:  # several would have to agree
                self.save()
            raise

    def _keep_or_stop(self, name: str) -> None:
        """Within an epoch: save from time to time; save and stop when asked to."""
        if self.checkpoints is None or (self.share.of > 1 and self.at.step % AGREE_EVERY[self.device.type]):
            return
        since = time.perf_counter() - self.saved_at
        stop, due = self.agreed(self.asked_to_stop, since >= 60 * self.training.checkpoint_minutes)
        if stop or due:
            self.save()
        if stop:
            raise KeyboardInterrupt(self._stopped(name))

    def stop_if_asked(self, name: str) -> None:
        """Save and stop where a signal has asked for it."""
        if self.checkpoints is not None and self.agreed(self.asked_to_stop, False)[0]:
            self.save()
            raise KeyboardInterrupt(self._stopped(name))

    def agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the first one's clock says that it is time."""
        if self.share.of > 1:
            asked = torch.tensor([float(stop), float(due and self.first)], device=self.device)
            stop, due = (bool(value) for value in summed(self.accelerator, asked))
        return stop, due

    def _stopped(self, name: str) -> str:
        return f"stopped in {name}: its state is in {self.checkpoints.folder}, run the same again to go on"

    def _refuse_infinite(self, losses: Tensor) -> None:
        """Raise FloatingPointError for the first of (n,) losses, of the last batch or of all, that is not finite."""
        finite = losses.isfinite()
        if not finite.all():
            number = self.at.step + 1 if len(losses) == 1 else int(finite.int().argmin()) + 1
            raise FloatingPointError(self._not_finite(f"batch {number}"))

    def _not_finite(self, what: str) -> str:
        kept = ""
        if self.checkpoints is not None and self.saving_took:
            kept = f" (with --restart; what was saved before is in {self.checkpoints.folder})"
        return (
            f"{self.title} epoch {len(self.at.rows) + 1}: the loss is not finite ({what}); set a lower learning_rate "
            f'or precision = "fp32"{kept}'
        )

    def _over_processes(self, own: Tensor) -> Tensor:
        """Return the rows that all processes have gathered, each once."""
        lengths = torch.zeros(self.share.of, device=own.device)
        lengths[self.share.index] = len(own)
        ends = summed(self.accelerator, lengths).long().cumsum(0)
        start = int(ends[self.share.index]) - len(own)
        return in_place(self.accelerator, own, [slice(start, start + len(own))], int(ends[-1]))


def _optimizer(
    parameters: list[nn.Parameter], training: Training, rate: float, device: torch.device
) -> torch.optim.Optimizer:
    options = {"lr": rate, "fused": device.type != "mps"}
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

    def state_dict(self) -> dict[str, object]:
        """Return what `load_state_dict` takes."""
        inner = self._by_step or self._by_value
        return {} if inner is None else inner.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where a schedule of the same settings was."""
        inner = self._by_step or self._by_value
        if inner is not None:
            inner.load_state_dict(state)

    def after_step(self) -> None:
        if self._by_step is not None:
            self._by_step.step()

    def after_epoch(self, value: float) -> None:
        if self._by_value is not None:
            self._by_value.step(value)


def _outputs(
    module: nn.Module,
    batches: Batches,
    accelerator: Accelerator,
    autocast: Mapping[str, object],
    *,
    each_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of all images, in their order, on the CPU: each process computes its share."""
    module.eval()
    device, share = accelerator.device, share_of(accelerator)
    outputs, targets, rows = _Rows(), _Rows(), []
    with torch.inference_mode():
        for batch in batches.epoch(device=device, share=share):
            each_batch()
            if len(batch.images) or not outputs:  # of a last batch, a process may have no image
                with torch.autocast(**autocast):
                    outputs.append(module(in_order(batch.images)).float())
                targets.append(batch.targets)
                rows.append(batch.rows)
        number = len(batches.dataset)
        return tuple(in_place(accelerator, parts.tensor, rows, number).cpu() for parts in (outputs, targets))


def predict_logits(network: nn.Module, batches: Batches, *, device: str | torch.device = "cpu") -> Tensor:
    """Return the (N, outputs) float32 of a network in eval mode, in the images' order, at full precision.

    Of several processes each computes its share, and all have the result.
    """
    accelerator = accelerator_on(torch.device(device))
    autocast = autocast_options("fp32", accelerator.device)
    return _outputs(network.to(accelerator.device), batches, accelerator, autocast)[0]


def _epoch_line(name: str, row: Mapping[str, object], score: str, *, best: bool) -> str:
    return (
        f"{name}  train loss {row['train_loss']:.4f} {score} {row[f'train_{score}']:.3f}  "
        f"val loss {row['val_loss']:.4f} {score} {row[f'val_{score}']:.3f}  "
        f"{row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s{'  best' if best else ''}"
    )
