r"""Command line: X-rays in, probabilities and overlays of class activation maps out.

    python overlay_cam.py -i IMAGE [IMAGE|FOLDER ...] -m RUN [RUN ...] [-l LABEL|all] [-o OUTPUT]
                          [--method NAME] [--layer NAME [NAME ...]] [--boxes [SHARE]] [--bar]
                          [--lungs FOLDER|none] [--alpha A] [--colormap NAME] [--device D] [--json]

It prints each class with its probability. For each image it writes an overlay at the image's own size. For several
runs it gives the mean of their probabilities and maps. If there is a lung model (the network's own, or the one in
`lungs` beside the studies' folders), it also prints how much of each map lies inside the lungs.

For a folder, or for several images, `predictions.csv` in the output folder gets a row as soon as an image is done:

- image: absolute path; a backslash is written as two, a line break as \n
- predicted: a class; of a multi-label network "findings", joined with |, or "No Finding"
- the probability of each class
- lungs: a remark on the lungs; in_lungs: the share of the first map inside them
- overlay: the first map's file; overlay_bytes: the sizes of all maps' files, joined with |
- bytes: the size of the image's file; changed: its time of change
- error: why the image failed; the row of a failed image has only this and `image`

The same command continues where it was stopped. It repeats an image that failed or has changed, and one whose overlays
have changed or are missing. Another model, or other options for the maps, begin a new table. The old one is kept
as `predictions-1.csv`. Several processes (`accelerate launch --multi_gpu --num_processes N overlay_cam.py …` or
`torchrun --nproc-per-node N overlay_cam.py …`) write to one table: each does its share of the images, on its own GPU.
While a command works on the table, other commands are refused.

Every overlay contains a mark. A file without the mark is never replaced, except an empty file (0 bytes) with the name
of an overlay in the table. A file with the mark is not an X-ray and is skipped. A line on stderr names skipped files.

Exit status:

- 0: all done; with several processes also if images failed, because the launcher would stop the other processes
- 1: some images failed; the others are done
- 2: nothing could be done, or the disk is full
- 130: stopped by Ctrl-C
"""

import argparse
import contextlib
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cams.heatmaps import COLORMAPS
from cams.methods import METHODS, cam_method
from inference.answer_text import text_of
from inference.answers import MapOptions, Question, answer, check_layers, lung_finder, lung_folder
from inference.resumable_table import Share
from inference.trained_networks import ModelCard, ensemble_card, load_network, read_card, run_folder
from inference.xray_files import TABLE, Job, PredictionTable, images_in, model_settings, names_file, overlay_paths
from utils import resolve_device

# Errors that every later image would have too: disk full, quota, limit of file size, output pipe closed.
HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE})


class Work(NamedTuple):
    """The work of this process."""

    question: Question
    share: Share
    number: int  # of this process's images
    jobs: list[Job]  # the images that remain to be done
    skipped: list[str]  # lines about skipped files
    table: PredictionTable | None = None  # for more than one image


def share_of(environment: Mapping[str, str]) -> Share:
    """Return this process's share of the images. Without accelerate or torchrun it is all images.

    Raises ValueError if RANK and WORLD_SIZE contradict each other.
    """
    share = Share(int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))
    if not 0 <= share.index < share.of:
        raise ValueError(f"RANK {share.index} of WORLD_SIZE {share.of}: unset them, or use accelerate launch")
    return share


def chosen_labels(label: str | None, card: ModelCard) -> str | list[int]:
    """Return the classes whose maps `-l` asks for: "top", or the indices of reported classes.

    An exact name has priority. Otherwise case, spaces and punctuation are ignored: `covid_19` is `COVID-19`.

    Raises:
        ValueError: The label fits no class or several, or it is a finding that the network could not learn and does
            not report.
    """
    if label is None:
        return "top"
    if label in card.classes:
        indices = [card.classes.index(label)]
    elif label.lower() == "all":
        indices = range(len(card.classes))
    else:
        indices = [index for index, name in enumerate(card.classes) if _slug(name) == _slug(label)]
        if len(indices) != 1:
            raise ValueError(f"unknown label {label!r}: choose from {', '.join(card.classes)} or all")
    reported = [index for index in indices if card.classes[index] not in card.unreported]
    if not reported:
        names = ", ".join(card.classes[index] for index in indices)
        raise ValueError(f"no map of {names}: not reported, because all training images have it, or none")
    return reported


def _slug(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def suffixes(classes: str | list[int], card: ModelCard) -> list[str]:
    """Return the ending of each map's file name: "" for a single map, else its class or the index of its class."""
    if len(classes) == 1 or classes == "top":
        return [""]
    slugs = [_slug(name) for name in card.classes]
    unique = len(set(slugs)) == len(slugs) and all(slugs)
    return [f"_{slugs[index] if unique else index}" for index in classes]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Probabilities and class activation maps of chest X-rays. For research, not for diagnosis."
    )
    image = f"X-rays or folders; with several images, the same command continues after a stop (see {TABLE})"
    model = "a run folder or STUDY/NETWORK; several runs with the same classes are averaged"
    boxes = "draw boxes around regions above this share of the map's maximum (without a number: 0.5)"
    parser.add_argument("-i", "--image", metavar="IMAGE|FOLDER", type=Path, nargs="+", required=True, help=image)
    parser.add_argument("-m", "--model", metavar="RUN", nargs="+", required=True, help=model)
    parser.add_argument("-l", "--label", help="the class to explain, or all (default: the predicted one)")
    parser.add_argument("-o", "--output", type=Path, help="a .png or .jpg file, or a folder (default: here)")
    parser.add_argument("--method", metavar="NAME", default="gradcam", help=f"{', '.join(METHODS)} (default: gradcam)")
    parser.add_argument("--layer", metavar="NAME", nargs="+", help="layers; several are fused (default: the run's)")
    parser.add_argument("--boxes", metavar="SHARE", nargs="?", type=float, const=0.5, help=boxes)
    parser.add_argument("--bar", action="store_true", help="draw a colour bar, with the raw scale, on the right")
    parser.add_argument("--lungs", metavar="FOLDER|none", help="lung model (default: the run's, else RUN/../../lungs)")
    parser.add_argument("--alpha", type=float, default=0.65, help="opacity at the map's peak (default: 0.65)")
    parser.add_argument("--colormap", metavar="NAME", default="plasma", help="plasma (default), turbo, jet, …")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with a record for each image")
    return parser


def _options(arguments: argparse.Namespace) -> MapOptions:
    """Return the options for the maps. Raises ValueError, with the choices, for a wrong one."""
    if not 0 <= arguments.alpha <= 1:
        raise ValueError(f"--alpha {arguments.alpha:g} is not between 0 and 1")
    if arguments.boxes is not None and not 0 < arguments.boxes <= 1:
        raise ValueError(f"--boxes {arguments.boxes:g} must be above 0 and at most 1")
    if arguments.colormap not in COLORMAPS:
        raise ValueError(f"unknown colour map {arguments.colormap!r}: choose from {', '.join(sorted(COLORMAPS))}")
    method = arguments.method.lower()
    if cam_method(method).needs == "activation" and arguments.label is not None:
        raise ValueError(f"{METHODS[method].title} makes no map of a class: leave out -l, or take another --method")
    layer = tuple(dict.fromkeys(arguments.layer)) if arguments.layer else None
    return MapOptions(method, layer, arguments.alpha, arguments.colormap, arguments.boxes, arguments.bar)


def _prepare(arguments: argparse.Namespace) -> Work:
    """Check the arguments, load the models and open the table; return the work."""
    options, share = _options(arguments), share_of(os.environ)
    if arguments.json and share.of > 1:
        raise ValueError(f"--json: several processes cannot print one list: leave it out, all results are in {TABLE}")
    device = resolve_device(arguments.device)
    if arguments.device == "auto" and device.type == "cuda":  # each process on a machine has a GPU of its own
        process = int(os.environ.get("LOCAL_RANK", share.index))
        device = torch.device("cuda", process % torch.cuda.device_count())
    images, problems, skipped = images_in(arguments.image)
    folders = list(dict.fromkeys(run_folder(model).resolve() for model in arguments.model))
    cards = [read_card(folder) for folder in folders]
    card = ensemble_card(cards)
    classes = chosen_labels(arguments.label, card)
    overlays = overlay_paths(images, arguments.output, suffixes(classes, card))
    members = [load_network(folder, device) for folder in folders]
    if options.layer:
        check_layers(members, options.layer)
    lung_model = lung_folder(arguments.lungs, cards, folders[0])
    lungs = lung_finder(arguments.lungs, lung_model, members, device)
    jobs = [Job(image, paths, problems.get(image)) for image, paths in zip(images, overlays, strict=True)]
    own_jobs = jobs[share.index :: share.of]
    work = Work(Question(members, classes, options, lungs), share, len(own_jobs), own_jobs, skipped)
    if names_file(arguments.output) or (len(jobs) == 1 and not any(map(os.path.isdir, arguments.image))):
        return work
    settings = {**model_settings(folders, cards, lung_model), "labels": classes, **options._asdict()}
    table = PredictionTable(arguments.output or Path(), card, settings, share)
    return work._replace(table=table, jobs=table.remaining(jobs, own_jobs))


def _complain(message: object) -> None:
    """Print a message on one line of stderr. File names and messages of torch may contain line breaks."""
    print(f"overlay_cam.py: {' '.join(str(message).splitlines())}", file=sys.stderr)


def _announce(work: Work, *, as_json: bool) -> None:
    """Print, before the first image, which files are skipped and which images are already done."""
    table, lines = work.table, []
    if work.share.of > 1:
        lines.append(f"process {work.share.index + 1} of {work.share.of} answers {work.number} images")
    for line in work.skipped if work.share.index == 0 else ():
        _complain(line)
    if table is not None and table.set_aside is not None:
        lines.append(f"{table.path} is begun anew: settings differ; the old table is kept as {table.set_aside.name}")
    if done := work.number - len(work.jobs):
        lines.append(f"skips {done} of {work.number} images: they are in {table.path}")
    if len(work.question.members) > 1 and not as_json:
        lines.append(f"mean of {len(work.question.members)} networks")
    for line in lines:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def _attempt(work: Work, job: Job) -> dict[str, object]:
    """Do a job, write its row and return its record. If the job failed, the record has only "image" and "error".

    Raises OSError for an error that every later job would meet too.
    """
    source = job.source()  # read first: if the image changes afterwards, the next run repeats it
    try:
        if job.problem is not None:
            raise ValueError(job.problem)
        record = answer(work.question, job.image, job.overlays)
    except (ValueError, OSError, RuntimeError) as error:  # torch raises RuntimeError if memory runs out
        if work.table is not None and getattr(error, "errno", None) in HOPELESS:
            raise
        _complain(error)
        record = {"image": str(job.image), "error": str(error)}
    if work.table is not None:
        work.table.write(record, [*job.written(), *source])
    return record


def _answer_all(work: Work, *, as_json: bool) -> int:
    """Do the remaining jobs and print their records; return the exit status."""
    records, finished, failed, stop = [], work.number - len(work.jobs), 0, None
    try:
        for job in work.jobs:
            record = _attempt(work, job)
            finished, failed = finished + 1, failed + ("error" in record)
            if as_json:
                records.append(record)
            elif "error" not in record:
                print(text_of(record), flush=True)
    except (KeyboardInterrupt, OSError) as error:
        stop = error
    if as_json:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(records, indent=2), flush=True)
    if failed and work.number > 1:
        _complain(f"{failed} of {work.number} images could not be done")
    if stop is not None:
        reason = f"{stop}: " if isinstance(stop, OSError) else ""
        remedy = "; the same command goes on from there" if work.table is not None else ""
        _complain(f"{reason}stopped after {finished} of {work.number} images{remedy}")
        return 2 if isinstance(stop, OSError) else 130
    if not failed or work.share.of > 1:
        return 0
    return 1 if failed < work.number else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit status."""
    arguments = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _complain(f"WARNING {message}")
        try:
            work = _prepare(arguments)
        except KeyboardInterrupt:
            _complain("stopped before the first image")
            return 130
        except (ValueError, OSError) as error:
            _complain(error)
            return 2
        with contextlib.nullcontext() if work.table is None else contextlib.closing(work.table):
            _announce(work, as_json=arguments.json)
            return _answer_all(work, as_json=arguments.json)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be invalid UTF-8
    sys.exit(main())
