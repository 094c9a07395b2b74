"""A disk that fills up under a run: a file-size limit, a real small file system."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deit import checkpoint, commit, errors, saver, summaries


def child(code: str, workdir: Path, size: int) -> subprocess.CompletedProcess:
    """Run Python code with workdir and size as its arguments."""
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(workdir), str(size)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


TRAINING = """
    import resource, sys
    import numpy as np
    from deit.saver import Saver
    from deit.summaries import Summaries

    saver = Saver(sys.argv[1], config_json="{}", keep=2, keep_every=0, max_failed=0, versions={})
    writer = Summaries(sys.argv[1], start_step=-1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 6):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), unlimited[1]))
        writer.scalars(step, {"train/loss": 1 / step})
        reason = writer.flush()
        if reason:
            saver.fail(step, reason)
        else:
            saver.save(step, {"a": np.full([50_000], step, np.float32)}, metrics={})
        saver.wait()
        print("failed" if saver.failed_in_row else "saved", step)
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saver.finish()
    writer.close()
"""


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (100_000, "File too large"),  # half the checkpoint's 200 kB
        (75, r"metrics.jsonl can't be written: File too large"),  # within the third line
    ],
)
def test_a_save_above_the_limit_of_file_size_fails_and_the_next_one_is_read_back(tmp_path, size, reason):
    done = child(TRAINING, tmp_path, size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["saved 1", "saved 2", "failed 3", "saved 4", "saved 5", ""]
    assert f"step 3 was not written to {tmp_path / 'checkpoints'} (" in done.stderr
    assert reason in done.stderr
    assert "training goes on, the newest is step 2" in done.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    values, manifest = checkpoint.read(checkpoint.newest(tmp_path, set_aside=True))
    assert manifest["step"] == 5
    np.testing.assert_array_equal(values["a"], np.full([50_000], 5, np.float32))
    assert [line["step"] for line in whole_lines(tmp_path)] == [1, 2, 3, 4, 5]


def whole_lines(workdir: Path) -> list[dict]:
    """Return metrics.jsonl's lines; every one must be whole."""
    data = (workdir / "metrics.jsonl").read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Return a file system of 1 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` here: a full disk is played by limits and stand-ins only")
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here ({done.stderr.strip()}): it takes root's rights")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Fill the file system but for `leave` bytes and return the file that does; its removal is the room again."""
    path = disk / "filler"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - leave)
    return path


def messages(caplog, level: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == level]


def test_on_a_full_file_system_lines_wait_and_are_written_whole_and_in_order(disk, caplog):
    caplog.set_level("INFO", logger="absl")
    writer = summaries.Summaries(disk, start_step=-1)
    numbers = {f"train/{name}": 1 / 3 for name in "abc"}
    for step in range(1, 11):
        writer.scalars(step, numbers)
    assert writer.flush() == ""
    filler = fill(disk)
    for step in range(11, 301):  # 25 kB: the last page takes a part of a line
        writer.scalars(step, numbers)
    steps = [line["step"] for line in whole_lines(disk)]
    assert steps == [*range(1, len(steps) + 1)]
    assert 10 <= len(steps) < 100
    assert writer.flush() == f"{disk / 'metrics.jsonl'} can't be written: No space left on device"
    filler.unlink()
    writer.scalars(301, numbers)
    assert whole_lines(disk) == [{"step": step, **numbers} for step in range(1, 302)]
    assert writer.flush() == ""
    writer.scalars(302, numbers)
    writer.close()
    assert len(whole_lines(disk)) == 302
    about_lines = [line for line in messages(caplog, "ERROR") if "metrics.jsonl" in line]
    about_events = [line for line in messages(caplog, "ERROR") if "TensorBoard" in line]
    assert (len(about_lines), len(about_events)) == (1, 1)
    (again,) = messages(caplog, "INFO")
    assert again == f"{disk / 'metrics.jsonl'} can be written again: no line is missing"


def test_a_run_that_ends_on_a_full_file_system_ends_in_order_and_says_what_is_lost(disk, caplog):
    writer = summaries.Summaries(disk, start_step=-1)
    fill(disk)
    for step in range(1, 301):
        writer.scalars(step, {"train/loss": 1 / 3})
    writer.close()
    assert whole_lines(disk) == [{"step": step, "train/loss": 1 / 3} for step in range(1, len(whole_lines(disk)) + 1)]
    assert "the last lines are lost" in messages(caplog, "ERROR")[-1]


def state(step: int) -> dict[str, np.ndarray]:
    return {"student/a": np.full([50_000], step, np.float32)}  # 200 kB


@pytest.mark.parametrize("looks", [True, False], ids=["before the save", "in the midst of it"])
def test_a_full_file_system_keeps_the_old_checkpoint_and_takes_the_next_when_there_is_room(disk, monkeypatch, looks):
    """Room is looked for before; a disk that another process fills meanwhile is met by the write itself."""
    if not looks:
        monkeypatch.setattr(commit, "ROOM", 0.0)
    writer = saver.Saver(disk, config_json="{}", keep=1, keep_every=0, max_failed=0, versions={})
    writer.save(1, state(1), metrics={})
    writer.finish()
    filler = fill(disk, leave=100_000)
    free = os.statvfs(disk).f_bavail
    for step in (2, 3):
        writer.save(step, state(step), metrics={})
        writer.wait()
    assert writer.failed_in_row == 2
    reason = "bytes are free" if looks else "No space left on device"
    with pytest.raises(errors.UserError, match=rf"step 3 was not written .*{reason}.*continues from step 1$"):
        writer.finish()
    assert os.listdir(disk / "checkpoints") == ["step-00000001"]
    assert os.statvfs(disk).f_bavail == free  # what was begun is removed
    assert checkpoint.newest(disk, set_aside=True).name == "step-00000001"
    filler.unlink()
    writer.save(4, state(4), metrics={})
    writer.finish()
    assert os.listdir(disk / "checkpoints") == ["step-00000004"]
    values, _ = checkpoint.read(checkpoint.newest(disk, set_aside=True))
    np.testing.assert_array_equal(values["student/a"], state(4)["student/a"])


def test_a_run_can_be_continued_on_a_full_file_system_once_there_is_room(disk):
    """Nothing of an outage is in the way of the next start: neither torn lines nor half-done saves."""
    writer = summaries.Summaries(disk, start_step=-1)
    saving = saver.Saver(disk, config_json="{}", keep=1, keep_every=0, max_failed=0, versions={})
    writer.scalars(1, {"train/loss": 0.5})
    assert writer.flush() == ""
    saving.save(1, state(1), metrics={})
    saving.finish()
    filler = fill(disk)
    for step in range(2, 200):
        writer.scalars(step, {"train/loss": 0.5})
    saving.fail(199, writer.flush())
    writer.close()
    filler.unlink()
    again = summaries.Summaries(disk, start_step=1)
    again.scalars(2, {"train/loss": 0.25})
    again.close()
    assert whole_lines(disk) == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}]
    saving = saver.Saver(disk, config_json="{}", keep=1, keep_every=0, max_failed=0, versions={})
    saving.save(2, state(2), metrics={})
    saving.finish()
    assert checkpoint.newest(disk, set_aside=True).name == "step-00000002"
