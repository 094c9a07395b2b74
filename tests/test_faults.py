"""main.py alone, as a user runs it: asked to stop in every phase, on a full disk, with numbers that explode."""

import contextlib
import json
import signal
import subprocess

import numpy as np
import processes
import pytest

from deit import checkpoint, summaries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOTAL = 12
FLAGS = processes.scratch(total=TOTAL, micro_batch=16)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        assert process.code() == 0, process.output()
    return processes.final(workdir)


def stopped_at(process):
    """Return after which update a process stopped with exit code 42."""
    assert process.code() == 42, process.output()
    return int(process.wait_for(r"stopped after update (\d+) of")[1])


def test_asked_to_stop_in_every_phase_it_saves_leaves_with_42_and_goes_on_to_the_same_bits(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        process.wait_for(r"plan of")  # before the first update: nothing is there to be saved
        process.send(signal.SIGINT)
        assert process.code() == 42, process.output()
        assert "SIGINT: nothing is there to be saved" in process.output()
        assert not (workdir / "checkpoints").exists()
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        process.wait_for(r"update 3/")
        process.send(signal.SIGTERM)
        step = stopped_at(process)
        assert step >= 4 and checkpoint.step_of(checkpoint.newest(workdir, set_aside=False)) == step
        assert "SIGTERM: the run is saved after the update under way" in process.output()
    with processes.main(*FLAGS, "--config.checkpoint.every_updates=1", f"--workdir={workdir}") as process:
        process.wait_for(r"continuing")
        while not any((workdir / "checkpoints").glob("tmp-[0-9]*")) and process.process.poll() is None:
            pass  # it is there for milliseconds
        process.send(signal.SIGTERM)  # while it saves
        step = stopped_at(process)
        assert checkpoint.step_of(checkpoint.newest(workdir, set_aside=False)) == step
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        process.wait_for(r"evaluating after update (5|10|12)\b")
        process.send(signal.SIGTERM)
        process.send(signal.SIGINT)
        step = stopped_at(process)
        assert checkpoint.step_of(checkpoint.newest(workdir, set_aside=False)) == step
        assert "SIGINT again: ignored" in process.output()
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        assert process.code() == 0, process.output()
    assert processes.final(workdir) == undisturbed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own: room for four checkpoints and one more."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_disk_that_fills_up_costs_checkpoints_and_not_the_run_and_the_log_is_whole(undisturbed, small_disk):
    workdir = small_disk / "run"
    with processes.main(*FLAGS, f"--workdir={workdir}") as process:
        process.wait_for(r"update 2/")
        filler = small_disk / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(b"0" * 4096):
                    pass
            except OSError as error:
                assert error.strerror == "No space left on device"
        process.wait_for(r"error: .*was not written.*training goes on")
        filler.unlink()
        assert process.code() == 0, process.output()
    assert processes.final(workdir) == undisturbed
    assert all(checkpoint.verify(path) is None for path in (workdir / "checkpoints").glob("step-*"))


def test_numbers_that_explode_end_with_4_and_leave_what_is_finite_and_which_pictures_it_were(tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.optim.peak_lr=1e18", "--config.optim.warmup_epochs=0", "--config.max_skipped=3"]
    with processes.main(*FLAGS, *flags, f"--workdir={workdir}") as process:
        assert process.code() == 4, process.output()
    assert "3 updates in a row were skipped (max_skipped)" in process.output()
    for path in (workdir / "checkpoints").glob("step-*"):
        assert all(np.isfinite(tensor).all() for tensor in checkpoint.read(path)[0].values())
    dumps = sorted((workdir / "skipped").glob("update-*.json"))
    assert len(dumps) >= 3
    told = json.loads(dumps[0].read_text())
    first = (told["update"] - 1) * 32
    assert told["offending"] and all(first <= each["position"] < first + 32 for each in told["offending"])


def test_killed_at_drawn_moments_while_every_update_is_saved_the_run_is_the_undisturbed_one(undisturbed, tmp_path):
    """Three kills of three runs of twelve updates; docs/reliability.md has the figure of twenty of a longer run."""
    draws, workdir = np.random.default_rng(0), tmp_path / "run"
    flags = [*FLAGS, "--config.checkpoint.every_updates=1", f"--workdir={workdir}"]
    for first in (1, 4, 7):  # each process gets beyond where the one before was killed
        with processes.main(*flags) as process:
            process.wait_for(rf"update [{first}-9]/")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(timeout=draws.uniform(0, 0.1))
            process.send(signal.SIGKILL)
            assert process.code() == -signal.SIGKILL, process.output()
    with processes.main(*flags) as process:
        assert process.code() == 0, process.output()
    assert processes.final(workdir) == undisturbed
    lines = summaries.read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
