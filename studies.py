"""One experiment = one TOML file: which data, which splits, which networks, trained how.

The notebooks, `finetune.py` and the tests read the same file through `load_study`.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from datasets import XrayTable, read_dataset
from datasets.phantom import write_phantom
from datasets.splits import boxes_held_out, split_by_patient, split_into_folds, thinned
from datasets.table import merged, relabelled

PROJECT = Path(__file__).resolve().parent
STUDIES = PROJECT / "studies"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PHASE_KEYS = ("trainable", "epochs", "learning_rate")  # of the only phase, where a study names none
Positive = Annotated[int, Field(gt=0)]
# Below 1 a fraction of each class, from 1 on a whole number of images a class.
SplitSize = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# What else lies below `runs/`: decoded images, and the results of limited, quick, repeated and folded studies.
RESERVED_NAMES = re.compile(r"image_cache|.*-(quick|(limit|seed|fold)\d+)")


def _folder_path(text: str) -> str:
    """Return a relative path below `runs/`, unless it leads out of there or is hidden: then ValueError."""
    for name in text.split("/"):
        if not name or name != name.strip(". ") or not name.isprintable() or set(name) & set('\\:*?"<>|[]'):
            raise ValueError(
                f"{text!r} does not name a folder below runs/: use letters, digits, '-' and '_', and no '..'"
            )
    return text


def _folder_name(text: str) -> str:
    if "/" in text:
        raise ValueError(f"{text!r} is a path: give the name of a study")
    return _folder_path(text)


FolderPath = Annotated[str, AfterValidator(_folder_path)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
# The names of cam_methods.METHODS, which this room cannot ask: importing it takes as long as torch.
MapMethod = Literal["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "eigencam", "scorecam"]

# Names of a class of healthy people, whatever their case, spaces and punctuation: of two classes the other one is the
# positive one, unless the study says otherwise.
HEALTHY = frozenset(
    {
        "normal",
        "healthy",
        "nofinding",
        "nofindings",
        "nodisease",
        "noabnormality",
        "negative",
        "control",
        "controls",
        "none",
        "no",
        "clear",
        "unremarkable",
    }
)


class Settings(BaseModel):
    """A frozen group of settings that refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Phantom(Settings):
    """The synthetic data set that a study draws for itself where its data root is empty."""

    images_per_class: dict[str, Positive]
    size: Positive = 224
    seed: Seed = 0
    shortcut_class: str | None = None
    shortcut_probability: float = Field(default=1.0, ge=0, le=1)


class Data(Settings):
    """Where the images are and how they are read.

    `labels` maps classes of the source onto those of the study; a class that is not in it keeps its name.
    """

    reader: str
    root: Path
    classes: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    patient_pattern: str | None = None
    official_split: bool = False
    phantom: Phantom | None = None

    @field_validator("patient_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and re.compile(pattern).groups < 1:
                raise ValueError("needs a group (…) around the patient's id")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _options_of_the_reader(self) -> "Data":
        if self.patient_pattern is not None and self.reader != "folder":
            raise ValueError("patient_pattern is for the reader 'folder' only")
        if self.official_split and self.reader != "chestxray14":
            raise ValueError("official_split is for the reader 'chestxray14' only")
        return self

    @property
    def options(self) -> dict[str, object]:
        """The reader's options that this source sets."""
        given = {"patient_pattern": self.patient_pattern, "official_split": self.official_split or None}
        return {"classes": self.classes} | {key: value for key, value in given.items() if value is not None}


class Split(Settings):
    """How much of the data is held out; see `datasets.splits`.

    With `folds`, part `fold` of all that is not the test is the validation set, and `val` is not used.
    `keep_without_finding` thins, in the training split of a multi-label study, the images without any.
    `boxes_in_test` puts all images of patients who have a box into the test split, beside those drawn.
    `seed` draws the splits, and the images of a limited study; without one the study's own seed does.
    """

    seed: Seed | None = None
    val: SplitSize = 0.1
    test: SplitSize = 0.1
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Positive | None = None
    keep_without_finding: float = Field(default=1.0, gt=0, le=1)
    boxes_in_test: bool = False

    @model_validator(mode="after")
    def _fold_of_folds(self) -> "Split":
        if self.fold is not None and not (self.folds and self.fold <= self.folds):
            have = (
                f"the study has {self.folds}" if self.folds else "the study has none: set `folds` in [split]"
            )
            raise ValueError(f"no fold {self.fold}: {have}")
        return self

    @field_validator("val", "test")
    @classmethod
    def _whole_from_one_on(cls, size: float) -> float:
        if size >= 1 and size != int(size):
            raise ValueError("must be a fraction below 1 or a whole number of images a class")
        return int(size) if size >= 1 else size


class Preprocessing(Settings):
    """What is done to every image, in training and at inference alike.

    `image_size` is the side of the square images, in pixels; `[networks.NAME]` may set another for one network.
    `lung_model` names a folder below `runs/` with a trained lung segmentation: all but the lungs is blackened
    (see `lung_masking.LungMasking`). Where the folder is missing, one is trained on the phantom.
    """

    image_size: Annotated[int, Field(ge=32)] = 224
    lung_model: FolderPath | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Augmentation(Settings):
    """What is done to training images only; see `utils.augmentation`."""

    horizontal_flip: bool = False
    smallest_crop: float = Field(default=1.0, gt=0, le=1)
    rotation: float = Field(default=0.0, ge=0, le=180)
    translation: float = Field(default=0.0, ge=0, lt=1)
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1.0, 1.0)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)


class Phase(Settings):
    """A stretch of a training: which parameters learn ("head": the new layers alone), and how."""

    trainable: Literal["all", "head"] = "all"
    epochs: Positive = 25
    learning_rate: float = Field(default=3e-5, gt=0)


class Training(Settings):
    """How one network is fine-tuned; `[networks.NAME]` in a study overrides any of it for that network.

    `phases` follow one another, each from the best weights so far; without them there is one, made of
    `trainable`, `epochs` and `learning_rate`. `hidden_units` asks for a new head of that many layers in place
    of the network's own, see `networks.build_network`. `patience` epochs without a better `select` on
    validation end a phase. `threshold` is the rule by which decision thresholds are chosen on validation.

    `precision` "auto" is bf16 where the device has units for it, else fp32. `cache_images` keeps decoded images in
    `runs/image_cache/`. Within an epoch the state is saved every `checkpoint_minutes`.
    """

    weights: str = "imagenet"
    phases: tuple[Phase, ...] = ()
    trainable: Literal["all", "head"] = "all"
    epochs: Positive = 25
    learning_rate: float = Field(default=3e-5, gt=0)
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "one_cycle", "plateau"] = "constant"
    plateau_patience: Positive = 2
    patience: Positive = 5
    select: Literal["loss", "auc"] = "loss"
    keep_checkpoints: bool = False
    batch_size: Positive = 32
    balance: Literal["oversample", "loss", "none"] = "oversample"
    head: Literal["softmax", "sigmoid"] = "softmax"
    hidden_units: tuple[Positive, ...] | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    frozen_batch_norm: bool = False
    cache_features: bool = True
    threshold: Literal["none", "youden", "f1", "accuracy"] = "none"
    image_size: Annotated[int, Field(ge=32)] | None = None
    temporary_batch_norm: bool = False
    residual_gain: float = Field(default=1.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cache_images: bool = True
    checkpoint_minutes: float = Field(default=10.0, ge=0)

    @property
    def stretches(self) -> tuple[Phase, ...]:
        """The phases, one where none are given."""
        one = Phase(trainable=self.trainable, epochs=self.epochs, learning_rate=self.learning_rate)
        return self.phases or (one,)

    @property
    def summary(self) -> dict[str, object]:
        """The settings that take effect, for people: each phase in a line of its own."""
        idle = {"phases", *PHASE_KEYS}
        lines = {
            f"phase {i}": f"{phase.trainable}, {phase.epochs} epochs at {phase.learning_rate:g}"
            for i, phase in enumerate(self.stretches, start=1)
        }
        return lines | self.model_dump(exclude=idle)


class Maps(Settings):
    """How notebook 3 scores class activation maps, by each of the `methods` (see `cam_methods` and `cam_scores`).

    At most `images` test images are held against lesions, boxes and lungs; of `faithful` of them the network is
    asked, several hundred passes each, with `steps` points on the curves of deletion and insertion.
    """

    methods: Annotated[tuple[MapMethod, ...], Field(min_length=1)] = (
        "gradcam",
        "gradcam++",
        "layercam",
        "eigencam",
    )
    images: Positive = 400
    faithful: Positive = 16
    steps: Positive = 12


class Quick(Settings):
    """What a quick look at a study does: everything, on little data."""

    limit: Positive = 120
    epochs: Positive = 1
    image_size: Annotated[int, Field(ge=32)] = 64


class Study(Settings):
    """A validated study. `name` is that of its file and of its folder below `runs/`.

    Its images are those of `data`, or of several `datasets` together. `positive` is the class that is looked for where
    there are two, see `positive_class`. `compare` names studies on the same test images whose results notebook 3 shows
    beside this one's.
    """

    name: FolderName
    title: str
    description: str = ""
    source: str = ""
    seed: Seed = 0
    limit: Positive | None = None
    positive: str | None = None
    compare: tuple[FolderName, ...] = ()
    data: Data | None = None
    datasets: tuple[Data, ...] = ()
    split: Split = Split()
    preprocessing: Preprocessing = Preprocessing()
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    networks: dict[str, dict[str, Any]]
    maps: Maps = Maps()
    quick: Quick = Quick()

    @field_validator("networks")
    @classmethod
    def _at_least_one(cls, networks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not networks:
            raise ValueError("a study needs at least one table [networks.NAME]")
        return networks

    @field_validator("training")
    @classmethod
    def _one_image_size(cls, training: Training) -> Training:
        if training.image_size is not None:
            raise ValueError("set image_size in [preprocessing], or in [networks.NAME] for one network")
        return training

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
        """The data of the study, one or several."""
        return self.datasets or (self.data,)

    @property
    def split_seed(self) -> int:
        """The seed that limits and splits the data."""
        return self.seed if self.split.seed is None else self.split.seed

    def training_of(self, network: str) -> Training:
        """Return the training settings of one network: the study's, `image_size` included, with the network's own
        on top.
        """
        if network not in self.networks:
            raise ValueError(f"study {self.name!r} has no network {network!r}: {', '.join(self.networks)}")
        common = self.training.model_dump() | {"image_size": self.preprocessing.image_size}
        return Training.model_validate(common | self.networks[network])

    def image_size_of(self, network: str) -> int:
        """Return the side, in pixels, of the square images that one network sees."""
        return self.training_of(network).image_size

    def overridden(
        self,
        *,
        networks: tuple[str, ...] | None = None,
        image_size: int | None = None,
        data_root: str | Path | None = None,
        limit: int | None = None,
        fold: int | None = None,
        seed: int | None = None,
        **training: object,
    ) -> "Study":
        """Return the study with some settings replaced; None leaves one as it is.

        `training` are fields of `Training`; given here they hold for every network, over the file's own
        `[networks.NAME]`, and `epochs` for every phase. Networks that the file does not name are trained with
        the study's settings. A limited study and a fold have a name, and so a folder of results, of their own:
        they never replace the real one's.
        """
        given = {key: value for key, value in training.items() if value is not None}
        fields = self.model_dump()
        fields["training"] |= given
        names = tuple(self.networks) if networks is None else networks
        replaced = given | ({} if image_size is None else {"image_size": image_size})
        fields["networks"] = {
            name: {k: v for k, v in self.networks.get(name, {}).items() if k not in replaced}
            for name in names
        }
        if "epochs" in given:
            for phase in _all_phases(fields):
                phase["epochs"] = given["epochs"]
        if image_size is not None:
            fields["preprocessing"]["image_size"] = image_size
        if data_root is not None:
            _move(fields, Path(data_root))
        fields |= {key: value for key, value in (("limit", limit), ("seed", seed)) if value is not None}
        if limit is not None:
            _rename(fields, f"-limit{limit}")
            # Asking the network costs hundreds of passes an image: too long for a look at little data.
            fields["maps"]["faithful"] = min(fields["maps"]["faithful"], max(2, limit // 20))
            fields["maps"]["steps"] = min(fields["maps"]["steps"], 4)
        if fold is not None:
            fields["split"]["fold"] = fold
            _rename(fields, f"-fold{fold}")
        return _validated(fields, self.name)

    def repeated(self, seed: int) -> "Study":
        """Return the same experiment on the same split with another seed for all else: initial weights, order
        and augmentation.

        It has a name, and so a folder of results, of its own; with the study's own seed it is the study itself.
        """
        if seed == self.seed:
            return self
        fields = self.model_dump() | {"seed": seed}
        fields["split"]["seed"] = self.split_seed
        _rename(fields, f"-seed{seed}")
        return _validated(fields, self.name)

    def quickened(self) -> "Study":
        """Return the study with its `[quick]` settings, under a name of its own: it never replaces the
        real study's results.
        """
        quick = self.quick
        study = self.overridden(limit=quick.limit, epochs=quick.epochs, image_size=quick.image_size)
        names = {"name": f"{self.name}-quick", "compare": tuple(f"{name}-quick" for name in self.compare)}
        return study.model_copy(update=names)


def _all_phases(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for training in (fields["training"], *fields["networks"].values()):
        if "phases" in training:  # a network without its own has those of the study
            training["phases"] = [dict(phase) for phase in training["phases"]]
            yield from training["phases"]


def _rename(fields: dict[str, Any], suffix: str) -> None:
    fields["name"] += suffix
    fields["compare"] = tuple(name + suffix for name in fields["compare"])


def _move(fields: dict[str, Any], root: Path) -> None:
    """Set the data root; of several datasets it is the folder that holds them all."""
    if fields["data"] is not None:
        fields["data"]["root"] = root
    for source in fields["datasets"]:
        source["root"] = root / Path(source["root"]).name


def load_study(
    study: str | Path,
    *,
    data_root: str | Path | None = None,
    seed: int | None = None,
    quick: bool = False,
    limit: int | None = None,
    epochs: int | None = None,
) -> Study:
    """Read the study of that name in `studies/`, or the TOML file at that path; an empty or None override
    leaves the file's own value.

    A study that `extends = "ANOTHER"` has that one's settings but for those that it gives itself; a table
    (`[training]`) is merged key by key, anything else replaced.

    Raises FileNotFoundError where there is none, ValueError with the key at fault where one is wrong.
    """
    path, fields = _read_file(study)
    if RESERVED_NAMES.fullmatch(path.stem):
        raise ValueError(f"study {path.name}: runs/{path.stem} is kept for other results: rename the file")
    _refuse_idle_settings(fields, path.name)
    loaded = _validated({"name": path.stem, **fields}, path.name)
    if data_root:
        loaded = loaded.overridden(data_root=Path(data_root).expanduser().absolute())
    loaded = loaded.overridden(seed=seed, limit=None if quick else limit, epochs=epochs)
    return loaded.quickened() if quick else loaded


def _read_file(study: str | Path, *, extended_by: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """Return the path of a study's file, and its settings on top of those that it extends."""
    path = Path(study)
    if path.suffix != ".toml":
        path = STUDIES / f"{study}.toml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in STUDIES.glob("*.toml")))
        raise FileNotFoundError(f"no study {str(study)!r}: give a TOML file or one of {known}")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}") from None
    if "name" in fields:
        raise ValueError(f"study {path.name}: leave 'name' out, a study has the name of its file")
    _anchor(fields, path)
    base = fields.pop("extends", None)
    if base is None:
        return path, fields
    if path.resolve() in extended_by:
        raise ValueError(f"study {path.name} extends itself: break the circle")
    sibling = path.parent / f"{base}.toml"
    start = sibling if sibling.is_file() else base
    _, below = _read_file(start, extended_by=(*extended_by, path.resolve()))
    for own, other in (("data", "datasets"), ("datasets", "data")):
        if own in fields:
            below.pop(other, None)  # a study has one or the other
    return path, _on_top(below, fields)


def _refuse_idle_settings(fields: Mapping[str, Any], where: str) -> None:
    """Refuse what phases would override: a setting that does nothing looks like one that does."""
    training, networks = fields.get("training"), fields.get("networks")
    for name, own in (networks if isinstance(networks, dict) else {}).items():
        groups = [group for group in (training, own) if isinstance(group, dict)]
        both = {key: value for group in groups for key, value in group.items()}
        idle = [key for key in PHASE_KEYS if key in both]
        if both.get("phases") and idle:
            raise ValueError(
                f"study {where}: {idle[0]!r} of {name} does nothing beside `phases`: give it in each phase, or set "
                "phases = []"
            )


def _anchor(fields: dict[str, Any], path: Path) -> None:
    # A relative root in a file must not depend on where Python was started; one that is given by hand does.
    base = PROJECT if path.parent == STUDIES else path.absolute().parent
    tables = [fields.get("data"), *_as_list(fields.get("datasets"))]
    for table in (
        table for table in tables if isinstance(table, dict) and isinstance(table.get("root"), str)
    ):
        table["root"] = base / Path(table["root"]).expanduser()


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _on_top(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _on_top(below[key], value) for key, value in above.items() if _tables(below.get(key), value)}
    return {**below, **above, **both}


def _tables(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def read_images(study: Study) -> XrayTable:
    """Read all images of the study's data, not split yet; draw its phantom first where it has one.

    Raises FileNotFoundError, with the way to get the data, where the data root does not hold it.
    """
    return _together([_read_source(source) for source in study.sources], study)


def load_table(study: Study) -> XrayTable:
    """Read the study's images (see `read_images`), as many as it wants, and split them by patient.

    Of several sources each is limited and split by itself: all have images in every split. Of a limited study
    the sizes of splits that are whole numbers shrink with the number of images.
    """
    tables = [_read_source(source) for source in study.sources]
    kept = min(1.0, (study.limit or math.inf) / sum(len(table) for table in tables))
    table = _together([_split(table, study, kept=kept) for table in tables], study)
    positive_class(study, table)  # refused before any work
    return table


def positive_class(study: Study, table: XrayTable) -> str | None:
    """Return the positive one of a table's two classes: what the study sets, else the one that is not among the names
    of `HEALTHY`. None for more classes and for several findings, which count each for itself.

    Raises ValueError where the study sets what is not one of two classes, or where neither or both of them are
    called healthy, so that it must say which one it is.
    """
    names = ", ".join(table.classes)
    if table.multilabel or len(table.classes) != 2:
        if study.positive is not None:
            raise ValueError(
                f"study {study.name}: `positive` chooses between two classes: leave it out for {names}"
            )
        return None
    one, other = table.classes
    choice = f'set positive = "{one}" or positive = "{other}" at the top of the study'
    if study.positive is not None:
        if study.positive not in table.classes:
            raise ValueError(f"study {study.name}: no class {study.positive!r}: {choice}")
        return study.positive
    others = [name for name in table.classes if re.sub(r"[\W_]+", "", name.casefold()) not in HEALTHY]
    if len(others) != 1:
        raise ValueError(f"study {study.name}: which of its two classes is looked for? {choice}")
    return others[0]


def _read_source(source: Data) -> XrayTable:
    if source.phantom is not None:
        write_phantom(source.root, **source.phantom.model_dump())
    table = read_dataset(source.reader, source.root, **source.options)
    return relabelled(table, source.labels) if source.labels else table


def _split(table: XrayTable, study: Study, *, kept: float) -> XrayTable:
    """Return the share `kept` of a table's images, split."""
    split, seed = study.split, study.split_seed
    if kept < 1:
        table = table.limited(max(1, round(kept * len(table))), seed=seed)
    val, test = (size if size < 1 else max(1, round(kept * size)) for size in (split.val, split.test))
    if split.fold is not None:
        table = split_into_folds(table, folds=split.folds, fold=split.fold, test=test, seed=seed)
    else:
        table = split_by_patient(table, val=val, test=test, seed=seed)
    if split.boxes_in_test:
        table = boxes_held_out(table)
    if split.keep_without_finding < 1:
        table = thinned(table, keep=split.keep_without_finding, seed=seed)
    return table


def _together(tables: list[XrayTable], study: Study) -> XrayTable:
    names = [source.root.name for source in study.sources]
    return tables[0] if len(tables) == 1 else merged(dict(zip(names, tables, strict=True)))


def _validated(fields: Mapping[str, Any], where: str) -> Study:
    try:
        study = Study.model_validate(fields)
        for network in study.networks:
            study.training_of(network)
    except ValidationError as error:
        raise ValueError(f"study {where}: " + "; ".join(_remedies(error))) from None
    return study


def _remedies(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        *groups, key = (str(part) for part in problem["loc"]) if problem["loc"] else ("",)
        place = f" in [{'.'.join(groups)}]" if groups else ""
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, _known_keys(error.title, groups), n=1)
            yield f"unknown key {key!r}{place}" + (f": did you mean {near[0]!r}?" if near else "")
        else:
            yield f"{key!r}{place}: {problem['msg'].removeprefix('Value error, ')}"


def _known_keys(title: str, groups: list[str]) -> list[str]:
    model: type[BaseModel] = {"Study": Study, "Training": Training}[title]
    for group in groups:
        annotation = model.model_fields[group].annotation if group in model.model_fields else None
        options = get_args(annotation) or (annotation,)  # of `Data | None`, `tuple[Data, ...]`
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)
