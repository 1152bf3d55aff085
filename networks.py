"""Architectures, heads, the layer for Grad-CAM; saving and loading a trained network.

Stands under the command line too, so torchvision's models are imported only when one is built.
"""

import difflib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils import Preprocessing


@dataclass(frozen=True)
class Architecture:
    """How to build one kind of network, and where its parts are.

    `build` returns the network with random weights for 1,000 classes; `imagenet` is the name of torchvision's
    weights enum; `head` the last linear layer; `cam_layer` the last spatial activation, after its ReLU.
    """

    title: str
    build: Callable[[], nn.Module]
    imagenet: str
    head: str
    cam_layer: str


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return build


def _densenet121() -> nn.Module:
    # torchvision applies the final ReLU inside forward(), in place, where no hook can stand behind it. The
    # same network as a sequence has it as a module of its own; the names in the state dict stay the same.
    network = _torchvision("densenet121")()
    network.features.add_module("relu5", nn.ReLU(inplace=True))
    parts = {
        "features": network.features,
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": network.classifier,
    }
    return nn.Sequential(OrderedDict(parts))


ARCHITECTURES: dict[str, Architecture] = {
    "vgg16": Architecture(
        "VGG-16", _torchvision("vgg16"), "VGG16_Weights", head="classifier.6", cam_layer="features.29"
    ),
    "resnet18": Architecture(
        "ResNet-18", _torchvision("resnet18"), "ResNet18_Weights", head="fc", cam_layer="layer4"
    ),
    "densenet121": Architecture(
        "DenseNet-121", _densenet121, "DenseNet121_Weights", head="classifier", cam_layer="features.relu5"
    ),
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
    num_classes: int,
    *,
    weights: str = "none",
    dropout: float | None = None,
    residual_gain: float = 1.0,
) -> nn.Module:
    """Return a network for `num_classes` classes in train mode, its `cam_layer` noted as an attribute.

    `weights`: "imagenet" (torchvision's, IMAGENET1K_V1, from its cache or the network), "none" (random, drawn
    from torch's global generator) or a file (.safetensors, or .pth that holds tensors only) of this
    architecture with any number of classes; the head is new unless the file has one of `num_classes`.
    `dropout` replaces the rate of the network's dropout layers. `residual_gain` is what random weights have
    as the scale of the last batch normalisation in each residual block: 1 is torchvision's, 0 that of Goyal
    et al. 2017 (arXiv:1706.02677, section 5.1). Below 1 the shortcuts lead at first, receptive fields start
    small, and a network that learns from scratch ends up looking at lesions instead of between them.

    Raises FileNotFoundError or ValueError, with the remedy, where weights are missing or do not fit.
    """
    from torchvision import models

    kind = architecture(name)
    network = kind.build()
    for block in network.modules():
        if isinstance(block, models.resnet.BasicBlock | models.resnet.Bottleneck):
            last = block.bn2 if isinstance(block, models.resnet.BasicBlock) else block.bn3
            nn.init.constant_(last.weight, residual_gain)
    state = {} if weights == "none" else _starting_weights(name, weights)
    _replace_head(network, kind.head, num_classes)
    if state:
        _load_trunk(network, state, kind, source=weights)
    if dropout is not None:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    network.cam_layer = kind.cam_layer
    return network


def _replace_head(network: nn.Module, head: str, num_classes: int) -> None:
    in_features = network.get_submodule(head).in_features
    _set_submodule(network, head, nn.Linear(in_features, num_classes))


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


def _load_trunk(network: nn.Module, state: Mapping[str, Tensor], kind: Architecture, *, source: str) -> None:
    own = network.state_dict()
    head = {f"{kind.head}.weight", f"{kind.head}.bias"}
    wrong = [
        key
        for key, value in own.items()
        if key not in head
        and (key not in state or state[key].shape != value.shape)
        # Older files lack these counters, which a trained network does not use.
        and not (key.endswith("num_batches_tracked") and key not in state)
    ]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ValueError(
            f"the weights {source} are not of a {kind.title}: {len(wrong)} names or shapes differ, for example "
            f"{wrong[0]}"
        )
    fits = {key: value for key, value in state.items() if value.shape == own[key].shape}
    network.load_state_dict(own | fits)


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
        if [type(module) for module in pair] == [nn.Conv2d, nn.BatchNorm2d]:
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


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` holds: all that is needed to use a trained network, and where it came from.

    `temperature` divides the logits before the softmax (fitted on validation data, Guo et al. 2017);
    `thresholds` are per-class decision thresholds where the task needs them, else None: the class with
    the highest probability is predicted. `origin` (study, seed, versions, commit, data fingerprint, …) and
    `validation` (loss, accuracy, …) are for people.
    """

    architecture: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cam_layer: str
    head: str = "softmax"
    multilabel: bool = False
    lung_masking: bool = False
    thresholds: tuple[float, ...] | None = None
    temperature: float = 1.0
    origin: Mapping[str, object] = field(default_factory=dict)
    validation: Mapping[str, object] = field(default_factory=dict)

    @property
    def preprocessing(self) -> Preprocessing:
        """What an X-ray goes through before this network sees it."""
        return Preprocessing(self.image_size, self.mean, self.std)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (N, C) calibrated probabilities for (N, C) logits."""
        return (logits.float() / self.temperature).softmax(dim=-1)


class TrainedNetwork(NamedTuple):
    """A network in eval mode, and its card."""

    network: nn.Module
    card: ModelCard


def save_network(folder: Path, network: nn.Module, card: ModelCard) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    weights, text = folder / "model.safetensors", folder / "model.json"
    save_file(state, weights.with_suffix(".tmp"))
    os.replace(weights.with_suffix(".tmp"), weights)
    text.with_suffix(".tmp").write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    os.replace(text.with_suffix(".tmp"), text)


def read_card(folder: Path) -> ModelCard:
    """Read `model.json` of a run folder.

    Raises FileNotFoundError where there is none, ValueError where it is not one of ours.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no trained model in {folder}: run notebook 2, or give a folder that has one"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        tuples = {key: tuple(fields[key]) for key in ("classes", "mean", "std")}
        card = ModelCard(**(fields | tuples))
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a model card of this project: {error}") from None
    architecture(card.architecture)
    return card


def load_network(folder: Path, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Load the trained network of a run folder, in eval mode, with its parameters frozen.

    Raises FileNotFoundError or ValueError where the folder holds none, or a damaged one.
    """
    card = read_card(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: run notebook 2 again")
    # Random numbers for weights that the file replaces would take longer than all the rest.
    with torch.device("meta"):
        network = build_network(card.architecture, len(card.classes))
    try:
        with torch.inference_mode(False):  # inference tensors could not be explained later
            network.load_state_dict(load_file(weights), assign=True)
    except Exception as error:
        raise ValueError(
            f"{weights} is damaged or not of this model.json: {str(error).splitlines()[0]}"
        ) from None
    network.cam_layer = card.cam_layer
    network.requires_grad_(False)
    return TrainedNetwork(network.eval().to(device), card)


def run_folder(model: str | Path, runs: Path | None = None) -> Path:
    """Return the run folder that `model` names: a folder, or STUDY/NETWORK below `runs` (default: `runs/`
    here or in the project).

    Raises FileNotFoundError, with the models that are there, where it names none.
    """
    bases = [runs] if runs is not None else [Path("runs"), Path(__file__).resolve().parent / "runs"]
    for folder in (Path(model), *(base / model for base in bases)):
        if (folder / "model.json").is_file():
            return folder
    known = sorted(
        {card.parent.relative_to(base).as_posix() for base in bases for card in base.glob("*/*/model.json")}
    )
    there = f"; there are {', '.join(known)}" if known else ""
    raise FileNotFoundError(f"no trained model {str(model)!r}: run notebook 2, or give a run folder{there}")
