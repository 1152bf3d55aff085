"""Small data sets in the layouts of public ones, and the folder of the real ones if there is one.

File names, folders and errors are those of the public data sets. The phantom draws the pictures, so networks can learn.
"""

import csv
import gzip
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.chestxray14 import BOX_NAMES, BOX_SIZE, FINDINGS
from datasets.phantom import CLASSES, FOLDERS, draw_phantoms, lesion_boxes

KERMANY_IMAGES = {"train": 24, "val": 2, "test": 9}  # of each kind: normal, bacterial, viral
# Findings of ChestX-ray14 -> the disease that the phantom draws for them.
DRAWN_AS = {
    "COVID-19": ("Infiltration", "Atelectasis", "Nodule", "Mass", "Emphysema"),
    "Lung Opacity": ("Consolidation", "Pneumonia", "Effusion", "Cardiomegaly", "Pleural_Thickening"),
    "Viral Pneumonia": ("Edema", "Fibrosis", "Hernia", "Pneumothorax"),
}
ROWS_WITHOUT_FILE = 5


@pytest.fixture(scope="session", name="data_root")
def data_root() -> Path:
    """Return the folder of the real data sets, from the environment variable DATA_ROOT."""
    folder = os.environ.get("DATA_ROOT")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real X-rays: DATA_ROOT is not a folder")
    return Path(folder)


@pytest.fixture(scope="session")
def kermany_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in Kermany's layout, with images of 32 px."""
    root = tmp_path_factory.mktemp("kermany")
    write_kermany(root, size=32)
    return root


@pytest.fixture(scope="session")
def chestxray14_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the layout of ChestX-ray14, with 240 images of 32 px."""
    root = tmp_path_factory.mktemp("chestxray14")
    write_chestxray14(root, size=32)
    return root


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W) uint8 picture in the format of the file's suffix; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())


def write_kermany(root: Path, *, size: int = 64, per_kind: Mapping[str, int] = KERMANY_IMAGES) -> None:
    """Write `chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}` below `root` with `per_kind` images of each kind.

    As in the source, some patients have two images, the test set numbers its patients from 1 again, names have several
    forms, no validation image is viral, and the archive contains hidden files of macOS.
    """
    top = root / "chest_xray"
    for split, number in per_kind.items():
        for kind in ("NORMAL", "bacteria", *(("virus",) if split != "val" else ())):
            disease = {"NORMAL": "Normal", "bacteria": "Lung Opacity", "virus": "Viral Pneumonia"}[kind]
            seed = 100 * list(per_kind).index(split)
            drawn = draw_phantoms([CLASSES.index(disease)] * number, seed=seed + len(kind), size=size)
            folder = top / split / ("NORMAL" if kind == "NORMAL" else "PNEUMONIA")
            first = 1000 if split == "val" else 0
            for k, picture in enumerate(drawn.images):
                write_picture(folder / _kermany_name(kind, first + k), picture)
    for left_behind in (root / "__MACOSX/chest_xray/train/NORMAL/._IM-0001-0001.jpeg", top / "train/.DS_Store"):
        left_behind.parent.mkdir(parents=True, exist_ok=True)
        left_behind.write_bytes(b"\0")
    write_picture(top / "chest_xray/train/NORMAL/IM-9999-0001.jpeg", np.zeros((size, size), np.uint8))


def _kermany_name(kind: str, k: int) -> str:
    # The second and third of every three images belong to one patient.
    patient, view = k - (k % 3 == 2), 1 + (k % 3 == 2)
    if kind != "NORMAL":
        # Every fifth patient has both bacterial and viral images.
        number = patient + (1 if kind == "bacteria" or patient % 5 == 0 else 500)
        return f"person{number}_{kind}_{2 * k}{'_1' if k == 7 else ''}.jpeg"
    stem = f"{'NORMAL2-' if patient % 2 else ''}IM-{patient + 1:04d}-0001"
    return f"{stem}.jpeg" if view == 1 else f"{stem}-{view:04d}.jpeg"


def write_chestxray14(
    root: Path,
    *,
    size: int = 64,
    images: int = 240,
    archives: bool = False,
    compressed: bool = False,
    lists: bool = True,
) -> None:
    """Write `images` pictures with their labels and boxes into `root`; `lists` adds the official lists.

    A third of the images has no finding. The others have one, or two that the phantom draws in the same way. One
    patient in four has two images. Another quarter of the patients is the official test set. Some rows of the table
    have no file. `archives` puts the files into `images_001/images` and so on; `compressed` writes the table as `.gz`.
    """
    root.mkdir(parents=True, exist_ok=True)
    names, findings, labels = _chestxray14_rows(images)
    drawn = draw_phantoms(labels, seed=14, size=size)
    boxes = []
    for k, name in enumerate(names[:images]):
        folder = f"images_{1 + k % 3:03d}/images" if archives else "images"
        write_picture(root / folder / name, drawn.images[k])
        if k % 4 == 1 and findings[k]:
            label = {new: old for old, new in BOX_NAMES.items()}.get(findings[k][0], findings[k][0])
            boxes += [(name, label, *(BOX_SIZE * side for side in box)) for box in lesion_boxes(drawn.lesion_masks[k])]
    _write_labels(root, names, findings, compressed=compressed)
    with open(root / "BBox_List_2017.csv", "w", newline="", encoding="utf-8") as file:
        file.write("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")  # as it is published
        csv.writer(file).writerows([(*box, "", "", "") for box in boxes])
    if lists:
        tests = [name for name in names if int(name[:8]) % 4 == 0]
        (root / "test_list.txt").write_text("\n".join(tests))
        (root / "train_val_list.txt").write_text("\n".join(name for name in names if name not in set(tests)))


def _chestxray14_rows(images: int) -> tuple[list[str], list[tuple[str, ...]], list[int]]:
    """Return the file name and the findings of each row, and the phantom's label for each row with a file."""
    diseases = {finding: disease for disease, group in DRAWN_AS.items() for finding in group}
    names, findings, labels, patient, follow_up = [], [], [], 0, 0
    for k in range(images + ROWS_WITHOUT_FILE):
        patient, follow_up = (patient, 1) if follow_up == 0 and patient % 4 == 3 else (patient + 1, 0)
        names.append(f"{patient:08d}_{follow_up:03d}.png")
        if k % 3 == 2:
            findings.append(())
            labels.append(CLASSES.index("Normal"))
            continue
        finding = FINDINGS[(k - k // 3) % len(FINDINGS)]
        group = DRAWN_AS[diseases[finding]]
        second = group[(group.index(finding) + 1) % len(group)]
        findings.append((finding, second) if k % 4 == 0 else (finding,))
        labels.append(CLASSES.index(diseases[finding]))
    return names, findings, labels[:images]


def _write_labels(root: Path, names: Sequence[str], findings: Sequence[Sequence[str]], *, compressed: bool) -> None:
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    lines = [
        f"{name},{'|'.join(labels) or 'No Finding'},{int(name[9:12])},{int(name[:8])},57,M,PA,2682,2749,0.143,0.143,"
        for name, labels in zip(names, findings, strict=True)
    ]
    path = root / ("Data_Entry_2017.csv.gz" if compressed else "Data_Entry_2017.csv")
    with (gzip.open if compressed else open)(path, "wt", encoding="utf-8") as file:
        file.write("\n".join([header, *lines]) + "\n")


def write_covid_radiography(root: Path, *, size: int, per_class: int) -> None:
    """Write `<Class>/{images,masks}/<Class>-<k>.png` below `COVID-19_Radiography_Dataset` in `root`.

    The masks are lung masks. Unlike `write_phantom`, this function writes no lesion masks and no boxes.
    """
    top = root / "COVID-19_Radiography_Dataset"
    for label, name in enumerate(CLASSES):
        drawn = draw_phantoms([label] * per_class, seed=label, size=size)
        for k, (picture, lungs) in enumerate(zip(drawn.images, drawn.lung_masks, strict=True), start=1):
            file = f"{FOLDERS[name]}-{k}.png"
            write_picture(top / FOLDERS[name] / "images" / file, picture)
            write_picture(top / FOLDERS[name] / "masks" / file, lungs * np.uint8(255))
