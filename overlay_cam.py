"""Command line: X-rays in, probabilities and overlays of class activation maps out.

    python overlay_cam.py -i IMAGE [IMAGE|FOLDER ...] -m RUN [RUN ...] [-l LABEL|all] [-o OUTPUT]
                          [--method NAME] [--layer NAME [NAME ...]] [--boxes [SHARE]] [--bar]
                          [--lungs FOLDER|none] [--alpha A] [--colormap NAME] [--device D] [--json]

Prints each class with its probability and writes, for each image, an overlay at the image's own size. Of
several runs, an ensemble, the mean is given. Where a lung model is at hand (the network's own, or the one in
`lungs` beside the studies' folders) it says how much of each map lies inside the lungs.
Exit status: 0 all done; 1 some images could not be done, the others are; 2 nothing could be done.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch

from cam_methods import METHODS, cam_method
from explanations import cam_of, explain
from heatmaps import COLORMAPS, boxes_from_map, draw_boxes, overlay, with_colour_bar
from networks import resolve_device
from trained_networks import ModelCard, TrainedNetwork, ensemble_card, load_network, read_card, run_folder
from utils import read_xray

if TYPE_CHECKING:
    from lung_masking import LungMask

    LungFinder = Callable[[np.ndarray], LungMask]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


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


def chosen_labels(label: str | None, card: ModelCard) -> str | list[int]:
    """Return which classes' maps `-l` asks for, as `GradCAM` takes them.

    An exact name comes first; otherwise case, spaces and punctuation do not matter where that leaves one
    class only: `covid_19` is `COVID-19`. Raises ValueError, naming all labels, for an unknown one.
    """
    if label is None:
        return "top"
    if label in card.classes:
        return [card.classes.index(label)]
    if label.lower() == "all":
        return "all"
    alike = [index for index, name in enumerate(card.classes) if _slug(name) == _slug(label)]
    if len(alike) != 1:
        raise ValueError(f"unknown label {label!r}: choose from {', '.join(card.classes)} or all")
    return alike


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def suffixes(wanted: str | list[int], card: ModelCard) -> list[str]:
    """Return what the name of each map's file ends in: nothing for one map, else the class, made unique."""
    if wanted != "all":
        return [""]
    slugs = [_slug(name) for name in card.classes]
    unique = len(set(slugs)) == len(slugs) and all(slugs)
    return [f"_{slug if unique else index}" for index, slug in enumerate(slugs)]


def images_in(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that are named, and from the folders that are named those with an image's suffix that
    are no overlays of ours.

    Raises ValueError for a folder without images.
    """
    files = []
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if _is_xray(file))
        if not found:
            raise ValueError(f"no images in the folder {path}: its sub-folders are not searched")
        files += found
    return list(dict.fromkeys(files))


def _is_xray(file: Path) -> bool:
    overlay_of_ours = re.search(r"_cam(_\w+)?\.png$", file.name)
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not overlay_of_ours


def output_paths(images: Sequence[Path], output: Path | None, endings: Sequence[str]) -> list[list[Path]]:
    """Return the files that each image's overlays go to, one an ending: `<name>_cam<ending>.png` in the folder
    `output` (default: here), or `output` itself where it names a PNG or JPEG file.

    Images of one name from several folders are numbered. Raises ValueError where one file would have to
    hold the overlays of several images, or where an overlay would replace an X-ray.
    """
    names = output is not None and output.suffix and not output.is_dir()
    if names and output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"cannot write {output.suffix} files: give -o a .png or .jpg file or a folder")
    if names and len(images) > 1:
        raise ValueError(f"{output} can hold one image's overlay only: give -o a folder")
    taken = {image.resolve() for image in images} if not names else set()
    paths = []
    for image in images:
        numbers = itertools.chain([""], (f"_{number}" for number in itertools.count(2)))
        for number in numbers:
            base = output if names else (output or Path()) / f"{image.stem}{number}_cam.png"
            own = [base.with_name(f"{base.stem}{ending}{base.suffix}") for ending in endings]
            if names or not taken & {path.resolve() for path in own}:
                break
        taken |= {path.resolve() for path in own}
        paths.append(own)
    originals = {image.resolve() for image in images}
    for path in itertools.chain.from_iterable(paths):
        if path.resolve() in originals:
            raise ValueError(f"{path} is an X-ray that was given: choose another -o")
    return paths


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"cannot write {path}")
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_bytes(encoded.tobytes())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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


def lung_finder(
    wanted: str | None, members: Sequence[TrainedNetwork], folder: Path, device: torch.device
) -> "LungFinder | None":
    """Return what finds an X-ray's lungs: the model in the folder `wanted`; by default what a network masks
    its lungs with, else the model in `lungs` beside the studies of the run `folder`, else None; None for "none".

    Raises ValueError or OSError where the model in `wanted` cannot be loaded. Of another one, that costs no
    more than the shares, a line on stderr says so.
    """
    own = _own_finders(members)
    place = folder.parent.parent / "lungs" if wanted is None else Path(wanted)
    if wanted == "none":
        return None
    if wanted is None and (own or not (place / "model.json").is_file()):
        return own[0] if own else None
    # Imported here: they take a second, and nobody without a lung model has a use for them.
    from lung_masking import LungMasking
    from lung_segmentation import load_segmenter

    try:
        return LungMasking(load_segmenter(place, device)).mask_of
    except (ValueError, OSError) as error:
        if wanted is not None:
            raise
        print(f"overlay_cam.py: shares inside the lungs are left out: {error}", file=sys.stderr)
        return None


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
    a multi-label network "findings"), and of each map the label, the file, the raw maximum ("peak", None
    where several networks or layers have no scale in common), the "boxes" that were asked for and, where
    there is a lung model, the share inside the lungs ("in_lungs", None where they were not found).

    Raises ValueError or OSError where the image cannot be read or an overlay not be written.
    """
    xray, card = read_xray(image), ensemble_card([member.card for member in members])
    said = explain(members, xray, wanted, method=options.method, layer=options.layer)
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
        _write(path, with_colour_bar(picture, peak=peak, **colours) if options.bar else picture)
        entries.append(entry)
    record = {
        "image": str(image),
        "networks": len(members) if len(members) > 1 else None,
        "lungs": _lungs(members, xray, None if lungs in _own_finders(members) else found),
        **_decision(card, said.probabilities),
        "probabilities": {
            n: round(p, 4) for n, p in zip(card.classes, said.probabilities.tolist(), strict=True)
        },
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


def _text(record: dict[str, object]) -> str:
    width = max(len(name) for name in record["probabilities"])
    ranked = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    lines = [record["image"], *(f"  {name:<{width}}  {value:.3f}" for name, value in ranked)]
    if "findings" in record:
        found = ", ".join(record["findings"]) or "none"
        lines.append(f"  Findings: {found} (by their thresholds; these probabilities are not calibrated)")
    elif record["predicted"] != ranked[0][0]:
        lines.append(f"  Predicted, by its decision threshold: {record['predicted']}")
    if "lungs" in record:
        lines.append(f"  Lungs: {record['lungs']}")
    title = METHODS[record["method"]].title
    title += f" ({' + '.join(record['layers'])})" if "layers" in record else ""
    for entry in record["maps"]:
        of = f"for {entry['label']}" if _knows_classes(record["method"]) else "of no class"
        lines.append(f"  {title} {of}{_notes(entry, record)}: {entry['overlay']}")
    return "\n".join(lines)


def _knows_classes(method: str) -> bool:
    return METHODS[method].needs != "activation"


def _notes(entry: dict[str, object], record: dict[str, object]) -> str:
    if entry["empty"]:
        return " (empty: nothing in the image speaks for it)"
    notes = ""
    if entry.get("in_lungs") is not None:
        notes += f", {100 * entry['in_lungs']:.0f} % of it inside the lungs"
    if "boxes" in entry:
        number = len(entry["boxes"])
        notes += f", {number} region{'s' * (number != 1)} above {record['boxes_above']:g} of its maximum"
    return notes


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Probabilities and class activation maps of chest X-rays. For research, not for diagnosis."
    )
    add = parser.add_argument
    add("-i", "--image", metavar="IMAGE|FOLDER", nargs="+", type=Path, required=True)
    several = "a run folder or STUDY/NETWORK; of several runs with the same classes, the mean"
    add("-m", "--model", metavar="RUN", nargs="+", required=True, help=several)
    add("-l", "--label", help="the class to explain, or all (default: the predicted one)")
    add("-o", "--output", type=Path, help="a .png or .jpg file, or a folder (default: here)")
    add("--method", metavar="NAME", default="gradcam", help=f"{', '.join(METHODS)} (default: gradcam)")
    add(
        "--layer",
        metavar="NAME",
        nargs="+",
        help="where maps are from; several are fused (default: the run's)",
    )
    share = "draw boxes around what is above this share of the map's maximum (without a number: 0.5)"
    add("--boxes", metavar="SHARE", nargs="?", type=_share, const=0.5, help=share)
    add("--bar", action="store_true", help="draw a colour bar, with the raw scale, right of the X-ray")
    finder = "the lung model for the map's share inside the lungs (default: the run's, else RUN/../../lungs)"
    add("--lungs", metavar="FOLDER|none", help=finder)
    add("--alpha", type=_fraction, default=0.65, help="opacity at the map's peak (default: 0.65)")
    add("--colormap", metavar="NAME", default="plasma", help="plasma (default), turbo, jet, …")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--json", action="store_true", help="print a JSON list, a record an image")
    return parser


def _options(given: argparse.Namespace) -> MapOptions:
    if given.colormap not in COLORMAPS:
        raise ValueError(f"unknown colour map {given.colormap!r}: choose from {', '.join(sorted(COLORMAPS))}")
    method = given.method.lower()
    if cam_method(method).needs == "activation" and given.label is not None:
        raise ValueError(f"{METHODS[method].title} knows of no class: leave out -l, or take another --method")
    layer = tuple(dict.fromkeys(given.layer)) if given.layer else None
    return MapOptions(method, layer, given.alpha, given.colormap, given.boxes, given.bar)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        options = _options(given)
        device = resolve_device(given.device)
        images = images_in(given.image)
        folders = list(dict.fromkeys(run_folder(model).resolve() for model in given.model))
        card = ensemble_card([read_card(folder) for folder in folders])
        wanted = chosen_labels(given.label, card)
        outputs = output_paths(images, given.output, suffixes(wanted, card))
        members = [load_network(folder, device) for folder in folders]
        if options.layer:
            check_layers(members, options.layer)
        lungs = lung_finder(given.lungs, members, folders[0], device)
    except (ValueError, OSError) as error:
        print(f"overlay_cam.py: {error}", file=sys.stderr)
        return 2
    if len(members) > 1 and not given.json:
        print(f"mean of {len(members)} networks")
    records: list[dict[str, object]] = []
    for image, paths in zip(images, outputs, strict=True):
        try:
            records.append(answer(members, image, wanted, paths, options=options, lungs=lungs))
            if not given.json:
                print(_text(records[-1]), flush=True)
        except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
            records.append({"image": str(image), "error": str(error)})
            print(f"overlay_cam.py: {error}", file=sys.stderr)
    if given.json:
        print(json.dumps(records, indent=2))
    failed = sum("error" in record for record in records)
    if failed and len(records) > 1:
        print(f"overlay_cam.py: {failed} of {len(records)} images could not be done", file=sys.stderr)
    return 0 if not failed else 1 if failed < len(records) else 2


if __name__ == "__main__":
    sys.exit(main())
