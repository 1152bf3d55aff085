"""Which X-rays the command line does, and where their overlays and rows go."""

import hashlib
import itertools
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from batches import Share
from trained_networks import read_card
from utils import write_whole

if TYPE_CHECKING:
    from resumable_table import ResumableTable

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
TABLE = "predictions.csv"


def _png_text(text: bytes) -> bytes:
    part = b"tEXt" + text
    return struct.pack(">I", len(text)) + part + struct.pack(">I", zlib.crc32(part))


def _jpeg_comment(text: bytes) -> bytes:
    return b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text


# By which an overlay is known from an X-ray, whatever its name: a comment, which also tells of which X-ray it is.
# For each format: at which byte it stands, behind what comes first in every PNG (its size) and in the JPEGs of OpenCV
# (which format it is); how many bytes come before its text; and what writes it.
WRITTEN_BY, OWNER = b"Software\0xraycam overlay_cam.py of ", 16
MARKS = {".png": (33, 8, _png_text), ".jpg": (20, 4, _jpeg_comment)}
MARKS[".jpeg"] = MARKS[".jpg"]


def owner_of(overlay: Path) -> bytes | None:
    """Return of which X-ray an overlay is, as `owner` names it; None for a file that is none of `write_overlay`'s."""
    if not os.path.isfile(overlay):
        return None
    try:
        with open(overlay, "rb") as file:
            start = file.read(128)
    except OSError:
        return None
    for place, before, _ in MARKS.values():
        if start.startswith(WRITTEN_BY, place + before):
            end = place + before + len(WRITTEN_BY) + OWNER
            return start[end - OWNER : end]
    return None


def owner(image: Path) -> bytes:
    """Return what the overlays of an X-ray name it by: digits that do not tell its path."""
    return hashlib.sha256(os.fsencode(os.path.abspath(image))).hexdigest()[:OWNER].encode()


def is_overlay(path: Path) -> bool:
    """Return whether a file is an overlay that `write_overlay` has written."""
    return owner_of(path) is not None


def check_replaceable(path: Path) -> None:
    """Raise ValueError where a file that is no overlay stands in an overlay's place."""
    if os.path.lexists(path) and not is_overlay(path):
        raise ValueError(f"{path} is there and is no overlay of this program: move it, or give another -o")


def write_overlay(path: Path, picture: np.ndarray, image: Path) -> None:
    """Write an (H, W, 3) uint8 RGB picture as a PNG or JPEG file that `is_overlay`, of the X-ray in the file `image`.

    Raises ValueError where a file is there that is no overlay, OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise ValueError(f"cannot write {path}")
    content, (place, _, marked) = encoded.tobytes(), MARKS[path.suffix.lower()]
    check_replaceable(path)
    write_whole(path, content[:place] + marked(WRITTEN_BY + owner(image)) + content[place:])


class Job(NamedTuple):
    """An X-ray's file, what its overlays' files are named by, as `overlay_files` takes it, and the `problem` where
    it is known beforehand that it cannot be done.
    """

    image: Path
    base: Path
    endings: Sequence[str]
    problem: str | None = None

    @property
    def overlays(self) -> list[Path]:
        """The files of the overlays, one an ending."""
        return overlay_files(self.base, self.endings)

    def source(self) -> list[str]:
        """Return the cells by which a later run knows whether the X-ray is the same."""
        try:
            now = self.image.stat()
        except OSError:
            return ["", ""]
        return [str(now.st_size), datetime.fromtimestamp(now.st_mtime, UTC).isoformat()]

    def written(self) -> list[str]:
        """Return the cells by which a later run knows whether the overlays are those that were written."""
        sizes = [str(path.stat().st_size) if is_overlay(path) else "" for path in self.overlays]
        return [self.overlays[0].name, "|".join(sizes) if all(sizes) else ""]

    def remove_emptied(self) -> None:
        """Remove overlays that hold nothing any more, as that is the one change that leaves nothing to lose."""
        for path in self.overlays:
            if path.is_file() and path.stat().st_size == 0:
                path.unlink()


class Inputs(NamedTuple):
    """The `images` that were given, what is wrong (`problems`) with those names that cannot be any, and a line about
    each kind of file that was `skipped`.
    """

    images: list[Path]
    problems: dict[Path, str]
    skipped: list[str]


class Remaining(NamedTuple):
    """The `jobs` of this process that its table does not have yet, and the name that the table before it was given
    (`set_aside`) where that was of other settings.
    """

    jobs: list[Job]
    set_aside: Path | None


def images_in(inputs: Sequence[Path]) -> Inputs:
    """Return the files that are named, and from the folders that are named those with an image's suffix; overlays
    are skipped. A folder that holds none, or cannot be read, is a problem.

    Raises ValueError where nothing is left.
    """
    files: dict[str, Path] = {}
    problems, overlays, others = {}, [], []
    for path in inputs:
        found = [path]
        if os.path.isdir(path):
            try:
                found, unknown = _in_folder(path)
                others += unknown
            except (ValueError, OSError) as error:
                problems[path] = str(error)
        for file in found:
            if is_overlay(file):
                overlays.append(file.name)
            else:
                files.setdefault(os.path.abspath(file), file)
    if not files:
        raise ValueError(f"no X-rays were given, but overlays of this program: {_listed(overlays)}")
    if all(file in problems for file in files.values()):
        raise ValueError(problems[next(iter(files.values()))])
    skipped = {"overlays of this program": overlays, "not PNG, JPEG, TIFF or BMP": others}
    lines = [f"{len(names)} skipped, {why}: {_listed(names)}" for why, names in skipped.items() if names]
    return Inputs(list(files.values()), problems, lines)


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a folder's images and the names of what else is there, but for what is hidden and our own tables."""
    images, others = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.match("predictions*.csv"):
            continue
        if os.path.isdir(path):
            others.append(f"{path.name}/")
        elif path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            others.append(path.name)
    if not images:
        raise ValueError(
            f"no images in the folder {folder}: give PNG, JPEG, TIFF or BMP files; its sub-folders are not searched"
        )
    return images, others


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def overlay_files(base: Path, endings: Sequence[str]) -> list[Path]:
    """Return the files of an image's overlays, one an ending: `<base>_cam<ending>.png`."""
    return [base.with_name(f"{base.stem}{ending}{base.suffix}") for ending in endings]


def output_paths(images: Sequence[Path], output: Path | None, endings: Sequence[str]) -> list[Path]:
    """Return for each image the file that `overlay_files` derives its overlays' from: `<name>_cam.png` in the
    folder `output` (default: here), or `output` itself where it names a PNG or JPEG file.

    Images of one name from several folders are numbered, and so are those whose overlays would have the place of
    another image, or of another image's overlay from an earlier command. Raises ValueError where one file would have
    to hold the overlays of several images.
    """
    if names_file(output):
        if output.suffix.lower() not in MARKS:
            raise ValueError(f"cannot write {output.suffix} files: give -o a .png or .jpg file or a folder")
        if len(images) > 1:
            raise ValueError(f"{output} can hold one image's overlay only: give -o a folder")
        return [output]
    # Only these can stand where an overlay goes; to compare with all of very many images takes long.
    endangered = {os.path.abspath(image) for image in images if "_cam" in image.stem}
    paths: dict[str, Path] = {}
    numbers = defaultdict(lambda: itertools.chain([""], (f"_{number}" for number in itertools.count(2))))
    for image in images:
        for number in numbers[image.stem]:
            path = (output or Path()) / f"{image.stem}{number}_cam.png"
            if path.name in paths:
                continue
            files = overlay_files(path, endings)
            if endangered and not endangered.isdisjoint(map(os.path.abspath, files)):
                continue
            if {owner_of(file) for file in files} <= {None, owner(image)}:
                break
        paths[path.name] = path
    return list(paths.values())


def names_file(output: Path | None) -> bool:
    """Return whether `-o` names a file for one overlay, not a folder."""
    return bool(output is not None and output.suffix and not os.path.isdir(output))


def prediction_table(
    output: Path,
    folders: Sequence[Path],
    *,
    lungs: Path | None,
    options: Mapping[str, object],
    launch: str,
    process: int,
) -> "ResumableTable":
    """Return the table in the folder `output` of the networks in `folders`, the lung model in `lungs` and the
    `options` for the maps (whatever JSON holds), not yet opened, for a `process` of a `launch`.

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
    columns = ["image", said, *cards[0].classes, "lungs", "in_lungs"]
    columns += ["overlay", "overlay_bytes", "bytes", "changed", "error"]
    return ResumableTable(output / TABLE, columns, settings, launch=launch, process=process)


def _fingerprint(folder: Path | None) -> list[object]:
    if folder is None or not (folder / "model.json").is_file():
        return []
    weights = (folder / "model.safetensors").stat()  # to read all of them would take longer than an image
    card = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    return [card, weights.st_size, weights.st_mtime_ns]


def row_of(record: Mapping[str, object], state: Sequence[str]) -> list[object]:
    """Return the cells of `prediction_table` for a record of `answers.answer` and what its job has `written` from
    which `source`.
    """
    said = record["predicted"] if "predicted" in record else "|".join(record["findings"]) or "No Finding"
    probabilities = [None if value is None else f"{value:.4f}" for value in record["probabilities"].values()]
    lungs = [record.get("lungs"), record["maps"][0].get("in_lungs")]
    return [os.path.abspath(record["image"]), said, *probabilities, *lungs, *state, None]


def failed_row(record: Mapping[str, object], columns: Sequence[str]) -> list[object]:
    """Return the cells of `prediction_table` for an image that could not be done: its path and the "error"."""
    return [os.path.abspath(record["image"]), *[None] * (len(columns) - 2), record["error"]]


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
        image, state = row[0], row[-5:-1]
        if image in done or owners.get(state[0], image) != image:
            return False
        if (job := mine.get(image)) is None:
            return True
        now = list(map(cell, [*job.written(), *job.source()]))
        if "" not in now and now == state:
            done.add(image)
            return True
        if now[0] == state[0]:
            job.remove_emptied()
        return False

    set_aside = table.resume(keep)
    return Remaining([job for key, job in mine.items() if key not in done], set_aside)
