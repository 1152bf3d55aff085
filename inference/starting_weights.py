"""The weights that a training starts from: ImageNet's, none, a file, or those of a trained network."""

from pathlib import Path

from datasets import XrayTable
from inference.trained_networks import ModelCard, read_card, run_folder
from networks import architecture
from studies.settings import Study


def starting_weights(study: Study, network: str, runs: Path) -> tuple[Path | None, ModelCard | None]:
    """Return the file of the weights that a network starts from, and the model card beside it.

    The file is None for the weights "imagenet" and "none"; the card is None where there is none.

    Args:
        study: the study, whose setting `weights` names a file, a run folder, "imagenet" or "none".
        network: the name of the architecture.
        runs: the folder of all run folders.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: the network is unknown, the weights are another network's or are given for several networks, or
            the training would replace them.
    """
    architecture(network)
    weights = study.training_of(network).weights
    if weights in ("imagenet", "none"):
        return None, None
    if [study.training_of(name).weights for name in study.networks].count(weights) > 1:
        raise ValueError(f"{weights} holds one network's weights: name that network with --networks")
    file = Path(weights)
    if not file.is_file():
        try:
            file = run_folder(weights, runs) / "model.safetensors"
        except FileNotFoundError as error:
            reason = f"give a file, a run folder, 'imagenet' or 'none' ({error})"
            raise FileNotFoundError(f"no weights file {weights}: {reason}") from None
    card = read_card(file.parent) if (file.parent / "model.json").is_file() else None
    if card is not None and card.architecture != network:
        raise ValueError(f"the weights {weights} are of {card.architecture}, not of {network}")
    if file.parent.resolve() == (runs / study.name / network).resolve():
        raise ValueError(f"{file.parent} holds the weights to start from and would replace them: give another --runs")
    return file, card


def kept_head(
    card: ModelCard | None, table: XrayTable, outputs: int, hidden_units: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, str]:
    """Return whether the head of the starting weights is kept, and in which order.

    Outputs are matched by the names of their classes: an output never starts from the weights of another class.

    Args:
        card: the card beside the weights, or None.
        table: the images to train on.
        outputs: how many outputs the network needs.
        hidden_units: the layers of the network's head, as `build_network` takes them.

    Returns:
        The `head_order` that `build_network` takes, None for a new head; and the same in words.
    """
    if card is None:
        return None, "new (no model.json beside the weights names its classes)"
    names = ", ".join(card.classes)
    if set(card.classes) != set(table.classes):
        return None, f"new (that of the weights is for {names})"
    if (card.outputs, card.multilabel, card.hidden_units) != (outputs, table.multilabel, hidden_units):
        return None, "new (that of the weights has another form)"
    order = tuple(card.classes.index(name) for name in table.classes)
    return order, "kept" if card.classes == table.classes else f"reordered (in the weights: {names})"
