"""The same run on any layout of devices and micro-batches: the same losses up to the order of floating-point sums."""

import signal

import numpy as np
import processes
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOTAL = 20
FLAGS = [
    f"--config={processes.ROOT / 'configs'}/deit_tiny_flowers.py:full",
    *processes.SMALL, "--config.model.variant=deit_micro_distilled_patch8_32",
    f"--config.total_updates={TOTAL}", "--config.checkpoint.every_updates=10", "--config.eval.every_updates=0",
]  # fmt: skip
ONE = ["--config.micro_batch=8"]  # accum_steps 4
HALVED = ["--config.micro_batch=4"]
TWO_DEVICES = ["--config.strategy=mirrored", "--config.devices=2", "--config.micro_batch=8"]  # accum_steps 2
TWO_WORKERS = ["--config.strategy=multi_worker", "--config.micro_batch=8"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of all layouts, with a teacher that exists."""
    teacher = tmp_path_factory.mktemp("teacher") / "run"
    preset = f"--config={processes.ROOT / 'configs'}/quickstart.py:teacher"
    with processes.main(preset, "--config.total_updates=8", f"--workdir={teacher}") as process:
        assert process.code() == 0, process.output()
    return [*FLAGS, "--config.teacher.kind=run", f"--config.teacher.path={teacher}"]


def finish(*processes):
    for process in processes:
        with process:
            assert process.code() == 0, process.output()


@pytest.fixture(scope="module")
def one_process(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(processes.main(*flags, *ONE, f"--workdir={workdir}"))
    return workdir


def assert_same_losses(workdir, reference):
    (*_, lines), (*_, expected) = processes.final(workdir), processes.final(reference)
    assert [line["step"] for line in lines] == list(range(TOTAL + 1))
    for name in ("train/loss", "train/loss_cls", "train/loss_distill"):
        found, wanted = ([line[name] for line in each[1:]] for each in (lines, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=name)
    assert len({line["train/loss"] for line in lines[1:]}) == TOTAL


@pytest.mark.parametrize("layout", [HALVED, TWO_DEVICES], ids=["micro_batch halved", "two devices"])
def test_another_layout_of_one_process_has_the_same_losses(layout, flags, one_process, tmp_path):
    finish(processes.main(*flags, *layout, f"--workdir={tmp_path / 'run'}"))
    assert_same_losses(tmp_path / "run", one_process)


def test_two_processes_have_the_same_losses(flags, one_process, tmp_path):
    finish(*processes.workers(2, *flags, *TWO_WORKERS, f"--workdir={tmp_path / 'run'}"))
    assert_same_losses(tmp_path / "run", one_process)


def test_a_run_moves_between_layouts_and_keeps_its_losses(flags, one_process, tmp_path):
    workdir = tmp_path / "run"
    for layout, last in ((TWO_DEVICES, 4), (HALVED, 10)):
        with processes.main(*flags, *layout, f"--workdir={workdir}") as process:
            process.wait_for(rf"update {last}/")
            process.send(signal.SIGTERM)
            assert process.code() == 42, process.output()
    chief, other = processes.workers(2, *flags, *TWO_WORKERS, f"--workdir={workdir}")
    finish(chief, other)
    assert "continuing" in chief.output() and "continuing" in other.output()
    assert_same_losses(workdir, one_process)
