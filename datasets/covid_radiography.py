"""The COVID-19 Radiography Database (Chowdhury et al. 2020, IEEE Access 8; Rahman et al. 2021,
Comput. Biol. Med. 132): 3,616 COVID, 6,012 Lung_Opacity, 10,192 Normal, 1,345 Viral Pneumonia.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.kaggle import download_command
from datasets.table import XrayTable, image_files, image_frame, no_boxes, refuse_unknown, subfolder

# Class -> its folder; an older version of the database uses the class's name. Upper and lower case do not matter.
FOLDERS = {
    "COVID-19": "COVID",
    "Lung Opacity": "Lung_Opacity",
    "Normal": "Normal",
    "Viral Pneumonia": "Viral Pneumonia",
}
TOP_FOLDERS = ("covid-19_radiography_dataset", "covid-19 radiography database")
DOWNLOAD = download_command("tawsifurrahman/covid19-radiography-database")


def read_covid_radiography(root: Path, *, classes: Sequence[str] = ()) -> XrayTable:
    """Return the table of the database; the source has no patient ids, so each image is its own patient.

    - Present layout: `<Class>/images/*.png`, with lung masks of the same names in `<Class>/masks/`.
    - Older layout: the images lie directly in the class folder.
    - The phantom adds lesion masks in `<Class>/lesions/` and `boxes.csv` (path below `root`, label, x, y, width and
      height as fractions of the image).

    Args:
        root: the folder that holds the class folders, or its parent folder.
        classes: the classes to read, in this order (default: all four). A class without images is left out and named
            in the notes.

    Raises:
        FileNotFoundError: there is no class folder; the message has the command that gets the data.
        ValueError: a class has two folders.
    """
    wanted = tuple(classes) or tuple(FOLDERS)
    refuse_unknown(wanted, FOLDERS, "classes")
    root = (subfolder(root, TOP_FOLDERS) or root).absolute()
    folders = {name: subfolder(root, (folder.lower(), name.lower())) for name, folder in FOLDERS.items()}
    images = {name: _images(folder) for name, folder in folders.items() if folder}
    present = tuple(name for name in wanted if images.get(name))
    if not present:
        raise FileNotFoundError(f"no COVID-19 Radiography Database in {root}: get it with: {DOWNLOAD}")
    rows = []
    for label, name in enumerate(present):
        masks, lesions = (_files_by_stem(folders[name] / kind) for kind in ("masks", "lesions"))
        for path in images[name]:
            patient = path.relative_to(root).with_suffix("").as_posix()
            rows.append((str(path), patient, label, masks.get(path.stem), lesions.get(path.stem)))
    frame = image_frame(**pd.DataFrame(rows, columns=["path", "patient", "label", "mask", "lesion"], dtype=object))
    absent = [name for name in wanted if name not in present]
    notes = (f"no images of {', '.join(absent)} in {root.name}: {len(present)} classes",) if absent else ()
    boxes = _read_boxes(root, present)
    return XrayTable(frame=frame, classes=present, root=root, has_patient_ids=False, boxes=boxes, notes=notes)


def _images(folder: Path) -> list[Path]:
    beside, inside = image_files(folder), image_files(folder / "images")
    if beside and (folder / "images").is_dir():
        raise ValueError(f"{folder} has images both in images/ and beside it: put all of them into images/")
    return beside or inside


def _files_by_stem(folder: Path) -> dict[str, str]:
    return {path.stem: str(path) for path in image_files(folder)}


def _read_boxes(root: Path, classes: tuple[str, ...]) -> pd.DataFrame:
    if not (root / "boxes.csv").is_file():
        return no_boxes()
    boxes = pd.read_csv(root / "boxes.csv")
    boxes = boxes[boxes["label"].isin(classes)].reset_index(drop=True)
    return boxes.assign(path=[str(root / path) for path in boxes["path"]], label=boxes["label"].map(classes.index))
