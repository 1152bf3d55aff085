"""How a network learns from a batch: the module, its optimiser and its learning-rate schedule."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from studies.settings import Phase, Training
from training.batches import Batch
from training.devices import autocast_options, in_order
from training.objectives import Objective
from training.processes import Processes

OPTIMISERS = {"adam": torch.optim.Adam, "sgd": partial(torch.optim.SGD, momentum=0.9)}


@dataclass(frozen=True)
class Setup:
    """What is trained, for which objective and on which device; `loss_weights` are on the device of `processes`."""

    network: nn.Module
    training: Training
    objective: Objective
    loss_weights: Tensor | None
    processes: Processes
    title: str

    @property
    def autocast(self) -> dict[str, object]:
        """The arguments of `torch.autocast` for the precision of the study."""
        return autocast_options(self.training.precision, self.processes.device)


class Optimisation:
    """A module that learns in one phase of a training, with its optimiser and its schedule.

    Args:
        setup: what is trained.
        module: the whole network, or its head where the head learns from features.
        phase: the phase of the training.
        batches: the number of batches in an epoch.
    """

    def __init__(self, setup: Setup, module: nn.Module, phase: Phase, batches: int) -> None:
        self.setup, self.module = setup, module
        self._model = DistributedDataParallel(module) if setup.processes.several else module
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = OPTIMISERS[setup.training.optimizer](learning, lr=phase.learning_rate, fused=True)
        self._schedule = _schedule(self.optimizer, setup.training, phase, batches)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Learn from this process's share of a batch.

        Returns:
            The outputs (b, …) and the loss (), both detached. The mean of the losses of all processes is the loss of
            the whole batch.
        """
        objective, weights, processes = self.setup.objective, self.setup.loss_weights, self.setup.processes
        with torch.autocast(**self.setup.autocast):
            outputs = self._model(in_order(batch.images))
        loss = objective.loss(outputs.float(), batch.targets, weights)
        if processes.several:
            # DistributedDataParallel averages the gradients of the processes. Their shares may differ in size.
            size = objective.size(batch.targets, weights).to(processes.device)
            loss = loss * size / processes.summed(size) * processes.share.of
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if not isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step()
        return outputs.detach().float(), loss.detach()

    def end_epoch(self, value: float) -> None:
        """Tell the schedule the result of the epoch in validation; a lower `value` is better."""
        if isinstance(self._schedule, ReduceLROnPlateau):
            self._schedule.step(value)

    def state_dict(self) -> dict[str, object]:
        """Return the state of the optimiser and the schedule, for `load_state_dict`."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from the state of an optimisation with the same settings."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])


def _schedule(optimizer: torch.optim.Optimizer, training: Training, phase: Phase, batches: int) -> LRScheduler:
    """Return the schedule of the learning rate: "constant", "one_cycle" (by batch) or "plateau" (by epoch).

    - "one_cycle" rises to the learning rate over the first 30 % of the steps, then falls almost to 0 (Smith & Topin
      2018).
    - "plateau" divides the rate by ten when validation has not got better for `plateau_patience` epochs.
    """
    if training.schedule == "one_cycle":
        # By default the momentum (for Adam its first beta) would be cycled too.
        steps = phase.epochs * batches
        return OneCycleLR(optimizer, max_lr=phase.learning_rate, total_steps=steps, cycle_momentum=False)
    if training.schedule == "plateau":
        # torch waits one epoch longer than `patience`. The threshold is absolute, because a relative one has the
        # wrong sign for a negative value (the AUC).
        patience = training.plateau_patience - 1
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, threshold=0, threshold_mode="abs")
    return ConstantLR(optimizer, factor=1.0)
