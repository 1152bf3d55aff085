"""Architectures, heads, freezing and starting weights.

torchvision's models are imported only when a network is built, because `overlay_cam.py` must start quickly.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from architectures.small_networks import lenet5, named_sequence, resnet_v2, small_cnn


@dataclass(frozen=True)
class Architecture:
    """The function that builds one kind of network, and the names of its parts.

    To add an architecture, add one entry to `ARCHITECTURES`. Studies, heads, freezing, Grad-CAM, saving and loading
    need nothing more:

        "regnet": Architecture("RegNet", "regnet_y_400mf", "fc", "trunk_output", classifier="fc"),
        "mine": Architecture("Mine", MyNetwork, head="classifier.last", cam_layer="features.relu"),

    Attributes:
        title: the name in tables and figures.
        source: the name of a torchvision model, which also has ImageNet weights; or a function without arguments that
            returns a network with random weights. The network must take (N, 3, H, W) images of 32 px and more.
        head: name of the last linear layer, which a new one replaces.
        cam_layer: name of the last layer with a spatial output, or of its activation function if it has one.
        classifier: name of the part that a new head with hidden layers replaces.
    """

    title: str
    source: str | Callable[[], nn.Module]
    head: str
    cam_layer: str
    classifier: str = "classifier"

    def build(self) -> nn.Module:
        """Return the network with random weights, for 1,000 classes."""
        from torchvision import models

        network = self.source() if callable(self.source) else models.get_model(self.source, weights=None)
        if not isinstance(network, models.DenseNet):
            return network
        # DenseNet applies its last ReLU in forward(), where a hook cannot reach it. Here the ReLU is a module. The
        # layers and the names in the state dict stay the same.
        features, pool = network.features, nn.AdaptiveAvgPool2d(1)
        features.add_module("relu5", nn.ReLU(inplace=True))
        return named_sequence(features=features, pool=pool, flatten=nn.Flatten(), classifier=network.classifier)


ARCHITECTURES: dict[str, Architecture] = {
    "vgg16": Architecture("VGG-16", "vgg16", "classifier.6", "features.29"),
    "vgg19": Architecture("VGG-19", "vgg19", "classifier.6", "features.35"),
    "resnet18": Architecture("ResNet-18", "resnet18", "fc", "layer4", classifier="fc"),
    "resnet50": Architecture("ResNet-50", "resnet50", "fc", "layer4", classifier="fc"),
    "resnet101": Architecture("ResNet-101", "resnet101", "fc", "layer4", classifier="fc"),
    "densenet121": Architecture("DenseNet-121", "densenet121", "classifier", "features.relu5"),
    "densenet169": Architecture("DenseNet-169", "densenet169", "classifier", "features.relu5"),
    "densenet201": Architecture("DenseNet-201", "densenet201", "classifier", "features.relu5"),
    "efficientnet_b0": Architecture("EfficientNet-B0", "efficientnet_b0", "classifier.1", "features.8"),
    # ConvNeXt's classifier begins with normalisation and flattening, which a new head must keep.
    "convnext_tiny": Architecture("ConvNeXt-T", "convnext_tiny", "classifier.2", "features.7", "classifier.2"),
    "mobilenet_v3": Architecture("MobileNetV3-Large", "mobilenet_v3_large", "classifier.3", "features.16"),
    "lenet5": Architecture("LeNet-5", lenet5, "classifier.fc3", "features.relu2"),
    "small_cnn": Architecture("Small CNN", small_cnn, "classifier.fc", "features.4.relu"),
    "resnet56v2": Architecture("ResNet-56 v2", resnet_v2, "classifier", "relu"),
}


def architecture(name: str) -> Architecture:
    """Return the registered architecture with this name. Raises ValueError, which lists all, for an unknown one."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown network {name!r}: {hint}choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def build_network(
    name: str,
    outputs: int,
    *,
    weights: str = "none",
    head_order: Sequence[int] | None = None,
    dropout: float | None = None,
    residual_gain: float = 1.0,
    hidden_units: Sequence[int] | None = None,
) -> nn.Module:
    """Return a network in train mode. Its attributes `cam_layer` and `head_name` are names of its modules.

    Args:
        name: a name in `ARCHITECTURES`.
        outputs: number of logits.
        weights: "none" (random, from torch's global generator), "imagenet" (torchvision's IMAGENET1K_V1, from its
            cache or the internet) or a file: .safetensors, or .pth with tensors only, of this architecture with any
            head.
        head_order: None makes a new head. A sequence keeps the file's head, whose layers must be the same. It has, for
            each class of the network, the index of this class in the file. (1, 0) changes the sign of a single output,
            the logit of class 1 of two.
        dropout: the rate of the new head's dropout (with `hidden_units`), or of the network's own dropout layers.
        residual_gain: the initial scale of the last batch normalisation in each residual block of torchvision's
            ResNets. torchvision uses 1, Goyal et al. 2017 use 0 (arXiv:1706.02677, section 5.1). Below 1 the shortcuts
            dominate at first, so receptive fields start small. With 1, the maps of a network that is trained from
            random weights can lie between lesions and not on them.
        hidden_units: None replaces the last linear layer. A sequence of widths, which may be empty, replaces the
            whole classifier: a linear layer and ReLU for each width, dropout, a last linear layer.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: the weights or a setting do not fit. The message says what to do.
    """
    kind = architecture(name)
    network = kind.build()
    _scale_residuals(network, residual_gain)
    state = _starting_weights(name, weights)
    network.cam_layer = kind.cam_layer
    network.head_name = kind.head if hidden_units is None else kind.classifier
    width = _linear_layers(network.get_submodule(network.head_name))[0].in_features
    if hidden_units is None:
        head: nn.Module = nn.Linear(width, outputs)
        if dropout is not None:
            _set_dropout(network, dropout, kind.title)
    else:
        head = _new_head(width, hidden_units, dropout, outputs)
    network.set_submodule(network.head_name, head)
    if state:
        _load_weights(network, state, kind, weights, head_order)
    return network


def _scale_residuals(network: nn.Module, gain: float) -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            nn.init.constant_(getattr(block, "bn3", block.bn2).weight, gain)


def _set_dropout(network: nn.Module, rate: float, title: str) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if not layers:
        raise ValueError(f"{title} has no dropout layers: give it a new head, which has one, with hidden_units = []")
    for layer in layers:
        layer.p = rate


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _new_head(width: int, hidden_units: Sequence[int], dropout: float | None, outputs: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    for number, units in enumerate(hidden_units, 1):
        layers |= {f"hidden{number}": nn.Linear(width, units), f"relu{number}": nn.ReLU(inplace=True)}
        width = units
    if dropout is not None:
        layers["dropout"] = nn.Dropout(dropout)
    return named_sequence(**layers, last=nn.Linear(width, outputs))


def class_logits(output: Tensor) -> Tensor:
    """Return (N, C) logits of classes for a network's (N, outputs) output.

    A single output z is the logit of class 1 of 2. It becomes the pair (-z/2, z/2), whose softmax is exactly
    (1 - sigmoid(z), sigmoid(z)). Several outputs are returned as they are.
    """
    return torch.cat([-output / 2, output / 2], dim=-1) if output.shape[-1] == 1 else output


def set_training_mode(
    network: nn.Module, *, trainable: Literal["all", "head"] = "all", frozen_batch_norm: bool = False
) -> None:
    """Choose the parameters that learn, and put each part of the network into train or eval mode accordingly.

    Call this again after `network.train()`, which changes the modes.

    Args:
        network: made by `build_network`.
        trainable: "all", or "head" for the new head alone. The rest is then in eval mode: its running statistics
            stay as they are and its dropout is off.
        frozen_batch_norm: keep the batch normalisations outside the head in eval mode. With "all" they
            still learn their weights, but keep their running statistics.
    """
    head = network.get_submodule(network.head_name)
    network.requires_grad_(trainable == "all").train(trainable == "all")
    head.requires_grad_(True).train()
    if frozen_batch_norm:
        for module in set(network.modules()) - set(head.modules()):
            if isinstance(module, _BatchNorm):
                module.eval()


def trunk_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the (N, D) input of the network's head for (N, 3, H, W) images, in the network's present mode.

    `head(trunk_features(x))` equals `network(x)`. So the features of a frozen trunk can be computed once and kept.
    """
    return _input_of(network.get_submodule(network.head_name), network, images)


def embeddings(network: nn.Module, images: Tensor) -> Tensor:
    """Return the (N, D) input of the last linear layer for (N, 3, H, W) images, in the network's present mode."""
    return _input_of(_linear_layers(network.get_submodule(network.head_name))[-1], network, images)


def _input_of(module: nn.Module, network: nn.Module, images: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
        network(images)
    return inputs[0]


def _starting_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Return the state dict of the weights, empty for "none"."""
    if weights == "none":
        return {}
    if weights == "imagenet":
        return _imagenet_weights(name)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {weights}: give a file, 'imagenet' or 'none'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The readers raise exceptions of many types.
        raise ValueError(f"{path} holds no readable weights: {str(error).splitlines()[0]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a state dict (names to tensors): save one with model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    """Return torchvision's ImageNet state dict for a registered architecture, from the cache or the internet."""
    from torchvision import models

    model = architecture(name).source
    if callable(model):
        alternatives = ", ".join(key for key, kind in ARCHITECTURES.items() if isinstance(kind.source, str))
        remedy = f"train it with --weights none or --weights FILE, or choose from {alternatives}"
        raise ValueError(f"{name} has no ImageNet weights: {remedy}")
    published = models.get_model_weights(model)["IMAGENET1K_V1"]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(published.url).name
    try:
        state = published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:  # such as urllib's URLError
        remedy = f"put {file.name} from {published.url} into {folder}, or train with --weights none or --weights FILE"
        raise FileNotFoundError(f"no ImageNet weights for {name} and the download failed ({error}): {remedy}") from None
    except Exception as error:
        raise ValueError(f"{file} is damaged, delete it: {str(error).splitlines()[0]}") from None
    # torchvision's DenseNet files have older module names: denselayer1.norm.1 is now denselayer1.norm1.
    return {re.sub(r"\b(norm|relu|conv)\.(\d+)\b", r"\1\2", key): value for key, value in state.items()}


def _load_weights(
    network: nn.Module, state: Mapping[str, Tensor], kind: Architecture, source: str, head_order: Sequence[int] | None
) -> None:
    """Load a state dict into the trunk, and into the head too if the order of its classes is given."""
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    if head_order is None:
        wanted = {key: shape for key, shape in wanted.items() if not key.startswith(f"{network.head_name}.")}
    # Layers of the file's classifier that the network does not have are left out.
    state = {key: v for key, v in state.items() if key in wanted or not key.startswith(f"{kind.classifier}.")}
    shapes = {key: value.shape for key, value in state.items()}
    wrong = [key for key in wanted | shapes if wanted.get(key) != shapes.get(key)]
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]  # Older files have none.
    if wrong:
        differ = f"{len(wrong)} names or shapes differ, for example {wrong[0]}"
        raise ValueError(f"the weights {source} are not of a {kind.title}: {differ}")
    network.load_state_dict(state, strict=False)
    if head_order is not None:
        _reorder(_linear_layers(network.get_submodule(network.head_name))[-1], list(head_order))


@torch.no_grad()
def _reorder(last: nn.Linear, order: list[int]) -> None:
    for parameter in last.parameters():
        if last.out_features == len(order):
            parameter.copy_(parameter[order])
        elif order == [1, 0]:  # one output for two classes, the logit of class 1
            parameter.neg_()


def parameter_count(network: nn.Module) -> int:
    """Return the number of parameters, trainable or not; buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())
