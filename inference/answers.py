"""The answer to one X-ray: a record of the predictions, and the overlays, which are written to files."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cams.heatmaps import boxes_from_map, draw_boxes, overlay, with_colour_bar
from cams.methods import METHODS
from inference.explanations import cam_of, explain
from inference.trained_networks import ModelCard, TrainedNetwork, ensemble_card
from inference.xray_files import check_replaceable, write_overlay
from utils import read_xray

# A function of an (H, W) uint8 X-ray. It returns the (H, W) bool lungs and why they are implausible, or None.
LungFinder = Callable[[np.ndarray], tuple[np.ndarray, str | None]]


class MapOptions(NamedTuple):
    """How maps are made and drawn."""

    method: str  # `method` and `layer` as `explain` takes them
    layer: tuple[str, ...] | None
    alpha: float  # `alpha` and `colormap` as `overlay` takes them
    colormap: str
    boxes: float | None  # boxes enclose what is above this share of a map's maximum; None: no boxes
    bar: bool  # whether a colour bar is drawn


class Question(NamedTuple):
    """The networks and the options that are used for every X-ray."""

    members: Sequence[TrainedNetwork]
    classes: str | list[int]  # of the maps: "top" or indices
    options: MapOptions
    lungs: LungFinder | None = None


def check_layers(members: Sequence[TrainedNetwork], layer: Sequence[str]) -> None:
    """Raise ValueError, naming the network, unless every network can be explained at these layers.

    Only a forward pass shows whether a layer gives a map, so each network is run once, on a black image.
    """
    for member in members:
        size = member.card.image_size
        try:
            with cam_of(member, layer=layer) as cam:
                maps = cam(torch.zeros(1, 3, size, size, device=member.device)).layers
            if flat := [name for name, m in zip(cam.layers, maps, strict=True) if m.raw.shape[2:] == (1, 1)]:
                raise ValueError(f"layer {flat[0]!r} has one cell, which is no map: take one before pooling")
        except ValueError as error:
            raise ValueError(f"{member.card.architecture}: {error}") from None


# --- lungs --------------------------------------------------------------------------------------------------


def lung_folder(option: str | None, cards: Sequence[ModelCard], folder: Path) -> Path | None:
    """Return the folder of the lung model to load, or None if no model is to be loaded.

    The default is `lungs` beside the studies of the run `folder`, if a model is there and no network masks lungs.
    """
    if option is not None:
        return None if option == "none" else Path(option)
    lungs = folder.parent.parent / "lungs"
    return None if any(card.lung_masking for card in cards) or not (lungs / "model.json").is_file() else lungs


def lung_finder(
    option: str | None, folder: Path | None, members: Sequence[TrainedNetwork], device: torch.device
) -> LungFinder | None:
    """Return the function that finds an X-ray's lungs, or None if there is no lung model.

    A line on stderr says if the model was trained on the synthetic phantom alone.

    Args:
        option: The option `--lungs`.
        folder: The model to load, from `lung_folder`. None: the lung model of a network that masks lungs, if any.
        members: The networks.
        device: Where the lung model runs.

    Raises:
        ValueError: The model that `option` names cannot be loaded. If the default model cannot be loaded, a line on
            stderr says so.
        OSError: The model that `option` names cannot be read.
    """
    if folder is None:
        return None if option == "none" else next(iter(_own_finders(members)), None)
    # Imported here: these modules take a second, and most runs have no lung model.
    from lungs.masking import LungMasking
    from lungs.segmentation import load_segmenter

    try:
        segmenter = load_segmenter(folder, device)
    except (ValueError, OSError) as error:
        if option is not None:
            raise
        print(f"overlay_cam.py: shares inside the lungs are left out: {error}", file=sys.stderr)
        return None
    if segmenter.phantom_only:
        print(f"overlay_cam.py: the lungs are outlined by {segmenter.knows}", file=sys.stderr)
    return LungMasking(segmenter).mask_of


def _own_finders(members: Sequence[TrainedNetwork]) -> list[LungFinder]:
    """Return the lung finders of the networks that were trained on masked lungs."""
    return [member.lungs.mask_of for member in members if member.lungs is not None]


# --- the record ---------------------------------------------------------------------------------------------


def answer(question: Question, image: Path, overlays: Sequence[Path]) -> dict[str, object]:
    """Write an image's overlays, one for each map, and return its record.

    Returns:
        These entries, without those that do not apply:

        - "image": the file
        - "networks": the number of networks of an ensemble
        - "lungs": a remark on the lungs
        - "predicted": a class; or "findings": a list, of a multi-label network
        - "probabilities", "thresholds": by class
        - "method", "layers", "boxes_above": the options
        - "maps": of each map "label", "overlay" (the file), "empty", "peak" (the raw maximum; None where several
          networks or layers have no common scale), "boxes", "in_lungs" (the share inside the lungs; None where they
          were not found)

    Raises:
        ValueError: The image cannot be read, or an overlay would replace another file. Nothing is written then.
        OSError: The image cannot be read, or an overlay cannot be written.
    """
    for path in overlays:
        check_replaceable(path)
    members, classes, options, find_lungs = question
    xray, card = read_xray(image), ensemble_card([member.card for member in members])
    classes = classes if isinstance(classes, str) else [classes]  # one row of indices for the one image
    probabilities, *maps = explain(members, xray, classes, method=options.method, layer=options.layer)
    lungs = find_lungs(xray) if find_lungs else None
    colours = {"alpha": options.alpha, "colormap": options.colormap}
    entries = []
    for path, index, map_, peak in zip(overlays, *maps, strict=True):
        peak = None if np.isnan(peak) else float(peak)
        entry = {"label": None if METHODS[options.method].needs == "activation" else card.classes[index]}
        entry |= {"overlay": str(path), "empty": not map_.any(), "peak": peak and float(f"{peak:.6g}")}
        picture = overlay(xray, map_, **colours)
        if options.boxes is not None:
            boxes = boxes_from_map(map_, options.boxes)
            entry["boxes"] = boxes.round(4).tolist()
            picture = draw_boxes(picture, boxes)
        if lungs is not None:
            entry["in_lungs"] = _share_inside(map_, *lungs)
        write_overlay(path, with_colour_bar(picture, peak=peak, **colours) if options.bar else picture, image)
        entries.append(entry)
    record = {
        "image": str(image),
        "networks": len(members) if len(members) > 1 else None,
        "lungs": _remark_on_lungs(question, xray, lungs),
        **_prediction(card, probabilities),
        "method": options.method,
        "layers": options.layer,
        "boxes_above": options.boxes,
        "maps": entries,
    }
    return {key: value for key, value in record.items() if value is not None}


def _share_inside(map_: np.ndarray, lungs: np.ndarray, reason: str | None) -> float | None:
    if reason is not None or not map_.any():
        return None
    return round(float(map_[lungs].sum(dtype=np.float64) / map_.sum(dtype=np.float64)), 4)


def _remark_on_lungs(question: Question, xray: np.ndarray, lungs: tuple[np.ndarray, str | None] | None) -> str | None:
    """Return a remark: whether the networks masked the lungs, and why another model's lungs are implausible.

    None if there is nothing to remark.
    """
    own_finders = _own_finders(question.members)
    reasons = [find_lungs(xray)[1] for find_lungs in own_finders]
    remarks = ["masked" if reason is None else f"kept whole: {reason}" for reason in reasons]
    if question.lungs not in own_finders and lungs is not None and lungs[1] is not None:
        remarks.append(f"not found ({lungs[1]})")
    return "; ".join(dict.fromkeys(remarks)) or None


def _prediction(card: ModelCard, probabilities: np.ndarray) -> dict[str, object]:
    """Return the record's entries that a network's (C,) probabilities decide."""
    decisions = card.decide(torch.from_numpy(probabilities)[None])[0]
    if card.multilabel:
        decision = {"findings": [name for name, found in zip(card.classes, decisions, strict=True) if found]}
    else:
        decision = {"predicted": card.classes[int(decisions)]}
    thresholds = dict(zip(card.classes, card.thresholds, strict=True)) if card.thresholds else {}
    values = zip(card.classes, probabilities.tolist(), strict=True)
    rounded = {name: _rounded(value, thresholds.get(name)) for name, value in values}
    return decision | {"probabilities": rounded, "thresholds": thresholds or None}


def _rounded(probability: float, threshold: float | None) -> float | None:
    """Return a probability with four digits, or with as many as keep it on its side of its threshold.

    None stands for NaN, which JSON does not have.
    """
    if math.isnan(probability):
        return None
    values = (round(probability, digits) for digits in range(4, 30))
    same_side = (v for v in values if threshold is None or (v >= threshold) == (probability >= threshold))
    return next(same_side, probability)
