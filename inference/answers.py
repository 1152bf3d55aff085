"""What networks answer about one X-ray: a record and the overlays that are written."""

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

# From an (H, W) uint8 X-ray to its (H, W) bool lungs and the reason why they are not believed, if any.
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
    """What is asked about every X-ray."""

    members: Sequence[TrainedNetwork]
    classes: str | list[int]  # of the maps: "top", "all" or indices
    options: MapOptions
    lungs: LungFinder | None = None


def check_layers(members: Sequence[TrainedNetwork], layer: Sequence[str]) -> None:
    """Raise ValueError, naming the network, unless every network can be explained at these layers.

    Only a forward pass shows whether a layer gives a map, so each network is run once, on a black image.
    """
    for member in members:
        size, device = member.card.image_size, next(member.network.parameters()).device
        try:
            with cam_of(member, layer=layer) as cam:
                maps = cam(torch.zeros(1, 3, size, size, device=device)).layers
            if flat := [name for name, m in zip(cam.layers, maps, strict=True) if m.raw.shape[2:] == (1, 1)]:
                raise ValueError(f"layer {flat[0]!r} has one cell, which is no map: take one before pooling")
        except ValueError as error:
            raise ValueError(f"{member.card.architecture}: {error}") from None


# --- lungs --------------------------------------------------------------------------------------------------


def lung_folder(wanted: str | None, cards: Sequence[ModelCard], folder: Path) -> Path | None:
    """Return the folder of the lung model to load, None where none is to be loaded.

    By default it is `lungs` beside the studies of the run `folder`, unless a network masks lungs itself.
    """
    if wanted is not None:
        return None if wanted == "none" else Path(wanted)
    place = folder.parent.parent / "lungs"
    return None if any(card.lung_masking for card in cards) or not (place / "model.json").is_file() else place


def lung_finder(
    wanted: str | None, place: Path | None, members: Sequence[TrainedNetwork], device: torch.device
) -> LungFinder | None:
    """Return the function that finds an X-ray's lungs; None where there is none.

    A line on stderr says where the model knows the synthetic phantom only.

    Args:
        wanted: The option `--lungs`.
        place: What `lung_folder` returns: the model to load. None: the model that a network masks its lungs with.
        members: The networks.
        device: Where the lung model runs.

    Raises:
        ValueError: The model that `wanted` names cannot be loaded. Of the default model, a line on stderr says so.
        OSError: It cannot be read.
    """
    if place is None:
        return None if wanted == "none" else next(iter(_own_finders(members)), None)
    # Imported here: these modules take a second, and most runs have no lung model.
    from lungs.masking import LungMasking
    from lungs.segmentation import load_segmenter

    try:
        segmenter = load_segmenter(place, device)
    except (ValueError, OSError) as error:
        if wanted is not None:
            raise
        print(f"overlay_cam.py: shares inside the lungs are left out: {error}", file=sys.stderr)
        return None
    if segmenter.phantom_only:
        print(f"overlay_cam.py: the lungs are outlined by {segmenter.knows}", file=sys.stderr)
    return LungMasking(segmenter).mask_of


def _own_finders(members: Sequence[TrainedNetwork]) -> list[LungFinder]:
    """Return what the networks that were trained on masked lungs find them with."""
    return [member.lungs.mask_of for member in members if member.lungs is not None]


# --- the record ---------------------------------------------------------------------------------------------


def answer(question: Question, image: Path, overlays: Sequence[Path]) -> dict[str, object]:
    """Write an image's overlays and return its record.

    Args:
        question: What is asked.
        image: The X-ray's file.
        overlays: The files to write, one for each map.

    Returns:
        What does not apply is left out:

        - "image": the file
        - "networks": how many, of an ensemble
        - "lungs": what is said of them
        - "predicted": a class; or "findings": a list, of a multi-label network
        - "probabilities", "thresholds": by class
        - "method", "layers", "boxes_above": the options
        - "maps": of each map "label", "overlay" (the file), "empty", "peak" (the raw maximum; None where several
          networks or layers have no common scale), "boxes", "in_lungs" (the share inside the lungs; None where they
          were not found)

    Raises:
        ValueError: The image cannot be read, or an overlay would replace a file that is no overlay. Nothing is
            written then.
        OSError: The image cannot be read, or an overlay cannot be written.
    """
    for path in overlays:
        check_replaceable(path)
    members, classes, options, lungs = question
    xray, card = read_xray(image), ensemble_card([member.card for member in members])
    classes = classes if isinstance(classes, str) else [classes]  # one row of indices for the one image
    explanation = explain(members, xray, classes, method=options.method, layer=options.layer)
    found_lungs = lungs(xray) if lungs else None
    maps = zip(explanation.classes, explanation.maps, explanation.peaks.tolist(), overlays, strict=True)
    entries = []
    for index, map_, peak, path in maps:
        peak = peak if math.isfinite(peak) else None
        entry = {"label": card.classes[index] if METHODS[options.method].needs != "activation" else None}
        entry |= {"overlay": str(path), "empty": not map_.any(), "peak": peak and float(f"{peak:.6g}")}
        boxes = None if options.boxes is None else boxes_from_map(map_, options.boxes)
        if boxes is not None:
            entry["boxes"] = boxes.round(4).tolist()
        if found_lungs is not None:
            entry["in_lungs"] = _share_inside(map_, *found_lungs)
        write_overlay(path, _picture(xray, map_, boxes, peak, options), image)
        entries.append(entry)
    record = {
        "image": str(image),
        "networks": len(members) if len(members) > 1 else None,
        "lungs": _lungs(question, xray, found_lungs),
        **_decision(card, explanation.probabilities),
        "probabilities": _probabilities(card, explanation.probabilities.tolist()),
        "thresholds": card.thresholds and dict(zip(card.classes, card.thresholds, strict=True)),
        "method": options.method,
        "layers": options.layer,
        "boxes_above": options.boxes,
        "maps": entries,
    }
    return {key: value for key, value in record.items() if value is not None}


def _picture(
    xray: np.ndarray, map_: np.ndarray, boxes: np.ndarray | None, peak: float | None, options: MapOptions
) -> np.ndarray:
    """Return the (H, W, 3) overlay of an X-ray, wider where a colour bar is drawn."""
    colours = {"alpha": options.alpha, "colormap": options.colormap}
    picture = overlay(xray, map_, **colours)
    if boxes is not None:
        picture = draw_boxes(picture, boxes)
    return with_colour_bar(picture, peak=peak, **colours) if options.bar else picture


def _share_inside(map_: np.ndarray, lungs: np.ndarray, reason: str | None) -> float | None:
    if reason is not None or not map_.any():
        return None
    return round(float(map_[lungs].sum(dtype=np.float64) / map_.sum(dtype=np.float64)), 4)


def _lungs(question: Question, xray: np.ndarray, found_lungs: tuple[np.ndarray, str | None] | None) -> str | None:
    """Return what the networks that mask lungs did with the X-ray, and why the lungs that another model found
    are not believed; None where there is nothing to say.
    """
    own_finders = _own_finders(question.members)
    reasons = [find_lungs(xray)[1] for find_lungs in own_finders]
    remarks = ["masked" if reason is None else f"kept whole: {reason}" for reason in reasons]
    if question.lungs not in own_finders and found_lungs is not None and found_lungs[1] is not None:
        remarks.append(f"not found ({found_lungs[1]})")
    return "; ".join(dict.fromkeys(remarks)) or None


def _decision(card: ModelCard, probabilities: np.ndarray) -> dict[str, object]:
    decisions = card.decide(torch.from_numpy(probabilities)[None])[0]
    if card.multilabel:
        return {"findings": [name for name, found in zip(card.classes, decisions, strict=True) if found]}
    return {"predicted": card.classes[int(decisions)]}


def _probabilities(card: ModelCard, probabilities: Sequence[float]) -> dict[str, float | None]:
    """Return the rounded probabilities by class; None instead of NaN, which JSON does not have."""
    thresholds = card.thresholds or [None] * len(card.classes)
    named = zip(card.classes, probabilities, thresholds, strict=True)
    return {name: None if math.isnan(p) else _rounded(p, threshold) for name, p, threshold in named}


def _rounded(probability: float, threshold: float | None) -> float:
    """Return a probability with four digits, or as many more as keep it on its side of its decision threshold."""
    if threshold is None:
        return round(probability, 4)
    values = (round(probability, digits) for digits in range(4, 30))
    return next((v for v in values if (v >= threshold) == (probability >= threshold)), probability)
