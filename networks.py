"""Architectures, heads, the layer for Grad-CAM; saving and loading a trained network.

Stands under the command line too, so torchvision's models are imported only when one is built.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from small_networks import LeNet5, ResNetV2, SmallCNN


@dataclass(frozen=True)
class Architecture:
    """How to build one kind of network, and where its parts are.

    `build` returns the network with random weights for 1,000 classes; `imagenet` is the name of torchvision's
    weights enum, None where there are none; `head` the last linear layer; `classifier` what a new head with
    hidden layers replaces; `cam_layer` the last spatial activation, after its nonlinearity where it has one;
    `smallest` the side of the smallest images that it takes, in pixels.
    """

    title: str
    build: Callable[[], nn.Module]
    imagenet: str | None
    head: str
    classifier: str
    cam_layer: str
    smallest: int = 32


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return build


def _densenet(name: str) -> Callable[[], nn.Module]:
    # torchvision applies the final ReLU inside forward(), in place, where no hook can stand behind it. The
    # same network as a sequence has it as a module of its own; the names in the state dict stay the same.
    def build() -> nn.Module:
        network = _torchvision(name)()
        network.features.add_module("relu5", nn.ReLU(inplace=True))
        parts = {
            "features": network.features,
            "pool": nn.AdaptiveAvgPool2d(1),
            "flatten": nn.Flatten(),
            "classifier": network.classifier,
        }
        return nn.Sequential(OrderedDict(parts))

    return build


def _vgg(depth: int, cam_layer: str) -> Architecture:
    return Architecture(
        f"VGG-{depth}",
        _torchvision(f"vgg{depth}"),
        f"VGG{depth}_Weights",
        "classifier.6",
        "classifier",
        cam_layer,
    )


def _resnet(depth: int) -> Architecture:
    return Architecture(
        f"ResNet-{depth}", _torchvision(f"resnet{depth}"), f"ResNet{depth}_Weights", "fc", "fc", "layer4"
    )


def _densenet_of(depth: int) -> Architecture:
    return Architecture(
        f"DenseNet-{depth}",
        _densenet(f"densenet{depth}"),
        f"DenseNet{depth}_Weights",
        "classifier",
        "classifier",
        "features.relu5",
    )


ARCHITECTURES: dict[str, Architecture] = {
    "vgg16": _vgg(16, "features.29"),
    "vgg19": _vgg(19, "features.35"),
    "resnet18": _resnet(18),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "densenet121": _densenet_of(121),
    "densenet169": _densenet_of(169),
    "densenet201": _densenet_of(201),
    "efficientnet_b0": Architecture(
        "EfficientNet-B0",
        _torchvision("efficientnet_b0"),
        "EfficientNet_B0_Weights",
        head="classifier.1",
        classifier="classifier",
        cam_layer="features.8",
    ),
    # Its classifier begins with the normalisation and flattening that the trunk's features need anyway.
    "convnext_tiny": Architecture(
        "ConvNeXt-T",
        _torchvision("convnext_tiny"),
        "ConvNeXt_Tiny_Weights",
        head="classifier.2",
        classifier="classifier.2",
        cam_layer="features.7",
    ),
    "mobilenet_v3": Architecture(
        "MobileNetV3-Large",
        _torchvision("mobilenet_v3_large"),
        "MobileNet_V3_Large_Weights",
        head="classifier.3",
        classifier="classifier",
        cam_layer="features.16",
    ),
    "lenet5": Architecture("LeNet-5", LeNet5, None, "classifier.fc3", "classifier", "features.relu2"),
    "small_cnn": Architecture("Small CNN", SmallCNN, None, "classifier.fc", "classifier", "features.4.relu"),
    "resnet56v2": Architecture("ResNet-56 v2", ResNetV2, None, "classifier", "classifier", "relu"),
}


def architecture(name: str) -> Architecture:
    """Return the registered architecture of that name. Raises ValueError, naming all, for another one."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown network {name!r}: {meant}choose from {', '.join(ARCHITECTURES)}")
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
    """Return a network with `outputs` logits in train mode; the names of its `cam_layer` and of its new head,
    `head_name`, are attributes.

    `weights`: "imagenet" (torchvision's, IMAGENET1K_V1, from its cache or the network), "none" (random, drawn
    from torch's global generator) or a file (.safetensors, or .pth that holds tensors only) of this
    architecture with any head.
    `head_order`: None draws a new head. To keep a file's head, of the same form, give for each class of the new
    network its index among the file's classes; of a single output, which is for class 1 of two, (1, 0) turns
    the sign.
    `hidden_units`: None puts a new last linear layer in place of the old one; a sequence of widths, which may
    be empty, a new head in place of the whole classifier: a linear layer and ReLU a width, dropout, a last
    linear layer. `dropout` is the new head's rate, or replaces the rate of the network's own dropout layers.
    `residual_gain` is what random weights of torchvision's ResNets have as the scale of the last batch
    normalisation in each residual block: 1 is torchvision's, 0 that of Goyal et al. 2017 (arXiv:1706.02677,
    section 5.1). Below 1 the shortcuts lead at first, receptive fields start small, and a network that
    learns from scratch ends up looking at lesions instead of between them.

    Raises FileNotFoundError or ValueError, with the remedy, where weights are missing or do not fit.
    """
    kind = architecture(name)
    network = kind.build()
    _scale_residuals(network, residual_gain)
    state = {} if weights == "none" else _starting_weights(name, weights)
    if hidden_units is None:
        network.head_name = kind.head
        _set_submodule(network, kind.head, nn.Linear(network.get_submodule(kind.head).in_features, outputs))
        if dropout is not None:
            _set_dropout(network, dropout, kind.title)
    else:
        network.head_name = kind.classifier
        width = _linear_layers(network.get_submodule(kind.classifier))[0].in_features
        _set_submodule(network, kind.classifier, _new_head(width, hidden_units, dropout, outputs))
    network.cam_layer = kind.cam_layer
    if state:
        _load_weights(network, state, kind, head_order, source=weights)
    return network


def _scale_residuals(network: nn.Module, gain: float) -> None:
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            nn.init.constant_(last.weight, gain)


def _set_dropout(network: nn.Module, rate: float, title: str) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if not layers:
        raise ValueError(f"{title} has no dropout layers: give it a head that has one with hidden_units = []")
    for layer in layers:
        layer.p = rate


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _new_head(width: int, hidden_units: Sequence[int], dropout: float | None, outputs: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, units in enumerate(hidden_units, 1):
        parts |= {f"hidden{number}": nn.Linear(width, units), f"relu{number}": nn.ReLU(inplace=True)}
        width = units
    if dropout is not None:
        parts["dropout"] = nn.Dropout(dropout)
    parts["last"] = nn.Linear(width, outputs)
    return nn.Sequential(parts)


def class_logits(output: Tensor) -> Tensor:
    """Return (N, C) logits of classes for a network's (N, outputs) output.

    A single output z, the logit of class 1 of 2, becomes the pair (-z/2, z/2), whose softmax is exactly
    (1 - sigmoid(z), sigmoid(z)); more than one are what they are.
    """
    return torch.cat([-output / 2, output / 2], dim=-1) if output.shape[-1] == 1 else output


def set_training_mode(
    network: nn.Module, *, trainable: Literal["all", "head"] = "all", frozen_batch_norm: bool = False
) -> None:
    """Say which parameters learn, and put each part of the network into train or eval mode accordingly.

    "head": the new head alone learns and is in train mode; all else is as at inference, so that neither
    running statistics nor dropout move it. "all": everything learns. `frozen_batch_norm` then keeps the
    batch normalisations outside the head in eval mode: their weights learn, their running statistics stay.
    `network.train()` undoes the modes: call this again after it.
    """
    if trainable not in ("all", "head"):
        raise ValueError(f"trainable must be 'all' or 'head', not {trainable!r}")
    head = network.get_submodule(network.head_name)
    network.requires_grad_(trainable == "all").train(trainable == "all")
    head.requires_grad_(True).train()
    if frozen_batch_norm:
        within = set(head.modules())
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module not in within:
                module.eval()


def trunk_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the (N, D) input of the network's head for (N, 3, H, W) images: `head(trunk_features(x))` is
    `network(x)`, so a frozen trunk has to run once only. In the network's present mode.
    """
    return _input_of(network.get_submodule(network.head_name), network, images)


def embeddings(network: nn.Module, images: Tensor) -> Tensor:
    """Return the (N, D) input of the last linear layer for (N, 3, H, W) images, in the present mode."""
    return _input_of(_linear_layers(network.get_submodule(network.head_name))[-1], network, images)


def _input_of(module: nn.Module, network: nn.Module, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    return kept[0]


def _starting_weights(name: str, weights: str) -> dict[str, Tensor]:
    if weights == "imagenet":
        return imagenet_weights(name)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {weights}: give a file, 'imagenet' or 'none'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the formats' readers raise types of their own for a file that is not theirs
        raise ValueError(f"{path} holds no readable weights: {str(error).splitlines()[0]}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict (names to tensors): save one with model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Return torchvision's ImageNet state dict for a registered architecture, its names as ours.

    Raises FileNotFoundError, naming the file, its folder and the alternatives, where it is neither in the
    cache nor to be had from the network.
    """
    from torchvision import models

    if architecture(name).imagenet is None:
        have = ", ".join(other for other, kind in ARCHITECTURES.items() if kind.imagenet)
        raise ValueError(
            f"{name} has no ImageNet weights: train it with --weights none or --weights FILE, or choose from {have}"
        )
    enum = models.get_weight(f"{architecture(name).imagenet}.IMAGENET1K_V1")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(enum.url).name
    try:
        state = enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        raise FileNotFoundError(
            f"no ImageNet weights for {name} and no way to fetch them ({error}): put {file.name} from {enum.url} "
            f"into {folder}, or train with --weights none or --weights FILE"
        ) from None
    except Exception as error:
        raise ValueError(f"{file} is damaged, delete it: {str(error).splitlines()[0]}") from None
    return {_present_name(key): value for key, value in state.items()}


def _present_name(key: str) -> str:
    # torchvision's DenseNet files are older than its module names: denselayer1.norm.1 is now norm1.
    parts = key.split(".")
    for i in range(len(parts) - 1):
        if parts[i] in ("norm", "relu", "conv") and parts[i + 1].isdigit():
            return ".".join([*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]])
    return key


def _load_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    kind: Architecture,
    head_order: Sequence[int] | None,
    *,
    source: str,
) -> None:
    own = network.state_dict()
    new = {key for key in own if key.startswith(f"{network.head_name}.")} if head_order is None else set()
    wrong = [
        key
        for key, value in own.items()
        if key not in new
        and (key not in state or state[key].shape != value.shape)
        # Older files lack these counters, which a trained network does not use.
        and not (key.endswith("num_batches_tracked") and key not in state)
    ]
    # A file may come with another head in place of the classifier, or with the classifier that ours replaced.
    wrong += [key for key in state if key not in own and not key.startswith(f"{kind.classifier}.")]
    if wrong:
        raise ValueError(
            f"the weights {source} are not of a {kind.title}: {len(wrong)} names or shapes differ, for example "
            f"{wrong[0]}"
        )
    network.load_state_dict(own | {key: state[key] for key in own if key in state and key not in new})
    if head_order is not None:
        _reorder(_linear_layers(network.get_submodule(network.head_name))[-1], list(head_order))


@torch.no_grad()
def _reorder(last: nn.Linear, order: list[int]) -> None:
    for parameter in last.parameters():
        if last.out_features == len(order):
            parameter.copy_(parameter[order])
        elif order == [1, 0]:  # one output for two classes, the logit of class 1
            parameter.neg_()


def add_batch_norm(network: nn.Module) -> None:
    """Put batch normalisation behind every convolution of a network that has none, to train it from random
    weights; `fold_batch_norm` takes it out again.

    A VGG-16 hardly starts to learn otherwise: towards its end all images look the same to it.
    """
    for name, conv in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]:
        _set_submodule(network, name, nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))


def fold_batch_norm(network: nn.Module) -> None:
    """Undo `add_batch_norm`: each normalisation, at inference an affine map, becomes part of its convolution.

    Outputs in eval mode stay the same (to rounding), and the network is the ordinary one again.
    """
    network.eval()
    for name, pair in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Sequential)]:
        if len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], _BatchNorm):
            _set_submodule(network, name, fuse_conv_bn_eval(*pair))


def _set_submodule(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def parameter_count(network: nn.Module) -> int:
    """Return the number of parameters, trainable or not; buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def resolve_device(device: str = "auto") -> torch.device:
    """Return the device of that name; "auto" is the first CUDA GPU, Apple's GPU or the CPU.

    Raises ValueError for one that is unknown or not there.
    """
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        named = torch.device(device)
        if named.type in ("cpu", "cuda", "mps"):
            torch.empty(0, device=named)
            return named
    except (RuntimeError, AssertionError, NotImplementedError):
        pass  # torch has a type for each reason why a device is not there; the answer is the same
    raise ValueError(f"no device {device!r} on this machine: try --device cpu")
