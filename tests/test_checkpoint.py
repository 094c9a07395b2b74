"""Checkpoint files: what a kill, a bit flip or a full disk may do to them, and what is found afterwards."""

import builtins
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deit import checkpoint, errors
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


def saver(workdir: Path, *, keep: int = 10) -> checkpoint.Saver:
    return checkpoint.Saver(workdir, config_json='{"seed": 0}', keep=keep, versions=VERSIONS)


def save(workdir: Path, *steps: int, keep: int = 10, scores: dict[int, float] | None = None) -> None:
    """Save and commit a checkpoint of each step."""
    writer = saver(workdir, keep=keep)
    for step in steps:
        writer.save(step, tensors(step), metrics={"eval/top1": scores[step]} if scores else {})
    writer.join()


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_is_saved_is_read_back(tmp_path):
    writer = saver(tmp_path)
    writer.save(1200, tensors(1200), metrics={"eval/top1": 0.5, "train/loss": float("nan")})
    writer.join()
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
    writer.join()

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        writer.save(2, tensors(2), metrics={})
        with pytest.raises(errors.UserError, match=r"step 2 was not written .*No space left on device"):
            writer.join()
    writer.join()  # the error is raised once
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000001"
    writer.save(2, tensors(2), metrics={})
    writer.join()
    assert checkpoint.newest(tmp_path, set_aside=True).name == "step-00000002"


def test_the_next_save_raises_what_the_one_before_it_met(tmp_path):
    writer = saver(tmp_path)
    writer.save(1, {"a": np.array([object()])}, metrics={})
    with pytest.raises(Exception) as caught:
        writer.save(2, tensors(2), metrics={})
    assert "object" in str(caught.value).lower()
    writer.join()
    assert names(tmp_path) == []


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
    writer.join()
    new = "checkpoints/tmp-00000001"
    files = {f"{new}/{name}" for name in ("tensors.safetensors", "config.json", "manifest.json")}
    assert set(calls[:3]) == files
    assert calls[3:] == [new, "rename", "checkpoints"]


def test_the_newest_are_kept_and_the_best_besides(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: float("nan"), 5: 0.2, 6: 0.9, 7: 0.1, 8: 0.1}
    for last, kept in ((5, [2, 4, 5]), (6, [5, 6]), (8, [6, 7, 8])):
        save(tmp_path / str(last), *range(1, last + 1), keep=2, scores=scores)
        assert names(tmp_path / str(last)) == [f"step-{step:08d}" for step in kept]


def test_an_existing_valid_checkpoint_is_not_rewritten(tmp_path, caplog):
    save(tmp_path, 1)
    before = contents(tmp_path)
    inode = (tmp_path / "checkpoints" / "step-00000001").stat().st_ino
    save(tmp_path, 1)
    assert contents(tmp_path) == before
    assert not caplog.records
    writer = saver(tmp_path)
    writer.save(1, tensors(2), metrics={})
    writer.join()
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
with workdir.lock(sys.argv[1]):
    saver = checkpoint.Saver(sys.argv[1], config_json="{}", keep=2, versions={})
    newest = checkpoint.newest(sys.argv[1], set_aside=True)
    step = 0 if newest is None else checkpoint.manifest(newest)["step"]
    print("start", step, flush=True)
    while True:
        step += 1
        saver.save(step, {"a": np.full([50_000], step, np.float32)}, metrics={"eval/top1": 1.0 / step})
        saver.join()
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
            lines += process.stdout.read().splitlines()  # communicate() would lose lines that are buffered already
            complaints = process.stderr.read()
        assert process.returncode == -signal.SIGKILL, complaints
        assert int(lines[0].split()[1]) >= announced
        # "start N" announces too: the process before may have been killed between its commit and its line.
        announced = max(int(line.split()[1]) for line in lines if line.startswith(("start", "saved")))
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
    code = "import sys; from deit import checkpoint; sys.exit('tensorflow' in sys.modules)"
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


def test_a_name_too_long_for_the_file_system_is_one_line(tmp_path):
    with pytest.raises(errors.UserError, match=r"^\S*xxx\S* can't be read: File name too long$"):
        checkpoint.locate(tmp_path / ("x" * 300))
