"""Killed with -9 anywhere, started again by the same command: the same bits and the same log as undisturbed.

A start costs most of the time here, so each covers as much as it can: every augmentation is on; saving goes on beside
the updates, and a kill while something is saved is a kill in the middle of an update, too.
"""

import contextlib
import random
import signal
import subprocess

import processes
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLAGS = [
    f"--config={processes.ROOT / 'configs'}/deit_tiny_flowers.py:smoke",
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


class Training(processes.Process):
    """One process of main.py."""

    def __init__(self, workdir, *flags):
        self.saves = {run: half_saved(run) for run in (workdir, workdir / "teacher")}
        super().__init__(processes.ROOT / "main.py", *FLAGS, *flags, f"--workdir={workdir}")

    def kill_at_line(self, pattern):
        """Kill -9 as soon as a line matches."""
        with self:
            self.wait_for(pattern)
            self.send(signal.SIGKILL)
            assert self.code() == -signal.SIGKILL, self.output()

    def kill_while_saving(self, run):
        """Kill -9 as soon as `run` has a half-written checkpoint that was not there before this process."""
        with self:
            while not half_saved(run) - self.saves[run]:  # without a pause: it is there for milliseconds
                assert self.process.poll() is None, self.output()
            self.send(signal.SIGKILL)
            assert self.code() == -signal.SIGKILL, self.output()

    def kill_after(self, seconds):
        """Kill -9 a time after the first update or the continuation, wherever that is, unless it is through by then."""
        with self:
            self.wait_for(r"update 1/|continuing")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
            self.send(signal.SIGKILL)
            assert self.code() in (0, -signal.SIGKILL), self.output()

    def finish(self):
        with self:
            assert self.code() == 0, self.output()


def half_saved(run):
    """Return the names of a run's checkpoints that are not committed."""
    return {path.name for path in (run / "checkpoints").glob("tmp-[0-9]*")}


def final(workdir):
    """Return (last checkpoint, its state_sha256, logged lines without wall-clock numbers) of teacher and student."""
    return {"teacher": processes.final(workdir / "teacher"), "student": processes.final(workdir)}


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
