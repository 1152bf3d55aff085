"""The command line on many X-rays: a table that grows as it goes, stops of all kinds, several processes."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lung_segmentation import LungSegmenter, save_segmenter, unet
from networks import build_network
from overlay_cam import main, share_of
from resumable_table import ResumableTable
from trained_networks import ModelCard, save_network
from utils import Share

PROJECT = Path(__file__).parent.parent


def call(capsys, *arguments):
    status = main(["--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def start(*arguments, **environment):
    command = [sys.executable, PROJECT / "overlay_cam.py", "--device", "cpu", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(folder):
    """Return the header and the rows of the table in a folder, none of which is there twice."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert all(len(row) == len(header) for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return header, rows


def small_run(folder, classes=("no", "yes"), **fields):
    torch.manual_seed(0)
    card = ModelCard("small_cnn", classes, 48, (0.5,) * 3, (0.25,) * 3, "features.4.relu", **fields)
    save_network(folder, build_network("small_cnn", card.outputs).eval(), card)
    return folder


@pytest.fixture
def run(tmp_path):
    """A network of random weights."""
    return small_run(tmp_path / "runs" / "study" / "small_cnn")


@pytest.fixture
def xrays(tmp_path):
    """A folder of 12 small images of noise."""
    folder = tmp_path / "xrays"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 9, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def phantoms(phantom_root):
    """Four folders of 40 images."""
    return sorted(phantom_root.glob("*/images"))


@pytest.fixture(scope="module")
def undisturbed(phantoms, trained_run, tmp_path_factory):
    """The rows of the phantoms by one run from start to end."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["--device", "cpu", "-i", *map(str, phantoms), "-m", str(trained_run), "-o", str(out)]) == 0
    header, rows = rows_of(out)
    assert len(rows) == 40
    return header, rows


# --- the table -------------------------------------------------------------------------------------------


def test_rows_say_what_each_image_alone_is_answered(capsys, phantoms, trained_run, undisturbed, tmp_path):
    header, rows = undisturbed
    rows = {row[0]: row for row in rows}
    assert header == [
        *("image", "predicted", "COVID-19", "Lung Opacity", "Normal", "Viral Pneumonia"),
        *("lungs", "in_lungs", "overlay", "bytes", "changed"),
    ]
    for folder in phantoms:
        image = sorted(folder.iterdir())[1]
        out = call(capsys, "-i", image, "-m", trained_run, "-o", tmp_path, "--json")[1]
        (record,) = json.loads(out)
        row = rows[str(image)]
        assert row[1] == record["predicted"]
        assert row[2:6] == [f"{p:.4f}" for p in record["probabilities"].values()]
        assert row[6:9] == ["", "", f"{image.stem}_cam.png"]
        assert int(row[9]) == image.stat().st_size
        assert datetime.fromisoformat(row[10]).timestamp() == pytest.approx(image.stat().st_mtime, abs=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        rows[str(sorted(folder.iterdir())[1])][8] for folder in phantoms
    )  # of one image, no table


def test_findings_and_names_with_commas_quotes_and_line_breaks_stay_in_their_cells(
    capsys, xrays, run, tmp_path
):
    names = ("Mass, large", 'so-called "Edema"', "Hernia")
    odd = xrays / 'a,"b"\nc.png'
    (xrays / "00.png").rename(odd)
    expected = {0: "|".join(names), 1: "No Finding"}
    for threshold, findings in expected.items():
        fields = {"head": "sigmoid", "multilabel": True, "thresholds": (float(threshold),) * 3}
        model = small_run(tmp_path / f"run{threshold}", names, **fields)
        common = "-i", odd, xrays / "01.png", "-m", model, "-o", tmp_path / f"o{threshold}"
        assert call(capsys, *common)[0] == 0
        header, rows = rows_of(tmp_path / f"o{threshold}")
        assert header[1:5] == ["findings", *names]
        assert [row[1] for row in rows] == [findings] * 2
        assert rows[0][0] == str(odd).replace("\n", "\\n")
        assert "all 2 images are done already" in call(capsys, *common)[1]


def test_json_of_a_folder_is_one_list_also_where_images_fail_or_are_done(capsys, xrays, run, tmp_path):
    (xrays / "05.png").write_bytes(b"no image")
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out", "--json"
    status, out, err = call(capsys, *common)
    records = json.loads(out)
    assert out == json.dumps(records, indent=2) + "\n"
    assert ["error" in record for record in records] == [number == 5 for number in range(12)]
    assert status == 1
    assert "1 of 12 images could not be done" in err
    status, out, err = call(capsys, *common)  # only the failed one is tried again
    assert [Path(record["image"]).name for record in json.loads(out)] == ["05.png"]
    assert status == 1
    assert "skips 11 of 12 images" in err
    Image.new("L", (8, 9)).save(xrays / "05.png")
    assert len(json.loads(call(capsys, *common)[1])) == 1
    status, out, err = call(capsys, *common)
    assert (status, out) == (0, "[]\n")
    assert "all 12 images are done already" in err
    assert len(rows_of(tmp_path / "out")[1]) == 12


def test_lungs_in_a_row_are_those_of_the_record(capsys, xrays, run, tmp_path):
    torch.manual_seed(0)
    save_segmenter(run.parent.parent / "lungs", LungSegmenter(unet("resnet18").eval(), "resnet18", 64))
    out = call(capsys, "-i", xrays, "-m", run, "-o", tmp_path / "o", "--json")[1]
    for record, row in zip(json.loads(out), rows_of(tmp_path / "o")[1], strict=True):
        share = record["maps"][0]["in_lungs"]
        assert row[4:6] == [record.get("lungs", ""), "" if share is None else str(share)]
        assert any(row[4:6])


def test_two_names_of_one_file_are_one_image(capsys, xrays, run, tmp_path, monkeypatch):
    monkeypatch.chdir(xrays)
    out = call(capsys, "-i", "00.png", xrays / "00.png", "01.png", "-m", run, "-o", tmp_path / "o", "--json")[
        1
    ]
    assert [record["image"] for record in json.loads(out)] == ["00.png", "01.png"]
    assert [row[0] for row in rows_of(tmp_path / "o")[1]] == [str(xrays / "00.png"), str(xrays / "01.png")]


# --- going on --------------------------------------------------------------------------------------------


def test_a_killed_run_is_gone_on_with_and_its_table_is_that_of_an_undisturbed_one(
    capsys, phantoms, trained_run, undisturbed, tmp_path
):
    common = "-i", *phantoms, "-m", trained_run, "-o", tmp_path / "out"
    table = tmp_path / "out" / "predictions.csv"
    process = start(*common)
    while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") > 4):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    lines = table.read_bytes().splitlines(keepends=True)
    assert 5 <= len(lines) < 41
    table.write_bytes(b"".join(lines) + lines[-1][:30])  # what a cut in the middle of a line leaves
    status, out, _ = call(capsys, *common)
    assert status == 0
    assert f"skips {len(lines) - 1} of 40 images" in out
    assert out.count("Grad-CAM for") == 41 - len(lines)
    header, rows = rows_of(tmp_path / "out")
    assert header == undisturbed[0]
    assert sorted(rows) == sorted(undisturbed[1])
    assert rows[: len(lines) - 1] == list(csv.reader(line.decode() for line in lines[1:]))


def test_what_is_done_is_not_done_again(capsys, xrays, run, tmp_path):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out, "-l", "all"
    call(capsys, *common)
    files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.glob("*_cam_*.png")}
    table = (out / "predictions.csv").read_bytes()
    assert len(files) == 24
    status, text, err = call(capsys, *common)
    assert (status, text, err) == (0, f"all 12 images are done already, see {out / 'predictions.csv'}\n", "")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files} == files
    assert (out / "predictions.csv").read_bytes() == table


def test_images_that_are_new_or_changed_or_without_an_overlay_are_done_and_replace_their_rows(
    capsys, xrays, run, tmp_path
):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out, "-l", "all"
    call(capsys, *common)
    before = {row[0]: row for row in rows_of(out)[1]}
    Image.new("L", (8, 9), 200).save(xrays / "03.png")  # other bytes
    os.utime(xrays / "04.png", (0, 0))  # the same bytes, another time
    (out / "05_cam_yes.png").unlink()  # the second of two maps
    Image.new("L", (8, 9), 100).save(xrays / "99.png")
    status, text, _ = call(capsys, *common, "--json")
    again = ["03.png", "04.png", "05.png", "99.png"]
    assert [Path(record["image"]).name for record in json.loads(text)] == again
    assert status == 0
    after = {row[0]: row for row in rows_of(out)[1]}
    assert {Path(name).name for name in after if after[name] != before.get(name)} == {*again} - {"05.png"}
    assert len(after) == 13
    assert (out / "05_cam_yes.png").is_file()


@pytest.mark.parametrize("change", ["label", "method", "alpha", "boxes", "bar", "weights", "card", "lungs"])
def test_another_model_or_another_option_begins_the_table_anew(capsys, xrays, run, tmp_path, change):
    out = tmp_path / "out"
    common = ["-i", xrays / "00.png", xrays / "01.png", "-m", run, "-o", out]
    call(capsys, *common)
    call(capsys, *common, "-i", xrays / "02.png", xrays / "03.png")
    assert len(rows_of(out)[1]) == 4  # other images are no other settings
    options = {
        **{"label": ["-l", "no"], "method": ["--method", "layercam"], "alpha": ["--alpha", "0.5"]},
        **{"boxes": ["--boxes"], "bar": ["--bar"]},
    }
    if change == "weights":
        os.utime(run / "model.safetensors", (0, 0))
    if change == "card":
        card = json.loads((run / "model.json").read_text()) | {"temperature": 2.0}
        (run / "model.json").write_text(json.dumps(card))
    if change == "lungs":  # damaged, so that the shares are left out; but no longer the same
        (lungs := run.parent.parent / "lungs").mkdir()
        for name in ("model.json", "model.safetensors"):
            (lungs / name).write_text("{}")
    common += options.get(change, [])
    status, text, _ = call(capsys, *common)
    assert status == 0
    assert text.count("is begun anew") == 1
    assert text.count("00.png") == 1
    assert len(rows_of(out)[1]) == 2
    assert "begun anew" not in call(capsys, *common)[1]


def test_image_whose_overlay_is_replaced_by_another_ones_loses_its_row(capsys, xrays, run, tmp_path):
    twins = tmp_path / "twins"
    twins.mkdir()
    for name in ("00.png", "01.png"):
        (twins / name).write_bytes((xrays / name).read_bytes())
    common = "-m", run, "-o", tmp_path / "out"
    call(capsys, "-i", xrays, *common)
    assert call(capsys, "-i", twins, *common)[0] == 0
    rows = {row[0]: row[-3] for row in rows_of(tmp_path / "out")[1]}
    assert len(rows) == 12 == len(set(rows.values()))
    assert rows[str(twins / "00.png")] == "00_cam.png"
    assert call(capsys, "-i", xrays, twins, *common)[0] == 0
    rows = {row[0]: row[-3] for row in rows_of(tmp_path / "out")[1]}
    assert len(rows) == 14 == len(set(rows.values()))
    assert rows[str(twins / "00.png")] == "00_2_cam.png"


def test_output_among_the_images_is_not_taken_for_images(capsys, xrays, run):
    common = "-i", xrays, "-m", run, "-o", xrays, "-l", "all"
    assert call(capsys, *common)[0] == 0
    assert "all 12 images are done already" in call(capsys, *common)[1]
    assert len(rows_of(xrays)[1]) == 12


@pytest.mark.parametrize("there", ["without settings", "edited"])
def test_table_of_another_program_is_left_alone(capsys, xrays, run, tmp_path, there):
    table = tmp_path / "out" / "predictions.csv"
    common = "-i", xrays, "-m", run, "-o", table.parent
    if there == "edited":
        call(capsys, *common)
    table.parent.mkdir(exist_ok=True)
    table.write_text("patient;diagnosis\n7;healthy\n")
    status, out, err = call(capsys, *common)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "move it, or give another -o" in err
    assert table.read_text() == "patient;diagnosis\n7;healthy\n"


# --- stops -----------------------------------------------------------------------------------------------


class Interrupted:
    """A standard output that, as a user would, sends Ctrl-C while the third image is told of."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        if "02.png" in text:
            signal.raise_signal(signal.SIGINT)

    def flush(self):
        pass


def test_ctrl_c_says_how_far_it_came_and_closes_the_list(capsys, xrays, run, tmp_path, monkeypatch):
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Interrupted())
        status = main(["--device", "cpu", *map(str, common)])
    assert status == 130
    line = "overlay_cam.py: stopped after 2 of 12 images; the same command goes on from there\n"
    assert capsys.readouterr().err == line
    status, text, _ = call(capsys, *common)
    assert status == 0
    assert "skips 3 of 12 images" in text  # the third had its row
    assert len(rows_of(tmp_path / "out")[1]) == 12


@pytest.mark.parametrize(("full_at", "limit"), [("settings", 100), ("overlay", 1500), ("table", 1500)])
def test_full_disk_stops_the_run_once_and_costs_no_complete_row(capsys, xrays, run, tmp_path, full_at, limit):
    if full_at == "overlay":  # its overlay is larger than the limit
        noise = np.random.default_rng(1).integers(0, 256, (60, 60), dtype=np.uint8)
        Image.fromarray(noise).save(xrays / "03.png")
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o"
    call(capsys, *common, tmp_path / "free")
    complete = (tmp_path / "free" / "predictions.csv").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status, _, err = call(capsys, *common, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert os.strerror(errno.EFBIG) in err
    assert err.count("\n") == 1
    rows = []
    if full_at != "settings":
        written = (out / "predictions.csv").read_bytes()
        assert complete.startswith(written)
        rows = rows_of(out)[1]
        assert f"stopped after {len(rows)} of 12 images; the same command goes on from there" in err
        assert len(rows) == 3 if full_at == "overlay" else 3 < len(rows) < 12
    assert not list(out.glob(".*.tmp"))
    status, text, _ = call(capsys, *common, out)
    assert status == 0
    assert text.count("Grad-CAM for") == 12 - len(rows)
    assert (out / "predictions.csv").read_bytes() == complete


def test_row_behind_a_half_written_one_is_whole(tmp_path):
    table = ResumableTable(tmp_path / "t.csv", ["a", "b"], {})
    assert not table.resume(lambda row: True)
    table.append(["1", "x, y"])
    for rest in (b"2,hal", b"3" * 10_000):  # what others left that were killed; one longer than a block
        with table.path.open("ab") as file:
            file.write(rest)
        table.append([4, None])
    assert table.path.read_bytes() == b'a,b\n1,"x, y"\n4,\n4,\n'


def test_row_is_refused_by_a_table_that_another_command_has_begun_anew(tmp_path):
    table, other = (ResumableTable(tmp_path / "t.csv", ["a"], {"alpha": n}) for n in range(2))
    assert not table.resume(lambda row: True)
    table.append(["1"])
    assert other.resume(lambda row: True)
    with pytest.raises(OSError, match="anew: give each its own -o"):
        table.append(["2"])
    assert table.path.read_text() == "a\n"


# --- several processes -----------------------------------------------------------------------------------


def test_two_processes_do_every_image_once(phantoms, trained_run, undisturbed, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    common = "-i", broken, *phantoms, "-m", trained_run, "-o", tmp_path / "out"
    processes = [start(*common, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    # A status of 1 would make the launcher end the other one.
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(rows_of(tmp_path / "out")[1]) == sorted(undisturbed[1])
    assert [out.splitlines()[0] for out, _ in said] == [
        "process 1 of 2: 21 images are its share",
        "process 2 of 2: 20 images are its share",
    ]
    assert [out.count("Grad-CAM for") for out, _ in said] == [20, 20]
    assert ["broken.png" in err for _, err in said] == [True, False]


def test_shares_of_another_number_of_processes_go_on_too(capsys, xrays, run, tmp_path, monkeypatch):
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, *common)[0] == 0
    assert [Path(row[0]).stem for row in rows_of(tmp_path / "out")[1]] == ["01", "04", "07", "10"]
    status, out, err = call(capsys, *common, "--json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "several processes cannot print one list" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "skips 2 of 6 images" in call(capsys, *common)[1]
    assert {int(Path(row[0]).stem) for row in rows_of(tmp_path / "out")[1]} == {1, 3, 4, 5, 7, 9, 10, 11}


def test_share_is_what_the_launcher_says():
    assert share_of({}) == Share(0, 1)
    assert share_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(5, 8)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "a", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="RANK"):
            share_of(wrong)
