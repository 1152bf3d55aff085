"""A trained network: its model card, its weights on disk, and how both are loaded.

The command line answers one X-ray with this module, so heavy packages are not imported at the top.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inference.decisions import decide
from networks import architecture, build_network, class_logits, embeddings
from utils import Preprocessing, read_xray, write_whole


@dataclass(frozen=True)
class ModelCard:
    """The content of `model.json`: all that is needed to use a trained network, and where it came from.

    Attributes:
        architecture: A name in `networks.ARCHITECTURES`.
        classes: The names of the classes, or of the findings of a multi-label network.
        image_size: Side of the input in pixels.
        mean: Mean of each channel, for `Preprocessing`.
        std: Standard deviation of each channel, for `Preprocessing`.
        cam_layer: The layer that maps are taken from.
        head: "softmax"; or "sigmoid": one output distinguishes two classes.
        multilabel: Whether the network has one output for each finding, each with its own sigmoid.
        lung_masking: Whether X-rays are masked by the lung model in the run folder's `lungs`.
        thresholds: Decision thresholds by class, see `inference.decisions.decide`. None for a class without one: the
            class of two that is not `positive`, or a finding for which validation gave no threshold.
        temperature: Divides the logits; fitted on validation data (Guo et al. 2017).
        positive: The positive one of two classes.
        unreported: Findings that all or none of the training images have. The network could not learn them; their
            probability is NaN.
        origin: Study, seed, versions, commit, data fingerprint, …; a record for the reader.
        validation: Loss, accuracy, …; a record for the reader.
        hidden_units: As `build_network` takes it.
        dropout: As `build_network` takes it.
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
    thresholds: tuple[float | None, ...] | None = None
    temperature: float = 1.0
    positive: str | None = None
    unreported: tuple[str, ...] = ()
    origin: Mapping[str, object] = field(default_factory=dict)
    validation: Mapping[str, object] = field(default_factory=dict)
    hidden_units: tuple[int, ...] | None = None
    dropout: float | None = None

    @property
    def name(self) -> str:
        """STUDY/NETWORK, or the network alone where the card does not know the study."""
        study = self.origin.get("study", {}).get("name")
        return f"{study}/{self.architecture}" if study else self.architecture

    @property
    def outputs(self) -> int:
        """The number of logits: one for two classes with a sigmoid, else one for each class."""
        single = self.head == "sigmoid" and len(self.classes) == 2 and not self.multilabel
        return 1 if single else len(self.classes)

    @property
    def positive_index(self) -> int | None:
        """The index of the positive one of two classes; None for more classes and for findings.

        In older cards, which have no `positive`, it is class 1.
        """
        if self.multilabel or len(self.classes) != 2:
            return None
        return 1 if self.positive is None else self.classes.index(self.positive)

    @property
    def undecided(self) -> tuple[str, ...]:
        """The reported findings that are never predicted: they have no threshold, and others have one."""
        if not self.multilabel or self.thresholds is None:
            return ()
        named = zip(self.classes, self.thresholds, strict=True)
        return tuple(name for name, t in named if t is None and name not in self.unreported)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (N, C) probabilities for the network's (N, outputs) logits.

        Single-label: calibrated; each row sums to 1. Multi-label: the probability of each finding, NaN for unreported
        findings. They are not calibrated: a loss that weighs rare positives raises them. So compare them with the
        thresholds.
        """
        if self.multilabel:
            unreported = torch.tensor([name in self.unreported for name in self.classes], device=logits.device)
            return (logits.float() / self.temperature).sigmoid().masked_fill(unreported, torch.nan)
        return (class_logits(logits.float()) / self.temperature).softmax(dim=-1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return decisions for (N, C) probabilities by the card's thresholds, see `inference.decisions.decide`.

        Single-label: (N,) class indices. Multi-label: (N, C) bool.
        """
        # In double precision, a threshold stays equal to the float32 probability that it was taken from.
        values = probabilities.double().cpu().numpy()
        return torch.from_numpy(decide(values, self.thresholds, multilabel=self.multilabel))


def ensemble_card(cards: Sequence[ModelCard]) -> ModelCard:
    """Return the first card, with the thresholds and unreported findings of the whole ensemble.

    Each threshold is the mean of the networks' thresholds. A class has no threshold if any network has none for it.
    If any network has no thresholds at all, no class has one. A finding is reported only if all networks report it.

    Raises:
        ValueError: The networks differ in their classes, in the order of the classes, or in the positive class.
    """
    first = cards[0]
    for card in cards[1:]:
        if (card.classes, card.multilabel) != (first.classes, first.multilabel):
            both = "; ".join(f"{c.name} has {', '.join(c.classes)}" for c in (first, card))
            raise ValueError(f"an ensemble needs the same classes in the same order: {both}")
        if card.positive_index != first.positive_index:
            names = " and ".join(c.classes[c.positive_index] for c in (first, card))
            raise ValueError(f"an ensemble needs one positive class, not {names}: train one of them again")
    unreported = tuple(name for name in first.classes if any(name in card.unreported for card in cards))
    thresholds = None
    if all(card.thresholds is not None for card in cards):
        means = np.array([card.thresholds for card in cards], dtype=np.float64).mean(axis=0).tolist()
        thresholds = tuple(None if np.isnan(mean) else mean for mean in means)
    return replace(first, thresholds=thresholds, unreported=unreported)


class TrainedNetwork(NamedTuple):
    """A network in eval mode, and its card.

    `lungs` is for networks that were trained on masked lungs: a function from (H, W) uint8 X-rays to X-rays that are
    black outside the lungs (a `lungs.masking.LungMasking`).
    """

    network: nn.Module
    card: ModelCard
    lungs: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device

    @property
    def preprocessing(self) -> Preprocessing:
        """The steps from an X-ray to the network's input, with the masking of lungs."""
        if self.card.lung_masking and self.lungs is None:
            raise ValueError("this network was trained on masked lungs: load it with load_network")
        return Preprocessing(self.card.image_size, self.card.mean, self.card.std, self.lungs)


def embeddings_of(trained: TrainedNetwork, paths: Sequence[str]) -> np.ndarray:
    """Return the (N, D) float32 inputs of a trained network's last linear layer for the X-rays in N files."""
    parts = []
    for start in range(0, len(paths), 32):
        xrays = [trained.preprocessing(read_xray(path)) for path in list(paths)[start : start + 32]]
        with torch.inference_mode():
            parts.append(embeddings(trained.network, torch.stack(xrays).to(trained.device)).cpu().numpy())
    return np.concatenate(parts)


def save_network(folder: Path, network: nn.Module, card: ModelCard) -> None:
    """Write `model.safetensors` and `model.json` into a folder, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_whole(folder / "model.safetensors", partial(save_file, state))
    write_whole(folder / "model.json", json.dumps(asdict(card), indent=2) + "\n")


def read_card(folder: Path) -> ModelCard:
    """Return the model card in a run folder.

    Raises:
        FileNotFoundError: There is no `model.json`.
        ValueError: It is no model card of this project.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"no trained model in {folder}: run notebook 2, or give a folder that has one")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("kind") == "lung segmentation":
            raise TypeError("it is a lung segmentation, see lung_segmentation.py predict")
        tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        card = ModelCard(**(fields | tuples))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a model card of this project: {error}") from None
    architecture(card.architecture)
    return card


def load_network(folder: Path, device: str | torch.device = "cpu") -> TrainedNetwork:
    """Return the trained network in a run folder, in eval mode, with frozen parameters.

    Raises:
        FileNotFoundError: The folder holds no network.
        ValueError: The network is damaged.
    """
    card = read_card(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors: run notebook 2 again")
    # On the meta device no random weights are drawn. Drawing them takes longer than all the rest.
    with torch.device("meta"):
        network = build_network(card.architecture, card.outputs, dropout=card.dropout, hidden_units=card.hidden_units)
    try:
        with torch.inference_mode(False):  # maps need gradients, which inference tensors cannot have
            network.load_state_dict(load_file(weights), assign=True)
    except Exception as error:
        raise ValueError(f"{weights} is damaged or not of this model.json: {str(error).splitlines()[0]}") from None
    network.cam_layer = card.cam_layer
    network.requires_grad_(False)
    lungs = None
    if card.lung_masking:
        # Imported here: most networks do not need these modules, which take a second.
        from lungs.masking import LungMasking
        from lungs.segmentation import load_segmenter

        lungs = LungMasking(load_segmenter(folder / "lungs", device))
    return TrainedNetwork(network.eval().to(device), card, lungs)


def run_folder(model: str | Path, runs: Path | None = None) -> Path:
    """Return the run folder that `model` names: a folder, or STUDY/NETWORK below `runs`.

    Args:
        model: A path, or STUDY/NETWORK.
        runs: A folder of studies (default: `runs/` in the working folder or in the project).

    Raises:
        FileNotFoundError: There is no such model. The message lists the existing ones.
    """
    bases = [runs] if runs is not None else [Path("runs"), Path(__file__).resolve().parents[1] / "runs"]
    for folder in (Path(model), *(base / model for base in bases)):
        if (folder / "model.json").is_file():
            return folder
    models = {card.parent.relative_to(base).as_posix() for base in bases for card in base.glob("*/*/model.json")}
    choice = f"; there are {', '.join(sorted(models))}" if models else ""
    raise FileNotFoundError(f"no trained model {str(model)!r}: run notebook 2, or give a run folder{choice}")
