"""Start the workers of one machine, watch them and end them together; `local.py` decides whether to start again.

A thread a worker reads its lines, another waits for its end. They, and signals, only put events on a queue; the thread
of `run_once` takes them one by one and alone decides, so no state needs a lock.
"""

import collections
import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deit import cluster, errors

_MEANING = {
    errors.DONE: "done",
    errors.ERROR: "an error",
    errors.PEER_LOST: "lost a peer",
    errors.DIVERGED: "diverged",
    errors.PREEMPTED: "preempted after saving",
}
LINGER = 15.0  # s in which the peers of a dead or preempted worker end by themselves: a heartbeat takes nine
_TAIL = 10  # lines of a failed worker to show: what says why may be no line with "error:"
_DRAIN = 2.0  # s to read what an ended worker left in its pipe; a stray child of its may hold the pipe open for ever

# Run beside the supervisor: its input ends when the supervisor does, however it died, and then nothing may be left
# that holds the workdir and the devices. A number comes when a worker has started and again when it has ended.
_GUARD = """
import contextlib, os, signal, sys
alive = set()
for line in sys.stdin:
    alive ^= {int(line)}
for group in alive:
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
"""


def explain(index: int, code: int) -> str:
    """Return in words how a worker's process ended."""
    if code < 0:
        return f"worker {index} was killed by {_name(-code)}"
    meaning = _MEANING.get(code) or (f"ended by {_name(code - 128)}" if _by_signal(code) else "an error")
    return f"worker {index}: exit {code}, {meaning}"


def says_up(line: str, workers: int) -> bool:
    """Return whether a line of main.py tells that a worker is past the part of the start that ignores TERM."""
    return workers == 1 or cluster.up(workers) in line


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _by_signal(code: int) -> bool:
    return 128 < code < 128 + signal.NSIG


def is_error(code: int) -> bool:
    """Return whether the program itself went wrong, so that the next start would too."""
    return code > 0 and code not in (errors.PEER_LOST, errors.PREEMPTED) and not _by_signal(code)


def to_terminal(line: str) -> None:
    """Print a line on stderr in one piece; the terminal may be gone, the workers should not notice."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Worker:
    """One process with a session of its own, so that a terminal's Ctrl-C reaches the supervisor only."""

    def __init__(self, index: int, start: int, command: Sequence[str], environment: dict, log: Path):
        """Start the process. Errors: OSError. `begin` is called at once."""
        self.index, self.log = index, log
        self.up = self.stopped = False  # stopped: told to end by the supervisor
        self.code: int | None = None
        self.unshown = collections.deque(maxlen=_TAIL)  # its last lines that are only in its log
        self._file = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  the reader thread closes it
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self._header = f"--- start {start}, pid {self.process.pid}, {time.strftime('%Y-%m-%d %H:%M:%S')}"

    def begin(self, on_line: Callable[["Worker", str], None], on_end: Callable[["Worker", int], None]) -> None:
        """Call `on_line(self, text)` for every line and `on_end(self, code)` after the last, in threads of its own."""
        reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=(on_end, reader), daemon=True).start()

    def term(self) -> None:
        """Ask it to save and end; one that starts up sits in C++ and would not hear it, so it is killed."""
        if not self.up:
            self.kill()
        elif self.code is None:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children now; a process that was stopped hears nothing else."""
        if self.code is None:
            self.stopped = True
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the second is macOS on a group of zombies
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self, on_line) -> None:
        """Write down and pass on each line; a full disk costs the log, not the run: the pipe is always emptied."""
        write = self._file.write
        with contextlib.suppress(OSError), self._file, self.process.stdout as lines:
            for line in itertools.chain([None], lines):
                try:
                    write(self._header + "\n" if line is None else line)
                except OSError as error:
                    write = lambda _: None  # noqa: E731
                    on_line(self, f"warning: {self.log}: {error.strerror}; nothing more is written there")
                if line is not None:
                    on_line(self, line.rstrip("\n"))

    def _wait(self, on_end, reader: threading.Thread) -> None:
        code = self.process.wait()
        self._kill_group()  # children that it left behind
        reader.join(_DRAIN)  # its last words come before the news of its end
        on_end(self, code)


class Supervisor:
    """Run the workers of one command together: start them, and when one ends or a signal comes, end them all."""

    def __init__(
        self, command: Sequence[str], *, environments: Callable, logs: Path, startup: float, grace: float,
        verbose: bool = False, say: Callable[[str], None] = to_terminal,
    ):  # fmt: skip
        """`environments(log)` returns each worker's variables at every start; `say` gets the lines to show.

        Within `startup` s all workers must have said that they are up; `grace` s lie between TERM and KILL.
        """
        self._command, self._environments, self._logs = list(command), environments, Path(logs)
        self._startup, self._grace, self._verbose, self._say = startup, grace, verbose, say
        self._events = queue.SimpleQueue()  # reentrant: a signal's handler puts while the same thread gets
        self.workers: list[Worker] = []  # of the newest start
        self.signals: list[int] = []  # that asked to stop
        # What is done when nothing happens in time; it tells the phase too: _give_up_start, then None while all run,
        # _end_rest once a worker has ended, _kill_rest once the others were told to.
        self._deadline, self._overdue = None, None

    def interrupt(self, number: int) -> None:
        """Tell of a signal, from any thread or a handler: the first asks to save and end, the third kills."""
        self._events.put((self._on_signal, number))

    def __enter__(self) -> "Supervisor":
        guard = [sys.executable, "-IS", "-c", _GUARD]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, text=True, start_new_session=True)
        return self

    def __exit__(self, *_) -> None:
        """Leave no worker, whatever happened."""
        for worker in self.workers:
            worker.kill()
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        self._guard.wait()

    def run_once(self, start: int) -> list[Worker]:
        """Start all workers, return them when the last has ended. Errors: OSError."""
        environments = self._environments(self.log)
        self.workers, self._count = [], len(environments)
        for index, environment in enumerate(environments):
            worker = Worker(index, start, self._command, environment, self._logs / f"worker-{index}.log")
            self.workers.append(worker)
            self._tell_guard(worker)
            worker.begin(self._on_line, lambda *end: self._events.put((self._on_end, *end)))
        pids = ", ".join(str(worker.process.pid) for worker in self.workers)
        self.log(f"start {start}: pid {pids}, logs in {self._logs}")
        self._started = time.monotonic()
        self._set_deadline(self._startup, self._give_up_start)
        while self._alive():
            if event := self._next(self._deadline):
                event[0](*event[1:])
            else:
                self._overdue()
        return self.workers

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until a signal comes."""
        end = time.monotonic() + seconds
        while not self.signals and (event := self._next(end)):
            event[0](*event[1:])

    def _next(self, deadline: float | None) -> tuple | None:
        """Return the next event (method, argument ...), None when the deadline comes first."""
        while True:
            left = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=min(left, 3600.0))  # a lock can't wait for years
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def _set_deadline(self, seconds: float | None, overdue: Callable[[], None] | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._overdue = overdue

    def _alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.code is None]

    def _on_line(self, worker: Worker, text: str) -> None:
        """Show a line, in the worker's thread; all of them are in its log."""
        if self._verbose or worker.index == 0 or "warning:" in text or "error:" in text:
            self._say(f"[{worker.index}] {text}")
        else:
            worker.unshown.append(text)
        if not worker.up and says_up(text, self._count):
            self._events.put((self._on_up, worker))

    def _on_up(self, worker: Worker) -> None:
        worker.up = True
        if self._overdue == self._give_up_start and all(each.up for each in self.workers):
            self.log(f"all workers are up after {time.monotonic() - self._started:.0f} s")
            self._set_deadline(None, None)

    def _on_end(self, worker: Worker, code: int) -> None:
        """Give the others time to end by themselves: peers notice a lost one, stop at one update and save."""
        worker.code = code
        self._tell_guard(worker)
        self.log(explain(worker.index, code))
        for text in list(worker.unshown) if is_error(code) else ():
            self._say(f"[{worker.index}] {text}")
        if self._overdue == self._kill_rest:
            return
        linger = time.monotonic() + self._linger(code)
        self._deadline = min(linger, self._deadline) if self._overdue == self._end_rest else linger
        self._overdue = self._end_rest

    def _linger(self, code: int) -> float:
        """Return the seconds that the others have after an end with this code."""
        if is_error(code):
            return 0.0
        return self._grace if code in (errors.DONE, errors.PREEMPTED) else min(self._grace, LINGER)

    def _on_signal(self, number: int) -> None:
        self.signals.append(number)
        count = len(self.signals)
        if count == 1:
            self._end_rest(f"{_name(number)}, stopping")
        elif count == 2:
            self.log(f"{_name(number)}: waiting for the save; once more kills the workers")
        else:
            self._kill_rest(f"{_name(number)}: ")

    def _give_up_start(self) -> None:
        missing = ", ".join(str(worker.index) for worker in self.workers if not worker.up)
        self.log(f"error: not up after {self._startup:g} s: worker {missing}")
        self._kill_rest()

    def _end_rest(self, why: str = "ending the rest") -> None:
        """TERM, and KILL once the grace is over; a worker that was told before is not told again."""
        alive = self._alive()
        words = [f"{'TERM' if each.up else 'KILL (still starting)'} to worker {each.index}" for each in alive]
        words = [f"worker {each.index} was told before" if each.stopped else word for each, word in zip(alive, words)]
        self.log(f"{why}: {', '.join(words) or 'no worker is running'}")
        for worker in alive:
            if not worker.stopped:
                worker.term()
        if self._overdue != self._kill_rest:
            # A worker whose peer is gone has nothing to save: if it does not end now, it hangs.
            self._set_deadline(self._grace if self.signals else min(self._grace, LINGER), self._kill_rest)

    def _kill_rest(self, why: str = "") -> None:
        self.log(f"{why}KILL to worker {', '.join(str(worker.index) for worker in self._alive())}")
        for worker in self._alive():
            worker.kill()
        self._set_deadline(None, self._kill_rest)

    def _tell_guard(self, worker: Worker) -> None:
        with contextlib.suppress(OSError):  # a guard that was killed guards nothing, the workers can go on
            self._guard.stdin.write(f"{worker.process.pid}\n")
            self._guard.stdin.flush()

    def log(self, text: str) -> None:
        """Show a line of the supervisor's own, with the time as main.py's lines have it."""
        self._say(f"{time.strftime('%H:%M:%S')} {text}")
