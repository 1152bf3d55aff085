"""Multi-label tables, splits, folds, thinning, and merged sources."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from layouts import write_chestxray14, write_covid_radiography, write_kermany

from datasets import SPLITS, XrayTable, data_fingerprint, read_dataset
from datasets.splits import apply_splits, boxes_held_out, split_by_patient, split_into_folds, splits_frame, thinned
from datasets.table import (
    first_patients,
    image_frame,
    merged,
    patients_of,
    rarest_findings,
    relabelled,
    relative_paths,
    target_names,
)

FINDINGS = ("Effusion", "Mass", "Edema")


def several(findings: list[str], patients: list[str] | None = None, splits: list[str] | None = None) -> XrayTable:
    """Return a multi-label table of images with findings such as "Effusion|Mass"; by default an image is a patient."""
    columns = pd.DataFrame({name: [int(name in text.split("|")) for text in findings] for name in FINDINGS})
    frame = image_frame(
        path=[f"/data/{i:05d}.png" for i in range(len(findings))],
        patient=patients or [f"p{i:05d}" for i in range(len(findings))],
        split=splits,
        label=rarest_findings(columns),
    )
    frame = pd.concat([frame, columns.astype("uint8")], axis=1)
    return XrayTable(frame=frame, classes=FINDINGS, root=Path("/data"), has_patient_ids=True, multilabel=True)


def single(labels: list[int], patients: list[str] | None = None, splits: list[str] | None = None) -> XrayTable:
    """Return a single-label table of classes "class 0" and so on; by default each image is a patient."""
    frame = image_frame(
        path=[f"/data/one/{i:05d}.png" for i in range(len(labels))],
        patient=patients or [f"p{i:05d}" for i in range(len(labels))],
        split=splits,
        label=labels,
    )
    classes = tuple(f"class {i}" for i in range(max(1, *labels) + 1))
    return XrayTable(frame=frame, classes=classes, root=Path("/data/one"), has_patient_ids=True)


@pytest.fixture(scope="module")
def nih(chestxray14_root: Path) -> XrayTable:
    return read_dataset("chestxray14", chestxray14_root)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, XrayTable]:
    """Return small copies of Kermany's data and of the COVID-19 Radiography Database; only the latter has COVID-19."""
    root = tmp_path_factory.mktemp("sources")
    write_kermany(root, size=32, per_kind={"train": 6, "val": 1, "test": 3})
    write_covid_radiography(root, size=32, per_class=5)
    covid = read_dataset("covid_radiography", root, classes=["COVID-19", "Normal", "Viral Pneumonia"])
    return {"kermany": read_dataset("kermany", root), "covid": relabelled(covid, {"Viral Pneumonia": "Pneumonia"})}


# --- several findings an image ----------------------------------------------------------------------------


def test_label_of_an_image_is_its_rarest_finding():
    table = several(["Effusion", "Effusion|Mass", "", "Effusion|Edema|Mass", "Effusion"])
    assert table.frame["label"].tolist() == [0, 1, 3, 2, 0]
    assert rarest_findings(pd.DataFrame({"a": [1, 1, 1, 0], "b": [1, 0, 0, 1]})).tolist() == [1, 0, 0, 1]


def test_counts_have_a_row_for_each_finding_and_one_for_no_finding():
    texts = ["Effusion", "Effusion|Mass", "", "Edema", ""]
    table = several(texts, ["a", "a", "a", "b", "b"], ["train"] * 3 + ["test"] * 2)
    assert table.counts().index.tolist() == [*FINDINGS, "No finding"]
    assert table.counts().to_numpy().tolist() == [[2, 0], [1, 0], [0, 1], [1, 1]]
    assert table.counts().columns.tolist() == ["train", "test"]
    assert table.counts("patient").to_numpy().tolist() == [[1, 0], [1, 0], [0, 1], [1, 1]]
    assert several(texts).counts().columns.tolist() == ["not split"]


def test_targets_are_indices_or_rows_of_findings_in_the_order_of_the_subset():
    table = several(["Mass", "", "Edema|Effusion"], splits=["test", "train", "test"])
    assert table.targets("test").dtype == np.uint8
    assert table.targets("test").tolist() == [[0, 1, 0], [1, 0, 1]]
    assert target_names(table, "test") == ["Mass", "Effusion|Edema"]
    assert target_names(table) == ["Mass", "No Finding", "Effusion|Edema"]
    one = single([1, 0, 1], splits=["test", "train", "test"])
    assert one.targets("test").dtype == np.int64
    assert one.targets("test").tolist() == [1, 1]
    assert target_names(one, "train") == ["class 0"]


def test_columns_that_cannot_be_findings_are_refused():
    table = several(["Mass", "", "Edema"])
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        replace(table, frame=table.frame.assign(Mass=[0, 2, 1]))
    for name in ("mask", "No Finding", "Effusion|Mass"):
        frame = table.frame.assign(**{name: 0})
        with pytest.raises(ValueError, match=r"not called|must not contain \|"):
            replace(table, frame=frame, classes=(*FINDINGS, name))


def test_fingerprint_of_findings_changes_with_any_of_them(nih):
    changed = nih.frame.assign(Mass=1 - nih.frame["Mass"])
    assert len({data_fingerprint(table) for table in (nih, replace(nih, frame=changed))}) == 2


def test_paths_are_relative_to_the_root_alone():
    root = Path("/data/set")
    assert relative_paths(["/data/set/a/1.png"], root).tolist() == ["a/1.png"]
    assert relative_paths(["/data/1.png"], Path("/")).tolist() == ["data/1.png"]
    with pytest.raises(ValueError, match="does not lie in"):
        relative_paths(["/data/set2/1.png"], root)


# --- splits of several findings ---------------------------------------------------------------------------


def test_patient_of_many_images_counts_for_its_rarest_finding():
    table = several(["Effusion"] * 6 + ["Edema", "", ""], ["a"] * 3 + ["b"] * 4 + ["c"] * 2)
    patients = patients_of(table.frame, no_finding=3)
    assert patients["label"].tolist() == [0, 2, 3]
    assert patients["images"].tolist() == [3, 4, 2]


def test_every_split_has_every_finding_that_is_frequent_enough():
    rng = np.random.default_rng(0)
    texts = ["|".join(np.array(FINDINGS)[rng.random(3) < (0.3, 0.2, 0.06)]) for _ in range(1500)]
    patients = [f"p{number:04d}" for number in rng.integers(0, 400, 1500)]
    table = split_by_patient(several(texts, patients), val=0.1, test=0.2, seed=3)
    assert table.frame.groupby("patient")["split"].nunique().eq(1).all()
    shares = table.counts().div(table.counts().sum(axis=1), axis=0)
    assert (shares["val"] - 0.1).abs().max() < 0.03
    assert (shares["test"] - 0.2).abs().max() < 0.03


def heavy_tailed(number: int) -> pd.Series:
    """Return the numbers of images of `number` patients: most have few, some have many."""
    sizes = np.ceil(np.random.default_rng(5).lognormal(1, 1.1, number)).astype(int)
    return pd.Series(sizes, index=[f"p{i:03d}" for i in range(number)])


def test_patients_of_a_split_have_on_average_as_many_images_as_others():
    images = heavy_tailed(40)
    table = single([0] * int(images.sum()), patients=list(images.index.repeat(images)))
    sums = pd.DataFrame(0, index=["images", "patients"], columns=SPLITS)
    for seed in range(40):
        divided = split_by_patient(table, val=0.2, test=0.2, seed=seed).frame.groupby("split")["patient"]
        sums.loc["images"] += divided.size()
        sums.loc["patients"] += divided.nunique()
        # At most half a patient, and the rounding of the target to whole images.
        assert (divided.size()[["val", "test"]] - 0.2 * len(table)).abs().max() <= images.max() / 2 + 0.5
    mean = sums.loc["images"] / sums.loc["patients"]
    # Not exactly equal: a patient is left out if less than half of its images fit.
    assert (mean / images.mean() - 1).abs().max() < 0.05


@pytest.mark.parametrize("sizes", [[90, 5, 5], [1, 1, 40], [30, 30, 30], [1, 2, 3, 100]])
def test_few_patients_of_very_different_sizes_still_fill_every_split(sizes):
    table = single([0] * sum(sizes), patients=[f"p{i}" for i, size in enumerate(sizes) for _ in range(size)])
    for seed in range(20):
        assert set(split_by_patient(table, val=0.1, test=0.2, seed=seed).frame["split"]) == set(SPLITS)


def test_first_patients_come_nearest_to_the_target_number_of_images():
    assert first_patients(pd.Series(1, index=list("dcab")), 3) == ["d", "c", "a"]
    images = pd.Series({"a": 3, "b": 4, "c": 1, "d": 50})
    assert [first_patients(images, target) for target in (4, 5, 6, 8)] == [["a"], ["a"], ["a", "b"], ["a", "b", "c"]]
    assert first_patients(images[["d", "a", "c"]], 4) == ["a", "c"]
    assert first_patients(images[["d", "b"]], 1) == ["b"]


def test_finding_too_rare_for_all_splits_is_left_to_train():
    table = split_by_patient(several(["Edema"] * 2 + ["Mass"] * 20 + [""] * 20), val=0.1, test=0.1, seed=0)
    assert table.counts().loc["Edema"].tolist() == [2, 0, 0]
    assert table.counts().loc["Mass"].tolist() == [16, 2, 2]
    sized = split_by_patient(several(["Edema"] * 6 + ["Mass"] * 20), val=3, test=3, seed=0)
    assert sized.counts().loc[["Edema", "Mass"]].to_numpy().tolist() == [[6, 0, 0], [14, 3, 3]]


def test_saved_splits_of_findings_are_restored_in_the_order_of_the_training(nih, tmp_path):
    divided = split_by_patient(nih, val=0.1, test=0.2, seed=0)
    saved = tmp_path / "splits.csv"
    splits_frame(divided).to_csv(saved, index=False)
    assert "No Finding" in set(pd.read_csv(saved)["label"])
    turned = apply_splits(nih, saved, nih.classes[::-1])
    assert turned.classes == nih.classes[::-1]
    splits = [table.frame.set_index("path")["split"].sort_index() for table in (divided, turned)]
    assert splits[0].equals(splits[1])
    assert (turned.targets("val").sum(axis=0)[::-1] == divided.targets("val").sum(axis=0)).all()
    names = [table.boxes["label"].map(dict(enumerate(table.classes))).tolist() for table in (nih, turned)]
    assert names[0] == names[1]
    for label, rows in turned.frame.groupby("label"):
        assert label == 14 or rows[turned.classes[label]].eq(1).all()


def test_all_images_of_patients_with_a_box_move_to_test(nih):
    divided = split_by_patient(nih, val=0.1, test=0.2, seed=0)
    before = divided.frame.set_index("path")["split"]
    after = boxes_held_out(divided).frame.set_index("path")["split"]
    boxed = set(nih.frame.loc[nih.frame["path"].isin(nih.boxes["path"]), "patient"])
    of_boxed_patients = nih.frame.set_index("path")["patient"].isin(boxed)
    assert set(before[of_boxed_patients]) == {"train", "val", "test"}  # some of them must move
    assert (after[of_boxed_patients] == "test").all()
    assert after[~of_boxed_patients].equals(before[~of_boxed_patients])


def test_saved_splits_of_other_findings_are_refused(nih, tmp_path):
    saved = tmp_path / "splits.csv"
    splits_frame(split_by_patient(nih, val=0.1, test=0.2, seed=0)).to_csv(saved, index=False)
    with pytest.raises(ValueError, match="other findings than"):
        apply_splits(nih, saved, (*nih.classes, "Cough"))
    changed = replace(nih, frame=nih.frame.assign(Mass=0))
    number = int(nih.frame["Mass"].sum())
    with pytest.raises(ValueError, match=f"{number} images of .* have other labels now"):
        apply_splits(changed, saved, nih.classes)


# --- a limited table --------------------------------------------------------------------------------------


def test_limit_keeps_the_shares_of_the_official_splits():
    labels = ([0] * 600 + [1] * 300) * 2
    table = single(labels, splits=["train"] * 900 + ["test"] * 900)
    assert table.limited(60, seed=0).counts().to_numpy().tolist() == [[20, 20], [10, 10]]
    rare = single([0] * 980 + [1] * 20, splits=["train"] * 490 + ["test"] * 490 + ["train", "test"] * 10)
    assert (rare.limited(20, seed=1).counts() >= 1).all(axis=None)
    with pytest.raises(ValueError, match="too few for 4 classes and splits"):
        rare.limited(3, seed=0)


def test_limit_is_nearly_met_when_patients_have_many_images():
    rng = np.random.default_rng(0)
    patients = [f"p{number:03d}" for number in np.repeat(np.arange(300), rng.integers(1, 30, 300))]
    texts = ["|".join(np.array(FINDINGS)[rng.random(3) < 0.1]) for _ in patients]
    table = several(texts, patients)
    sizes = [len(table.limited(100, seed=seed)) for seed in range(20)]
    assert np.mean(sizes) == pytest.approx(100, abs=5)
    assert np.abs(np.array(sizes) - 100).max() <= 4 * 29 / 2  # half a patient in each of four strata
    limited = table.limited(100, seed=0)
    of_limited_patients = table.frame["patient"].isin(limited.frame["patient"])
    assert of_limited_patients.sum() == len(limited)


def test_limit_may_lose_findings_but_never_fails(nih):
    for number in (1, 5, 14, 64):
        assert 1 <= len(nih.limited(number, seed=0)) <= max(number, 3)
    limited = split_by_patient(nih.limited(64, seed=0), val=0.2, test=0.2, seed=0)
    assert all(len(limited.subset(split)) >= 5 for split in SPLITS)
    assert set(limited.boxes["path"]) <= set(limited.frame["path"])


# --- folds ------------------------------------------------------------------------------------------------


def folds_of(table: XrayTable, number: int, **options) -> list[XrayTable]:
    return [split_into_folds(table, folds=number, fold=k, seed=4, **options) for k in range(1, number + 1)]


@pytest.mark.parametrize("number", [2, 5])
def test_every_image_is_validated_once_and_the_test_is_always_the_same(number):
    rng = np.random.default_rng(1)
    patients = [f"p{i:03d}" for i in rng.integers(0, 150, 600)]
    table = single([int(patient[1:]) % 3 for patient in patients], patients)
    parts = folds_of(table, number, test=0.2)
    tests = [set(part.subset("test")["path"]) for part in parts]
    assert all(one == other for one, other in pairwise(tests))
    validated = pd.concat([part.subset("val")["path"] for part in parts])
    assert validated.is_unique
    assert set(validated) | tests[0] == set(table.frame["path"])
    for part in parts:
        assert part.frame.groupby("patient")["split"].nunique().eq(1).all()
    sizes = np.array([part.counts()["val"].to_numpy() for part in parts])
    largest = table.frame.groupby("patient").size().max()
    assert (np.ptp(sizes, axis=0) <= largest).all()


def test_folds_of_single_images_differ_by_one_image_at_most():
    table = single([0] * 103 + [1] * 52)
    sizes = np.array([part.counts()["val"].to_numpy() for part in folds_of(table, 5, test=0.1)])
    assert np.ptp(sizes, axis=0).max() <= 1
    assert np.ptp(sizes.sum(axis=1)) <= 1


def test_folds_have_the_test_images_of_an_ordinary_split():
    table = single([0] * 60 + [1] * 60)
    plain = split_by_patient(table, val=0.1, test=0.2, seed=4)
    folded = folds_of(table, 3, test=0.2)[0]
    assert set(plain.subset("test")["path"]) == set(folded.subset("test")["path"])


def test_folds_keep_the_official_test_images_and_divide_the_official_validation():
    table = single([0, 1] * 30, splits=["train"] * 36 + ["val"] * 8 + ["test"] * 16)
    parts = folds_of(table, 4, test=0.2)
    for part in parts:
        assert part.subset("test")["path"].tolist() == table.subset("test")["path"].tolist()
    validated = pd.concat([part.subset("val")["path"] for part in parts])
    assert set(table.subset("val")["path"]) <= set(validated)
    assert len(validated) == 44


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows(nih):
    mixed = replace(nih, frame=nih.frame.sample(frac=1, random_state=0))
    one, same = (splits_frame(split_into_folds(t, folds=3, fold=2, test=0.2, seed=1)) for t in (nih, mixed))
    assert one.equals(same)
    assert not one.equals(splits_frame(split_into_folds(nih, folds=3, fold=2, test=0.2, seed=2)))


def test_more_folds_than_patients_of_a_class_are_refused():
    table = single([0] * 20 + [1] * 6)
    with pytest.raises(ValueError, match=r"'class 1' has 5 patients to train on: take 5 folds at most"):
        split_into_folds(table, folds=6, fold=1, test=1, seed=0)


def test_every_fold_has_every_finding(nih):
    sizes = np.array([part.counts()["val"].to_numpy() for part in folds_of(nih, 3, test=0.2)])
    assert (sizes >= 1).all()


# --- thinning ---------------------------------------------------------------------------------------------


def test_only_training_images_without_a_finding_are_thinned():
    texts = (["Mass"] * 3 + [""] * 7) * 30
    table = split_by_patient(several(texts), val=0.2, test=0.2, seed=0)
    thin = thinned(table, keep=0.25, seed=0)
    healthy = int(table.counts().loc["No finding", "train"])
    before, after = table.counts(), thin.counts()
    assert after.loc["No finding", "train"] == round(0.25 * healthy)
    assert after.loc[list(FINDINGS)].equals(before.loc[list(FINDINGS)])
    assert after[["val", "test"]].equals(before[["val", "test"]])
    assert f"{round(0.25 * healthy)} of {healthy} training images" in thin.notes[-1]


def test_thinning_depends_on_the_seed_and_not_on_the_order_of_rows():
    table = split_by_patient(several((["Mass"] + [""] * 4) * 20), val=0.2, test=0.2, seed=0)
    mixed = replace(table, frame=table.frame.sample(frac=1, random_state=0))
    paths = [set(thinned(t, keep=0.5, seed=s).frame["path"]) for t, s in ((table, 0), (mixed, 0), (table, 1))]
    assert paths[0] == paths[1] != paths[2]
    assert len(thinned(table, keep=1.0, seed=0)) == len(table)


def test_thinning_a_single_label_table_is_refused():
    with pytest.raises(ValueError, match="only multi-label"):
        thinned(single([0, 1]), keep=0.5, seed=0)


def test_thinned_splits_are_restored_from_the_whole_table(nih, tmp_path):
    thin = thinned(split_by_patient(nih, val=0.1, test=0.2, seed=0), keep=0.3, seed=0)
    splits_frame(thin).to_csv(tmp_path / "splits.csv", index=False)
    restored = apply_splits(nih, tmp_path / "splits.csv", nih.classes)
    assert restored.counts().equals(thin.counts())
    assert data_fingerprint(restored) == data_fingerprint(thin)


# --- other names for classes, several sources -------------------------------------------------------------


def test_classes_with_the_same_new_name_become_one():
    table = single([0, 1, 2, 3, 2])
    new = relabelled(table, {"class 1": "sick", "class 3": "sick"})
    assert new.classes == ("class 0", "sick", "class 2")
    assert new.frame["label"].tolist() == [0, 1, 2, 1, 2]
    with pytest.raises(ValueError, match=r"unknown classes \['Sick'\]: choose from class 0"):
        relabelled(table, {"Sick": "sick"})
    with pytest.raises(ValueError, match="one class only"):
        relabelled(single([0, 1]), {"class 1": "class 0"})
    with pytest.raises(ValueError, match="choose findings"):
        relabelled(several(["Mass", "Edema"]), {})


def test_boxes_follow_their_class_to_its_new_index(phantom_root):
    table = read_dataset("covid_radiography", phantom_root)
    new = relabelled(table, {"COVID-19": "Opaque", "Lung Opacity": "Opaque"})
    expected = table.boxes["label"].map(dict(enumerate(table.classes)))
    names = new.boxes["label"].map(dict(enumerate(new.classes)))
    assert names.tolist() == expected.replace({"COVID-19": "Opaque", "Lung Opacity": "Opaque"}).tolist()


def test_merged_sources_have_all_classes_and_separate_patients(sources):
    table = merged(sources)
    assert table.classes == ("Normal", "Pneumonia", "COVID-19")
    assert len(table) == sum(len(source) for source in sources.values())
    separate = [dict(zip(t.frame["path"], target_names(t), strict=True)) for t in sources.values()]
    assert dict(zip(table.frame["path"], target_names(table), strict=True)) == separate[0] | separate[1]
    assert set(table.frame["patient"].str.split("/").str[0]) == {"kermany", "covid"}
    assert not table.has_patient_ids  # one of the two sources has none
    assert table.relative_paths().str.split("/").str[0].nunique() == 2
    assert "COVID-19 comes from covid only: a network can tell it by the source" in table.notes
    assert any(note.startswith("kermany: ") for note in table.notes)


def test_same_ids_in_two_sources_are_two_patients():
    one = single([0, 1, 1], splits=["train", "train", "test"])
    frame = one.frame.assign(path=one.frame["path"].str.replace("one", "two"), split=["test", "test", "train"])
    two = replace(one, frame=frame, root=Path("/data/two"))
    table = merged({"one": one, "two": two})
    assert table.frame["patient"].nunique() == 6
    assert table.root == Path("/data")
    assert table.has_patient_ids
    assert table.notes == ()


def test_boxes_of_sources_keep_their_finding(phantom_root, sources):
    drawn = read_dataset("covid_radiography", phantom_root)
    table = merged({"kermany": sources["kermany"], "phantom": drawn})
    names = table.boxes["label"].map(dict(enumerate(table.classes)))
    assert names.tolist() == drawn.boxes["label"].map(dict(enumerate(drawn.classes))).tolist()


def test_merged_multilabel_sources_need_the_same_findings_in_any_order(nih, tmp_path):
    write_chestxray14(tmp_path / "other", size=32, images=30)
    other = read_dataset("chestxray14", tmp_path / "other", classes=nih.classes[::-1])
    table = merged({"nih": nih, "other": other})
    assert table.multilabel
    assert table.classes == nih.classes
    names = dict(zip(table.frame["path"], target_names(table), strict=True))
    for source in (nih, other):
        for path, text in zip(source.frame["path"], target_names(source), strict=True):
            assert set(names[path].split("|")) == set(text.split("|"))
    with pytest.raises(ValueError, match="not all sources record Atelectasis"):
        merged({"nih": nih, "other": read_dataset("chestxray14", tmp_path / "other", classes=["Mass", "Edema"])})
    with pytest.raises(ValueError, match="nih has several findings an image"):
        merged({"nih": nih, "one": single([0, 1])})


def test_splits_of_merged_sources_are_restored(sources, tmp_path):
    parts = {name: split_by_patient(table, val=0.2, test=0.2, seed=0) for name, table in sources.items()}
    table = merged(parts)
    splits_frame(table).to_csv(tmp_path / "splits.csv", index=False)
    restored = apply_splits(merged(sources), tmp_path / "splits.csv", table.classes)
    assert splits_frame(restored).equals(splits_frame(table))


def test_real_findings_are_in_every_split(data_root):
    table = split_by_patient(read_dataset("chestxray14", data_root / "ChestX-ray14"), val=0.1, test=0.2, seed=0)
    assert table.frame.groupby("patient")["split"].nunique().eq(1).all()
    frequent = table.counts().sum(axis=1) >= 50
    assert (table.counts()[frequent] >= 1).all(axis=None)
