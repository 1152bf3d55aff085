"""The command line on many X-rays: the table, interruptions, several processes."""

import csv
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import overlay_cam
from inference.answers import answer
from inference.resumable_table import ResumableTable, Share, cell
from inference.trained_networks import ModelCard, save_network
from lungs.segmentation import LungSegmenter, save_segmenter, unet
from networks import build_network
from overlay_cam import main, share_of

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
    """Return the header and the rows of the table in a folder; no image may have two rows."""
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
def many_xrays(tmp_path_factory):
    """A folder of 40 images of noise; one has a name that is not UTF-8. Not to be changed."""
    folder = tmp_path_factory.mktemp("many xrays")
    images = np.random.default_rng(0).integers(0, 256, (40, 9, 8), dtype=np.uint8)
    for name, pixels in zip([*map(str, range(10, 49)), "1\udcff"], images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """A network of random weights, not to be changed."""
    return small_run(tmp_path_factory.mktemp("runs") / "study" / "small_cnn")


@pytest.fixture(scope="module")
def undisturbed(many_xrays, shared_run, tmp_path_factory):
    """The table of those images from one command without interruption."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["--device", "cpu", "-i", str(many_xrays), "-m", str(shared_run), "-o", str(out)]) == 0
    header, rows = rows_of(out)
    assert len(rows) == 40
    return header, rows


# --- the table -------------------------------------------------------------------------------------------


def test_rows_equal_the_answers_to_single_images(capsys, many_xrays, shared_run, undisturbed, tmp_path):
    header, rows = undisturbed
    rows = {row[0]: row for row in rows}
    assert header == [
        *("image", "predicted", "no", "yes", "lungs", "in_lungs"),
        *("overlay", "overlay_bytes", "bytes", "changed", "error"),
    ]
    images = [many_xrays / "20.png", many_xrays / "31.png"]
    for image in images:
        out = call(capsys, "-i", image, "-m", shared_run, "-o", tmp_path, "--json")[1]
        (record,) = json.loads(out)
        row = rows[str(image)]
        assert row[1] == record["predicted"]
        assert row[2:4] == [f"{p:.4f}" for p in record["probabilities"].values()]
        overlay = tmp_path / f"{image.stem}_cam.png"
        assert row[4:9] == ["", "", overlay.name, str(overlay.stat().st_size), str(image.stat().st_size)]
        assert datetime.fromisoformat(row[9]).timestamp() == pytest.approx(image.stat().st_mtime, abs=1e-5)
        assert row[10] == ""
    assert {file.name for file in tmp_path.iterdir()} == {"20_cam.png", "31_cam.png"}  # for one image there is no table


def test_findings_and_names_with_commas_quotes_and_line_breaks_stay_in_their_cells(capsys, xrays, run, tmp_path):
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
        assert "skips 2 of 2 images" in call(capsys, *common)[1]


def test_json_of_a_folder_is_one_list_even_if_images_fail_or_are_done(capsys, xrays, run, tmp_path):
    (xrays / "05.png").write_bytes(b"no image")
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out", "--json"
    status, out, err = call(capsys, *common)
    records = json.loads(out)
    assert out == json.dumps(records, indent=2) + "\n"
    assert ["error" in record for record in records] == [number == 5 for number in range(12)]
    assert status == 1
    assert "1 of 12 images could not be done" in err
    failed = rows_of(tmp_path / "out")[1][5]
    assert failed == [str(xrays / "05.png"), *[""] * 9, records[5]["error"]]
    status, out, err = call(capsys, *common)  # only the failed image is repeated
    assert [Path(record["image"]).name for record in json.loads(out)] == ["05.png"]
    assert status == 1
    assert "skips 11 of 12 images" in err
    Image.new("L", (8, 9)).save(xrays / "05.png")
    assert len(json.loads(call(capsys, *common)[1])) == 1
    status, out, err = call(capsys, *common)
    assert (status, out) == (0, "[]\n")
    assert "skips 12 of 12 images" in err
    rows = rows_of(tmp_path / "out")[1]
    assert len(rows) == 12
    assert not any(row[-1] for row in rows)


def test_lungs_in_a_row_equal_those_in_the_record(capsys, xrays, run, tmp_path):
    torch.manual_seed(0)
    save_segmenter(run.parent.parent / "lungs", LungSegmenter(unet("resnet18").eval(), "resnet18", 64))
    out = call(capsys, "-i", xrays, "-m", run, "-o", tmp_path / "o", "--json")[1]
    for record, row in zip(json.loads(out), rows_of(tmp_path / "o")[1], strict=True):
        share = record["maps"][0]["in_lungs"]
        assert row[4:6] == [record.get("lungs", ""), "" if share is None else str(share)]
        assert any(row[4:6])


def test_two_names_of_one_file_are_one_image(capsys, xrays, run, tmp_path, monkeypatch):
    monkeypatch.chdir(xrays)
    out = call(capsys, "-i", "00.png", xrays / "00.png", "01.png", "-m", run, "-o", tmp_path / "o", "--json")[1]
    assert [record["image"] for record in json.loads(out)] == ["00.png", "01.png"]
    assert [row[0] for row in rows_of(tmp_path / "o")[1]] == [str(xrays / "00.png"), str(xrays / "01.png")]


# --- continuing ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_of_a_killed_and_repeated_command_equals_an_undisturbed_one(
    capsys, many_xrays, shared_run, undisturbed, tmp_path
):
    common = "-i", many_xrays, "-m", shared_run, "-o", tmp_path / "out"
    table = tmp_path / "out" / "predictions.csv"
    process = start(*common)
    while process.poll() is None and not (table.exists() and table.read_bytes().count(b"\n") > 4):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    lines = table.read_bytes().splitlines(keepends=True)
    assert 5 <= len(lines) < 41
    table.write_bytes(b"".join(lines) + lines[-1][:30])  # a line cut by a kill
    status, out, err = call(capsys, *common, "--json")
    assert status == 0
    assert f"skips {len(lines) - 1} of 40 images" in err
    assert len(json.loads(out)) == 41 - len(lines)
    header, rows = rows_of(tmp_path / "out")
    assert header == undisturbed[0]
    assert sorted(rows) == sorted(undisturbed[1])
    assert rows[: len(lines) - 1] == list(csv.reader(line.decode() for line in lines[1:]))


def test_finished_images_are_not_repeated(capsys, xrays, run, tmp_path):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out, "-l", "all"
    call(capsys, *common)
    files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.glob("*_cam_*.png")}
    table = (out / "predictions.csv").read_bytes()
    assert len(files) == 24
    status, text, err = call(capsys, *common)
    assert (status, text, err) == (0, f"skips 12 of 12 images: they are in {out / 'predictions.csv'}\n", "")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files} == files
    assert (out / "predictions.csv").read_bytes() == table


def test_new_and_changed_images_and_those_without_an_overlay_are_answered(capsys, xrays, run, tmp_path):
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
    assert len(rows_of(out)[1]) == 4  # other images do not change the settings
    options = {
        **{"label": ["-l", "no"], "method": ["--method", "layercam"], "alpha": ["--alpha", "0.5"]},
        **{"boxes": ["--boxes"], "bar": ["--bar"]},
    }
    if change == "weights":
        os.utime(run / "model.safetensors", (0, 0))
    if change == "card":
        card = json.loads((run / "model.json").read_text()) | {"temperature": 2.0}
        (run / "model.json").write_text(json.dumps(card))
    if change == "lungs":  # damaged: the shares are left out, and the settings differ
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


def test_xrays_of_one_name_keep_their_overlays_and_rows_also_from_two_commands(capsys, xrays, run, tmp_path):
    twins = tmp_path / "twins"
    twins.mkdir()
    for name in ("00.png", "01.png"):
        (twins / name).write_bytes((xrays / name).read_bytes())
    common = "-m", run, "-o", tmp_path / "out"
    call(capsys, "-i", xrays, *common)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*_cam.png")}
    for inputs in ([twins], [twins], [xrays, twins]):
        status, text, _ = call(capsys, "-i", *inputs, *common)
        assert status == 0
        rows = {row[0]: row[-5] for row in rows_of(tmp_path / "out")[1]}
        assert len(rows) == 14 == len(set(rows.values()))
        assert rows[str(xrays / "00.png")] == "00_cam.png"
        assert rows[str(twins / "00.png")] == "00_2_cam.png"
        assert {path: path.read_bytes() for path in before} == before
    assert "skips 14 of 14 images" in text


def test_overlays_among_the_images_are_not_answered(capsys, xrays, run):
    common = "-i", xrays, "-m", run, "-o", xrays, "-l", "all"
    assert call(capsys, *common)[0] == 0
    assert "skips 12 of 12 images" in call(capsys, *common)[1]
    assert len(rows_of(xrays)[1]) == 12


@pytest.mark.parametrize("change", ["without settings", "edited"])
def test_table_of_another_program_is_kept(capsys, xrays, run, tmp_path, change):
    table = tmp_path / "out" / "predictions.csv"
    common = "-i", xrays, "-m", run, "-o", table.parent
    if change == "edited":
        call(capsys, *common)
    table.parent.mkdir(exist_ok=True)
    table.write_text("patient;diagnosis\n7;healthy")  # the last line has no line break
    status, out, err = call(capsys, *common)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "move it, or give another -o" in err
    assert table.read_text() == "patient;diagnosis\n7;healthy"


# --- stops -----------------------------------------------------------------------------------------------


class Interrupted:
    """A standard output that Ctrl-C interrupts while the third image is printed."""

    def write(self, text):
        if "02.png" in text:
            raise KeyboardInterrupt

    def flush(self):
        pass


def test_ctrl_c_says_how_many_images_are_done(capsys, xrays, run, tmp_path, monkeypatch):
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Interrupted())
        status = main(["--device", "cpu", *map(str, common)])
    assert status == 130
    line = "overlay_cam.py: stopped after 3 of 12 images; the same command goes on from there\n"
    assert capsys.readouterr().err == line
    status, text, _ = call(capsys, *common)
    assert status == 0
    assert "skips 3 of 12 images" in text  # the third image has its row
    assert len(rows_of(tmp_path / "out")[1]) == 12


def test_ctrl_c_prints_the_json_of_the_finished_images(capsys, xrays, run, tmp_path, monkeypatch):
    def answer_two(question, image, overlays):
        if image.name == "02.png":
            raise KeyboardInterrupt
        return answer(question, image, overlays)

    monkeypatch.setattr(overlay_cam, "answer", answer_two)
    status, text, err = call(capsys, "-i", xrays, "-m", run, "-o", tmp_path / "out", "--json")
    assert status == 130
    assert [Path(record["image"]).name for record in json.loads(text)] == ["00.png", "01.png"]
    assert err == "overlay_cam.py: stopped after 2 of 12 images; the same command goes on from there\n"


@pytest.mark.parametrize(("full_at", "limit"), [("settings", 100), ("overlay", 1500), ("table", 1500)])
def test_full_disk_stops_the_run_and_keeps_complete_rows(capsys, xrays, run, tmp_path, full_at, limit):
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


def test_row_after_a_half_written_row_is_complete(tmp_path):
    table = ResumableTable(tmp_path / "t.csv", ["a", "b"], {}, Share(0, 1))
    table.resume(lambda row: True)
    assert table.set_aside is None
    table.append(["1", "x, y"])
    for rest in (b"2,hal", b"3" * 10_000):  # left by killed processes; one is longer than a block
        with table.path.open("ab") as file:
            file.write(rest)
        table.append([4, None])
    assert table.path.read_bytes() == b'a,b\n1,"x, y"\n4,\n4,\n'


# --- several commands ------------------------------------------------------------------------------------


def test_only_processes_that_share_the_work_on_the_same_settings_write_to_a_table_at_once(tmp_path):
    def table(index, of=2, **settings):
        return ResumableTable(tmp_path / "t.csv", ["a"], settings, Share(index, of))

    first, second = table(0), table(1)
    first.resume(lambda row: True)
    second.resume(lambda row: True)
    first.append(["1"])
    second.append(["2"])
    others = [table(0, of=1), table(0, of=3), table(0, method="layercam")]
    for other in (*others, table(1)):  # table(1): a second command with the same number of processes
        with pytest.raises(ValueError, match=r"another command is at work on .*: wait for it, or give another -o"):
            other.resume(lambda row: False)
    first.close()
    for other in others:
        with pytest.raises(ValueError, match="another command"):
            other.resume(lambda row: False)
    second.close()
    rows = []
    single = table(0, of=1)
    single.resume(lambda row: rows.append(row) or True)
    single.close()
    assert rows == [["1"], ["2"]]
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", ".t.json", ".t.csv.lock"}


def test_files_of_a_killed_process_are_removed(capsys, xrays, run, tmp_path):
    (out := tmp_path / "out").mkdir()
    (out / ".predictions.csv.some launch.0.run").touch()
    abandoned, being_written = (out / f".xraycam-{number}123456789abcdef.tmp" for number in (0, 1))
    abandoned.write_bytes(b"half an overlay")
    being_written.write_bytes(b"half of another command's mask")
    two_hours_ago = time.time() - 7200
    os.utime(abandoned, (two_hours_ago, two_hours_ago))
    (out / ".mine.tmp").touch()
    assert call(capsys, "-i", xrays, "-m", run, "-o", out)[0] == 0
    hidden = {path.name for path in out.glob(".*")}
    assert hidden == {".mine.tmp", being_written.name, ".predictions.csv.lock", ".predictions.json"}


def test_xrays_named_like_overlays_keep_their_bytes(capsys, run, tmp_path):
    """15 overlays are written into the folder of their X-rays: first with a limit on file size, then without.

    Five of them have the names of other X-rays' overlays.
    """
    folder = tmp_path / "xrays"
    folder.mkdir()
    names = [f"{number:02}" for number in range(10)] + [f"{number:02}_cam" for number in range(5)]
    images = np.random.default_rng(0).integers(0, 256, (15, 9, 8), dtype=np.uint8)
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    noise = np.random.default_rng(1).integers(0, 256, (60, 60), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "03.png")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def check():
        assert {path: path.read_bytes() for path in before} == before
        assert not list(folder.glob(".*.tmp"))

    common = "-i", folder, "-o", folder, "-m"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))  # smaller than the overlay of 03.png
    try:
        status, _, err = call(capsys, *common, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 2
    assert "stopped after" in err
    check()
    assert call(capsys, *common, run)[0] == 0
    check()
    assert "skips 15 of 15 images" in call(capsys, *common, run)[1]
    check()
    rows = rows_of(folder)[1]
    overlays = {folder / row[-5] for row in rows}
    assert len(overlays) == 15
    assert set(folder.glob("*.png")) == before.keys() | overlays
    assert before.keys().isdisjoint(overlays)
    assert next(row[-5] for row in rows if row[0].endswith("/04.png")) == "04_2_cam.png"


def test_a_second_command_on_a_table_is_refused_while_the_first_works(capsys, xrays, run, tmp_path):
    table = tmp_path / "out" / "predictions.csv"
    first = ResumableTable(table, ["image"], {}, Share(0, 1))
    first.resume(lambda row: True)
    common = "-i", xrays, "-m", run, "-o", table.parent
    line = f"overlay_cam.py: another command is at work on {table}: wait for it, or give another -o\n"
    assert call(capsys, *common) == (2, "", line)
    assert table.read_text() == "image\n"
    assert not list(table.parent.glob("*.png"))
    first.close()
    assert call(capsys, *common)[0] == 0


# --- odd names and damaged files -------------------------------------------------------------------------


def test_cells_of_different_names_differ_and_have_one_line():
    names = ["a\nb", "a\\nb", "a\\\nb", "a\\\\nb", "a\rb", "a\\rb", "\udcff", "\\udcff", "\\\\udcff", "ÿ", "a,b", '"a"']
    cells = [cell(name) for name in names]
    assert len(set(cells)) == len(names)
    assert not any(end in text for end in "\n\r" for text in cells)

    def meant(match):
        return {"\\": "\\", "n": "\n", "r": "\r"}.get(match[1]) or chr(int(match[1][1:], 16))

    assert [re.sub(r"\\(\\|n|r|u[0-9a-f]{4})", meant, text) for text in cells] == names


def test_names_with_a_line_break_and_with_its_escape_are_two_images(capsys, xrays, run, tmp_path):
    for name in ("a\nb.png", "a\\nb.png", "a\\\\nb.png", "\udcff.png"):
        (xrays / name).write_bytes((xrays / "00.png").read_bytes())
    common = "-i", xrays, "-m", run, "-o", tmp_path / "out"
    assert call(capsys, *common, "--json")[0] == 0
    assert len(rows_of(tmp_path / "out")[1]) == 16 == len(list((tmp_path / "out").glob("*_cam.png")))
    assert "skips 16 of 16 images" in call(capsys, *common)[1]


def test_bad_names_fail_alone(capsys, xrays, run, tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("gone")
    (tmp_path / "empty").mkdir()
    (xrays / ("y" * 251 + ".png")).write_bytes((xrays / "00.png").read_bytes())  # its overlay's name is too long
    bad = [tmp_path / name for name in ("x" * 300, "loop.png", "dangling.png", "empty", "empty/gone.png")]
    status, out, err = call(capsys, "-i", *bad, xrays, "-m", run, "-o", tmp_path / "out")
    assert status == 1
    assert out.count("Grad-CAM for") == 12
    assert err.count("\n") == 7
    assert "6 of 18 images could not be done" in err
    errors = {row[0]: row[-1] for row in rows_of(tmp_path / "out")[1] if row[-1]}
    assert set(errors) == {*map(str, bad), str(xrays / ("y" * 251 + ".png"))}
    assert os.strerror(errno.ENAMETOOLONG) in errors[str(bad[0])]
    assert errors[str(bad[3])].startswith(f"no images in the folder {bad[3]}")


def test_folders_that_may_not_be_searched_fail_alone(capsys, xrays, run):
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        place = Path(name)
        place.chmod(0o777)
        model, images = (shutil.copytree(source, place / source.name) for source in (run, xrays))
        locked = place / "locked"
        shutil.copytree(xrays, locked)
        call(capsys, "-i", images, "-m", model, "-o", place / "first")  # imports what the other user cannot read
        locked.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may read everything
        try:
            status, out, err = call(capsys, "-i", locked, locked / "00.png", images, "-m", model, "-o", place / "out")
        finally:
            if root:
                os.seteuid(0)
            locked.chmod(0o700)
        assert status == 1
        assert out.count("Grad-CAM for") == 12
        assert err.count(os.strerror(errno.EACCES)) == 2
        assert "2 of 14 images could not be done" in err


@pytest.mark.parametrize("change", ["emptied", "cut", "removed"])
def test_changed_overlay_is_made_again(capsys, xrays, run, tmp_path, change):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out
    noise = np.random.default_rng(1).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(noise).save(xrays / "03.png")
    call(capsys, *common)
    overlay, table = out / "03_cam.png", (out / "predictions.csv").read_bytes()
    content = overlay.read_bytes()
    if change == "removed":
        overlay.unlink()
    else:
        overlay.write_bytes(b"" if change == "emptied" else content[:-20])
    status, text, err = call(capsys, *common)
    assert (status, err, text.count("Grad-CAM for")) == (0, "", 1)
    assert overlay.read_bytes() == content
    assert sorted((out / "predictions.csv").read_bytes().splitlines()) == sorted(table.splitlines())


def test_overlay_of_another_xray_is_kept_and_the_new_one_gets_a_number(capsys, xrays, run, tmp_path):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out
    call(capsys, *common)
    overlay, other = ((out / name).read_bytes() for name in ("03_cam.png", "04_cam.png"))
    (out / "03_cam.png").write_bytes(other)
    assert call(capsys, *common)[0] == 0
    assert [(out / name).read_bytes() for name in ("03_cam.png", "03_2_cam.png")] == [other, overlay]
    assert {row[0]: row[-5] for row in rows_of(out)[1]}[str(xrays / "03.png")] == "03_2_cam.png"


def test_picture_in_place_of_an_overlay_is_kept(capsys, xrays, run, tmp_path):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out
    call(capsys, *common)
    Image.new("RGB", (8, 9), "red").save(out / "03_cam.png")
    red = (out / "03_cam.png").read_bytes()
    for _ in range(2):
        status, text, err = call(capsys, *common)
        assert (status, text.count("Grad-CAM for")) == (1, 0)
        assert "03_cam.png is there and is no overlay of this program" in err
        assert (out / "03_cam.png").read_bytes() == red
        assert [row[0] for row in rows_of(out)[1] if row[-1]] == [str(xrays / "03.png")]


@pytest.mark.parametrize("sidecar", [b"", b"{", b"\xff\xfe", b"[]", "model"])
def test_table_with_other_or_damaged_settings_is_renamed(capsys, xrays, run, tmp_path, sidecar):
    out = tmp_path / "out"
    common = "-i", xrays, "-m", run, "-o", out
    call(capsys, *common)
    table = (out / "predictions.csv").read_bytes()
    (out / "predictions-1.csv").write_text("another's")
    if sidecar == "model":
        os.utime(run / "model.safetensors", (0, 0))
    else:
        (out / ".predictions.json").write_bytes(sidecar)
    status, text, _ = call(capsys, *common)
    assert status == 0
    assert "predictions.csv is begun anew" in text
    assert "the old table is kept as predictions-2.csv" in text
    assert (out / "predictions-2.csv").read_bytes() == table
    assert (out / "predictions-1.csv").read_text() == "another's"
    assert len(rows_of(out)[1]) == 12
    assert "skips 12 of 12 images" in call(capsys, *common)[1]


# --- several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_answer_each_image_once(capsys, many_xrays, shared_run, undisturbed, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    common = "-i", broken, many_xrays, "-m", shared_run, "-o", tmp_path / "out"
    # The second process has the image whose name is not UTF-8, and must print it.
    second = start(*common, RANK="1", WORLD_SIZE="2", PYTHONIOENCODING="utf-8:strict")
    while second.poll() is None and not (tmp_path / "out" / "predictions.csv").exists():
        time.sleep(0.001)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, first_out, first_err = call(capsys, *common)
    second_out, second_err = second.communicate(timeout=120)
    # With status 1 the launcher would stop the other process.
    assert [status, second.returncode] == [0, 0]
    rows = rows_of(tmp_path / "out")[1]
    assert sorted(row for row in rows if not row[-1]) == sorted(undisturbed[1])
    assert [row[0] for row in rows if row[-1]] == [str(broken)]
    assert first_out.splitlines()[0] == "process 1 of 2 answers 21 images"
    assert second_out.splitlines()[0] == "process 2 of 2 answers 20 images"
    assert [out.count("Grad-CAM for") for out in (first_out, second_out)] == [20, 20]
    assert ["broken.png" in err for err in (first_err, second_err)] == [True, False]


def test_another_number_of_processes_continues_the_table(capsys, xrays, run, tmp_path, monkeypatch):
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


def test_share_comes_from_the_launcher():
    assert share_of({}) == Share(0, 1)
    assert share_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(5, 8)
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "-1"}):
        with pytest.raises(ValueError, match="RANK"):
            share_of(wrong)
