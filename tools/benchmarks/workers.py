"""What two workers send each other, counted and on the wire, and their images/s against one process on the same cores.

Promises: the workers are processes on the loopback interface with the project's own stream, strategy and update; they
and the one process stay up and take turns. No teacher, no mixing: an update is a student's forward and backward pass.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm
from absl import logging

from deit import cluster, errors, runtime
from deit.data import sources
from launch import local
from tools.benchmarks import saving, update

ACCUM_STEPS = (1, 16)
_COUNTERS = Path("/proc/net/dev")
_IDLE = 10.0  # seconds in which the traffic of workers that do nothing is counted: two heartbeats
_PATIENCE = 1800.0  # seconds until an answer: a start, or one update and then those that are timed
_LEAVE = 10.0  # seconds to end in by themselves


def serve(config, commands: Iterable[str] = sys.stdin) -> None:
    """Be one process of the measurement: answer each command, a line [word, accum_steps, updates], with a line of JSON.

    `open`, `update`, `close` and `graph` are about the training with that many micro-batches a worker and update. Where
    TF_CONFIG is set this is one of its workers, else one process with as many replicas' work.
    """
    runtime.prepare(config.precision)
    alone = cluster.from_environment(os.environ) is None
    strategy = runtime.make_strategy(update.copy_of(config, {"strategy": "auto" if alone else "multi_worker"}))
    source, trainings = sources.open_source(config.data, config.data.train_split), {}
    for line in commands:
        word, accum, count = json.loads(line)
        if accum not in trainings:
            own = {**saving.ALONE, "global_batch": 2 * config.micro_batch * accum}
            trainings[accum] = saving.Training(update.copy_of(config, own), strategy, source)
        print(json.dumps(_answer(trainings[accum], word, count)), flush=True)


def _answer(training: saving.Training, word: str, count: int) -> dict[str, Any]:
    if word == "update":
        return {"seconds": [training.update() for _ in range(count)]}
    if word == "graph":
        parameters = sum(variable.shape.num_elements() for _, variable in training.state.trainable)
        return {"parameters": parameters, **dataclasses.asdict(collectives(training.graph()))}
    {"open": training.open, "close": training.close}[word]()
    return {}


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collective operations of a graph: how many, how many of them in loops, and the bytes that enter them."""

    count: int = 0
    in_loops: int = 0
    bytes: int = 0


def collectives(graph: tf.Graph) -> Collectives:
    """Count a graph's collectives, function bodies included: as often as they are called, a loop's body once.

    A gather enters with the bytes of its result. Errors: ValueError where a size is not known.
    """
    definition = graph.as_graph_def(add_shapes=True)
    bodies = {function.signature.name: function.node_def for function in definition.library.function}

    def walk(nodes, looped: bool) -> Iterable[tuple[bool, int]]:
        for node in nodes:
            if re.match("Collective(Reduce|Gather|Bcast|AllToAll)", node.op):
                yield looped, 0 if "Recv" in node.op else _bytes(node)
            for name, attribute in node.attr.items():
                called = [attribute.func.name] if attribute.HasField("func") else [f.name for f in attribute.list.func]
                for function in called:
                    yield from walk(bodies[function], looped or ("While" in node.op and name in ("body", "cond")))

    found = list(walk(definition.node, False))
    return Collectives(len(found), sum(looped for looped, _ in found), sum(size for _, size in found))


def _bytes(node) -> int:
    shape = tf.TensorShape(node.attr["_output_shapes"].list.shape[0])
    if not shape.is_fully_defined():
        raise ValueError(f"{node.name} ({node.op}) has the shape {shape}: its bytes are not known")
    return shape.num_elements() * tf.as_dtype(node.attr["T"].type).size


class Group:
    """Child processes that run `serve`; a context manager that leaves none behind."""

    def __init__(self, command: Sequence[str], members: dict[str, tuple], *, patience: float = _PATIENCE):
        """Start a process for each name of `members`: (variables, cores); TensorFlow takes as many threads as cores."""
        self._names, self._patience = list(members), patience
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()  # (process, line); "" is its end
        self._processes: list[subprocess.Popen] = []
        self._logs = [tempfile.TemporaryFile("w+", errors="replace") for _ in members]  # noqa: SIM115  closed at exit
        for index, (environment, cores) in enumerate(members.values()):
            with _on(cores):
                process = subprocess.Popen(
                    command, env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._logs[index],
                )  # fmt: skip
            self._processes.append(process)
            threading.Thread(target=self._read, args=(index, process.stdout), daemon=True).start()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        until = time.monotonic() + (_LEAVE if kind is None else 0.0)
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.stdin.close()  # tells it to end
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()
        for log in self._logs:
            log.close()

    def ask(self, word: str, accum: int, count: int = 0) -> list[dict[str, Any]]:
        """Send a command to all and return their answers. Errors: UserError where one ends or takes too long."""
        for process in self._processes:
            with contextlib.suppress(OSError):  # it has ended, and that is among the lines
                process.stdin.write(json.dumps([word, accum, count]) + "\n")
                process.stdin.flush()
        answers, until = {}, time.monotonic() + self._patience
        while len(answers) < len(self._processes):
            try:
                index, line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                silent = " and ".join(name for i, name in enumerate(self._names) if i not in answers)
                raise errors.UserError(f"{silent}: no answer to {word!r} within {self._patience:g} s") from None
            if not line:
                raise errors.UserError(self._end(index))
            if line.startswith("{"):
                answers[index] = json.loads(line)
        return [answers[index] for index in range(len(self._processes))]

    def _read(self, index: int, lines: Iterable[str]) -> None:
        with lines:
            for line in lines:
                self._lines.put((index, line))
        self._lines.put((index, ""))

    def _end(self, index: int) -> str:
        code = self._processes[index].wait()
        self._logs[index].seek(0)
        last = (self._logs[index].read().strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{self._names[index]} {how}: {last}"


@contextlib.contextmanager
def _on(cores: Sequence[int]):
    """Let the block's child processes have these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(config, *, rounds: int, updates: int, command: Sequence[str], idle: float = _IDLE) -> dict[str, Any]:
    """Let two workers and one process take turns at every accum_steps; return what `lines` prints, as plain numbers.

    `command` runs `serve`. Errors: UserError where a process ends or does not answer.
    """
    sent()  # says at once what is missing
    saving.warn_if_busy()
    first, second = shares(sorted(os.sched_getaffinity(0)))
    own, *of_workers = _environments()
    members = {f"worker {i}": each for i, each in enumerate(zip(of_workers, (first, second)))}
    found, silence = [], 0.0
    with (
        Group(command, members) as pair,
        Group(command, {"the one process": (own, {*first, *second})}) as alone,
    ):
        for accum in ACCUM_STEPS:
            logging.info("accum_steps %d: start and one update of each, not timed", accum)
            for group in (pair, alone):
                group.ask("open", accum)
                group.ask("close", accum)
            if not found:
                before = sent()
                time.sleep(idle)
                silence = (sent() - before) / idle
            graph = pair.ask("graph", accum)[0]
            turns = [
                _turns(pair, alone, accum, updates)
                for _ in tqdm.trange(rounds, desc=f"accum_steps {accum}", unit="round", leave=False, disable=None)
            ]
            size = 2 * config.micro_batch * accum
            found.append({"accum_steps": accum, "global_batch": size, **graph, **summary(turns, size, silence)})
    return {
        "model": config.model.variant, "data": config.data.name, "precision": config.precision,
        "micro_batch": config.micro_batch, "rounds": rounds, "updates": updates,
        "cores": [first, second], "idle_bytes_per_sec": silence, "settings": found,
    }  # fmt: skip


def _environments() -> list[dict[str, str]]:
    """Return the variables of the one process and of both workers."""
    plain = {name: value for name, value in os.environ.items() if name != cluster.VARIABLE}
    plain["CUDA_VISIBLE_DEVICES"] = "-1"  # cores are what is shared out
    addresses = tuple(f"{local.HOST}:{port}" for port in local.free_ports(2, 0, logging.info))
    return [plain, *({**plain, cluster.VARIABLE: cluster.Cluster(addresses, i).tf_config()} for i in range(2))]


def _turns(pair: Group, alone: Group, accum: int, updates: int) -> dict[str, Any]:
    """Time `updates` updates of both; the loopback's bytes are those of the two workers."""
    pair.ask("open", accum)
    before, started = sent(), time.perf_counter()
    two = pair.ask("update", accum, updates)
    wire, lasted = sent() - before, time.perf_counter() - started
    pair.ask("close", accum)
    alone.ask("open", accum)
    one = alone.ask("update", accum, updates)
    alone.ask("close", accum)
    return {"wire": wire, "lasted": lasted, "two": [a["seconds"] for a in two], "one": one[0]["seconds"]}


def summary(turns: Sequence[dict[str, Any]], global_batch: int, silence: float) -> dict[str, Any]:
    """Return the medians of `_turns`' results; `silence`: bytes/s that go over the wire without any update.

    They are not taken off: heartbeats are nothing, and what strangers send then they need not send later.
    """
    count, half = len(turns[0]["one"]), global_batch / 2
    two = statistics.median(sum(half / statistics.median(each) for each in turn["two"]) for turn in turns)
    one = statistics.median(global_batch / statistics.median(turn["one"]) for turn in turns)
    return {
        "wire_bytes": statistics.median(turn["wire"] / count for turn in turns),
        "idle_share": silence * sum(turn["lasted"] for turn in turns) / sum(turn["wire"] for turn in turns),
        "two_images_per_sec": two, "one_images_per_sec": one, "ratio": two / one, "turns": list(turns),
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """Return the text for what `measure` found."""
    first, second = (", ".join(map(str, cores)) for cores in result["cores"])
    both = ", ".join(map(str, sorted({*result["cores"][0], *result["cores"][1]})))
    rows = [
        f"student            {result['model']}, {result['precision']}, micro-batches of {result['micro_batch']} images "
        f"of {result['data']}; no teacher, no mixing",
        f"two workers        bound to cores {first} | {second}, a thread a core; the one process to {both}",
        f"without updates    {result['idle_bytes_per_sec']:,.0f} bytes/s on lo: heartbeats, and what others send",
    ]
    for each in result["settings"]:
        accum, size, parameters, wire = (each[name] for name in ("accum_steps", "bytes", "parameters", "wire_bytes"))
        two, one, ratio = (each[name] for name in ("two_images_per_sec", "one_images_per_sec", "ratio"))
        rest = size - 4 * parameters
        count = f"{each['count']}, {each['in_loops']} in loops" if each["in_loops"] else each["count"]
        rows += [
            f"accum_steps {accum:<6} global_batch {each['global_batch']}; collectives an update: {count}",
            f"  in the graph     {size:>13,} bytes an update = 4 x {parameters:,} parameters + {rest:,}",
            f"  on the wire      {wire:>13,.0f} bytes an update, {wire / (2 * size):.4f} of 2 x {size:,}: "
            f"in a ring of 2 each sends the vector once (idle traffic: {each['idle_share']:.2%})",
            f"  two workers      {two:>13.2f} images/s, accum_steps {accum}",
            f"  one process      {one:>13.2f} images/s, accum_steps {2 * accum}; two workers: {ratio:.3f} of it",
        ]
    return rows


def shares(cores: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return each worker's half of the cores; an odd one stays unused, a single one is shared."""
    half = len(cores) // 2
    return (list(cores[:half]), list(cores[half : 2 * half])) if half else (list(cores), list(cores))


def sent() -> int:
    """Return the bytes sent over the loopback interface so far, by all processes. Errors: UserError."""
    try:
        return loopback_bytes(_COUNTERS.read_text())
    except (OSError, LookupError) as error:
        raise errors.UserError(f"{_COUNTERS} must be there and count the bytes of lo (Linux): {error}") from None


def loopback_bytes(text: str) -> int:
    """Return what /proc/net/dev says that `lo` has sent. Errors: KeyError where it says nothing."""
    rows = {name.strip(): counters.split() for name, _, counters in (line.partition(":") for line in text.splitlines())}
    return int(rows["lo"][8])  # eight counters of receiving come first
