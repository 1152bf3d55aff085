"""Is a map faithful to its network? Answers that need no lesion mask: only the network is asked.

Masks and boxes say whether a map lies where a radiologist would look (`localization`); a faithful map of a
network that looks elsewhere must not. Here: does the prediction hang on the pixels that the map names
(`deletion_insertion`, `masked_confidence`), and does the map hang on what the network has learnt
(`random_network`, `randomised`, `rank_correlation`, `verdict`)?

Throughout: images (N, 3, H, W), normalised, so that 0 is the mean; maps (N, H, W) at the images' size, each
scaled by its maximum to 0..1 or all zero; classes (N,) the class index that each map is for.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batch_norm_folding import add_batch_norm, fold_batch_norm
from networks import build_network
from trained_networks import ModelCard

Probabilities = Callable[[Tensor], Tensor]  # (N, 3, H, W) normalised images -> (N, C) in 0..1

BLOCKS = 14  # equal pixels come and go in squares of a 14th of the image's side, the patch of many networks
LEVELS = 2**16  # finer differences between map values are the rounding of upsampling, not an order
BLUR = 0.1  # sigma as a share of the image's shorter side: a lesion or a rib is no longer there
# Limits of the mean absolute rank correlation with the trained network's maps. The head makes the difference between
# the classes: where it is random and half of the ranks' variance (0.7²) is as before, the map shows what is in the
# image, not why it is this class.
HEAD_LIMIT = 0.7
# Nothing learnt is left. Some agreement stays even so: maps have few cells, are smooth, and every network sees the
# same edges; above this, a quarter of the ranks' variance (0.5²) is not the weights' doing.
ALL_LIMIT = 0.5
CHANGES = "changes with the weights"


class DeletionInsertion(NamedTuple):
    """(N,) float64 areas, 0..1: faithful maps have a small deletion and a large insertion."""

    deletion: np.ndarray
    insertion: np.ndarray


class MaskedConfidence(NamedTuple):
    """(N,) float64 probabilities of the class: of the `whole` image, and where only the map's part is `kept`.

    A map of ones keeps everything and has the best drop, 0 (Poppi et al. 2021, arXiv:2104.10252): these
    figures say something only beside a figure that punishes large maps, such as the deletion area.
    """

    whole: np.ndarray
    kept: np.ndarray

    @property
    def drop(self) -> np.ndarray:
        """(N,) max(0, whole - kept) / whole, 0..1; its mean is the Average Drop. 0 where whole is 0."""
        lost = np.maximum(self.whole - self.kept, 0)
        return np.divide(lost, self.whole, out=np.zeros_like(lost), where=self.whole > 0)

    @property
    def increase(self) -> np.ndarray:
        """(N,) 1.0 where kept > whole, else 0.0; its mean is the Increase in Confidence."""
        return (self.kept > self.whole).astype(np.float64)


class Randomised(NamedTuple):
    """A network whose modules from the last down to `lowest`, the `share` (0..1] of all those that have
    parameters, are random.
    """

    lowest: str
    share: float
    network: nn.Module


def deletion_insertion(
    probabilities: Probabilities,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    baseline: Tensor | None = None,
    steps: int = 16,
    batch_size: int = 32,
    seed: int = 0,
) -> DeletionInsertion:
    """Return the areas (trapezoid) under the class's probability over the share of pixels, 0..1, that are
    deleted or inserted, the most salient first, at `steps` + 1 points (Petsiuk et al. 2018, "RISE", BMVC,
    arXiv:1806.07421).

    Deletion sets pixels to those of the (N, 3, H, W) `baseline`, by default 0, the mean. Insertion brings them back
    into a copy blurred by a Gaussian, sigma a tenth of the image's shorter side. That is more than RISE's 5 of
    224 pixels, which leaves lesions visible.

    Equal pixels (in a uniform map, in the zeros of a rectified one) go block by block, in a random order that
    depends on `seed` and the image's position alone: all maps of the same images are compared in the same
    one. In reading order they would be a sweep from the top; one by one, a noise that networks react to.
    """
    maps, classes = _checked(images, maps, classes)
    if steps < 1:
        raise ValueError(f"steps {steps} must be 1 or more: 16 gives 17 points of the curve")
    pixels = maps[0].numel()
    counts = torch.arange(steps + 1, device=images.device) * pixels // steps
    with torch.inference_mode():
        ranks = _pixel_ranks(maps, seed)

        def area(before: Tensor, after: Tensor) -> np.ndarray:
            def inputs(jobs: Tensor) -> Tensor:
                image, step = jobs // len(counts), jobs % len(counts)
                changed = ranks[image] < counts[step, None, None]
                return torch.where(changed[:, None], after[image], before[image])

            each = classes.repeat_interleave(len(counts))
            curve = _confidence(probabilities, inputs, each, batch_size).reshape(len(maps), -1)
            return np.trapezoid(curve, counts.cpu().numpy() / pixels, axis=1)

        blank = images.new_zeros(()) if baseline is None else baseline.to(images)
        deletion = area(images, blank.expand_as(images))
        return DeletionInsertion(deletion, area(_blurred(images), images))


def masked_confidence(
    probabilities: Probabilities,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    baseline: Tensor | None = None,
    batch_size: int = 32,
) -> MaskedConfidence:
    """Return the class's probability for each image and for image · map + baseline · (1 - map), whose pixels fade
    to those of the (N, 3, H, W) `baseline`, by default 0, the mean, where the map does: for Average Drop and
    Increase in Confidence (Chattopadhay et al. 2018, "Grad-CAM++", WACV, arXiv:1710.11063, section 4.1).
    """
    maps, classes = _checked(images, maps, classes)
    with torch.inference_mode():
        whole = _confidence(probabilities, lambda jobs: images[jobs], classes, batch_size)

        def seen(jobs: Tensor) -> Tensor:
            weight = maps[jobs, None].to(images.dtype)
            blank = 0 if baseline is None else baseline[jobs].to(images) * (1 - weight)
            return images[jobs] * weight + blank

        kept = _confidence(probabilities, seen, classes, batch_size)
    return MaskedConfidence(whole, kept)


def random_network(card: ModelCard, images: Tensor, *, seed: int) -> nn.Module:
    """Return a network of the card's architecture and head with the random weights of `build_network`, in eval mode
    and on the images' device, that tells the (N, 3, H, W) normalised images apart.

    Each batch normalisation normalises by the statistics of these images, as it does by those of a batch when a
    training starts; a network without normalisation (VGG, LeNet) gets batch normalisation behind each convolution,
    folded into the weights. With running statistics of 0 and 1 activations would grow or shrink from block to block,
    to 2e4 in a ResNet-101 and 6e-14 in an EfficientNet-B0, and a VGG-16's Eigen-CAM of different X-rays would
    correlate at 0.99. No map of such a network is like the trained one's, whatever the method shows.

    The global random state stays as it is.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which reseeds every GPU too. On the CPU the draw is the same for any device.
        torch.default_generator.manual_seed(seed)
        network = build_network(
            card.architecture, card.outputs, dropout=card.dropout, hidden_units=card.hidden_units
        )
        bare = not any(isinstance(module, _BatchNorm | nn.LayerNorm) for module in network.modules())
        if bare:
            add_batch_norm(network)
        network.eval().to(images.device)
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        hooks = [norm.register_forward_pre_hook(_measure) for norm in norms]
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


def randomised(
    network: nn.Module, fresh: nn.Module, example: Tensor, *, stages: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> Iterator[Randomised]:
    """Yield copies of a network that are random from the top down to ever lower modules: the head alone (the
    last module with parameters), then each share in `stages` of the modules with parameters (cascading
    randomisation, Adebayo et al. 2018, "Sanity checks for saliency maps", NeurIPS, arXiv:1810.03292).

    Random are the weights and running statistics of `fresh`, a network of the same architecture that has learnt
    nothing (`random_network`). The order is that in which modules run on `example`, an input on the network's
    device; modules that do not run there come last. It is one copy, in eval mode, that each step makes more random:
    use it before the next. The network itself and the flags of frozen parameters stay as they are.
    """
    if not all(0 < share <= 1 for share in stages):
        raise ValueError(f"stages {tuple(stages)} must be shares of the modules, above 0 and up to 1")
    if _shapes(network) != _shapes(fresh):
        raise ValueError("the random network must have the names and shapes of the trained network's weights")
    with torch.inference_mode(False):  # inference tensors could not be explained later
        copy = deepcopy(network).eval()
    names = _top_down(copy, example)
    modules, sources = dict(copy.named_modules()), dict(fresh.named_modules())
    ends = sorted({1, *(max(1, round(share * len(names))) for share in stages)})
    for start, end in pairwise([0, *ends]):
        for name in names[start:end]:
            _take(modules[name], sources[name])
        yield Randomised(names[end - 1], end / len(names), copy.eval())


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}


def _take(module: nn.Module, source: nn.Module) -> None:
    """Copy the parameters and buffers that a module itself holds, not those of modules in it."""
    with torch.inference_mode(False), torch.no_grad():
        for own, new in (
            (module.named_parameters(recurse=False), source._parameters),
            (module.named_buffers(recurse=False), source._buffers),
        ):
            for name, values in own:
                values.copy_(new[name])


def rank_correlation(maps: Tensor | np.ndarray, others: Tensor | np.ndarray) -> np.ndarray:
    """Return (N,) Spearman correlations, -1..1, of two stacks of (N, h, w) maps, image by image; equal pixels
    get their mean rank.

    0 where one of the two is constant (all zero: no evidence), which agrees with nothing; 1 where both are,
    which is no change.
    """
    maps, others = (torch.as_tensor(stack).detach().cpu().double().numpy() for stack in (maps, others))
    if maps.ndim != 3 or maps.shape != others.shape:
        raise ValueError(f"maps {maps.shape} and {others.shape} must both be (N, h, w) at one resolution")
    stacks = [stack.reshape(len(stack), -1) for stack in (maps, others)]
    if not all(np.isfinite(stack).all() for stack in stacks):
        raise ValueError("maps must be finite: a map without evidence is all zeros")
    # To 1 part in a million, as rounding makes a constant map uneven.
    constant = [np.ptp(stack, axis=1) <= 1e-6 * np.abs(stack).max(axis=1) for stack in stacks]
    ranks = [rankdata(stack, axis=1) - (stack.shape[1] + 1) / 2 for stack in stacks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    products = (ranks[0] * ranks[1]).sum(axis=1)
    correlation = np.divide(products, norm, out=np.zeros(len(maps)), where=norm > 0)
    return np.where(constant[0] | constant[1], (constant[0] & constant[1]) * 1.0, correlation)


def verdict(after_head: tuple[float, float, float], after_all: tuple[float, float, float]) -> str:
    """Return what a method's agreement with its maps of the trained network says of it: the mean absolute rank
    correlation with its interval (estimate, low, high) after the head alone and after everything became random.

    Absolute, because a map turned into its negative shows the same places. A limit counts as passed, or not, where
    the whole interval lies on one side of it.
    """
    (_, head_low, head_high), (_, all_low, all_high) = after_head, after_all
    if head_low > HEAD_LIMIT:
        return "does not explain the decision"
    if all_low > ALL_LIMIT:
        return "does not explain the model"
    if head_high <= HEAD_LIMIT and all_high <= ALL_LIMIT:
        return CHANGES
    return "undecided"


def _pixel_ranks(maps: Tensor, seed: int) -> Tensor:
    """Return (N, H, W) ranks, 0 the most salient pixel's: by map value, then block, then place in it."""
    height, width = maps.shape[1:]
    side = max(1, min(height, width) // BLOCKS)
    rows, columns = np.arange(height) // side, np.arange(width) // side
    block = (rows[:, None] * (columns[-1] + 1) + columns).ravel()
    rng = np.random.default_rng(seed)
    # Drawn image by image: the first images' orders do not depend on how many follow.
    turns = np.stack([rng.permutation(block[-1] + 1) for _ in maps])
    by_block = torch.from_numpy(turns[:, block].argsort(axis=1, kind="stable")).to(maps.device)
    levels = (maps.flatten(1).float() * LEVELS).round().gather(1, by_block)
    order = by_block.gather(1, levels.argsort(dim=1, descending=True, stable=True))
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(maps.shape)


def _blurred(images: Tensor) -> Tensor:
    """Return the images under a Gaussian; at the edges its weights are those of the pixels that exist."""
    sigma = BLUR * min(images.shape[-2:])
    rows, columns = (
        (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(dim=1).to(images)
        for place in (torch.arange(size, dtype=torch.float64) for size in images.shape[-2:])
    )
    return rows @ images @ columns.T


def _confidence(
    probabilities: Probabilities, inputs: Callable[[Tensor], Tensor], classes: Tensor, batch_size: int
) -> np.ndarray:
    """Return (M,) probabilities of the M classes; `inputs` makes the images for a batch of 0..M-1."""
    last = int(classes.max())
    found = []
    for jobs in torch.arange(len(classes), device=classes.device).split(batch_size):
        values = probabilities(inputs(jobs))
        if values.ndim != 2 or len(values) != len(jobs) or values.shape[1] <= last:
            raise ValueError(
                f"probabilities must return ({len(jobs)}, C) with C > {last}, the greatest class asked for, "
                f"not {tuple(values.shape)}"
            )
        found.append(values.gather(1, classes[jobs, None])[:, 0].double().cpu())
    result = torch.cat(found).numpy()
    if not ((result >= 0) & (result <= 1 + 1e-6)).all():
        raise ValueError("probabilities must return 0..1: apply softmax or sigmoid to the logits")
    return result


def _checked(images: Tensor, maps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps and classes on the images' device, or say what does not fit."""
    maps, classes = (torch.as_tensor(given, device=images.device) for given in (maps, classes))
    if images.ndim != 4 or not len(images) or maps.shape != images.shape[:1] + images.shape[2:]:
        raise ValueError(
            f"maps {tuple(maps.shape)} must be (N, H, W) for images {tuple(images.shape)} of (N, 3, H, W): "
            "upsample the maps to the images"
        )
    if not ((maps >= 0) & (maps <= 1 + 1e-4)).all():
        raise ValueError("maps must lie in 0..1: keep the positive part and divide each by its maximum")
    if classes.shape != images.shape[:1] or classes.is_floating_point() or (classes < 0).any():
        raise ValueError(f"classes must be one index from 0 on for each of the {len(images)} images")
    return maps, classes.long()


def _top_down(network: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the modules that own parameters, the last to run first."""
    owners = {
        name: m for name, m in network.named_modules() if any(True for _ in m.parameters(recurse=False))
    }
    if not owners:
        raise ValueError("this network has no parameters: there is nothing to randomise")
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in owners.items()
    ]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys([*reversed(ran), *reversed(owners)]))
