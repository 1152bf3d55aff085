r"""Command line: X-rays in, probabilities and overlays of class activation maps out.

    python overlay_cam.py -i IMAGE [IMAGE|FOLDER ...] -m RUN [RUN ...] [-l LABEL|all] [-o OUTPUT]
                          [--method NAME] [--layer NAME [NAME ...]] [--boxes [SHARE]] [--bar]
                          [--lungs FOLDER|none] [--alpha A] [--colormap NAME] [--device D] [--json]

Prints each class with its probability and writes, for each image, an overlay at the image's own size. Of
several runs, an ensemble, the mean is given. Where a lung model is at hand (the network's own, or the one in
`lungs` beside the studies' folders) it says how much of each map lies inside the lungs.

Of a folder, or of several images, `predictions.csv` in the output folder gets a row as soon as an image is done:

- image: absolute path, in which a backslash is written as two, a line break as \n
- predicted: a class; of a multi-label network findings, joined with |, or "No Finding"
- each class's probability
- lungs, in_lungs: what is said of them, and the share of the first map inside
- overlay, overlay_bytes: the first map's file; the size of each map's file, joined with |
- bytes, changed: the image's size and its time of change
- error: why the image could not be done; nothing else is in its row then

The same command goes on where it was stopped: it does images again only if they have failed, or if they or their
overlays have changed or gone. With another model or other options for the maps the table is begun anew, and the old
one is kept as `predictions-1.csv`. Started several times at once by `accelerate launch --multi_gpu --num_processes N
overlay_cam.py …` or `torchrun --nproc-per-node N overlay_cam.py …`, each process does a share of the images, on a
GPU of its own, and all write to that table. Any other command is refused as long as one is at work on the table.

An overlay carries a mark, by which it is known. A file without it is never replaced; one with it is no X-ray, and is
skipped. What is skipped in a folder is said on stderr.

Exit status: 0 all done; 1 some images could not be done, the others are; 2 nothing could be done, or the disk
is full; 130 stopped by Ctrl-C. Of several processes one with some images undone ends with 0 too: else the
launcher would stop the others.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from answers import MapOptions, answer, check_layers, lung_finder, lung_folder, text_of
from batches import Share
from cam_methods import METHODS, cam_method
from heatmaps import COLORMAPS
from trained_networks import ModelCard, TrainedNetwork, ensemble_card, load_network, read_card, run_folder
from utils import resolve_device
from xray_files import (
    TABLE,
    Job,
    failed_row,
    images_in,
    names_file,
    output_paths,
    prediction_table,
    resume,
    row_of,
)

if TYPE_CHECKING:
    from answers import LungFinder
    from resumable_table import ResumableTable

# No space, no quota, over the largest size of a file, and nobody reads what is printed: so will every image fare.
HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE})


class Work(NamedTuple):
    """What this process has to do: `answer`'s arguments, the `jobs` that remain of its `number` of them, what was
    `skipped`, and the `table` for more than one image, with the new name of one that was `set_aside` for it.
    """

    members: list[TrainedNetwork]
    wanted: str | list[int]
    options: MapOptions
    lungs: "LungFinder | None"
    share: Share
    number: int
    jobs: list[Job]
    skipped: list[str]
    table: "ResumableTable | None" = None
    set_aside: Path | None = None


def share_of(environment: Mapping[str, str]) -> Share:
    """Return the share that accelerate or torchrun has given this process: all images where neither started it.

    Raises ValueError where RANK and WORLD_SIZE make no sense.
    """
    rank, of = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not of.isdecimal() or int(rank) >= int(of):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {of}: unset them, or start with accelerate launch")
    return Share(int(rank), int(of))


def launch_of(environment: Mapping[str, str], share: Share, settings: object) -> str:
    """Return a name that all processes of one launch have in common, and no other command at the same time."""
    if share.of == 1:
        return os.urandom(8).hex()
    variables = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    parts = [environment.get(name) for name in variables]
    if environment.get("MASTER_ADDR", "localhost") in ("localhost", "127.0.0.1"):
        parts.append(platform.node())  # that address is every machine's own
    return hashlib.sha256(repr((parts, settings)).encode()).hexdigest()[:16]


def chosen_labels(label: str | None, card: ModelCard) -> str | list[int]:
    """Return which classes' maps `-l` asks for: "top", "all" or indices, those of "all" that are reported.

    An exact name comes first; otherwise case, spaces and punctuation do not matter where that leaves one
    class only: `covid_19` is `COVID-19`. Raises ValueError, naming all labels, for an unknown one, and for a finding
    that is not reported: its map would be of what the network could not learn.
    """
    if label is None:
        return "top"
    if label in card.classes:
        return _reported([card.classes.index(label)], card)
    if label.lower() == "all":
        return _reported(range(len(card.classes)), card) if card.unreported else "all"
    alike = [index for index, name in enumerate(card.classes) if _slug(name) == _slug(label)]
    if len(alike) != 1:
        raise ValueError(f"unknown label {label!r}: choose from {', '.join(card.classes)} or all")
    return _reported(alike, card)


def _reported(indices: Sequence[int], card: ModelCard) -> list[int]:
    reported = [index for index in indices if card.classes[index] not in card.unreported]
    if not reported:
        names = ", ".join(card.classes[index] for index in indices)
        raise ValueError(
            f"no map of {names}: not reported, as all of the training images have it, or none; choose another label"
        )
    return reported


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def suffixes(wanted: str | list[int], card: ModelCard) -> list[str]:
    """Return what the name of each map's file ends in: nothing for one map, else the class, made unique."""
    if wanted == "top" or len(wanted) == 1:
        return [""]
    slugs = [_slug(name) for name in card.classes]
    unique = len(set(slugs)) == len(slugs) and all(slugs)
    indices = range(len(slugs)) if wanted == "all" else wanted
    return [f"_{slugs[index] if unique else index}" for index in indices]


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
    table = (
        f"X-rays, or folders of them; of several, {TABLE} in the output folder tells what the same command"
    )
    table += " need not do again"
    add("-i", "--image", metavar="IMAGE|FOLDER", nargs="+", type=Path, required=True, help=table)
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


def _device(name: str, share: Share) -> torch.device:
    device = resolve_device(name)
    if name != "auto" or device.type != "cuda" or share.of == 1:
        return device
    local = os.environ.get("LOCAL_RANK", str(share.index))  # counts the processes on this machine
    if not local.isdecimal():
        raise ValueError(f"LOCAL_RANK {local}: unset it, or start with accelerate launch")
    return torch.device("cuda", int(local) % torch.cuda.device_count())


def _prepare(given: argparse.Namespace) -> Work:
    options, share = _options(given), share_of(os.environ)
    if given.json and share.of > 1:
        raise ValueError(f"--json: several processes cannot print one list: leave it out, {TABLE} has it all")
    device = _device(given.device, share)
    images, problems, skipped = images_in(given.image)
    folders = list(dict.fromkeys(run_folder(model).resolve() for model in given.model))
    card = ensemble_card([read_card(folder) for folder in folders])
    wanted = chosen_labels(given.label, card)
    endings = suffixes(wanted, card)
    bases = output_paths(images, given.output, endings)
    members = [load_network(folder, device) for folder in folders]
    if options.layer:
        check_layers(members, options.layer)
    lungs = lung_finder(given.lungs, members, folders[0], device)
    jobs = [Job(image, base, endings, problems.get(image)) for image, base in zip(images, bases, strict=True)]
    mine = jobs[share.index :: share.of]
    work = Work(members, wanted, options, lungs, share, len(mine), mine, skipped)
    if names_file(given.output) or (len(jobs) == 1 and not any(map(os.path.isdir, given.image))):
        return work
    lungs_from = lung_folder(given.lungs, [member.card for member in members], folders[0])
    settings = {"labels": wanted, **options._asdict()}
    table = prediction_table(
        given.output or Path(),
        folders,
        lungs=lungs_from,
        options=settings,
        launch=launch_of(os.environ, share, [*folders, lungs_from, settings]),
        process=share.index,
    )
    return work._replace(table=table, **resume(table, jobs, share)._asdict())


def _complain(what: object) -> None:
    # On one line: a file's name, or what torch says, may have several.
    print(f"overlay_cam.py: {' '.join(str(what).splitlines())}", file=sys.stderr)


def _announce(work: Work, *, as_json: bool) -> None:
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    if work.share.of > 1:
        say(f"process {work.share.index + 1} of {work.share.of}: {work.number} images are its share")
    if work.share.index == 0:
        for line in work.skipped:
            _complain(line)
    if work.set_aside is not None:
        say(
            f"{work.table.path} is begun anew: the one before was made by another model or with other options, or "
            f"its settings are damaged; it is kept as {work.set_aside.name}"
        )
    done = work.number - len(work.jobs)
    if done == work.number > 0:
        say(f"all {done} images are done already, see {work.table.path}")
    elif done:
        say(f"skips {done} of {work.number} images: they are in {work.table.path}")
    if len(work.members) > 1 and not as_json:
        print(f"mean of {len(work.members)} networks")


def _say(record: dict[str, object], *, as_json: bool, first: bool) -> None:
    if as_json:
        start = "[\n" if first else ",\n"
        print(start + textwrap.indent(json.dumps(record, indent=2), "  "), end="", flush=True)
    elif "error" not in record:
        print(text_of(record), flush=True)


def _attempt(work: Work, job: Job) -> dict[str, object]:
    """Do a job and write its row; return its record, or what it failed for. Raises OSError where all would fail."""
    source = job.source()  # before the image is read: if it changes meanwhile, it is done again next time
    try:
        if job.problem is not None:
            raise ValueError(job.problem)
        record = answer(
            work.members, job.image, work.wanted, job.overlays, options=work.options, lungs=work.lungs
        )
    except (ValueError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        if work.table is not None and getattr(error, "errno", None) in HOPELESS:
            raise
        _complain(error)
        record = {"image": str(job.image), "error": str(error)}
    if work.table is not None:
        failed = "error" in record
        row = failed_row(record, work.table.columns) if failed else row_of(record, [*job.written(), *source])
        work.table.append(row)
    return record


def _answer_all(work: Work, *, as_json: bool) -> int:
    """Do the jobs that remain, telling of each; return the exit status."""
    told = failed = status = 0
    reason = ""
    try:
        for job in work.jobs:
            record = _attempt(work, job)
            _say(record, as_json=as_json, first=told == 0)
            told, failed = told + 1, failed + ("error" in record)
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        status, reason = 2, f"{error}: "
    if as_json:
        with contextlib.suppress(BrokenPipeError):
            print("\n]" if told else "[]", flush=True)
    if failed and work.number > 1:
        _complain(f"{failed} of {work.number} images could not be done")
    if status:
        said = f"stopped after {work.number - len(work.jobs) + told} of {work.number} images"
        onwards = "; the same command goes on from there" if work.table is not None else ""
        _complain(f"{reason}{said}{onwards}")
    if status or not failed or work.share.of > 1:
        return status
    return 1 if failed < work.number else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit status."""
    given = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _complain(f"WARNING {message}")
        return _done(given)


def _done(given: argparse.Namespace) -> int:
    try:
        work = _prepare(given)
    except KeyboardInterrupt:
        _complain("stopped before the first image")
        return 130
    except (ValueError, OSError) as error:
        _complain(error)
        return 2
    with contextlib.nullcontext() if work.table is None else contextlib.closing(work.table):
        _announce(work, as_json=given.json)
        return _answer_all(work, as_json=given.json)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid UTF-8
    sys.exit(main())
