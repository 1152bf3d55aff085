"""Fine-tune the networks of a study: what notebook 2 calls, and the script that does it headless.

python finetune.py covid_radiography --data-root DIR --networks resnet18
"""

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

import networks
from architectures.batch_norm_folding import add_batch_norm, fold_batch_norm
from datasets import SPLITS, XrayTable
from datasets.splits import splits_frame
from evaluation.calibration import fit_temperature
from evaluation.predictions import choose_thresholds
from inference.starting_weights import NO_FILE, StartingWeights, kept_head, starting_weights
from inference.trained_networks import ModelCard, save_network
from lungs.segmentation import save_segmenter
from studies.loading import PROJECT, load_study, load_table, positive_class
from studies.settings import Study, Training
from training.checkpoints import Checkpoints, on_cpu
from training.devices import described
from training.learning_task import LearningTask, learning_task
from training.loop import FineTuned, fine_tune, predict_logits
from training.prepared_images import PreparedImages, lung_masking_of, prepared_images
from training.processes import accelerator_on, from_main, refuse_differences
from training.provenance import Provenance, changed_images, origin, process_settings, provenance_of
from training.run_folder import (
    CARD,
    RESUME,
    finished_digest,
    log_epoch,
    predictions_frame,
    replaced_results,
    training_folder,
)
from utils import Preprocessing, resolve_device, seed_everything

RUNS = PROJECT / "runs"
# A network whose validation loss never falls below this share of the uninformed one has learnt nothing.
LEARNT = 0.99


@dataclass(frozen=True)
class Job:
    """One network of a study, checked and ready to be trained.

    Attributes:
        preprocessing: what every image goes through; `preprocessing.lungs` masks the lungs where the study wants it.
    """

    study: Study
    table: XrayTable
    network: str
    runs: Path
    accelerator: Accelerator
    task: LearningTask
    start: StartingWeights
    preprocessing: Preprocessing
    provenance: Provenance

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs / self.study.name / self.network

    @property
    def training(self) -> Training:
        """The settings of this network, with the precision that this machine computes in."""
        training = self.study.training_of(self.network)
        return training.model_copy(update={"precision": self.provenance.settings["precision"]})

    @property
    def title(self) -> str:
        """The name of the architecture for people."""
        return networks.architecture(self.network).title


@dataclass(frozen=True)
class Trained:
    """A trained network, how its training went, and its (N, outputs) logits for the images of each split."""

    model: nn.Module
    course: FineTuned
    logits: dict[str, Tensor]


def fine_tune_study(
    study: Study, table: XrayTable, network: str, *, runs: Path = RUNS, device: str = "auto", restart: bool = False
) -> Path:
    """Fine-tune one network of a study and return its run folder, `runs/<study>/<network>`.

    The results appear, or replace older ones, when they are complete. Until then the state is in `resume/` in that
    folder: a training that was broken off goes on from there when this is called again. Results of the same settings
    and images are kept. The same study, data and machine give the same weights, on a CPU byte for byte, whether the
    training was broken off or not.

    Args:
        study: the study.
        table: its images, split.
        network: the name of the architecture.
        runs: the folder of all run folders.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        restart: whether to begin anew, whatever is finished or was broken off.

    Raises:
        ValueError: `resume/` is of other settings, another process is training into the folder, or a class has no
            training image.
        KeyboardInterrupt: the training was asked to stop; where its last epoch was done, its results are written.
    """
    return _fine_tune_job(_checked_job(study, table, network, runs, device), restart=restart)


def _fine_tune_job(job: Job, *, restart: bool) -> Path:
    if not restart and _is_finished(job):
        print(f"{job.folder} is finished, with the same settings and images (--restart trains it again)")
        return job.folder
    if (job.folder / CARD).is_file():
        print(f"{job.folder} holds older results: they are replaced when this training is done")
    is_main = job.accelerator.is_main_process
    with training_folder(job.folder, restart=restart) if is_main else contextlib.nullcontext():
        images = _prepared(job)
        trained = _trained(job, images, job.folder / RESUME)
        if is_main:
            _record(job, images, trained)
        job.accelerator.wait_for_everyone()
    if trained.course.asked_to_stop:
        raise KeyboardInterrupt(f"stopped, with {job.folder} finished; run the same again to go on")
    return job.folder


# --- what is checked before any work ---


def _checked_job(study: Study, table: XrayTable, network: str, runs: Path, device: str) -> Job:
    """Return what is to be done for one network. Raises ValueError or FileNotFoundError where it cannot be done."""
    start = starting_weights(study, network, runs)
    accelerator = accelerator_on(resolve_device(device))
    training = study.training_of(network)
    task = learning_task(training, table)
    if training.batch_size < accelerator.num_processes:
        raise ValueError(
            f"batch_size {training.batch_size} is shared by {accelerator.num_processes} processes: raise it"
        )
    refuse_differences(accelerator, process_settings(accelerator))
    with accelerator.main_process_first():  # the main process may have to train a lung model
        lungs = lung_masking_of(study, runs)
    settings = study.preprocessing
    preprocessing = Preprocessing(training.image_size, settings.mean, settings.std, lungs)
    look = partial(provenance_of, study, table, network, preprocessing.key, start.file, accelerator)
    provenance = from_main(accelerator, look)  # another process might see another state of the files
    return Job(study, table, network, runs, accelerator, task, start, preprocessing, provenance)


def _is_finished(job: Job) -> bool:
    """Return whether the run folder holds complete results of the job's settings and images."""
    digest = from_main(job.accelerator, partial(finished_digest, job.folder))
    return digest == job.provenance.digest


# --- prepare data ---


def _prepared(job: Job) -> PreparedImages:
    with job.accelerator.main_process_first():  # the main process fills the caches; the others read them
        images = prepared_images(job.study, job.table, job.network, job.preprocessing, job.runs)
    changed = from_main(job.accelerator, lambda: changed_images(job.table, job.provenance))
    if images.decoded and changed:
        raise ValueError(f"the images in {job.table.root} have changed while they were decoded: train again")
    return images


# --- build network, train ---


def _trained(job: Job, images: PreparedImages, working: Path) -> Trained:
    """Build the network, train it with its state in `working`, and predict all images."""
    model, training = _built(job), job.training

    def after_epoch(history: pd.DataFrame) -> None:
        log_epoch(working, history, on_cpu(model.state_dict()) if training.keep_checkpoints else None)

    course = fine_tune(
        model,
        images.batches,
        training=training,
        objective=job.task.objective,
        loss_weights=job.task.loss_weights,
        device=str(job.accelerator.device),
        title=job.title,
        on_epoch=after_epoch,
        checkpoints=Checkpoints(working, job.provenance.settings),
    )
    if training.temporary_batch_norm:
        fold_batch_norm(model)
    of_split = images.batches | {"train": images.batches["train_plain"]}
    logits = {split: predict_logits(model, of_split[split], device=job.accelerator.device) for split in SPLITS}
    return Trained(model, course, logits)


def _built(job: Job) -> nn.Module:
    seed_everything(job.study.seed)
    training = job.training
    head_order, head = kept_head(job.start.card, job.table, job.task.outputs, training.hidden_units)
    model = networks.build_network(
        job.network,
        job.task.outputs,
        weights=job.start.weights,
        head_order=head_order,
        dropout=training.dropout,
        residual_gain=training.residual_gain,
        hidden_units=training.hidden_units,
    )
    if training.temporary_batch_norm:
        add_batch_norm(model)
    _announce(job, networks.parameter_count(model), head)
    return model


def _announce(job: Job, parameters: int, head: str) -> None:
    """Print what is going to be trained, and what is doubtful about it."""
    study, table = job.study, job.table
    training = study.training_of(job.network)
    lines = [
        f"{parameters:,} parameters for {len(table.classes)} classes, weights {training.weights}, "
        f"{training.image_size} px, {len(table.subset('train'))} training images"
    ]
    if training.weights not in NO_FILE:
        lines.append(f"head: {head}")
    lines.append(f"computed in {described(training.precision, job.accelerator.device)}")
    if training.weights == "none" and any(phase.trainable == "head" for phase in training.all_phases):
        lines.append("the frozen layers keep random weights, which is for trying things out only")
    if (positive := positive_class(study, table)) is not None:
        reason = "the study says so" if study.positive else "the other one has a name for healthy people"
        lines.append(f"the positive class is {positive!r}: {reason}")
    if unlearnt := table.one_sided("train"):
        lines.append(
            f"WARNING: no training image has {', '.join(unlearnt)}, or all have: a network cannot learn what it is, "
            "and nothing is reported of it"
        )
    undecided = [name for name in table.one_sided("val") if name not in unlearnt]
    if undecided and training.threshold != "none":
        lines.append(
            f"WARNING: no validation image has {', '.join(undecided)}, or all have: no threshold can be chosen for "
            "it, and it is never said to be there"
        )
    print("\n".join(f"{job.title}: {line}" for line in lines))


# --- record ---


def _record(job: Job, images: PreparedImages, trained: Trained) -> None:
    """Write the results into the run folder; warn of changed images and of a network that has learnt nothing."""
    course, table, uninformed = trained.course, job.table, job.task.uninformed_loss
    card = _card(job, trained)
    if changed := changed_images(table, job.provenance):
        print(
            f"WARNING: {len(changed)} of {len(table)} images are not what they were when {job.title} began, the first: "
            f"{changed[0]}. Put them back, or train again"
        )
        if not images.decoded:
            # The network may have seen both versions: these are the results of no one set of images.
            fingerprint = f"{card.origin['data_fingerprint']}, changed in training"
            card = replace(card, origin={**card.origin, "settings": None, "data_fingerprint": fingerprint})
    if (lowest := course.history["val_loss"].min()) > LEARNT * uninformed:
        print(
            f"WARNING: {job.title} has hardly learnt anything: its validation loss is {lowest:.4f} at best, and one "
            f"and the same answer for every image has {uninformed:.4f}"
        )
    with replaced_results(job.folder) as results:
        course.history.to_csv(results / "history.csv", index=False)
        course.timing.to_csv(results / "timing.csv", index=False)
        for split, logits in trained.logits.items():
            predictions = predictions_frame(table, split, card.probabilities(logits).numpy())
            predictions.to_csv(results / f"predictions_{split}.csv", index=False)
        splits_frame(table).to_csv(results / "splits.csv", index=False)
        save_network(results, trained.model, card)
        if images.without_lungs is not None:
            save_segmenter(results / "lungs", job.preprocessing.lungs.segmenter)
            images.without_lungs.to_csv(results / "lungs_failed.csv", index=False)
    print(f"saved {job.folder}")


def _card(job: Job, trained: Trained) -> ModelCard:
    """Return the model card, with the temperature and the thresholds that validation chooses."""
    study, table, training = job.study, job.table, job.training
    targets, logits = table.targets("val"), trained.logits["val"]
    temperature = 1.0
    if not table.multilabel:
        temperature = fit_temperature(networks.class_logits(logits).numpy(), targets)
    machine = {"device": str(job.accelerator.device), "parameters": networks.parameter_count(trained.model)}
    card = ModelCard(
        architecture=job.network,
        classes=table.classes,
        image_size=job.preprocessing.image_size,
        mean=job.preprocessing.mean,
        std=job.preprocessing.std,
        cam_layer=trained.model.cam_layer,
        head="sigmoid" if table.multilabel else training.head,
        hidden_units=training.hidden_units,
        dropout=training.dropout,
        multilabel=table.multilabel,
        lung_masking=job.preprocessing.lungs is not None,
        positive=positive_class(study, table),
        unreported=table.one_sided("train"),
        temperature=temperature,
        origin=origin(study, table, job.provenance) | machine,
        validation=_validation(trained.course) | {"uninformed_loss": job.task.uninformed_loss},
    )
    if training.threshold == "none":
        return card
    probabilities = card.probabilities(logits).numpy()
    chosen = choose_thresholds(targets, probabilities, training.threshold, positive=card.positive_index)
    return replace(card, thresholds=tuple(None if math.isnan(value) else float(value) for value in chosen))


def _validation(course: FineTuned) -> dict[str, float]:
    """Return the figures of the best epoch, and how long the training took."""
    best = course.history.iloc[course.best_epoch - 1]
    measured = [name for name in course.history if name.startswith("val_")]
    return {
        "best_epoch": course.best_epoch,
        "epochs": len(course.history),
        **{name.removeprefix("val_"): float(best[name]) for name in measured},
        "training_seconds": round(float(course.timing["seconds"].sum()), 1),
    }


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune the networks of a study from the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        studies = _studies(options)
        for network in studies[0].networks:  # before the images are read
            starting_weights(studies[0], network, options.runs)
        accelerator = accelerator_on(resolve_device(options.device))
        silent = contextlib.redirect_stdout(io.StringIO())
        with contextlib.nullcontext() if accelerator.is_main_process else silent:
            with accelerator.main_process_first():  # a phantom is drawn once
                table = load_table(studies[0])
            _describe(studies[0], table)
            _fine_tune_all(studies, table, options)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError, SafetensorError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"finetune.py: {stopped or 'stopped; run the same again to go on'}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune the networks of a study.")
    parser.add_argument("study", metavar="STUDY", help="a name in studies/ or a TOML file")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is (default: the study's)")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=RUNS, help="where results go (default: runs/)")
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
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--seeds", metavar="A,B", help="train once with each seed, split alike, to see what chance does"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew what was broken off, instead of going on")
    return parser


def _studies(options: argparse.Namespace) -> list[Study]:
    """Return the study that the command line asks for, once for each seed."""
    if options.seed is not None and options.seeds is not None:
        raise ValueError("give either --seed or --seeds")
    replaced = ("weights", "epochs", "image_size", "batch_size", "limit", "fold", "seed")
    study = load_study(options.study, data_root=options.data_root).overridden(
        networks=tuple(options.networks.split(",")) if options.networks else None,
        **{name: getattr(options, name) for name in replaced},
    )
    if options.seeds is None:
        return [study]
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {options.seeds}: give whole numbers, as in 0,1,2") from None
    return [study.repeated(seed) for seed in dict.fromkeys(seeds)]


def _describe(study: Study, table: XrayTable) -> None:
    print(f"{study.title}: {len(table)} images", table.counts().to_string(), *table.notes, sep="\n")
    if table.has_patient_ids:
        print(f"of {table.frame['patient'].nunique()} patients:\n{table.patient_counts().to_string()}")


def _fine_tune_all(studies: Sequence[Study], table: XrayTable, options: argparse.Namespace) -> None:
    """Fine-tune every network of every study. Before any is trained, a state of other settings is refused."""
    jobs = [
        _checked_job(study, table, network, options.runs, options.device)
        for study in studies
        for network in study.networks
    ]
    for job in jobs:
        if not options.restart and not _is_finished(job):
            Checkpoints(job.folder / RESUME, job.provenance.settings).saved()
    for job in jobs:
        if len(studies) > 1:
            print(f"seed {job.study.seed}, into {job.folder}")
        _fine_tune_job(job, restart=options.restart)


if __name__ == "__main__":
    sys.exit(main())
