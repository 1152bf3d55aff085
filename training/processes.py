"""The processes that train together: `accelerate launch` starts them, each takes its share of every batch."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather, gather_object, reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from training.batches import WHOLE, Share

Result = TypeVar("Result")


def accelerator_on(device: torch.device) -> PartialState:
    """Return accelerate's view of this process: its device, and the processes that were launched with it.

    Each of several processes has the GPU that its launcher gave it, or, where `device` is the CPU, the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        # The first state would fix the device for the whole program; a notebook may want another one later.
        PartialState._reset_state()
    # The other processes wait while the main one decodes 100,000 images: longer than the default of ten minutes.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))


def from_main(accelerator: PartialState, function: Callable[[], Result]) -> Result:
    """Return, in all processes, what `function` returns in the main process, which alone calls it.

    Raises:
        ValueError, OSError: in all processes, where `function` raises it in the main one.
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
    """Raise ValueError, in all processes, where `values` are not the same in all of them."""
    everyone = gather_object([dict(values)])
    for key in values:
        different = list(dict.fromkeys(str(each[key]) for each in everyone))
        if len(different) > 1:
            raise ValueError(f"the processes differ in {key} ({', '.join(different)}): start all of them alike")


@dataclass
class SharedRows:
    """A tensor of `number` rows that the processes fill together: the rows of other processes are 0 in this one."""

    number: int
    tensor: Tensor | None = None

    def put(self, places: slice, rows: Tensor) -> None:
        """Write (b, …) rows, b ≥ 0, into their places."""
        if self.tensor is None:
            self.tensor = rows.new_zeros(self.number, *rows.shape[1:])
        self.tensor[places] = rows


class Processes:
    """The processes that were launched together: what they add up and agree on.

    Attributes:
        device: the device of this process.
        is_main: whether this process is the one that prints and writes.
        share: which part of every batch this process computes.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        """Find the processes. `alone` leaves out all but this one, so the other ones need not take part."""
        self.device, self.is_main, self.share = device, True, WHOLE
        if not alone:
            state = accelerator_on(device)
            self.device, self.is_main = state.device, state.is_main_process
            self.share = Share(state.process_index, state.num_processes)

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.share.of > 1

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, which have one shape."""
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
        """Print a line, in the main process only, above any progress bar."""
        if self.is_main:
            tqdm.write(text)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of all processes, in place, the values of the main process."""
        if self.several:
            broadcast(list(tensors))


def synchronise_batch_norms(network: nn.Module, processes: Processes) -> None:
    """Let the batch normalisations of a network see all images of a batch. torch can do that on GPUs only."""
    if processes.several and processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif processes.several and any(isinstance(module, _BatchNorm) for module in network.modules()):
        processes.say("batch normalisation: on CPUs each process normalises its own share of a batch")
