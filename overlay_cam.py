"""Command line: X-rays in, probabilities and Grad-CAM overlays out.

    python overlay_cam.py -i IMAGE [IMAGE|FOLDER ...] -m RUN_FOLDER [-l LABEL|all] [-o OUTPUT]

Prints each class with its probability and writes, for each image, an overlay at the image's own size.
Exit status: 0 all done; 1 some images could not be read, the others are done; 2 nothing could be done.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from grad_cam import COLORMAPS, explain, overlay
from networks import ModelCard, TrainedNetwork, load_network, resolve_device, run_folder
from utils import read_xray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


def chosen_labels(label: str | None, card: ModelCard) -> str | list[int]:
    """Return which classes' maps `-l` asks for, as `GradCAM` takes them.

    Case, spaces and punctuation do not matter: `covid_19` is `COVID-19`. Raises ValueError, naming all
    labels, for an unknown one.
    """
    if label is None:
        return "top"
    if _plain(label) == "all":
        return "all"
    names = [_plain(name) for name in card.classes]
    if _plain(label) not in names:
        raise ValueError(f"unknown label {label!r}: choose from {', '.join(card.classes)} or all")
    return [names.index(_plain(label))]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def images_in(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that are named and those with an image's suffix in the folders that are named.

    Raises ValueError for a folder without images.
    """
    files = []
    for path in inputs:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no images in the folder {path}: give PNG, JPEG, TIFF or BMP files")
        files += found
    return list(dict.fromkeys(files))


def output_paths(images: Sequence[Path], output: Path | None, *, several: bool) -> list[Path]:
    """Return the file that each image's overlay goes to: `<name>_cam.png` in the folder `output` (default:
    here), or `output` itself where it names a PNG or JPEG file.

    Images of one name from several folders are numbered. Raises ValueError where one file would have to
    hold several overlays or an overlay would replace an X-ray.
    """
    if output is not None and output.suffix.lower() in (".png", ".jpg", ".jpeg") and not output.is_dir():
        if several:
            raise ValueError(f"{output} can hold one overlay only: give -o a folder")
        paths = [output]
    else:
        if output is not None and output.suffix and not output.is_dir():
            raise ValueError(f"cannot write {output.suffix} files: give -o a .png or .jpg file or a folder")
        taken: dict[str, int] = {}
        paths = []
        for image in images:
            taken[image.stem] = number = taken.get(image.stem, 0) + 1
            name = image.stem if number == 1 else f"{image.stem}_{number}"
            paths.append((output or Path()) / f"{name}_cam.png")
    originals = {image.resolve() for image in images}
    for path in paths:
        if path.resolve() in originals:
            raise ValueError(f"{path} is an X-ray that was given: choose another -o")
    return paths


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"cannot write {path}")
    path.write_bytes(encoded.tobytes())


def answers(
    trained: TrainedNetwork, images: Sequence[Path], outputs: Sequence[Path], given: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """Yield a record an image: its probabilities, and a label, a peak and an overlay's path a map; or
    `error`, a line of text, where the image could not be read.
    """
    names = trained.card.classes
    wanted = chosen_labels(given.label, trained.card)
    for image, output in zip(images, outputs, strict=True):
        try:
            xray = read_xray(image)
        except (ValueError, OSError) as error:
            yield {"image": str(image), "error": str(error)}
            continue
        probabilities, classes, maps = explain(trained, xray, wanted)
        record: dict[str, object] = {
            "image": str(image),
            "predicted": names[int(probabilities.argmax())],
            "probabilities": {n: round(float(p), 4) for n, p in zip(names, probabilities, strict=True)},
            "maps": [],
        }
        for index, map_ in zip(classes, maps, strict=True):
            suffix = f"_{_plain(names[index])}" if len(classes) > 1 else ""
            path = output.with_name(f"{output.stem}{suffix}{output.suffix}")
            _write(path, overlay(xray, map_, alpha=given.alpha, colormap=given.colormap))
            empty = not map_.any()
            record["maps"].append({"label": names[index], "overlay": str(path), "empty": empty})
        yield record


def _text(record: dict[str, object]) -> str:
    width = max(len(name) for name in record["probabilities"])
    ranked = sorted(record["probabilities"].items(), key=lambda item: -item[1])
    lines = [record["image"], *(f"  {name:<{width}}  {value:.3f}" for name, value in ranked)]
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
    parser.add_argument("-m", "--model", metavar="RUN_FOLDER", required=True, help="or STUDY/NETWORK")
    parser.add_argument("-l", "--label", help="the class to explain, or all (default: the most probable)")
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
    records: list[dict[str, object]] = []
    try:
        if given.colormap not in COLORMAPS:
            raise ValueError(
                f"unknown colour map {given.colormap!r}: choose from {', '.join(sorted(COLORMAPS))}"
            )
        given.device = str(resolve_device(given.device))
        images = images_in(given.image)
        outputs = output_paths(images, given.output, several=len(images) > 1)
        trained = load_network(run_folder(given.model), given.device)
        for record in answers(trained, images, outputs, given):
            records.append(record)
            if "error" in record:
                print(f"overlay_cam.py: {record['error']}", file=sys.stderr)
            elif not given.json:
                print(_text(record), flush=True)
    except (ValueError, OSError) as error:
        print(f"overlay_cam.py: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(records, indent=2))
    failed = sum("error" in record for record in records)
    if failed and not (len(given.image) == 1 and not given.image[0].is_dir()):
        print(f"overlay_cam.py: {failed} of {len(records)} images could not be read", file=sys.stderr)
        return 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
