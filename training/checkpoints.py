"""The state of a training: what it is, and how it gets to the disk and back (`resume/` in the run folder)."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from training.optimisation import Optimisation
from training.processes import Processes, SharedRows
from utils import derived_seed, write_whole

STATE = "state.pt"
ANEW = "start anew with --restart, or delete that folder"
PATIENCE = 3.0  # seconds after the first Ctrl-C within which a second one counts as the same


class NotSaved(OSError):
    """The state of a training could not be saved; the state before it is still there."""


class Checkpoints:
    """The folder with the unfinished state of a training, a file that is complete at any moment.

    Args:
        folder: where the state is kept.
        settings: what is trained, as JSON has it; a state of other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder, self.settings = Path(folder), dict(settings)
        self._saved_at, self._saving_took = time.perf_counter(), 0.0

    def due(self, every: float | None) -> bool:
        """Return whether the last state is `every` seconds old; None: so old that saving takes 5 % of the time."""
        every = 20 * self._saving_took if every is None else every
        return time.perf_counter() - self._saved_at >= every

    @property
    def exists(self) -> bool:
        """Whether a state is in the folder."""
        return (self.folder / STATE).is_file()

    def saved(self) -> dict[str, object] | None:
        """Return the state that was saved last, or None.

        Raises:
            ValueError: the state has other settings or is damaged; the message says what to do.
        """
        if not self.exists:
            return None
        try:
            state = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
            before, now = json.loads(state["settings"]), json.loads(json.dumps(self.settings))
        except Exception as error:  # torch has many types for a damaged file
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.folder} holds no state that can be read ({reason}): {ANEW}") from None
        # Another seed or limit gives other data too: these come first.
        different = sorted((key for key in now if before.get(key, now) != now[key]), key=lambda key: key == "data")
        if not different:
            return state
        key, unfinished = different[0], f"{self.folder} holds an unfinished training"
        if not now.keys() <= before.keys():
            raise ValueError(f"{unfinished} of another version: {ANEW}")
        if key == "data":
            raise ValueError(
                f"{unfinished} on other images: their content, their labels or their splits have changed since. "
                f"Put them back, or {ANEW}"
            )
        was, is_now = (json.dumps(settings[key], ensure_ascii=False) for settings in (before, now))
        raise ValueError(f"{unfinished} with other settings ({key} = {was}, now {is_now}): go on with those, or {ANEW}")

    def save(self, state: Mapping[str, object]) -> None:
        """Save a state: numbers, texts, tensors, and lists and dictionaries of these.

        Raises:
            NotSaved: the disk has no room; the state before this one is still there.
        """
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            whole = {**state, "settings": json.dumps(self.settings)}
            write_whole(self.folder / STATE, partial(_save_state, whole))
        except (OSError, RuntimeError) as error:
            reason = error  # torch's writer wraps the system's error in a RuntimeError
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__cause__ or reason.__context__
            if reason is None:
                raise
            last = "the last state is kept there" if self.exists else "there is none yet"
            raise NotSaved(
                f"cannot save the training's state in {self.folder} ({reason.strerror}); {last}: make room and run "
                "the same again"
            ) from None
        self._saved_at, self._saving_took = time.perf_counter(), time.perf_counter() - started


def _save_state(state: Mapping[str, object], path: Path) -> None:
    with path.open("wb") as stream:  # given a path, torch's own writer hides why a disk refuses
        torch.save(state, stream)


@dataclass
class Progress:
    """How far a training has come. Values are those by which validation judges, the lower the better.

    Attributes:
        phase, epoch: the present phase and epoch, from 1; epochs are counted in each phase.
        step: how many batches of the present epoch are done.
        phase_best: the best value of the phase.
        waited: how many epochs have passed since.
        best_epoch, best_value: the best epoch of all phases (from 1; 0 before there is one) and its value.
        seconds: how long the present epoch took before the training was broken off.
        rate: the learning rate at the start of the present epoch.
        rows, times: the history and the timing of the finished epochs.
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


class TrainingState:
    """What a training has reached: its progress, its best weights, and the outputs of the present epoch.

    Attributes:
        checkpoints: where the state is saved, None for nowhere.
        progress: how far the training has come.
        best_weights: the weights of the best epoch, on the CPU; empty before the first epoch is done.
        epoch_outputs: the outputs, targets and losses of the present epoch so far.
        started: when this process took up the present epoch (`time.perf_counter`).
    """

    def __init__(self, network: nn.Module, processes: Processes, checkpoints: Checkpoints | None) -> None:
        self.network, self.processes, self.checkpoints = network, processes, checkpoints
        self.progress, self.best_weights = Progress(), {}
        self.epoch_outputs: dict[str, SharedRows] = {}
        self.started = time.perf_counter()
        self._resumed: dict[str, object] | None = None

    def resume(self) -> Progress | None:
        """Go back to the state that was saved last and return its progress, None where there is no state."""
        state = None if self.checkpoints is None else self.checkpoints.saved()
        found = torch.tensor(float(state is not None), device=self.processes.device)
        if 0 < float(self.processes.summed(found)) < self.processes.share.of:
            raise ValueError(f"{self.checkpoints.folder} must be on a disk that all machines share")
        if state is None:
            if index := self.processes.share.index:  # each process draws its own dropout
                torch.manual_seed(derived_seed(torch.initial_seed(), "dropout", index))
            return None
        self.network.load_state_dict(state["network"])
        self.best_weights, self.progress = state["best_weights"], Progress(**state["place"])
        self._resumed = state
        return self.progress

    def resume_phase(self, optimisation: Optimisation) -> None:
        """Give a phase that was broken off its optimiser, the outputs of its epoch and its random numbers back."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        if state["optimisation"] is not None:
            optimisation.load_state_dict(state["optimisation"])
        for key, values in state["outputs"].items():
            # The main process has the rows of all processes so far.
            rows = values.to(self.processes.device)
            self.epoch_outputs[key] = SharedRows(len(rows), rows if self.processes.is_main else rows.zero_())
        # Clones: torch reads a generator's state from the start of the whole tensor, wherever the row is.
        random = {key: rows[self.processes.share.index].clone() for key, rows in state["random"].items()}
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.processes.device)

    def save(self, optimisation: Optimisation | None) -> None:
        """Save everything that is needed to go on; `optimisation` is None between two phases."""
        if self._resumed is not None:
            return  # The phase of the state on the disk has not started again, so that state is still right.
        processes = self.processes
        random = {"cpu": torch.get_rng_state()}  # what dropout draws from
        if processes.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(processes.device)
        random = {key: processes.gathered(state.to(processes.device)).cpu() for key, state in random.items()}
        begun = {key: rows.tensor for key, rows in self.epoch_outputs.items() if rows.tensor is not None}
        outputs = {key: processes.summed(tensor) for key, tensor in begun.items()}
        if processes.is_main:
            self.checkpoints.save(
                {
                    "place": asdict(self.progress) | {"seconds": self.seconds},
                    "best_weights": self.best_weights,
                    "network": self.network.state_dict(),
                    "optimisation": optimisation and optimisation.state_dict(),
                    "outputs": outputs,
                    "random": random,
                }
            )

    @property
    def seconds(self) -> float:
        """The seconds that have gone into the present epoch, those before a break included."""
        return self.progress.seconds + time.perf_counter() - self.started

    def restore_best(self) -> None:
        """Go back to the best weights so far, if there are any."""
        if self.best_weights:
            self.network.load_state_dict(self.best_weights)

    def record(self, row: dict[str, float], value: float, images_per_second: float) -> None:
        """Add a finished epoch to the history, and keep its weights if its `value` is the lowest so far."""
        progress = self.progress
        progress.rows.append(row)
        progress.times.append({"epoch": row["epoch"], "seconds": self.seconds, "images_per_second": images_per_second})
        progress.step, progress.seconds, self.started = 0, 0.0, time.perf_counter()
        self.epoch_outputs = {}
        if value < progress.best_value or not progress.best_epoch:
            progress.best_epoch, progress.best_value = len(progress.rows), value
            self.best_weights = on_cpu(self.network.state_dict())
        progress.waited = 0 if value < progress.phase_best else progress.waited + 1
        progress.phase_best = min(value, progress.phase_best)

    def start_next_phase(self) -> None:
        """Go on to the first epoch of the next phase."""
        progress = self.progress
        progress.phase, progress.epoch = progress.phase + 1, 1
        progress.phase_best, progress.waited = math.inf, 0


class StopRequests:
    """Ctrl-C and SIGTERM as requests to stop after the present batch; a later Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked, self._asked_at = False, 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear the signals; afterwards they do what they did before."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            for number in (signal.SIGINT, signal.SIGTERM):
                # Keep signals ignored that were ignored before (nohup, background jobs).
                if signal.getsignal(number) is not signal.SIG_IGN:
                    handlers[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        # accelerate's launcher forwards Ctrl-C, so one key press arrives twice.
        if self.asked and time.monotonic() - self._asked_at > PATIENCE and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()
            print("stopping after this batch; once more, in a while, to stop at once", file=sys.stderr)


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of a network's tensors, contiguous on the CPU, as safetensors files hold them."""
    plain = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return {key: tensor.detach().to(**plain) for key, tensor in state.items()}
