"""The state of a training, and how it is saved and loaded (`resume/` in the run folder)."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from training.optimisation import Optimisation
from training.processes import Processes
from utils import derived_seed, write_whole

STATE = "state.pt"
ANEW = "start anew with --restart, or delete that folder"
SAME_KEY_PRESS = 3.0  # seconds; a second Ctrl-C within this time counts as the same key press


class Checkpoints:
    """The folder with the state of an unfinished training. The file in it is complete at any moment.

    Args:
        folder: where the state is kept.
        settings: the settings of the training, in types that JSON has. A state with other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder, self.settings = folder, settings
        self._saved_at, self._saving_took = time.perf_counter(), 0.0

    def due(self, every: float | None) -> bool:
        """Return whether the last save is at least `every` seconds ago.

        None stands for the interval at which saving takes 5 % of the time.
        """
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
            before, now = json.loads(state.get("settings", "{}")), json.loads(json.dumps(self.settings))
        except Exception as error:  # torch has many types for a damaged file
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.folder} holds no state that can be read ({reason}): {ANEW}") from None
        different = [key for key in now if before.get(key, now) != now[key]]
        if not different:
            return state
        key = min(different, key=lambda key: key == "data")  # another seed changes the data too; then name the seed
        if not now.keys() <= before.keys():
            difference = "of another version:"
        elif key == "data":
            difference = "on other images: their content, their labels or their splits have changed. Put them back, or"
        else:
            was, is_now = (json.dumps(settings[key], ensure_ascii=False) for settings in (before, now))
            difference = f"with other settings ({key} = {was}, now {is_now}): go on with those, or"
        raise ValueError(f"{self.folder} holds an unfinished training {difference} {ANEW}")

    def save(self, state: Mapping[str, object]) -> None:
        """Save a state: numbers, texts, tensors, and lists and dictionaries of these.

        Raises:
            OSError: the disk has no room; the state before this one is still there.
        """

        def write(path: Path) -> None:
            with path.open("wb") as stream:  # given a path, torch hides the system's error
                torch.save({**state, "settings": json.dumps(self.settings)}, stream)

        started = time.perf_counter()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / STATE, write)
        except (OSError, RuntimeError) as error:
            # torch may raise a RuntimeError during the handling of the system's error.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            last = "the last state is kept there" if self.exists else "there is none yet"
            raise OSError(
                f"cannot save the training's state in {self.folder} ({reason.strerror}); {last}: make room and run "
                "the same again"
            ) from None
        self._saved_at, self._saving_took = time.perf_counter(), time.perf_counter() - started


@dataclass
class Progress:
    """How far a training has come. An epoch's value is its validation result; lower is better.

    Attributes:
        phase, epoch: the present phase and epoch, from 1; each phase counts its own epochs.
        step: the number of finished batches of the present epoch.
        phase_best: the best value of the phase.
        waited: the number of epochs since that best value.
        best_epoch, best_value: the best epoch of all phases (from 1; 0 before there is one) and its value.
        seconds: the time that the present epoch took before the training was interrupted.
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
        checkpoints: where the state is saved; None saves nothing.
        progress: how far the training has come.
        epoch_outputs: the outputs, targets and losses of the present epoch so far.
    """

    def __init__(self, network: nn.Module, processes: Processes, checkpoints: Checkpoints | None) -> None:
        self.network, self.processes, self.checkpoints = network, processes, checkpoints
        self.progress = Progress()
        self.epoch_outputs: dict[str, Tensor] = {}
        self._best_weights: dict[str, Tensor] = {}  # on the CPU; empty before the first epoch is done
        self._started = time.perf_counter()  # when this process began or resumed the present epoch
        self._resumed: dict[str, object] | None = None  # the loaded state, until `resume_phase` has used it

    def resume(self) -> bool:
        """Load the state that was saved last; return whether there is one."""
        state = None if self.checkpoints is None else self.checkpoints.saved()
        number_with_state = self.processes.summed(torch.tensor(float(state is not None), device=self.processes.device))
        if 0 < number_with_state < self.processes.share.of:
            raise ValueError(f"{self.checkpoints.folder} must be on a disk that all machines share")
        if state is not None:
            self.network.load_state_dict(state["network"])
            self._best_weights, self.progress = state["best_weights"], Progress(**state["place"])
        elif index := self.processes.share.index:  # each process draws its own dropout
            torch.manual_seed(derived_seed(torch.initial_seed(), "dropout", index))
        self._resumed = state
        return state is not None

    def resume_phase(self, optimisation: Optimisation) -> None:
        """Load the optimiser, the outputs of the epoch and the random numbers of an interrupted phase."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        if state["optimisation"] is not None:
            optimisation.load_state_dict(state["optimisation"])
        for key, values in state["outputs"].items():
            # The saved rows are those of all processes. Rows are summed later, so only the main process keeps them.
            rows = values.to(self.processes.device)
            self.epoch_outputs[key] = rows if self.processes.is_main else rows.zero_()
        # Clones, because torch would read the first row for every process.
        random = {key: rows[self.processes.share.index].clone() for key, rows in state["random"].items()}
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.processes.device)

    def save(self, optimisation: Optimisation | None) -> None:
        """Save everything that is needed to go on; `optimisation` is None between two phases."""
        if self._resumed is not None:
            return  # nothing has been trained since the state was loaded
        processes = self.processes
        random = {"cpu": torch.get_rng_state()}  # dropout draws from it
        if processes.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(processes.device)
        random = {key: processes.gathered(state.to(processes.device)).cpu() for key, state in random.items()}
        state = {
            "place": asdict(self.progress) | {"seconds": self._seconds},
            "best_weights": self._best_weights,
            "network": self.network.state_dict(),
            "optimisation": optimisation and optimisation.state_dict(),
            "outputs": {key: processes.summed(tensor) for key, tensor in self.epoch_outputs.items()},
            "random": random,
        }
        if processes.is_main:
            self.checkpoints.save(state)

    @property
    def _seconds(self) -> float:
        """The seconds of the present epoch so far, with those before an interruption."""
        return self.progress.seconds + time.perf_counter() - self._started

    def restore_best(self) -> None:
        """Give the network its best weights so far, if there are any."""
        if self._best_weights:
            self.network.load_state_dict(self._best_weights)

    def record(self, row: dict[str, float], value: float, images_per_second: float) -> None:
        """Add a finished epoch to the history; keep its weights if its `value` is the lowest so far."""
        progress = self.progress
        progress.rows.append(row)
        progress.times.append({"epoch": row["epoch"], "seconds": self._seconds, "images_per_second": images_per_second})
        progress.step, progress.seconds, self._started = 0, 0.0, time.perf_counter()
        self.epoch_outputs = {}
        if value < progress.best_value or not progress.best_epoch:
            progress.best_epoch, progress.best_value = len(progress.rows), value
            self._best_weights = on_cpu(self.network.state_dict())
        progress.waited = 0 if value < progress.phase_best else progress.waited + 1
        progress.phase_best = min(value, progress.phase_best)


class StopRequests:
    """Turns Ctrl-C and SIGTERM into requests to stop after the present batch. A later Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked, self._asked_at = False, 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take these signals as requests inside the block; restore their old handlers at its end."""
        is_main_thread = threading.current_thread() is threading.main_thread()  # Python sets signal handlers in it only
        signals = (signal.SIGINT, signal.SIGTERM) if is_main_thread else ()
        # Keep signals ignored that were ignored before (nohup, background jobs).
        listened = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._ask) for number in listened}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()
            print("stopping after this batch; press Ctrl-C again after a few seconds to stop at once", file=sys.stderr)
        # accelerate's launcher forwards Ctrl-C, so one key press arrives twice.
        elif number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_KEY_PRESS:
            raise KeyboardInterrupt


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies of a network's tensors on the CPU, as safetensors files need them."""
    order = torch.contiguous_format
    return {key: tensor.detach().to("cpu", copy=True, memory_format=order) for key, tensor in state.items()}
