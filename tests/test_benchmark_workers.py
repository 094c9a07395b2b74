"""What workers send: collectives counted by hand, the interface's counters, processes that end, two real workers."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

from deit import errors
from tools.benchmarks import workers

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
COUNTERS = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
  eth0: 3680401447   90768    0    0    0     0          0         0  3478394   42537    0    0    0     0       0          0
    lo:314637541   23012    0    0    0     0          0         0 271828   23012    0    0    0     0       0          0
"""  # noqa: E501


def reduced(vector: tf.Tensor) -> tf.Tensor:
    """Return what a collective of two makes of a vector."""
    return tf.raw_ops.CollectiveReduceV2(
        input=vector, group_size=2, group_key=1, instance_key=1, ordering_token=[], merge_op="Add", final_op="Id"
    )


def counted(function, *shapes) -> workers.Collectives:
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    return workers.collectives(tf.function(function, autograph=False).get_concrete_function(*specs).graph)


def test_a_graph_without_a_collective_sends_nothing():
    assert counted(lambda x: x + 1.0, [7]) == workers.Collectives(0, 0, 0)


def test_a_collective_counts_with_the_bytes_of_its_input():
    assert counted(reduced, [3, 5]) == workers.Collectives(1, 0, 3 * 5 * 4)
    assert counted(lambda x: reduced(tf.cast(x, tf.float16)), [3, 5]) == workers.Collectives(1, 0, 3 * 5 * 2)


def test_a_collective_in_a_loop_s_body_is_found_and_said_to_be_in_a_loop():
    def loop(x):
        return reduced(tf.while_loop(lambda i, _: i < 16, lambda i, v: (i + 1, reduced(v)), (0, x))[1])

    assert counted(loop, [4]) == workers.Collectives(2, 1, 2 * 16)


def test_a_function_called_twice_within_a_branch_counts_twice():
    inner = tf.function(lambda x: reduced(x), autograph=False)

    def branch(x):
        return tf.cond(x[0] > 0, lambda: inner(x) + inner(2.0 * x), lambda: x)

    assert counted(branch, [6]) == workers.Collectives(2, 0, 2 * 24)


def test_a_collective_of_a_size_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"CollectiveReduceV2.*bytes are not known"):
        counted(reduced, [None])


def test_the_bytes_that_lo_has_sent_are_the_ninth_counter_of_its_line():
    assert workers.loopback_bytes(COUNTERS) == 271828


@pytest.mark.parametrize("text", [COUNTERS.replace("  lo:", "  l1:"), None])
def test_a_machine_without_the_interface_s_counters_is_told_what_is_missing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_COUNTERS", tmp_path / "dev")
    if text:
        (tmp_path / "dev").write_text(text)
    with pytest.raises(errors.UserError, match="must be there and count the bytes of lo"):
        workers.sent()


@pytest.mark.parametrize(
    ("cores", "expected"),
    [([0, 1], ([0], [1])), ([0, 1, 4, 6, 7], ([0, 1], [4, 6])), ([3], ([3], [3]))],
)
def test_each_worker_gets_half_of_the_cores(cores, expected):
    assert workers.shares(cores) == expected


def result() -> dict:
    """Return a measurement of updates of 64 images: 2 s and then 4 s by two workers, 4 s by one process."""
    turns = [
        {"wire": 9000, "lasted": 6.0, "two": [[2.0, 2.0, 9.0], [2.0, 2.0, 9.0]], "one": [4.0, 4.0, 5.0]},
        {"wire": 9030, "lasted": 6.0, "two": [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]], "one": [4.0, 1.0, 4.0]},
        {"wire": 30000, "lasted": 6.0, "two": [[1.0, 2.0, 4.0], [2.0, 2.0, 2.0]], "one": [4.0, 4.0, 4.0]},
    ]
    setting = {
        "accum_steps": 16, "global_batch": 64, "parameters": 350, "count": 1, "in_loops": 0, "bytes": 1420,
        **workers.summary(turns, 64, silence=8.0),
    }  # fmt: skip
    return {
        "model": "deit", "data": "digits", "precision": "float32", "micro_batch": 2, "rounds": 3, "updates": 3,
        "cores": [[0, 1], [4, 6]], "idle_bytes_per_sec": 8.0, "settings": [setting],
    }  # fmt: skip


def test_the_figures_are_medians_of_rounds_and_the_workers_rates_add_up():
    found = result()["settings"][0]
    assert (found["two_images_per_sec"], found["one_images_per_sec"], found["ratio"]) == (32.0, 16.0, 2.0)
    assert found["wire_bytes"] == 3010
    assert found["idle_share"] == pytest.approx(8 * 18 / 48030)


def test_the_lines_say_what_is_expected_and_what_is_set():
    text = "\n".join(workers.lines(result()))
    for part in (
        "micro-batches of 2 images of digits; no teacher",
        "bound to cores 0, 1 | 4, 6, a thread a core; the one process to 0, 1, 4, 6",
        "8 bytes/s on lo",
        "global_batch 64; collectives an update: 1\n",
        "1,420 bytes an update = 4 x 350 parameters + 20",
        "3,010 bytes an update, 1.0599 of 2 x 1,420:",
        "sends the vector once (idle traffic: 0.30%)",
        "32.00 images/s, accum_steps 16",
        "16.00 images/s, accum_steps 32; two workers: 2.000 of it",
    ):
        assert part in text


def test_collectives_in_loops_are_told():
    found = result()
    found["settings"][0].update(count=3, in_loops=2)
    assert "collectives an update: 3, 2 in loops" in "\n".join(workers.lines(found))


def group(scripts: dict[str, str], patience: float = 60.0) -> workers.Group:
    """Return stand-ins for workers that run a Python script each."""
    cores = os.sched_getaffinity(0)
    command = [sys.executable, "-IS", "-c", "import os; exec(os.environ['SCRIPT'])"]
    return workers.Group(command, {n: ({"SCRIPT": text}, cores) for n, text in scripts.items()}, patience=patience)


ECHO = "import json, sys\nfor line in sys.stdin: print('noise'); print(json.dumps({'got': line.strip()}), flush=True)"


def test_every_process_answers_every_command_and_ends_with_the_block():
    with group({"worker 0": ECHO, "worker 1": ECHO}) as pair:
        assert pair.ask("update", 16, 3) == [{"got": '["update", 16, 3]'}] * 2
        assert pair.ask("close", 1) == [{"got": '["close", 1, 0]'}] * 2
    assert [process.returncode for process in pair._processes] == [0, 0]


def test_a_process_has_only_the_cores_that_it_was_given():
    core = min(os.sched_getaffinity(0))
    script = (
        "import json, os\ninput(); print(json.dumps({'cores': list(os.sched_getaffinity(0))}), flush=True); input()"
    )
    command, before = [sys.executable, "-IS", "-c", script], os.sched_getaffinity(0)
    with workers.Group(command, {"one": (dict(os.environ), [core])}) as one:
        assert one.ask("open", 1) == [{"cores": [core]}]
    assert os.sched_getaffinity(0) == before


def test_a_worker_that_ends_is_one_line_with_its_last_words_and_the_other_does_not_stay():
    ends = "import sys\ninput(); print('error: data.name is odd', file=sys.stderr); sys.exit(1)"
    with (
        pytest.raises(errors.UserError, match=r"^worker 1 ended with exit code 1: data\.name is odd$"),
        group({"worker 0": "import signal\nsignal.pause()", "worker 1": ends}) as pair,
    ):
        pair.ask("open", 1)
    assert [process.returncode for process in pair._processes] == [-9, 1]


def test_a_worker_that_is_killed_is_told_with_the_signal():
    with (
        pytest.raises(errors.UserError, match=r"^worker 0 was killed by signal 9: no message$"),
        group({"worker 0": "input(); os.kill(os.getpid(), 9)"}) as killed,
    ):
        killed.ask("open", 1)


def test_a_worker_that_does_not_answer_in_time_is_named():
    with (
        pytest.raises(errors.UserError, match=r"^worker 0: no answer to 'open' within 0\.1 s$"),
        group({"worker 0": "import signal\nsignal.pause()"}, patience=0.1) as silent,
    ):
        silent.ask("open", 1)


@pytest.mark.slow
def test_two_workers_send_the_parameters_once_an_update_however_many_micro_batches_it_has():
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), "workers", "--json"]
    student = [f"--config={REPOSITORY / 'configs'}/quickstart.py:scratch", "--config.micro_batch=2"]
    done = subprocess.run(
        [*command, *student, "--rounds=1", "--updates=2"], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # deit_micro_patch8_32: patches 192 x 64 + 64, class token and 17 positions of 64, 4 blocks of 12 * 64² + 13 * 64,
    # a norm of 128, a head of 64 x 10 + 10.
    parameters = 12_352 + 18 * 64 + 4 * (12 * 64**2 + 13 * 64) + 128 + 650
    assert [each["accum_steps"] for each in found["settings"]] == [1, 16]
    for each in found["settings"]:
        assert (each["parameters"], each["count"], each["in_loops"]) == (parameters, 1, 0)
        assert each["bytes"] == 4 * (parameters + 5)  # three sums of losses, the weight, whether to stop
        assert each["wire_bytes"] > 2 * each["bytes"]  # each worker sends it once; others on this machine may add
        assert each["global_batch"] == 4 * each["accum_steps"]
        assert each["two_images_per_sec"] > 0 and each["one_images_per_sec"] > 0
