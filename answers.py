"""What is said of one X-ray: its record, its text and the overlays that are written."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cam_methods import METHODS
from explanations import cam_of, explain
from heatmaps import boxes_from_map, draw_boxes, overlay, with_colour_bar
from trained_networks import ModelCard, TrainedNetwork, ensemble_card
from utils import read_xray
from xray_files import check_replaceable, write_overlay

if TYPE_CHECKING:
    from lung_masking import LungMask

    LungFinder = Callable[[np.ndarray], LungMask]


class MapOptions(NamedTuple):
    """How maps are made and drawn: `method` and `layer` as `explain` takes them, `alpha` and `colormap` as
    `overlay`; `boxes` around what is above this share of a map's maximum (None: no boxes); `bar`: a colour bar.
    """

    method: str
    layer: tuple[str, ...] | None
    alpha: float
    colormap: str
    boxes: float | None
    bar: bool


def check_layers(members: Sequence[TrainedNetwork], layer: Sequence[str]) -> None:
    """Raise ValueError, naming the network, unless every network can be explained at these layers.

    Each is run once, on a black image: that a layer gives no map, only a forward pass tells.
    """
    for member in members:
        size, device = member.card.image_size, next(member.network.parameters()).device
        try:
            with cam_of(member, layer=layer) as cam:
                for name, maps in zip(
                    cam.layers, cam(torch.zeros(1, 3, size, size, device=device)).layers, strict=True
                ):
                    if maps.raw.shape[2:] == (1, 1):
                        raise ValueError(
                            f"layer {name!r} has one cell, which is no map: take one before the pooling"
                        )
        except ValueError as error:
            raise ValueError(f"{member.card.architecture}: {error}") from None


def lung_folder(wanted: str | None, cards: Sequence[ModelCard], folder: Path) -> Path | None:
    """Return the folder of the lung model that `lung_finder` loads; None where it loads none."""
    if wanted is not None:
        return None if wanted == "none" else Path(wanted)
    place = folder.parent.parent / "lungs"
    return None if any(card.lung_masking for card in cards) or not (place / "model.json").is_file() else place


def lung_finder(
    wanted: str | None, members: Sequence[TrainedNetwork], folder: Path, device: torch.device
) -> "LungFinder | None":
    """Return what finds an X-ray's lungs: the model in the folder `wanted`; by default what a network masks
    its lungs with, else the model in `lungs` beside the studies of the run `folder`, else None; None for "none".

    Raises ValueError or OSError where the model in `wanted` cannot be loaded. Of another one, that costs no
    more than the shares, a line on stderr says so, and one says so of a model that has seen no real X-ray.
    """
    if wanted == "none":
        return None
    place = lung_folder(wanted, [member.card for member in members], folder)
    if place is None:
        return next(iter(_own_finders(members)), None)
    # Imported here: they take a second, and nobody without a lung model has a use for them.
    from lung_masking import LungMasking
    from segmentation import load_segmenter

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


def _own_finders(members: Sequence[TrainedNetwork]) -> "list[LungFinder]":
    return [member.lungs.mask_of for member in members if hasattr(member.lungs, "mask_of")]


def answer(
    members: Sequence[TrainedNetwork],
    image: Path,
    wanted: str | list[int],
    outputs: Sequence[Path],
    *,
    options: MapOptions,
    lungs: "LungFinder | None" = None,
) -> dict[str, object]:
    """Write an image's overlays and return its record: probabilities, what they amount to ("predicted", or of
    a multi-label network "findings"), the decision "thresholds" where there are some, and of each map the label,
    the file, the raw maximum ("peak", None where several networks or layers have no scale in common), the "boxes"
    that were asked for and, where there is a lung model, the share inside the lungs ("in_lungs", None where they
    were not found).

    Raises ValueError or OSError where the image cannot be read or an overlay not be written, and before the first
    is written where one would replace a file that is no overlay.
    """
    for path in outputs:
        check_replaceable(path)
    xray, card = read_xray(image), ensemble_card([member.card for member in members])
    classes = wanted if isinstance(wanted, str) else [wanted]  # a row of indices for the one image
    said = explain(members, xray, classes, method=options.method, layer=options.layer)
    found = lungs(xray) if lungs else None
    colours = {"alpha": options.alpha, "colormap": options.colormap}
    entries = []
    for index, map_, peak, path in zip(said.classes, said.maps, said.peaks.tolist(), outputs, strict=True):
        peak = peak if np.isfinite(peak) else None
        label = card.classes[index] if _knows_classes(options.method) else None
        entry = {"label": label, "overlay": str(path), "empty": not map_.any()}
        entry["peak"] = None if peak is None else float(f"{peak:.6g}")
        picture = overlay(xray, map_, **colours)
        if options.boxes is not None:
            boxes = boxes_from_map(map_, options.boxes)
            picture, entry["boxes"] = draw_boxes(picture, boxes), boxes.round(4).tolist()
        if found is not None:
            entry["in_lungs"] = _share_inside(map_, found)
        picture = with_colour_bar(picture, peak=peak, **colours) if options.bar else picture
        write_overlay(path, picture, image)
        entries.append(entry)
    record = {
        "image": str(image),
        "networks": len(members) if len(members) > 1 else None,
        "lungs": _lungs(members, xray, None if lungs in _own_finders(members) else found),
        **_decision(card, said.probabilities),
        "probabilities": _probabilities(card, said.probabilities.tolist()),
        "thresholds": card.thresholds and dict(zip(card.classes, card.thresholds, strict=True)),
        "method": options.method,
        "layers": options.layer,
        "boxes_above": options.boxes,
        "maps": entries,
    }
    return {key: value for key, value in record.items() if value is not None}


def _share_inside(map_: np.ndarray, lungs: "LungMask") -> float | None:
    if lungs.reason is not None or not map_.any():
        return None
    return round(float(map_[lungs.mask].sum(dtype=np.float64) / map_.sum(dtype=np.float64)), 4)


def _probabilities(card: ModelCard, probabilities: Sequence[float]) -> dict[str, float | None]:
    """Return the probabilities by class; None instead of NaN, which JSON does not have. They have four digits, or as
    many more as it takes to stay on the same side of the decision threshold.
    """
    thresholds = card.thresholds or [None] * len(card.classes)
    named = zip(card.classes, probabilities, thresholds, strict=True)
    return {name: None if math.isnan(p) else _rounded(p, threshold) for name, p, threshold in named}


def _rounded(probability: float, threshold: float | None) -> float:
    if threshold is None:
        return round(probability, 4)
    numbers = [*(round(probability, digits) for digits in range(4, 18)), probability]
    return next(number for number in numbers if (number >= threshold) == (probability >= threshold))


def _decision(card: ModelCard, probabilities: np.ndarray) -> dict[str, object]:
    decided = card.decide(torch.from_numpy(probabilities)[None])[0]
    if card.multilabel:
        return {"findings": [name for name, there in zip(card.classes, decided, strict=True) if there]}
    return {"predicted": card.classes[int(decided)]}


def _lungs(members: Sequence[TrainedNetwork], xray: np.ndarray, other: "LungMask | None") -> str | None:
    """Return whether an X-ray's lungs were masked or why it was kept whole, where a network masks them, and
    why those that another model found, if it did, are not believed.
    """
    own = [mask_of(xray).reason for mask_of in _own_finders(members)]
    said = ["masked" if reason is None else f"kept whole: {reason}" for reason in own]
    if other is not None and other.reason is not None:
        said.append(f"not found ({other.reason})")
    return "; ".join(dict.fromkeys(said)) or None


def text_of(record: dict[str, object]) -> str:
    """Return what is printed of a record of `answer`: classes from the most probable one on, with the thresholds
    that they are compared with, what is predicted, remarks, maps.
    """
    width = max(len(name) for name in record["probabilities"])
    thresholds = record.get("thresholds", {})
    lines = [record["image"]]
    lines += [f"  {name:<{width}}  {_beside_threshold(name, record)}" for name in _ranked(record)]
    if "findings" in record:
        found = ", ".join(record["findings"]) or "none"
        by = "their thresholds" if thresholds else "probabilities of at least 0.5"
        lines.append(f"  Findings: {found} (by {by}; these probabilities are not calibrated)")
    elif thresholds:
        lines.append(f"  Predicted: {record['predicted']} ({_reason(record)})")
    if "lungs" in record:
        lines.append(f"  Lungs: {record['lungs']}")
    title = METHODS[record["method"]].title
    title += f" ({' + '.join(record['layers'])})" if "layers" in record else ""
    for entry in record["maps"]:
        of = f"for {entry['label']}" if _knows_classes(record["method"]) else "of no class"
        lines.append(f"  {title} {of}{_notes(entry, record)}: {entry['overlay']}")
    return "\n".join(lines)


def _ranked(record: dict[str, object]) -> list[str]:
    """Return the names of the classes from the most probable one on, last those without a probability."""
    probabilities = record["probabilities"]
    return sorted(probabilities, key=lambda n: math.inf if probabilities[n] is None else -probabilities[n])


def _beside_threshold(name: str, record: dict[str, object]) -> str:
    """Return a class's probability and its decision threshold, or why there is none."""
    probability, thresholds = record["probabilities"][name], record.get("thresholds")
    if probability is None:
        return "–      (not reported: all of the training images have it, or none)"
    if thresholds is None or ("predicted" in record and thresholds[name] is None):
        return f"{probability:.3f}"
    if thresholds[name] is None:
        return f"{probability:.3f}  (no decision: all of the validation images have it, or none)"
    probability, threshold = _told_apart(probability, thresholds[name])
    return f"{probability}  (decision threshold {threshold})"


def _reason(record: dict[str, object]) -> str:
    """Return why the thresholds decide on what is predicted, see `decisions.decide`."""
    thresholds = record["thresholds"]
    name = [other for other, threshold in thresholds.items() if threshold is not None][-1]
    probability, threshold = _told_apart(record["probabilities"][name], thresholds[name])
    compared = "reaches" if name == record["predicted"] else "is below"
    return f"{name}'s probability {probability} {compared} its decision threshold {threshold}"


def _told_apart(probability: float, threshold: float) -> tuple[str, str]:
    """Return both to three digits, or to as many more as it takes where they differ."""
    forms = [*(f".{digits}f" for digits in range(3, 18)), ""]
    pairs = [(format(probability, form), format(threshold, form)) for form in forms]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


def _knows_classes(method: str) -> bool:
    return METHODS[method].needs != "activation"


def _notes(entry: dict[str, object], record: dict[str, object]) -> str:
    if entry["empty"]:
        by = "; it is predicted because its decision threshold is low" if _by_threshold(entry, record) else ""
        return f" (empty: nothing in the image speaks for it{by})"
    notes = ""
    if entry.get("in_lungs") is not None:
        notes += f", {100 * entry['in_lungs']:.0f} % of it inside the lungs"
    if "boxes" in entry:
        number = len(entry["boxes"])
        notes += f", {number} region{'s' * (number != 1)} above {record['boxes_above']:g} of its maximum"
    return notes


def _by_threshold(entry: dict[str, object], record: dict[str, object]) -> bool:
    """Return whether a map's class is predicted though the network itself holds it for unlikely."""
    label = entry["label"]
    if "findings" in record:
        return label in record["findings"] and record["probabilities"][label] < 0.5
    return label == record["predicted"] != _ranked(record)[0]
