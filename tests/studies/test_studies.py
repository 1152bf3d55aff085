"""Study files: settings, overrides, names, wrong keys, sources and the positive class."""

import json

import pytest
from PIL import Image

from networks import ARCHITECTURES
from studies.loading import STUDIES, load_study, load_table, positive_class

MINIMAL = """
title = "Mine"
[data]
reader = "folder"
root = "images"
[networks.resnet18]
"""


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_file_is_valid(path):
    study = load_study(path.stem)
    assert study.name == path.stem
    assert study.title
    assert study.data.root.is_absolute()


def test_study_of_the_original_project_keeps_its_published_settings():
    study = load_study("covid_radiography")
    assert (study.split.val, study.split.test) == (60, 60)
    assert list(study.networks) == ["vgg16", "resnet18", "densenet121"]
    training = study.training_of("vgg16")
    assert (training.learning_rate, training.batch_size, training.epochs) == (3e-5, 32, 25)
    assert (training.weights, training.balance, study.augmentation.horizontal_flip) == ("imagenet", "oversample", True)


def test_default_split_is_80_10_10(tmp_path):
    (tmp_path / "mine.toml").write_text(MINIMAL)
    study = load_study(tmp_path / "mine.toml")
    assert (study.split.val, study.split.test) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[training]\nlearing_rate = 1e-4", r"'learing_rate' in \[training\]: did you mean 'learning_rate'"),
        ("[trainign]\nepochs = 3", "'trainign': did you mean 'training'"),
        ("[networks.vgg16]\nepoch = 3", "'epoch': did you mean 'epochs'"),
        ("[training]\nrotation = 3", r"'rotation' in \[training\]: it belongs in \[augmentation\]"),
        ("[split]\npositive = 'sick'", r"'positive' in \[split\]: it belongs at the top of the file"),
        ("[training]\nepochs = 0", r"'epochs' in \[training\]: Input should be greater than 0"),
        ("[training]\nbalance = 'smote'", r"'balance' in \[training\]"),
        ("[split]\nval = 1.5", "fraction below 1 or a whole number"),
        ("[data", "not valid TOML"),
        ("[split]\nsed = 1", r"'sed' in \[split\]: did you mean 'seed'"),
        ("[split]\nseed = -1", r"'seed' in \[split\]: Input should be greater than or equal to 0"),
        ("[split]\ntest = 0", r"'test' in \[split\]: Input should be greater than 0"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(tmp_path, line, message):
    (tmp_path / "mine.toml").write_text(f"{MINIMAL}\n{line}")
    with pytest.raises(ValueError, match=message) as caught:
        load_study(tmp_path / "mine.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('reader = "folder"\npatient_pattern = "(p"', "valid regular expression"),
        ('reader = "folder"\npatient_pattern = "p"', "needs a group"),
        ('reader = "covid_radiography"\npatient_pattern = "(p)"', "for the reader 'folder' only"),
    ],
)
def test_patient_pattern_is_checked_when_the_file_is_read(tmp_path, change, message):
    (tmp_path / "mine.toml").write_text(MINIMAL.replace('reader = "folder"', change))
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "mine.toml")


def test_a_study_cannot_set_its_name(tmp_path):
    (tmp_path / "mine.toml").write_text('name = "../../elsewhere"\n' + MINIMAL)
    with pytest.raises(ValueError, match="leave 'name' out"):
        load_study(tmp_path / "mine.toml")


OUTSIDE = ["..", "...", ".hidden", "up\\there", "a*", "a\x7f", " a", "a."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_whose_name_is_no_folder_below_runs_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"'name': .* does not name a folder below runs/") as caught:
        load_study(write(tmp_path, name, MINIMAL))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine-limit20", "mine-seed3", "mine-fold1", "image_cache"])
def test_a_file_name_reserved_for_other_results_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"runs/{name} is kept for other results: rename the file"):
        load_study(write(tmp_path, name, MINIMAL))


@pytest.mark.parametrize("name", ["covid-19", "a.b", "my study (2)", "lunge_größe", "seed3"])
def test_an_ordinary_file_name_is_the_name_of_the_study(tmp_path, name):
    assert load_study(write(tmp_path, name, MINIMAL)).name == name


@pytest.mark.parametrize("name", [*OUTSIDE, "", "../../x", "/x", "a/../../x", "a//b", "a/"])
def test_settings_that_name_folders_stay_below_runs(tmp_path, name):
    text = MINIMAL + f"[preprocessing]\nlung_model = {json.dumps(name)}\n"
    with pytest.raises(ValueError, match=r"'lung_model' in \[preprocessing\]: .* folder below runs/"):
        load_study(write(tmp_path, "mine", text))
    with pytest.raises(ValueError, match=r"'0' in \[compare\]: .* (is a path|folder below runs/)"):
        load_study(write(tmp_path, "mine", f"compare = [{json.dumps(name)}]\n" + MINIMAL))


def test_a_lung_model_may_lie_in_a_folder_below_runs(tmp_path):
    text = MINIMAL + '[preprocessing]\nlung_model = "models/lungs 2"\n'
    assert load_study(write(tmp_path, "mine", text)).preprocessing.lung_model == "models/lungs 2"


def test_a_limited_study_never_replaces_the_whole_one(tiny_study):
    assert tiny_study.overridden(limit=20).name == "tiny-limit20"
    assert tiny_study.overridden(epochs=3).name == "tiny"


def test_limit_and_epochs_may_be_given_when_a_study_is_loaded(tiny_study, phantom_root):
    study = load_study(phantom_root.parent / "tiny.toml", limit=20, epochs=1)
    assert (study.name, study.limit, study.training_of("resnet18").epochs) == ("tiny-limit20", 20, 1)
    assert load_study(phantom_root.parent / "tiny.toml", limit=None, epochs=None) == tiny_study


def test_split_follows_the_seed(tiny_study):
    tests = [set(load_table(tiny_study.overridden(seed=seed)).subset("test")["path"]) for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


@pytest.mark.parametrize("limit", [None, 30])
def test_repeats_with_other_seeds_share_split_and_limit(tiny_study, limit):
    study = tiny_study.overridden(seed=3, limit=limit)
    first, repeat = (load_table(each).frame[["path", "split"]] for each in (study, study.repeated(4)))
    assert first.equals(repeat)
    assert not first.equals(load_table(study.overridden(seed=4)).frame[["path", "split"]])


def test_a_repeat_is_the_same_experiment_but_for_seed_and_name(tiny_study):
    study = tiny_study.overridden(seed=3).model_copy(update={"compare": ("other",)})
    repeat = study.repeated(4)
    assert (repeat.name, repeat.compare, repeat.seed) == ("tiny-seed4", ("other-seed4",), 4)
    assert (study.split_seed, repeat.split_seed) == (3, 3)
    same = {"name": True, "compare": True, "seed": True, "split": {"seed"}}
    assert repeat.model_dump(exclude=same) == study.model_dump(exclude=same)
    assert study.repeated(3) is study


def test_a_repeat_of_a_limited_fold_names_limit_fold_and_seed(tmp_path):
    study = load_study(write(tmp_path, "base", BASE + "[split]\nfolds = 3\n"))
    repeat = study.overridden(limit=9, fold=2).repeated(5)
    assert repeat.name == "base-limit9-fold2-seed5"
    assert (repeat.split.fold, repeat.limit) == (2, 9)


def test_a_study_file_may_fix_its_split_whatever_the_seed(tmp_path):
    study = load_study(write(tmp_path, "base", BASE + "[split]\nseed = 7\n"), seed=2)
    assert (study.seed, study.split_seed, study.repeated(3).split_seed) == (2, 7, 7)


def test_a_negative_seed_is_refused(tiny_study):
    with pytest.raises(ValueError, match="study tiny: 'seed': Input should be greater than or equal to 0"):
        tiny_study.repeated(-1)


def test_unknown_study_lists_those_that_exist():
    with pytest.raises(FileNotFoundError, match="covid_radiography, demo"):
        load_study("covid")


def test_override_replaces_the_settings_of_single_networks_too(tmp_path):
    (tmp_path / "mine.toml").write_text(MINIMAL + "[networks.vgg16]\nepochs = 7\ndropout = 0.2\n")
    study = load_study(tmp_path / "mine.toml")
    assert [study.training_of(n).epochs for n in study.networks] == [25, 7]
    short = study.overridden(epochs=2, networks=("vgg16", "densenet121"))
    assert [short.training_of(n).epochs for n in short.networks] == [2, 2]
    assert short.training_of("vgg16").dropout == 0.2
    with pytest.raises(ValueError, match="'image_size' in"):
        study.overridden(image_size=1)


def test_image_size_override_applies_to_all_networks(tmp_path):
    (tmp_path / "mine.toml").write_text(MINIMAL + "[networks.vgg16]\nimage_size = 64\n")
    study = load_study(tmp_path / "mine.toml")
    assert study.training_of("resnet18").image_size == 224
    assert study.training_of("vgg16").image_size == 64
    small = study.overridden(image_size=96)
    assert {small.training_of(n).image_size for n in small.networks} == {96}


def test_the_image_size_of_all_networks_is_set_in_one_place(tmp_path):
    text = MINIMAL + "[networks.vgg16]\nimage_size = 64\n[preprocessing]\nimage_size = 128\n"
    study = load_study(write(tmp_path, "mine", text))
    assert [study.training_of(name).image_size for name in study.networks] == [128, 64]
    assert [study.training_of(name).summary["image_size"] for name in study.networks] == [128, 64]
    with pytest.raises(ValueError, match=r"'image_size' in \[training\]: it belongs in \[preprocessing\]") as caught:
        load_study(write(tmp_path, "twice", MINIMAL + "[training]\nimage_size = 96\n"))
    assert "\n" not in str(caught.value)


def test_relative_root_starts_at_the_study_file_and_data_root_at_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path.parent)
    assert load_study(tmp_path / "mine.toml").data.root == tmp_path / "images"
    assert load_study(tmp_path / "mine.toml", data_root="x").data.root == tmp_path.parent / "x"


def test_missing_phantom_of_a_study_is_drawn(tmp_path):
    path = tmp_path / "drawn.toml"
    path.write_text(
        MINIMAL.replace('"folder"', '"covid_radiography"')
        + '[data.phantom]\nsize = 48\nimages_per_class = { "Normal" = 4, "COVID-19" = 5 }\n'
    )
    table = load_table(load_study(path))
    assert table.classes == ("COVID-19", "Normal")
    assert len(table) == 9


def write(folder, name, text):
    (folder / f"{name}.toml").write_text(text)
    return folder / f"{name}.toml"


BASE = """
title = "Base"
[data]
reader = "folder"
root = "images"
[preprocessing]
image_size = 96
[training]
phases = [{ trainable = "head", epochs = 2 }, { epochs = 3, learning_rate = 1e-5 }]
[networks.resnet18]
"""


def test_a_study_that_extends_another_has_its_other_settings(tmp_path):
    base = load_study(write(tmp_path, "base", BASE))
    path = write(tmp_path, "variant", 'extends = "base"\naugmentation = { horizontal_flip = true }\n')
    variant = load_study(path)
    assert variant.name == "variant"
    assert variant.augmentation.horizontal_flip
    same = {"name", "augmentation"}
    assert variant.model_dump(exclude=same) == base.model_dump(exclude=same)
    again = load_study(write(tmp_path, "third", 'extends = "variant"\n[training]\nphases = []\nepochs = 7\n'))
    assert again.augmentation.horizontal_flip
    assert again.training_of("resnet18").all_phases[0].epochs == 7


def test_a_study_that_extends_itself_or_nothing_is_refused(tmp_path):
    write(tmp_path, "a", 'extends = "b"')
    path = write(tmp_path, "b", 'extends = "a"')
    with pytest.raises(ValueError, match="extends itself"):
        load_study(path)
    with pytest.raises(FileNotFoundError, match="no study 'gone'"):
        load_study(write(tmp_path, "c", 'extends = "gone"'))


def test_epochs_override_applies_to_every_phase(tmp_path):
    study = load_study(write(tmp_path, "base", BASE)).overridden(epochs=1)
    assert [phase.epochs for phase in study.training_of("resnet18").all_phases] == [1, 1]
    assert study.training.phases[0].epochs == 1  # model.json records these
    assert [phase.trainable for phase in study.training_of("resnet18").all_phases] == ["head", "all"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "x"\n[networks.resnet18]\n', r"either \[data\] or"),
        (BASE + "[[datasets]]\nreader = 'folder'\nroot = 'other'\n", r"either \[data\] or"),
        (BASE.replace("epochs = 2 }", "epocs = 2 }"), "did you mean 'epochs'"),
        (BASE + "[split]\nfold = 2\n", "no fold 2: the study has none"),
        (BASE + "epochs = 3\n", "'epochs' of resnet18 does nothing beside `phases`"),
        (BASE + "[split]\nfolds = 1\n", "'folds'"),
        (BASE.replace('root = "images"', 'root = "images"\nofficial_split = true'), "chestxray14"),
    ],
)
def test_contradictions_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_study(write(tmp_path, "mine", text))


def test_folds_and_limited_studies_have_their_own_names(tmp_path):
    study = load_study(write(tmp_path, "base", BASE + "[split]\nfolds = 3\n").resolve())
    study = study.model_copy(update={"compare": ("other",)})
    assert study.overridden(fold=2).name == "base-fold2"
    limited = study.overridden(limit=9, fold=3)
    assert (limited.name, limited.compare) == ("base-limit9-fold3", ("other-limit9-fold3",))
    with pytest.raises(ValueError, match="no fold 4: the study has 3"):
        study.overridden(fold=4)


TWO_SOURCES = """
title = "Two hospitals"
[[datasets]]
reader = "folder"
root = "north"
classes = ["fine", "sick"]
labels = { fine = "Normal", sick = "Pneumonia" }
[[datasets]]
reader = "folder"
root = "south"
classes = ["bacteria", "healthy", "virus"]
labels = { healthy = "Normal", bacteria = "Pneumonia", virus = "Pneumonia" }
[split]
val = 0.2
test = 0.2
[networks.resnet18]
"""


def test_several_sources_share_classes_and_all_are_in_every_split(tmp_path):
    for path, number in (("north/fine", 10), ("north/sick", 20), ("south/bacteria", 10), ("south/healthy", 10),
                         ("south/virus", 10)):  # fmt: skip
        (tmp_path / path).mkdir(parents=True)
        for i in range(number):
            Image.new("L", (32, 32)).save(tmp_path / path / f"{i}.png")
    table = load_table(load_study(write(tmp_path, "two", TWO_SOURCES)))
    assert table.classes == ("Normal", "Pneumonia")
    assert table.counts().sum(axis=1).tolist() == [20, 40]
    source = table.relative_paths().str.split("/").str[0]
    counts = table.frame.groupby([source.to_numpy(), "split"]).size()
    assert counts["north"].to_dict() == {"train": 18, "val": 6, "test": 6}
    assert counts["south"].to_dict() == {"train": 18, "val": 6, "test": 6}
    virus = table.frame[table.relative_paths().str.contains("virus").to_numpy()]
    assert (virus["label"] == 1).all()
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    for name in ("north", "south"):
        (tmp_path / name).rename(elsewhere / name)
    moved = load_table(load_study(tmp_path / "two.toml", data_root=elsewhere))
    assert moved.relative_paths().tolist() == table.relative_paths().tolist()
    assert moved.frame["split"].tolist() == table.frame["split"].tolist()


def test_the_studies_of_the_project_name_studies_and_networks_that_exist():
    names = {path.stem for path in STUDIES.glob("*.toml")}
    assert {"covid_radiography", "viral_vs_bacterial", "covid_frozen", "chestxray14", "pneumonia_plain"} <= names
    for name in names:
        study = load_study(name)
        assert set(study.compare) <= names
        assert set(study.networks) <= set(ARCHITECTURES)


def test_the_pneumonia_variants_differ_in_one_line_each():
    plain, augmented, lungs = (load_study(f"pneumonia_{v}").model_dump() for v in ("plain", "augmented", "lungs"))
    assert {key for key in plain if plain[key] != augmented[key]} == {"name", "title", "augmentation"}
    assert {key for key in plain if augmented[key] != lungs[key]} == {"name", "title", "preprocessing"}
    assert augmented["preprocessing"] | {"lung_model": "lungs"} == lungs["preprocessing"]


def test_split_sizes_in_images_shrink_in_a_limited_study(tmp_path):
    for name in ("healthy", "sick"):
        draw_images(tmp_path / "images" / name, 100)
    path = write(tmp_path, "mine", MINIMAL + "[split]\nval = 30\ntest = 30\n")
    assert load_table(load_study(path)).counts().loc["sick"].to_dict() == {"train": 40, "val": 30, "test": 30}
    limited = load_table(load_study(path, limit=40)).counts()
    assert limited.loc["sick"].to_dict() == {"train": 8, "val": 6, "test": 6}


def test_a_limited_study_scores_faithfulness_on_few_images():
    study = load_study("demo")
    assert study.maps.faithful == 8
    assert load_study("demo", limit=64).maps.faithful == 3
    assert load_study("demo", limit=64).maps.steps == 4
    assert load_study("demo", limit=10).maps.faithful == 2
    assert load_study("demo", limit=5000).maps.faithful == 8


def draw_images(folder, number):
    folder.mkdir(parents=True)
    for i in range(number):
        Image.new("L", (32, 32)).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (("abnormal", "healthy"), "abnormal"),
        (("Normal", "Pneumonia"), "Pneumonia"),
        (("No Finding", "effusion"), "effusion"),
        (("tb", "no_finding"), "tb"),
        (("COVID", "NEGATIVE"), "COVID"),
    ],
)
def test_the_class_without_a_healthy_name_is_the_positive_one_of_two(tmp_path, classes, positive):
    for name in classes:
        draw_images(tmp_path / "images" / name, 5)
    path = write(tmp_path, "mine", MINIMAL)
    study = load_study(path)
    table = load_table(study)
    assert positive_class(study, table) == positive
    other = next(name for name in classes if name != positive)
    chosen = load_study(write(tmp_path, "mine", f'positive = "{other}"' + MINIMAL))
    assert positive_class(chosen, table) == other


@pytest.mark.parametrize("classes", [("bacteria", "virus"), ("control", "normal")])
def test_a_positive_class_is_never_guessed(tmp_path, classes):
    for name in classes:
        draw_images(tmp_path / "images" / name, 5)
    one, other = classes
    with pytest.raises(ValueError, match=f'set positive = "{one}" or positive = "{other}"'):
        load_table(load_study(write(tmp_path, "mine", MINIMAL)))
    with pytest.raises(ValueError, match=f"no class 'sick': set positive = \"{one}\""):
        load_table(load_study(write(tmp_path, "mine", 'positive = "sick"' + MINIMAL)))
    study = load_study(write(tmp_path, "mine", f'positive = "{one}"' + MINIMAL))
    assert positive_class(study, load_table(study)) == one


def test_a_positive_class_among_more_than_two_is_refused(tmp_path):
    for name in ("healthy", "bacteria", "virus"):
        draw_images(tmp_path / "images" / name, 5)
    study = load_study(write(tmp_path, "mine", MINIMAL))
    assert positive_class(study, load_table(study)) is None
    with pytest.raises(ValueError, match="leave it out for bacteria, healthy, virus"):
        load_table(load_study(write(tmp_path, "mine", 'positive = "virus"' + MINIMAL)))


def test_the_pneumonia_studies_set_their_positive_class():
    assert {load_study(f"viral_vs_bacterial{name}").positive for name in ("", "_scratch")} == {"Viral"}
    assert load_study("pneumonia_lungs").positive == "Pneumonia"
