"""Runs of main.py in processes of their own, alone or in a cluster, and what they leave behind."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

from deit import cluster

ROOT = Path(__file__).resolve().parents[1]
# A run so small that starting it takes most of the time, with every augmentation, drop-path and the averages on.
SMALL = [
    "--config.data.name=digits", "--config.data.train_split=train", "--config.data.eval_split=test",
    "--config.data.image_size=32", "--config.model.drop_path=0.2", "--config.global_batch=32",
    "--config.augment.mix_group=8",
]  # fmt: skip


def scratch(*, total, micro_batch):
    """Return the flags of such a run without a teacher, saved every second update and evaluated every fifth."""
    return [
        f"--config={ROOT / 'configs'}/deit_tiny_flowers.py:full_scratch", *SMALL,
        "--config.model.variant=deit_micro_patch8_32", f"--config.micro_batch={micro_batch}",
        f"--config.total_updates={total}", "--config.checkpoint.every_updates=2", "--config.eval.every_updates=5",
    ]  # fmt: skip


PATIENCE = 600  # seconds after which a test fails rather than waits on, also on a busy machine


class Process:
    """One process whose log lines are collected as they come."""

    def __init__(self, *command, env=None):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        self.lines, self.ended, self.news = [], False, threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()  # does nothing to a process that has been waited for
        self.process.wait()

    def wait_for(self, pattern, after=0):
        """Wait until a line behind the first `after` matches; return the match. Fails where the process ends before."""

        def found():
            return next((match for line in self.lines[after:] if (match := re.search(pattern, line))), None)

        with self.news:
            self.news.wait_for(lambda: found() or self.ended, timeout=PATIENCE)
            assert found(), f"{pattern!r} did not come:\n{self.output()}"
            return found()

    def send(self, number):
        self.process.send_signal(number)

    def code(self):
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=PATIENCE)

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


def main(*flags, env=None):
    return Process(ROOT / "main.py", *flags, env=env)


def free_ports(count):
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def worker(index, ports, *flags):
    """Return one process of main.py of a cluster on loopback."""
    addresses = tuple(f"127.0.0.1:{port}" for port in ports)
    return main(*flags, env={"TF_CONFIG": cluster.Cluster(addresses, index).tf_config()})


def workers(count, *flags):
    """Return all processes of main.py of a cluster on loopback."""
    ports = free_ports(count)
    return [worker(index, ports, *flags) for index in range(count)]


def supervised(*arguments):
    """Return launch/local.py at work."""
    return Process(ROOT / "launch" / "local.py", *arguments)


def pids(supervisor, start):
    """Return the process ids of the workers of a start, once the supervisor has told them."""
    return [int(pid) for pid in supervisor.wait_for(rf"start {start}: pid ([\d, ]+), logs")[1].split(", ")]


def final(run):
    """Return (name, state_sha256, logged lines without wall-clock numbers) of a run's newest checkpoint."""
    newest = max((Path(run) / "checkpoints").glob("step-*"))
    digest = json.loads((newest / "manifest.json").read_text())["state_sha256"]
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.endswith("images_per_sec")} for line in lines]
    return newest.name, digest, lines
