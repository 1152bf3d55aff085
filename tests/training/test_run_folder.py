"""The run folder of a training belongs to one process at a time."""

import multiprocessing

import pytest

from training.run_folder import training_folder


def hold(folder, ready):
    """Hold a run folder for training until this process is killed."""
    with training_folder(folder, restart=False):
        ready.set()
        multiprocessing.Event().wait()


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path):
    folder, start = tmp_path / "study" / "net", multiprocessing.get_context("fork")
    for _ in range(2):  # the second time the lock file exists
        ready = start.Event()
        first = start.Process(target=hold, args=(folder, ready))
        first.start()
        assert ready.wait(30)
        with (
            pytest.raises(ValueError, match=rf"process \(number {first.pid} on .*\) is training into .*net"),
            training_folder(folder, restart=True),
        ):
            pass
        assert (folder / "resume" / "process").is_file()
        first.kill()
        first.join()
        with training_folder(folder, restart=False) as working:
            (working / "state.pt").write_text("an epoch")
        assert [path.name for path in folder.parent.iterdir()] == ["net"]  # the lock file is in another folder


def test_a_training_without_a_saved_state_leaves_no_folder(tmp_path):
    with training_folder(tmp_path / "study" / "net", restart=False) as working:
        (working / "history.csv").write_text("epoch")
    assert not list((tmp_path / "study").iterdir())
