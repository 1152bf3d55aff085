"""`XrayTable`: what every dataset becomes, and all that the rest of the project knows of a dataset."""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")
COLUMNS = ("path", "patient", "split", "label", "mask", "lesion")
BOX_COLUMNS = ("path", "label", "x", "y", "width", "height")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
NO_FINDING = "No Finding"  # the target, in a file, of an image that has none of the findings
FINGERPRINT = "sha256:"  # how a fingerprint begins; older ones, without it, did not cover the images' content
_known_digests: dict[tuple[str, int, int, int], str] = {}  # by path, size and times


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

    In a multi-label table the classes are findings, of which an image may have several or none: each is a
    uint8 column of its own, 0 or 1, called by its name. `label` is then no more than the stratum by which
    images are split and limited: the rarest finding that the image has (see `rarest_findings`), or
    `len(classes)` where it has none.

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
        self._refuse_unfit_classes()
        twice = self.frame.loc[self.frame["path"].duplicated(), "path"]
        if not twice.empty:
            raise ValueError(f"{len(twice)} images are listed twice, the first is {twice.iloc[0]}")
        unknown = set(self.frame["split"].dropna()) - set(SPLITS)
        if unknown:
            raise ValueError(f"unknown splits {sorted(unknown)}: a split is one of {', '.join(SPLITS)}")
        self._refuse_shared_patients()

    def _refuse_unfit_classes(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.root} has one class only, {self.classes[0]!r}: there is nothing to tell apart"
            )
        reserved = {"path", "patient", "target", *((*COLUMNS, NO_FINDING) if self.multilabel else ())}
        if reserved & set(self.classes) or len(set(self.classes)) < len(self.classes):
            names = ", ".join(sorted(reserved))
            raise ValueError(f"classes must be different and not called {names}: {self.classes}")
        highest = len(self.classes) - (not self.multilabel)
        if not self.frame["label"].between(0, highest).all():
            raise ValueError(f"a label is not an index into the {len(self.classes)} classes {self.classes}")
        if not self.multilabel:
            return
        absent = set(self.classes) - set(self.frame.columns)
        if absent:
            raise ValueError(f"a multi-label table needs a column of 0 and 1 for {sorted(absent)}")
        if not self.frame[list(self.classes)].isin((0, 1)).all(axis=None):
            raise ValueError("a finding is neither 0 nor 1: a multi-label table knows no other values")
        if any("|" in name for name in self.classes):
            raise ValueError(f"a finding must not have | in its name, it joins them in files: {self.classes}")

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

    def targets(self, split: str) -> np.ndarray:
        """Return what the images of `subset(split)` are, in its order: (n,) int64 indices into `classes`, or
        (n, C) uint8, 1 where an image has the finding.
        """
        rows = self.subset(split)
        if self.multilabel:
            return rows[list(self.classes)].to_numpy(np.uint8)
        return rows["label"].to_numpy(np.int64)

    def one_sided(self, split: str) -> tuple[str, ...]:
        """Return the findings that all or none of the images of a split have, so that nothing can be learnt, or
        judged, of them there; of a single-label table there are none.
        """
        if not self.multilabel:
            return ()
        shares = self.targets(split).mean(axis=0)
        return tuple(name for name, share in zip(self.classes, shares, strict=True) if share in (0, 1))

    def counts(self) -> pd.DataFrame:
        """Return the number of images, a row a class, a column a split (one column if there are none).

        In a multi-label table an image counts for each of its findings; a last row, "No finding", counts the
        images without any.
        """
        return self._by_split(self._memberships().groupby(self._sides()).sum())

    def patient_counts(self) -> pd.DataFrame:
        """Return the number of patients, a row a class, a column a split, as `counts` does for images."""
        per_patient = self._memberships().groupby([self._sides(), self.frame["patient"]]).max()
        return self._by_split(per_patient.groupby(level="split").sum())

    def _sides(self) -> pd.Series:
        return self.frame["split"].fillna("not split")

    def _memberships(self) -> pd.DataFrame:
        """Return 0 or 1, a row an image, a column a class and, in a multi-label table, "No finding"."""
        if self.multilabel:
            findings = self.frame[list(self.classes)].astype("int64")
            return findings.assign(**{"No finding": 1 - findings.max(axis=1)})
        one = np.eye(len(self.classes), dtype=np.int64)[self.frame["label"].to_numpy(np.int64)]
        return pd.DataFrame(one, columns=list(self.classes), index=self.frame.index)

    def _by_split(self, sums: pd.DataFrame) -> pd.DataFrame:
        order = [name for name in (*SPLITS, "not split") if name in sums.index]
        return sums.loc[order].rename_axis("split").T.rename_axis("label")

    def relative_paths(self) -> pd.Series:
        """Return every image's path relative to `root`, with forward slashes: the same on all machines."""
        return relative_paths(self.frame["path"], self.root)

    def limited(self, number: int, *, seed: int) -> "XrayTable":
        """Return a table of about `number` images whose shares of classes and of the splits that the source
        brings are those of this one, chosen by `seed`.

        Whole patients are taken, so that a limited table splits as the full one would. The rarest strata of
        a multi-label table may vanish.
        """
        if number >= len(self):
            return self
        patients = patients_of(self.frame, no_finding=len(self.classes) if self.multilabel else None)
        strata = patients.groupby(["split", "label"])["images"].sum()
        if number < len(strata) and not self.multilabel:
            raise ValueError(f"a limit of {number} images is too few for {len(strata)} classes and splits")
        wanted = _shares(strata, number)
        kept: list[str] = []
        for stratum, group in patients.sample(frac=1, random_state=seed).groupby(["split", "label"]):
            if wanted[stratum]:
                kept.extend(first_patients(group["images"], wanted[stratum]))
        note = f"limited to {{}} of {len(self)} images"
        return self.of_images(self.frame["patient"].isin(kept), note=note)

    def of_images(self, chosen: pd.Series, *, note: str) -> "XrayTable":
        """Return a table of the images where `chosen`, a row an image, is True, with their boxes.

        `note` is added to the notes, with the number of images that are left in place of its {}.
        """
        frame = self.frame[chosen].reset_index(drop=True)
        boxes = self.boxes[self.boxes["path"].isin(frame["path"])].reset_index(drop=True)
        return replace(self, frame=frame, boxes=boxes, notes=(*self.notes, note.format(len(frame))))


def _shares(counts: pd.Series, number: int) -> pd.Series:
    """Return whole numbers in proportion to `counts` that sum to `number` (largest remainders), none below 1
    while there are enough for that.
    """
    least = int(number >= len(counts))
    exact = counts * number / counts.sum()
    whole = exact.astype(int).clip(lower=least)
    while whole.sum() != number:
        step = 1 if whole.sum() < number else -1
        change = (exact - whole) * step
        whole[change.where(whole + step >= least, -float("inf")).idxmax()] += step
    return whole


def first_patients(images: pd.Series, target: int) -> list[str]:
    """Return the first patients, in their random order, whose numbers of `images` together come to `target` as nearly
    as can be: the last one is taken if at least half of its images still fit.

    To go on and fill up with those who fit would prefer patients with few images. Only one with at least twice `target`
    images is passed over, for it would be all of a split; where all have, it is the one with the fewest: better a few
    too many than an empty split.
    """
    possible = images[images < 2 * target]
    middles = possible.cumsum() - possible / 2
    return list(possible.index[middles < target]) or [images.idxmin()]


def patients_of(frame: pd.DataFrame, *, no_finding: int | None = None) -> pd.DataFrame:
    """Return a row a patient, in the order of their ids: `images`, how many, `label`, the class of most of
    them (of classes with equally many, the first), and `split`, "" where it is not yet decided.

    In a multi-label table, where `no_finding` is the label of images without any, `label` is the patient's
    rarest finding instead: one Hernia among thirty images must count, or its split would be left to chance.
    """
    counts = frame.groupby(["patient", "label"]).size().rename("count").reset_index()
    order = -counts["count"]
    if no_finding is not None:
        rarity = frame["label"].value_counts()
        order = counts["label"].map(rarity).where(counts["label"] != no_finding, len(frame))
    first = counts.assign(order=order).sort_values(["patient", "order", "label"]).drop_duplicates("patient")
    patients = counts.groupby("patient")["count"].sum().rename("images").to_frame()
    patients["label"] = first.set_index("patient")["label"]
    return patients.assign(split=frame.groupby("patient")["split"].first().fillna(""))


def rarest_findings(findings: pd.DataFrame) -> np.ndarray:
    """Return (N,) int64, the column number of each image's rarest finding by the sums of the 0/1 columns, the
    number of columns where it has none: the `label` of a multi-label table.
    """
    rarest_first = np.argsort(findings.sum().to_numpy(), kind="stable")
    ordered = findings.to_numpy(bool)[:, rarest_first]
    return np.where(ordered.any(axis=1), rarest_first[ordered.argmax(axis=1)], findings.shape[1])


def target_names(table: XrayTable, split: str | None = None) -> list[str]:
    """Return what a file calls the targets of the images of `split`, or of all: the class's name, or the
    findings' names as in "Effusion|Mass", "No Finding" where there are none.
    """
    rows = table.frame if split is None else table.subset(split)
    if not table.multilabel:
        return [table.classes[label] for label in rows["label"]]
    # Few combinations of findings occur, so that each is spelt once.
    kinds, which = np.unique(rows[list(table.classes)].to_numpy(bool), axis=0, return_inverse=True)
    names = ["|".join(np.array(table.classes, dtype=object)[kind]) or NO_FINDING for kind in kinds]
    return [names[kind] for kind in which.ravel()]


def relabelled(table: XrayTable, mapping: Mapping[str, str]) -> XrayTable:
    """Return the single-label table with its classes renamed by `mapping`; those of one name become one class.

    A class that is not in `mapping` keeps its name; the order is that in which the names first appear.
    """
    if table.multilabel:
        raise ValueError("classes of a multi-label table are not renamed: choose findings with `classes`")
    unknown = sorted(set(mapping) - set(table.classes))
    if unknown:
        raise ValueError(f"no classes {', '.join(unknown)} to rename: choose from {', '.join(table.classes)}")
    names = [mapping.get(name, name) for name in table.classes]
    classes = tuple(dict.fromkeys(names))
    frame, boxes = _with_labels(table, [classes.index(name) for name in names])
    return replace(table, frame=frame, boxes=boxes, classes=classes)


def merged(tables: Mapping[str, XrayTable]) -> XrayTable:
    """Return the images of several sources, by name, as one table with the union of their classes in the order
    in which these first appear.

    Patients become "source/patient", so that ids of two sources cannot meet; the root is the folder that the
    sources' roots share. A class that not all sources have is told in the notes, for there the source gives
    the class away. A source that does not look for a finding cannot deny it, so that multi-label sources
    must have the same findings.

    Raises ValueError for that, and for sources of which some are multi-label and others are not.
    """
    several = [name for name, table in tables.items() if table.multilabel]
    if several and len(several) < len(tables):
        raise ValueError(
            f"{', '.join(several)} has several findings an image, the others have one class: keep one kind"
        )
    classes = tuple(dict.fromkeys(name for table in tables.values() for name in table.classes))
    partial = [name for name in classes if not all(name in table.classes for table in tables.values())]
    if several and partial:
        raise ValueError(f"not all sources look for {', '.join(partial)}: choose findings that all have")
    parts = {name: _with_labels(t, [classes.index(c) for c in t.classes]) for name, t in tables.items()}
    columns = [*COLUMNS, *(classes if several else ())]
    frames = [part.assign(patient=f"{name}/" + part["patient"])[columns] for name, (part, _) in parts.items()]
    frame = pd.concat(frames, ignore_index=True)
    boxes = [part for _, part in parts.values() if len(part)]
    remarks = [f"{name}: {note}" for name, table in tables.items() for note in table.notes]
    for name in partial:
        having = ", ".join(source for source, table in tables.items() if name in table.classes)
        remarks.append(f"{name} comes from {having} only: the source alone gives it away")
    return XrayTable(
        frame=frame.assign(label=rarest_findings(frame[list(classes)])) if several else frame,
        classes=classes,
        root=Path(os.path.commonpath([table.root for table in tables.values()])),
        has_patient_ids=all(table.has_patient_ids for table in tables.values()),
        multilabel=bool(several),
        boxes=pd.concat(boxes, ignore_index=True) if boxes else no_boxes(),
        notes=tuple(remarks),
    )


def _with_labels(table: XrayTable, labels: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the frame and the boxes with the new `labels`, one a class, in place of the present ones."""
    new = dict(enumerate([*labels, len(labels)]))  # the last: no finding
    frame, boxes = table.frame, table.boxes
    boxes = boxes.assign(label=boxes["label"].map(new))
    return frame.assign(label=frame["label"].map(new).astype("int64")), boxes


def relative_paths(paths: Iterable[str], root: Path) -> pd.Series:
    """Return `paths` relative to `root`, with forward slashes, as a column of strings."""
    top = str(root).rstrip(os.sep) + os.sep  # as text: a Path an image takes seconds for 100,000
    texts = [str(path) for path in paths]
    outside = next((text for text in texts if not text.startswith(top)), None)
    if outside is not None:
        raise ValueError(f"{outside} does not lie in {root}")
    return pd.Series([text[len(top) :].replace(os.sep, "/") for text in texts], dtype=object)


def image_files(folder: Path) -> list[Path]:
    """Return the image files that lie directly in `folder`, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_image_file(path))


def subfolder(parent: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in `parent` that has one of `names` (in lower case; its own case does not matter), None
    where there is none.

    Raises ValueError where there are several: one of them would be ignored.
    """
    found = sorted(path for path in parent.iterdir() if path.name.lower() in names and path.is_dir())
    if len(found) > 1:
        raise ValueError(f"{parent} has both {' and '.join(path.name for path in found)}: keep one")
    return found[0] if found else None


def is_image_file(path: Path) -> bool:
    """Return whether a file is an image by its name; `._x.png`, which macOS leaves behind, is not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def data_fingerprint(table: XrayTable) -> str:
    """Return a text that changes when the content of an image changes, or an image is added, removed, relabelled or
    moved to another split. All files are read, but each only once in a process as long as it stays as it was.

    Raises OSError where an image cannot be read.
    """
    digests = content_digests(table.frame["path"])
    if None in digests:
        raise OSError(f"cannot be read: {table.frame['path'].iloc[digests.index(None)]}")
    labels = target_names(table) if table.multilabel else table.frame["label"]
    rows = zip(table.relative_paths(), labels, table.frame["split"].fillna(""), digests, strict=True)
    lines = sorted(f"{path}\t{label}\t{split}\t{digest}" for path, label, split, digest in rows)
    whole = hashlib.sha256("\n".join(["\t".join(table.classes), *lines]).encode()).hexdigest()
    return FINGERPRINT + whole[:16]


def content_digests(paths: Iterable[str | os.PathLike[str]]) -> list[str | None]:
    """Return 32 hex digits for the bytes of each file, None for one that cannot be read."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_content_digest, paths))


def _content_digest(path: str | os.PathLike[str]) -> str | None:
    try:
        state = os.stat(path)
        key = (os.fspath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        if key in _known_digests:
            return _known_digests[key]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return None
    # The clock of a file system is coarse: a file that was written just now may change and keep its times.
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > 10**9:
        _known_digests[key] = digest
    return digest
