"""Which X-rays the command line does, and where their overlays and rows go."""

import functools
import hashlib
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trained_networks import read_card
from utils import Share

if TYPE_CHECKING:
    from resumable_table import ResumableTable

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
OVERLAY = re.compile(r"_cam(_\w+)?\.png$")
TABLE = "predictions.csv"


class Job(NamedTuple):
    """An X-ray's file, and what its overlays' files are named by, as `overlay_files` takes it."""

    image: Path
    base: Path
    endings: Sequence[str]

    @property
    def overlays(self) -> list[Path]:
        """The files of the overlays, one an ending."""
        return overlay_files(self.base, self.endings)

    def state(self) -> list[str]:
        """Return a row's last cells, by which a later run knows whether it still holds."""
        name = self.overlays[0].name
        try:
            now = self.image.stat()
        except OSError:
            return [name, "", ""]
        return [name, str(now.st_size), datetime.fromtimestamp(now.st_mtime, UTC).isoformat()]


class Remaining(NamedTuple):
    """The `jobs` of this process that its table does not have yet, and whether that table is `begun_anew`."""

    jobs: list[Job]
    begun_anew: bool


def images_in(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that are named, and from the folders that are named those with an image's suffix that
    are no overlays of ours.

    Raises ValueError for a folder without images.
    """
    files: dict[str, Path] = {}
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if _is_xray(file))
        if not found:
            raise ValueError(f"no images in the folder {path}: its sub-folders are not searched")
        for file in found:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


def _is_xray(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not OVERLAY.search(file.name)


def overlay_files(base: Path, endings: Sequence[str]) -> list[Path]:
    """Return the files of an image's overlays, one an ending: `<base>_cam<ending>.png`."""
    return [base.with_name(f"{base.stem}{ending}{base.suffix}") for ending in endings]


def output_paths(images: Sequence[Path], output: Path | None, endings: Sequence[str]) -> list[Path]:
    """Return for each image the file that `overlay_files` derives its overlays' from: `<name>_cam.png` in the
    folder `output` (default: here), or `output` itself where it names a PNG or JPEG file.

    Images of one name from several folders are numbered. Raises ValueError where one file would have to
    hold the overlays of several images, or where an overlay would replace an X-ray.
    """
    names = names_file(output)
    if names and output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"cannot write {output.suffix} files: give -o a .png or .jpg file or a folder")
    if names and len(images) > 1:
        raise ValueError(f"{output} can hold one image's overlay only: give -o a folder")
    real_folder = functools.cache(os.path.realpath)  # to resolve each of very many files takes minutes

    def place(path: Path) -> str:
        return f"{real_folder(path.parent)}/{path.name}"

    originals = {place(image) for image in images}
    originals |= {os.path.realpath(image) for image in images if image.is_symlink()}
    if names:
        for path in overlay_files(output, endings):
            if place(path) in originals:
                raise ValueError(f"{path} is an X-ray that was given: choose another -o")
        return [output] * len(images)
    endangered = set(filter(OVERLAY.search, originals))
    paths: dict[str, Path] = {}
    numbers = defaultdict(lambda: itertools.chain([""], (f"_{number}" for number in itertools.count(2))))
    for image in images:
        for number in numbers[image.stem]:
            path = (output or Path()) / f"{image.stem}{number}_cam.png"
            if path.name in paths:
                continue
            if not endangered or endangered.isdisjoint(map(place, overlay_files(path, endings))):
                break
        paths[path.name] = path
    return list(paths.values())


def names_file(output: Path | None) -> bool:
    """Return whether `-o` names a file for one overlay, not a folder."""
    return bool(output is not None and output.suffix and not output.is_dir())


def prediction_table(
    output: Path, folders: Sequence[Path], *, lungs: Path | None, options: Mapping[str, object]
) -> "ResumableTable":
    """Return the table in the folder `output` of the networks in `folders`, the lung model in `lungs` and the
    `options` for the maps (whatever JSON holds), not yet opened.

    Raises FileNotFoundError or ValueError where a folder holds no network.
    """
    # Imported here: one image needs no table.
    from resumable_table import ResumableTable

    cards = [read_card(folder) for folder in folders]
    own = [folder / "lungs" for folder, card in zip(folders, cards, strict=True) if card.lung_masking]
    settings = {
        "models": [_fingerprint(folder) for folder in folders],
        "lungs": [_fingerprint(folder) for folder in (*own, lungs)],
        **options,
    }
    said = "findings" if cards[0].multilabel else "predicted"
    columns = ["image", said, *cards[0].classes, "lungs", "in_lungs", "overlay", "bytes", "changed"]
    return ResumableTable(output / TABLE, columns, settings)


def _fingerprint(folder: Path | None) -> list[object]:
    if folder is None or not (folder / "model.json").is_file():
        return []
    weights = (folder / "model.safetensors").stat()  # to read all of them would take longer than an image
    card = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    return [card, weights.st_size, weights.st_mtime_ns]


def row_of(record: Mapping[str, object], state: Sequence[str]) -> list[object]:
    """Return the cells of `prediction_table` for a record of `answers.answer` and its job's state."""
    said = record["predicted"] if "predicted" in record else "|".join(record["findings"]) or "No Finding"
    probabilities = [f"{value:.4f}" for value in record["probabilities"].values()]
    lungs = [record.get("lungs"), record["maps"][0].get("in_lungs")]
    return [os.path.abspath(record["image"]), said, *probabilities, *lungs, *state]


def resume(table: "ResumableTable", jobs: Sequence[Job], share: Share) -> Remaining:
    """Open the table of all `jobs`; return which of this process's `share` of them remain.

    Rows are removed of this process's images that are to be done again, and of images whose overlay another
    one's is going to replace. Raises ValueError or OSError as `ResumableTable.resume`.
    """
    from resumable_table import cell

    keys = [cell(os.path.abspath(job.image)) for job in jobs]
    owners = {cell(job.overlays[0].name): key for job, key in zip(jobs, keys, strict=True)}
    mine = dict(zip(keys[share.index :: share.of], jobs[share.index :: share.of], strict=True))
    done: set[str] = set()

    def keep(row: list[str]) -> bool:
        image, state = row[0], row[-3:]
        if image in done or owners.get(state[0], image) != image:
            return False
        if (job := mine.get(image)) is None:
            return True
        holds = list(map(cell, job.state())) == state and all(path.is_file() for path in job.overlays)
        done.update([image] if holds else [])
        return holds

    begun_anew = table.resume(keep)
    return Remaining([job for key, job in mine.items() if key not in done], begun_anew)
