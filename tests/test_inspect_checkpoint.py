"""tools/inspect_checkpoint.py: what it says of a run, of one checkpoint, and of two states."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import base
from deit import checkpoint, commit
from deit import config as configuration
from deit import saver as saving

TOOL = Path(__file__).resolve().parents[1] / "tools" / "inspect_checkpoint.py"


def state(step: int) -> dict[str, np.ndarray]:
    return {
        "student/head/kernel": np.full([3, 4], step, np.float32),
        "student/head/bias": np.array([-1.5, 0.0, 2.5], np.float32),
        "ema/head/kernel": np.full([3, 4], step / 2, np.float32),
        "optimizer/m/head/kernel": np.zeros([3, 4], np.float16),
        "optimizer/iterations": np.array(step, np.int64),
        "step": np.array(step, np.int64),
        "loss_scale": np.array(32768.0, np.float32),
    }


def write_run(workdir: Path, *steps: int, tensors=state, **fields) -> Path:
    """Write a run of a configuration with `fields` whose checkpoints have top-1 of 0.9 at 2, else 0.1."""
    config = base.get_config()
    config.checkpoint.keep, config.checkpoint.keep_every = 2, 3
    config.update_from_flattened_dict(fields)
    saver = saving.Saver(
        workdir,
        config_json=configuration.to_json(config),
        keep=10,
        keep_every=0,
        max_failed=0,
        versions={"deit": "1", "teacher": ""},
    )
    for step in steps:
        saver.save(step, tensors(step), metrics={"eval/top1": 0.9 if step == 2 else 0.1})
    saver.finish()
    return workdir


def at(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / f"step-{step:08d}"


def inspect(tmp_path: Path, *flags: str, code: int = 0) -> tuple[dict, str, str]:
    """Run the tool and return (JSON facts, stdout, stderr)."""
    target = tmp_path / "facts.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(TOOL), *flags, f"--json={target}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (code != 0)  # a problem is one line; no bar where there is no terminal
    return json.loads(target.read_text()) if target.exists() else {}, done.stdout, done.stderr


def test_a_run_is_a_table_of_its_checkpoints_and_why_they_are_kept(tmp_path):
    run = write_run(tmp_path / "run", 1, 2, 3, 4, 5)
    shutil.copytree(at(run, 1), run / "checkpoints" / "tmp-00000006")
    shutil.copytree(at(run, 1), run / "checkpoints" / "tmp-removed-step-00000000")
    shutil.copytree(at(run, 1), run / "checkpoints" / "corrupt-00000004")
    (run / "checkpoints" / "corrupt-00000004" / "config.json").unlink()
    facts, out, _ = inspect(tmp_path, f"--ckpt={run}")
    rows = {row["name"]: row for row in facts["checkpoints"]}
    assert {name: (row["kept"], row["status"]) for name, row in rows.items()} == {
        "step-00000001": ([], "verified"),
        "step-00000002": (["best"], "verified"),
        "step-00000003": (["every 3"], "verified"),
        "step-00000004": (["newest"], "verified"),
        "step-00000005": (["newest"], "verified"),
        "corrupt-00000004": (None, "set aside: config.json is missing"),
        "tmp-00000006": (None, "save half done or under way"),
        "tmp-removed-step-00000000": (None, "removal half done"),
    }
    manifest = checkpoint.manifest(at(run, 2))
    best = rows["step-00000002"]
    assert best["bytes"] == sum(file.stat().st_size for file in at(run, 2).iterdir())
    assert best["created"] == manifest["created"]
    assert best["eval/top1"] == 0.9
    assert best["state_sha256"] == manifest["state_sha256"]
    (line,) = [line for line in out.splitlines() if line.startswith("step-00000002")]
    assert "  0.9000  " in line
    assert manifest["state_sha256"][:12] in line
    assert inspect(tmp_path, f"--ckpt={run / 'checkpoints'}")[0]["checkpoints"] == facts["checkpoints"]


def test_a_checkpoint_is_a_table_of_its_tensors_by_group(tmp_path):
    run = write_run(tmp_path / "run", 2, 4)
    facts, out, _ = inspect(tmp_path, f"--ckpt={at(run, 4)}")
    assert facts["groups"] == {
        "student": {"tensors": 2, "elements": 15, "bytes": 60, "min": -1.5, "max": 4.0, "not_finite": 0},
        "ema": {"tensors": 1, "elements": 12, "bytes": 48, "min": 2.0, "max": 2.0, "not_finite": 0},
        "optimizer": {"tensors": 2, "elements": 13, "bytes": 32, "min": 0.0, "max": 0.0, "not_finite": 0},
        "counters": {"tensors": 2, "elements": 2, "bytes": 12, "min": 32768.0, "max": 32768.0, "not_finite": 0},
    }
    assert facts["counters"] == {"step": 4, "loss_scale": 32768.0}
    assert facts["versions"] == {"deit": "1", "teacher": ""}
    assert facts["checkpoints"][0]["kept"] == ["newest"]
    for text in ("verified", "student", "loss_scale 32768", "versions: deit 1"):
        assert text in out


def test_what_is_not_finite_is_counted_and_left_out_of_the_range(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "check_finite", lambda tensors: None)  # as another version may have written it

    def poisoned(step):
        return {**state(step), "student/head/bias": np.array([np.nan, np.inf, 2.5], np.float32)}

    run = write_run(tmp_path / "run", 1, tensors=poisoned)
    facts, out, _ = inspect(tmp_path, f"--ckpt={at(run, 1)}")
    student = facts["groups"]["student"]
    assert (student["not_finite"], student["min"], student["max"]) == (2, 1.0, 2.5)
    assert "2 are not" in out
    write_run(tmp_path / "whole", 1)
    facts, out, _ = inspect(tmp_path, f"--ckpt={run}", f"--against={tmp_path / 'whole'}")
    assert facts["differ"] == [{"tensor": "student/head/bias", "largest": None, "relative": None, "elements": 2}]


@pytest.mark.parametrize("whole_run", [True, False])
def test_damage_is_named_and_exits_1(tmp_path, whole_run):
    run = write_run(tmp_path / "run", 1, 2)
    data = bytearray((at(run, 1) / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (at(run, 1) / "tensors.safetensors").write_bytes(data)
    facts, out, err = inspect(tmp_path, f"--ckpt={run if whole_run else at(run, 1)}", code=1)
    assert err == "error: checkpoint step-00000001 is damaged: tensors.safetensors has another sha256\n"
    assert "tensors.safetensors has another sha256" in out
    assert facts["checkpoints"][0]["status"] == "tensors.safetensors has another sha256"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    inspect(tmp_path, f"--ckpt={at(run, 2)}")
    inspect(tmp_path, f"--ckpt={at(run, 1)}", f"--against={at(run, 2)}", code=1)


def test_a_run_with_nothing_but_what_was_set_aside_exits_1(tmp_path):
    run = write_run(tmp_path / "run", 1)
    at(run, 1).rename(run / "checkpoints" / "corrupt-00000001")
    assert "no checkpoint is whole" in inspect(tmp_path, f"--ckpt={run}", code=1)[2]


def test_equal_states_are_equal_whatever_was_changed_around_them(tmp_path):
    ours = write_run(tmp_path / "ours", 1, 4)
    theirs = write_run(tmp_path / "theirs", 4, **{"checkpoint.keep": 5, "micro_batch": 1})
    flags = (f"--ckpt={ours}", f"--against={at(theirs, 4)}", "--require_equal")
    facts, out, _ = inspect(tmp_path, *flags)
    assert facts["equal"]
    assert facts["differ"] == facts["only_ours"] == facts["only_theirs"] == facts["other_form"] == []
    assert out.startswith("equal: all 7 tensors of step 4 are the same bits\n")
    assert [(row["field"], row["ours"], row["theirs"], row["result"]) for row in facts["config"]] == [
        ("checkpoint.keep", 2, 5, False),
        ("micro_batch", base.get_config().micro_batch, 1, False),
    ]


def test_different_states_are_a_result_and_with_require_equal_an_error(tmp_path):
    def other(step):
        tensors = {**state(step), "student/extra": np.zeros([2], np.float32)}
        del tensors["ema/head/kernel"]
        tensors["student/head/kernel"][1, 2] += 1  # 1 of 5
        tensors["student/head/bias"][1] = -0.0  # other bits, no difference
        tensors["optimizer/m/head/kernel"] = np.zeros([3, 4], np.float32)
        tensors["optimizer/iterations"] = np.array(8, np.int64)
        return tensors

    ours = write_run(tmp_path / "ours", 4)
    theirs = write_run(tmp_path / "theirs", 4, tensors=other, epochs=2.0)
    flags = (f"--ckpt={ours}", f"--against={theirs}")
    facts, out, _ = inspect(tmp_path, *flags)
    assert not facts["equal"]
    assert facts["tensors"] == 6
    assert facts["differ"] == [
        {"tensor": "optimizer/iterations", "largest": 4.0, "relative": 0.5, "elements": 1},
        {"tensor": "student/head/kernel", "largest": 1.0, "relative": 0.2, "elements": 1},
        {"tensor": "student/head/bias", "largest": 0.0, "relative": 0.0, "elements": 0},
    ]
    assert facts["only_ours"] == ["ema/head/kernel"]
    assert facts["only_theirs"] == ["student/extra"]
    form = {"tensor": "optimizer/m/head/kernel", "ours": "float16 [3, 4]", "theirs": "float32 [3, 4]"}
    assert facts["other_form"] == [form]
    (changed,) = facts["config"]
    assert (changed["field"], changed["theirs"], changed["result"]) == ("epochs", 2.0, True)
    for text in ("different: 3 of 6 tensors", "student/extra", "float16 [3, 4]", "epochs"):
        assert text in out
    assert "are different states" in inspect(tmp_path, *flags, "--require_equal", code=1)[2]


def test_bad_input_is_one_line(tmp_path):
    run = write_run(tmp_path / "run", 1)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    for flags, reason in (
        ([f"--ckpt={tmp_path / 'absent'}"], "is no run, checkpoint or export"),
        ([f"--ckpt={tmp_path / 'new'}"], "has no checkpoint yet"),
        (["--ckpt=gs://bucket/run"], "not a URL"),
        ([f"--ckpt={run}", "--require_equal"], "needs --against"),
        ([f"--ckpt={run}", f"--against={tmp_path}"], "is no run, checkpoint or export"),
        ([f"--ckpt={run}", "--jsn=x"], "jsn"),
        ([], "ckpt"),
    ):
        assert reason in inspect(tmp_path, *flags, code=1)[2]
    done = subprocess.run(
        [sys.executable, str(TOOL), f"--ckpt={run}", f"--json={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"error: --json ({tmp_path}) must be a file in an existing directory\n"


def test_tensorflow_is_not_imported(tmp_path):
    run = write_run(tmp_path / "run", 1)
    command = [sys.executable, "-X", "importtime", str(TOOL), f"--ckpt={run}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"safetensors", "deit.checkpoint"} <= imported
    assert not {name for name in imported if name.partition(".")[0] == "tensorflow"}
