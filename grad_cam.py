"""Gradient-weighted class activation maps (Selvaraju et al. 2017, ICCV, arXiv:1610.02391)."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import class_logits
from trained_networks import TrainedNetwork, ensemble_card

Classes = Literal["top", "all"] | int | Tensor | np.ndarray | list[int] | tuple[int, ...]

COLORMAPS = {
    name.removeprefix("COLORMAP_").lower(): value
    for name, value in vars(cv2).items()
    if name.startswith("COLORMAP_")
}


@dataclass(frozen=True)
class CamMaps:
    """Maps of N images for K classes each, and the logits of the same forward pass.

    `raw`: (N, K, h, w) float32 at the layer's resolution, not negative, not normalised: maps of one network
    can be compared in height. `classes`: (N, K) the class that each map is for. `logits`: (N, C), of a
    network with a single output the pair that `class_logits` makes of it. `grid`: where in the input the
    map's cells lie.
    """

    raw: Tensor
    classes: Tensor
    logits: Tensor
    grid: "Grid"

    @property
    def empty(self) -> Tensor:
        """(N, K) bool: nothing in the image speaks for this class; the map is all zeros."""
        return self.raw.amax(dim=(2, 3)) <= 0

    def upsampled(self, size: tuple[int, int], *, aligned: bool = True) -> Tensor:
        """Return (N, K, *size) maps, bilinear, each scaled by its own maximum to 0–1; an empty one stays 0.

        Each cell is put where its receptive field is centred. `aligned=False` spreads the cells evenly over
        the image, as is usual: in a ResNet that moves the map half a cell (at 224 px, 16 px) to the right
        and down, because each of its strided layers looks at the even pixels. Scaling divides by the
        maximum and subtracts nothing: zero goes on meaning "no evidence".
        """
        if not aligned:
            return scaled(functional.interpolate(self.raw, size=size, mode="bilinear", align_corners=False))
        rows = self.grid.rows.sample_points(size[0], self.raw.shape[2])
        columns = self.grid.columns.sample_points(size[1], self.raw.shape[3])
        points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(self.raw.device)
        points = points.expand(len(self.raw), -1, -1, -1)
        return scaled(functional.grid_sample(self.raw, points, padding_mode="border", align_corners=True))


class Axis(NamedTuple):
    """Where the cells of a layer are centred along one axis of the input: cell i at pixel start + i · step
    (pixel 0's own centre is 0) of `length` pixels.
    """

    start: float
    step: float
    length: int

    def sample_points(self, size: int, cells: int) -> Tensor:
        """Return (size,) positions among the cells, -1 the first and 1 the last, of the pixels of an output
        of `size` pixels that shows the same field of view.
        """
        pixels = (torch.arange(size) + 0.5) * (self.length / size) - 0.5
        return 2 * (pixels - self.start) / (self.step * max(cells - 1, 1)) - 1


class Grid(NamedTuple):
    """The `Axis` of a layer's rows and of its columns."""

    rows: Axis
    columns: Axis


class _GridTracker:
    """Follows a forward pass and works out where each layer's cells are centred.

    The arithmetic of receptive fields (Araujo, Norris & Sim, "Computing receptive fields of convolutional
    neural networks", Distill 2019): a layer with kernel k, stride s, padding p and dilation d makes of a
    grid (start, step) the grid (start + (d (k - 1) / 2 - p) step, s step). Only layers that change the number
    of cells matter; those that agree on that number, such as a block and its shortcut, agree on the grid.
    """

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
        self._hooks = [layer.register_forward_hook(self._follow) for layer in layers]
        self._known = ({height: Axis(0.0, 1.0, height)}, {width: Axis(0.0, 1.0, width)})

    def grid(self, height: int, width: int) -> Grid:
        """Return the grid of a layer of that size; even spacing where it was made in an unknown way."""
        axes = []
        for cells, known in zip((height, width), self._known, strict=True):
            full = next(iter(known))  # the input is the first size that is known
            axes.append(known.get(cells, Axis(0.5 * full / cells - 0.5, full / cells, full)))
        return Grid(*axes)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _follow(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer.padding, str):
            return
        for axis, known in enumerate(self._known):
            before, after = inputs[0].shape[axis - 2], output.shape[axis - 2]
            kernel, stride, padding, dilation = (
                _pair(getattr(layer, name, 1))[axis]
                for name in ("kernel_size", "stride", "padding", "dilation")
            )
            if before in known and after != before:
                start, step, length = known[before]
                shift = (dilation * (kernel - 1) / 2 - padding) * step
                known.setdefault(after, Axis(start + shift, stride * step, length))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def scaled(maps: Tensor) -> Tensor:
    """Return (…, H, W) maps that are not negative, each divided by its maximum; zeros stay zeros."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


class GradCAM:
    """Grad-CAM maps from one layer of a network, as a context manager.

    The map of class c is relu(Σ_k α_k A_k): A (K channels) is the layer's activation, α_k the mean over
    positions of ∂y_c/∂A_k, y_c the logit. A single output z is two classes with the logits -z/2 and z/2
    (`class_logits`), so that the negative class has a map too; `multilabel` leaves it one finding's logit.

    The layers up to the target run without a graph; a leaf tensor takes the place of the target's output,
    and gradients flow from the logits to that leaf alone. So it costs little more than a forward pass,
    works on frozen networks and inside `no_grad` and `inference_mode`, and touches no parameter's `.grad`.
    An operation that works in place behind the target changes a copy, never the activation that the map
    is made of. Inside `with` the network is in eval mode; behind it everything is as it was.

        with GradCAM(network) as cam:
            maps = cam(images, "top")
    """

    def __init__(self, model: nn.Module, layer: str | None = None, *, multilabel: bool = False) -> None:
        """Choose the layer by its name, or the one that `build_network` noted on the model (`cam_layer`).

        Raises ValueError where there is no such layer.
        """
        name = layer if layer is not None else getattr(model, "cam_layer", None)
        if name is None:
            raise ValueError("this network does not say which layer to use: give GradCAM(model, layer=NAME)")
        modules = dict(model.named_modules())
        if name not in modules or not name:
            spatial = [key for key, module in modules.items() if isinstance(module, nn.Conv2d | nn.ReLU)]
            raise ValueError(f"no layer {name!r} in this network: try one of {', '.join(spatial[-6:])}")
        self.model, self.layer, self.multilabel = model, name, multilabel
        self._target = modules[name]
        self._was_training: dict[nn.Module, bool] = {}
        self._entered = False
        self._leaf: Tensor | None = None

    def __enter__(self) -> "GradCAM":
        if self._entered:
            raise RuntimeError("this GradCAM is already in use: make another one")
        self._entered = True
        self._was_training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        for module, training in self._was_training.items():
            module.training = training

    def _cut_here(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(
                f"layer {self.layer!r} gives no (N, K, h, w) activation: choose a convolution or ReLU"
            )
        if self._leaf is not None:
            raise ValueError(f"layer {self.layer!r} runs more than once a forward pass: choose another one")
        self._leaf = output.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)  # from here to the logits; __call__ restores the caller's mode
        return self._leaf.clone()  # what follows may work in place; the leaf must not change

    def __call__(self, images: Tensor, classes: Classes = "top") -> CamMaps:
        """Return the maps of (N, 3, H, W) normalised images.

        `classes`: "top" (the class with the highest logit), "all", an index for every image, (N,) an index
        an image, or (N, K). Raises ValueError for another shape, an index out of range or a network whose
        output is not finite.
        """
        if not self._entered:
            raise RuntimeError(
                "use `with GradCAM(model) as cam:`: outside it the network is in no known mode"
            )
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
        # Hooks live for this one pass: whatever else runs the network inside `with` runs it as it is.
        tracker = _GridTracker(self.model, *images.shape[2:])
        hook = self._target.register_forward_hook(self._cut_here)
        try:
            with torch.inference_mode(False), torch.no_grad():
                output = self.model(images)
                logits = output if self.multilabel else class_logits(output)
                if self._leaf is None:
                    raise ValueError(f"layer {self.layer!r} takes no part in this network's forward pass")
                chosen = _chosen_classes(classes, logits.detach())
                raw = self._weighted_sums(logits, chosen)
        finally:
            hook.remove()
            tracker.remove()
            self._leaf = None
        if not (logits.isfinite().all() and raw.isfinite().all()):
            raise ValueError("the network's output is not finite: are its weights damaged, or its inputs?")
        return CamMaps(raw, chosen, logits.detach(), tracker.grid(*raw.shape[2:]))

    def _weighted_sums(self, logits: Tensor, chosen: Tensor) -> Tensor:
        activation = self._leaf.detach().float()
        maps = []
        for k in range(chosen.shape[1]):
            # Images of a batch do not meet in eval mode: the gradient of the sum is each image's own.
            score = logits.gather(1, chosen[:, k : k + 1]).sum()
            (gradient,) = torch.autograd.grad(score, self._leaf, retain_graph=k + 1 < chosen.shape[1])
            alpha = gradient.float().mean(dim=(2, 3), keepdim=True)
            maps.append((alpha * activation).sum(dim=1).relu())
        return torch.stack(maps, dim=1)


def _chosen_classes(classes: Classes, logits: Tensor) -> Tensor:
    """Return the (N, K) class indices that `classes` means for (N, C) logits."""
    number, num_classes = logits.shape
    if isinstance(classes, str):
        if classes == "top":
            return logits.argmax(dim=1, keepdim=True)
        if classes == "all":
            return torch.arange(num_classes, device=logits.device).expand(number, num_classes)
        raise ValueError(f"classes must be 'top', 'all', an index, (N,) or (N, K) indices, not {classes!r}")
    # A copy of what is no tensor: a table's column may be read-only, which torch does not like.
    chosen = (classes if isinstance(classes, Tensor) else torch.as_tensor(np.array(classes))).to(
        logits.device
    )
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"class indices must be whole numbers, not {chosen.dtype}")
    chosen = chosen.long()
    if chosen.ndim == 0:
        chosen = chosen.expand(number)
    if chosen.ndim == 1:
        chosen = chosen[:, None]
    if chosen.ndim != 2 or len(chosen) != number or chosen.shape[1] == 0:
        raise ValueError(f"{tuple(chosen.shape)} class indices for {number} images: give (N,) or (N, K)")
    if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < num_classes):
        raise ValueError(f"class index out of range: this network has classes 0 to {num_classes - 1}")
    return chosen


class Explanation(NamedTuple):
    """What a trained network, or an ensemble, says of one (H, W) X-ray: (C,) probabilities, the (K,) classes
    that were asked for and their (K, H, W) maps, each scaled to 0–1 or all zero.
    """

    probabilities: np.ndarray
    classes: np.ndarray
    maps: np.ndarray


def explain(
    trained: TrainedNetwork | Sequence[TrainedNetwork], xray: np.ndarray, classes: Classes = "top"
) -> Explanation:
    """Return probabilities and maps, at the X-ray's own size, for one (H, W) uint8 X-ray.

    "top" is the class that is decided on: the most probable one, or the one by the model card's thresholds. Of
    several networks the probabilities are the means, and a map is the mean of the networks' maps, each scaled
    to 0–1, scaled again: each has the same say, however high its raw maps are. Raises ValueError where their
    classes differ.
    """
    members = [trained] if isinstance(trained, TrainedNetwork) else list(trained)
    card = ensemble_card([member.card for member in members])
    inputs = [_input(member, xray) for member in members]
    by_threshold = card.thresholds is not None and not card.multilabel
    if (len(members) > 1 or by_threshold) and isinstance(classes, str) and classes == "top":
        with torch.inference_mode():
            said = [m.card.probabilities(m.network(x)).cpu() for m, x in zip(members, inputs, strict=True)]
        mean = torch.stack(said).mean(dim=0)
        classes = int(mean.argmax() if card.multilabel else card.decide(mean))
    probabilities, maps = [], []
    for member, images in zip(members, inputs, strict=True):
        with GradCAM(member.network, member.card.cam_layer, multilabel=member.card.multilabel) as cam:
            found = cam(images, classes)
        probabilities.append(member.card.probabilities(found.logits)[0].cpu())
        maps.append(found.upsampled(xray.shape)[0].cpu())
    return Explanation(
        torch.stack(probabilities).mean(dim=0).numpy(),
        found.classes[0].cpu().numpy(),
        scaled(torch.stack(maps).mean(dim=0)).numpy(),
    )


def _input(member: TrainedNetwork, xray: np.ndarray) -> Tensor:
    return member.preprocessing(xray)[None].to(next(member.network.parameters()).device)


def overlay(
    xray: np.ndarray, map_: np.ndarray, *, alpha: float = 0.65, colormap: str = "plasma"
) -> np.ndarray:
    """Return an (H, W) uint8 X-ray under an (H, W) map of 0–1 as (H, W, 3) uint8 RGB.

    A pixel's colour is mixed in with weight alpha · map, so where the map is 0 the X-ray is untouched and
    colour always means evidence. `colormap` is a name of `COLORMAPS` (OpenCV's). Raises ValueError where
    the shapes differ or the map leaves 0–1.
    """
    if xray.shape != map_.shape:
        raise ValueError(f"X-ray {xray.shape} and map {map_.shape} differ: upsample the map to the X-ray")
    if not (map_.min() >= 0 and map_.max() <= 1):
        raise ValueError("the map must lie in 0–1: divide it by its maximum first")
    if colormap not in COLORMAPS:
        raise ValueError(f"unknown colour map {colormap!r}: choose from {', '.join(sorted(COLORMAPS))}")
    colours = cv2.applyColorMap(np.round(map_ * 255).astype(np.uint8), COLORMAPS[colormap])
    weight = (alpha * map_)[..., None]
    mixed = xray[..., None] * (1 - weight) + cv2.cvtColor(colours, cv2.COLOR_BGR2RGB) * weight
    return np.round(mixed).astype(np.uint8)
