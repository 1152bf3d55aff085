"""One experiment = one TOML file: which data, which splits, which networks, trained how.

The notebooks, `finetune.py` and the tests read the same file through `load_study`.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from datasets import XrayTable, read_dataset
from datasets.phantom import write_phantom
from datasets.splits import split_by_patient

PROJECT = Path(__file__).resolve().parent
STUDIES = PROJECT / "studies"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Positive = Annotated[int, Field(gt=0)]
# Below 1 a fraction of each class, from 1 on a whole number of images a class.
SplitSize = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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
    """Where the images are and how they are read."""

    reader: str
    root: Path
    classes: tuple[str, ...] = ()
    patient_pattern: str | None = None
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
    def _patients_only_in_names(self) -> "Data":
        if self.patient_pattern is not None and self.reader != "folder":
            raise ValueError("patient_pattern is for the reader 'folder' only")
        return self


class Split(Settings):
    """How much of the data is held out; see `datasets.splits.split_by_patient`."""

    val: SplitSize = 0.1
    test: SplitSize = 0.1

    @field_validator("val", "test")
    @classmethod
    def _whole_from_one_on(cls, size: float) -> float:
        if size >= 1 and size != int(size):
            raise ValueError("must be a fraction below 1 or a whole number of images a class")
        return int(size) if size >= 1 else size


class Preprocessing(Settings):
    """What is done to every image, in training and at inference alike."""

    image_size: Annotated[int, Field(ge=32)] = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


class Augmentation(Settings):
    """What is done to training images only."""

    horizontal_flip: bool = False
    smallest_crop: float = Field(default=1.0, gt=0, le=1)


class Training(Settings):
    """How one network is fine-tuned; `[networks.NAME]` in a study overrides any of it for that network."""

    weights: str = "imagenet"
    epochs: Positive = 25
    batch_size: Positive = 32
    learning_rate: float = Field(default=3e-5, gt=0)
    schedule: Literal["constant", "one_cycle"] = "constant"
    patience: Positive = 5
    balance: Literal["oversample", "loss", "none"] = "oversample"
    dropout: float | None = Field(default=None, ge=0, lt=1)
    image_size: Annotated[int, Field(ge=32)] | None = None
    temporary_batch_norm: bool = False
    residual_gain: float = Field(default=1.0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    num_workers: int = Field(default=0, ge=0)


class Quick(Settings):
    """What a quick look at a study does: everything, on little data."""

    limit: Positive = 120
    epochs: Positive = 1
    image_size: Annotated[int, Field(ge=32)] = 64


class Study(Settings):
    """A validated study. `name` is that of its file and of its folder below `runs/`."""

    name: str
    title: str
    description: str = ""
    source: str = ""
    seed: Seed = 0
    limit: Positive | None = None
    data: Data
    split: Split = Split()
    preprocessing: Preprocessing = Preprocessing()
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    networks: dict[str, dict[str, Any]]
    quick: Quick = Quick()

    @field_validator("networks")
    @classmethod
    def _at_least_one(cls, networks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not networks:
            raise ValueError("a study needs at least one table [networks.NAME]")
        return networks

    def training_of(self, network: str) -> Training:
        """Return the training settings of one network: the study's, with the network's own on top."""
        if network not in self.networks:
            raise ValueError(f"study {self.name!r} has no network {network!r}: {', '.join(self.networks)}")
        return Training.model_validate(self.training.model_dump() | self.networks[network])

    def image_size_of(self, network: str) -> int:
        """Return the side, in pixels, of the square images that one network sees."""
        return self.training_of(network).image_size or self.preprocessing.image_size

    def overridden(
        self,
        *,
        networks: tuple[str, ...] | None = None,
        image_size: int | None = None,
        data_root: str | Path | None = None,
        limit: int | None = None,
        seed: int | None = None,
        **training: object,
    ) -> "Study":
        """Return the study with some settings replaced; None leaves one as it is.

        `training` are fields of `Training`; given here they hold for every network, over the file's own
        `[networks.NAME]`. Networks that the file does not name are trained with the study's settings. A
        limited study has a name, and so a folder of results, of its own: it never replaces the real one's.
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
        if image_size is not None:
            fields["preprocessing"]["image_size"] = image_size
        if data_root is not None:
            fields["data"]["root"] = data_root
        fields |= {key: value for key, value in (("limit", limit), ("seed", seed)) if value is not None}
        if limit is not None:
            fields["name"] = f"{self.name}-limit{limit}"
        return _validated(fields, self.name)

    def quickened(self) -> "Study":
        """Return the study with its `[quick]` settings, under a name of its own: it never replaces the
        real study's results.
        """
        quick = self.quick
        study = self.overridden(limit=quick.limit, epochs=quick.epochs, image_size=quick.image_size)
        return study.model_copy(update={"name": f"{self.name}-quick"})


def load_study(
    study: str | Path, *, data_root: str | Path | None = None, seed: int | None = None, quick: bool = False
) -> Study:
    """Read the study of that name in `studies/`, or the TOML file at that path; an empty or None override
    leaves the file's own value.

    Raises FileNotFoundError where there is none, ValueError with the key at fault where one is wrong.
    """
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
    loaded = _validated({"name": path.stem, **fields}, path.name)
    # A relative root in a file must not depend on where Python was started; one that is given by hand does.
    base = PROJECT if path.parent == STUDIES else path.absolute().parent
    root = Path(data_root).expanduser().absolute() if data_root else base / loaded.data.root.expanduser()
    loaded = loaded.overridden(data_root=root, seed=seed)
    return loaded.quickened() if quick else loaded


def read_images(study: Study) -> XrayTable:
    """Read all images of the study's data, not split yet; draw its phantom first where it has one.

    Raises FileNotFoundError, with the way to get the data, where the data root does not hold it.
    """
    root = study.data.root
    if study.data.phantom is not None:
        write_phantom(root, **study.data.phantom.model_dump())
    options: dict[str, object] = {"classes": study.data.classes}
    if study.data.patient_pattern is not None:
        options["patient_pattern"] = study.data.patient_pattern
    return read_dataset(study.data.reader, root, **options)


def load_table(study: Study) -> XrayTable:
    """Read the study's images (see `read_images`), as many as it wants, and split them by patient."""
    table = read_images(study)
    if study.limit is not None:
        table = table.limited(study.limit, seed=study.seed)
    return split_by_patient(table, val=study.split.val, test=study.split.test, seed=study.seed)


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
        options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)
