"""All settings of a study file: one class for each of its tables, with names, defaults and allowed values."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _folder_path(text: str) -> str:
    """Return a relative path below `runs/`; raise ValueError if it leaves that folder or is hidden."""
    for name in text.split("/"):
        if not name or name != name.strip(". ") or not name.isprintable() or set(name) & set('\\:*?"<>|[]'):
            raise ValueError(f"{text!r} does not name a folder below runs/: use letters, digits, '-', '_', no '..'")
    return text


def _split_size(size: float) -> float:
    if size >= 1 and size != int(size):
        raise ValueError("must be a fraction below 1 or a whole number of images a class")
    return int(size) if size >= 1 else size


FolderPath = Annotated[str, AfterValidator(_folder_path)]
ImageSize = Annotated[int, Field(ge=32)]  # side of the square image, pixels
SplitSize = Annotated[PositiveFloat, AfterValidator(_split_size)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# The names in cams.methods.METHODS. That module is not imported here, because it imports torch.
MapMethod = Literal["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "eigencam", "scorecam"]


class Settings(pydantic.BaseModel):
    """A table of settings that cannot be changed and refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Phantom(Settings):
    """[data.phantom]: the synthetic data set to draw into the data root if that folder is empty.

    - `images_per_class`: class -> number of images.
    - `size`: side of the square images in pixels, at least 32.
    - `seed`: seed of all random numbers of the drawing.
    """

    images_per_class: dict[str, PositiveInt]
    size: PositiveInt = 224
    seed: Seed = 0


class Data(Settings):
    """[data] or [[datasets]]: where the images are and how to read them.

    - `reader`: format of the data set: "chestxray14", "covid_radiography", "folder" or "kermany".
    - `root`: folder of the data. A relative path starts at the study file's folder; for studies in `studies/` it starts
      at the project's folder.
    - `classes`: names of the classes to read, in this order; empty reads all.
    - `labels`: class of the source -> class of the study; a class that is not listed keeps its name.
    - `patient_pattern`: regular expression whose first group is the patient in a file's name (reader "folder").
    - `official_split`: true takes the test images from the source's own lists (reader "chestxray14").
    - `phantom`: settings of a synthetic data set to draw, see `Phantom`.
    """

    reader: str
    root: Path
    classes: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    patient_pattern: re.Pattern[str] | None = None
    official_split: bool = False
    phantom: Phantom | None = None

    @model_validator(mode="after")
    def _options_fit_the_reader(self) -> "Data":
        for option, reader in (("patient_pattern", "folder"), ("official_split", "chestxray14")):
            if getattr(self, option) and self.reader != reader:
                raise ValueError(f"{option} is for the reader {reader!r} only")
        if self.patient_pattern and not self.patient_pattern.groups:
            raise ValueError("patient_pattern needs a group (…) around the patient's id")
        return self


class Split(Settings):
    """[split]: which images are for training, validation and test, see `datasets.splits`.

    - `seed`: seed of the draw of the splits, and of the images of a limited study; default is the study's `seed`.
    - `val`: size of the validation set: below 1 a fraction of each class, from 1 on a number of images per class.
    - `test`: size of the test set, in the same units.
    - `folds`: number of parts of a cross-validation, at least 2; they divide all images outside the test set.
    - `fold`: number of the part for validation, 1 to `folds`; `val` is then not used.
    - `keep_without_finding`: share (0 to 1) of the training images without a finding to keep (multi-label data).
    - `boxes_in_test`: true puts all images of patients with a box into the test set.
    """

    seed: Seed | None = None
    val: SplitSize = 0.1
    test: SplitSize = 0.1
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: PositiveInt | None = None
    keep_without_finding: float = Field(default=1.0, gt=0, le=1)
    boxes_in_test: bool = False

    @model_validator(mode="after")
    def _fold_exists(self) -> "Split":
        if self.fold is not None and self.fold > (self.folds or 0):
            count = self.folds or "none: set `folds` in [split]"
            raise ValueError(f"no fold {self.fold}: the study has {count}")
        return self


class Preprocessing(Settings):
    """[preprocessing]: what is done to every image in training and at inference.

    - `image_size`: side of the square images in pixels, at least 32; `[networks.NAME]` may have another.
    - `lung_model`: folder below `runs/` with a lung segmentation model. Everything outside the lungs becomes black, see
      `lungs.masking.LungMasking`. If the folder is missing, a model is trained on the phantom.

    Images are always normalised with `IMAGENET_MEAN` and `IMAGENET_STD`; these two are not settings.
    """

    image_size: ImageSize = 224
    lung_model: FolderPath | None = None


class Augmentation(Settings):
    """[augmentation]: random changes of training images; the defaults change nothing.

    - `horizontal_flip`: true mirrors half of the images, chosen at random.
    - `smallest_crop`: smallest area of the random window that is enlarged to full size, as a share, above 0 to 1.
    - `rotation`: largest angle to either side, in degrees, 0 to 180.
    - `translation`: largest shift along either axis, as a share of the side, 0 to below 1.
    - `scale`: smallest and largest zoom factor, above 0.
    - `brightness`: the brightness factor is 1 - this value to 1 + this value; 0 to below 1.
    - `contrast`: the same for the contrast factor.
    """

    horizontal_flip: bool = False
    smallest_crop: float = Field(default=1.0, gt=0, le=1)
    rotation: float = Field(default=0.0, ge=0, le=180)
    translation: float = Field(default=0.0, ge=0, lt=1)
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)


class Phase(Settings):
    """A phase of a training, an entry of `phases` in [training].

    - `trainable`: "all" trains all layers, "head" only the new last layers.
    - `epochs`: number of epochs at most.
    - `learning_rate`: learning rate at the start; with "one_cycle" the highest one.
    """

    trainable: Literal["all", "head"] = "all"
    epochs: PositiveInt = 25
    learning_rate: PositiveFloat = 3e-5


class Training(Phase):
    """[training]: how networks are fine-tuned; `[networks.NAME]` may replace any setting for one network.

    Without `phases` there is one phase, with `trainable`, `epochs` and `learning_rate` from here.

    - `weights`: weights to start from: "imagenet", "none" (random), or the path of a file or run folder.
    - `phases`: list of phases, see `Phase`; each starts from the best weights so far.
    - `optimizer`: "adam" or "sgd".
    - `schedule`: course of the learning rate: "constant"; "one_cycle" rises, then falls; "plateau" falls to a tenth
      when the validation score `select` does not improve.
    - `plateau_patience`: epochs without improvement before "plateau" lowers the learning rate.
    - `patience`: epochs without improvement of `select` before a phase ends.
    - `select`: validation score that chooses the best epoch: "loss", or "auc" (mean over findings, multi-label data).
    - `keep_checkpoints`: true keeps the weights of every epoch.
    - `batch_size`: number of images in a batch.
    - `balance`: help for rare classes: "oversample" draws their images more often, "loss" gives them more weight; or
      "none".
    - `head`: "softmax" has an output for each class, "sigmoid" has one output, for the positive class of two.
    - `hidden_units`: widths of a new head's hidden layers, may be empty, see `networks.build_network`; by default only
      the network's last linear layer is new.
    - `dropout`: dropout rate, 0 to below 1; default is the network's own.
    - `frozen_batch_norm`: true normalises the backbone with the statistics of the starting weights; they do not change.
    - `cache_features`: true computes the output of a frozen backbone once for each image.
    - `threshold`: rule that chooses decision thresholds on validation: "none", "youden", "f1" or "accuracy".
    - `temporary_batch_norm`: true trains with batch normalisation and merges it into the convolutions at the end.
    - `residual_gain`: initial scale of the last batch normalisation in each residual block, 0 or more.
    - `precision`: "fp32", "bf16", or "auto": bf16 if the device supports it in hardware, else fp32.
    - `cache_images`: true keeps decoded images in `runs/image_cache/`.
    - `checkpoint_minutes`: minutes between two saved states within an epoch, 0 or more.
    """

    weights: str = "imagenet"
    phases: tuple[Phase, ...] = ()
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Literal["constant", "one_cycle", "plateau"] = "constant"
    plateau_patience: PositiveInt = 2
    patience: PositiveInt = 5
    select: Literal["loss", "auc"] = "loss"
    keep_checkpoints: bool = False
    batch_size: PositiveInt = 32
    balance: Literal["oversample", "loss", "none"] = "oversample"
    head: Literal["softmax", "sigmoid"] = "softmax"
    hidden_units: tuple[PositiveInt, ...] | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    frozen_batch_norm: bool = False
    cache_features: bool = True
    threshold: Literal["none", "youden", "f1", "accuracy"] = "none"
    temporary_batch_norm: bool = False
    residual_gain: float = Field(default=1.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cache_images: bool = True
    checkpoint_minutes: float = Field(default=10.0, ge=0)

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases; without `phases` in the study there is one."""
        return self.phases or (Phase(**self.model_dump(include=set(Phase.model_fields))),)

    @property
    def summary(self) -> dict[str, object]:
        """The settings that have an effect, to show to the user; each phase is one entry."""
        lines = {
            f"phase {i}": f"{phase.trainable}, {phase.epochs} epochs at {phase.learning_rate:g}"
            for i, phase in enumerate(self.all_phases, start=1)
        }
        return lines | self.model_dump(exclude={"phases", *Phase.model_fields})


class NetworkTraining(Training):
    """The settings of one network: those of `Training`, and `image_size`, the side of its images in pixels."""

    image_size: ImageSize


class Maps(Settings):
    """[maps]: how notebook 3 scores class activation maps, see `evaluation.cam_scores`.

    - `methods`: methods to compare, names in `cams.methods.METHODS`.
    - `images`: largest number of test images whose maps are compared with lesions, boxes and lungs.
    - `faithful`: number of these images for the scores of faithfulness; each takes hundreds of passes of the network.
    - `steps`: number of points on the curves of deletion and insertion.
    """

    methods: Annotated[tuple[MapMethod, ...], Field(min_length=1)] = ("gradcam", "gradcam++", "layercam", "eigencam")
    images: PositiveInt = 400
    faithful: PositiveInt = 16
    steps: PositiveInt = 12


class Study(Settings):
    """A whole study file.

    - `name`: name of the file, and of the folder of its results below `runs/`; the file itself does not have it.
    - `title`: one line for headings.
    - `description`: a few sentences for the notebooks.
    - `source`: publication or project that the study repeats.
    - `seed`: seed of initial weights, order of the images, augmentation and, by default, splits.
    - `limit`: approximate number of images to use; default is all.
    - `positive`: the class to detect, if there are two; see `studies.loading.positive_class`.
    - `compare`: names of studies with the same test images; notebook 3 also shows their results.
    - `extends`: name of another study; this file inherits the settings that it does not set itself.
    - `data` or `datasets`: where the images are, one source or a list of sources.
    - `split`, `preprocessing`, `augmentation`, `training`, `maps`: see the class of each table.
    - `networks`: name of each network to train -> settings of `[training]` that differ for it.
    """

    name: FolderPath
    title: str
    description: str = ""
    source: str = ""
    seed: Seed = 0
    limit: PositiveInt | None = None
    positive: str | None = None
    compare: tuple[FolderPath, ...] = ()
    data: Data | None = None
    datasets: tuple[Data, ...] = ()
    split: Split = Split()
    preprocessing: Preprocessing = Preprocessing()
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    networks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    maps: Maps = Maps()

    @model_validator(mode="after")
    def _one_or_several_sources(self) -> "Study":
        if (self.data is None) == (not self.datasets):
            raise ValueError("a study needs either [data] or [[datasets]]")
        names = [source.root.name for source in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"the roots of [[datasets]] need different names: {', '.join(names)}")
        return self

    @property
    def sources(self) -> tuple[Data, ...]:
        """The data sources of the study, one or several."""
        return self.datasets or (self.data,)

    @property
    def split_seed(self) -> int:
        """The seed that limits and splits the data."""
        return self.seed if self.split.seed is None else self.split.seed

    def training_of(self, network: str) -> NetworkTraining:
        """Return the settings of one network: those of `[training]`, replaced by its own where it has any.

        Raises ValueError for a network that the study does not have.
        """
        if network not in self.networks:
            raise ValueError(f"study {self.name!r} has no network {network!r}: choose from {', '.join(self.networks)}")
        common = self.training.model_dump() | {"image_size": self.preprocessing.image_size}
        return NetworkTraining.model_validate(common | self.networks[network])

    def overridden(
        self,
        *,
        networks: tuple[str, ...] | None = None,
        limit: int | None = None,
        fold: int | None = None,
        seed: int | None = None,
        **training: object,
    ) -> "Study":
        """Return the study with some settings replaced; None leaves a setting as it is.

        A limited study and a fold have their own names and result folders. So they never replace the results of the
        whole study.

        Args:
            networks: the networks to train; one that is not in the study gets the settings of `[training]`.
            limit: number of images.
            fold: number of the part for validation, from 1.
            seed: the study's seed.
            training: fields of `Training` for every network; they replace those of `[networks.NAME]` too. `epochs`
                applies to every phase.
        """
        fields = self.model_dump()
        fields["networks"] = {name: fields["networks"].get(name, {}) for name in networks or self.networks}
        _set_for_all_networks(fields, {key: value for key, value in training.items() if value is not None})
        fields["seed"] = self.seed if seed is None else seed
        if limit is not None:
            fields["limit"] = limit
            # The scores of faithfulness take hundreds of passes an image: too long for a trial.
            fields["maps"]["faithful"] = min(self.maps.faithful, max(2, limit // 20))
            fields["maps"]["steps"] = min(self.maps.steps, 4)
            _rename(fields, f"-limit{limit}")
        if fold is not None:
            fields["split"]["fold"] = fold
            _rename(fields, f"-fold{fold}")
        return validated(fields, self.name)

    def repeated(self, seed: int) -> "Study":
        """Return the same study with another seed for initial weights, order and augmentation, and with the same split.

        It has its own name and result folder. With the seed that the study already has, the study itself is returned.
        """
        if seed == self.seed:
            return self
        fields = self.model_dump() | {"seed": seed}
        fields["split"]["seed"] = self.split_seed
        _rename(fields, f"-seed{seed}")
        return validated(fields, self.name)


def _set_for_all_networks(fields: dict[str, Any], settings: dict[str, object]) -> None:
    networks = fields["networks"].values()
    for network in networks:
        for key in settings.keys() & network.keys():
            del network[key]
    if "epochs" in settings:
        for training in (fields["training"], *networks):
            for phase in training.get("phases", ()):
                phase["epochs"] = settings["epochs"]
    if "image_size" in settings:
        fields["preprocessing"]["image_size"] = settings.pop("image_size")
    fields["training"].update(settings)


def _rename(fields: dict[str, Any], suffix: str) -> None:
    fields["name"] += suffix
    fields["compare"] = tuple(name + suffix for name in fields["compare"])


def validated(fields: dict[str, Any], file_name: str) -> Study:
    """Return the study with these fields. Raises ValueError with every wrong key, in one line."""
    try:
        study = Study.model_validate(fields)
        for network in study.networks:
            study.training_of(network)
    except pydantic.ValidationError as error:
        raise ValueError(f"study {file_name}: " + "; ".join(map(_described, error.errors()))) from None
    return study


def _described(problem: dict[str, Any]) -> str:
    """Return one mistake in a study file as text."""
    *tables, key = [str(part) for part in problem["loc"]] or [""]
    place = f"{key!r} in [{'.'.join(tables)}]" if tables else repr(key)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place}{_hint(key)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if key else message


def _hint(key: str) -> str:
    """Return the table to which an unknown key belongs, or the most similar key."""
    tables = (Training, Maps, Data, Phantom, Split, Preprocessing, Augmentation)
    places = {field: f"in [{table.__name__.lower()}]" for table in tables for field in table.model_fields}
    places |= dict.fromkeys(Study.model_fields, "at the top of the file")
    if key in places:
        return f": it belongs {places[key]}"
    similar = difflib.get_close_matches(key, places, n=1)
    return f": did you mean {similar[0]!r}?" if similar else ""
