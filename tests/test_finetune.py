"""Fine-tuning for real: from a quickstart checkpoint to other digits, resumed, with parts frozen, at another size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deit import checkpoint
from tests import family

ROOT = Path(__file__).resolve().parents[1]


def main(preset, workdir, *flags, code=0):
    """Run main.py on a preset of configs/finetune.py; return what it logged."""
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/finetune.py:{preset}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *flags], cwd=workdir.parent, capture_output=True, text=True, timeout=300,
        env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def student(workdir):
    tensors, _ = checkpoint.read(checkpoint.locate(workdir))
    return {name.removeprefix("student/"): value for name, value in tensors.items() if name.startswith("student/")}


@pytest.mark.slow
def test_other_digits_are_learnt_faster_from_a_checkpoint_than_from_scratch(tmp_path):
    """The same 60 updates on digits 5 to 9, after 200 on 0 to 4 and after nothing."""
    main("digits_before", tmp_path / "before", "--config.total_updates=200")
    said = main("digits", tmp_path / "tuned", f"--config.init_from={tmp_path / 'before'}")
    assert "heads re-initialised: 5 classes (0, 1, 2, ...) -> 5 (5, 6, 7, ...)" in said
    main("digits", tmp_path / "scratch", "--config.init_from=")
    tuned, scratch = (lines(tmp_path / name)[-1]["eval/top1"] for name in ("tuned", "scratch"))
    assert tuned > scratch + 0.05, (tuned, scratch)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a checkpoint of the network that the digits are trained with."""
    return family.checkpoint(tmp_path_factory.mktemp("start") / "ckpt", "deit_micro_patch8_32", classes=tuple("01234"))


FEW = ("--config.total_updates=2", "--config.checkpoint.every_updates=1", "--config.optim.warmup_epochs=0.0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, moves",
    [
        ((), lambda path: True),
        (("--config.optim.train_only=attention",), lambda p: "/attn/" in p or p.startswith("head") or "pos_embed" in p),
        (("--config.optim.train_only=heads", "--config.optim.name=lamb"), lambda path: path.startswith("head")),
        (("--config.data.image_size=48", "--config.optim.layer_decay=0.5"), lambda path: True),
    ],
)  # fmt: skip
def test_what_is_trained_moves_and_all_else_stays_bit_for_bit(start, tmp_path, flags, moves):
    run = tmp_path / "run"
    said = main("digits", run, f"--config.init_from={start}", *FEW, *flags)
    before, after = student(start), student(run)
    for path, value in after.items():
        if path.startswith("head/") or (path == "tokens/pos_embed" and "--config.data.image_size=48" in flags):
            continue
        assert np.array_equal(value, before[path]) != moves(path), path
    assert ("resized from 4 x 4 to 6 x 6" in said) == ("--config.data.image_size=48" in flags)


@pytest.mark.slow
def test_layer_decay_scales_the_steps_of_a_real_update(start, tmp_path):
    """One update, decay off: the largest step of Adam is the rate, times the decay for every layer below the head."""
    run = tmp_path / "run"
    flags = ("--config.optim.layer_decay=0.5", "--config.optim.weight_decay=0.0", "--config.optim.peak_lr=1e-3")
    main("digits", run, f"--config.init_from={start}", *FEW, *flags, "--config.total_updates=1")
    before, after = student(start), student(run)
    for path, power in (("norm/gamma", 0), ("blocks/3/mlp/fc1/kernel", 1), ("blocks/0/mlp/fc1/kernel", 4),
                        ("patch_embed/proj/kernel", 5), ("tokens/cls_token", 5)):  # fmt: skip
        largest = np.abs(after[path] - before[path]).max()
        np.testing.assert_allclose(largest, 1e-3 * 0.5**power, rtol=0.02, err_msg=path)


def test_a_start_that_does_not_fit_is_one_line_and_leaves_no_run(start, tmp_path):
    said = main("digits", tmp_path / "run", f"--config.init_from={start}", "--config.model.patch=4", code=1)
    assert "patch_embed/proj/kernel does not fit" in said.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()
    said = main("digits", tmp_path / "run", f"--config.init_from={tmp_path / 'nothing'}", code=1)
    assert "is no run, checkpoint or export" in said.splitlines()[-1]
