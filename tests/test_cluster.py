"""Two workers under the supervisor, and every fault that one of them can have: the run is the undisturbed one.

A start costs most of the time here, so one run suffers several faults in turn.
"""

import os
import signal
import socket

import processes
import pytest

from deit import keras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOTAL = 12
FLAGS = processes.scratch(total=TOTAL, micro_batch=8)
QUICKLY = ["--backoff", "0.1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two workers leave that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    chief, other = processes.workers(2, *FLAGS, f"--workdir={workdir}")
    with chief, other:
        assert (chief.code(), other.code()) == (0, 0), chief.output() + other.output()
    assert "is worker 1" in other.output() and "update 1/" not in other.output(), "only the chief tells of updates"
    result = processes.final(workdir)
    assert result[0] == f"step-{TOTAL:08d}" and [line["step"] for line in result[2]] == list(range(1, TOTAL + 1))
    return result


def test_killed_workers_are_replaced_and_the_run_is_the_undisturbed_one(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with processes.supervised("-n", 2, *QUICKLY, "--", *FLAGS, f"--workdir={workdir}") as group:
        group.wait_for(r"update 3/")
        os.kill(processes.pids(group, 1)[1], signal.SIGKILL)
        group.wait_for(r"worker 0: exit 3")  # the chief noticed, and left by itself

        after = len(group.lines)
        seen, chief = set((workdir / "checkpoints").glob("tmp-[0-9]*")), processes.pids(group, 2)[0]
        while not set((workdir / "checkpoints").glob("tmp-[0-9]*")) - seen:  # there for milliseconds: no pause
            assert group.process.poll() is None, group.output()
        os.kill(chief, signal.SIGKILL)  # while it saves
        group.wait_for(r"worker 1: exit 3", after)

        after = len(group.lines)
        group.wait_for(r"evaluating after update (5|10)\b", after)
        os.kill(processes.pids(group, 3)[0], signal.SIGKILL)
        group.wait_for(r"start 4: pid", after)
        assert group.code() == 0, group.output()
    assert processes.final(workdir) == undisturbed


def test_a_port_in_use_a_lonely_worker_and_a_hung_one_are_survived(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        limits = ["--port", port, "--startup", 60, "--grace", 5]
        with processes.supervised("-n", 2, *QUICKLY, *limits, "--", *FLAGS, f"--workdir={workdir}") as group:
            group.wait_for(rf"port {port} is in use, passed over")
            os.kill(processes.pids(group, 1)[1], signal.SIGSTOP)  # before it is up: worker 0 waits for it in vain
            group.wait_for(r"not up after 60 s: worker 0, 1")
            after = len(group.lines)
            group.wait_for(r"update 7/", after)
            os.kill(processes.pids(group, 2)[1], signal.SIGSTOP)
            group.wait_for(r"worker 0: exit 3", after)  # its heartbeat stopped
            group.wait_for(r"worker 1 was killed by SIGKILL", after)
            assert group.code() == 0, group.output()
    assert processes.final(workdir) == undisturbed


def test_sigterm_to_one_worker_saves_and_ends_both_at_the_same_update_and_the_run_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    chief, other = processes.workers(2, *FLAGS, f"--workdir={workdir}")
    with chief, other:
        chief.wait_for(r"update 4/")
        other.send(signal.SIGTERM)
        assert (chief.code(), other.code()) == (42, 42), chief.output() + other.output()
        stopped = {each.wait_for(r"stopped after update (\d+) of")[1] for each in (chief, other)}
    (step,) = stopped
    assert max(path.name for path in (workdir / "checkpoints").glob("step-*")) == f"step-{int(step):08d}"

    with processes.supervised("-n", 2, *QUICKLY, "--", *FLAGS, f"--workdir={workdir}") as group:
        group.wait_for(rf"continuing .* after update {step} of {TOTAL}")
        group.wait_for(r"update 9/")
        group.send(signal.SIGINT)  # Ctrl-C: they save, and are not started again
        assert group.code() == 42, group.output()
        assert "start 2" not in group.output()
    with processes.supervised("-n", 2, *QUICKLY, "--", *FLAGS, f"--workdir={workdir}") as group:
        assert group.code() == 0, group.output()
    assert processes.final(workdir) == undisturbed


def test_workers_that_were_started_with_different_commands_refuse_each_other(tmp_path):
    ports, workdir = processes.free_ports(2), f"--workdir={tmp_path / 'run'}"
    chief = processes.worker(0, ports, *FLAGS, workdir)
    other = processes.worker(1, ports, *FLAGS, "--config.optim.peak_lr=0.5", workdir)
    with chief, other:
        assert (chief.code(), other.code()) == (1, 1)
        for each in (chief, other):
            assert "error: the workers of this run differ in configuration or data" in each.output()


def test_a_backbone_with_statistics_trains_in_two_workers_and_goes_on_to_the_same_bits(tmp_path):
    weights = tmp_path / "mobilenet.h5"
    small = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(32, 32, 3))
    small.save_weights(weights)
    flags = [
        f"--config={processes.ROOT / 'configs'}/quickstart.py:scratch", "--config.model.variant=backbone",
        "--config.model.backbone=MobileNet", f"--config.model.weights={weights}", "--config.global_batch=32",
        "--config.micro_batch=16", "--config.total_updates=10", "--config.checkpoint.every_updates=1",
        "--config.eval.every_updates=0", "--config.log.every_updates=1",
    ]  # fmt: skip
    for name, stopped in (("whole", False), ("stopped", True), ("stopped", False)):
        group = processes.workers(2, *flags, f"--workdir={tmp_path / name}")
        with group[0], group[1]:
            if stopped:
                group[0].wait_for(r"update 2/")
                group[1].send(signal.SIGTERM)
            codes = [each.code() for each in group]
            assert codes == ([42, 42] if stopped else [0, 0]), group[0].output() + group[1].output()
    assert processes.final(tmp_path / "whole") == processes.final(tmp_path / "stopped")


def test_a_worker_that_waits_in_vain_ends_by_itself(tmp_path):
    workdir = tmp_path / "run"
    with processes.worker(
        0, processes.free_ports(2), *FLAGS, "--config.startup_seconds=5", f"--workdir={workdir}"
    ) as lonely:
        lonely.wait_for(r"worker 0 of 2, 127\.0\.0\.1:\d+, waits for the others, at most 5 s")
        assert lonely.code() == -signal.SIGALRM
    assert not workdir.exists()


def test_a_worker_whose_port_is_taken_says_so_in_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], *processes.free_ports(1)]
        with processes.worker(0, ports, *FLAGS, f"--workdir={tmp_path / 'run'}") as worker:
            assert worker.code() == 1, worker.output()
            assert f"TF_CONFIG: this worker's address (127.0.0.1:{ports[0]}): Address already in use" in worker.output()
            assert "Traceback" not in worker.output()


def test_a_bad_field_is_not_tried_again(tmp_path):
    with processes.supervised(
        "-n", 2, "--", *FLAGS, "--config.optim.peak_lr=-1", f"--workdir={tmp_path / 'run'}"
    ) as group:
        assert group.code() == 1
        assert "optim.peak_lr (-1.0) must be greater than 0" in group.output()
        assert "start 2:" not in group.output()
