"""A request to stop: SIGTERM (preemption, a scheduler) or SIGINT (Ctrl-C), noticed at once, obeyed after an update.

Promises: the first signal is a request, the second is ignored with a line while the run is saved, the third ends the
process with 128 + its number. A line is logged when the signal comes, also while the main thread computes. While there
is nothing to save (data is prepared, the teacher measured), the first ends a process that is alone at once, with 42;
one of several waits until all can stop together.

Listen only after the strategy was made: MultiWorkerMirroredStrategy replaces the handler of SIGTERM in C++ and keeps
it (TensorFlow 2.15, preemption_notifier.cc), and a Python handler that is older never runs again.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

from absl import logging

from deit import errors

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the run has been asked to stop.

    Attributes:
      requested: True from the first signal on.
    """

    def __init__(self, *, alone: bool = False):
        self.requested = False
        self._alone, self._training, self._count = alone, False, 0

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """For the block there is a loop that asks `requested` after every update, and something to save."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def receive(self, number: int) -> None:
        """Take one signal."""
        self._count += 1
        name = signal.Signals(number).name
        if self._count == 1 and self._alone and not self._training:
            logging.warning("%s: nothing is there to be saved, the same command continues", name)
            logging.flush()
            os._exit(errors.PREEMPTED)
        elif self._count == 1 and not self._training:
            self.requested = True
            logging.warning("%s: the workers stop together once all are ready, then end with exit code 42", name)
        elif self._count == 1:
            self.requested = True
            logging.warning("%s: the run is saved after the update under way, then it ends with exit code 42", name)
        elif self._count == 2:
            logging.warning("%s again: ignored, the run is about to be saved; a third one ends it unsaved", name)
        else:
            logging.error("%s for the third time: ended at once; the newest checkpoint stays", name)
            logging.flush()
            os._exit(128 + number)


@contextlib.contextmanager
def listening(*, alone: bool) -> Iterator[Stop]:
    """Watch SIGTERM and SIGINT for the block; call it in the main thread. `alone`: no other process takes part."""
    stop = Stop(alone=alone)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    # Python runs a handler between two bytecodes of the main thread, which may be in TensorFlow for a minute. Through
    # this socket the number comes at once, and a thread of its own reads it.
    before = {number: signal.signal(number, lambda *_: None) for number in _WATCHED}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, stop), name="signals", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()  # ends the thread
        watcher.join()
        ours.close()


def _watch(source: socket.socket, stop: Stop) -> None:
    while data := source.recv(64):
        for number in data:
            if number in _WATCHED:
                stop.receive(number)
