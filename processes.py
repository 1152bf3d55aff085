"""One of several processes: `accelerate launch` starts them, each takes its share of every batch."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed import all_reduce

from batches import Share

Found = TypeVar("Found")


def accelerator_on(device: torch.device) -> Accelerator:
    """Return accelerate's view of this process: its device, and the others that were launched with it.

    Of several processes each has the GPU that its launcher gave it, or, where `device` is the CPU, the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        # The first Accelerator of a process would fix the device for all; a notebook may want another one.
        AcceleratorState._reset_state(reset_partial_state=True)
    # While the first process decodes 100,000 images the others wait for it: not ten minutes, as is usual.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # The precision is the study's and nothing is compiled, whatever the launcher's configuration says.
    plain = TorchDynamoPlugin(backend="no")
    return Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", dynamo_plugin=plain, kwargs_handlers=[patient]
    )


def share_of(accelerator: Accelerator) -> Share:
    """Return which part of every batch is this process's."""
    return Share(accelerator.process_index, accelerator.num_processes)


def from_main(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """Return, in all processes, what `find` returns in the main one; the others do not call it. A ValueError or
    OSError that it raises there is raised in all.
    """
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = find()
        except (ValueError, OSError) as raised:
            error = raised
    found, error = broadcast_object_list([found, error])
    if error is not None:
        raise error
    return found


def refuse_differences(accelerator: Accelerator, own: Mapping[str, object]) -> None:
    """Raise ValueError, in all processes, where one of them has `own` values other than the main one's."""
    everyone = gather_object([dict(own)])
    for key in own:
        values = list(dict.fromkeys(str(there[key]) for there in everyone))
        if len(values) > 1:
            raise ValueError(f"the processes differ in {key} ({', '.join(values)}): start all of them alike")


def summed(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the sum of all processes' tensors of one shape."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="sum")


def in_place(accelerator: Accelerator, values: Tensor, rows: list[slice], number: int) -> Tensor:
    """Return (number, …), the rows of all processes in their places: `values` are this one's, for `rows`.

    Each place is filled by one process and by no padding, so that nothing counts twice.
    """
    whole = values.new_zeros((number, *values.shape[1:]))
    start = 0
    for part in rows:
        length = part.stop - part.start
        whole[part] = values[start : start + length]
        start += length
    return summed(accelerator, whole)


class _Sum(torch.autograd.Function):
    """The sum over processes, which each uses for itself: so its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: object, values: Tensor) -> Tensor:
        whole = values.clone()
        all_reduce(whole)
        return whole

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        all_reduce(whole)
        return whole


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the mean and variance over all processes' shares of a batch.

    torch's own (`nn.SyncBatchNorm`) refuses the CPU. Mean and variance come from summed counts, sums and squared
    deviations, so that shares of unequal size weigh as many images as they have.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, C, H, W) normalised images; outside of training as `nn.BatchNorm2d` does."""
        if not self.training:
            return super().forward(images)
        axes = (0, 2, 3)
        # In half precision sums would overflow.
        here = images.to(torch.promote_types(images.dtype, torch.float32))
        number = here.new_tensor([float(here.numel() // here.shape[1])])
        sums = _Sum.apply(torch.cat([here.sum(axes), number]))
        mean, number = sums[:-1] / sums[-1], sums[-1].detach()
        centred = here - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(axes)) / number
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)


@contextmanager
def synchronised(network: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let the batch normalisations of a network look at all processes' images; afterwards as they were."""
    if accelerator.num_processes == 1:
        yield
        return
    kind = SynchronisedBatchNorm2d if accelerator.device.type == "cpu" else nn.SyncBatchNorm
    found = [module for module in network.modules() if type(module) is nn.BatchNorm2d]
    for module in found:
        # The same module, so that whoever holds it and its parameters still does.
        module.__class__, module.process_group = kind, None
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.BatchNorm2d
            del module.process_group
