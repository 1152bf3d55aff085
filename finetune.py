"""Fine-tune the networks of a study: the function that notebook 2 calls, and the command line.

python finetune.py covid_radiography --data-root DIR --networks resnet18
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn

import networks
from architectures.batch_norm_folding import add_batch_norm, fold_batch_norm
from datasets import SPLITS, XrayTable
from evaluation.calibration import fit_temperature
from evaluation.predictions import choose_thresholds
from inference.starting_weights import kept_head, starting_weights
from inference.trained_networks import ModelCard, save_network
from lungs.segmentation import save_segmenter
from studies.loading import PROJECT, load_study, load_table, positive_class
from studies.settings import IMAGENET_MEAN, IMAGENET_STD, NetworkTraining, Study
from training.checkpoints import Checkpoints, on_cpu
from training.devices import described
from training.learning_task import LearningTask, learning_task
from training.loop import FineTuned, fine_tune, predict_logits
from training.prepared_images import PreparedImages, lung_masking_of, prepared_images
from training.processes import accelerator_on, from_main, refuse_differences
from training.provenance import Provenance, changed_images, origin, process_settings, provenance_of
from training.run_folder import RESUME, finished_digest, log_epoch, replaced_results, training_folder, write_tables
from utils import Preprocessing, resolve_device

RUNS = PROJECT / "runs"
# If the validation loss stays above this share of the uninformed loss, the network has learnt nothing.
LEARNT = 0.99


@dataclass(frozen=True)
class Job:
    """One network of a study, checked and ready to be trained.

    Attributes:
        network: the name of the architecture.
        runs: the folder of all run folders.
        folder: the run folder.
        training: the settings of this network; `precision` is the one in use.
        weights_file, weights_card: as `starting_weights` returns them.
        preprocessing: the steps from an X-ray to the input; `preprocessing.lungs` is None if the study does not mask.
    """

    study: Study
    table: XrayTable
    network: str
    runs: Path
    folder: Path
    training: NetworkTraining
    accelerator: PartialState
    task: LearningTask
    weights_file: Path | None
    weights_card: ModelCard | None
    preprocessing: Preprocessing
    provenance: Provenance

    @property
    def title(self) -> str:
        """The name of the architecture for people."""
        return networks.architecture(self.network).title

    @property
    def is_finished(self) -> bool:
        """Whether the run folder holds complete results of these settings and images."""
        return from_main(self.accelerator, lambda: finished_digest(self.folder)) == self.provenance.digest


def fine_tune_study(
    study: Study, table: XrayTable, network: str, *, runs: Path = RUNS, device: str = "auto", restart: bool = False
) -> Path:
    """Fine-tune one network of a study and return its run folder, `runs/<study>/<network>`.

    Results are written when they are complete, and only then replace older results. Until then the state is in the
    subfolder `resume/`, from which the next call continues an interrupted training. A complete training with the same
    settings and images is not repeated. The same study, data and machine give the same weights, also after an
    interruption. On a CPU they are the same byte for byte.

    Args:
        study: the study.
        table: its images, split.
        network: the name of the architecture.
        runs: the folder of all run folders.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        restart: whether to train from the beginning, even if the training is finished or was interrupted.

    Raises:
        ValueError: `resume/` holds a training with other settings, another process is training into the folder, or a
            class has no training image.
        KeyboardInterrupt: the training was asked to stop. If its last epoch was done, its results are written.
    """
    return _fine_tune_job(_checked_job(study, table, network, runs, device), restart=restart)


def _fine_tune_job(job: Job, *, restart: bool) -> Path:
    if not restart and job.is_finished:
        print(f"{job.folder} is finished, with the same settings and images (--restart trains it again)")
        return job.folder
    is_main = job.accelerator.is_main_process
    with training_folder(job.folder, restart=restart) if is_main else contextlib.nullcontext():
        images = _prepared(job)
        model = _built(job)
        course, logits = _trained(job, model, images)
        if is_main:
            _record(job, images, model, course, logits)
        job.accelerator.wait_for_everyone()
    if course.asked_to_stop:
        raise KeyboardInterrupt(f"stopped, with {job.folder} finished; run the same again to go on")
    return job.folder


# --- check before any work ---


def _checked_job(study: Study, table: XrayTable, network: str, runs: Path, device: str) -> Job:
    """Return the checked job for one network. Raises ValueError or FileNotFoundError if it cannot be done."""
    weights = starting_weights(study, network, runs)
    accelerator = accelerator_on(resolve_device(device))
    training = study.training_of(network)
    task = learning_task(training, table)
    if training.batch_size < (number := accelerator.num_processes):
        raise ValueError(f"batch_size {training.batch_size} is shared by {number} processes: raise it")
    refuse_differences(accelerator, process_settings(accelerator))
    with accelerator.main_process_first():  # the main process may have to train a lung model
        lungs = lung_masking_of(study, runs)
    preprocessing = Preprocessing(training.image_size, IMAGENET_MEAN, IMAGENET_STD, lungs)
    provenance = from_main(  # another process may see another state of the files
        accelerator, lambda: provenance_of(study, table, network, preprocessing.key, weights[0], accelerator)
    )
    # All processes compute in the precision of the main one.
    training = training.model_copy(update={"precision": provenance.settings["precision"]})
    folder = runs / study.name / network
    return Job(study, table, network, runs, folder, training, accelerator, task, *weights, preprocessing, provenance)


# --- prepare data ---


def _prepared(job: Job) -> PreparedImages:
    with job.accelerator.main_process_first():  # the main process fills the caches; the others read them
        images = prepared_images(job.study, job.table, job.network, job.preprocessing, job.runs)
    changed = from_main(job.accelerator, lambda: changed_images(job.table, job.provenance))
    if images.decoded and changed:
        raise ValueError(f"the images in {job.table.root} changed while they were decoded: train again")
    return images


# --- build network, train ---


def _built(job: Job) -> nn.Module:
    set_seed(job.study.seed)  # Python, NumPy, and torch on all devices
    training, outputs = job.training, job.task.outputs
    head_order, head = kept_head(job.weights_card, job.table, outputs, training.hidden_units)
    options = training.model_dump(include={"dropout", "residual_gain", "hidden_units"})
    weights = str(job.weights_file or training.weights)
    model = networks.build_network(job.network, outputs, weights=weights, head_order=head_order, **options)
    if training.temporary_batch_norm:
        add_batch_norm(model)
    _announce(job, networks.parameter_count(model), head)
    return model


def _announce(job: Job, parameters: int, head: str) -> None:
    """Print the settings of the training, and warnings."""
    table, training = job.table, job.training
    positive, unlearnt = positive_class(job.study, table), table.one_sided("train")
    reason = "the study says so" if job.study.positive else "the other class has a name for healthy people"
    undecided = [name for name in table.one_sided("val") if training.threshold != "none" and name not in unlearnt]
    only_head = any(phase.trainable == "head" for phase in training.all_phases)
    lines = [  # a line that does not apply is empty
        f"{parameters:,} parameters for {len(table.classes)} classes, weights {training.weights}, "
        f"{training.image_size} px, {len(table.subset('train'))} training images",
        job.weights_file and f"head: {head}",
        f"computed in {described(job.study.training_of(job.network).precision, job.accelerator.device)}",
        training.weights == "none" and only_head and "the frozen layers keep random weights: only good for a trial",
        positive and f"the positive class is {positive!r}, because {reason}",
        unlearnt and f"WARNING: not learnt, not reported: {', '.join(unlearnt)} (all training images have it, or none)",
        undecided and f"WARNING: never predicted: {', '.join(undecided)} (all validation images have it, or none)",
    ]
    print("\n".join(f"{job.title}: {line}" for line in lines if line))


def _trained(job: Job, model: nn.Module, images: PreparedImages) -> tuple[FineTuned, dict[str, Tensor]]:
    """Train a network; return the course of its training, and the (N, outputs) logits for each split."""
    working, device = job.folder / RESUME, job.accelerator.device

    def after_epoch(history: pd.DataFrame) -> None:
        log_epoch(working, history, on_cpu(model.state_dict()) if job.training.keep_checkpoints else None)

    course = fine_tune(
        model,
        images.batches,
        training=job.training,
        objective=job.task.objective,
        loss_weights=job.task.loss_weights,
        device=str(device),
        title=job.title,
        on_epoch=after_epoch,
        checkpoints=Checkpoints(working, job.provenance.settings),
    )
    if job.training.temporary_batch_norm:
        fold_batch_norm(model)
    in_order = images.batches | {"train": images.batches["train_plain"]}
    return course, {split: predict_logits(model, in_order[split], device=device) for split in SPLITS}


# --- record ---


def _record(job: Job, images: PreparedImages, model: nn.Module, course: FineTuned, logits: dict[str, Tensor]) -> None:
    """Write the results into the run folder. Warn if images have changed or the network has learnt nothing."""
    card, uninformed = _card(job, model, course, logits["val"]), job.task.uninformed_loss
    if changed := changed_images(job.table, job.provenance):
        print(
            f"WARNING: {len(changed)} of {len(job.table)} images have changed since the training of {job.title} began, "
            f"the first: {changed[0]}. Put them back, or train again"
        )
        if not images.decoded:
            # The network may have seen both versions, so the next call must train again.
            fingerprint = f"{card.origin['data_fingerprint']}, changed in training"
            card = replace(card, origin={**card.origin, "settings": None, "data_fingerprint": fingerprint})
    if (lowest := course.history["val_loss"].min()) > LEARNT * uninformed:
        print(
            f"WARNING: {job.title} has hardly learnt anything: its lowest validation loss is {lowest:.4f}; the same "
            f"answer for every image has {uninformed:.4f}"
        )
    probabilities = {split: card.probabilities(values).numpy() for split, values in logits.items()}
    with replaced_results(job.folder) as results:
        write_tables(results, job.table, course, probabilities)
        save_network(results, model, card)
        if images.without_lungs is not None:
            save_segmenter(results / "lungs", job.preprocessing.lungs.segmenter)
            images.without_lungs.to_csv(results / "lungs_failed.csv", index=False)
    print(f"saved {job.folder}")


def _card(job: Job, model: nn.Module, course: FineTuned, logits: Tensor) -> ModelCard:
    """Return the model card. Its temperature and thresholds are chosen on the validation images."""
    table, training, preprocessing = job.table, job.training, job.preprocessing
    targets = table.targets("val")
    best = course.history.iloc[course.best_epoch - 1].filter(like="val_").astype(float)
    card = ModelCard(
        architecture=job.network,
        classes=table.classes,
        image_size=preprocessing.image_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        cam_layer=model.cam_layer,
        head="sigmoid" if table.multilabel else training.head,
        **training.model_dump(include={"hidden_units", "dropout"}),
        multilabel=table.multilabel,
        lung_masking=preprocessing.lungs is not None,
        positive=positive_class(job.study, table),
        unreported=table.one_sided("train"),
        temperature=1.0 if table.multilabel else fit_temperature(networks.class_logits(logits).numpy(), targets),
        origin=origin(job.study, table, job.provenance) | {"parameters": networks.parameter_count(model)},
        validation={"best_epoch": course.best_epoch, "epochs": len(course.history)}
        | best.rename(lambda name: name.removeprefix("val_")).to_dict()
        | {"training_seconds": round(float(course.timing["seconds"].sum()), 1)}
        | {"uninformed_loss": job.task.uninformed_loss},
    )
    if training.threshold == "none":
        return card
    probabilities = card.probabilities(logits).numpy()
    chosen = choose_thresholds(targets, probabilities, training.threshold, positive=card.positive_index).tolist()
    return replace(card, thresholds=tuple(None if pd.isna(value) else value for value in chosen))


# --- the command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune the networks of a study from the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        studies = _studies(options)
        for network in studies[0].networks:  # before the images are read
            starting_weights(studies[0], network, options.runs)
        accelerator = accelerator_on(resolve_device(options.device))
        with contextlib.redirect_stdout(sys.stdout if accelerator.is_main_process else io.StringIO()):
            with accelerator.main_process_first():  # it draws the phantom; the others read it
                table = load_table(studies[0])
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
        help="what to start from; RUN is a run folder or STUDY/NETWORK, its head is kept if the classes are the same "
        "(default: the study's)",
    )
    parser.add_argument("--epochs", metavar="N", type=int, help="epochs of each phase")
    parser.add_argument("--image-size", metavar="N", type=int, help="side of the square image, pixels")
    parser.add_argument("--batch-size", metavar="N", type=int)
    parser.add_argument("--limit", metavar="N", type=int, help="for a trial: use only N images, stratified")
    parser.add_argument("--fold", metavar="K", type=int, help="use part K for validation, in a study with `folds`")
    parser.add_argument("--seed", metavar="N", type=int)
    parser.add_argument("--seeds", metavar="A,B", help="train once with each seed, on the same split")
    parser.add_argument("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--restart", action="store_true", help="train from the beginning, replace finished results")
    return parser


def _studies(options: argparse.Namespace) -> list[Study]:
    """Return the study that the command line asks for, once for each seed."""
    if options.seed is not None and options.seeds is not None:
        raise ValueError("give either --seed or --seeds")
    replaced = ("weights", "epochs", "image_size", "batch_size", "limit", "fold", "seed")
    settings = {name: getattr(options, name) for name in replaced}
    settings["networks"] = tuple(options.networks.split(",")) if options.networks else None
    study = load_study(options.study, data_root=options.data_root, **settings)
    if options.seeds is None:
        return [study]
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {options.seeds}: give whole numbers, as in 0,1,2") from None
    return [study.repeated(seed) for seed in dict.fromkeys(seeds)]


def _fine_tune_all(studies: Sequence[Study], table: XrayTable, options: argparse.Namespace) -> None:
    """Describe the data, then fine-tune every network of every study.

    If one of the trainings was interrupted with other settings, ValueError is raised before the first one starts.
    """
    print(f"{studies[0].title}: {len(table)} images", table.counts().to_string(), *table.notes, sep="\n")
    if table.has_patient_ids:
        print(f"of {table.frame['patient'].nunique()} patients:\n{table.counts('patient').to_string()}")
    pairs = [(study, network) for study in studies for network in study.networks]
    jobs = [_checked_job(study, table, network, options.runs, options.device) for study, network in pairs]
    for job in jobs:
        if not options.restart and not job.is_finished:
            Checkpoints(job.folder / RESUME, job.provenance.settings).saved()
    for job in jobs:
        if len(studies) > 1:
            print(f"seed {job.study.seed}, into {job.folder}")
        _fine_tune_job(job, restart=options.restart)


if __name__ == "__main__":
    sys.exit(main())
