"""`load_study` reads a study file into a `Study`; `load_table` reads the images of a `Study` into an `XrayTable`."""

import math
import re
import tomllib
from pathlib import Path
from typing import Any

from datasets import XrayTable, read_dataset
from datasets.phantom import write_phantom
from datasets.splits import boxes_held_out, split_by_patient, split_into_folds, thinned
from datasets.table import merged, relabelled
from studies.settings import Data, Phase, Study, validated

PROJECT = Path(__file__).resolve().parents[1]
STUDIES = PROJECT / "studies"
# Names of folders below `runs/` for decoded images and for the results of limited studies, other seeds and folds.
RESERVED_NAMES = re.compile(r"image_cache|.*-(limit|seed|fold)\d+")
# Names of a healthy class, without spaces and punctuation. If one of two classes matches, the other one is positive.
HEALTHY = "normal|healthy|negative|controls?|clear|unremarkable|no(ne|findings?|disease|abnormality)?"


def load_study(study: str | Path, *, data_root: str | Path | None = None, **overrides: Any) -> Study:
    """Return the study in a file.

    A study with `extends = "ANOTHER"` inherits the settings that it does not set itself. Tables such as `[training]`
    are merged key by key.

    Args:
        study: a name in `studies/`, or the path of a TOML file.
        data_root: the folder of the data, or with several datasets their parent folder (default: as in the study).
        overrides: settings to replace, see `Study.overridden`: `limit`, `epochs`, `seed` and others.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: a key or a value is wrong; the message names it.
    """
    path, fields = _read_file(study)
    if RESERVED_NAMES.fullmatch(path.stem):
        raise ValueError(f"study {path.name}: runs/{path.stem} is kept for other results: rename the file")
    loaded = validated({"name": path.stem, **fields}, path.name)
    _refuse_unused_settings(loaded)
    if data_root:
        loaded = _moved(loaded, Path(data_root).expanduser().absolute())
    return loaded.overridden(**overrides)


def _read_file(study: str | Path, *, extended_by: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """Return the path of a study's file, and its settings merged with those of the study that it extends."""
    path = Path(study)
    if path.suffix != ".toml":
        path = STUDIES / f"{study}.toml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in STUDIES.glob("*.toml")))
        raise FileNotFoundError(f"no study {str(study)!r}: give a TOML file or one of {names}")
    if path.resolve() in extended_by:
        raise ValueError(f"study {path.name} extends itself: break the circle")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}") from None
    if "name" in fields:
        raise ValueError(f"study {path.name}: leave 'name' out, a study has the name of its file")
    # A relative root starts at the file's folder, for studies in `studies/` at the project's, never at the current one.
    _anchor(fields, PROJECT if path.parent == STUDIES else path.absolute().parent)
    base = fields.pop("extends", None)
    if base is None:
        return path, fields
    sibling = path.parent / f"{base}.toml"
    _, inherited = _read_file(sibling if sibling.is_file() else base, extended_by=(*extended_by, path.resolve()))
    for key, other in (("data", "datasets"), ("datasets", "data")):
        if key in fields:
            inherited.pop(other, None)  # a study has only one of the two
    return path, _on_top(inherited, fields)


def _anchor(fields: dict[str, Any], base: Path) -> None:
    """Make relative roots of the data sources absolute; they start at `base`."""
    listed = fields.get("datasets")
    for table in (fields.get("data"), *(listed if isinstance(listed, list) else ())):
        if isinstance(table, dict) and isinstance(table.get("root"), str):
            table["root"] = base / Path(table["root"]).expanduser()


def _on_top(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the settings `below`, replaced by those `above`; tables are merged key by key."""
    settings = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        settings[key] = _on_top(below[key], value) if both else value
    return settings


def _moved(study: Study, root: Path) -> Study:
    """Return the study with its data in `root`; each of several datasets is in a subfolder with its name."""
    if study.data is not None:
        return study.model_copy(update={"data": study.data.model_copy(update={"root": root})})
    sources = (source.model_copy(update={"root": root / source.root.name}) for source in study.datasets)
    return study.model_copy(update={"datasets": tuple(sources)})


def _refuse_unused_settings(study: Study) -> None:
    """Refuse settings that have no effect because the study has `phases`."""
    for network, own_settings in study.networks.items():
        settings = study.training.model_dump(exclude_unset=True) | own_settings
        unused = [key for key in Phase.model_fields if key in settings and settings.get("phases")]
        if unused:
            problem = f"{unused[0]!r} of {network} does nothing beside `phases`"
            raise ValueError(f"study {study.name}: {problem}: set it in each phase, or phases = []")


def read_images(study: Study) -> XrayTable:
    """Return all images of the study's data, not split yet; a missing phantom is drawn.

    Raises FileNotFoundError if the data are not in the data root; the message says how to get them.
    """
    return _together([_read_source(source) for source in study.sources], study)


def load_table(study: Study) -> XrayTable:
    """Return the study's images (see `read_images`), limited to the study's `limit` and split by patient.

    Each source is limited and split separately, so that every split has images of all sources. In a limited study,
    split sizes that are numbers of images shrink in the same proportion.
    """
    tables = [_read_source(source) for source in study.sources]
    share = min(1.0, (study.limit or math.inf) / sum(len(table) for table in tables))
    table = _together([_split(table, study, share) for table in tables], study)
    positive_class(study, table)  # raises an error if the choice is unclear, before any work is done
    return table


def positive_class(study: Study, table: XrayTable) -> str | None:
    """Return the positive one of two classes: the study's `positive`, else the one that does not match `HEALTHY`.

    The result is None if there are more than two classes, or several findings an image. Raises ValueError if
    `positive` is not one of two classes, or if it is not set and the names do not decide.
    """
    if table.multilabel or len(table.classes) != 2:
        if study.positive is None:
            return None
        names = ", ".join(table.classes)
        raise ValueError(f"study {study.name}: `positive` chooses between two classes: leave it out for {names}")
    remedy = "set {} or {} at the top of the study".format(*(f'positive = "{name}"' for name in table.classes))
    sick = [name for name in table.classes if not re.fullmatch(HEALTHY, re.sub(r"[\W_]+", "", name.casefold()))]
    if study.positive is None and len(sick) != 1:
        raise ValueError(f"study {study.name}: which of its two classes is the positive one? {remedy}")
    positive = study.positive or sick[0]
    if positive not in table.classes:
        raise ValueError(f"study {study.name}: no class {positive!r}: {remedy}")
    return positive


def _read_source(source: Data) -> XrayTable:
    if source.phantom is not None:
        write_phantom(source.root, **source.phantom.model_dump())
    options = source.model_dump(include={"classes", "patient_pattern", "official_split"}, exclude_defaults=True)
    table = read_dataset(source.reader, source.root, **options)
    return relabelled(table, source.labels) if source.labels else table


def _split(table: XrayTable, study: Study, share: float) -> XrayTable:
    """Return the table limited to a `share` (0 to 1) of its images, and split."""
    split, seed = study.split, study.split_seed
    table = table.limited(max(1, round(share * len(table))), seed=seed)
    val, test = (size if size < 1 else max(1, round(share * size)) for size in (split.val, split.test))
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
