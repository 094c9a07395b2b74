"""launch/local.py with small stand-ins for main.py: when it restarts, what it ends with, and that nothing is left."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deit import errors
from launch import local, supervisor

ROOT = Path(__file__).resolve().parents[1]

# What every stand-in begins with: which worker it is, its how many-th start, and what main.py would do.
PRELUDE = """
import json, os, pathlib, signal, sys
here = pathlib.Path(sys.argv[1])
config = json.loads(os.environ.get("TF_CONFIG", '{"cluster": {"worker": [0]}, "task": {"index": 0}}'))
index, workers = config["task"]["index"], len(config["cluster"]["worker"])
counter = here / f"starts-{index}"
start = 1 + (int(counter.read_text()) if counter.exists() else 0)
counter.write_text(str(start))

def up():
    print(f"12:00:00 cluster of {workers} workers is up, this is worker {index}", flush=True)

def checkpoint(step, run="."):
    (here / run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

def on_term(action):
    signal.signal(signal.SIGTERM, action)

def wait():
    while True:
        signal.pause()
"""


def script(here, body) -> list[str]:
    """Write a stand-in and return its command."""
    path = here / "stand_in.py"
    path.write_text(PRELUDE + body)
    return [sys.executable, "-IS", str(path), str(here)]


def supervise(here, body, *, react=lambda line, group: None, workers=2, max_restarts=5, backoff=0.0, **options):
    """Run stand-ins to the end; `react(line, group)` is told every line shown. Return (exit code, lines)."""
    lines = []

    def say(line):
        lines.append(line)
        react(line, group)

    options = {"startup": 30.0, "grace": 30.0, "verbose": True, **options}
    with supervisor.Supervisor(
        script(here, body), environments=lambda log: local.environments(workers, 0, log), logs=here, say=say, **options
    ) as group:
        code = local.keep_going(group, here, max_restarts=max_restarts, backoff=backoff)
    return code, lines


def starts(here) -> list[int]:
    """Return how often each worker was started."""
    return [int(path.read_text()) for path in sorted(here.glob("starts-*"))]


def shown(lines, text) -> int:
    return sum(text in line for line in lines)


def on(text, action):
    """Return a `react` that calls `action(group)` for the lines that hold a text."""
    return lambda line, group: action(group) if text in line else None


def usr1(*indices):
    """Return an action that tells workers by SIGUSR1 that it is their turn to end."""
    return lambda group: [os.kill(group.workers[index].process.pid, signal.SIGUSR1) for index in indices]


def ended(*codes, stopped=()):
    return [
        SimpleNamespace(index=i, code=code, stopped=i in stopped, log=f"worker-{i}.log") for i, code in enumerate(codes)
    ]


def test_workers_that_are_all_done_end_the_run(tmp_path):
    code, lines = supervise(tmp_path, "up()")
    assert code == 0 and starts(tmp_path) == [1, 1]
    assert shown(lines, "worker 0: exit 0, done") == shown(lines, "worker 1: exit 0, done") == 1


@pytest.mark.parametrize(
    "end, told",
    [
        ("sys.exit(3)", "worker 1: exit 3, lost a peer"),
        ("sys.exit(42)", "worker 1: exit 42, preempted after saving"),
        ("sys.exit(137)", "worker 1: exit 137, ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "worker 1 was killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGALRM)", "worker 1 was killed by SIGALRM"),
        ("signal.signal(signal.SIGABRT, signal.SIG_DFL); os.abort()", "worker 1 was killed by SIGABRT"),
    ],
)
def test_a_lost_or_preempted_worker_has_all_started_again(tmp_path, end, told):
    code, lines = supervise(tmp_path, f"up()\nif start == 1:\n    if index == 0: sys.exit(3)\n    {end}")
    assert code == 0 and starts(tmp_path) == [2, 2]
    assert shown(lines, told) == 1 and shown(lines, "TERM to") == 0  # the peer ended by itself


def test_a_worker_that_hears_no_term_is_killed_after_the_grace(tmp_path):
    body = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
        "on_term(signal.SIG_IGN)\nup()\n"
        "if index == 1: os.kill(os.getpid(), signal.SIGSTOP)\nwait()"
    )
    code, lines = supervise(tmp_path, body, grace=0.2, max_restarts=0, react=on("all workers are up", usr1(0)))
    assert code == 3 and starts(tmp_path) == [1, 1]
    assert [line.split(" ", 1)[1] for line in lines if "to worker 1" in line] == [
        "ending the rest: TERM to worker 1",
        "KILL to worker 1",
    ]
    assert "worker 1 was killed by SIGKILL" in lines[-1]


@pytest.mark.parametrize("code", [1, 4, 2, 77])
def test_an_error_of_the_program_is_handed_on_without_a_restart(tmp_path, code):
    body = f"on_term(lambda *_: sys.exit(1))\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))\nup()\nwait()"
    ended_with, lines = supervise(tmp_path, body, react=on("all workers are up", usr1(1)))
    assert ended_with == code and starts(tmp_path) == [1, 1]
    assert shown(lines, "error: ") == 1 and str(tmp_path / "worker-1.log") in lines[-1]


def test_the_verdict_is_what_no_worker_was_told_to_say():
    assert local.verdict(ended(0, 0)) == 0
    assert local.verdict(ended(3, 4)) == local.verdict(ended(4, 1)) == local.verdict(ended(2, 4)) == 4
    assert local.verdict(ended(42, 1)) == local.verdict(ended(1, -9)) == 1
    assert local.verdict(ended(3, 1, stopped=[1])) is None
    assert local.verdict(ended(0, -9, stopped=[1])) is None  # one that hung is not done
    assert local.verdict(ended(0, 0, stopped=[1])) == 0
    for lost in (3, 42, -6, -9, -14, -15, 130, 137, 143):
        assert local.verdict(ended(lost, 0)) is None


def test_restarts_without_progress_are_capped(tmp_path):
    code, lines = supervise(tmp_path, "up()\nsys.exit(3)", max_restarts=2)
    assert code == 3 and starts(tmp_path) == [3, 3]
    assert "error: no new checkpoint in 2 restarts" in lines[-1] and shown(lines, "error: ") == 1
    for index in (0, 1):
        assert f"worker {index}: exit 3, lost a peer ({tmp_path}/worker-{index}.log)" in lines[-1]


def test_without_restarts_it_says_so_and_nothing_of_checkpoints(tmp_path):
    code, lines = supervise(tmp_path, "up()\nif index == 0: checkpoint(1)\nsys.exit(42)", max_restarts=0)
    assert code == 3 and starts(tmp_path) == [1, 1]
    assert "error: restarts are off (--max-restarts 0): worker 0: exit 42, preempted after saving" in lines[-1]
    assert shown(lines, "no new checkpoint") == 0


@pytest.mark.parametrize("run", [".", "teacher"])
def test_a_new_checkpoint_resets_the_cap(tmp_path, run):
    body = f"up()\nif index == 0 and start <= 2: checkpoint(99_999_998 + start, {run!r})\nsys.exit(3)"
    code, _ = supervise(tmp_path, body, max_restarts=1)
    assert code == 3 and starts(tmp_path) == [3, 3]  # two that saved and the one restart without a new checkpoint


def test_the_pause_doubles_to_a_minute_and_begins_anew_after_a_checkpoint(tmp_path):
    pauses = []

    def run_once(start):
        if start == 9:
            (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
        return ended(3, -9)

    group = SimpleNamespace(signals=[], run_once=run_once, log=lambda _: None, pause=pauses.append)
    assert local.keep_going(group, tmp_path, max_restarts=8, backoff=1.0) == 3
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.slow  # it waits ten seconds: on a busy machine a process may need some of them to come up
def test_workers_that_are_not_up_in_time_are_killed_and_started_again(tmp_path):
    body = "on_term(signal.SIG_IGN)\nif start > 1 or index == 0: up()\nif start == 1: wait()"
    code, lines = supervise(tmp_path, body, startup=10.0)  # on a busy machine an interpreter may take seconds
    assert code == 0 and min(starts(tmp_path)) >= 2
    assert shown(lines, "not up after 10 s: worker 1") == 1 and shown(lines, "KILL to worker 0, 1") == 1


def test_one_worker_is_up_with_its_first_line():
    assert supervisor.says_up("anything", 1)
    assert supervisor.says_up("12:00:00 cluster of 2 workers is up, this is worker 1", 2)
    assert not supervisor.says_up("12:00:00 cluster of 12 workers is up", 2) and not supervisor.says_up("anything", 2)


def test_an_interrupt_is_one_term_for_each_worker_and_never_a_restart(tmp_path):
    saving = "on_term(lambda *_: os.write(1, b'TERM\\n'))\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(42))\n"
    told = []

    def react(line, group):
        told.extend([line] * line.endswith("] TERM"))
        if "all workers are up" in line:
            group.interrupt(signal.SIGINT)
        elif told[1:] == [line]:  # both have heard the first; the lines come from two threads
            group.interrupt(signal.SIGTERM)
        elif "waiting for the save" in line:
            usr1(0, 1)(group)

    code, lines = supervise(tmp_path, saving + "up()\nwait()", react=react)
    assert code == 42 and starts(tmp_path) == [1, 1]
    assert sorted(told) == ["[0] TERM", "[1] TERM"]
    assert shown(lines, "SIGINT, stopping: TERM to worker 0, TERM to worker 1") == 1


def test_a_worker_that_is_already_ending_is_not_told_again(tmp_path):
    body = (
        "on_term(lambda *_: os.write(1, b'TERM\\n'))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0 if index else 1))\nup()\nwait()"
    )

    def react(line, group):
        if "all workers are up" in line:
            usr1(0)(group)
        elif line == "[1] TERM":
            group.interrupt(signal.SIGINT)
        elif "SIGINT, stopping" in line:
            usr1(1)(group)

    code, lines = supervise(tmp_path, body, react=react)
    assert code == 1 and starts(tmp_path) == [1, 1]
    assert shown(lines, "ending the rest: TERM to worker 1") == shown(lines, "[1] TERM") == 1
    assert shown(lines, "SIGINT, stopping: worker 1 was told before") == 1 and shown(lines, "TERM to worker") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_third_signal_kills(tmp_path, number):
    react = on("all workers are up", lambda group: [group.interrupt(number) for _ in range(3)])
    code, lines = supervise(tmp_path, "on_term(signal.SIG_IGN)\nup()\nwait()", react=react)
    assert code == 128 + number and starts(tmp_path) == [1, 1]
    assert shown(lines, "was killed by SIGKILL") == 2


def test_a_worker_that_does_not_save_within_the_grace_is_killed(tmp_path):
    react = on("all workers are up", lambda group: group.interrupt(signal.SIGTERM))
    body = "on_term(signal.SIG_IGN if index else lambda *_: sys.exit(0))\nup()\nwait()"
    assert supervise(tmp_path, body, react=react, grace=0.2)[0] == 137


def test_a_worker_that_still_starts_is_killed_without_the_grace(tmp_path):
    react = on("[1] loading", lambda group: group.interrupt(signal.SIGINT))
    body = "on_term(signal.SIG_IGN)\nprint('loading', flush=True)\nwait()"
    code, lines = supervise(tmp_path, body, react=react, grace=10_000.0)
    assert code == 137 and shown(lines, "KILL (still starting) to worker 1") == 1


def test_an_interrupt_ends_the_pause_before_a_restart(tmp_path):
    react = on("restart in", lambda group: group.interrupt(signal.SIGINT))
    assert supervise(tmp_path, "up()\nsys.exit(42 if index else 3)", react=react, backoff=10_000.0)[0] == 42
    assert starts(tmp_path) == [1, 1]


def test_an_interrupted_run_ends_with_the_gravest_code():
    cases = {(0, 0): 0, (0, 42): 42, (42, 3): 42, (3, 0): 3, (42, 1): 1, (1, 4): 4, (0, -9): 137, (-15, 0): 143}
    assert {codes: local.interrupted(codes) for codes in cases} == cases


@pytest.mark.parametrize("both", [False, True])
def test_a_port_in_use_is_passed_over(both):
    if both and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if both else {}  # [::] is where gRPC listens
    with socket.create_server(("", 0), **family) as taken:
        base, said = taken.getsockname()[1], []
        first, second = local.free_ports(2, base, said.append)
    assert base < first < second and said[0] == f"port {base} is in use, passed over"


def test_without_a_base_ports_differ_and_lie_below_those_of_outgoing_connections():
    ports = local.free_ports(50, 0, pytest.fail)
    assert len(set(ports)) == 50 and min(ports) >= 20_000 and max(ports) < 32_000
    assert set(ports) != set(local.free_ports(50, 0, pytest.fail))


def test_a_chosen_port_is_free(monkeypatch):
    port = local.free_ports(1, 0, pytest.fail)[0]
    monkeypatch.setattr(local, "_OWN_PORTS", range(port, port + 1))
    with socket.create_server((local.HOST, port)), pytest.raises(errors.UserError, match=f"1 free ports up to {port}"):
        local.free_ports(1, 0, pytest.fail)


def test_ports_that_end_too_early_are_bad_input():
    with pytest.raises(errors.UserError, match=r"--port \(65535\) must leave room for 2"):
        local.free_ports(2, 65535, print)


def test_each_worker_has_its_own_index_in_the_same_cluster(tmp_path):
    code, lines = supervise(tmp_path, "up()\nprint(os.environ['TF_CONFIG'])", workers=3)
    assert code == 0
    seen = {line[1]: json.loads(line[4:]) for line in lines if line[4:5] == "{"}
    assert {name: each["task"] for name, each in seen.items()} == {
        str(index): {"type": "worker", "index": index} for index in range(3)
    }
    clusters = [each["cluster"]["worker"] for each in seen.values()]
    assert clusters[0] == clusters[1] == clusters[2] and len(set(clusters[0])) == 3
    assert all(address.startswith("127.0.0.1:") for address in clusters[0])


def test_a_single_worker_has_no_tf_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "someone else's")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    body = "print(sorted(set(os.environ) & {'TF_CONFIG', 'PYTHONUNBUFFERED'}), os.environ['CUDA_VISIBLE_DEVICES'])"
    code, lines = supervise(tmp_path, body, workers=1)
    assert code == 0 and "[0] ['PYTHONUNBUFFERED'] 0,1" in lines


@pytest.mark.parametrize(
    "given, own",
    [("4,7,9", ["4", "7"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("-1", [None, None]), (None, [None] * 2)],
)
def test_each_worker_takes_one_device_of_a_list(monkeypatch, given, own):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in local.devices(2)] == own


def test_logs_are_kept_by_worker_over_restarts_and_only_news_of_the_others_are_shown(tmp_path):
    body = "up()\nprint(f'line of {index}')\nprint(f'warning: {index}')\nsys.exit(3 if start == 1 else 0)"
    code, lines = supervise(tmp_path, body, verbose=False)
    assert code == 0
    for index in (0, 1):
        log = (tmp_path / f"worker-{index}.log").read_text().splitlines()
        assert [line.split(", pid")[0] for line in log if line.startswith("--- ")] == ["--- start 1", "--- start 2"]
        assert log.count(f"line of {index}") == log.count(f"warning: {index}") == 2 and len(log) == 8
    assert shown(lines, "[0] line of 0") == shown(lines, "[1] warning: 1") == 2 and shown(lines, "line of 1") == 0


def test_the_last_lines_of_a_worker_that_went_wrong_are_shown(tmp_path):
    body = (
        "up()\nif index == 1:\n    for i in range(20): print('line', i)\n    raise ValueError('why')\n"
        "on_term(lambda *_: sys.exit(0))\nwait()"
    )
    code, lines = supervise(tmp_path, body, verbose=False)
    assert code == 1
    told = [line for line in lines if line.startswith("[1] ")]
    assert len(told) == 10 and told[0].startswith("[1] line") and told[-1] == "[1] ValueError: why"
    assert lines.index(told[0]) > next(i for i, line in enumerate(lines) if "worker 1: exit 1, an error" in line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path):
    (tmp_path / "worker-0.log").symlink_to("/dev/full")
    code, lines = supervise(tmp_path, "up()\nprint('x' * 200_000)")
    assert code == 0 and shown(lines, "nothing more is written there") == 1 and shown(lines, "[0] xxx") == 1


@pytest.mark.parametrize(
    "arguments, where",
    [
        (["--workdir=a/b"], "a/b"),
        (["-workdir", "a", "--config=x.py"], "a"),
        (["--workdir=a", "--workdir", "b"], "b"),
        (["--config=configs/deit_tiny_flowers.py:teacher"], "runs/deit_tiny_flowers-teacher"),
        (["--config", "runs/one/config.json"], "runs/one-repeat"),
        (["--mode=plan", "--config.seed=3"], "runs/quickstart"),
    ],
)
def test_the_workdir_is_the_one_of_main(arguments, where):
    assert local.workdir_of(arguments) == Path(where)


@pytest.mark.parametrize(
    "arguments, part",
    [
        ("-n 0 --", "(0) must be a whole number, at least 1"),
        ("-n two --", "(two) must be a whole number"),
        ("--", "-n/--workers"),
        ("-n 2", "-- is missing"),
        ("-n 2 --unknown --", "--unknown"),
        ("-n 2 --max 3 --", "--max"),
        ("-n 2 --grace nan --", "(nan) must be a number of seconds"),
        ("-n 2 --port 70000 --", "(70000)"),
        ("-n 2 -- --workdir=gs://bucket/run", "gs:"),
        ("-n 2 --logs /dev/null/logs --", "/dev/null/logs"),
    ],
)
def test_bad_input_is_one_line(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.main(arguments.split()) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and part in err, err
    assert not list(tmp_path.iterdir())


def test_too_few_devices_are_one_line(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert local.main(["-n", "2", "--"]) == 1
    assert "CUDA_VISIBLE_DEVICES (3) must list a device for each of 2 workers" in capsys.readouterr().err


def test_the_script_hands_on_what_main_says_of_a_bad_flag(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", "1", "--", "--workdir=run", "--wrkdir=x"]
    command.append(f"--config={ROOT}/configs/quickstart.py")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "[0] error: Unknown command line flag 'wrkdir'" in done.stderr, done.stderr
    assert "wrkdir" in (tmp_path / "run" / "logs" / "worker-0.log").read_text()


def test_the_supervisor_does_without_tensorflow():
    code = "import sys; from launch import local; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


@contextlib.contextmanager
def process(here, body):
    """Start the supervisor of two stand-ins in a process of its own, read until they are up; yield it."""
    script(here, body)
    code = (
        "import sys, pathlib; from launch import local\n"
        "sys.exit(local.main(['-n', '2', '--', sys.argv[1], '--workdir=' + sys.argv[1]], pathlib.Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(here), str(here / "stand_in.py")]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert any("all workers are up" in line for line in running.stderr)
            yield running
        finally:
            running.kill()


def test_a_real_ctrl_c_stops_and_saves(tmp_path):
    with process(tmp_path, "on_term(lambda *_: sys.exit(42))\nup()\nwait()") as running:
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(30) == 42, rest
    assert "SIGINT, stopping: TERM to worker 0, TERM to worker 1" in rest and "Traceback" not in rest


def test_a_killed_supervisor_leaves_no_worker(tmp_path):
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    with open(alive, "rb") as end, process(tmp_path, "held = open(here / 'alive', 'w')\nup()\nwait()") as running:
        os.set_blocking(alive, True)
        running.kill()
        assert end.read() == b""  # comes when no worker holds it any more
