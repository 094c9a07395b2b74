"""Killed with -9 anywhere, started again by the same command: the same bits and the same log as undisturbed.

A start costs most of the time here, so each covers as much as it can: every augmentation is on; saving goes on beside
the updates, and a kill while something is saved is a kill in the middle of an update, too.
"""

import json
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLAGS = [
    f"--config={ROOT / 'configs'}/deit_tiny_flowers.py:smoke",
    "--config.total_updates=10",
    "--config.checkpoint.every_updates=2",
    "--config.eval.every_updates=3",
    "--config.model.drop_path=0.2",
    "--config.augment.crop=random_resized",
    "--config.augment.randaugment=rand-m9-mstd0.5-inc1",
    "--config.augment.erasing=0.25",
    "--config.augment.mixup=0.8",
    "--config.augment.cutmix=1.0",
    "--config.augment.mix_group=8",
    "--config.augment.repeats=3",
    "--config.teacher.train.total_updates=6",
    "--config.teacher.train.checkpoint.every_updates=2",
    "--config.teacher.train.log.every_updates=1",
]
PATIENCE = 600  # seconds after which a test fails rather than waits on, also on a busy machine


class Training:
    """One process of main.py whose log lines are collected as they come."""

    def __init__(self, workdir, *flags):
        self.saves = {run: half_saved(run) for run in (workdir, workdir / "teacher")}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *FLAGS, *flags, f"--workdir={workdir}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines, self.ended, self.news = [], False, threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def kill_at_line(self, pattern):
        """Kill -9 as soon as a line matches."""
        seen = self._wait_for(pattern)
        self._kill()
        assert seen, self.output()
        assert self.process.returncode == -signal.SIGKILL, self.output()

    def kill_while_saving(self, run):
        """Kill -9 as soon as `run` has a half-written checkpoint that was not there before this process."""
        seen = set()
        while not seen and self.process.poll() is None:  # without a pause: it is there for milliseconds
            seen = half_saved(run) - self.saves[run]
        self._kill()
        assert seen, self.output()
        assert self.process.returncode == -signal.SIGKILL, self.output()

    def kill_after(self, seconds):
        """Kill -9 a time after the first update or the continuation, wherever that is, unless it is through by then."""
        self._wait_for(r"update 1/|continuing")
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._kill()
        assert self.process.returncode in (0, -signal.SIGKILL), self.output()

    def finish(self):
        try:
            self.process.wait(timeout=PATIENCE)
        finally:
            self._kill()
        assert self.process.returncode == 0, self.output()

    def output(self):
        return "".join(self.lines)

    def _read(self):
        with self.process.stderr as stderr:
            for line in stderr:
                with self.news:
                    self.lines.append(line)
                    self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    def _wait_for(self, pattern):
        """Return whether a line matched before the process ended."""

        def matched():
            return any(re.search(pattern, line) for line in self.lines)

        with self.news:
            self.news.wait_for(lambda: matched() or self.ended, timeout=PATIENCE)
            return matched()

    def _kill(self):
        self.process.send_signal(signal.SIGKILL)  # does nothing to a process that has been waited for
        self.process.wait()


def half_saved(run):
    """Return the names of a run's checkpoints that are not committed."""
    return {path.name for path in (run / "checkpoints").glob("tmp-[0-9]*")}


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
    Training(tmp_path).kill_while_saving(tmp_path / "teacher")  # while the teacher trains and is saved
    Training(tmp_path).kill_at_line(r"measuring the teacher")  # between teacher and student
    Training(tmp_path).kill_at_line(r"evaluating after update 3\b")  # while the student is evaluated
    Training(tmp_path).kill_while_saving(tmp_path)  # while the student trains and is saved
    Training(tmp_path).finish()
    assert final(tmp_path) == undisturbed


def test_killed_at_random_moments_the_run_ends_with_the_same_bits_and_the_same_log(undisturbed, tmp_path):
    moments = random.Random(0)
    for _ in range(2):
        Training(tmp_path).kill_after(moments.uniform(0.0, 10.0))
    Training(tmp_path).finish()
    assert final(tmp_path) == undisturbed


def test_with_another_seed_of_the_student_the_teacher_repeats_its_bits_and_the_student_does_not(undisturbed, tmp_path):
    Training(tmp_path, "--config.seed=1").finish()
    other = final(tmp_path)
    assert other["teacher"] == undisturbed["teacher"]
    assert other["student"][2][0] == undisturbed["student"][2][0]  # what the teacher is worth
    assert other["student"][1] != undisturbed["student"][1]
    assert other["student"][2][1]["train/loss"] != undisturbed["student"][2][1]["train/loss"]
