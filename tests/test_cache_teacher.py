"""tools/cache_teacher.py: shards, parts and kills side by side are one cache; what it prints and what it refuses."""

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from deit import checkpoint
from deit.teachers import ahead, chunks

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 70  # three files: 32, 32 and 6


def test_shards_are_runs_of_whole_files_and_together_everything_once():
    shards = [ahead.shard(range(3, 200), index, 3) for index in range(3)]
    assert list(itertools.chain(*shards)) == list(range(3, 200))
    files = [{update // chunks.CHUNKS for update in shard} for shard in shards]
    assert not files[0] & files[1] | files[0] & files[2] | files[1] & files[2]


def test_only_a_large_gap_parts_what_is_computed_in_a_row():
    assert list(ahead.contiguous([0, 1, 5, 13, 22, 23])) == [[0, 1, 5, 13], [22, 23]]
    assert list(ahead.contiguous([])) == []


class MeanColours(tf.Module):
    """Ten logits from the mean colours of four quarters."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(np.random.default_rng(0).normal(size=[12, 10]), dtype=tf.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32)])
    def serve(self, images):
        return {"logits": tf.reshape(tf.nn.avg_pool2d(images / 9, 16, 16, "VALID"), [-1, 12]) @ self.kernel}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "m"
    module = MeanColours()
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    return [
        f"--config={ROOT / 'configs'}/deit_tiny_flowers.py:smoke",
        "--config.teacher.kind=saved_model",
        f"--config.teacher.path={directory}",
        f"--config.total_updates={UPDATES}",
        "--config.eval.every_updates=0",
        "--config.checkpoint.every_updates=20",
        "--config.augment.crop=random_resized",
        "--config.augment.erasing=0.25",
        "--config.augment.mixup=0.8",
        "--config.augment.cutmix=1.0",
        "--config.augment.mix_group=8",
        "--config.augment.repeats=3",
        "--config.log.every_updates=10",
    ]


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process, code=0):
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err
    return out, err


def whole_chunks(directory):
    """Return how many records of a cache's files have a checksum; a file may be in the making."""
    files = [path for path in Path(directory).rglob("*.npy") if path.stat().st_size > 1000]
    return sum(int(np.load(path)["sha256"].any(-1).sum()) for path in files)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parallel_shards_and_a_kill_make_the_cache_that_trains_to_the_bits_of_the_teacher_at_work(flags, tmp_path):
    cache = f"--config.teacher.cache_dir={tmp_path / 'cache'}"
    first, second = (start("tools/cache_teacher.py", *flags, cache, f"--shard={i}/2") for i in range(2))
    threading.Thread(target=second.communicate, daemon=True).start()
    while second.poll() is None and whole_chunks(tmp_path / "cache") < 5:
        threading.Event().wait(0.05)  # leaves the core to them
    second.send_signal(signal.SIGKILL)
    second.wait()
    out, err = finished(first)
    assert second.returncode in (0, -signal.SIGKILL)
    assert re.search(r"32 of 32 updates in \S+cache, [\d.]+ kB on disk; the schedule's 70 take [\d.]+ kB", out), out
    assert re.search(r"teacher: top1 0\.\d{4}  ece 0\.\d{4}  of 450 images; recall: 0 ", err), err
    part, _ = finished(start("tools/cache_teacher.py", *flags, cache, "--updates=30:40"))
    assert part.startswith("10 of 10 updates")
    whole, _ = finished(start("tools/cache_teacher.py", *flags, cache))
    assert whole.startswith("70 of 70 updates") and whole_chunks(tmp_path / "cache") == UPDATES
    again, err = finished(start("tools/cache_teacher.py", *flags, cache))
    assert "70 of 70 updates are there; 0 to compute" in err and again.startswith("70 of 70 updates")

    finished(start("main.py", *flags, f"--workdir={tmp_path / 'online'}"))
    _, err = finished(
        start("main.py", *flags, cache, "--config.teacher.cache=read", f"--workdir={tmp_path / 'cached'}")
    )
    assert "70 updates answered from the cache, 0 by the teacher" in err
    assert "not loaded" in err  # the plan's line on the teacher
    states = [
        checkpoint.manifest(checkpoint.newest(tmp_path / run, set_aside=False))["state_sha256"]
        for run in ("online", "cached")
    ]
    assert states[0] == states[1]
    told = [json.loads(line) for line in (tmp_path / "cached" / "metrics.jsonl").read_text().splitlines()]
    assert {"teacher/top1", "teacher/ece", "teacher/recall/3"} <= told[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, parts",
    [
        ([], ["teacher.cache_dir ('')", "must be given"]),
        (["--config.teacher.cache_dir=c", "--shard=2/2"], ["--shard (2/2)", "0 <= I < N"]),
        (["--config.teacher.cache_dir=c", "--shard=half"], ["--shard (half)", "I/N"]),
        (["--config.teacher.cache_dir=c", "--updates=5:500"], ["--updates (5:500)", "<= 70"]),
        (["--config.teacher.cache_dir=c", "--config.distill.kind=none"], ["teacher.cache", "distill.kind"]),
        (["--config.teacher.cache_dir=c", "--config.teacher.min_accuracy=0.9"], ["teacher.min_accuracy (0.9)"]),
    ],
)
def test_bad_input_of_the_tool_is_one_line_and_writes_no_answers(flags, tmp_path, changes, parts):
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools/cache_teacher.py"), *flags, *changes],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert not list(tmp_path.rglob("*.npy"))
