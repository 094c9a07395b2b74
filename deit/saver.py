"""Writes a run's checkpoints in a background thread: commit by rename, keep what is wanted, survive a full disk.

Promises:
- Checkpoints are written by `commit`, whole or not at all, and never a state with a NaN or an infinity.
- Nothing is deleted before its successor is committed.
- A save that fails is a log line at once; training goes on, and the next save may succeed.
"""

import errno
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from deit import checkpoint, commit, errors
from deit import workdir as run_directory

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_FREE, _RIGHT, _AGAIN = "free space and run the same command", "put that right and run the same command", "run it again"


class Saver:
    """Writes checkpoints of one run, one at a time; the caller holds the workdir's lock.

    `failed_in_row`: how many saves failed since the last one that succeeded; settled once a save has been joined.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        config_json: str,
        keep: int,
        keep_every: int,
        max_failed: int,
        versions: Mapping[str, str],
    ):
        """Prepare `workdir`/checkpoints and sweep what a killed process left half done there.

        `keep`: how many of the newest stay, 1 or more; the best by `eval/top1` stays besides, and with `keep_every`
        > 0 every one whose step is a multiple of it. `max_failed`: saves in a row that fail before UserError; 0 = any.
        Errors: UserError where the directory can't be written.
        """
        self._directory = Path(workdir) / "checkpoints"
        self._config_json, self._versions = config_json, dict(versions)
        self._keep, self._keep_every, self._max_failed = keep, keep_every, max_failed
        self._thread: threading.Thread | None = None
        self._bug: BaseException | None = None  # what no full disk explains: raised by the next save or finish
        self._failure, self._advice = "", ""  # of the last save asked for; "" = it was written
        self.failed_in_row = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            run_directory.sync_directory(self._directory.parent)
            for stale in self._directory.glob("tmp-*"):
                shutil.rmtree(stale)
        except OSError as error:
            raise errors.UserError(f"{self._directory} must be a writable directory: {error}") from error

    def save(self, step: int, tensors: Mapping[str, np.ndarray], *, metrics: Mapping[str, float]) -> None:
        """Start writing the checkpoint of `step` (finished updates) and return; waits only for the save before.

        `tensors` are the caller's snapshot: they must not change until the save is joined. Errors: UserError after
        `max_failed` failures in a row; whatever else the save before met that is no fault of the disk.
        """
        self.settle()
        # Not a daemon: an interpreter that ends while a save is under way finishes it.
        self._thread = threading.Thread(target=self._run, args=(step, tensors, metrics), name=f"save-{step}")
        self._thread.start()

    def fail(self, step: int, reason: str) -> None:
        """Count and log the checkpoint of `step` as failed without trying: its log is not on the disk.

        Errors: as `save`; UserError also when this one is the last that `max_failed` allows.
        """
        self.settle()
        self._note(step, reason, _FREE)
        self.settle()

    def wait(self) -> None:
        """Wait for the save under way and raise nothing: for unwinding, when another error is on its way."""
        self._join()
        if self._bug is not None:
            logging.error("a checkpoint was not written: %r", self._bug)

    def finish(self) -> None:
        """Wait for the save under way. Errors: UserError where the last save asked for is not on the disk; bugs."""
        self._join()
        self._raise_bug()
        if self._failure:
            newest = self._newest()
            goes_on = f"it continues from step {newest}" if newest is not None else "it begins anew"
            raise errors.UserError(f"{self._failure}: the run is not complete on disk: {self._advice}, {goes_on}")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def settle(self) -> None:
        """Wait for the save under way. Errors: what it has to say, as `save` has them."""
        self._join()
        self._raise_bug()
        if 0 < self._max_failed <= self.failed_in_row:
            raise errors.UserError(
                f"{self.failed_in_row} checkpoints in a row were not written (checkpoint.max_failed), the last: "
                f"{self._failure}; {self._newest_text()}"
            )

    def _raise_bug(self) -> None:
        bug, self._bug = self._bug, None
        if bug is not None:
            raise bug

    def _note(self, step: int, reason: str, advice: str) -> None:
        self.failed_in_row += 1
        self._failure = f"checkpoint of step {step} was not written to {self._directory} ({reason})"
        self._advice = advice
        logging.error("%s: training goes on, %s", self._failure, self._newest_text())

    def _newest(self) -> int | None:
        try:
            found = checkpoint.committed(self._directory)
        except OSError:
            return None
        return checkpoint.step_of(found[0]) if found else None

    def _newest_text(self) -> str:
        newest = self._newest()
        return f"the newest is step {newest}" if newest is not None else "there is none yet"

    def _run(self, step, tensors, metrics) -> None:
        """Be the thread: whatever happens is noted, nothing is raised."""
        try:
            self._write(step, tensors, metrics)
        except commit.NotFinite as error:
            self._note(step, str(error), _AGAIN)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            advice = _FREE if error.errno in _NO_ROOM else _RIGHT
            self._note(step, f"{error.strerror or error}{where}", advice)
        except errors.UserError as error:
            self._note(step, str(error), _RIGHT)
        except BaseException as error:
            self._bug = error
        else:
            self.failed_in_row, self._failure = 0, ""

    def _write(self, step: int, tensors, metrics) -> None:
        target = self._directory / checkpoint.name_of(step)
        if target.exists():
            commit.check_finite(tensors)
            reason = checkpoint.verify(target)
            if reason is None:
                if checkpoint.manifest(target)["state_sha256"] != checkpoint.state_sha256(tensors):
                    logging.error("%s exists with another state and is kept: the run is not reproducible", target)
                return
            checkpoint.set_aside_damaged(target, reason)
        for stale in self._directory.glob("tmp-*"):  # of a save or a removal that failed
            shutil.rmtree(stale, ignore_errors=True)
        commit.commit(
            target,
            tensors,
            step=step,
            config_json=self._config_json,
            metrics=metrics,
            versions=self._versions,
            temporary=f"tmp-{step:08d}",
        )
        self._retain()

    def _retain(self) -> None:
        """Remove what nothing keeps. A failure is a log line: the save itself is done."""
        try:
            kept = checkpoint.kept_for(self._directory, keep=self._keep, keep_every=self._keep_every)
        except OSError as error:
            logging.error("old checkpoints in %s were not removed: %s", self._directory, error)
            return
        for path in (path for path, reasons in kept.items() if not reasons):
            # Renamed first, so that a kill during the removal leaves no directory that looks damaged.
            doomed = self._directory / f"tmp-removed-{path.name}"
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logging.error("old checkpoint %s was not removed: %s", path, error)
