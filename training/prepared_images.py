"""A study's images, ready to be trained on: lungs masked, decoded once, in batches."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from datasets import SPLITS, XrayTable
from datasets.table import relative_paths
from lungs.masking import LungMasking
from networks import architecture
from studies.settings import Study
from training.augmentation import Augmentation
from training.batches import Batches, XrayDataset
from training.image_cache import CacheFailed, cached
from training.lung_model import default_segmenter
from utils import Preprocessing, balanced_weights

MANY_FAILURES = 0.2  # A warning is printed if no lungs are found in a larger share of the images.


@dataclass(frozen=True)
class PreparedImages:
    """A study's images, ready to be trained on.

    Attributes:
        batches: those of "train", "train_plain", "val" and "test". "train" is shuffled and augmented. "train_plain" has
            the same images. "train_plain", "val" and "test" are neither shuffled nor augmented, as at inference.
        decoded: whether each image was decoded once before the training, instead of in every epoch.
        without_lungs: path (below the data root) and reason of each image whose lungs were not found, or None in a
            study of whole images.
    """

    batches: dict[str, Batches]
    decoded: bool
    without_lungs: pd.DataFrame | None


def lung_masking_of(study: Study, runs: Path) -> LungMasking | None:
    """Return the study's lung masking, or None for a study of whole images. A missing lung model is trained first."""
    if study.preprocessing.lung_model is None:
        return None
    folder = runs / study.preprocessing.lung_model
    masking = LungMasking(default_segmenter(folder), cache=folder / "masks")
    dice = masking.segmenter.validation.get("dice")
    print(f"lungs: the model in {folder} ({'never scored' if dice is None else f'dice {dice:.3g}'})")
    return masking


def prepared_images(
    study: Study, table: XrayTable, network: str, preprocessing: Preprocessing, runs: Path
) -> PreparedImages:
    """Mask the lungs and decode the images if the study asks for it; return the batches.

    Args:
        study: the study.
        table: its images, split.
        network: the name of the architecture.
        preprocessing: what every image goes through; `preprocessing.lungs` comes from `lung_masking_of`.
        runs: the folder of all run folders. Decoded images are kept in `image_cache/` there.

    Raises:
        ValueError: an image cannot be read, or the lungs are found in none of the images.
    """
    training, images, weights = study.training_of(network), None, None
    without_lungs = None if preprocessing.lungs is None else _without_lungs(table, preprocessing.lungs)
    paths = {split: table.subset(split)["path"] for split in SPLITS}
    if training.cache_images:
        title = architecture(network).title
        try:
            images = cached(paths, preprocessing, runs / "image_cache", title=title)
        except CacheFailed as error:
            print(f"{title}: {error}; images are decoded anew in every epoch, which is slower")
    batches = {}
    for split in SPLITS:
        file = images and images[split]  # None: the files are read again in every epoch
        dataset = XrayDataset(paths[split], table.targets(split), preprocessing, images=file)
        batches[split] = Batches(dataset, training.batch_size, prepare=preprocessing.normalise)
    if training.balance == "oversample":
        weights = balanced_weights(table.targets("train"), len(table.classes))
    augment = Augmentation(**study.augmentation.model_dump())
    batches["train_plain"] = batches["train"]
    batches["train"] = replace(batches["train"], seed=study.seed, weights=weights, augment=augment)
    return PreparedImages(batches, images is not None, without_lungs)


def _without_lungs(table: XrayTable, masking: LungMasking) -> pd.DataFrame:
    """Compute all lung masks; return path and reason of each image whose lungs were not found."""
    failed = masking.failures(table.frame["path"])
    if len(failed) == len(table):
        raise ValueError(
            f"the lung model in {masking.folder.parent.parent} finds no plausible lungs in any image: train a better "
            "one with python lung_segmentation.py fit --pairs DIR -o FOLDER"
        )
    if failed:
        warning = "WARNING: " if len(failed) > MANY_FAILURES * len(table) else ""
        reasons = pd.Series(failed).str.replace(r"[\d.]+ ?%", "n %", regex=True).value_counts()
        frequent = ", ".join(f"{reason}: {count}" for reason, count in reasons.head(3).items())
        print(f"{warning}lungs not found in {len(failed)} of {len(table)} images, which are used whole ({frequent})")
    return pd.DataFrame({"path": relative_paths(failed, table.root), "reason": list(failed.values())})
