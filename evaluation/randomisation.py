"""Test whether a map depends on what its network has learnt: how similar is it after the weights become random?

Cascading randomisation: Adebayo et al. 2018, "Sanity checks for saliency maps", NeurIPS, arXiv:1810.03292.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain, pairwise

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from architectures.batch_norm_folding import add_batch_norm, fold_batch_norm
from inference.trained_networks import ModelCard
from networks import build_network

STAGES = (0.25, 0.5, 0.75, 1.0)  # shares of the modules that are random, after the head alone
# Limits of the mean absolute rank correlation with the trained network's maps.
# The head makes the difference between the classes. If half of the ranks' variance (0.7²) remains when the head is
# random, the map shows what is in the image, not why it is this class.
HEAD_LIMIT = 0.7
# If all weights are random, some agreement remains: maps have few cells, are smooth, and every network sees the same
# edges. Above this limit, a quarter of the ranks' variance (0.5²) does not come from the weights.
ALL_LIMIT = 0.5


def random_network(card: ModelCard, images: Tensor, *, seed: int) -> nn.Module:
    """Return a network of the card's architecture and head with the random weights of `build_network`.

    Each batch normalisation uses the statistics of `images`, as it does with a batch at the start of a training. A
    network without normalisation (VGG, LeNet) gets batch normalisation behind each convolution, folded into the
    weights. Without this, activations grow or shrink from block to block (to 2e4 in a ResNet-101, to 6e-14 in an
    EfficientNet-B0), and a VGG-16's Eigen-CAMs of different X-rays correlate at 0.99. With any method, the maps of
    such a network differ from those of the trained network, so they would test nothing.

    Args:
        card: the card of the trained network.
        images: (N, 3, H, W), normalised.
        seed: fixes the weights; the global random state stays as it is.

    Returns:
        The network in eval mode, on the images' device. It tells the images apart.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every GPU. On the CPU the draw is the same for any device.
        torch.default_generator.manual_seed(seed)
        network = build_network(card.architecture, card.outputs, dropout=card.dropout, hidden_units=card.hidden_units)
        bare = not any(isinstance(module, _BatchNorm | nn.LayerNorm) for module in network.modules())
        if bare:
            add_batch_norm(network)
        network.eval().to(images.device)
        hooks = [m.register_forward_pre_hook(_measure) for m in network.modules() if isinstance(m, _BatchNorm)]
        network(images)
        for hook in hooks:
            hook.remove()
        if bare:
            fold_batch_norm(network)
        return network


def _measure(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
    """Set the running statistics of a batch normalisation to those of its input."""
    values = inputs[0].transpose(0, 1).flatten(1)
    norm.running_mean.copy_(values.mean(dim=1))
    norm.running_var.copy_(values.var(dim=1, correction=0))


def randomised(network: nn.Module, fresh: nn.Module, example: Tensor) -> Iterator[tuple[float, nn.Module]]:
    """Yield the share of random modules, and a copy of a network in which these modules are random.

    The first stage randomises only the head: the last module with parameters. Each later stage randomises one of the
    shares `STAGES` of the modules with parameters, from the last down. All stages yield the same copy, in eval mode.
    The next stage changes this copy, so use it before. The network itself does not change.

    Args:
        network: the trained network.
        fresh: a `random_network` of the same architecture, whose weights and running statistics are taken.
        example: (N, 3, H, W) input on the network's device. Modules are in the order in which they run on it; modules
            that do not run come last.
    """
    with torch.inference_mode(False):  # gradients cannot flow through inference tensors
        copy = deepcopy(network).eval()
    names = _top_down(copy, example)
    modules, sources = dict(copy.named_modules()), dict(fresh.named_modules())
    ends = sorted({1, *(max(1, round(share * len(names))) for share in STAGES)})
    for start, end in pairwise([0, *ends]):
        for name in names[start:end]:
            _take_values(modules[name], sources[name])
        yield end / len(names), copy


def _take_values(module: nn.Module, source: nn.Module) -> None:
    """Copy the parameters and buffers of a module, but not those of its submodules."""
    values = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    with torch.inference_mode(False), torch.no_grad():
        for name, value in values:
            value.copy_(getattr(source, name))


def _top_down(network: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the modules that hold parameters, the last to run first."""
    holders = {name: module for name, module in network.named_modules() if [*module.parameters(recurse=False)]}
    ran: list[str] = []
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, part in holders.items()]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys([*reversed(ran), *reversed(holders)]))


def rank_correlation(maps: Tensor, others: Tensor) -> np.ndarray:
    """Return (N,) Spearman correlations, -1..1, of two stacks of (N, h, w) maps, image by image.

    Equal pixels get their mean rank. The correlation is 0 where one of the two maps is constant (all zero: no
    evidence), and 1 where both are, because nothing changed.
    """
    stacks = [stack.flatten(1).cpu().double().numpy() for stack in (maps, others)]
    # A tolerance of 1 part in a million, because rounding makes a constant map uneven.
    constant = [np.ptp(stack, axis=1) <= 1e-6 * np.abs(stack).max(axis=1) for stack in stacks]
    ranks = [rankdata(stack, axis=1) - (stack.shape[1] + 1) / 2 for stack in stacks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    products = (ranks[0] * ranks[1]).sum(axis=1)
    correlation = np.divide(products, norm, out=np.zeros(len(maps)), where=norm > 0)
    return np.where(constant[0] | constant[1], (constant[0] & constant[1]) * 1.0, correlation)


def verdict(after_head: tuple[float, float, float], after_all: tuple[float, float, float]) -> str:
    """Return the verdict on a method, from the agreement of its maps before and after the weights become random.

    If an interval lies on both sides of a limit, that limit gives no verdict.

    Args:
        after_head: mean absolute rank correlation with its interval (estimate, low, high) after the head became
            random. It is absolute because the negative of a map shows the same places.
        after_all: the same after all weights became random.
    """
    (_, head_low, head_high), (_, all_low, all_high) = after_head, after_all
    if head_low > HEAD_LIMIT:
        return "does not explain the decision"
    if all_low > ALL_LIMIT:
        return "does not explain the model"
    if head_high <= HEAD_LIMIT and all_high <= ALL_LIMIT:
        return "changes with the weights"
    return "undecided"
