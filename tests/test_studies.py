"""Study files: what they say is what is run, and a slip of the pen is named."""

import pytest

from studies import STUDIES, load_study, load_table

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
    assert (training.weights, training.balance, study.augmentation.horizontal_flip) == (
        "imagenet",
        "oversample",
        True,
    )


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
        ("[training]\nepochs = 0", r"'epochs' in \[training\]: Input should be greater than 0"),
        ("[training]\nbalance = 'smote'", r"'balance' in \[training\]"),
        ("[split]\nval = 1.5", "fraction below 1 or a whole number"),
        ("[data", "not valid TOML"),
        ("[split]\ntest = 0", r"'test' in \[split\]: Input should be greater than 0"),
    ],
)
def test_slip_of_the_pen_is_named_in_one_line(tmp_path, line, message):
    (tmp_path / "mine.toml").write_text(f"{MINIMAL}\n{line}")
    with pytest.raises(ValueError, match=message) as caught:
        load_study(tmp_path / "mine.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('reader = "folder"\npatient_pattern = "(p"', "is no regular expression"),
        ('reader = "folder"\npatient_pattern = "p"', "needs a group"),
        ('reader = "covid_radiography"\npatient_pattern = "(p)"', "for the reader 'folder' only"),
    ],
)
def test_patient_pattern_is_checked_when_the_file_is_read(tmp_path, change, message):
    (tmp_path / "mine.toml").write_text(MINIMAL.replace('reader = "folder"', change))
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "mine.toml")


def test_a_study_is_named_by_its_file_alone(tmp_path):
    (tmp_path / "mine.toml").write_text('name = "../../elsewhere"\n' + MINIMAL)
    with pytest.raises(ValueError, match="leave 'name' out"):
        load_study(tmp_path / "mine.toml")


def test_limited_study_never_replaces_the_real_one(tiny_study):
    assert tiny_study.overridden(limit=20).name == "tiny-limit20"
    assert tiny_study.overridden(epochs=3).name == "tiny"


def test_split_follows_the_seed(tiny_study):
    tests = [set(load_table(tiny_study.overridden(seed=seed)).subset("test")["path"]) for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_unknown_study_lists_those_that_exist():
    with pytest.raises(FileNotFoundError, match="covid_radiography, demo"):
        load_study("covid")


def test_override_beats_the_file_even_where_a_network_has_its_own(tmp_path):
    (tmp_path / "mine.toml").write_text(MINIMAL + "[networks.vgg16]\nepochs = 7\ndropout = 0.2\n")
    study = load_study(tmp_path / "mine.toml")
    assert [study.training_of(n).epochs for n in study.networks] == [25, 7]
    short = study.overridden(epochs=2, networks=("vgg16", "densenet121"))
    assert [short.training_of(n).epochs for n in short.networks] == [2, 2]
    assert short.training_of("vgg16").dropout == 0.2
    with pytest.raises(ValueError, match="'image_size' in"):
        study.overridden(image_size=1)


def test_image_size_override_holds_for_all_networks(tmp_path):
    (tmp_path / "mine.toml").write_text(MINIMAL + "[networks.vgg16]\nimage_size = 64\n")
    study = load_study(tmp_path / "mine.toml")
    assert study.image_size_of("resnet18") == 224
    assert study.image_size_of("vgg16") == 64
    small = study.overridden(image_size=96)
    assert {small.image_size_of(n) for n in small.networks} == {96}


def test_relative_root_belongs_to_the_file_and_a_given_one_to_the_caller(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path.parent)
    assert load_study(tmp_path / "mine.toml").data.root == tmp_path / "images"
    assert load_study(tmp_path / "mine.toml", data_root="x").data.root == tmp_path.parent / "x"


def test_quick_study_never_replaces_the_real_one(tiny_study, phantom_root):
    quick = load_study(phantom_root.parent / "tiny.toml", quick=True)
    assert quick.name == "tiny-quick"
    assert quick.training_of("resnet18").epochs == 1


def test_phantom_of_a_study_is_drawn_where_it_is_missing(tmp_path):
    path = tmp_path / "drawn.toml"
    path.write_text(
        MINIMAL.replace('"folder"', '"covid_radiography"')
        + '[data.phantom]\nsize = 48\nimages_per_class = { "Normal" = 4, "COVID-19" = 5 }\n'
    )
    table = load_table(load_study(path))
    assert table.classes == ("COVID-19", "Normal")
    assert len(table) == 9
