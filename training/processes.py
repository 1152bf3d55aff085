"""Processes that train together: `accelerate launch` starts them, and each takes its share of every batch."""

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from training.batches import WHOLE, Share


def accelerator_on(device: torch.device) -> PartialState:
    """Return accelerate's state of this process: its device, its number, and how many processes there are.

    If several processes were launched, each has the GPU that the launcher gave it, or the CPU if `device` is the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        # Otherwise the first state fixes the device for the whole program; a notebook may want another one later.
        PartialState._reset_state()
    # The others wait while the main process decodes images: 100,000 may take longer than the default ten minutes.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))


def from_main(accelerator: PartialState, function: Callable[[], object]) -> object:
    """Call `function` in the main process only; return its result in all processes.

    Raises:
        ValueError, OSError: in all processes, where `function` raises it.
    """
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def refuse_differences(accelerator: PartialState, values: Mapping[str, object]) -> None:
    """Raise ValueError in all processes if they differ in one of the `values`."""
    values_of_all = gather_object([dict(values)])
    for key in values:
        different = list(dict.fromkeys(str(each[key]) for each in values_of_all))
        if len(different) > 1:
            raise ValueError(f"the processes differ in {key} ({', '.join(different)}): start all of them alike")


def put_rows(tensors: dict[str, Tensor], number: int, places: slice, **values: Tensor) -> None:
    """Write this process's rows to their places in tensors that start as zeros.

    The sum of such a tensor over all processes then has the rows of all processes.

    Args:
        tensors: the tensors by name; a missing one is made.
        number: the number of rows of a tensor.
        places: the places of the b rows, b ≥ 0.
        values: (b, …) rows for each tensor.
    """
    for name, rows in values.items():
        if name not in tensors:
            tensors[name] = rows.new_zeros(number, *rows.shape[1:])
        tensors[name][places] = rows


class Processes:
    """The processes that were launched together: how they share batches, add tensors and agree.

    Attributes:
        device: the device of this process.
        is_main: whether this process prints and writes.
        share: the part of every batch that this process computes.
        several: whether there is more than one process.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        """Find the processes. With `alone`, this process works by itself, and the others need not take part."""
        self.device, self.is_main, self.share = device, True, WHOLE
        if not alone:
            state = accelerator_on(device)
            self.device, self.is_main = state.device, state.is_main_process
            self.share = Share(state.process_index, state.num_processes)
        self.several = self.share.of > 1

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes; they have the same shape."""
        return reduce(values, reduction="sum") if self.several else values

    def gathered(self, values: Tensor) -> Tensor:
        """Return (processes, …): the tensor of each process."""
        return gather(values[None]) if self.several else values[None]

    def agreed(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the main process wants to save."""
        if self.several:
            flags = torch.tensor([float(stop), float(save and self.is_main)], device=self.device)
            stop, save = (bool(value) for value in self.summed(flags))
        return stop, save

    def say(self, text: str) -> None:
        """Print a line above any progress bar, in the main process only."""
        if self.is_main:
            tqdm.write(text)

    def bar(self, batches: Iterable, title: str, number: int, *, initial: int = 0) -> tqdm:
        """Return a progress bar over `number` batches. Only the main process shows it, and only on a terminal."""
        return tqdm(batches, title, number, leave=False, disable=None if self.is_main else True, initial=initial)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of all processes the values of the main process, in place."""
        if self.several:
            broadcast(list(tensors))


def synchronise_batch_norms(network: nn.Module, processes: Processes) -> None:
    """Let batch normalisation use the images of all processes, in place. torch can do that on GPUs only."""
    if processes.several and processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif processes.several and any(isinstance(module, _BatchNorm) for module in network.modules()):
        processes.say("batch normalisation: on CPUs each process normalises its own share of a batch")
