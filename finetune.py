"""Fine-tune the networks of a study: the loop behind notebook 2, and the script that does it headless.

python finetune.py covid_radiography --data-root DIR --networks resnet18
"""

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import accelerate
import numpy as np
import pandas as pd
import torch
import torchvision
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import SPLITS, XrayTable, data_fingerprint
from datasets.splits import splits_frame
from datasets.table import relative_paths
from metrics import fit_temperature
from networks import (
    ModelCard,
    add_batch_norm,
    architecture,
    build_network,
    fold_batch_norm,
    parameter_count,
    resolve_device,
    save_network,
)
from studies import PROJECT, Study, load_study, load_table
from utils import Preprocessing, augmentation, class_weights, make_loaders, seed_everything

RUNS = PROJECT / "runs"


@dataclass(frozen=True)
class FineTuned:
    """What a training leaves beside the network, which has its best weights: a row an epoch, and which
    epoch (from 1) had the lowest validation loss.
    """

    history: pd.DataFrame
    best_epoch: int


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32" for "auto": bf16 where the device has units for it, since emulation is slower
    than fp32 (measured at half the speed on a processor with AVX-512 but without AVX512-BF16).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if any(able.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
    return "fp32"


def fine_tune(
    network: nn.Module,
    loaders: Mapping[str, DataLoader],
    *,
    epochs: int,
    learning_rate: float,
    patience: int,
    schedule: str = "constant",
    loss_weights: Tensor | None = None,
    precision: str = "auto",
    device: str = "auto",
    title: str = "",
    on_epoch: Callable[[pd.DataFrame], None] = lambda history: None,
) -> FineTuned:
    """Train a network in place with Adam on cross-entropy and leave it, in eval mode, with its best weights.

    `loaders` has "train" and "val", each of ((B, 3, S, S), (B,) labels) batches. Training stops when the
    validation loss has not fallen for `patience` epochs in a row. `schedule`: "constant", or "one_cycle"
    (Smith & Topin 2018: up to `learning_rate` over the first 30 % of the steps, then down to almost 0).
    `loss_weights` (C,) weigh the training loss; the validation loss is never weighted. `on_epoch` gets the
    history so far after each epoch.

    Train loss and accuracy are means over the epoch while the weights change, with dropout and
    augmentation on; so they may lie below the validation's. Raises FloatingPointError on a loss that is not
    finite.
    """
    accelerator = _accelerator(resolve_device(device))
    half = resolve_precision(precision, accelerator.device) == "bf16"
    autocast = {"device_type": accelerator.device.type, "dtype": torch.bfloat16, "enabled": half}
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=learning_rate, fused=accelerator.device.type != "mps"
    )
    model, optimizer, train, val = accelerator.prepare(network, optimizer, loaders["train"], loaders["val"])
    steps = epochs * len(train)
    scheduler = _scheduler(optimizer.optimizer, schedule, learning_rate, steps)
    loss_of = nn.CrossEntropyLoss(
        weight=None if loss_weights is None else loss_weights.to(accelerator.device)
    )

    rows: list[dict[str, object]] = []
    best_loss, best_epoch, best_state = float("inf"), 0, {}
    for epoch in range(1, epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        bar = tqdm(
            train, desc=f"{title} epoch {epoch}/{epochs}", leave=False, disable=not sys.stderr.isatty()
        )
        train_loss, train_accuracy = _train_epoch(
            model, bar, accelerator, optimizer, scheduler, loss_of, autocast
        )
        seconds = time.perf_counter() - started
        val_loss, val_accuracy = _validate(model, val, accelerator.device, autocast)
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise FloatingPointError(
                f'{title} epoch {epoch}: the loss is not finite; set a lower learning_rate or precision = "fp32"'
            )
        rows.append(
            {
                "epoch": epoch,
                "phase": 1,
                "learning_rate": rate,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "seconds": time.perf_counter() - started,
                "images_per_second": len(train.dataset) / seconds,
            }
        )
        if val_loss < best_loss:
            best_loss, best_epoch = val_loss, epoch
            best_state = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
        tqdm.write(_epoch_line(title, epochs, rows[-1], best=epoch == best_epoch))
        on_epoch(pd.DataFrame(rows))
        if epoch - best_epoch >= patience:
            tqdm.write(f"{title}: stopped, validation loss has not fallen for {patience} epochs")
            break
    network.load_state_dict(best_state)
    network.eval()
    return FineTuned(pd.DataFrame(rows), best_epoch)


def _accelerator(device: torch.device) -> Accelerator:
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    # The first Accelerator of a process would fix the device for all; a notebook may want another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device.type == "cpu")


def _scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, learning_rate: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "one_cycle":
        # Adam's betas stay as they are: cycling the momentum is a habit from SGD.
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=learning_rate, total_steps=steps, cycle_momentum=False
        )
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _train_epoch(
    model: nn.Module,
    batches: tqdm,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    loss_of: nn.Module,
    autocast: dict[str, object],
) -> tuple[float, float]:
    model.train()
    loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    correct = torch.zeros((), device=accelerator.device, dtype=torch.int64)
    seen, started = 0, time.perf_counter()
    for images, labels in batches:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(**autocast):
            logits = model(images)
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
        if not batches.disable:
            batches.set_postfix_str(
                f"loss {float(loss_sum) / seen:.3f}, accuracy {int(correct) / seen:.3f}, "
                f"{seen / (time.perf_counter() - started):.0f} images/s"
            )
    return float(loss_sum) / seen, int(correct) / seen


def _validate(
    model: nn.Module, batches: DataLoader, device: torch.device, autocast: dict[str, object]
) -> tuple[float, float]:
    logits, labels = _logits(model, batches, device, autocast)
    return float(nn.functional.cross_entropy(logits, labels)), float(
        (logits.argmax(1) == labels).double().mean()
    )


def _logits(
    model: nn.Module, batches: DataLoader, device: torch.device, autocast: dict[str, object]
) -> tuple[Tensor, Tensor]:
    model.eval()
    outputs, targets = [], []
    with torch.inference_mode():
        for images, labels in batches:
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            with torch.autocast(**autocast):
                outputs.append(model(images).float().cpu())
            targets.append(labels.cpu())
    return torch.cat(outputs), torch.cat(targets)


def predict_logits(network: nn.Module, batches: DataLoader, *, device: str | torch.device = "cpu") -> Tensor:
    """Return (N, C) float32 logits of a network in eval mode, in the loader's order, at full precision."""
    full = {"device_type": torch.device(device).type, "dtype": torch.bfloat16, "enabled": False}
    return _logits(network, batches, torch.device(device), full)[0]


def _epoch_line(title: str, epochs: int, row: Mapping[str, object], *, best: bool) -> str:
    return (
        f"{title} epoch {row['epoch']:>2}/{epochs}  train loss {row['train_loss']:.4f} accuracy "
        f"{row['train_accuracy']:.3f}  val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.3f}  "
        f"{row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s{'  best' if best else ''}"
    )


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
    seed_everything(study.seed)
    model = build_network(
        network,
        len(table.classes),
        weights=training.weights,
        dropout=training.dropout,
        residual_gain=training.residual_gain,
    )
    settings = study.preprocessing
    preprocessing = Preprocessing(study.image_size_of(network), settings.mean, settings.std)
    loaders = make_loaders(
        {split: table.subset(split) for split in SPLITS},
        preprocessing,
        num_classes=len(table.classes),
        batch_size=training.batch_size,
        augment=augmentation(preprocessing.image_size, **study.augmentation.model_dump()),
        oversample=training.balance == "oversample",
        num_workers=training.num_workers,
        generator=torch.Generator().manual_seed(study.seed),
    )
    labels = loaders["train"].dataset.labels
    print(
        f"{kind.title}: {parameter_count(model):,} parameters for {len(table.classes)} classes, weights "
        f"{training.weights}, {preprocessing.image_size} px, {len(labels)} training images"
    )
    if training.temporary_batch_norm:
        add_batch_norm(model)
    folder = runs / study.name / network
    with complete_or_absent(folder) as partial, history_log(partial) as log:
        done = fine_tune(
            model,
            loaders,
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            patience=training.patience,
            schedule=training.schedule,
            loss_weights=class_weights(labels, len(table.classes)) if training.balance == "loss" else None,
            precision=training.precision,
            device=device,
            title=kind.title,
            on_epoch=log,
        )
        if training.temporary_batch_norm:
            fold_batch_norm(model)
        model.to(where)
        logits = {
            split: predict_logits(model, loaders["train_plain" if split == "train" else split], device=where)
            for split in SPLITS
        }
        best = done.history.iloc[done.best_epoch - 1]
        card = ModelCard(
            architecture=network,
            classes=table.classes,
            image_size=preprocessing.image_size,
            mean=preprocessing.mean,
            std=preprocessing.std,
            cam_layer=model.cam_layer,
            temperature=fit_temperature(logits["val"].numpy(), table.subset("val")["label"].to_numpy()),
            origin=_origin(study, table, device=str(where), parameters=parameter_count(model)),
            validation={
                "best_epoch": done.best_epoch,
                "epochs": len(done.history),
                "loss": float(best["val_loss"]),
                "accuracy": float(best["val_accuracy"]),
                "training_seconds": round(float(done.history["seconds"].sum()), 1),
            },
        )
        for split, values in logits.items():
            predictions = predictions_frame(table, split, card.probabilities(values).numpy())
            predictions.to_csv(partial / f"predictions_{split}.csv", index=False)
        splits_frame(table).to_csv(partial / "splits.csv", index=False)
        save_network(partial, model, card)
    return folder


def predictions_frame(table: XrayTable, split: str, probabilities: np.ndarray) -> pd.DataFrame:
    """Return one row an image of a split: path below the data root, patient, target (the class's name) and
    a probability a class.
    """
    rows = table.subset(split)
    frame = pd.DataFrame({"path": relative_paths(rows["path"], table.root), "patient": rows["patient"]})
    frame["target"] = [table.classes[label] for label in rows["label"]]
    frame[list(table.classes)] = probabilities
    return frame


@contextmanager
def history_log(folder: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Yield a function that writes the history so far to `history.csv`, and its last row to TensorBoard too
    where that is installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
    except ImportError:
        writer = None

    def log(history: pd.DataFrame) -> None:
        history.to_csv(folder / "history.csv.tmp", index=False)
        os.replace(folder / "history.csv.tmp", folder / "history.csv")
        if writer is not None:
            for column in history.columns.drop(["epoch", "phase"]):
                writer.add_scalar(column, history[column].iloc[-1], int(history["epoch"].iloc[-1]))

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


def _origin(study: Study, table: XrayTable, **more: object) -> dict[str, object]:
    # The data root is where one machine keeps the data: it is no part of the experiment.
    settings = study.model_dump(mode="json", exclude={"data": {"root"}})
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


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` to fill, which takes its place when all went well; otherwise it
    is removed, and an older `folder` stays as it was.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


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
    parser.add_argument("--epochs", metavar="N", type=int)
    parser.add_argument("--image-size", metavar="N", type=int, help="side of the square image, pixels")
    parser.add_argument("--batch-size", metavar="N", type=int)
    parser.add_argument("--limit", metavar="N", type=int, help="only N images, stratified, to try things out")
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
