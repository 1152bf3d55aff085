"""Command line: X-rays in, probabilities and Grad-CAM overlays out.

    python overlay_cam.py -i IMAGE [IMAGE|FOLDER ...] -m RUN [RUN ...] [-l LABEL|all] [-o OUTPUT]

Prints each class with its probability and writes, for each image, an overlay at the image's own size. Of
several runs, an ensemble, the mean is given.
Exit status: 0 all done; 1 some images could not be done, the others are; 2 nothing could be done.
"""

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from grad_cam import COLORMAPS, explain, overlay
from networks import resolve_device
from trained_networks import ModelCard, TrainedNetwork, ensemble_card, load_network, read_card, run_folder
from utils import read_xray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


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
    unfinished.write_bytes(encoded.tobytes())
    os.replace(unfinished, path)


def answer(
    members: Sequence[TrainedNetwork],
    image: Path,
    wanted: str | list[int],
    outputs: Sequence[Path],
    *,
    alpha: float,
    colormap: str,
) -> dict[str, object]:
    """Write an image's overlays and return its record: probabilities, what they amount to ("predicted", or of
    a multi-label network "findings"), and the label and file of each map.

    Raises ValueError or OSError where the image cannot be read or an overlay not be written.
    """
    xray, card = read_xray(image), ensemble_card([member.card for member in members])
    probabilities, classes, maps = explain(members, xray, wanted)
    entries = []
    for index, map_, path in zip(classes, maps, outputs, strict=True):
        _write(path, overlay(xray, map_, alpha=alpha, colormap=colormap))
        entries.append({"label": card.classes[index], "overlay": str(path), "empty": not map_.any()})
    return {
        "image": str(image),
        **({"networks": len(members)} if len(members) > 1 else {}),
        **_lungs(members, xray),
        **_decision(card, probabilities),
        "probabilities": {n: round(float(p), 4) for n, p in zip(card.classes, probabilities, strict=True)},
        "maps": entries,
    }


def _decision(card: ModelCard, probabilities: np.ndarray) -> dict[str, object]:
    decided = card.decide(torch.from_numpy(probabilities)[None])[0]
    if card.multilabel:
        return {"findings": [name for name, there in zip(card.classes, decided, strict=True) if there]}
    return {"predicted": card.classes[int(decided)]}


def _lungs(members: Sequence[TrainedNetwork], xray: np.ndarray) -> dict[str, str]:
    """Return whether an X-ray's lungs were masked or why it was kept whole, where a network masks them."""
    said = []
    for mask_of in (getattr(member.lungs, "mask_of", None) for member in members):
        if mask_of is not None:
            found = mask_of(xray)
            said.append("masked" if found.reason is None else f"kept whole: {found.reason}")
    return {"lungs": "; ".join(dict.fromkeys(said))} if said else {}


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
    for entry in record["maps"]:
        note = " (empty: nothing in the image speaks for it)" if entry["empty"] else ""
        lines.append(f"  Grad-CAM for {entry['label']}{note}: {entry['overlay']}")
    return "\n".join(lines)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Probabilities and Grad-CAM overlays of chest X-rays. For research, not for diagnosis."
    )
    parser.add_argument("-i", "--image", metavar="IMAGE|FOLDER", nargs="+", type=Path, required=True)
    parser.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        nargs="+",
        required=True,
        help="a run folder or STUDY/NETWORK; of several runs with the same classes, the mean",
    )
    parser.add_argument("-l", "--label", help="the class to explain, or all (default: the predicted one)")
    parser.add_argument("-o", "--output", type=Path, help="a .png or .jpg file, or a folder (default: here)")
    parser.add_argument(
        "--alpha", type=_fraction, default=0.65, help="opacity at the map's peak (default: 0.65)"
    )
    parser.add_argument(
        "--colormap", metavar="NAME", default="plasma", help="plasma (default), turbo, jet, …"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print a JSON list, a record an image")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        if given.colormap not in COLORMAPS:
            raise ValueError(
                f"unknown colour map {given.colormap!r}: choose from {', '.join(sorted(COLORMAPS))}"
            )
        device = resolve_device(given.device)
        images = images_in(given.image)
        folders = list(dict.fromkeys(run_folder(model).resolve() for model in given.model))
        card = ensemble_card([read_card(folder) for folder in folders])
        wanted = chosen_labels(given.label, card)
        outputs = output_paths(images, given.output, suffixes(wanted, card))
        members = [load_network(folder, device) for folder in folders]
    except (ValueError, OSError) as error:
        print(f"overlay_cam.py: {error}", file=sys.stderr)
        return 2
    if len(members) > 1 and not given.json:
        print(f"mean of {len(members)} networks")
    records: list[dict[str, object]] = []
    for image, paths in zip(images, outputs, strict=True):
        try:
            records.append(answer(members, image, wanted, paths, alpha=given.alpha, colormap=given.colormap))
            if not given.json:
                print(_text(records[-1]), flush=True)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
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
