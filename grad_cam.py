"""Class activation maps of any network, at little more than the cost of a forward pass.

The formulas of the methods are in `cams.methods`. This module provides the activations and gradients that they need, as
Grad-CAM does (Selvaraju et al. 2017, ICCV, arXiv:1610.02391).
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cams.maps import CamMaps, LayerMaps, scaled
from cams.methods import Method, cam_method, eigen_cam_maps, weighted_maps
from cams.receptive_fields import CellTracker, Grid
from networks import class_logits

Classes = Literal["top", "all"] | int | Tensor | np.ndarray | list[int] | tuple[int, ...]
Layers = str | Sequence[str] | None

GRADIENT_BYTES = 2**26  # If the gradients of all classes need more memory, they are computed in parts.
MASKED_IMAGES = 32  # Score-CAM's batch size


class GradCAM:
    """Makes class activation maps from one or several layers of a network; a context manager.

        with GradCAM(network) as cam:
            maps = cam(images, "top")

    - Cost: the layers up to the target run without a graph. The graph starts at the target's output, and one batched
      call computes the gradients of all classes there.
    - In-place operations after the target change a copy of its output, so the map is made of the original values.
    - Parameters may be frozen, and their `.grad` is not touched. Under `no_grad`, `inference_mode` and autocast the
      maps are the same. A compiled network runs uncompiled here.
    - Inside `with` the network is in eval mode. Afterwards each module has its previous mode again.
    - Only one thread may use the network inside `with`, because the hooks see every forward pass.

    The score of a class is its logit. A network with a single output z has two classes with the logits -z/2 and z/2
    (`networks.class_logits`), so the negative class has a map too. With `multilabel`, z is the logit of one finding.
    """

    def __init__(
        self, model: nn.Module, layer: Layers = None, method: str = "gradcam", *, multilabel: bool = False
    ) -> None:
        """Choose the layers and the method.

        Args:
            model: returns (N, C) logits for (N, 3, H, W) images.
            layer: name of a layer as in `model.named_modules()`, or several names; None for `model.cam_layer`, which
                `build_network` sets.
            method: a name in `cams.methods.METHODS`.
            multilabel: each output is the logit of one finding.

        Raises:
            ValueError: there is no such layer or method.
        """
        cam_method(method)  # An unknown name is an error here, not at the first call.
        self.model = getattr(model, "_orig_mod", model)  # Hooks do not reach through torch.compile's wrapper.
        self.method = method
        self.multilabel = multilabel
        self.layers = _target_layers(self.model, layer)
        self._modes: dict[nn.Module, bool] = {}  # empty outside `with`

    def __enter__(self) -> "GradCAM":
        self._modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def __call__(self, images: Tensor, classes: Classes = "top") -> CamMaps:
        """Return the maps of a batch of images.

        Args:
            images: (N, 3, H, W), normalised for the network.
            classes: "top" (the class with the highest logit), "all", one index for all images, (N,) one index for
                each image, or (N, K) indices.

        Raises:
            ValueError: a shape is wrong, an index is out of range, or the network's output is not finite.
        """
        return self.by_method([self.method], images, classes)[self.method]

    def by_method(self, methods: Sequence[str], images: Tensor, classes: Classes = "top") -> dict[str, CamMaps]:
        """Return the maps of several methods, by name, from one forward pass. Arguments as in `__call__`."""
        formulas = {name: cam_method(name) for name in methods}
        self._check_use(images)
        try:
            with _uncompiled(self.model), torch.inference_mode(False), torch.no_grad():
                run = self._forward(images)
                chosen = _class_indices(classes, run.logits.detach())
                raw_maps = {name: self._raw_maps(formula, run, chosen) for name, formula in formulas.items()}
        finally:
            # Autocast caches the weights that it casts, here without a graph. A later training step must not use them.
            torch.clear_autocast_cache()
        if not all(raw.isfinite().all() for layers in raw_maps.values() for raw in layers):
            raise ValueError("the network's gradients are not finite: are its weights damaged?")
        logits = run.logits.detach().float()
        return {
            name: CamMaps(tuple(map(LayerMaps, map(torch.relu, layers), run.grids)), chosen, logits)
            for name, layers in raw_maps.items()
        }

    def _check_use(self, images: Tensor) -> None:
        if not self._modes:
            raise RuntimeError("use `with GradCAM(model) as cam:`, which puts the network into eval mode")
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (N, 3, H, W) with N > 0, not {tuple(images.shape)}")
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("the network was put into train mode inside `with`: leave it in eval mode there")

    def _forward(self, images: Tensor) -> "_ForwardPass":
        """Run the network once. The graph starts at the first target."""
        activations: dict[str, Tensor] = {}
        with CellTracker(self.model, *images.shape[2:]) as tracker:  # Later passes run without hooks.
            for name, layer in self.layers.items():
                hook = partial(_start_graph, name, activations)
                tracker.enter_context(layer.register_forward_hook(hook))
            output = self.model(images)
        if unused := [name for name in self.layers if name not in activations]:
            raise ValueError(f"layer {unused[0]!r} is not used in this network's forward pass")
        _check_output(images, activations, output)
        logits = self._logits(output)
        torch.set_grad_enabled(False)  # The graph is complete.
        activations = {name: activations[name] for name in self.layers}
        grids = [tracker.grid(*activation.shape[2:]) for activation in activations.values()]
        return _ForwardPass(images, activations, grids, logits)

    def _logits(self, output: Tensor) -> Tensor:
        return output if self.multilabel else class_logits(output)

    def _raw_maps(self, formula: Method, run: "_ForwardPass", chosen: Tensor) -> list[Tensor]:
        """Return (N, K, h, w) maps of each layer, before the ReLU, for (N, K) chosen classes."""
        activations = [activation.detach().float() for activation in run.activations.values()]
        if formula.needs == "gradient":
            return _maps_from_gradients(formula, run, activations, chosen)
        if formula.needs == "activation":
            return [eigen_cam_maps(a)[:, None].expand(-1, chosen.shape[1], -1, -1) for a in activations]
        return [
            weighted_maps(activation, self._channel_weights(run.images, activation, grid, chosen))
            for activation, grid in zip(activations, run.grids, strict=True)
        ]

    def _channel_weights(self, images: Tensor, activation: Tensor, grid: Grid, chosen: Tensor) -> Tensor:
        """Return the (N, K, channels, 1, 1) weights of Score-CAM (Wang et al. 2020, CVPR workshops, arXiv:1910.01279).

        The network sees each image masked by each channel. The weights of a class are the softmax of its logits over
        the channels. The paper first subtracts the logit of a baseline image, which does not change the softmax.
        """
        weights = []
        for image, channels, indices in zip(images, activation, chosen, strict=True):
            logits = []
            for part in channels.split(MASKED_IMAGES):
                masks = grid.upsampled(part[:, None], tuple(image.shape[1:]))
                masks = scaled(masks - masks.amin(dim=(2, 3), keepdim=True))
                logits.append(self._logits(self.model((masks * image).to(image.dtype))).float())
            weights.append(torch.cat(logits).T[indices].softmax(dim=-1))
        return torch.stack(weights)[..., None, None]


class _ForwardPass(NamedTuple):
    """The results of a forward pass. The graph leads from the first target's activation to the logits.

    Attributes:
        images: (N, 3, H, W).
        activations: layer -> (N, channels, h, w).
        grids: where each layer's cells lie in the image.
        logits: (N, C).
    """

    images: Tensor
    activations: dict[str, Tensor]
    grids: list[Grid]
    logits: Tensor


def _target_layers(model: nn.Module, layer: Layers) -> dict[str, nn.Module]:
    """Return the target modules by name."""
    default = getattr(model, "cam_layer", None)
    names = layer if layer is not None else default
    if not names or isinstance(names, nn.Module):
        raise ValueError("give the name of a layer, as in network.named_modules(): GradCAM(model, layer=NAME)")
    names = [names] if isinstance(names, str) else names
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            spatial = [key for key, module in modules.items() if isinstance(module, nn.Conv2d | nn.ReLU)]
            tips = dict.fromkeys([default] * bool(default) + spatial[-6:])
            raise ValueError(f"no layer {name!r} in this network: try one of {', '.join(tips)}")
    return {name: modules[name] for name in names}


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context in which modules that `module.compile()` has compiled run uncompiled.

    Compiled code ignores hooks that are registered after the compilation.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _start_graph(name: str, activations: dict[str, Tensor], layer: nn.Module, _: object, output: object) -> Tensor:
    """Forward hook: record a target's output, start the graph there, and return a copy."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise ValueError(f"layer {name!r} gives no (N, K, h, w) activation: choose a convolution or ReLU")
    if name in activations:
        raise ValueError(f"layer {name!r} runs more than once a forward pass: choose another one")
    # The first target's output becomes the leaf of the graph. Later targets already belong to the graph.
    activation = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
    activations[name] = activation
    torch.set_grad_enabled(True)  # from here to the logits
    return activation.clone()  # Later in-place operations change only this copy.


def _check_output(images: Tensor, activations: dict[str, Tensor], output: object) -> None:
    """Raise ValueError if the network does not give each image its own activations and logits."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the network returns {kind} and not (N, C) logits: wrap it in a module that does")
    for name, activation in activations.items():
        if not len(activation) == len(images) == len(output):
            sizes = f"{len(images)} images are {len(activation)} at layer {name!r} and {len(output)} in the output"
            raise ValueError(f"{sizes}: a network that cuts or merges images has no map of a single image")
        (height, width), (first, second, third) = images.shape[2:], activation.shape[1:]
        # If the first two axes have the image's proportions and the last two do not, the shape is (N, h, w, K).
        if first * width == second * height and second * width != third * height:
            remedy = "choose a later layer, whose channels come second (in torchvision's Swin: 'permute')"
            raise ValueError(f"layer {name!r} gives {tuple(activation.shape)}, channels last: {remedy}")
    if not all(tensor.isfinite().all() for tensor in (output, *activations.values())):
        raise ValueError("the network's output is not finite: are its weights damaged, or its inputs?")


def _maps_from_gradients(formula: Method, run: _ForwardPass, activations: list[Tensor], chosen: Tensor) -> list[Tensor]:
    """Return (N, K, h, w) maps of each layer, before the ReLU, for (N, K) chosen classes."""
    one_hot = functional.one_hot(chosen, run.logits.shape[1]).to(run.logits.dtype)
    classes_at_once = max(1, GRADIENT_BYTES // sum(a.nbytes for a in run.activations.values()))
    parts = []
    for cotangents in one_hot.transpose(0, 1).contiguous().split(classes_at_once):
        layers = zip(activations, _gradients(run, cotangents), strict=True)
        parts.append([weighted_maps(a, formula.weights(a, g.transpose(0, 1).float())) for a, g in layers])
    return [torch.cat(maps, dim=1) for maps in zip(*parts, strict=True)]


def _gradients(run: _ForwardPass, cotangents: Tensor) -> list[Tensor]:
    """Return (K, N, channels, h, w) gradients at each layer for (K, N, C) cotangents of the logits.

    In eval mode the images of a batch do not influence each other, so each image gets the gradient of its own logit.
    """
    points = list(run.activations.values())
    differentiate = partial(torch.autograd.grad, run.logits, points, retain_graph=True, allow_unused=True)
    gradients: Sequence[Tensor | None] = [None]
    if run.logits.requires_grad:
        try:
            gradients = differentiate(cotangents, is_grads_batched=True)
        except (RuntimeError, NotImplementedError):
            # Some operation does not support batched gradients, so each class needs its own call.
            by_class = [differentiate(cotangent) for cotangent in cotangents]
            gradients = [None if layer[0] is None else torch.stack(layer) for layer in zip(*by_class, strict=True)]
    if any(gradient is None for gradient in gradients):
        layers = ", ".join(map(repr, run.activations))
        causes = "does the network's forward() detach it, use no_grad, or not use the layer?"
        raise ValueError(f"no gradient comes from the output to {layers}: {causes}")
    return list(gradients)


def _class_indices(classes: Classes, logits: Tensor) -> Tensor:
    """Return `classes` as (N, K) indices, for (N, C) logits."""
    number, num_classes = logits.shape
    if isinstance(classes, str):
        if classes not in ("top", "all"):
            raise ValueError(f"classes must be 'top', 'all', an index, (N,) or (N, K) indices, not {classes!r}")
        all_indices = torch.arange(num_classes, device=logits.device).expand(number, num_classes)
        return all_indices if classes == "all" else logits.argmax(dim=1, keepdim=True)
    # np.array makes a copy, because torch warns about read-only arrays, such as columns of a table.
    indices = classes if isinstance(classes, Tensor) else torch.as_tensor(np.array(classes))
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"class indices must be whole numbers, not {indices.dtype}")
    indices = indices.to(logits.device).long()
    if indices.ndim < 2:
        indices = (indices.expand(number) if indices.ndim == 0 else indices)[:, None]
    if indices.ndim != 2 or len(indices) != number or indices.shape[1] == 0:
        raise ValueError(f"{tuple(indices.shape)} class indices for {number} images: give (N,) or (N, K)")
    if indices.min() < 0 or indices.max() >= num_classes:
        raise ValueError(f"class index out of range: this network has classes 0 to {num_classes - 1}")
    return indices
