"""Strategies, who is the chief, what an error says of a lost peer, to whom a worker's port is open."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid

import devices
import pytest
import tensorflow as tf

from configs import base
from deit import errors, runtime, workers


def config(**changes):
    c = base.get_config()
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


def test_auto_is_one_device_also_where_there_are_several():
    assert len(tf.config.list_logical_devices("CPU")) == 2
    strategy = runtime.make_strategy(config())
    assert strategy.num_replicas_in_sync == 1 and workers.place(strategy) == workers.Place(0, 1)


def test_more_devices_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(errors.UserError, match=r"devices \(3\) must be at most the 2 CPU devices found"):
        runtime.make_strategy(config(strategy="mirrored", devices=3))


def test_multi_worker_without_a_cluster_names_what_starts_one():
    with pytest.raises(errors.UserError, match=r"strategy \('multi_worker'\) needs TF_CONFIG .* launch/local\.py -n 2"):
        runtime.make_strategy(config(strategy="multi_worker"))


def test_a_plan_counts_the_workers_of_a_cluster_without_waiting_for_them(monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1", "c:1"]}, "task": {"type": "worker", "index": 2}}'
    )
    assert runtime.replicas(config()) == runtime.replicas(config(strategy="multi_worker")) == 3
    assert runtime.replicas(config(strategy="one_device")) == 1


def test_only_a_mirrored_configuration_splits_the_cpu():
    assert runtime.logical_cpus(config(strategy="mirrored", devices=3)) == 3
    assert runtime.logical_cpus(config(strategy="mirrored")) == 1
    assert runtime.logical_cpus(config(devices=3)) == 1


@pytest.mark.parametrize("strategy", [devices.one_device, devices.two_cpus])
def test_in_one_process_the_chief_agrees_with_itself(strategy):
    assert workers.place(strategy()).chief
    assert workers.from_chief(strategy(), 7) == workers.total(strategy(), 7) == 7
    with workers.chief_first(strategy()):
        workers.barrier(strategy())


UNAVAILABLE = tf.errors.UnavailableError(None, None, "Socket closed\nmore")
ABORTED = tf.errors.InternalError(None, None, "Graph execution error:\nCollective ops is aborted by: peer is gone\nx")


@pytest.mark.parametrize(
    ("error", "count", "told"),
    [
        (UNAVAILABLE, 2, "Socket closed"),
        (ABORTED, 2, "peer is gone"),
        (UNAVAILABLE, 1, ""),  # alone there is no peer to lose
        (tf.errors.InvalidArgumentError(None, None, "bad shape"), 2, ""),
        (ValueError("Collective ops is aborted by: x"), 2, ""),
    ],
)
def test_an_error_is_a_lost_peer_where_tensorflow_says_so_and_there_are_peers(monkeypatch, error, count, told):
    monkeypatch.setattr(workers, "place", lambda _: workers.Place(0, count))
    assert workers.lost_peer(error, None) == told


def test_a_deadline_ends_the_process_by_sigalrm_and_a_block_in_time_restores_the_handlers():
    code = "from deit import runtime; import threading\nwith runtime._deadline(0.2): threading.Event().wait(100)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGALRM
    before = signal.getsignal(signal.SIGINT)
    with runtime._deadline(100):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@contextlib.contextmanager
def neighbour():
    """Give (command prefix that runs something in another network, this machine's address there)."""
    name, link = f"deit-{uuid.uuid4().hex[:6]}", uuid.uuid4().hex[:6]
    commands = (
        f"ip netns add {name}",
        f"ip link add a{link} type veth peer name b{link} netns {name}",
        f"ip addr add 10.77.{os.getpid() % 250}.1/24 dev a{link}",
        f"ip link set a{link} up",
        f"ip netns exec {name} ip addr add 10.77.{os.getpid() % 250}.2/24 dev b{link}",
        f"ip netns exec {name} ip link set b{link} up",
    )
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', error)}")
        yield ["ip", "netns", "exec", name], f"10.77.{os.getpid() % 250}.1"
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_worker_s_port_on_loopback_is_closed_to_other_machines():
    with (
        neighbour() as (elsewhere, address),
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server,  # as TensorFlow listens
    ):
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(({address!r}, {port}), timeout=5)"
        command = [*elsewhere, sys.executable, "-c", connect]
        assert subprocess.run(command, capture_output=True).returncode == 0, "open to begin with"
        runtime._keep_to_its_interface(f"127.0.0.1:{port}")
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Connection refused" in done.stderr
        socket.create_connection(("127.0.0.1", port)).close()


def test_who_may_reach_a_worker_elsewhere_is_said(caplog):
    runtime._keep_to_its_interface("10.1.2.3:23450")
    assert "port 23450 runs code for whoever reaches it" in caplog.text
