"""A trained network: its card, its weights on disk, and all that inference needs of both.

Stands under the command line too, so nothing heavy is imported at the top.
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

from decisions import decide
from networks import architecture, build_network, class_logits, embeddings
from utils import Preprocessing, read_xray, write_whole


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` holds: all that is needed to use a trained network, and where it came from.

    `head`: "softmax", or "sigmoid" where one output tells two classes apart; `multilabel` networks have an
    output a finding, each with a sigmoid of its own. `hidden_units` and `dropout` are as `build_network`
    takes them. `temperature` divides the logits (fitted on validation data, Guo et al. 2017); `thresholds`
    are a decision threshold a class, None for a class that has none of its own, see `decisions.decide`: of two
    classes that is the one that is not `positive`, of findings those that validation could not choose one for.
    `positive` is the positive one of two classes. `unreported` are findings that all or none of the training images
    have: the network could not learn them, and their probability is NaN. `lung_masking`: X-rays are masked by the
    lung segmentation in the run folder's `lungs`. `origin` (study, seed, versions, commit, data fingerprint, …) and
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
        """STUDY/NETWORK as far as the card knows the study: the end of the path of its run folder."""
        study = self.origin.get("study", {}).get("name")
        return f"{study}/{self.architecture}" if study else self.architecture

    @property
    def outputs(self) -> int:
        """How many logits the network has: one for two classes behind a sigmoid, else one a class."""
        single = self.head == "sigmoid" and len(self.classes) == 2 and not self.multilabel
        return 1 if single else len(self.classes)

    @property
    def positive_index(self) -> int | None:
        """The index of the positive one of two classes; None for more classes and for findings.

        In runs from before there was `positive` it was class 1.
        """
        if self.multilabel or len(self.classes) != 2:
            return None
        return 1 if self.positive is None else self.classes.index(self.positive)

    @property
    def undecided(self) -> tuple[str, ...]:
        """The findings that are reported but have no threshold beside others that have one: never said to be there."""
        if not self.multilabel or self.thresholds is None:
            return ()
        named = zip(self.classes, self.thresholds, strict=True)
        return tuple(name for name, t in named if t is None and name not in self.unreported)

    @property
    def preprocessing(self) -> Preprocessing:
        """What an X-ray goes through before this network sees it.

        Raises ValueError where lungs are to be masked, for which the card alone has no means.
        """
        if self.lung_masking:
            raise ValueError("this network was trained on masked lungs: use TrainedNetwork.preprocessing")
        return Preprocessing(self.image_size, self.mean, self.std)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (N, C) probabilities for the network's (N, outputs) logits: calibrated, summing to 1; or, of a
        multi-label network, each finding's own, NaN for those that are not reported. Those are not calibrated: a
        loss that weighs rare positives raises them, so compare them with the thresholds.
        """
        if self.multilabel:
            unknown = torch.tensor([name in self.unreported for name in self.classes], device=logits.device)
            return (logits.float() / self.temperature).sigmoid().masked_fill(unknown, torch.nan)
        return (class_logits(logits.float()) / self.temperature).softmax(dim=-1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return (N,) class indices for (N, C) probabilities; multi-label, (N, C) bool: is the finding there?

        By the thresholds of the card, see `decisions.decide`.
        """
        # In double precision: a threshold that was taken from a float32 probability stays equal to it.
        values = probabilities.double().cpu().numpy()
        return torch.from_numpy(decide(values, self.thresholds, multilabel=self.multilabel))


def ensemble_card(cards: Sequence[ModelCard]) -> ModelCard:
    """Return the first of several networks' cards with the decision thresholds of their mean probabilities:
    the means of theirs, None for a class that has none in one of them, or None unless all have some. What one of
    them does not report, they do not report together.

    Raises ValueError where they do not have the same classes in the same order, or another positive one.
    """
    first = cards[0]
    for card in cards[1:]:
        if (card.classes, card.multilabel) != (first.classes, first.multilabel):
            raise ValueError(
                f"an ensemble needs the same classes in the same order: {first.name} has "
                f"{', '.join(first.classes)}; {card.name} has {', '.join(card.classes)}"
            )
        if card.positive_index != first.positive_index:
            one, other = (c.classes[c.positive_index] for c in (first, card))
            raise ValueError(
                f"an ensemble needs one positive class, not {one} and {other}: train one of them again"
            )
    unreported = tuple(name for name in first.classes if any(name in card.unreported for card in cards))
    thresholds = None
    if all(card.thresholds is not None for card in cards):
        values = np.array([card.thresholds for card in cards], dtype=np.float64).mean(axis=0).tolist()
        thresholds = tuple(None if np.isnan(value) else value for value in values)
    return replace(first, thresholds=thresholds, unreported=unreported)


class TrainedNetwork(NamedTuple):
    """A network in eval mode, its card and, where it was trained on masked lungs, what masks them: a callable
    that returns an (H, W) uint8 X-ray with all but its lungs blackened.
    """

    network: nn.Module
    card: ModelCard
    lungs: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """What an X-ray goes through before this network sees it, the masking of lungs included."""
        if self.card.lung_masking and self.lungs is None:
            raise ValueError("this network was trained on masked lungs: load it with load_network")
        return replace(replace(self.card, lung_masking=False).preprocessing, lungs=self.lungs)


def embeddings_of(trained: TrainedNetwork, paths: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Return the (N, D) float32 input of a trained network's last linear layer for the X-rays in files."""
    device = next(trained.network.parameters()).device
    found = []
    for start in range(0, len(paths), batch_size):
        xrays = [trained.preprocessing(read_xray(path)) for path in list(paths)[start : start + batch_size]]
        with torch.inference_mode():
            found.append(embeddings(trained.network, torch.stack(xrays).to(device)).cpu().numpy())
    return np.concatenate(found)


def save_network(folder: Path, network: nn.Module, card: ModelCard) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    write_whole(folder / "model.safetensors", partial(save_file, state))
    write_whole(folder / "model.json", json.dumps(asdict(card), indent=2) + "\n")


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
        if fields.get("kind") == "lung segmentation":
            raise TypeError("it is a lung segmentation, see lung_segmentation.py predict")
        tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
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
        network = build_network(
            card.architecture, card.outputs, dropout=card.dropout, hidden_units=card.hidden_units
        )
    try:
        with torch.inference_mode(False):  # inference tensors could not be explained later
            network.load_state_dict(load_file(weights), assign=True)
    except Exception as error:
        raise ValueError(
            f"{weights} is damaged or not of this model.json: {str(error).splitlines()[0]}"
        ) from None
    network.cam_layer = card.cam_layer
    network.requires_grad_(False)
    lungs = _lung_masking(folder, device) if card.lung_masking else None
    return TrainedNetwork(network.eval().to(device), card, lungs)


def _lung_masking(folder: Path, device: str | torch.device) -> Callable[[np.ndarray], np.ndarray]:
    # Imported here: most runs have no use for it, and it needs more packages than one X-ray's answer does.
    from lung_masking import LungMasking
    from segmentation import load_segmenter

    return LungMasking(load_segmenter(folder / "lungs", device))


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
