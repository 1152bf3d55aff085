"""What may stand in a study file: one class a table, with every setting, its default and its limits."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _folder_path(text: str) -> str:
    """Return a relative path below `runs/`; ValueError where it leads out of there or is hidden."""
    for name in text.split("/"):
        if not name or name != name.strip(". ") or not name.isprintable() or set(name) & set('\\:*?"<>|[]'):
            raise ValueError(
                f"{text!r} does not name a folder below runs/: use letters, digits, '-' and '_', and no '..'"
            )
    return text


def _split_size(size: float) -> float:
    if size >= 1 and size != int(size):
        raise ValueError("must be a fraction below 1 or a whole number of images a class")
    return int(size) if size >= 1 else size


def _pattern_with_group(pattern: re.Pattern[str]) -> re.Pattern[str]:
    if pattern.groups < 1:
        raise ValueError("needs a group (…) around the patient's id")
    return pattern


FolderPath = Annotated[str, AfterValidator(_folder_path)]
ImageSize = Annotated[int, Field(ge=32)]  # side of the square image, pixels
SplitSize = Annotated[PositiveFloat, AfterValidator(_split_size)]
PatientPattern = Annotated[re.Pattern[str], AfterValidator(_pattern_with_group)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# The names in cam_methods.METHODS. That module is not imported here, because it imports torch.
MapMethod = Literal["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "eigencam", "scorecam"]
MapMethods = Annotated[tuple[MapMethod, ...], Field(min_length=1)]


class Settings(pydantic.BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Phantom(Settings):
    """The synthetic data set that a study draws for itself where its data root is empty."""

    images_per_class: dict[str, PositiveInt]
    size: PositiveInt = 224
    seed: Seed = 0


class Data(Settings):
    """Where the images are and how they are read.

    - `classes`: the classes to read, in this order (empty: all of the source).
    - `labels`: class of the source -> class of the study; a class that is not listed keeps its name.
    - `patient_pattern`: regular expression for the patient in a file's name (reader "folder").
    - `official_split`: take the test images from the source's own list (reader "chestxray14").
    """

    reader: str
    root: Path
    classes: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    patient_pattern: PatientPattern | None = None
    official_split: bool = False
    phantom: Phantom | None = None

    @model_validator(mode="after")
    def _options_fit_the_reader(self) -> "Data":
        for option, reader in (("patient_pattern", "folder"), ("official_split", "chestxray14")):
            if getattr(self, option) and self.reader != reader:
                raise ValueError(f"{option} is for the reader {reader!r} only")
        return self


class Split(Settings):
    """How much of the data is held out, see `datasets.splits`.

    - `seed`: draws the splits, and the images of a limited study (None: the study's seed).
    - `val`, `test`: below 1 a fraction of each class, from 1 on a whole number of images a class.
    - `folds`, `fold`: part `fold` of `folds` parts of all images outside the test is "val"; `val` is not used.
    - `keep_without_finding`: share of the training images without a finding that stays (multi-label data).
    - `boxes_in_test`: all images of patients who have a box are in the test split too.
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
    """What is done to every image, in training and at inference alike.

    - `image_size`: side of the square images, pixels; `[networks.NAME]` may set another for one network.
    - `training.lung_model`: a folder below `runs/` with a lung segmentation model; everything outside the lungs becomes
      black, see `lungs.masking.LungMasking`. Where the folder is missing, a model is trained on the phantom.

    Images are always normalised with the `mean` and `std` of ImageNet; these two are not settings.
    """

    mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_STD
    image_size: ImageSize = 224
    lung_model: FolderPath | None = None


class Augmentation(Settings):
    """What is done to training images only; the fields are explained in `training.augmentation.Augmentation`."""

    horizontal_flip: bool = False
    smallest_crop: float = Field(default=1.0, gt=0, le=1)
    rotation: float = Field(default=0.0, ge=0, le=180)
    translation: float = Field(default=0.0, ge=0, lt=1)
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)


class Phase(Settings):
    """One phase of a training: which parameters learn ("head": only the new layers), how long, how fast."""

    trainable: Literal["all", "head"] = "all"
    epochs: PositiveInt = 25
    learning_rate: PositiveFloat = 3e-5


class Training(Phase):
    """How networks are fine-tuned; `[networks.NAME]` replaces any of it for one network.

    - `phases`: follow one another, each from the best weights so far. Without them there is one phase, made of
      `trainable`, `epochs` and `learning_rate`.
    - `patience`: epochs without a better `select` on validation that end a phase.
    - `hidden_units`: a new head with layers of these widths, see `networks.build_network`.
    - `threshold`: the rule that chooses decision thresholds on validation.
    - `precision`: "auto" is bf16 where the device has units for it, else fp32.
    - `cache_images`: keep decoded images in `runs/image_cache/`.
    - `checkpoint_minutes`: the time between two saved states within an epoch.
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
        """The phases; one where the study lists none."""
        return self.phases or (Phase(**self.model_dump(include=set(Phase.model_fields))),)

    @property
    def summary(self) -> dict[str, object]:
        """The settings that take effect, for people, each phase in a line of its own."""
        lines = {
            f"phase {i}": f"{phase.trainable}, {phase.epochs} epochs at {phase.learning_rate:g}"
            for i, phase in enumerate(self.all_phases, start=1)
        }
        return lines | self.model_dump(exclude={"phases", *Phase.model_fields})


class NetworkTraining(Training):
    """How one network is fine-tuned, and the side of its square images in pixels."""

    image_size: ImageSize


class Maps(Settings):
    """How notebook 3 scores class activation maps, see `evaluation.cam_scores`.

    - `methods`: names in `cams.methods.METHODS`.
    - `images`: at most so many test images are compared with lesions, boxes and lungs.
    - `faithful`: of so many of them the network itself is asked, in several hundred passes each.
    - `steps`: points on the curves of deletion and insertion.
    """

    methods: MapMethods = ("gradcam", "gradcam++", "layercam", "eigencam")
    images: PositiveInt = 400
    faithful: PositiveInt = 16
    steps: PositiveInt = 12


class Study(Settings):
    """A validated study.

    - `name`: the name of its file and of its folder below `runs/`.
    - `limit`: about so many images are used (None: all).
    - `positive`: of two classes the one that is looked for, see `studies.loading.positive_class`.
    - `compare`: studies on the same test images whose results notebook 3 shows beside this one's.
    - `data` or `datasets`: where the images come from, one source or several.
    - `networks`: network -> the settings of `[training]` that it replaces.
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
        """The data of the study, from one source or several."""
        return self.datasets or (self.data,)

    @property
    def split_seed(self) -> int:
        """The seed that limits and splits the data."""
        return self.seed if self.split.seed is None else self.split.seed

    def training_of(self, network: str) -> NetworkTraining:
        """Return the settings of one network: those of `[training]`, with the network's own in their place."""
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

        A limited study and a fold get a name, and so a folder of results, of their own: they never replace the
        results of the whole study.

        Args:
            networks: the networks to train; one that the study does not list has the settings of `[training]`.
            limit: number of images.
            fold: the part, from 1, that validates.
            seed: the study's seed.
            training: fields of `Training` for every network, also where `[networks.NAME]` says otherwise;
                `epochs` holds for every phase.
        """
        fields = self.model_dump()
        fields["networks"] = {name: fields["networks"].get(name, {}) for name in networks or self.networks}
        _set_for_all_networks(fields, {key: value for key, value in training.items() if value is not None})
        fields["seed"] = self.seed if seed is None else seed
        if limit is not None:
            # The scores of faithfulness cost hundreds of passes an image: too long for a look at little data.
            faithful, steps = min(self.maps.faithful, max(2, limit // 20)), min(self.maps.steps, 4)
            fields["limit"] = limit
            fields["maps"] |= {"faithful": faithful, "steps": steps}
            _rename(fields, f"-limit{limit}")
        if fold is not None:
            fields["split"]["fold"] = fold
            _rename(fields, f"-fold{fold}")
        return validated(fields, self.name)

    def repeated(self, seed: int) -> "Study":
        """Return the same experiment on the same split with another seed for initial weights, order and augmentation.

        It has a name, and so a folder of results, of its own. With its own seed the study returns itself.
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
    """Return the study with these fields. Raises ValueError that names every wrong key, in one line."""
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
    """Return where an unknown key belongs, or the key that it resembles most."""
    tables = (Training, Maps, Data, Phantom, Split, Preprocessing, Augmentation)
    places = {field: f"in [{table.__name__.lower()}]" for table in tables for field in table.model_fields}
    places |= dict.fromkeys(Study.model_fields, "at the top of the file")
    if key in places:
        return f": it belongs {places[key]}"
    similar = difflib.get_close_matches(key, places, n=1)
    return f": did you mean {similar[0]!r}?" if similar else ""
