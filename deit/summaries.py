"""What a run shows of itself: metrics.jsonl, TensorBoard event files, the progress bar.

Promises: one call feeds both files, so they hold the same numbers; after a crash and a resume neither shows a
step twice or misses one; metrics.jsonl is on the disk before a checkpoint is (`flush`); on a full disk its lines
wait in memory and no line in it is torn; event files are for looking at, so their errors are logged once. Neither
file's errors stop a run.
"""

import collections
import contextlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import tqdm
from absl import logging
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util

from deit import errors, line_log
from deit import workdir as run_directory

METRICS = "metrics.jsonl"
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)")
RATE_WINDOW = 20  # log steps over which the expected end is estimated


class Summaries:
    """Writes a run's metrics.jsonl and event file; both lie in the run directory itself."""

    def __init__(self, workdir: str | Path, *, start_step: int):
        """Continue after `start_step` finished updates; -1 for a run without a checkpoint.

        Whatever a killed process wrote of later steps is cut off. Errors: UserError if it can't be written.
        """
        self._path = Path(workdir) / METRICS
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            cut(self._path, last_step=start_step)
            self._log = line_log.LineLog(self._path)
        except OSError as error:
            raise errors.UserError(f"{self._path} can't be written: {error.strerror}") from error
        self._events: _EventFile | None = None
        with self._event_errors():
            self._events = _EventFile(self._path.parent, first_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of `step` to both files; NaN and infinities are null in metrics.jsonl, which is JSON.

        A line that can't be written waits in memory for the next call that can.
        """
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": int(step), **finite}, allow_nan=False)
        self._log.add(line.encode() + b"\n")
        # Not the newer tensor form: tensorboard's EventAccumulator forgets only this one at a restart.
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=float(value))
        self._summary(step, summary)

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3], to the event file."""
        buffer = io.BytesIO()
        with self._event_errors():
            PIL.Image.fromarray(picture).save(buffer, "png")
        height, width, channels = picture.shape
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue()
        )
        summary = summary_pb2.Summary()
        summary.value.add(tag=tag, image=image)
        self._summary(step, summary)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Write a text to the event file."""
        metadata = text_metadata.create_summary_metadata(display_name=None, description=None)
        tensor = tensor_util.make_tensor_proto(np.array(markdown.encode(), object))
        summary = summary_pb2.Summary()
        summary.value.add(tag=tag, tensor=tensor, metadata=metadata)
        self._summary(step, summary)

    def flush(self) -> str:
        """Wait until all lines written so far are on the disk and return "", or why metrics.jsonl is not.

        Then no checkpoint may be saved: it would be ahead of its log.
        """
        reason = self._log.sync()
        if self._events is not None:
            with self._event_errors():
                self._events.sync()
        return reason

    def close(self) -> None:
        """Flush and close both files; lines that still can't be written are lost with an error line."""
        reason = self.flush()
        if reason:
            logging.error("%s: the last lines are lost; a run that is continued writes them again", reason)
        self._log.close()
        if self._events is not None:
            with self._event_errors():
                self._events.close()

    def _summary(self, step: int, summary: summary_pb2.Summary) -> None:
        if self._events is None:
            return
        with self._event_errors():
            self._events.write(step=int(step), summary=summary)

    @contextlib.contextmanager
    def _event_errors(self):
        """Log an error of the event file and end the file there: a torn record hides what follows."""
        try:
            yield
        except OSError as error:
            logging.error("TensorBoard's event file of %s ends here: %s", self._path.parent, error)
            if self._events is not None:
                with contextlib.suppress(OSError):
                    self._events.close()
            self._events = None


class _EventFile:
    """One event file, written in the calling thread: `sync` knows what is in it, errors are met here.

    TensorBoard reads the files of a directory in the order of their names, which start with the second they
    were made in: a file made in the same second as the one before it, or after the clock was set back, takes
    the next free second.
    """

    def __init__(self, directory: Path, *, first_step: int):
        found = [_EVENT_FILE.match(path.name) for path in directory.iterdir()]
        stamps = [int(match[1]) for match in found if match]
        stamp = max([int(time.time()), *(old + 1 for old in stamps)])
        path = directory / f"events.out.tfevents.{stamp:010d}.{os.getpid()}"
        self._file = open(path, "xb")  # noqa: SIM115  closed by close()
        self._records = record_writer.RecordWriter(self._file)
        self.write(file_version="brain.Event:2")
        # Tells readers to forget what an earlier file holds of this step and later ones. The data server of
        # `tensorboard` (0.7.2, measured) does so curve by curve, when an earlier step of the curve comes.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.write(step=first_step, session_log=start)
        run_directory.sync_directory(directory)

    def write(self, **fields) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict]:
    """Return the complete lines of a metrics.jsonl, torn ones left out; [] where there is none."""
    return [content for content, _ in _parse(Path(path))]


def cut(path: Path, *, last_step: int) -> None:
    """Cut metrics.jsonl back to its complete lines with `step` <= last_step, by an atomic rewrite."""
    if not path.exists():
        return
    kept = b"".join(line for content, line in _parse(path) if content["step"] <= last_step)
    if kept == path.read_bytes():
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(kept)
    run_directory.sync(temporary)
    os.rename(temporary, path)
    run_directory.sync_directory(path.parent)


def _parse(path: Path) -> list[tuple[dict, bytes]]:
    """Return (content, line) of the complete lines."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        # The last line may be torn where it still parses: a line is complete with its line end.
        if line.endswith(b"\n") and isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append((content, line))
    return found


class Progress:
    """Shows how far a run is: a bar on a terminal, one line a log step anywhere else.

    Time spent between `pause` and `resume` (evaluation) counts neither in images/s nor in the time to go.
    """

    def __init__(self, *, start: int, total: int, batch: int, log_every: int):
        """Begin at `start` of `total` updates of `batch` images; a line every `log_every` and at the end."""
        self._total, self._batch, self._log_every = total, batch, log_every
        self._paused_at: float | None = None
        self._away = 0.0  # seconds paused
        self._text = ""
        self._begin = (self._clock(), start)
        self._marks: collections.deque = collections.deque(maxlen=RATE_WINDOW + 1)  # (seconds, step) of log steps
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                initial=start,
                total=total,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| update {n_fmt}/{total_fmt}{postfix}",
            )

    def rate(self, step: int) -> float:
        """Return images/s since the last call (or the beginning); call it on log steps."""
        now, (then, last) = self._clock(), self._marks[-1] if self._marks else self._begin
        self._marks.append((now, step))
        return (step - last) * self._batch / max(now - then, 1e-9)

    def show(self, step: int, line: Mapping[str, float]) -> None:
        """Show that `step` updates are finished; `line` holds the metrics of a log step, else nothing."""
        if line:
            parts = [f"loss {line['train/loss']:.4g}"] if "train/loss" in line else []
            if "perf/images_per_sec" in line:
                parts.append(f"{line['perf/images_per_sec']:.1f} images/s")
            self._text = "  ".join([*parts, f"ETA {self._to_go(step)}"])
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._total or (self._log_every and step % self._log_every == 0):
            logging.info("update %d/%d  %s", step, self._total, self._text)

    def pause(self) -> None:
        """Stop the clock and clear the bar, so that log lines have the screen."""
        self._paused_at = time.perf_counter()
        if self._bar is not None:
            self._bar.clear()

    def resume(self) -> None:
        """Start the clock again."""
        if self._paused_at is not None:
            self._away += time.perf_counter() - self._paused_at
            self._paused_at = None
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _clock(self) -> float:
        return time.perf_counter() - self._away

    def _to_go(self, step: int) -> str:
        """Return h:mm:ss to the end, from the last RATE_WINDOW log steps; "?" where nothing was timed."""
        # The first interval traces and compiles, no guide to the rest: it counts while there is no other.
        marks = self._marks if len(self._marks) > 1 else [self._begin, *self._marks]
        (then, first), (now, last) = marks[0], marks[-1]
        if last <= first:
            return "?"
        seconds = round((self._total - step) * (now - then) / (last - first))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
