"""The state of a training on disk, `resume/` in its run folder: enough to go on as if nothing had happened."""

import json
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import write_whole

STATE, SETTINGS = "state.pt", "settings.json"
ANEW = "start anew with --restart, or delete that folder"


class NotSaved(OSError):
    """The state of a training could not be saved; the one before it is kept."""


class Checkpoints:
    """The unfinished state of a training in a folder, whole at any moment: files get their names when they are
    complete and on the disk.

    `settings` says what is being trained; a state that is there must have the same.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder, self.settings = Path(folder), dict(settings)
        self._best_saved = 0

    def saved(self) -> dict[str, object] | None:
        """Return what was last given to `save`, or None.

        Raises ValueError where it is of other settings or damaged, with what to do.
        """
        if not self.fits():
            return None
        file = self.folder / STATE
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            best = self.folder / f"best_{state['best_epoch']}.safetensors"
            state["best_state"] = load_file(best) if state["best_epoch"] else {}
        except Exception as error:  # torch and safetensors have many types for a damaged file
            raise ValueError(
                f"{self.folder} holds no state that can be read ({str(error).splitlines()[0]}): {ANEW}"
            ) from None
        self._best_saved = state["best_epoch"]
        return state

    def fits(self) -> bool:
        """Return whether there is a state to go on from. Raises ValueError where it is of other settings."""
        if not (self.folder / STATE).is_file():
            return False
        try:
            settings = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} holds no state that can be read ({error}): {ANEW}") from None
        own = json.loads(json.dumps(self.settings))
        if not own.keys() <= settings.keys():
            raise ValueError(f"{self.folder} holds an unfinished training of another version: {ANEW}")
        other = [key for key, value in own.items() if settings[key] != value]
        if other == ["data"]:
            raise ValueError(
                f"{self.folder} holds an unfinished training on other images: their content, their labels or their "
                f"splits have changed since. Put them back, or {ANEW}"
            )
        if other:
            key = next(key for key in other if key != "data")  # another seed or limit gives other data
            was, now = (json.dumps(values[key], ensure_ascii=False) for values in (settings, own))
            raise ValueError(
                f"{self.folder} holds an unfinished training with other settings ({key} = {was}, now {now}): go "
                f"on with those, or {ANEW}"
            )
        return True

    def save(self, state: Mapping[str, object]) -> None:
        """Keep a state: numbers, texts, tensors, and lists and dictionaries of these; `best_state`, the tensors of
        `best_epoch`, goes into a file of its own, written once.

        Raises NotSaved where there is no room; the state before this one is kept then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        best, new = state["best_epoch"], state["best_epoch"] != self._best_saved
        file = self.folder / f"best_{best}.safetensors"
        try:
            if new:
                write_whole(file, partial(save_file, state["best_state"]))
            write_whole(self.folder / SETTINGS, json.dumps(self.settings))
            rest = {key: value for key, value in state.items() if key != "best_state"}
            write_whole(self.folder / STATE, partial(_save_state, rest))
        except (OSError, RuntimeError, SafetensorError) as error:
            if new:
                file.unlink(missing_ok=True)
            reason = _reason(error)
            if reason is None:
                raise
            kept = "the last state is kept there" if (self.folder / STATE).is_file() else "there is none yet"
            raise NotSaved(
                f"cannot save the training's state in {self.folder} ({reason}); {kept}: make room and run the "
                "same again"
            ) from None
        self._best_saved = best
        for old in set(self.folder.glob("best_*.safetensors")) - {file}:
            old.unlink(missing_ok=True)


def _save_state(state: Mapping[str, object], path: Path) -> None:
    with path.open("wb") as stream:  # given a path, torch's own writer hides why a disk refuses
        torch.save(state, stream)


def _reason(error: BaseException | None) -> str | None:
    """Return what the system said: torch's writer wraps it in a RuntimeError, safetensors' tells it as text."""
    if isinstance(error, SafetensorError):
        return str(error)
    while error is not None and not getattr(error, "strerror", None):
        error = error.__cause__ or error.__context__
    return getattr(error, "strerror", None)


def random_states() -> dict[str, object]:
    """Return the states of the global generators of torch (on the CPU), NumPy and Python."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy one is what others use
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *(float(value) for value in rest)],
        "python": [version, list(numbers), gauss],
    }


def device_random_state(device: torch.device) -> Tensor | None:
    """Return the state of a GPU's generator, None for another device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    """Put the global generators back into the states that `random_states` returned, and the device's, which is
    `states["device"]`, into what `device_random_state` returned.
    """
    torch.set_rng_state(states["torch"])
    if states.get("device") is not None:
        torch.cuda.set_rng_state(states["device"], device)
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))  # noqa: NPY002
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, in memory order, of a network's tensors, as safetensors files hold them."""
    plain = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return {key: tensor.detach().to(**plain) for key, tensor in state.items()}
