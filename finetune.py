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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import accelerate
import pandas as pd
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from augmentation import Augmentation
from calibration import fit_temperature
from checkpoints import Checkpoints, on_cpu, write_whole
from compute import Compute, measured_compute
from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.splits import splits_frame
from datasets.table import relative_paths
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
from objectives import MULTI_LABEL, SINGLE_LABEL, Objective, macro_auc
from predictions import choose_thresholds
from processes import accelerator_on
from results import complete_or_absent, history_log, linked, predictions_frame, training_folder
from studies import PROJECT, Study, Training, load_study, load_table, positive_class
from trained_networks import ModelCard, read_card, save_network
from training import FineTuned, fine_tune, predict_logits
from utils import Preprocessing, class_weights, label_weights, make_batches, seed_everything

RUNS = PROJECT / "runs"


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
    `restart`. The same study, data and machine give the same weights, on a CPU byte for byte, broken off or not.

    Raises ValueError where `resume/` is of other settings, or another process is training into the folder.
    """
    training, kind = study.training_of(network), architecture(network)
    where = resolve_device(device)
    accelerator = accelerator_on(where)
    outputs = _number_of_outputs(training, table)
    if training.batch_size < accelerator.num_processes:
        raise ValueError(
            f"batch_size {training.batch_size} is shared by {accelerator.num_processes} processes: raise it"
        )
    folder = runs / study.name / network
    with training_folder(folder, restart=restart, write=accelerator.is_main_process) as working:
        with accelerator.main_process_first():  # it writes what the others then read
            masking, failed = _lung_masking(study, table, runs)
            preprocessing = _preprocessing(study, network, masking)
            rows = {split: (table.subset(split)["path"], table.targets(split)) for split in SPLITS}
            images = _cached_images(rows, preprocessing, training, runs, title=kind.title)
        batches = make_batches(
            rows,
            preprocessing,
            num_classes=len(table.classes),
            batch_size=training.batch_size,
            augment=Augmentation(**study.augmentation.model_dump()),
            oversample=training.balance == "oversample",
            seed=study.seed,
            images=images,
            num_workers=training.num_workers,
        )
        seed_everything(study.seed)
        model = _built(network, outputs, training)
        if accelerator.is_main_process:
            _announce(network, model, study, table)
        with accelerator.main_process_first():
            compute = _compute(working, runs, model, study, network, where, len(batches["train"].sizes()))
        with history_log(working if accelerator.is_main_process else None) as log:
            done = fine_tune(
                model,
                batches,
                training=training,
                objective=_objective(table),
                loss_weights=_loss_weights(training, table),
                device=device,
                compute=compute,
                title=kind.title,
                on_epoch=_after_epoch(log, model, working if training.keep_checkpoints else None),
                checkpoints=Checkpoints(
                    working,
                    _fixed_settings(study, table, network)
                    | {
                        "images": preprocessing.key,
                        "processes": accelerator.num_processes,
                        "device": where.type,
                    },
                ),
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
                "settings": _settings_digest(study, table, network),
                "processes": accelerator.num_processes,
                "computed": str(compute),
            }
            card = _card(study, table, network, model, done, logits["val"], origin)
            with complete_or_absent(folder) as results:
                _write_results(results, table, card, model, done, logits)
                if masking is not None:
                    save_segmenter(results / "lungs", masking.segmenter)
                    failed.to_csv(results / "lungs_failed.csv", index=False)
                for kept in ("checkpoints", "tensorboard"):
                    if (working / kept).is_dir():
                        shutil.copytree(working / kept, results / kept, copy_function=linked)
        accelerator.wait_for_everyone()
    return folder


def _built(network: str, outputs: int, training: Training) -> nn.Module:
    model = build_network(
        network,
        outputs,
        weights=training.weights,
        dropout=training.dropout,
        residual_gain=training.residual_gain,
        hidden_units=training.hidden_units,
    )
    if training.temporary_batch_norm:
        add_batch_norm(model)
    return model


def _preprocessing(study: Study, network: str, masking: LungMasking | None) -> Preprocessing:
    settings = study.preprocessing
    return Preprocessing(study.image_size_of(network), settings.mean, settings.std, lungs=masking)


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


def _compute(
    working: Path,
    runs: Path,
    model: nn.Module,
    study: Study,
    network: str,
    device: torch.device,
    batches: int,
) -> Compute:
    """Return how to compute; a training that goes on computes as it did, whatever was measured since."""
    kept, training = working / "compute.json", study.training_of(network)
    if kept.is_file():
        return Compute(**json.loads(kept.read_text(encoding="utf-8")))
    chosen = measured_compute(
        model,
        study.image_size_of(network),
        training,
        device,
        steps=sum(phase.epochs for phase in training.stretches) * batches,
        kept=runs / "compute.json",
        title=architecture(network).title,
    )
    write_whole(kept, json.dumps(asdict(chosen)))
    return chosen


def _announce(network: str, model: nn.Module, study: Study, table: XrayTable) -> None:
    training, title = study.training_of(network), architecture(network).title
    print(
        f"{title}: {parameter_count(model):,} parameters for {len(table.classes)} classes, weights "
        f"{training.weights}, {study.image_size_of(network)} px, {len(table.subset('train'))} training images"
    )
    if training.weights == "none" and any(phase.trainable == "head" for phase in training.stretches):
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


def _fixed_settings(study: Study, table: XrayTable, network: str) -> dict[str, object]:
    """Return, flat, all that must be the same when a training goes on."""
    idle = {"num_workers", "cache_images", "checkpoint_minutes", "keep_checkpoints", "threshold"}
    training = study.training_of(network).model_dump(mode="json", exclude=idle)
    groups = {
        "preprocessing": study.preprocessing.model_dump(mode="json"),
        "augmentation": study.augmentation.model_dump(mode="json"),
    }
    flat = {f"{group} {key}": value for group, values in groups.items() for key, value in values.items()}
    return {
        **training,
        **flat,
        "image_size": study.image_size_of(network),
        "seed": study.seed,
        "data": data_fingerprint(table),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


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
    unlearnt = torch.tensor([name in table.one_sided("train") for name in table.classes])

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
        image_size=study.image_size_of(network),
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
    fingerprint = data_fingerprint(table)
    return {
        "study": settings,
        "seed": study.seed,
        "images": images,
        "data_fingerprint": fingerprint,
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
        "--weights", metavar="imagenet|none|FILE", help="what to start from (default: the study's)"
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
        check_weights(studies[0])
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
            _fine_tune_all(studies, table, given, first=accelerator.is_main_process)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, SafetensorError) as error:
        # A loader's worker sends a traceback as text: its last line is the error.
        print(f"finetune.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
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


def _fine_tune_all(
    studies: Sequence[Study], table: XrayTable, given: argparse.Namespace, *, first: bool
) -> None:
    """Fine-tune every network of every study; after an interruption those that were finished before are kept."""
    jobs = [
        (study, network, given.runs / study.name / network) for study in studies for network in study.networks
    ]
    asked = {folder: _settings_digest(study, table, network) for study, network, folder in jobs}
    if not given.restart:
        for study, network, folder in jobs:  # before any of them is trained
            Checkpoints(folder / "resume", _fixed_settings(study, table, network)).fits()
    command = hashlib.sha256("".join(asked.values()).encode()).hexdigest()[:12]
    # From when this command is begun until it is done: then, results that are newer are its own.
    mark = given.runs / studies[0].name / f".unfinished-{command}"
    if first and (given.restart or not mark.is_file()):
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_whole(mark, "")
    accelerator_on(resolve_device(given.device)).wait_for_everyone()
    done = [folder for folder, settings in asked.items() if _finished_since(mark, folder, settings)]
    for study, network, folder in jobs:
        if folder in done:
            print(f"{folder} was finished before the interruption")
            continue
        if len(studies) > 1:
            print(f"seed {study.seed}, into {folder}")
        fine_tune_study(study, table, network, runs=given.runs, device=given.device, restart=given.restart)
        print(f"saved {folder}")
    if first:
        mark.unlink(missing_ok=True)


def _settings_digest(study: Study, table: XrayTable, network: str) -> str:
    settings = json.dumps(_fixed_settings(study, table, network), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _finished_since(mark: Path, folder: Path, settings: str) -> bool:
    """Return whether a run folder holds results of these settings that are newer than a mark."""
    try:
        newer = (folder / "model.json").stat().st_mtime_ns > mark.stat().st_mtime_ns
        return newer and read_card(folder).origin.get("settings") == settings
    except (OSError, ValueError):
        return False


def check_weights(study: Study) -> None:
    """Refuse, before any work, unknown networks and one weights file for several architectures."""
    for network in study.networks:
        architecture(network)
    files = [study.training_of(network).weights for network in study.networks]
    for file in set(files) - {"imagenet", "none"}:
        if files.count(file) > 1:
            raise ValueError(f"{file} holds one network's weights: name that network with --networks")
        if not Path(file).is_file():
            raise FileNotFoundError(f"no weights file {file}: give a file, 'imagenet' or 'none'")


if __name__ == "__main__":
    sys.exit(main())
