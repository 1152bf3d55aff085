"""The readers of the public datasets, the table and its splits."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from layouts import write_chestxray14, write_covid_radiography
from PIL import Image

from datasets import XrayTable, data_fingerprint, read_dataset
from datasets.chestxray14 import FINDINGS
from datasets.phantom import FOLDERS
from datasets.splits import apply_splits, split_by_patient, splits_frame
from datasets.table import image_frame, patients_of


def draw(path: Path, *, mode: str = "L", value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), value if mode == "L" else (value,) * 3).save(path)


def invented_table(patients: list[str], labels: list[int], splits: list[str | None] | None = None) -> XrayTable:
    paths = [f"/data/{i:05d}.png" for i in range(len(patients))]
    frame = image_frame(path=paths, patient=patients, split=splits, label=labels)
    classes = tuple(f"class {i}" for i in range(max(labels) + 1))
    return XrayTable(frame=frame, classes=classes, root=Path("/data"), has_patient_ids=True)


def test_present_layout_is_read_with_its_lung_masks(phantom_root):
    table = read_dataset("covid_radiography", phantom_root)
    assert table.classes == ("COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia")
    assert table.counts()["not split"].tolist() == [11, 9, 13, 7]
    for row in table.frame.itertuples():
        assert Path(row.mask).parent.name == "masks"
        assert Path(row.mask).name == Path(row.path).name
        assert Path(row.path).parts[-3] == FOLDERS[table.classes[row.label]]


def test_boxes_enclose_the_lesions_of_their_image(phantom_root):
    table = read_dataset("covid_radiography", phantom_root)
    lesions = table.frame.set_index("path")["lesion"]
    assert set(table.boxes["path"]) <= set(lesions.index)
    assert not table.boxes["label"].eq(table.classes.index("Normal")).any()
    for box in table.boxes.itertuples():
        mask = np.asarray(Image.open(lesions[box.path])) > 0
        size = mask.shape[0]
        rows = slice(round(box.y * size), round((box.y + box.height) * size))
        columns = slice(round(box.x * size), round((box.x + box.width) * size))
        assert mask[rows, columns].any(axis=1).all()
        assert mask[rows, columns].any(axis=0).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_older_layout_with_images_in_the_class_folder_is_read(tmp_path, mode):
    for name in ("COVID-19", "NORMAL", "Viral Pneumonia"):
        for i in range(3):
            draw(tmp_path / name / f"{name} ({i}).png", mode=mode)
    table = read_dataset("covid_radiography", tmp_path)
    assert table.classes == ("COVID-19", "Normal", "Viral Pneumonia")
    assert len(table) == 9
    assert table.frame["mask"].isna().all()


def test_classes_without_images_are_left_out_and_named(tmp_path):
    draw(tmp_path / "COVID" / "images" / "COVID-1.png")
    draw(tmp_path / "Normal" / "images" / "Normal-1.png")
    (tmp_path / "Lung_Opacity" / "images").mkdir(parents=True)
    table = read_dataset("covid_radiography", tmp_path)
    assert table.classes == ("COVID-19", "Normal")
    assert "Lung Opacity, Viral Pneumonia" in table.notes[0]


def test_study_order_of_classes_is_kept(phantom_root):
    table = read_dataset("covid_radiography", phantom_root, classes=["Normal", "COVID-19"])
    assert table.classes == ("Normal", "COVID-19")
    assert table.counts()["not split"].tolist() == [13, 11]


def test_folder_of_the_download_inside_the_root_is_found(tmp_path):
    for name in ("COVID", "Normal"):
        draw(tmp_path / "COVID-19_Radiography_Dataset" / name / "images" / f"{name}-1.png")
    assert read_dataset("covid_radiography", tmp_path).relative_paths()[0] == "COVID/images/COVID-1.png"


def test_missing_root_names_the_command_that_gets_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kagglehub\.dataset_download"):
        read_dataset("covid_radiography", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("COVID/a", "covid-19/b"), "both COVID and covid-19: keep one"),
        (("COVID/images/a", "COVID-19/b"), "both COVID and COVID-19: keep one"),
        (("COVID/a", "NORMAL/b", "Normal/b"), "both NORMAL and Normal: keep one"),
        (("COVID/images/a", "COVID/b"), "images both in images/ and beside it"),
        (
            ("COVID-19_Radiography_Dataset/COVID/a", "COVID-19 Radiography Database/COVID/a"),
            "both COVID-19 Radiography Database and COVID-19_Radiography_Dataset: keep one",
        ),
    ],
)
def test_class_with_two_folders_is_refused(tmp_path, names, message):
    for name in (*names, "Lung_Opacity/c"):
        draw(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=message):
        read_dataset("covid_radiography", tmp_path)


@pytest.mark.parametrize(
    ("reader", "folders", "message"),
    [
        ("folder", ("sick", "healthy", "Sick"), "both Sick and sick: use one spelling"),
        ("folder", ("train/sick", "train/healthy", "test/Sick"), "both Sick and sick: use one spelling"),
        ("folder", ("train/sick", "Train/sick", "test/healthy"), "both Train and train: keep one"),
        ("kermany", ("train/NORMAL", "train/Normal", "test/NORMAL"), "both NORMAL and Normal: keep one"),
    ],
)
def test_two_spellings_of_a_folder_are_refused_by_every_reader(tmp_path, reader, folders, message):
    for folder in folders:
        draw(tmp_path / folder / "IM-0001-0001.jpeg")
    with pytest.raises(ValueError, match=message):
        read_dataset(reader, tmp_path)


def test_folder_tree_without_splits_is_read_as_not_split(tmp_path):
    for name, number in (("healthy", 2), ("sick", 3)):
        for i in range(number):
            draw(tmp_path / name / f"{i}.jpg")
    (tmp_path / "notes").mkdir()
    table = read_dataset("folder", tmp_path)
    assert table.classes == ("healthy", "sick")
    assert table.frame["split"].isna().all()
    assert not table.has_patient_ids


def test_splits_of_a_folder_tree_stay_and_a_missing_one_is_drawn_from_train(tmp_path):
    for split, number in (("train", 20), ("test", 4)):
        for name in ("healthy", "sick"):
            for i in range(number):
                draw(tmp_path / split / name / f"{i}.png")
    table = read_dataset("folder", tmp_path)
    divided = split_by_patient(table, val=0.1, test=0.1, seed=0)
    assert divided.counts().to_numpy().tolist() == [[18, 2, 4], [18, 2, 4]]
    test = divided.frame[divided.frame["split"] == "test"]
    assert test["path"].str.contains("/test/").all()


def test_patient_pattern_groups_the_images_of_a_patient(tmp_path):
    for i in range(12):
        draw(tmp_path / ("healthy" if i % 2 else "sick") / f"p{i // 2:02d}_view{i}.png")
    table = read_dataset("folder", tmp_path, patient_pattern=r"^(p\d+)_")
    assert table.has_patient_ids
    assert table.frame["patient"].nunique() == 6
    with pytest.raises(ValueError, match="finds no patient in the name"):
        read_dataset("folder", tmp_path, patient_pattern=r"^(q\d+)_")


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="one folder of PNG or JPEG files for each class"):
        read_dataset("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_dataset("folder", tmp_path / "nowhere")
    draw(tmp_path / "sick" / "1.png")
    with pytest.raises(ValueError, match="one class only"):
        read_dataset("folder", tmp_path)
    with pytest.raises(ValueError, match="no images of healthy"):
        read_dataset("folder", tmp_path, classes=["healthy", "sick"])


def test_patient_in_two_splits_is_refused():
    with pytest.raises(ValueError, match="'anna' in test and train"):
        invented_table(["anna", "anna", "bob"], [0, 0, 1], ["train", "test", "val"])


def test_file_listed_twice_is_refused():
    table = invented_table(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="listed twice"):
        replace(table, frame=pd.concat([table.frame, table.frame.iloc[:1].assign(patient="c")]))


def test_fractions_are_met_in_every_class_when_images_are_patients():
    labels = [0] * 500 + [1] * 300 + [2] * 40
    table = split_by_patient(invented_table([str(i) for i in range(840)], labels), val=0.1, test=0.2, seed=1)
    assert table.counts().to_numpy().tolist() == [[350, 50, 100], [210, 30, 60], [28, 4, 8]]


def test_sixty_images_a_class_are_exactly_sixty():
    labels = [0] * 500 + [1] * 200
    table = split_by_patient(invented_table([str(i) for i in range(700)], labels), val=60, test=60, seed=1)
    assert table.counts().to_numpy().tolist() == [[380, 60, 60], [80, 60, 60]]


def test_every_patient_is_in_one_split_and_sizes_are_nearly_met():
    rng = np.random.default_rng(0)
    patients = [str(patient) for patient in rng.integers(0, 200, 1000)]
    labels = [int(patient) % 3 for patient in patients]
    table = split_by_patient(invented_table(patients, labels), val=0.1, test=0.2, seed=5)
    sides = table.frame[["patient", "split"]].drop_duplicates()
    assert sides["patient"].is_unique
    shares = table.counts().div(table.counts().sum(axis=1), axis=0)
    assert (shares["val"] - 0.1).abs().max() < 0.02
    assert (shares["test"] - 0.2).abs().max() < 0.02


def test_a_patient_with_very_many_images_does_not_fill_a_small_split():
    patients = ["big"] * 40 + [f"p{i}" for i in range(60)]
    labels = [0] * 100
    others = [f"q{i}" for i in range(100)]
    for seed in range(8):
        table = invented_table(patients + others, labels + [1] * 100)
        table = split_by_patient(table, val=0.1, test=0.1, seed=seed)
        assert set(table.frame.loc[table.frame["patient"] == "big", "split"]) == {"train"}
        assert table.counts("patient").loc["class 0", ["val", "test"]].tolist() == [10, 10]


def test_split_depends_on_the_seed_and_not_on_the_order_of_rows():
    table = invented_table([str(i) for i in range(100)], [i % 2 for i in range(100)])
    mixed = replace(table, frame=table.frame.sample(frac=1, random_state=0))
    one = splits_frame(split_by_patient(table, val=0.1, test=0.1, seed=7))
    assert one.equals(splits_frame(split_by_patient(mixed, val=0.1, test=0.1, seed=7)))
    assert not one.equals(splits_frame(split_by_patient(table, val=0.1, test=0.1, seed=8)))


def test_too_few_patients_are_an_error_not_an_empty_split():
    with pytest.raises(ValueError, match="'class 1' has 2 patients"):
        split_by_patient(invented_table(list("abcdefg"), [0, 0, 0, 0, 0, 1, 1]), val=0.1, test=0.1, seed=0)
    with pytest.raises(ValueError, match="none is left to train on"):
        split_by_patient(invented_table(list("abcdefgh"), [0] * 6 + [1] * 2), val=3, test=3, seed=0)


def test_patient_counts_for_the_class_of_most_of_its_images():
    table = invented_table(["a", "a", "a", "b", "b"], [1, 1, 0, 0, 1])
    assert patients_of(table.frame).loc[["a", "b"], "label"].tolist() == [1, 0]
    assert patients_of(table.frame)["images"].tolist() == [3, 2]


def test_limit_keeps_the_shares_of_the_classes():
    labels = [0] * 600 + [1] * 300 + [2] * 100
    table = invented_table([str(i) for i in range(1000)], labels)
    assert table.limited(50, seed=0).counts()["not split"].tolist() == [30, 15, 5]
    assert "limited to 50 of 1000" in table.limited(50, seed=0).notes[-1]
    assert [len(table.limited(number, seed=0)) for number in (3, 7, 33, 999)] == [3, 7, 33, 999]


def test_limit_takes_whole_patients():
    table = invented_table([str(i // 4) for i in range(400)], [(i // 4) % 2 for i in range(400)])
    limited = table.limited(40, seed=3)
    assert limited.frame.groupby("patient").size().eq(4).all()
    assert len(limited) == 40


@pytest.mark.parametrize("classes", [("target", "sick"), ("a", "a"), ("one",)])
def test_class_names_that_clash_with_columns_of_predictions_are_refused(classes):
    table = invented_table(["a", "b"], [0, 1])
    with pytest.raises(ValueError, match=r"classes must be|one class only"):
        replace(table, frame=table.frame.iloc[: len(classes)], classes=classes)


def test_missing_mask_is_none_beside_other_masks(phantom_root, tmp_path):
    for name in ("COVID", "Normal"):
        for i in range(2):
            draw(tmp_path / name / "images" / f"{i}.png")
    draw(tmp_path / "COVID" / "masks" / "1.png")
    masks = read_dataset("covid_radiography", tmp_path).frame["mask"].tolist()
    assert masks == [None, str(tmp_path / "COVID" / "masks" / "1.png"), None, None]


def test_other_names_of_split_folders_are_read_and_two_for_one_split_are_refused(tmp_path):
    for split in ("Training", "valid", "test"):
        for name in ("healthy", "sick"):
            draw(tmp_path / split / name / "1.png")
            draw(tmp_path / split / name / "._1.png")  # macOS leaves such files
    assert read_dataset("folder", tmp_path).counts().to_numpy().tolist() == [[1, 1, 1]] * 2
    draw(tmp_path / "val" / "sick" / "2.png")
    with pytest.raises(ValueError, match="keep one"):
        read_dataset("folder", tmp_path)


def test_saved_splits_are_restored(phantom_root, tmp_path):
    table = split_by_patient(read_dataset("covid_radiography", phantom_root), val=0.2, test=0.2, seed=0)
    splits_frame(table).to_csv(tmp_path / "splits.csv", index=False)
    unsplit = read_dataset("covid_radiography", phantom_root)
    restored = splits_frame(apply_splits(unsplit, tmp_path / "splits.csv", table.classes))
    pd.testing.assert_frame_equal(restored, splits_frame(table), check_dtype=False)
    with pytest.raises(FileNotFoundError, match="run notebook 2"):
        apply_splits(unsplit, tmp_path / "none.csv", table.classes)
    with pytest.raises(ValueError, match="other classes"):
        apply_splits(unsplit, tmp_path / "splits.csv", table.classes[:2])


def test_saved_splits_keep_the_class_order_of_the_training(phantom_root, tmp_path):
    table = split_by_patient(read_dataset("covid_radiography", phantom_root), val=0.2, test=0.2, seed=0)
    splits_frame(table).to_csv(tmp_path / "splits.csv", index=False)
    turned = read_dataset("covid_radiography", phantom_root, classes=table.classes[::-1])
    restored = apply_splits(turned, tmp_path / "splits.csv", table.classes)
    assert restored.classes == table.classes
    labels = table.frame.set_index("path")["label"]
    assert (restored.frame["label"].to_numpy() == labels[restored.frame["path"]].to_numpy()).all()
    boxes = restored.boxes.sort_values(["path", "x"])["label"].tolist()
    assert boxes == table.boxes.sort_values(["path", "x"])["label"].tolist()


def test_fingerprint_changes_with_labels_splits_and_files(phantom_root):
    table = read_dataset("covid_radiography", phantom_root)
    divided = split_by_patient(table, val=0.2, test=0.2, seed=0)
    fewer = replace(divided, frame=divided.frame.iloc[1:])
    relabelled = replace(divided, frame=divided.frame.assign(label=divided.frame["label"].to_numpy()[::-1]))
    prints = [data_fingerprint(t) for t in (table, divided, fewer, relabelled)]
    assert len(set(prints)) == 4
    assert data_fingerprint(divided) == prints[1]


# --- Kermany et al. ---------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def touch_kermany(root: Path) -> Path:
    """Write empty files with all forms of names in the source; `KERMANY_PATIENTS` has their patients."""
    top = root / "chest_xray"
    touch(top / "train/NORMAL", "IM-0115-0001.jpeg", "IM-0117-0001-0002.jpeg", "NORMAL2-IM-0117-0001.jpeg")
    touch(top / "train/PNEUMONIA", "person1_bacteria_1.jpeg", "person1_virus_6.jpeg", "person447_virus_921_1.jpeg")
    touch(top / "val/NORMAL", "NORMAL2-IM-1427-0001.jpeg")
    touch(top / "val/PNEUMONIA", "person1946_bacteria_4874.jpeg")
    touch(top / "test/NORMAL", "IM-0001-0001.jpeg", "NORMAL2-IM-0381-0001.jpeg")
    touch(top / "test/PNEUMONIA", "person1_virus_6.jpeg", "person100_bacteria_475.jpeg")
    return top


KERMANY_PATIENTS = {
    "train/NORMAL/IM-0115-0001.jpeg": "train/IM-0115",
    "train/NORMAL/IM-0117-0001-0002.jpeg": "train/IM-0117",
    "train/NORMAL/NORMAL2-IM-0117-0001.jpeg": "train/NORMAL2-IM-0117",
    "train/PNEUMONIA/person1_bacteria_1.jpeg": "train/person1",
    "train/PNEUMONIA/person1_virus_6.jpeg": "train/person1",
    "train/PNEUMONIA/person447_virus_921_1.jpeg": "train/person447",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg": "train/NORMAL2-IM-1427",
    "val/PNEUMONIA/person1946_bacteria_4874.jpeg": "train/person1946",
    "test/NORMAL/IM-0001-0001.jpeg": "test/IM-0001",
    "test/NORMAL/NORMAL2-IM-0381-0001.jpeg": "test/NORMAL2-IM-0381",
    "test/PNEUMONIA/person1_virus_6.jpeg": "test/person1",
    "test/PNEUMONIA/person100_bacteria_475.jpeg": "test/person100",
}


def test_kermany_patients_are_read_from_names_and_numbered_anew_in_the_test_set(tmp_path):
    table = read_dataset("kermany", touch_kermany(tmp_path))
    assert dict(zip(table.relative_paths(), table.frame["patient"], strict=True)) == KERMANY_PATIENTS
    assert table.has_patient_ids
    assert "1 patient numbers occur in both train and test" in " ".join(table.notes)
    assert "2 official validation images count as train" in " ".join(table.notes)


def test_kermany_kinds_become_the_classes_that_are_chosen(tmp_path):
    root = touch_kermany(tmp_path)
    assert read_dataset("kermany", root).counts().to_dict("index") == {
        "Normal": {"train": 4, "test": 2},
        "Pneumonia": {"train": 4, "test": 2},
    }
    two = read_dataset("kermany", root, classes=["Viral", "Bacterial"])
    assert two.counts().to_dict("index") == {"Viral": {"train": 2, "test": 1}, "Bacterial": {"train": 2, "test": 1}}
    assert "6 images that are not Viral or Bacterial are left out" in two.notes
    assert len(read_dataset("kermany", root, classes=["Normal", "Viral", "Bacterial"])) == 12


def test_kermany_classes_that_share_images_or_are_unknown_are_refused(tmp_path):
    root = touch_kermany(tmp_path)
    with pytest.raises(ValueError, match="Normal, Pneumonia, Viral share images"):
        read_dataset("kermany", root, classes=["Normal", "Pneumonia", "Viral"])
    with pytest.raises(ValueError, match=r"unknown classes \['Covid'\]: choose from Normal"):
        read_dataset("kermany", root, classes=["Normal", "Covid"])


def test_kermany_is_found_from_the_parent_folder_without_leftovers_of_archives(kermany_root):
    above, inside = (read_dataset("kermany", root) for root in (kermany_root, kermany_root / "chest_xray"))
    assert above.relative_paths().tolist() == inside.relative_paths().tolist()
    assert above.counts().to_numpy().tolist() == [[26, 9], [50, 18]]
    assert not above.frame["path"].str.contains("MACOSX|IM-9999").any()


def test_kermany_validation_is_drawn_from_train_by_patient(kermany_root):
    table = split_by_patient(read_dataset("kermany", kermany_root), val=0.2, test=0.2, seed=0)
    assert table.counts()["test"].tolist() == [9, 18]
    assert table.counts()["val"].tolist() == pytest.approx([0.2 * 26, 0.2 * 50], abs=1.5)


def test_kermany_names_without_patient_and_missing_data_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="paultimothymooney/chest-xray-pneumonia"):
        read_dataset("kermany", tmp_path)
    root = touch_kermany(tmp_path)
    touch(root / "train/PNEUMONIA", "scan7.jpeg")
    with pytest.raises(ValueError, match=r"scan7.jpeg has no patient or kind"):
        read_dataset("kermany", root)


def test_real_kermany_has_the_official_numbers(data_root):
    table = read_dataset("kermany", data_root)
    assert table.counts().to_dict("index") == {
        "Normal": {"train": 1349, "test": 234},
        "Pneumonia": {"train": 3883, "test": 390},
    }
    assert "170 patient numbers occur in both train and test" in " ".join(table.notes)
    two = read_dataset("kermany", data_root / "chest_xray", classes=["Bacterial", "Viral"])
    assert two.counts()["test"].tolist() == [242, 148]
    assert two.counts()["train"].tolist() == [2538, 1345]


# --- ChestX-ray14 -----------------------------------------------------------------------------------------


def published(root: Path) -> pd.DataFrame:
    """Return the table of labels on disk, indexed by file name."""
    return pd.read_csv(next(root.glob("Data_Entry_2017*"))).set_index("Image Index")


def test_findings_are_those_of_the_published_table(chestxray14_root):
    table = read_dataset("chestxray14", chestxray14_root)
    assert table.multilabel
    assert table.classes == FINDINGS
    assert len(FINDINGS) == 14
    names = table.frame["path"].map(lambda path: Path(path).name)
    rows = published(chestxray14_root).loc[names]
    expected = rows["Finding Labels"].str.get_dummies("|")[list(FINDINGS)]
    assert table.frame[list(FINDINGS)].to_numpy().tolist() == expected.to_numpy().tolist()
    assert table.frame["patient"].astype(int).tolist() == rows["Patient ID"].tolist()
    assert table.frame["split"].isna().all()


def test_rows_without_a_file_are_counted_and_left_out(chestxray14_root):
    table = read_dataset("chestxray14", chestxray14_root)
    assert len(table) == 240
    assert table.notes == ("5 of 245 listed images have no file and are left out",)
    assert table.frame["path"].map(lambda path: Path(path).is_file()).all()


def test_archives_and_a_compressed_table_are_read_alike(tmp_path):
    write_chestxray14(tmp_path / "plain", size=32, images=40)
    write_chestxray14(tmp_path / "packed", size=32, images=40, archives=True, compressed=True)
    plain, packed = (read_dataset("chestxray14", tmp_path / name) for name in ("plain", "packed"))
    columns = ["patient", "label", *FINDINGS]
    pd.testing.assert_frame_equal(plain.frame[columns], packed.frame[columns])
    assert {path.split("/")[0] for path in packed.relative_paths()} == {"images_001", "images_002", "images_003"}
    pd.testing.assert_frame_equal(plain.boxes.drop(columns="path"), packed.boxes.drop(columns="path"))


def test_chosen_findings_are_columns_in_their_order_and_others_count_as_no_finding(chestxray14_root):
    table = read_dataset("chestxray14", chestxray14_root, classes=["Mass", "Edema"])
    everything = read_dataset("chestxray14", chestxray14_root)
    assert table.classes == ("Mass", "Edema")
    assert table.frame[["Mass", "Edema"]].equals(everything.frame[["Mass", "Edema"]])
    neither = int((everything.frame[["Mass", "Edema"]].sum(axis=1) == 0).sum())
    without = int((everything.frame[list(FINDINGS)].sum(axis=1) == 0).sum())
    assert f"{neither - without} images have other findings only" in table.notes[-1]
    assert set(table.boxes["label"]) == {0, 1}
    with pytest.raises(ValueError, match=r"unknown findings \['Cough'\]"):
        read_dataset("chestxray14", chestxray14_root, classes=["Cough", "Mass"])


def test_official_lists_make_train_and_test(chestxray14_root, tmp_path):
    table = read_dataset("chestxray14", chestxray14_root, official_split=True)
    listed = set((chestxray14_root / "test_list.txt").read_text().split())
    names = table.frame["path"].map(lambda path: Path(path).name)
    assert (names.isin(listed) == (table.frame["split"] == "test")).all()
    assert set(table.frame["split"]) == {"train", "test"}
    assert (table.counts() >= 2).all(axis=None)
    write_chestxray14(tmp_path, size=32, images=30, lists=False)
    with pytest.raises(FileNotFoundError, match="set official_split = false"):
        read_dataset("chestxray14", tmp_path, official_split=True)
    (tmp_path / "train_val_list.txt").write_text(published(tmp_path).index[0])
    (tmp_path / "test_list.txt").write_text("")
    with pytest.raises(ValueError, match="29 images are in neither"):
        read_dataset("chestxray14", tmp_path, official_split=True)


def test_boxes_are_fractions_whatever_the_size_of_the_files(chestxray14_root):
    table = read_dataset("chestxray14", chestxray14_root)
    written = pd.read_csv(chestxray14_root / "BBox_List_2017.csv", header=None, skiprows=1)
    assert "Infiltrate" in set(written[1])
    assert len(table.boxes) == len(written)
    assert table.boxes[["x", "y", "width", "height"]].to_numpy() == pytest.approx(
        written[[2, 3, 4, 5]].to_numpy() / 1024
    )
    labels = table.boxes["label"].map(dict(enumerate(FINDINGS)))
    assert labels.tolist() == written[1].replace("Infiltrate", "Infiltration").tolist()
    findings = table.frame.set_index("path")
    assert all(findings.loc[path, name] == 1 for path, name in zip(table.boxes["path"], labels, strict=True))


@pytest.mark.parametrize(
    "header", ["Image Index,Finding Label,Bbox [x,y,w,h],,,\n", "Image Index,Finding Label,Bbox [x,y,w,h]\n", ""]
)
@pytest.mark.parametrize("end", ["", ",,,"])
def test_every_known_form_of_the_list_of_boxes_is_read(tmp_path, header, end):
    write_chestxray14(tmp_path, size=32, images=6)
    name = published(tmp_path).index[0]
    rows = f"{name},Infiltrate,256,512,128,64{end}\n{name},Mass,0,0,1024,512{end}\n"
    (tmp_path / "BBox_List_2017.csv").write_text(header + rows)
    boxes = read_dataset("chestxray14", tmp_path).boxes
    assert boxes.drop(columns="path").to_numpy().tolist() == [
        [FINDINGS.index("Infiltration"), 0.25, 0.5, 0.125, 0.0625],
        [FINDINGS.index("Mass"), 0, 0, 1, 0.5],
    ]


@pytest.mark.parametrize("row", ["256,512,128,", "256,left,128,64"])
def test_box_that_is_not_four_numbers_is_named(tmp_path, row):
    write_chestxray14(tmp_path, size=32, images=6)
    name = published(tmp_path).index[0]
    with (tmp_path / "BBox_List_2017.csv").open("a") as file:
        file.write(f"{name},Mass,{row}\n")
    with pytest.raises(ValueError, match=f"a box that is not four numbers, for example {name}"):
        read_dataset("chestxray14", tmp_path)


@pytest.mark.parametrize("empty", ["", "NA"])
def test_image_without_a_label_is_refused(tmp_path, empty):
    write_chestxray14(tmp_path, size=32, images=6)
    path = tmp_path / "Data_Entry_2017.csv"
    header, first, second, *rest = path.read_text().splitlines()
    name, _, *others = second.split(",")
    path.write_text("\n".join([header, first, ",".join([name, empty, *others]), *rest]))
    message = f"1 images have no label in the table, for example {name}: .*write No Finding"
    with pytest.raises(ValueError, match=message):
        read_dataset("chestxray14", tmp_path)
    (tmp_path / "images" / name).unlink()  # a row without a file is left out, whatever its label is
    assert len(read_dataset("chestxray14", tmp_path)) == 5


def test_errors_in_the_published_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nih-chest-xrays/data"):
        read_dataset("chestxray14", tmp_path)
    write_chestxray14(tmp_path, size=32, images=6)
    path = tmp_path / "Data_Entry_2017.csv"
    text = path.read_text()
    path.write_text(text.replace("|", "|Cough|", 1))
    with pytest.raises(ValueError, match=r"unknown findings in the table of labels \['Cough'\]"):
        read_dataset("chestxray14", tmp_path)
    path.write_text(text.replace(".png,", "_.png,").replace("00000002_", "00000012_"))
    with pytest.raises(ValueError, match=r"1 images in .* another patient id .*, for example 00000012_000_.png"):
        read_dataset("chestxray14", tmp_path)
    path.write_text(text.replace(".png,", "_.png,"))
    with pytest.raises(FileNotFoundError, match="no images of ChestX-ray14"):
        read_dataset("chestxray14", tmp_path)


def test_real_chestxray14_is_read_with_its_boxes(data_root):
    table = read_dataset("chestxray14", data_root / "ChestX-ray14")
    assert len(table) == 892
    assert table.notes == ("111228 of 112120 listed images have no file and are left out",)
    assert table.boxes["path"].nunique() == 20
    # The boxes refer to 1024 px, the files have fewer.
    shape = cv2.imread(table.boxes["path"].iloc[0], cv2.IMREAD_GRAYSCALE).shape
    assert shape == (320, 320)
    assert table.boxes[["x", "y"]].ge(0).all(axis=None)
    assert (table.boxes["x"] + table.boxes["width"]).le(1).all()
    assert (table.boxes["y"] + table.boxes["height"]).le(1).all()


# --- the COVID-19 Radiography Database ---------------------------------------------------------------------


def test_public_layout_without_lesion_masks_and_boxes_is_read(tmp_path):
    write_covid_radiography(tmp_path, size=32, per_class=3)
    table = read_dataset("covid_radiography", tmp_path)
    assert table.counts()["not split"].tolist() == [3, 3, 3, 3]
    assert table.frame["mask"].notna().all()
    assert table.frame["lesion"].isna().all()
    assert table.boxes.empty


def test_real_covid_images_are_read(data_root):
    table = read_dataset("covid_radiography", data_root)
    assert table.counts()["not split"].to_dict() == {"COVID-19": 500, "Normal": 700}
