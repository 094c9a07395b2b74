"""Killed with -9 anywhere, started again by the same command: the same bits and the same log as undisturbed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

FLAGS = [
    f"--config={ROOT / 'configs'}/deit_tiny_flowers.py:smoke",
    "--config.total_updates=10",
    "--config.checkpoint.every_updates=2",
    "--config.eval.every_updates=3",
    "--config.model.drop_path=0.2",
    "--config.teacher.train.total_updates=6",
    "--config.teacher.train.checkpoint.every_updates=2",
    "--config.teacher.train.log.every_updates=1",
]


class Training:
    """One process of main.py whose log lines are collected as they come."""

    def __init__(self, workdir):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *FLAGS, f"--workdir={workdir}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ,
        )  # fmt: skip
        self.lines, self.news = [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line)
                self.news.notify_all()

    def kill_at_line(self, pattern):
        """Kill -9 as soon as a line matches."""
        with self.news:
            seen = self.news.wait_for(lambda: any(re.search(pattern, line) for line in self.lines), timeout=240)
        self._kill()
        assert seen, "".join(self.lines)

    def kill_when(self, condition):
        """Kill -9 as soon as `condition()` holds."""
        while not condition() and self.process.poll() is None:
            pass
        self._kill()

    def kill_after(self, seconds):
        """Kill -9 after a time, wherever that is."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self):
        assert self.process.wait(timeout=400) == 0, "".join(self.lines)


def final(workdir):
    """Return (state_sha256 of the last checkpoint, logged lines without wall-clock numbers) of teacher and student."""
    found = {}
    for name, run in (("teacher", workdir / "teacher"), ("student", workdir)):
        newest = max((run / "checkpoints").glob("step-*"))
        digest = json.loads((newest / "manifest.json").read_text())["state_sha256"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if not k.endswith("images_per_sec")} for line in lines]
        found[name] = (newest.name, digest, lines)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    Training(workdir).finish()
    result = final(workdir)
    assert result["student"][0] == "step-00000010" and result["teacher"][0] == "step-00000006"
    assert [line["step"] for line in result["student"][2]] == list(range(11))
    return result


def test_killed_in_every_phase_the_run_ends_with_the_same_bits_and_the_same_log(undisturbed, tmp_path):
    saving = lambda run: lambda: any((run / "checkpoints").glob("tmp-*"))  # noqa: E731
    Training(tmp_path).kill_at_line(r"update 3/6")  # while the teacher trains
    Training(tmp_path).kill_when(saving(tmp_path / "teacher"))  # while the teacher is saved
    Training(tmp_path).kill_at_line(r"measuring the teacher")  # between teacher and student
    Training(tmp_path).kill_at_line(r"evaluating after update 3\b")  # while the student is evaluated
    Training(tmp_path).kill_when(saving(tmp_path))  # while the student is saved
    Training(tmp_path).kill_at_line(r"update 7/10")  # in the middle of an update
    Training(tmp_path).finish()
    assert final(tmp_path) == undisturbed


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_the_run_ends_with_the_same_bits_and_the_same_log(undisturbed, tmp_path, seed):
    moments = random.Random(seed)
    for _ in range(3):
        Training(tmp_path).kill_after(moments.uniform(5.0, 30.0))
    Training(tmp_path).finish()
    assert final(tmp_path) == undisturbed


def test_two_runs_of_one_command_are_equal_bit_for_bit_and_another_seed_is_not(undisturbed, tmp_path):
    Training(tmp_path).finish()
    assert final(tmp_path) == undisturbed
    other = undisturbed["student"][1]
    FLAGS.append("--config.seed=1")
    try:
        second = tmp_path / "second"
        Training(second).finish()
    finally:
        FLAGS.pop()
    assert final(second)["student"][1] != other
