"""Checkpoint files: what a kill, a bit flip or a full disk may do to them, and what is found afterwards."""

import builtins
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from deit import checkpoint, errors
from deit import saver as saving
from deit import workdir as run_directory

VERSIONS = {"numpy": "1"}


def tensors(step: int) -> dict[str, np.ndarray]:
    """Return a small state that depends on `step` alone."""
    values = np.random.default_rng(step).normal(size=[7, 11]).astype(np.float32)
    return {
        "student/blocks/3/attn/qkv/kernel": values,
        "optimizer/m/transposed": values.T,  # not contiguous
        "student/empty": np.zeros([0, 3], np.float32),
        "step": np.array(step, np.int64),
    }


def saver(workdir: Path, *, keep: int = 10, keep_every: int = 0, max_failed: int = 0) -> saving.Saver:
    return saving.Saver(
        workdir,
        config_json='{"seed": 0}',
        keep=keep,
        keep_every=keep_every,
        max_failed=max_failed,
        versions=VERSIONS,
    )


def save(workdir: Path, *steps: int, scores: dict[int, float] | None = None, **options) -> None:
    """Save and commit a checkpoint of each step."""
    writer = saver(workdir, **options)
    for step in steps:
        writer.save(step, tensors(step), metrics={"eval/top1": scores[step]} if scores else {})
    writer.finish()


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_is_saved_is_read_back(tmp_path):
    writer = saver(tmp_path)
    writer.save(1200, tensors(1200), metrics={"eval/top1": 0.5, "train/loss": float("nan")})
    writer.finish()
    path = checkpoint.newest(tmp_path, set_aside=True)
    assert path == tmp_path / "checkpoints" / "step-00001200"
    read, manifest = checkpoint.read(path)
    assert read.keys() == tensors(1200).keys()
    for name, value in tensors(1200).items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        np.testing.assert_array_equal(read[name], value)
    assert manifest["step"] == 1200
    assert manifest["versions"] == VERSIONS
    assert manifest["metrics"] == {"eval/top1": 0.5, "train/loss": None}
    assert manifest["state_sha256"] == checkpoint.state_sha256(tensors(1200))
    data = (path / "tensors.safetensors").read_bytes()
    recorded = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"]["tensors.safetensors"] == recorded
    assert checkpoint.read_config(path) == '{"seed": 0}'
    assert checkpoint.manifest(path) == manifest


def test_state_sha256_is_that_of_its_written_definition():
    def framed(header: bytes, data: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + len(data).to_bytes(8, "little") + data

    state = {"b": np.array(7, np.int64), "a": np.array([[1.0, 2.0]], np.float32)}
    expected = framed(b'["a", "float32", [1, 2]]', bytes.fromhex("0000803f00000040"))
    expected += framed(b'["b", "int64", []]', b"\x07" + bytes(7))
    assert checkpoint.state_sha256(state) == hashlib.sha256(expected).hexdigest()


def test_state_sha256_sees_name_dtype_shape_and_value_but_not_layout():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    digest = checkpoint.state_sha256({"a": value})
    others = [
        {"b": value},
        {"a": value.reshape(3, 2)},
        {"a": value.view(np.int32)},
        {"a": value + np.float32(1e-6)},
        {"a": value, "b": np.zeros([0], np.float32)},
        {},
    ]
    assert len({digest, *map(checkpoint.state_sha256, others)}) == 1 + len(others)
    assert checkpoint.state_sha256({"a": np.asfortranarray(value)}) == digest


def rewrite_manifest(path: Path, change, *, seal: bool) -> None:
    """Change manifest.json; with `seal` its own sha256 is put right, as a forger or a bug would."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    if seal:
        content.pop("manifest_sha256")
        text = json.dumps(content, sort_keys=True).encode()
        content["manifest_sha256"] = hashlib.sha256(text).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content))


def truncate(name: str, size) -> None:
    return lambda path: os.truncate(path / name, size((path / name).stat().st_size))


def flip(name: str, where: float):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        (path / name).write_bytes(data)

    return damage


SURGERY = {
    "data empty": (truncate("tensors.safetensors", lambda n: 0), "has 0 bytes"),
    "data halved": (truncate("tensors.safetensors", lambda n: n // 2), "bytes, not"),
    "data without its last byte": (truncate("tensors.safetensors", lambda n: n - 1), "bytes, not"),
    "data longer": (truncate("tensors.safetensors", lambda n: n + 1), "bytes, not"),
    "bit of the data's header": (flip("tensors.safetensors", 0.0), "another sha256"),
    "bit of the data's middle": (flip("tensors.safetensors", 0.5), "another sha256"),
    "bit of the data's end": (flip("tensors.safetensors", 1.0), "another sha256"),
    "bit of the config": (flip("config.json", 0.4), "another sha256"),
    "data deleted": (lambda path: (path / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "config deleted": (lambda path: (path / "config.json").unlink(), "config.json is missing"),
    "manifest deleted": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (truncate("manifest.json", lambda n: 0), "malformed"),
    "manifest halved": (truncate("manifest.json", lambda n: n // 2), "malformed"),
    "manifest another JSON": (lambda path: (path / "manifest.json").write_text("[1]"), "malformed"),
    "manifest not UTF-8": (lambda path: (path / "manifest.json").write_bytes(b"\xff{}"), "malformed"),
    "data a directory": (
        lambda path: [(path / "config.json").unlink(), (path / "config.json").mkdir()],
        "config.json",
    ),
    "everything deleted": (
        lambda path: [file.unlink() for file in path.iterdir()],
        "manifest.json is missing",
    ),
    "wrong sha256": (
        lambda path: rewrite_manifest(path, lambda m: m["files"]["config.json"].update(sha256="0" * 64), seal=True),
        "config.json has another sha256",
    ),
    "a file not listed": (
        lambda path: rewrite_manifest(path, lambda m: m["files"].pop("config.json"), seal=True),
        "malformed",
    ),
    "wrong sha256 of the data": (
        lambda path: rewrite_manifest(
            path, lambda m: m["files"]["tensors.safetensors"].update(sha256="0" * 64), seal=True
        ),
        "tensors.safetensors has another sha256",
    ),
    "the checkpoint of another step": (
        lambda path: [shutil.rmtree(path), shutil.copytree(path.with_name("step-00000002"), path)],
        "is of step 2",
    ),
    "a file in its place": (lambda path: [shutil.rmtree(path), path.write_bytes(b"")], "no such directory"),
    "another step": (
        lambda path: rewrite_manifest(path, lambda m: m.update(step=2), seal=True),
        "is of step 2",
    ),
    "metrics changed": (
        lambda path: rewrite_manifest(path, lambda m: m.update(metrics={"eval/top1": 1.0}), seal=False),
        "contradicts its own sha256",
    ),
}


@pytest.mark.parametrize("case", SURGERY)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path, case, caplog):
    save(tmp_path, 1, 2, 3)
    damage, reason = SURGERY[case]
    path = tmp_path / "checkpoints" / "step-00000003"
    damage(path)
    assert reason in checkpoint.verify(path)
    with pytest.raises(errors.UserError, match="is damaged"):
        checkpoint.read(path)
    with pytest.raises(errors.UserError, match="is damaged"):
        checkpoint.read_config(path)

    assert checkpoint.newest(tmp_path, set_aside=False).name == "step-00000002"
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000002"
    assert names(tmp_path) == ["corrupt-00000003", "step-00000001", "step-00000002"]
    loud = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("step-00000003" in line and reason in line for line in loud)

    save(tmp_path, 3)  # the run arrives there again
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000003"


def test_a_file_that_is_not_the_checkpoint_s_own_is_no_damage(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-00000002" / ".nfs0001").write_bytes(b"x")
    (tmp_path / "checkpoints" / "notes.txt").write_text("step-00000003")
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000002"


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001"
    good = (path / "manifest.json").read_bytes()
    content = json.loads(good)
    for i in range(len(good)):
        data = bytearray(good)
        data[i] ^= 4
        (path / "manifest.json").write_bytes(data)
        try:
            same = json.loads(bytes(data)) == content  # a flip in the white space changes nothing
        except ValueError:
            same = False
        assert (checkpoint.verify(path) is None) == same, i


def test_a_second_damage_of_the_same_step_gets_its_own_name(tmp_path):
    for _ in range(2):
        save(tmp_path, 1, 2)
        flip("tensors.safetensors", 0.5)(tmp_path / "checkpoints" / "step-00000002")
        assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    assert names(tmp_path) == ["corrupt-00000002", "corrupt-00000002-1", "step-00000001"]


def test_where_none_verifies_the_run_stops_and_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints").iterdir():
        flip("tensors.safetensors", 0.5)(path)
    before = contents(tmp_path)
    for _ in range(2):  # the second start must not find an empty directory either
        with pytest.raises(errors.UserError, match=r"none is overwritten \(step-00000002: .*step-00000001: "):
            checkpoint.newest(tmp_path, set_aside=True)
        assert contents(tmp_path) == before


def test_with_only_set_aside_checkpoints_the_run_does_not_start_from_scratch(tmp_path):
    save(tmp_path, 1, 2)
    flip("config.json", 0.5)(tmp_path / "checkpoints" / "step-00000002")
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(errors.UserError, match="corrupt-00000002: set aside earlier"):
        checkpoint.newest(tmp_path, set_aside=True)


def test_a_run_without_any_checkpoint_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", set_aside=True) is None
    saver(tmp_path)
    assert checkpoint.newest(tmp_path, set_aside=True) is None


def test_steps_are_ordered_as_numbers_beyond_eight_digits(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000)
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-100000000"


def test_a_failing_rename_leaves_the_old_checkpoint_newest(tmp_path, monkeypatch):
    writer = saver(tmp_path)
    writer.save(1, tensors(1), metrics={})
    writer.finish()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        writer.save(2, tensors(2), metrics={})
        with pytest.raises(errors.UserError, match=r"step 2 was not written .*No space left on device"):
            writer.finish()
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    writer.save(2, tensors(2), metrics={})
    writer.finish()
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000002"


@pytest.mark.parametrize("asked", ["save", "finish", "fail"])
def test_a_programming_error_is_raised_by_the_next_call_and_once(tmp_path, asked, caplog):
    writer = saver(tmp_path)
    writer.save(1, {"a": np.array([object()])}, metrics={})
    calls = {
        "save": lambda: writer.save(2, tensors(2), metrics={}),
        "finish": writer.finish,
        "fail": lambda: writer.fail(2, "no log"),
    }
    writer.wait()  # raises nothing, and does not hide it
    assert "object" in caplog.text
    with pytest.raises(Exception) as caught:
        calls[asked]()
    assert not isinstance(caught.value, errors.UserError)
    assert "object" in str(caught.value).lower()
    writer.finish()
    assert names(tmp_path) == []


def no_room(monkeypatch, *, free: int = 0) -> None:
    """Let every file system have so many bytes free."""
    real = os.statvfs

    def statvfs(path):
        found = real(path)
        fields = list(found)[:10]
        fields[1], fields[3], fields[4] = 1, free + 1000, free  # f_frsize, f_bfree (root's), f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)


def errors_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_without_room_no_save_is_begun_and_training_goes_on(tmp_path, monkeypatch, caplog):
    writer = saver(tmp_path)
    writer.save(1, tensors(1), metrics={})
    writer.wait()
    size = sum(array.nbytes + 256 for array in tensors(2).values()) + len('{"seed": 0}')
    needed = math.ceil(1.2 * size)
    with monkeypatch.context() as patch:
        no_room(patch, free=needed - 1)
        writer.save(2, tensors(2), metrics={})
        writer.wait()
        writer.save(3, tensors(3), metrics={})
        writer.wait()
        assert writer.failed_in_row == 2
        assert names(tmp_path) == ["step-00000001"]
        with pytest.raises(
            errors.UserError,
            match=r"^checkpoint of step 3 was not written .*: the run is not complete on disk: free space and run the "
            r"same command, it continues from step 1$",
        ):
            writer.finish()
        no_room(patch, free=needed)
        writer.save(4, tensors(4), metrics={})
        writer.finish()
    assert writer.failed_in_row == 0
    assert names(tmp_path) == ["step-00000001", "step-00000004"]
    first, second = errors_of(caplog)
    assert first == (
        f"checkpoint of step 2 was not written to {tmp_path / 'checkpoints'} ({needed - 1:,} bytes are free, "
        f"{needed:,} are needed): training goes on, the newest is step 1"
    )
    assert second.startswith("checkpoint of step 3")


def test_a_save_sweeps_what_a_failed_one_left_before_it_looks_for_room(tmp_path, monkeypatch):
    writer = saver(tmp_path)
    stale = tmp_path / "checkpoints" / "tmp-00000001"
    stale.mkdir()
    (stale / "tensors.safetensors").write_bytes(b"x")
    no_room(monkeypatch)
    writer.save(2, tensors(2), metrics={})
    writer.wait()
    assert names(tmp_path) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_never_committed(tmp_path, bad, caplog):
    writer = saver(tmp_path)
    state = tensors(1)
    state["student/blocks/3/attn/qkv/kernel"][3, 4] = bad
    state["student/half"] = np.array([bad, bad], np.float16)
    writer.save(1, state, metrics={})
    with pytest.raises(errors.UserError, match=r"not complete on disk: run it again, it begins anew$"):
        writer.finish()
    (line,) = errors_of(caplog)
    assert "the state is not finite: 1 of 77 elements of student/blocks/3/attn/qkv/kernel)" in line
    assert line.endswith("training goes on, there is none yet")
    assert names(tmp_path) == []


def test_after_max_failed_failures_in_a_row_the_next_call_raises(tmp_path, monkeypatch):
    writer = saver(tmp_path, max_failed=2)
    writer.save(1, tensors(1), metrics={})
    writer.wait()
    with monkeypatch.context() as patch:
        no_room(patch)
        writer.save(2, tensors(2), metrics={})
        writer.wait()
    writer.save(3, tensors(3), metrics={})  # the row ends
    writer.wait()
    no_room(monkeypatch)
    for step in (4, 5):
        writer.save(step, tensors(step), metrics={})
    message = r"^2 checkpoints in a row were not written \(checkpoint.max_failed\), the last: checkpoint of step 5 was"
    for _ in range(2):  # as often as it is asked
        with pytest.raises(errors.UserError, match=message + r".*are needed\); the newest is step 3$"):
            writer.save(6, tensors(6), metrics={})
    with pytest.raises(errors.UserError, match="step 5 was not written"):
        writer.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_whose_log_is_not_on_the_disk_counts_as_failed(tmp_path, caplog):
    writer = saver(tmp_path, max_failed=3)
    writer.save(1, tensors(1), metrics={})
    writer.fail(2, "metrics.jsonl can't be written: No space left on device")
    assert writer.failed_in_row == 1  # the save of step 1 was over before
    with pytest.raises(errors.UserError, match=r"step 2 was not written .*No space left.*continues from step 1$"):
        writer.finish()
    writer.fail(3, "the same")
    with pytest.raises(errors.UserError, match=r"^3 checkpoints in a row .*step 4"):
        writer.fail(4, "the same")
    assert len(errors_of(caplog)) == 3
    assert names(tmp_path) == ["step-00000001"]


def test_without_max_failed_training_goes_on_for_ever(tmp_path, monkeypatch):
    writer = saver(tmp_path)
    no_room(monkeypatch)
    for step in range(1, 30):
        writer.save(step, tensors(step), metrics={})
    writer.wait()
    assert writer.failed_in_row == 29


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_what_is_no_full_disk_is_to_be_put_right(tmp_path, monkeypatch, number):
    writer = saver(tmp_path)

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", fails)
    writer.save(1, tensors(1), metrics={})
    with pytest.raises(
        errors.UserError, match=rf"\({os.strerror(number)}\): .*put that right and run the same command"
    ):
        writer.finish()


def test_the_caller_waits_only_for_the_save_before(tmp_path, monkeypatch):
    """Hold the writer's thread at its commit: `save` has returned, the next one waits until it is let go."""
    writer, gate, real, order = saver(tmp_path), threading.Event(), os.rename, []

    def rename(*arguments):
        assert gate.wait(timeout=60)
        order.append("committed")
        real(*arguments)

    monkeypatch.setattr(os, "rename", rename)
    writer.save(1, tensors(1), metrics={})
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "save-1"]
    assert not thread.daemon
    order.append("returned")
    assert names(tmp_path) != ["step-00000001"]
    gate.set()
    writer.save(2, tensors(2), metrics={})
    order.append("returned")
    writer.finish()
    assert order[:2] == ["returned", "committed"]
    assert sorted(order[2:]) == ["committed", "returned"]  # the second save runs on, too
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask, file, directory):
    before = os.umask(mask)
    try:
        save(tmp_path / "run", 1)
    finally:
        os.umask(before)
    found = [(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "run").rglob("*")]
    assert sorted(found) == sorted([(False, file)] * 3 + [(True, directory)] * 2)


def test_files_are_on_the_disk_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    writer, calls = saver(tmp_path), []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{tmp_path.resolve()}/"))
        real_fsync(handle)

    def rename(source, target):
        calls.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    writer.save(1, tensors(1), metrics={})
    writer.finish()
    new = "checkpoints/tmp-00000001"
    files = {f"{new}/{name}" for name in ("tensors.safetensors", "config.json", "manifest.json")}
    assert set(calls[:3]) == files
    assert calls[3:] == [new, "rename", "checkpoints"]


def test_the_newest_are_kept_and_the_best_besides(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: float("nan"), 5: 0.2, 6: 0.9, 7: 0.1, 8: 0.1}
    for last, kept in ((5, [2, 4, 5]), (6, [5, 6]), (8, [6, 7, 8])):
        save(tmp_path / str(last), *range(1, last + 1), keep=2, scores=scores)
        assert names(tmp_path / str(last)) == [f"step-{step:08d}" for step in kept]


def test_every_multiple_of_keep_every_is_kept_for_good(tmp_path):
    scores = {step: 0.9 if step == 5 else 0.1 for step in range(1, 14)}
    save(tmp_path, *range(1, 14), keep=2, keep_every=4, scores=scores)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 5, 8, 12, 13)]
    why = checkpoint.kept_for(tmp_path / "checkpoints", keep=2, keep_every=4)
    assert {checkpoint.step_of(path): reasons for path, reasons in why.items()} == {
        13: ["newest"],
        12: ["newest", "every 4"],
        8: ["every 4"],
        5: ["best"],
        4: ["every 4"],
    }


def test_an_existing_valid_checkpoint_is_not_rewritten(tmp_path, caplog):
    save(tmp_path, 1)
    before = contents(tmp_path)
    inode = (tmp_path / "checkpoints" / "step-00000001").stat().st_ino
    save(tmp_path, 1)
    assert contents(tmp_path) == before
    assert not caplog.records
    writer = saver(tmp_path)
    writer.save(1, tensors(2), metrics={})
    writer.finish()
    assert contents(tmp_path) == before
    assert (tmp_path / "checkpoints" / "step-00000001").stat().st_ino == inode
    assert "not reproducible" in caplog.text


def test_an_existing_damaged_checkpoint_is_replaced(tmp_path):
    save(tmp_path, 1)
    flip("tensors.safetensors", 0.5)(tmp_path / "checkpoints" / "step-00000001")
    save(tmp_path, 1)
    assert names(tmp_path) == ["corrupt-00000001", "step-00000001"]
    assert checkpoint.verify(tmp_path / "checkpoints" / "step-00000001") is None


def test_half_done_saves_are_ignored_and_swept_at_the_next_start(tmp_path):
    save(tmp_path, 1)
    directory = tmp_path / "checkpoints"
    shutil.copytree(directory / "step-00000001", directory / "tmp-00000002")
    shutil.copytree(directory / "step-00000001", directory / "tmp-removed-step-00000000")
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    saver(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


CHILD = """
import sys
import numpy as np
from deit import checkpoint, workdir
from deit.saver import Saver
with workdir.lock(sys.argv[1]):
    saver = Saver(sys.argv[1], config_json="{}", keep=2, keep_every=0, max_failed=0, versions={})
    newest = checkpoint.newest(sys.argv[1], set_aside=True)
    step = 0 if newest is None else checkpoint.manifest(newest)["step"]
    print("start", step, flush=True)
    while True:
        step += 1
        saver.save(step, {"a": np.full([50_000], step, np.float32)}, metrics={"eval/top1": 1.0 / step})
        saver.finish()
        print("saved", step, flush=True)
assert "tensorflow" not in sys.modules
"""


def child(workdir: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(workdir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_after_kill_9_at_any_moment_the_newest_is_the_last_or_the_one_after(tmp_path):
    """Kill a process that saves all the time, again and again; each continues from what the last one left."""
    draws = random.Random(0)
    announced = 0
    for _ in range(20):
        with child(tmp_path) as process:
            # Up, and after a drawn number of saves somewhere within the next one.
            lines = [process.stdout.readline() for _ in range(1 + draws.randrange(4))]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draws.uniform(0.0, 0.01))
            process.send_signal(signal.SIGKILL)
            # communicate() would lose lines that are buffered already.
            lines += process.stdout.read().splitlines(keepends=True)
            complaints = process.stderr.read()
        assert process.returncode == -signal.SIGKILL, complaints
        assert int(lines[0].split()[1]) >= announced
        # "start N" announces too: the process before may have been killed between its commit and its line. A line that
        # the kill cut short announces nothing.
        whole = [line for line in lines if line.endswith("\n") and line.startswith(("start", "saved"))]
        announced = max(int(line.split()[1]) for line in whole)
        found = checkpoint.newest(tmp_path, set_aside=False)
        if found is None:
            assert announced == 0
            continue
        values, manifest = checkpoint.read(found)
        assert manifest["step"] - announced in (0, 1)
        np.testing.assert_array_equal(values["a"], np.full([50_000], manifest["step"], np.float32))
        bad = [path for path in (tmp_path / "checkpoints").glob("step-*") if checkpoint.verify(path)]
        assert bad == []
    assert announced > 20  # the drawn numbers alone add up to more
    saver(tmp_path)
    assert list((tmp_path / "checkpoints").glob("tmp-*")) == []


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    process = child(tmp_path)
    try:
        assert process.stdout.readline().startswith("start")
        with (
            pytest.raises(errors.UserError, match=rf"in use by another process \(pid {process.pid}\)"),
            run_directory.lock(tmp_path),
        ):
            raise AssertionError("the lock was given twice")
    finally:
        process.kill()
        process.communicate()
    with run_directory.lock(tmp_path):
        pass
    with run_directory.lock(tmp_path):  # leaving the block gives it back
        pass


def test_the_room_imports_no_tensorflow():
    code = "import sys; from deit import checkpoint, saver; sys.exit('tensorflow' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run")])
def test_urls_are_refused_in_one_line(path):
    for call in (run_directory.check_workdir, checkpoint.locate, lambda p: run_directory.lock(p).__enter__()):
        with pytest.raises(errors.UserError, match="not a URL"):
            call(path)
    assert run_directory.check_workdir("runs/a:b") == Path("runs/a:b")


def test_a_workdir_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(errors.UserError, match="must be a writable directory"),
        run_directory.lock(tmp_path / "file"),
    ):
        pass
    with pytest.raises(errors.UserError, match="must be a writable directory"):
        saver(tmp_path / "file")


def test_locate_takes_a_run_its_checkpoints_or_one_of_them(tmp_path):
    save(tmp_path, 1, 2)
    one = tmp_path / "checkpoints" / "step-00000001"
    two = tmp_path / "checkpoints" / "step-00000002"
    assert checkpoint.locate(tmp_path) == two
    assert checkpoint.locate(str(tmp_path / "checkpoints")) == two
    assert checkpoint.locate(one) == one
    copied = shutil.copytree(one, tmp_path / "elsewhere")
    assert checkpoint.locate(copied) == copied
    flip("tensors.safetensors", 0.5)(two)
    assert checkpoint.locate(tmp_path) == one
    with pytest.raises(errors.UserError, match="is damaged"):
        checkpoint.locate(two)


def test_locate_says_what_a_path_is_not(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(errors.UserError, match="is no run, checkpoint or export"):
            checkpoint.locate(path)
    saver(tmp_path)
    with pytest.raises(errors.UserError, match="has no checkpoint yet"):
        checkpoint.locate(tmp_path)


def deny(monkeypatch, name: str) -> None:
    """Let nobody list, look at or open what is called `name`: chmod does not stop root."""

    def denied(real):
        def call(path, *arguments, **keywords):
            if isinstance(path, (str, os.PathLike)) and name in Path(path).parts:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **keywords)

        return call

    for module, function in ((os, "listdir"), (os, "stat"), (os, "scandir"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, function, denied(getattr(module, function)))


def test_checkpoints_that_may_not_be_listed_are_no_start_from_scratch(tmp_path, monkeypatch):
    save(tmp_path, 1)
    deny(monkeypatch, "checkpoints")
    for call in (lambda: checkpoint.newest(tmp_path, set_aside=True), lambda: checkpoint.locate(tmp_path)):
        with pytest.raises(errors.UserError, match=rf"^{tmp_path}/checkpoints\S* can't be read: Permission denied$"):
            call()


def test_a_checkpoint_that_may_not_be_opened_is_one_line_with_its_path(tmp_path, monkeypatch):
    save(tmp_path, 1)
    one = tmp_path / "checkpoints" / "step-00000001"
    deny(monkeypatch, "step-00000001")
    for call in (checkpoint.read, checkpoint.read_config, checkpoint.manifest, checkpoint.locate):
        with pytest.raises(errors.UserError, match=rf"{one}\b.* can't be read: Permission denied$"):
            call(one)


def test_a_checkpoint_that_may_not_be_opened_is_set_aside_and_the_one_before_it_is_used(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        deny(patch, "step-00000002")
        assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    assert "step-00000002 IS DAMAGED (step-00000002 can't be read: Permission denied)" in caplog.text
    assert names(tmp_path) == ["corrupt-00000002", "step-00000001"]
    assert checkpoint.verify(tmp_path / "checkpoints" / "corrupt-00000002") is None  # kept for whoever wants it back


@contextlib.contextmanager
def nobody():
    """Give up root's right to look and write everywhere, where this process has it."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def reachable():
    """Return a directory that nobody can reach: pytest's own are root's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


def test_a_directory_without_permission_is_refused_and_untouched(reachable):
    save(reachable, 1, 2)
    before = contents(reachable)
    directory = reachable / "checkpoints"
    for closed in ([directory], [directory / "step-00000001", directory / "step-00000002"]):
        directory.chmod(0o755)
        for path in closed:
            path.chmod(0)
        with nobody(), pytest.raises(errors.UserError, match="Permission denied"):
            checkpoint.newest(reachable, set_aside=True)
        for path in closed:
            path.chmod(0o755)
    assert contents(reachable) == before


def test_a_workdir_that_may_not_be_written_is_refused_at_the_start(reachable):
    reachable.chmod(0o555)
    with nobody(), pytest.raises(errors.UserError, match=r"must be a writable directory.*Permission denied"):
        saver(reachable)


def test_a_name_too_long_for_the_file_system_is_one_line(tmp_path):
    with pytest.raises(errors.UserError, match=r"^\S*xxx\S* can't be read: File name too long$"):
        checkpoint.locate(tmp_path / ("x" * 300))
