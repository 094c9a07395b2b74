"""Signals in processes of their own: noticed at once, obeyed after an update, the third one ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A process that waits until a line on stdin lets it go.
BUSY = """
import sys
sys.path.insert(0, sys.argv[1])
from absl import logging
from deit import signals
logging.set_verbosity("info")
import contextlib
alone, training = sys.argv[2:]
with signals.listening(alone=alone == "alone") as stop, stop.training() if training else contextlib.nullcontext():
    print("ready", flush=True)
    while sys.stdin.readline().strip() != "go on":
        pass
    print("asked" if stop.requested else "not asked", flush=True)
"""


class Process:
    """A process of BUSY, and what it logged."""

    def __init__(self, alone="alone", training="training"):
        self.arguments = [str(ROOT), alone, training]

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", BUSY, *self.arguments], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def send(self, number):
        """Send a signal and return the line that it makes."""
        self.process.send_signal(number)
        return self.process.stderr.readline()

    def go_on(self):
        self.process.stdin.write("go on\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_the_second_is_ignored_with_a_line_the_third_ends_the_process(number):
    name = signal.Signals(number).name
    with Process() as running:
        line = running.send(number)
        assert name in line and "exit code 42" in line
        line = running.send(number)
        assert f"{name} again" in line and "ignored" in line
        line = running.send(number)
        assert "third" in line
        assert running.process.wait(timeout=60) == 128 + number


def test_who_asks_after_the_signal_hears_of_it_and_the_process_ends_as_it_wants():
    with Process() as running:
        running.send(signal.SIGTERM)
        assert running.go_on() == "asked"
        assert running.process.wait(timeout=60) == 0


def test_with_nothing_to_save_a_process_that_is_alone_ends_at_once_and_one_of_several_waits():
    with Process(training="") as running:
        assert "nothing is there to be saved" in running.send(signal.SIGTERM)
        assert running.process.wait(timeout=60) == 42
    with Process(alone="", training="") as running:
        running.send(signal.SIGTERM)
        assert running.go_on() == "asked"


def test_without_a_signal_nothing_is_asked():
    with Process() as running:
        assert running.go_on() == "not asked"
        assert running.process.wait(timeout=60) == 0


def test_the_handlers_before_are_back_after_the_block():
    from deit import signals

    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("old"))
    try:
        with signals.listening(alone=False) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["old"]
        assert stop.requested  # the thread is joined: what came before the end was read
    finally:
        signal.signal(signal.SIGTERM, before)
