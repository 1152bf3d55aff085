"""`XrayTable`: what every dataset becomes, and all that the rest of the project knows of a dataset."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "patient", "split", "label", "mask", "lesion")
BOX_COLUMNS = ("path", "label", "x", "y", "width", "height")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


def no_boxes() -> pd.DataFrame:
    """Return an empty frame of boxes."""
    return pd.DataFrame(columns=list(BOX_COLUMNS))


@dataclass(frozen=True)
class XrayTable:
    """The images of one dataset, a row each, with their labels, patients and splits.

    `frame` has the columns of `COLUMNS`: `path` (absolute), `patient` (an id; the image's own name where
    the source has none), `split` ("train", "val", "test" or None while it is not yet decided), `label`
    (index into `classes`), `mask` and `lesion` (files of the lung mask and of the lesion mask, or None).
    `boxes` has the columns of `BOX_COLUMNS`: `label` is an index into `classes`; x, y (upper left corner),
    width and height are fractions of the image, so that resolution never matters. `notes` are the
    reader's remarks for a human: what was left out, and why.

    Raises ValueError where a column is missing, a label is out of range, a file is listed twice or, the
    one mistake that makes every later figure worthless, a patient is in two splits.
    """

    frame: pd.DataFrame
    classes: tuple[str, ...]
    root: Path
    has_patient_ids: bool
    multilabel: bool = False
    boxes: pd.DataFrame = field(default_factory=no_boxes)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        missing = set(COLUMNS) - set(self.frame.columns)
        if missing:
            raise ValueError(f"a table of X-rays needs the columns {sorted(missing)}")
        if self.frame.empty:
            raise ValueError(f"no images in {self.root}")
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.root} has one class only, {self.classes[0]!r}: there is nothing to tell apart"
            )
        reserved = {"path", "patient", "target"} & set(self.classes)
        if reserved or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes must be different and not called path, patient or target: {self.classes}"
            )
        if not self.frame["label"].between(0, len(self.classes) - 1).all():
            raise ValueError(f"a label is not an index into the {len(self.classes)} classes {self.classes}")
        twice = self.frame.loc[self.frame["path"].duplicated(), "path"]
        if not twice.empty:
            raise ValueError(f"{len(twice)} images are listed twice, the first is {twice.iloc[0]}")
        unknown = set(self.frame["split"].dropna()) - set(SPLITS)
        if unknown:
            raise ValueError(f"unknown splits {sorted(unknown)}: a split is one of {', '.join(SPLITS)}")
        self._refuse_shared_patients()

    def _refuse_shared_patients(self) -> None:
        placed = self.frame.dropna(subset=["split"])
        sides = placed.groupby("patient", sort=False)["split"].nunique()
        shared = sides.index[sides > 1]
        if len(shared):
            first = shared[0]
            where = sorted(set(placed.loc[placed["patient"] == first, "split"]))
            raise ValueError(
                f"{len(shared)} patients are in more than one split, for example {first!r} in "
                f"{' and '.join(where)}: put all images of a patient on one side"
            )

    def __len__(self) -> int:
        return len(self.frame)

    def subset(self, split: str) -> pd.DataFrame:
        """Return the rows of one split, numbered from 0. Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        return self.frame[self.frame["split"] == split].reset_index(drop=True)

    def counts(self) -> pd.DataFrame:
        """Return the number of images, a row a class, a column a split (one column if there are none)."""
        names = self.frame["label"].map(dict(enumerate(self.classes)))
        splits = self.frame["split"].fillna("not split")
        order = [name for name in (*SPLITS, "not split") if (splits == name).any()]
        return pd.crosstab(names, splits).reindex(index=list(self.classes), columns=order, fill_value=0)

    def patient_counts(self) -> pd.DataFrame:
        """Return the number of patients, a row a class, a column a split, as `counts` does for images."""
        return replace(self, frame=self.frame.drop_duplicates(["patient", "label", "split"])).counts()

    def relative_paths(self) -> pd.Series:
        """Return every image's path relative to `root`, with forward slashes: the same on all machines."""
        return relative_paths(self.frame["path"], self.root)

    def limited(self, number: int, *, seed: int) -> "XrayTable":
        """Return a table of `number` images whose class shares are those of this one, chosen by `seed`.

        Whole patients are taken, so that a limited table splits as the full one would.
        """
        if number >= len(self):
            return self
        if number < len(self.classes):
            raise ValueError(f"a limit of {number} images is too few for {len(self.classes)} classes")
        wanted = _shares(self.frame["label"].value_counts().sort_index(), number)
        kept: list[str] = []
        for label, group in patients_of(self.frame).sample(frac=1, random_state=seed).groupby("label"):
            kept.extend(group.index[group["images"].cumsum().shift(fill_value=0) < wanted.get(label, 0)])
        frame = self.frame[self.frame["patient"].isin(kept)].reset_index(drop=True)
        boxes = self.boxes[self.boxes["path"].isin(frame["path"])].reset_index(drop=True)
        note = f"limited to {len(frame)} of {len(self)} images"
        return replace(self, frame=frame, boxes=boxes, notes=(*self.notes, note))


def _shares(counts: pd.Series, number: int) -> pd.Series:
    """Return whole numbers in proportion to `counts` that sum to `number`, none below 1 (largest remainders)."""
    exact = counts * number / counts.sum()
    whole = exact.astype(int).clip(lower=1)
    while whole.sum() != number:
        step = 1 if whole.sum() < number else -1
        change = (exact - whole) * step
        whole[change.where(whole + step >= 1, -float("inf")).idxmax()] += step
    return whole


def patients_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row a patient, in the order of their ids: `images`, how many, and `label`, the class of most
    of them (of classes with equally many, the first).
    """
    counts = frame.groupby(["patient", "label"]).size().rename("count").reset_index()
    most = counts.sort_values(["patient", "count", "label"], ascending=[True, False, True])
    label = most.drop_duplicates("patient").set_index("patient")["label"]
    return pd.DataFrame({"images": counts.groupby("patient")["count"].sum(), "label": label})


def relative_paths(paths: Sequence[str], root: Path) -> pd.Series:
    """Return `paths` relative to `root`, with forward slashes, as a column of strings."""
    return pd.Series([Path(path).relative_to(root).as_posix() for path in paths], dtype=object)


def image_files(folder: Path) -> list[Path]:
    """Return the image files that lie directly in `folder`, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_image_file(path))


def is_image_file(path: Path) -> bool:
    """Return whether a file is an image by its name; `._x.png`, which macOS leaves behind, is not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def data_fingerprint(table: XrayTable) -> str:
    """Return 16 hex digits that change when an image is added, removed, resized on disk, relabelled or moved
    to another split. Files are named and measured, not read: 100,000 of them take a second.
    """
    sizes = [Path(path).stat().st_size for path in table.frame["path"]]
    rows = zip(
        table.relative_paths(), table.frame["label"], table.frame["split"].fillna(""), sizes, strict=True
    )
    lines = sorted(f"{path}\t{label}\t{split}\t{size}" for path, label, split, size in rows)
    return hashlib.sha256("\n".join(["\t".join(table.classes), *lines]).encode()).hexdigest()[:16]
