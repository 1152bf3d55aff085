"""Fine-tune the networks of a study: what notebook 2 calls, and the script that does it headless.

python finetune.py covid_radiography --data-root DIR --networks resnet18
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import accelerate
import pandas as pd
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from calibration import fit_temperature
from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.splits import splits_frame
from datasets.table import relative_paths
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
from predictions import choose_thresholds
from results import complete_or_absent, history_log, predictions_frame
from studies import PROJECT, Study, Training, load_study, load_table
from trained_networks import ModelCard, save_network
from training import MULTI_LABEL, SINGLE_LABEL, FineTuned, fine_tune, predict_logits
from utils import Preprocessing, augmentation, class_weights, label_weights, make_loaders, seed_everything

RUNS = PROJECT / "runs"


def fine_tune_study(
    study: Study, table: XrayTable, network: str, *, runs: Path = RUNS, device: str = "auto"
) -> Path:
    """Fine-tune one network of a study and return its run folder, `runs/<study>/<network>`.

    The folder appears, or replaces an older one, when everything in it is complete: until then the work
    lies in a hidden folder beside it. The same study, data and machine give the same weights, on a CPU byte
    for byte.
    """
    training, kind = study.training_of(network), architecture(network)
    where = resolve_device(device)
    outputs = _number_of_outputs(training, table)
    masking, failed = _lung_masking(study, table, runs)
    seed_everything(study.seed)
    model = build_network(
        network,
        outputs,
        weights=training.weights,
        dropout=training.dropout,
        residual_gain=training.residual_gain,
        hidden_units=training.hidden_units,
    )
    size, settings = study.image_size_of(network), study.preprocessing
    preprocessing = Preprocessing(size, settings.mean, settings.std, lungs=masking)
    loaders = make_loaders(
        {split: (table.subset(split)["path"], table.targets(split)) for split in SPLITS},
        preprocessing,
        num_classes=len(table.classes),
        batch_size=training.batch_size,
        augment=augmentation(size, **study.augmentation.model_dump()),
        oversample=training.balance == "oversample",
        num_workers=training.num_workers,
        generator=torch.Generator().manual_seed(study.seed),
    )
    targets = table.targets("train")
    print(
        f"{kind.title}: {parameter_count(model):,} parameters for {len(table.classes)} classes, weights "
        f"{training.weights}, {size} px, {len(targets)} training images"
    )
    if training.weights == "none" and any(phase.trainable == "head" for phase in training.stretches):
        print(f"{kind.title}: the frozen layers keep random weights, which is for trying things out only")
    if training.temporary_batch_norm:
        add_batch_norm(model)
    folder = runs / study.name / network
    with complete_or_absent(folder) as partial, history_log(partial) as log:
        done = fine_tune(
            model,
            loaders,
            training=training,
            objective=MULTI_LABEL if table.multilabel else SINGLE_LABEL,
            loss_weights=_loss_weights(training, table),
            device=device,
            title=kind.title,
            on_epoch=_after_epoch(log, model, partial if training.keep_checkpoints else None),
            scratch=partial,
        )
        if training.temporary_batch_norm:
            fold_batch_norm(model)
        model.to(where)
        logits = {
            split: predict_logits(model, loaders["train_plain" if split == "train" else split], device=where)
            for split in SPLITS
        }
        card = _card(study, table, network, model, done, logits["val"])
        for split, values in logits.items():
            predictions = predictions_frame(table, split, card.probabilities(values).numpy())
            predictions.to_csv(partial / f"predictions_{split}.csv", index=False)
        splits_frame(table).to_csv(partial / "splits.csv", index=False)
        if masking is not None:
            save_segmenter(partial / "lungs", masking.segmenter)
            failed.to_csv(partial / "lungs_failed.csv", index=False)
        save_network(partial, model, card)
    return folder


def _number_of_outputs(training: Training, table: XrayTable) -> int:
    """Return how many outputs the network needs; refuse settings that do not fit the table's classes."""
    number = len(table.classes)
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
            state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            save_file(state, folder / "checkpoints" / f"epoch_{len(history):02}.safetensors")

    return after


def _card(
    study: Study, table: XrayTable, network: str, model: nn.Module, done: FineTuned, val_logits: Tensor
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
        temperature=1.0 if table.multilabel else fit_temperature(class_logits(val_logits).numpy(), targets),
        origin=_origin(study, table, device=str(device), parameters=parameter_count(model)),
        validation={
            "best_epoch": done.best_epoch,
            "epochs": len(done.history),
            **{name.removeprefix("val_"): float(best[name]) for name in measured},
            "training_seconds": round(float(done.history["seconds"].sum()), 1),
        },
    )
    if training.threshold == "none":
        return plain
    chosen = choose_thresholds(targets, plain.probabilities(val_logits).numpy(), training.threshold)
    return replace(plain, thresholds=tuple(float(value) for value in chosen))


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
    given = parser.parse_args(arguments)
    try:
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
        check_weights(study)
        table = load_table(study)
        print("\n".join((f"{study.title}: {len(table)} images", table.counts().to_string(), *table.notes)))
        if table.has_patient_ids:
            print(f"of {table.frame['patient'].nunique()} patients:\n{table.patient_counts().to_string()}")
        for network in study.networks:
            folder = fine_tune_study(study, table, network, runs=given.runs, device=given.device)
            print(f"saved {folder}")
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        # A loader's worker sends a traceback as text: its last line is the error.
        print(f"finetune.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("finetune.py: stopped; finished networks are saved, this one is not", file=sys.stderr)
        return 130
    return 0


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
