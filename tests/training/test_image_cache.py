"""Cached images equal images that are decoded each time. Their file is complete or does not exist."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from finetune import fine_tune_study
from inference.explanations import explain
from inference.trained_networks import load_network
from overlay_cam import main
from studies.loading import PROJECT, load_study, load_table
from training.batches import XrayDataset
from training.image_cache import CacheFailed, cached
from utils import Preprocessing, read_xray

SMALL = Preprocessing(32, (0.5,) * 3, (0.2,) * 3)
MODES = ("L", "RGB", "RGBA", "P", "I;16")


def write(path, mode="L", seed=0, size=(40, 56)):
    """Write a random X-ray; return its path."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, size, dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).convert(mode)
    image.save(path)
    return str(path)


@pytest.fixture
def splits(tmp_path):
    """Paths of X-rays of all modes and many sizes, in splits that overlap and have different orders."""
    sizes = ((40, 56), (32, 32), (61, 33), (20, 100), (300, 7))
    paths = [write(tmp_path / "data" / f"{i}.png", MODES[i % 5], seed=i, size=sizes[i % 4]) for i in range(12)]
    return {"train": [paths[i] for i in (7, 2, 9, 0, 4, 1)], "val": paths[9:12][::-1], "test": paths[:9]}


def expected(paths, preprocessing=SMALL):
    return torch.stack([preprocessing.resize(read_xray(path)) for path in paths])


def pixels(splits, folder, preprocessing=SMALL):
    """Return the images of each split, all rows."""
    files = cached(splits, preprocessing, folder)
    return {split: file.images(range(len(splits[split]))) for split, file in files.items()}


def assert_same(images, expected_images):
    assert images.keys() == expected_images.keys()
    assert all(torch.equal(images[split], expected_images[split]) for split in images)


def visible_names(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def write_waves(path, size=(1025, 1025), phase=0.0):
    """Write a JPEG with fine stripes."""
    y, x = np.mgrid[: size[0], : size[1]]
    grey = 120 + 60 * np.sin(x / 12 + y / 30 + phase) + 50 * np.cos(y / 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey.astype(np.uint8)).save(path, quality=92)
    return str(path)


def test_large_jpegs_of_odd_sizes_are_the_same_from_the_file_decoded_and_at_inference(tmp_path):
    paths = [write_waves(tmp_path / f"{side}.jpg", (side, 1025)) for side in (1025, 641, 131)]
    images = cached({"all": paths}, SMALL, tmp_path / "cache")["all"]
    rows = torch.arange(3)
    from_file, decoded = (XrayDataset(paths, rows, SMALL, images=file)[rows][0] for file in (images, None))
    assert torch.equal(from_file, decoded)
    assert torch.equal(from_file, expected(paths))


def test_each_split_has_its_images_in_its_order_bit_for_bit(splits, tmp_path):
    images = pixels(splits, tmp_path / "cache")
    assert_same(images, {split: expected(paths) for split, paths in splits.items()})
    assert images["train"].shape == (6, 1, 32, 32)
    assert images["train"].dtype == torch.uint8


def test_images_come_in_the_requested_order_with_repetitions(splits, tmp_path):
    file = cached(splits, SMALL, tmp_path / "cache")["test"]
    for rows in ([3], [8, 0, 0, 5, 8], torch.tensor([4, 2, 4])):
        assert torch.equal(file.images(rows), expected([splits["test"][row] for row in rows]))


def test_changing_a_batch_does_not_change_the_file(splits, tmp_path):
    file = cached(splits, SMALL, tmp_path / "cache")["val"]
    file.images([0, 1]).zero_()
    assert torch.equal(file.images([0, 1]), expected(splits["val"][:2]))


def spoil(path, *, later=0):
    """Fill a file with zeros, so that it is no image. Keep its size; make its time `later` nanoseconds later."""
    stat = os.stat(path)
    Path(path).write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))


def test_no_image_is_read_a_second_time(splits, tmp_path, monkeypatch):
    before = pixels(splits, tmp_path / "cache")
    monkeypatch.setattr(Preprocessing, "read", lambda self, path: pytest.fail(f"{path} is read again"))
    assert_same(pixels(splits, tmp_path / "cache"), before)


@pytest.mark.parametrize("later", [0, 1])
def test_a_changed_image_is_read_again_even_with_its_old_time(splits, tmp_path, later):
    pixels(splits, tmp_path / "cache")
    spoil(splits["val"][1], later=later)
    with pytest.raises(ValueError, match=Path(splits["val"][1]).name):
        pixels(splits, tmp_path / "cache")


def test_an_image_of_another_size_is_read_again_and_the_stale_file_removed(splits, tmp_path):
    before = pixels(splits, tmp_path / "cache")
    stale = visible_names(tmp_path / "cache")
    changed = Path(splits["train"][2])
    times = os.stat(changed)
    write(changed, size=(70, 70), seed=99)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = pixels(splits, tmp_path / "cache")
    assert not torch.equal(after["train"][2], before["train"][2])
    assert_same(after, {split: expected(paths) for split, paths in splits.items()})
    assert len(visible_names(tmp_path / "cache")) == 1
    assert visible_names(tmp_path / "cache") != stale


@pytest.mark.parametrize("link", ["folder", "file"])
def test_a_redirected_link_gives_the_images_of_its_new_target(tmp_path, link):
    time = 1_700_000_000_000_000_000
    for version in (1, 2):  # same names, sizes and times
        path = tmp_path / f"v{version}" / "x.bmp"
        write(path, seed=version)
        os.utime(path, ns=(time, time))
    now = tmp_path / "now"
    path = now / "x.bmp" if link == "folder" else now
    for version in (1, 2):
        target = tmp_path / f"v{version}" / ("" if link == "folder" else "x.bmp")
        now.unlink(missing_ok=True)
        now.symlink_to(target, target_is_directory=link == "folder")
        images = pixels({"all": [str(path)]}, tmp_path / "cache")["all"]
        assert torch.equal(images, expected([tmp_path / f"v{version}" / "x.bmp"]))
    assert len(visible_names(tmp_path / "cache")) == 1


def test_an_added_image_is_decoded_too(splits, tmp_path):
    pixels(splits, tmp_path / "cache")
    more = splits | {"val": [*splits["val"], write(tmp_path / "data" / "new.png", seed=50)]}
    assert_same(pixels(more, tmp_path / "cache"), {split: expected(paths) for split, paths in more.items()})


class Half:
    """A masking with its own key: it blackens the left or the right half."""

    def __init__(self, side):
        self.key = side

    def __call__(self, image):
        columns = np.arange(image.shape[1]) < image.shape[1] / 2
        return np.where(columns == (self.key == "left"), 0, image).astype(np.uint8)


def test_another_size_or_masking_has_a_file_of_its_own(splits, tmp_path):
    for number, other in enumerate(
        [SMALL]
        + [Preprocessing(48, SMALL.mean, SMALL.std)]
        + [Preprocessing(32, SMALL.mean, SMALL.std, lungs=Half(side)) for side in ("left", "right")],
        start=1,
    ):
        expected_images = {split: expected(paths, other) for split, paths in splits.items()}
        assert_same(pixels(splits, tmp_path / "cache", other), expected_images)
        assert len(visible_names(tmp_path / "cache")) == number


def test_unreadable_images_are_named_and_counted_and_leave_no_file(splits, tmp_path):
    bad = splits["val"][0]
    spoil(bad)
    with pytest.raises(ValueError, match=rf"^{bad} is not an image[^()]*$"):
        pixels(splits, tmp_path / "cache")
    others = {bad, *splits["train"][:2]}
    for path in others:
        spoil(path)
    with pytest.raises(ValueError, match=rf"is not an image .* \({len(others)} such images"):
        pixels(splits, tmp_path / "cache")
    assert visible_names(tmp_path / "cache") == []


def test_a_missing_image_is_named(splits, tmp_path):
    missing = splits["train"].pop()
    os.unlink(missing)
    splits["test"].append(missing)
    with pytest.raises(FileNotFoundError, match=missing):
        pixels(splits, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("left", [0, 60, 128, 2000, -1, "more"])
def test_a_file_of_wrong_length_is_made_again(splits, tmp_path, left):
    before = pixels(splits, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    content = file.read_bytes()
    file.write_bytes(content + b"x" if left == "more" else content[:left])
    assert_same(pixels(splits, tmp_path / "cache"), before)
    assert file.read_bytes() == content


@pytest.mark.parametrize("lost", ["everything", "one image", "one bit", "a checksum"])
def test_a_damaged_image_is_refused(splits, tmp_path, lost):
    images = cached(splits, SMALL, tmp_path / "cache")["test"]
    images_before = images.images(range(9))
    (file,) = (tmp_path / "cache").glob("*.npy")
    records = np.load(file, mmap_mode="r+")
    place = sorted({path for split in splits.values() for path in split}).index(splits["test"][3])
    if lost == "everything":
        records[:] = 0
    elif lost == "one image":
        records["pixels"][place] = 0
    elif lost == "one bit":
        records["pixels"][place, 5, 7] ^= 1
    else:
        records["checksum"][place] = 0
    records.flush()
    images = cached(splits, SMALL, tmp_path / "cache")["test"]
    with pytest.raises(ValueError, match=rf"^{file} is damaged, [^\n]*: delete it[^\n]*$"):
        images.images([2, 3])
    file.unlink()
    assert torch.equal(cached(splits, SMALL, tmp_path / "cache")["test"].images(range(9)), images_before)


@pytest.mark.parametrize("blocked", ["a file in its place", "a file above it"])
def test_an_impossible_folder_is_named_in_one_line(splits, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / ("cache" if "above" in blocked else "")
    with pytest.raises(CacheFailed, match=rf"^cannot write {folder}: [^\n]+$"):
        pixels(splits, folder)


# --- in other processes ---

MAKE = """
import os, signal, sys, threading, time
from hashlib import sha256
from pathlib import Path
from training.image_cache import cached
from utils import Preprocessing

class Slow:
    key, calls, alone = "slow", 0, threading.Lock()

    def __call__(self, image):
        with self.alone:
            self.calls += 1
            if self.calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.005)
        return image

folder, names, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
slow, paths = Slow(), sorted(map(str, names.glob("*.png")))
print("ready", flush=True)
sys.stdin.readline()
file = cached({"all": paths}, Preprocessing(96, (0.5,) * 3, (0.2,) * 3, lungs=slow), folder)["all"]
print(sha256(file.images(range(len(paths))).numpy()).hexdigest(), slow.calls)
"""
NUMBER = 300


class Quick:
    """Masks nothing, like `Slow` in the other processes, and has the same key."""

    key = "slow"

    def __call__(self, image):
        return image


MADE = Preprocessing(96, (0.5,) * 3, (0.2,) * 3, lungs=Quick())


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder with 300 hard links to one X-ray, and its resized pixels."""
    folder = tmp_path_factory.mktemp("many")
    first = write(folder / "0.png")
    for i in range(1, NUMBER):
        os.link(first, folder / f"{i}.png")
    return folder, MADE.resize(read_xray(first))


def start(*processes, last=0):
    """Start a process for each pair (cache folder, image folder); after their imports, let all decode at once.

    Each process kills itself at its image number `last`.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, str(folder), str(names), str(last)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for folder, names in processes
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return started


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_kill_while_images_are_decoded_leaves_no_complete_file(many, tmp_path):
    (names, image), folder = many, tmp_path / "cache"
    (killed,) = start((folder, names), last=NUMBER // 3)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (left,) = visible_names(folder)
    assert left.endswith(".part")
    images = pixels({"all": sorted(map(str, names.glob("*.png")))}, folder, MADE)["all"]
    assert torch.equal(images, image.expand(NUMBER, 1, 96, 96))
    assert [Path(name).suffix for name in visible_names(folder)] == [".npy"]


def test_one_of_two_processes_decodes_and_both_have_the_images(many, tmp_path):
    (names, image), folder = many, tmp_path / "cache"
    outputs = [process.communicate() for process in start((folder, names), (folder, names))]
    digests, calls = zip(*[output.splitlines()[-1].split() for output, _ in outputs], strict=True)
    expected_images = image.expand(NUMBER, 1, 96, 96).contiguous().numpy()
    assert digests == (sha256(expected_images).hexdigest(),) * 2, outputs
    assert sorted(map(int, calls)) == [0, NUMBER]
    assert len(visible_names(folder)) == 1


FULL = """
import os, resource, sys
from pathlib import Path
from training.image_cache import CacheFailed, cached
from utils import Preprocessing

def make(room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        file = cached({"all": paths}, Preprocessing(96, (0.5,) * 3, (0.2,) * 3), folder)["all"]
        print("made of", len(file.images(range(len(paths)))))
    except CacheFailed as error:
        print(error)
        assert {path.suffix for path in folder.iterdir()} <= {".lock"}

folder, names = map(Path, sys.argv[1:])
paths = sorted(map(str, names.glob("*.png")))
make(0)
make(100_000)
del os.posix_fallocate  # without it decoding begins, and writing fails
make(100_000)
make(resource.RLIM_INFINITY)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs limits to the size of files, and fallocate")
def test_a_full_disk_is_named_in_a_line_and_leaves_no_file(many, tmp_path):
    folder = tmp_path / "cache"
    made = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(many[0])], cwd=PROJECT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    printed = (line for line in made.stdout.splitlines() if ": decoding " not in line)
    at_once, reserving, writing, last = printed
    assert at_once == f"cannot write {folder}: File too large"
    assert reserving == f"no room for 0.0028 GB of images in {folder}: File too large"
    assert writing == f"cannot write {folder}: File too large"
    assert last == f"made of {NUMBER}"


WALK = """
import resource, sys
import numpy as np
from pathlib import Path
from training.image_cache import ImageFile

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

number = 4_000
names = [str(row) for row in range(number)]
file = ImageFile(Path(sys.argv[1]), names, names)
order = np.random.default_rng(0).permutation(number)
before, most, total = resident(), 0, 0
for start in range(0, number, 50):
    total += int(file.images(order[start : start + 50]).numpy().sum(dtype=np.int64))
    most = max(most, resident() - before)
print(total, most)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process in /proc")
def test_reading_a_large_file_does_not_fill_the_memory_of_the_process(tmp_path):
    file, rows = tmp_path / "large.npy", np.arange(4_000, dtype=np.uint8)
    record = np.dtype([("pixels", np.uint8, (224, 224)), ("checksum", "<u4")])
    large = np.lib.format.open_memmap(file, "w+", record, (4_000,), version=(1, 0))
    large["pixels"] = rows[:, None, None]
    large["checksum"] = [zlib.crc32(np.full(224 * 224, row % 256, np.uint8)) for row in range(4_000)]
    large.flush()
    walked = subprocess.run([sys.executable, "-c", WALK, str(file)], cwd=PROJECT, capture_output=True, text=True)
    assert walked.returncode == 0, walked.stderr
    total, most = map(int, walked.stdout.split())
    assert total == rows.sum(dtype=np.int64) * 224 * 224
    assert most < file.stat().st_size / 5


# --- in a training ---


def test_a_training_without_room_for_the_file_prints_it_and_gives_the_same_network(
    tiny_study, trained_run, tmp_path, capsys
):
    assert list((trained_run.parent.parent / "image_cache").glob("*-64px-*.npy"))
    (tmp_path / "image_cache").write_text("in the way")
    capsys.readouterr()
    folder = fine_tune_study(tiny_study, load_table(tiny_study), "resnet18", runs=tmp_path, device="cpu")
    printed = capsys.readouterr().out
    assert f"cannot write {tmp_path / 'image_cache'}" in printed
    assert "decoded anew in every epoch" in printed
    assert (folder / "model.safetensors").read_bytes() == (trained_run / "model.safetensors").read_bytes()


STUDY = """
title = "Large JPEGs"
data = { reader = "covid_radiography", root = "xrays" }
split = { val = 0.25, test = 0.25 }
preprocessing = { image_size = 64 }
training = { weights = "none", epochs = 1, learning_rate = 1e-3, precision = "fp32" }
networks.lenet5 = {}
"""


def test_a_training_on_a_damaged_file_fails_without_a_network(phantom_root, tmp_path):
    (tmp_path / "xrays").symlink_to(phantom_root)
    (tmp_path / "zeroed.toml").write_text(STUDY)
    study, runs = load_study(tmp_path / "zeroed.toml"), tmp_path / "runs"
    fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu")
    (file,) = (runs / "image_cache").glob("*.npy")
    before = file.stat()
    np.load(file, mmap_mode="r+")[:] = 0
    assert file.stat().st_size == before.st_size
    shutil.rmtree(runs / "zeroed")
    with pytest.raises(ValueError, match="is damaged"):
        fine_tune_study(study, load_table(study), "lenet5", runs=runs, device="cpu")
    assert not list(runs.rglob("model.json"))


def test_a_training_writes_the_probabilities_that_overlay_cam_gives(tmp_path, capsys):
    for number in range(8):
        for place, name in enumerate(("COVID", "Normal")):
            file = tmp_path / "xrays" / name / "images" / f"{name}-{number}.jpg"
            write_waves(file, (1025, 641), phase=number + place / 2)
    (tmp_path / "large.toml").write_text(STUDY)
    study = load_study(tmp_path / "large.toml")
    run = fine_tune_study(study, load_table(study), "lenet5", runs=tmp_path / "runs", device="cpu")
    trained, written = load_network(run), pd.read_csv(run / "predictions_test.csv")
    paths = [tmp_path / "xrays" / path for path in written["path"]]
    capsys.readouterr()
    assert main(["-m", str(run), "-o", str(tmp_path / "out"), "--json", "-i", *map(str, paths)]) == 0
    answers = json.loads(capsys.readouterr().out)
    for (_, row), path, answer in zip(written.iterrows(), paths, answers, strict=True):
        probabilities = row[list(trained.card.classes)].to_numpy(float)
        np.testing.assert_allclose(explain(trained, read_xray(path)).probabilities, probabilities, atol=1e-5)
        np.testing.assert_allclose(list(answer["probabilities"].values()), probabilities, atol=6e-5)  # four digits
