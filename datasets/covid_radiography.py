"""The COVID-19 Radiography Database (Chowdhury et al. 2020, IEEE Access 8; Rahman et al. 2021,
Comput. Biol. Med. 132): 3,616 COVID, 6,012 Lung_Opacity, 10,192 Normal, 1,345 Viral Pneumonia.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.table import XrayTable, image_files, no_boxes, subfolder

# Class -> the names that its folder had in the database's versions, compared without regard to case.
CLASS_FOLDERS: dict[str, tuple[str, ...]] = {
    "COVID-19": ("covid", "covid-19"),
    "Lung Opacity": ("lung_opacity",),
    "Normal": ("normal",),
    "Viral Pneumonia": ("viral pneumonia",),
}
TOP_FOLDERS = ("covid-19_radiography_dataset", "covid-19 radiography database")  # as above
DOWNLOAD = (
    'pip install kagglehub && python -c "import kagglehub; kagglehub.dataset_download('
    "'tawsifurrahman/covid19-radiography-database', output_dir='data')\""
)


def read_covid_radiography(root: Path, *, classes: Sequence[str] = ()) -> XrayTable:
    """Read the database in the folder `root`, or in the folder of the download's own name inside it.

    Both layouts are read: the present one, `<Class>/images/*.png` with lung masks of the same names in
    `<Class>/masks/`, and the older one with the images directly in the class folder. `classes` names the
    classes to read and their order (all four by default); those without a folder are named in the table's
    notes and are no classes of the table. The source has no patient ids: an image is its own patient.

    What our phantom adds to the layout is read too where it is there: lesion masks in `<Class>/lesions/`
    and `boxes.csv` (path below `root`, label, x, y, width and height as fractions of the image).

    Raises FileNotFoundError, with the command that gets the data, where no class folder is found; ValueError where
    a class has two folders.
    """
    wanted = tuple(classes) or tuple(CLASS_FOLDERS)
    unknown = set(wanted) - set(CLASS_FOLDERS)
    if unknown:
        raise ValueError(f"unknown classes {sorted(unknown)}: choose from {', '.join(CLASS_FOLDERS)}")
    top = subfolder(root, TOP_FOLDERS) if root.is_dir() else None
    root = (top or root).absolute()
    folders = class_folders(root)
    present = tuple(name for name in wanted if name in folders)
    if not present:
        raise FileNotFoundError(f"no COVID-19 Radiography Database in {root}: get it with: {DOWNLOAD}")
    frames = [_class_frame(folders[name], label, root) for label, name in enumerate(present)]
    absent = [name for name in wanted if name not in present]
    notes = (f"no images of {', '.join(absent)} in {root.name}: {len(present)} classes",) if absent else ()
    frame = pd.concat(frames, ignore_index=True)
    boxes = _read_boxes(root, present)
    return XrayTable(frame=frame, classes=present, root=root, has_patient_ids=False, boxes=boxes, notes=notes)


def class_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each class that has images below `root`. Raises ValueError where a class has two."""
    if not root.is_dir():
        return {}
    found = {name: subfolder(root, spellings) for name, spellings in CLASS_FOLDERS.items()}
    return {name: folder for name, folder in found.items() if folder is not None and _images(folder)}


def _images(folder: Path) -> list[Path]:
    inner = folder / "images"
    if not inner.is_dir():
        return image_files(folder)
    if image_files(folder):
        raise ValueError(f"{folder} has images both in images/ and beside it: put all of them into images/")
    return image_files(inner)


def _class_frame(folder: Path, label: int, root: Path) -> pd.DataFrame:
    images = _images(folder)
    masks, lesions = _by_stem(folder / "masks"), _by_stem(folder / "lesions")
    return pd.DataFrame(
        {
            "path": [str(path) for path in images],
            "patient": [path.relative_to(root).with_suffix("").as_posix() for path in images],
            "split": None,
            "label": label,
            # As objects: pandas would turn None into NaN among strings.
            "mask": pd.Series([masks.get(path.stem) for path in images], dtype=object),
            "lesion": pd.Series([lesions.get(path.stem) for path in images], dtype=object),
        }
    ).astype({"split": object})


def _by_stem(folder: Path) -> dict[str, str]:
    return {path.stem: str(path) for path in image_files(folder)} if folder.is_dir() else {}


def _read_boxes(root: Path, classes: tuple[str, ...]) -> pd.DataFrame:
    if not (root / "boxes.csv").is_file():
        return no_boxes()
    boxes = pd.read_csv(root / "boxes.csv")
    boxes = boxes[boxes["label"].isin(classes)].reset_index(drop=True)
    paths = [str(root / path) for path in boxes["path"]]
    return boxes.assign(path=paths, label=[classes.index(name) for name in boxes["label"]])
