"""Fine-tune the networks of a study: what notebook 2 calls, and the script that does it headless.

python finetune.py covid_radiography --data-root DIR --networks resnet18
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerate
import pandas as pd
import torch
import torchvision
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from augmentation import Augmentation
from batches import make_batches
from calibration import fit_temperature
from checkpoints import Checkpoints, on_cpu
from compute import described, resolve_precision
from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.splits import splits_frame
from datasets.table import content_digests, relative_paths
from image_cache import CacheFailed, ImageFile, cached
from lung_masking import LungMasking
from lung_segmentation import default_segmenter, save_segmenter
from networks import (
    add_batch_norm,
    architecture,
    build_network,
    class_logits,
    fold_batch_norm,
    parameter_count,
    resolve_device,
)
from objectives import MULTI_LABEL, SINGLE_LABEL, Objective, macro_auc, uninformed_loss
from predictions import choose_thresholds
from processes import accelerator_on, from_main, refuse_differences
from results import (
    CARD,
    complete_or_absent,
    history_log,
    linked,
    predictions_frame,
    read_complete_card,
    training_folder,
)
from study_loading import PROJECT, load_study, load_table, positive_class
from study_settings import Study, Training
from trained_networks import ModelCard, read_card, run_folder, save_network
from training import FineTuned, fine_tune, predict_logits
from utils import Preprocessing, class_weights, label_weights, seed_everything, write_whole

RUNS = PROJECT / "runs"
NO_FILE = frozenset({"imagenet", "none"})  # starting weights that are no file of the user's
# A network whose validation loss never falls below this share of the uninformed one has learnt nothing.
LEARNT = 0.99


def fine_tune_study(
    study: Study,
    table: XrayTable,
    network: str,
    *,
    runs: Path = RUNS,
    device: str = "auto",
    restart: bool = False,
) -> Path:
    """Fine-tune one network of a study and return its run folder, `runs/<study>/<network>`.

    The results appear, or replace older ones, when they are complete. Until then the state is in `resume/` in that
    folder: a training that was broken off goes on from there when this is called again, or begins anew with
    `restart`. Results of the same settings and images are kept, unless `restart` says otherwise. The same study, data
    and machine give the same weights, on a CPU byte for byte, broken off or not.

    Raises ValueError where `resume/` is of other settings, another process is training into the folder, or a class
    has no training image, and KeyboardInterrupt where it was asked to stop: once the results are written if the
    last epoch was done.
    """
    training, kind = study.training_of(network), architecture(network)
    start, start_card = _starting_weights(network, training, runs)
    where = resolve_device(device)
    accelerator = accelerator_on(where)
    outputs = _number_of_outputs(training, table)
    _refuse_absent_classes(table)
    objective, weights = _objective(table), _loss_weights(training, table)
    if training.batch_size < accelerator.num_processes:
        raise ValueError(
            f"batch_size {training.batch_size} is shared by {accelerator.num_processes} processes: raise it"
        )
    folder = runs / study.name / network
    if start not in NO_FILE and Path(start).parent.resolve() == folder.resolve():
        raise ValueError(
            f"{folder} holds the weights to start from and would replace them: give another --runs"
        )
    # Before anything is decoded; one process compares it in the end.
    paths = table.frame["path"]
    content = content_digests(paths) if accelerator.is_main_process else []
    fixed, digest, finished = _agreed_settings(study, table, network, accelerator, runs)
    if finished and not restart:
        print(f"{folder} is finished, with the same settings and images (--restart trains it again)")
        return folder
    if (folder / CARD).is_file():
        print(f"{folder} holds older results: they are replaced when this training is done")
    with training_folder(folder, restart=restart, write=accelerator.is_main_process) as working:
        with accelerator.main_process_first():  # it writes what the others then read
            masking, failed = _lung_masking(study, table, runs)
            preprocessing = _preprocessing(study, network, masking)
            rows = {split: (table.subset(split)["path"], table.targets(split)) for split in SPLITS}
            images = _cached_images(rows, preprocessing, training, runs, title=kind.title)
        if from_main(accelerator, lambda: images is not None and content_digests(paths) != content):
            raise ValueError(f"the images in {table.root} have changed while they were decoded: train again")
        batches = make_batches(
            rows,
            preprocessing,
            num_classes=len(table.classes),
            batch_size=training.batch_size,
            augment=Augmentation(**study.augmentation.model_dump()),
            oversample=training.balance == "oversample",
            seed=study.seed,
            images=images,
        )
        seed_everything(study.seed)
        head_order, head = _head_of(start_card, training, table)
        model = _built(network, outputs, training, start, head_order)
        if accelerator.is_main_process:
            _announce(network, model, study, table, where, head)
        with history_log(working if accelerator.is_main_process else None) as log:
            done = fine_tune(
                model,
                batches,
                training=training.model_copy(update={"precision": fixed["precision"]}),
                objective=objective,
                loss_weights=weights,
                device=device,
                title=kind.title,
                on_epoch=_after_epoch(log, model, working if training.keep_checkpoints else None),
                checkpoints=Checkpoints(working, fixed | {"images": preprocessing.key}),
                scratch=working,
            )
        if training.temporary_batch_norm:
            fold_batch_norm(model)
        logits = {
            split: predict_logits(model, batches["train_plain" if split == "train" else split], device=where)
            for split in SPLITS
        }
        if accelerator.is_main_process:
            origin = {
                "settings": digest,
                "data_fingerprint": fixed["data"],
                "processes": accelerator.num_processes,
                "precision": fixed["precision"],
            }
            if _warn_of_changed_images(table, content, title=kind.title) and images is None:
                # Some of them may have been seen in both versions: these results are of no one set of images.
                origin |= {"settings": None, "data_fingerprint": f"{fixed['data']}, changed in training"}
            card = _card(study, table, network, model, done, logits["val"], origin)
            uninformed = _uninformed_loss(training, table, objective, weights)
            card = replace(card, validation={**card.validation, "uninformed_loss": uninformed})
            _warn_of_nothing_learnt(done, uninformed, title=kind.title)
            with complete_or_absent(folder) as results:
                _write_results(results, table, card, model, done, logits)
                if masking is not None:
                    save_segmenter(results / "lungs", masking.segmenter)
                    failed.to_csv(results / "lungs_failed.csv", index=False)
                for kept in ("checkpoints", "tensorboard"):
                    if (working / kept).is_dir():
                        shutil.copytree(working / kept, results / kept, copy_function=linked)
            print(f"saved {folder}")
        accelerator.wait_for_everyone()
    if done.asked_to_stop:
        raise KeyboardInterrupt(f"stopped, with {folder} finished; run the same again to go on")
    return folder


def _starting_weights(network: str, training: Training, runs: Path) -> tuple[str, ModelCard | None]:
    """Return a network's starting weights as `build_network` takes them, and the card beside a file, if there is one.

    Raises FileNotFoundError or ValueError where they are missing or another network's.
    """
    weights = training.weights
    if weights in NO_FILE:
        return weights, None
    file = Path(weights)
    if not file.is_file():
        try:
            file = run_folder(weights, runs) / "model.safetensors"
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no weights file {weights}: give a file, a run folder, 'imagenet' or 'none' ({error})"
            ) from None
    card = read_card(file.parent) if (file.parent / "model.json").is_file() else None
    if card is not None and card.architecture != network:
        raise ValueError(f"the weights {weights} are of {card.architecture}, not of {network}")
    return str(file), card


def _head_of(
    start: ModelCard | None, training: Training, table: XrayTable
) -> tuple[tuple[int, ...] | None, str]:
    """Return what becomes of the head in the starting weights: the `head_order` of `build_network`, and words.

    Outputs are matched by the names of their classes, so that a network never learns on from outputs that meant
    something else.
    """
    if start is None:
        return None, "new (no model.json beside the weights names its classes)"
    names = ", ".join(start.classes)
    if set(start.classes) != set(table.classes):
        return None, f"new (that of the weights is for {names})"
    form = (_number_of_outputs(training, table), table.multilabel, training.hidden_units)
    if (start.outputs, start.multilabel, start.hidden_units) != form:
        return None, "new (that of the weights has another form)"
    order = tuple(start.classes.index(name) for name in table.classes)
    return order, "kept" if start.classes == table.classes else f"reordered (in the weights: {names})"


def _built(
    network: str, outputs: int, training: Training, weights: str, head_order: Sequence[int] | None
) -> nn.Module:
    model = build_network(
        network,
        outputs,
        weights=weights,
        head_order=head_order,
        dropout=training.dropout,
        residual_gain=training.residual_gain,
        hidden_units=training.hidden_units,
    )
    if training.temporary_batch_norm:
        add_batch_norm(model)
    return model


def _preprocessing(study: Study, network: str, masking: LungMasking | None) -> Preprocessing:
    settings = study.preprocessing
    return Preprocessing(study.training_of(network).image_size, settings.mean, settings.std, lungs=masking)


def _cached_images(
    rows: Mapping[str, tuple[Sequence[str], object]],
    preprocessing: Preprocessing,
    training: Training,
    runs: Path,
    *,
    title: str,
) -> dict[str, ImageFile] | None:
    """Return the decoded images of each split, from a file in `runs/image_cache/`, or None to decode them in every
    epoch, where the study wants that or the file cannot be written.
    """
    if not training.cache_images:
        return None
    try:
        return cached(
            {split: paths for split, (paths, _) in rows.items()},
            preprocessing,
            runs / "image_cache",
            title=title,
        )
    except CacheFailed as error:
        print(f"{title}: {error}; images are decoded anew in every epoch, which is slower")
        return None


def _announce(
    network: str, model: nn.Module, study: Study, table: XrayTable, device: torch.device, head: str
) -> None:
    training, title = study.training_of(network), architecture(network).title
    print(
        f"{title}: {parameter_count(model):,} parameters for {len(table.classes)} classes, weights "
        f"{training.weights}, {study.training_of(network).image_size} px, {len(table.subset('train'))} training images"
    )
    if training.weights not in NO_FILE:
        print(f"{title}: head: {head}")
    print(f"{title}: computed in {described(training.precision, device)}")
    if training.weights == "none" and any(phase.trainable == "head" for phase in training.all_phases):
        print(f"{title}: the frozen layers keep random weights, which is for trying things out only")
    if (positive := positive_class(study, table)) is not None:
        reason = "the study says so" if study.positive else "the other one has a name for healthy people"
        print(f"{title}: the positive class is {positive!r}: {reason}")
    if unlearnt := table.one_sided("train"):
        print(
            f"{title}: WARNING: no training image has {', '.join(unlearnt)}, or all have: a network cannot learn what "
            "it is, and nothing is reported of it"
        )
    undecided = [name for name in table.one_sided("val") if name not in unlearnt]
    if undecided and training.threshold != "none":
        print(
            f"{title}: WARNING: no validation image has {', '.join(undecided)}, or all have: no threshold can be "
            "chosen for it, and it is never said to be there"
        )


def _fixed_settings(
    study: Study, table: XrayTable, network: str, accelerator: Accelerator, runs: Path
) -> dict[str, object]:
    """Return, flat, all that must be the same when a training goes on."""
    idle = {"cache_images", "checkpoint_minutes", "keep_checkpoints", "threshold"}
    training = study.training_of(network)
    start, _ = _starting_weights(network, training, runs)
    groups = {
        "preprocessing": study.preprocessing.model_dump(mode="json"),
        "augmentation": study.augmentation.model_dump(mode="json"),
    }
    flat = {f"{group} {key}": value for group, values in groups.items() for key, value in values.items()}
    return {
        **training.model_dump(mode="json", exclude=idle),
        **flat,
        "image_size": study.training_of(network).image_size,
        "seed": study.seed,
        "precision": resolve_precision(training.precision, accelerator.device),
        "data": data_fingerprint(table),
        # The card beside a file names the classes of its head.
        "content of weights": None
        if start in NO_FILE
        else content_digests([start, Path(start).with_name("model.json")]),
        "processes": accelerator.num_processes,
        **_of_this_process(accelerator),
    }


def _of_this_process(accelerator: Accelerator) -> dict[str, object]:
    """Return those of `_fixed_settings` that each of several processes has of its own."""
    return {
        "threads": torch.get_num_threads(),
        "device": accelerator.device.type,
        "torch": str(torch.__version__),
    }


def _agreed_settings(
    study: Study, table: XrayTable, network: str, accelerator: Accelerator, runs: Path
) -> tuple[dict[str, object], str, bool]:
    """Return `_fixed_settings`, the `_settings_digest`, and whether the run folder holds complete results of these
    very settings and images.

    Of several processes the main one looks for all: if each did for itself, one might train while another does not.
    Raises ValueError in all of them where they differ in what each has of its own.
    """
    refuse_differences(accelerator, _of_this_process(accelerator))

    def look() -> tuple[dict[str, object], str, bool]:
        fixed = _fixed_settings(study, table, network, accelerator, runs)
        digest = _settings_digest(study, table, network, fixed, runs)
        card = read_complete_card(runs / study.name / network)
        return fixed, digest, card is not None and card.origin.get("settings") == digest

    return from_main(accelerator, look)


def _write_results(
    folder: Path,
    table: XrayTable,
    card: ModelCard,
    model: nn.Module,
    done: FineTuned,
    logits: Mapping[str, Tensor],
) -> None:
    done.history.to_csv(folder / "history.csv", index=False)
    done.timing.to_csv(folder / "timing.csv", index=False)
    for split, values in logits.items():
        predictions = predictions_frame(table, split, card.probabilities(values).numpy())
        predictions.to_csv(folder / f"predictions_{split}.csv", index=False)
    splits_frame(table).to_csv(folder / "splits.csv", index=False)
    save_network(folder, model, card)


def _refuse_absent_classes(table: XrayTable) -> None:
    """Refuse a class without a training image, which no network can learn; name one without a validation image.

    In a multi-label table a finding is rare rather than absent, and is told of with its figures.
    """
    if table.multilabel:
        return
    counts = table.counts().reindex(columns=SPLITS, fill_value=0)
    absent = {split: list(counts.index[counts[split] == 0]) for split in SPLITS}
    if absent["train"]:
        others = ", ".join(f'"{name}"' for name in table.classes if name not in absent["train"])
        raise ValueError(
            f"no training image of {', '.join(absent['train'])}: add some, hold out fewer (val and test in [split]), "
            f"or leave the class out (classes = [{others}] in [data])"
        )
    if absent["val"]:
        print(f"WARNING: no validation image of {', '.join(absent['val'])}: nothing is chosen by that class")


def _warn_of_changed_images(table: XrayTable, content: Sequence[str | None], *, title: str) -> bool:
    """Say which images are no longer those whose `content` was seen before the training; return whether any is."""
    paths, now = table.frame["path"], content_digests(table.frame["path"])
    changed = [(path, new) for path, old, new in zip(paths, content, now, strict=True) if old != new]
    if changed:
        path, new = changed[0]
        what = f"{path} {'is gone' if new is None else 'has other content'}"
        print(
            f"WARNING: {len(changed)} of {len(table)} images are not what they were when {title} began, the first: "
            f"{what}. Put them back, or train again"
        )
    return bool(changed)


def _uninformed_loss(
    training: Training, table: XrayTable, objective: Objective, loss_weights: Tensor | None
) -> float:
    """Return the validation loss of a network that knows no more than how frequent the classes are as it sees them:
    balanced alike, else as among the training images.
    """
    train, val = (torch.tensor(table.targets(split)) for split in ("train", "val"))
    number = len(table.classes)
    frequent = (train if table.multilabel else nn.functional.one_hot(train, number)).double().mean(dim=0)
    alike = torch.full_like(frequent, 0.5 if table.multilabel else 1 / number)
    return uninformed_loss(objective, frequent if training.balance == "none" else alike, val, loss_weights)


def _warn_of_nothing_learnt(done: FineTuned, uninformed_loss: float, *, title: str) -> None:
    lowest = done.history["val_loss"].min()
    if lowest > LEARNT * uninformed_loss:
        print(
            f"WARNING: {title} has hardly learnt anything: its validation loss is {lowest:.4f} at best, and one and "
            f"the same answer for every image has {uninformed_loss:.4f}"
        )


def _number_of_outputs(training: Training, table: XrayTable) -> int:
    """Return how many outputs the network needs; refuse settings that do not fit the table's classes."""
    number = len(table.classes)
    if table.multilabel and len(table.one_sided("train")) == number:
        raise ValueError(
            f"no training image has any of {', '.join(table.classes)}, or all have all: take more images"
        )
    if table.multilabel and training.balance == "oversample":
        raise ValueError('balance = "oversample" needs one class an image: use "loss" for several labels')
    if training.select == "auc" and not table.multilabel:
        raise ValueError('select = "auc" is the mean over several labels: use "loss" for one class an image')
    if training.threshold != "none" and number > 2 and not table.multilabel:
        raise ValueError(f'threshold = "{training.threshold}" decides between two classes, not {number}')
    if table.multilabel or training.head == "softmax":
        return number
    if number != 2:
        raise ValueError(f'head = "sigmoid" tells two classes apart, not {number}: use "softmax"')
    return 1


def _objective(table: XrayTable) -> Objective:
    """Return what a network for the table is trained for; findings that nothing can be learnt of have no score."""
    if not table.multilabel:
        return SINGLE_LABEL
    one_sided = table.one_sided("train")
    unlearnt = torch.tensor([name in one_sided for name in table.classes])

    def score(outputs: Tensor, targets: Tensor) -> float:
        return macro_auc(outputs.masked_fill(unlearnt, torch.nan), targets)

    return replace(MULTI_LABEL, score=score)


def _lung_masking(
    study: Study, table: XrayTable, runs: Path
) -> tuple[LungMasking | None, pd.DataFrame | None]:
    """Return the preprocessing that leaves the lungs only, its masks computed, and the images in which it finds
    none, by path below the data root; or None twice where the study asks for no such thing.
    """
    if study.preprocessing.lung_model is None:
        return None, None
    folder = runs / study.preprocessing.lung_model
    masking = LungMasking(default_segmenter(folder), cache=folder / "masks")
    masking.prepare(table.frame["path"])
    failed = masking.failures_table(table.frame["path"])
    found = ", ".join(f"{k} {v:.3g}" for k, v in masking.segmenter.validation.items() if k == "dice")
    print(f"lungs: the model in {folder} ({found or 'never scored'})")
    if len(failed) == len(table):
        raise ValueError(
            f"the lung model in {folder} finds no plausible lungs in any image: train a better one with "
            "python lung_segmentation.py fit --pairs DIR -o FOLDER"
        )
    if len(failed):
        loud = "WARNING: " if len(failed) > 0.2 * len(table) else ""
        reasons = failed["reason"].str.replace(r"[\d.]+ ?%", "n %", regex=True).value_counts()
        named = ", ".join(f"{reason}: {count}" for reason, count in reasons.head(3).items())
        print(f"{loud}lungs not found in {len(failed)} of {len(table)} images, which stay whole ({named})")
    return masking, failed.assign(path=relative_paths(failed["path"], table.root))


def _loss_weights(training: Training, table: XrayTable) -> Tensor | None:
    targets = table.targets("train")
    if training.balance != "loss":
        return None
    return label_weights(targets) if table.multilabel else class_weights(targets, len(table.classes))


def _after_epoch(
    log: Callable[[pd.DataFrame], None], model: nn.Module, folder: Path | None
) -> Callable[[pd.DataFrame], None]:
    """Return what is done after each epoch: the history is written, and the weights where `folder` is given."""

    def after(history: pd.DataFrame) -> None:
        log(history)
        if folder is not None:
            (folder / "checkpoints").mkdir(exist_ok=True)
            file = folder / "checkpoints" / f"epoch_{len(history):02}.safetensors"
            write_whole(file, partial(save_file, on_cpu(model.state_dict())))

    return after


def _card(
    study: Study,
    table: XrayTable,
    network: str,
    model: nn.Module,
    done: FineTuned,
    val_logits: Tensor,
    origin: Mapping[str, object],
) -> ModelCard:
    """Return the model card, with the temperature and the thresholds that validation chooses."""
    training, targets = study.training_of(network), table.targets("val")
    best = done.history.iloc[done.best_epoch - 1]
    device = next(model.parameters()).device
    measured = [name for name in done.history if name.startswith("val_")]
    plain = ModelCard(
        architecture=network,
        classes=table.classes,
        image_size=study.training_of(network).image_size,
        mean=study.preprocessing.mean,
        std=study.preprocessing.std,
        cam_layer=model.cam_layer,
        head="sigmoid" if table.multilabel else training.head,
        hidden_units=training.hidden_units,
        dropout=training.dropout,
        multilabel=table.multilabel,
        lung_masking=study.preprocessing.lung_model is not None,
        positive=positive_class(study, table),
        unreported=table.one_sided("train"),
        temperature=1.0 if table.multilabel else fit_temperature(class_logits(val_logits).numpy(), targets),
        origin=_origin(study, table, device=str(device), parameters=parameter_count(model), **origin),
        validation={
            "best_epoch": done.best_epoch,
            "epochs": len(done.history),
            **{name.removeprefix("val_"): float(best[name]) for name in measured},
            "training_seconds": round(float(done.timing["seconds"].sum()), 1),
        },
    )
    if training.threshold == "none":
        return plain
    values = plain.probabilities(val_logits).numpy()
    chosen = choose_thresholds(targets, values, training.threshold, positive=plain.positive_index)
    return replace(plain, thresholds=tuple(None if math.isnan(value) else float(value) for value in chosen))


def _origin(study: Study, table: XrayTable, **more: object) -> dict[str, object]:
    # The data root is where one machine keeps the data: it is no part of the experiment.
    settings = study.model_dump(mode="json", exclude={"data": {"root"}, "datasets": {"__all__": {"root"}}})
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"torchvision": torchvision.__version__, "accelerate": accelerate.__version__}
    images = {split: len(table.subset(split)) for split in SPLITS}
    return {
        "study": settings,
        "seed": study.seed,
        "images": images,
        "commit": _commit(),
        "versions": versions,
        "threads": torch.get_num_threads(),  # sums in another order differ in the last bits
        **more,
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without git is fine, it only cannot say which one it is


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune the networks of a study from the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Fine-tune the networks of a study.")
    parser.add_argument("study", metavar="STUDY", help="a name in studies/ or a TOML file")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is (default: the study's)")
    parser.add_argument(
        "--runs", metavar="DIR", type=Path, default=RUNS, help="where results go (default: runs/)"
    )
    parser.add_argument("--networks", metavar="A,B", help="only these networks (default: the study's)")
    parser.add_argument(
        "--weights",
        metavar="imagenet|none|FILE|RUN",
        help="what to start from; of a run, a folder or STUDY/NETWORK, the head too where it has the same classes "
        "(default: the study's)",
    )
    parser.add_argument("--epochs", metavar="N", type=int, help="of each phase")
    parser.add_argument("--image-size", metavar="N", type=int, help="side of the square image, pixels")
    parser.add_argument("--batch-size", metavar="N", type=int)
    parser.add_argument("--limit", metavar="N", type=int, help="only N images, stratified, to try things out")
    parser.add_argument("--fold", metavar="K", type=int, help="part K of a study with `folds` validates")
    parser.add_argument("--seed", metavar="N", type=int)
    parser.add_argument(
        "--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)"
    )
    parser.add_argument(
        "--seeds", metavar="A,B", help="train once with each seed, split alike, to see what chance does"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin anew what was broken off, instead of going on"
    )
    given = parser.parse_args(arguments)
    try:
        studies = _studies(given)
        check_weights(studies[0], given.runs)
        accelerator = accelerator_on(resolve_device(given.device))
        with accelerator.main_process_first():  # a phantom is drawn once
            table = load_table(studies[0])
        if accelerator.is_main_process:
            print(
                "\n".join(
                    (f"{studies[0].title}: {len(table)} images", table.counts().to_string(), *table.notes)
                )
            )
            if table.has_patient_ids:
                number = table.frame["patient"].nunique()
                print(f"of {number} patients:\n{table.patient_counts().to_string()}")
        with contextlib.ExitStack() as told:
            if not accelerator.is_main_process:  # what all would say, one says
                silence = told.enter_context(open(os.devnull, "w", encoding="utf-8"))
                told.enter_context(contextlib.redirect_stdout(silence))
            _fine_tune_all(studies, table, given)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, SafetensorError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"finetune.py: {stopped or 'stopped; run the same again to go on'}", file=sys.stderr)
        return 130
    return 0


def _studies(given: argparse.Namespace) -> list[Study]:
    """Return the study that the command line asks for, once a seed."""
    if given.seed is not None and given.seeds is not None:
        raise ValueError("give either --seed or --seeds")
    study = load_study(given.study, data_root=given.data_root).overridden(
        networks=tuple(given.networks.split(",")) if given.networks else None,
        weights=given.weights,
        epochs=given.epochs,
        image_size=given.image_size,
        batch_size=given.batch_size,
        limit=given.limit,
        fold=given.fold,
        seed=given.seed,
    )
    if given.seeds is None:
        return [study]
    try:
        return [study.repeated(seed) for seed in dict.fromkeys(map(int, given.seeds.split(",")))]
    except ValueError as error:
        wrong = "invalid literal" in str(error)
        raise ValueError(
            f"--seeds {given.seeds}: give whole numbers, as in 0,1,2" if wrong else error
        ) from None


def _fine_tune_all(studies: Sequence[Study], table: XrayTable, given: argparse.Namespace) -> None:
    """Fine-tune every network of every study."""
    accelerator = accelerator_on(resolve_device(given.device))
    jobs = [(study, network) for study in studies for network in study.networks]
    if not given.restart:
        for study, network in jobs:  # before any of them is trained
            fixed, _, finished = _agreed_settings(study, table, network, accelerator, given.runs)
            if not finished:
                Checkpoints(given.runs / study.name / network / "resume", fixed).fits()
    for study, network in jobs:
        if len(studies) > 1:
            print(f"seed {study.seed}, into {given.runs / study.name / network}")
        fine_tune_study(study, table, network, runs=given.runs, device=given.device, restart=given.restart)


def _settings_digest(
    study: Study, table: XrayTable, network: str, fixed: Mapping[str, object], runs: Path
) -> str:
    """Return 16 hex digits that change with anything that the results depend on."""
    # For people, for other notebooks, or covered by the data's fingerprint and by `training_of`:
    other = {"name", "title", "description", "source", "compare", "maps", "data", "datasets"}
    other |= {"training", "networks", "positive"}
    costs = {"cache_images", "checkpoint_minutes"}  # these change the time that it takes
    lungs = study.preprocessing.lung_model
    settings = {
        "fixed": fixed,
        "lungs": lungs and content_digests([runs / lungs / "model.safetensors"]),
        "study": study.model_dump(mode="json", exclude=other),
        "positive": positive_class(study, table),  # the same whether the study names it or not
        "training": study.training_of(network).model_dump(mode="json", exclude=costs),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_weights(study: Study, runs: Path) -> None:
    """Refuse, before any work, unknown networks and starting weights that are missing or another network's."""
    for network in study.networks:
        architecture(network)
    files = [study.training_of(network).weights for network in study.networks]
    for file in set(files) - NO_FILE:
        if files.count(file) > 1:
            raise ValueError(f"{file} holds one network's weights: name that network with --networks")
    for network in study.networks:
        _starting_weights(network, study.training_of(network), runs)


if __name__ == "__main__":
    sys.exit(main())
