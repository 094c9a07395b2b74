"""What the converter writes is there whole or not at all, and nothing beside it is touched, whatever its name."""

import errno
import json
import os

import numpy as np
import pytest

from deit import checkpoint, commit, errors

TENSORS = {"student/a": np.arange(3, dtype=np.float32)}


def write(target, **options):
    commit.commit(target, TENSORS, step=0, config_json="{}", metrics={}, versions={}, **options)


def other_s(folder):
    """Put files of somebody else where a temporary name might be looked for."""
    (folder / "tmp-ours").mkdir()
    (folder / "tmp-ours" / "x").write_text("mine")
    (folder / "tmp-ours.safetensors").write_text("mine")


def check_other_s(folder):
    assert (folder / "tmp-ours" / "x").read_text() == (folder / "tmp-ours.safetensors").read_text() == "mine"


def test_directories_and_files_named_tmp_survive_and_the_checkpoint_is_committed(tmp_path):
    other_s(tmp_path)
    write(tmp_path / "ours")
    assert checkpoint.verify(tmp_path / "ours") is None
    with commit.whole(tmp_path / "ours.safetensors") as under_way:
        under_way.write_text("weights")
    check_other_s(tmp_path)
    names = ["ours", "ours.safetensors", "tmp-ours", "tmp-ours.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_temporary_directory_that_exists_is_an_error_and_stays(tmp_path):
    other_s(tmp_path)
    with pytest.raises(FileExistsError):
        write(tmp_path / "step-00000000", temporary="tmp-ours")
    check_other_s(tmp_path)


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # SIGKILL cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "ours")
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "ours")
    assert checkpoint.verify(tmp_path / "ours") is None


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("links", [True, False])
def test_what_came_meanwhile_is_not_replaced_and_nothing_is_left_beside_it(tmp_path, monkeypatch, kind, links):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    out = tmp_path / "out"
    with pytest.raises(OSError), commit.whole(out) as under_way:
        if kind == "directory":
            under_way.mkdir()
            (under_way / "x").write_text("ours")
            out.mkdir()
            (out / "theirs").write_text("theirs")
        else:
            under_way.write_text("ours")
            out.write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "theirs" if kind == "directory" else out).read_text() == "theirs"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_has_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch, links):
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "link", "rename")}

    def noted(name):
        def call(*arguments):
            if name == "link" and not links:
                raise OSError(errno.EOPNOTSUPP, "no links here")
            calls.append(name)
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noted(name))
    with commit.whole(tmp_path / "out") as under_way:
        under_way.write_text("ours")
    assert calls == ["fsync", "link" if links else "rename", "fsync"]  # the file, its name, the directory
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    for make in (lambda path: path.mkdir(), lambda path: path.write_text("half")):
        with pytest.raises(ZeroDivisionError), commit.whole(tmp_path / "out") as under_way:
            make(under_way)
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_where_tensors_come_from_and_carries_its_own_digest(tmp_path):
    write(tmp_path / "ours", source={"file": "x"})
    content = json.loads((tmp_path / "ours" / checkpoint.MANIFEST).read_text())
    assert content["source"] == {"file": "x"}
    assert content["manifest_sha256"] == checkpoint.manifest_sha256(content)


def test_directories_above_are_made(tmp_path):
    commit.check_new(tmp_path / "new" / "weights" / "ours")
    write(tmp_path / "new" / "weights" / "ours")
    assert (tmp_path / "new" / "weights" / "ours" / checkpoint.MANIFEST).is_file()
    with commit.whole(tmp_path / "other" / "file") as under_way:
        under_way.write_text("ours")
    assert (tmp_path / "other" / "file").read_text() == "ours"


def test_an_out_that_exists_or_lies_below_a_file_is_refused(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(errors.UserError, match="exists and is not overwritten"):
        commit.check_new(tmp_path / "dangling")
    with pytest.raises(errors.UserError, match=r"must lie in a directory: .*/file is none"):
        commit.check_new(tmp_path / "file" / "no" / "x")
