"""Class activation maps of a network: exact, and for about the price of a forward pass.

The methods' formulas are in `cam_methods`; this is where their activations and gradients come from, after
Grad-CAM (Selvaraju et al. 2017, ICCV, arXiv:1610.02391).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional

from cam_methods import Method, cam_method, eigen_cam_maps, score_cam_weights, weighted_maps
from networks import class_logits
from receptive_fields import CellTracker, Grid

Classes = Literal["top", "all"] | int | Tensor | np.ndarray | list[int] | tuple[int, ...]

GRADIENT_BYTES = 2**26  # of gradients that are held at once, where they are needed class by class


class LayerMaps(NamedTuple):
    """Maps from one layer: (N, K, h, w) float32 at its resolution, not negative, not normalised; and where in the
    input their cells lie.
    """

    raw: Tensor
    grid: Grid


@dataclass(frozen=True)
class CamMaps:
    """Maps of N images for K classes each, and the logits of the same forward pass.

    `layers`: the maps from each layer. `classes`: (N, K) the class that each map is for. `logits`: (N, C), of a
    network with a single output the pair that `class_logits` makes of it.
    """

    layers: tuple[LayerMaps, ...]
    classes: Tensor
    logits: Tensor

    def __getitem__(self, images: slice | Sequence[int]) -> "CamMaps":
        """Return the maps of some of the images: a slice, or their indices."""
        layers = tuple(LayerMaps(raw[images], grid) for raw, grid in self.layers)
        return CamMaps(layers, self.classes[images], self.logits[images])

    @property
    def raw(self) -> Tensor:
        """(N, K, h, w) maps of the one layer: of one network and method they can be compared in height.

        Raises ValueError for several layers, whose maps have no scale in common.
        """
        return self._only.raw

    @property
    def grid(self) -> Grid:
        """Where in the input the cells of the one layer lie."""
        return self._only.grid

    @property
    def _only(self) -> LayerMaps:
        if len(self.layers) > 1:
            raise ValueError("maps of several layers have no raw scale in common: use upsampled(size)")
        return self.layers[0]

    @property
    def empty(self) -> Tensor:
        """(N, K) bool: nothing in the image speaks for this class; the map is all zeros."""
        return torch.stack([layer.raw.amax(dim=(2, 3)) <= 0 for layer in self.layers]).all(dim=0)

    def upsampled(self, size: tuple[int, int], *, aligned: bool = True) -> Tensor:
        """Return (N, K, *size) maps, bilinear, each scaled by its own maximum to 0–1; an empty one stays 0.

        Each cell is put where its receptive field is centred. `aligned=False` spreads the cells evenly over
        the image, as is usual: in a ResNet that moves the map half a cell (at 224 px, 16 px) to the right
        and down, because each of its strided layers looks at the even pixels. Scaling divides by the
        maximum and subtracts nothing: zero goes on meaning "no evidence". Several layers are fused by the
        greatest of their scaled maps, place by place (Jiang et al. 2021, LayerCAM).
        """
        fused = None
        for raw, grid in self.layers:
            maps = grid.upsampled(raw, size) if aligned else _spread(raw, size)
            fused = scaled(maps) if fused is None else torch.maximum(fused, scaled(maps))
        return fused


def _spread(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def scaled(maps: Tensor) -> Tensor:
    """Return (…, H, W) maps that are not negative, each divided by its maximum; zeros stay zeros."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


class GradCAM:
    """Class activation maps from a layer of a network, or from several, as a context manager.

    `method` is one of `cam_methods.METHODS`. y_c are the logits. A single output z is two classes with the logits
    -z/2 and z/2 (`class_logits`), so that the negative class has a map too; `multilabel` leaves it one finding's
    logit.

    The layers up to the target run without a graph; a leaf tensor takes the place of the target's output, and
    gradients flow from the logits to that leaf alone. Behind the leaf the graph itself tells whether the head
    is global average pooling and a linear layer: then the gradient of every class is the layer's weights, and
    nothing has to be computed (Zhou et al. 2016, arXiv:1512.04150); otherwise one batched call gives it for
    all classes. So maps cost little more than a forward pass, whether parameters are frozen or not, inside
    `no_grad`, `inference_mode` and autocast, of compiled networks (run as they were before), and no parameter's
    `.grad` is touched. An operation that works in place behind the target changes a copy, never the
    activation that the map is made of. Inside `with` the network is in eval mode; behind it everything is
    as it was. A network is for one thread at a time: hooks see every pass.

        with GradCAM(network) as cam:
            maps = cam(images, "top")
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | Sequence[str] | None = None,
        method: str = "gradcam",
        *,
        multilabel: bool = False,
        batch_size: int = 32,
    ) -> None:
        """Choose layers by name, or the one that `build_network` noted on the model (`cam_layer`).

        `batch_size` is of the masked images that Score-CAM runs the network on, as many an image as the layer has
        channels. Raises ValueError where there is no such layer or method.
        """
        self.model = getattr(model, "_orig_mod", model)  # of a compiled network the one that hooks reach
        self.method, self.multilabel, self.batch_size = method, multilabel, batch_size
        cam_method(method)  # an unknown one is an error here
        self._targets = _layers(self.model, layer)
        self.layers = tuple(self._targets)
        self._trackers: dict[tuple[int, int], CellTracker] = {}
        self._points: dict[str, Tensor] = {}
        self._was_training: dict[nn.Module, bool] = {}
        self._entered = False

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
        self._trackers.clear()
        for module, training in self._was_training.items():
            module.training = training

    def __call__(self, images: Tensor, classes: Classes = "top") -> CamMaps:
        """Return the maps of (N, 3, H, W) normalised images.

        `classes`: "top" (the class with the highest logit), "all", an index for every image, (N,) an index
        an image, or (N, K). Raises ValueError for another shape, an index out of range or a network whose
        output is not finite.
        """
        return self.by_method([self.method], images, classes)[self.method]

    def by_method(
        self, methods: Sequence[str], images: Tensor, classes: Classes = "top"
    ) -> dict[str, CamMaps]:
        """Return the maps of several methods from one and the same forward pass, by name; see `__call__`."""
        formulas = {name: cam_method(name) for name in methods}
        if not self._entered:
            raise RuntimeError(
                "use `with GradCAM(model) as cam:`: outside it the network is in no known mode"
            )
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
        if any(module.training for module in self.model.modules()):
            raise RuntimeError(
                "the network was put into train mode inside `with`: leave it in eval mode there"
            )
        try:
            with _eager(self.model), torch.inference_mode(False), torch.no_grad():
                output = self._forward(images)
                torch.set_grad_enabled(False)  # the graph's part is done
                self._check(images, output)
                logits = self._logits(output)
                chosen = _chosen_classes(classes, logits.detach())
                grids = {name: self._grid(images, point) for name, point in self._points.items()}
                raw = {
                    name: self._maps(formula, images, output, chosen, grids)
                    for name, formula in formulas.items()
                }
        finally:
            self._points = {}
            torch.clear_autocast_cache()  # casts made without a graph would break a later training step
        if not all(maps.isfinite().all() for by_layer in raw.values() for maps in by_layer.values()):
            raise ValueError("the network's gradients are not finite: are its weights damaged?")
        logits = logits.detach().float()
        return {
            method: CamMaps(
                tuple(LayerMaps(by_layer[name].relu(), grids[name]) for name in self.layers), chosen, logits
            )
            for method, by_layer in raw.items()
        }

    def _forward(self, images: Tensor) -> Tensor:
        """Run the network, cut at the target; return its output, with `_points` the targets' activations."""
        size = tuple(images.shape[2:])
        tracker = None
        if size not in self._trackers:
            tracker = self._trackers[size] = CellTracker(self.model, *size)
        # Hooks live for this one pass: whatever else runs the network inside `with` runs it as it is.
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: self._cut(name, output))
            for name, layer in self._targets.items()
        ]
        try:
            output = self.model(images)
        except BaseException:
            self._trackers.pop(size, None)  # it followed a part of the pass only
            raise
        finally:
            for hook in hooks:
                hook.remove()
            if tracker is not None:
                tracker.stop()
        for name in self.layers:
            if name not in self._points:
                raise ValueError(f"layer {name!r} takes no part in this network's forward pass")
        return output

    def _check(self, images: Tensor, output: object) -> None:
        """Say what is wrong with a network that cannot be explained image by image and class by class."""
        if not isinstance(output, Tensor) or output.ndim != 2:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the network returns {kind} and not (N, C) logits: wrap it in one that does")
        for name, point in self._points.items():
            if not len(point) == len(images) == len(output):
                raise ValueError(
                    f"{len(images)} images are {len(point)} at layer {name!r} and {len(output)} in the output: "
                    "a network that cuts or merges images has no map of one"
                )
            height, width = images.shape[2:]
            first, second, third = point.shape[1:]
            # The first two axes have the image's proportions and the last two have not: (N, h, w, K).
            if first * width == second * height and second * width != third * height:
                raise ValueError(
                    f"layer {name!r} gives {tuple(point.shape)}, channels last, and not (N, K, h, w): choose a "
                    "later layer, behind which the channels come second (of torchvision's Swin 'permute')"
                )
        if not all(tensor.isfinite().all() for tensor in (output, *self._points.values())):
            raise ValueError("the network's output is not finite: are its weights damaged, or its inputs?")

    def _cut(self, name: str, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"layer {name!r} gives no (N, K, h, w) activation: choose a convolution or ReLU")
        if name in self._points:
            raise ValueError(f"layer {name!r} runs more than once a forward pass: choose another one")
        # The first target starts the graph; one behind it is a point of that graph.
        point = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
        self._points[name] = point
        torch.set_grad_enabled(True)  # from here to the logits
        return point.clone()  # what follows may work in place; the point must not change

    def _logits(self, output: Tensor) -> Tensor:
        return output if self.multilabel else class_logits(output)

    def _grid(self, images: Tensor, point: Tensor) -> Grid:
        return self._trackers[tuple(images.shape[2:])].grid(*point.shape[2:])

    def _maps(
        self, formula: Method, images: Tensor, output: Tensor, chosen: Tensor, grids: dict[str, Grid]
    ) -> dict[str, Tensor]:
        """Return (N, K, h, w) maps by layer, not yet rectified."""
        if formula.needs == "gradient":
            return self._maps_from_gradients(formula, output, chosen)
        activations = {name: point.detach().float() for name, point in self._points.items()}
        if formula.needs == "activation":
            return {
                name: eigen_cam_maps(activation)[:, None].expand(-1, chosen.shape[1], -1, -1)
                for name, activation in activations.items()
            }
        return {
            name: weighted_maps(activation, self._channel_weights(images, activation, grids[name], chosen))
            for name, activation in activations.items()
        }

    def _maps_from_gradients(self, formula: Method, output: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, point in self._points.items():
            head = _pooled_linear_head(output, point)
            if head is not None:
                # An index for all images: one row of weights serves them all.
                rows = chosen[:1] if chosen.stride(0) == 0 else chosen
                gradient = self._logits(head.float()).T[rows] / (point.shape[2] * point.shape[3])
                maps[name] = _weighted(formula, point, gradient[..., None, None])
        others = {name: point for name, point in self._points.items() if name not in maps}
        if others:
            parts = [
                [_weighted(formula, point, g) for point, g in zip(others.values(), gradients, strict=True)]
                for gradients in self._gradients(output, list(others.values()), chosen)
            ]
            maps |= {
                name: torch.cat(found, dim=1)
                for name, found in zip(others, zip(*parts, strict=True), strict=True)
            }
        return maps

    def _gradients(self, output: Tensor, points: list[Tensor], chosen: Tensor) -> Iterator[list[Tensor]]:
        """Yield (N, k, K, h, w) gradients at each point, for a part of the chosen classes after the other."""
        with torch.enable_grad():
            logits = self._logits(output)
        one_hot = functional.one_hot(chosen, logits.shape[1]).to(logits.dtype).transpose(0, 1).contiguous()
        if not logits.requires_grad:
            raise ValueError(self._unreached)
        at_once = max(1, GRADIENT_BYTES // sum(point.nbytes for point in points))
        for part in one_hot.split(at_once):
            # Images of a batch do not meet in eval mode: each gradient is of its own image's logit.
            found = _batched_gradients(logits, points, part)
            if any(gradients is None for gradients in found):
                raise ValueError(self._unreached)
            yield [gradients.transpose(0, 1) for gradients in found]

    @property
    def _unreached(self) -> str:
        return (
            f"no gradient comes from the output to {', '.join(map(repr, self.layers))}: "
            "does the network's forward() detach it, use no_grad, or not use the layer?"
        )

    def _channel_weights(self, images: Tensor, activation: Tensor, grid: Grid, chosen: Tensor) -> Tensor:
        """Return Score-CAM's (N, K, channels, 1, 1) weights: the network sees each image through each channel."""
        weights = []
        for image, channels, wanted in zip(images, activation, chosen, strict=True):
            logits = []
            for part in channels.split(self.batch_size):
                seen = grid.upsampled(part[:, None], tuple(image.shape[1:]))
                low, high = seen.amin(dim=(2, 3), keepdim=True), seen.amax(dim=(2, 3), keepdim=True)
                masks = (seen - low) / (high - low).clamp_min(torch.finfo(seen.dtype).tiny)
                logits.append(self._logits(self.model((masks * image).to(image.dtype))).float())
            weights.append(score_cam_weights(torch.cat(logits).T[wanted]))
        return torch.stack(weights)[..., None, None]


def _weighted(formula: Method, point: Tensor, gradient: Tensor) -> Tensor:
    activation = point.detach().float()
    return weighted_maps(activation, formula.weights(activation, gradient.float()))


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run a network whose modules were compiled in place (`module.compile()`) as it is written: compiled code
    calls no hooks that came after it.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _batched_gradients(logits: Tensor, points: list[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """Return (K, N, …) gradients at each point for (K, N, C) cotangents of the logits, in one call."""
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return list(torch.autograd.grad(logits, points, cotangents, is_grads_batched=True, **options))
    except (RuntimeError, NotImplementedError):
        # An operation whose backward pass cannot be batched: one call a class.
        each = [torch.autograd.grad(logits, points, one, **options) for one in cotangents]
        return [None if found[0] is None else torch.stack(found) for found in zip(*each, strict=True)]


def _layers(model: nn.Module, layer: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the target modules by name."""
    usual = getattr(model, "cam_layer", None)
    names = layer if layer is not None else usual
    if not names:
        raise ValueError("this network does not say which layer to use: give GradCAM(model, layer=NAME)")
    if isinstance(names, nn.Module):
        raise ValueError("give the layer's name, as in network.named_modules(), and not the module")
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            spatial = [key for key, module in modules.items() if isinstance(module, nn.Conv2d | nn.ReLU)]
            tips = ", ".join(dict.fromkeys([usual] * bool(usual) + spatial[-6:]))
            raise ValueError(f"no layer {name!r} in this network: try one of {tips}")
    return {name: modules[name] for name in names}


# What a graph may hold between pooling and a linear layer that changes neither values nor their order.
_RESHAPES = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "ToCopy", "Clone")


def _pooled_linear_head(output: Tensor, point: Tensor) -> Tensor | None:
    """Return the (K, outputs) weights where the network's (N, outputs) output is the mean of the (N, K, h, w) `point`
    over its places, times these weights, plus a bias; None where anything else was done, by the graph.
    """
    linear = _behind_reshapes(output.grad_fn)
    if not _is(linear, "Addmm", "Mm") or getattr(linear, "_saved_alpha", 1) != 1:
        return None
    *bias, _, weight = [node for node, _ in linear.next_functions]
    if not all(_is_constant(node, point) for node in (*bias, weight)):
        return None
    pooling = _behind_reshapes(linear.next_functions[-2][0])  # of (bias,) input, weights
    if not _is(pooling, "Mean") or tuple(getattr(pooling, "_saved_self_sym_sizes", ())) != tuple(point.shape):
        return None
    # Axes are kept as unsigned numbers of 64 bits, negative ones too.
    axes = {axis % 2**64 % 4 for axis in getattr(pooling, "_saved_dim", None) or ()}
    start = _behind_reshapes(pooling.next_functions[0][0], until=get_gradient_edge(point).node)
    if axes != {2, 3} or start != get_gradient_edge(point).node:
        return None
    weights = linear._saved_mat2.detach()
    # The mean may have been cut into other rows than images.
    return weights if weights.shape == (point.shape[1], output.shape[1]) else None


def _is_constant(node: Node | None, point: Tensor) -> bool:
    """Tell whether what a node made is a parameter or a constant, and so not made of `point`."""
    node = _behind_reshapes(node, kinds=(*_RESHAPES, "T", "Transpose", "Permute"))
    return node is None or (_is(node, "torch::autograd::AccumulateGrad") and node.variable is not point)


def _behind_reshapes(
    node: Node | None, *, until: Node | None = None, kinds: Sequence[str] = _RESHAPES
) -> Node | None:
    while node is not None and node != until and _is(node, *kinds):
        node = node.next_functions[0][0]
    return node


def _is(node: Node | None, *kinds: str) -> bool:
    """Tell whether a node of a graph is of one of these kinds; its name is that, "Backward" and a number."""
    return node is not None and node.name().split("Backward")[0] in kinds


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
