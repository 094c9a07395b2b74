"""What a run shows of itself: both files over crashes and resumes, the progress line, the pictures."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_multiplexer
from tensorboard.util import tensor_util

from deit import errors, line_log, pictures, summaries


@pytest.fixture(autouse=True)
def _close_at_the_end(monkeypatch):
    """Close the files of writers that play a crash, which nobody closes in order, after the test."""
    opened, real = [], open

    def recorded(*arguments, **options):
        opened.append(real(*arguments, **options))
        return opened[-1]

    for module in (summaries, line_log):
        monkeypatch.setattr(module, "open", recorded, raising=False)
    yield
    for file in opened:
        file.close()


def events(workdir: Path) -> event_accumulator.EventAccumulator:
    """Read the event files with TensorBoard's reader, every event of them."""
    everything = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    accumulator = event_accumulator.EventAccumulator(str(workdir), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def served(workdir: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a curve as TensorBoard's server hands it to the browser."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"scalars": 0})
    multiplexer.AddRunsFromDirectory(str(workdir))
    multiplexer.Reload()
    found = multiplexer.Tensors(".", tag)
    return [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in found]


def shown(workdir: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a curve as TensorBoard shows it."""
    return [(event.step, event.value) for event in events(workdir).Scalars(tag)]


def logged(workdir: Path) -> list[tuple[int, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(content["step"], content["train/loss"]) for content in map(json.loads, lines)]


def write(writer: summaries.Summaries, run: int, steps) -> None:
    for step in steps:
        writer.scalars(step, {"train/loss": run + step / 8})


def test_one_call_feeds_both_files(tmp_path):
    writer = summaries.Summaries(tmp_path, start_step=-1)
    writer.scalars(1, {"train/loss": np.float32(0.5), "optim/lr": 1e-3})
    writer.scalars(2, {"train/loss": 0.25})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert lines == '{"step": 1, "train/loss": 0.5, "optim/lr": 0.001}\n{"step": 2, "train/loss": 0.25}\n'
    assert shown(tmp_path, "train/loss") == [(1, 0.5), (2, 0.25)]
    assert shown(tmp_path, "optim/lr") == [(1, pytest.approx(1e-3))]
    assert summaries.read_metrics(tmp_path / "metrics.jsonl") == [json.loads(x) for x in lines.splitlines()]


def test_tensorboard_shows_each_run_by_its_directory(tmp_path):
    for name in ("a", "b/teacher"):
        writer = summaries.Summaries(tmp_path / name, start_step=-1)
        write(writer, 0, [1])
        writer.close()
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert sorted(multiplexer.Runs()) == ["a", "b/teacher"]
    metadata = multiplexer.SummaryMetadata("a", "train/loss")
    assert metadata.plugin_data.plugin_name == "scalars"


def test_after_a_crash_and_a_resume_no_step_is_shown_twice_and_none_is_missing(tmp_path):
    """Crash at 10 and resume from 7, crash at 9 and resume from 7, crash at 14 and resume from 12."""
    crashed = []  # kept, as a killed process closes nothing in order
    for run, (start, last) in enumerate([(-1, 10), (7, 9), (7, 14), (12, 15)]):
        writer = summaries.Summaries(tmp_path, start_step=start)
        write(writer, run, range(start + 1, last + 1))
        crashed.append(writer)
    crashed[-1].flush()
    expected = [(s, 0 + s / 8) for s in range(8)]
    expected += [(s, 2 + s / 8) for s in range(8, 13)]
    expected += [(s, 3 + s / 8) for s in range(13, 16)]
    assert logged(tmp_path) == expected
    assert shown(tmp_path, "train/loss") == expected
    assert served(tmp_path, "train/loss") == expected


def test_a_curve_of_a_crashed_run_that_does_not_come_again_is_forgotten(tmp_path):
    first = summaries.Summaries(tmp_path, start_step=-1)
    first.scalars(3, {"eval/top1": 0.5, "train/loss": 1.0})
    first.scalars(6, {"eval/top1": 0.75})
    second = summaries.Summaries(tmp_path, start_step=4)
    second.scalars(5, {"train/loss": 2.0})
    assert shown(tmp_path, "eval/top1") == [(3, 0.5)]
    assert served(tmp_path, "eval/top1") == [(3, 0.5)]
    assert shown(tmp_path, "train/loss") == [(3, 1.0), (5, 2.0)]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    write(summaries.Summaries(tmp_path, start_step=-1), 0, range(0, 5))
    write(summaries.Summaries(tmp_path, start_step=-1), 1, range(0, 3))
    expected = [(0, 1.0), (1, 1.125), (2, 1.25)]
    assert logged(tmp_path) == expected
    assert shown(tmp_path, "train/loss") == expected


@pytest.mark.parametrize("seconds", [0, -3600])
def test_event_files_are_read_in_order_whatever_the_clock_does(tmp_path, monkeypatch, seconds):
    now = [1_800_000_000.0]
    monkeypatch.setattr(summaries.time, "time", lambda: now[0])
    for run, start in enumerate([-1, 1, 3, 5]):
        monkeypatch.setattr(summaries.os, "getpid", lambda run=run: 9 - run)  # ids wrap around too
        write(summaries.Summaries(tmp_path, start_step=start), run, range(start + 1, start + 5))
        now[0] += seconds
    assert [step for step, _ in shown(tmp_path, "train/loss")] == [*range(10)]


@pytest.mark.parametrize("cut", [1, 5, 20, 31])
def test_a_torn_line_goes_and_is_written_again(tmp_path, cut):
    write(summaries.Summaries(tmp_path, start_step=-1), 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    assert cut < len(lines[2])
    assert [content["step"] for content in summaries.read_metrics(path)] == [1, 2]
    write(summaries.Summaries(tmp_path, start_step=2), 1, [3])
    assert logged(tmp_path) == [(1, 0.125), (2, 0.25), (3, 1.375)]


def test_a_torn_event_file_does_not_hide_the_next(tmp_path):
    write(summaries.Summaries(tmp_path, start_step=-1), 0, range(1, 5))
    (torn,) = tmp_path.glob("events.*")
    os.truncate(torn, torn.stat().st_size - 5)
    write(summaries.Summaries(tmp_path, start_step=3), 1, range(4, 6))
    assert shown(tmp_path, "train/loss") == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 1.5), (5, 1.625)]


def test_lines_up_to_the_checkpoint_are_not_rewritten(tmp_path):
    write(summaries.Summaries(tmp_path, start_step=-1), 0, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    summaries.Summaries(tmp_path, start_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write(summaries.Summaries(tmp_path, start_step=-1), 0, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(errors.UserError, match=r"metrics.jsonl can't be written: No space left"):
        summaries.Summaries(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_nan_and_infinity_are_null_in_json_and_themselves_in_tensorboard(tmp_path):
    writer = summaries.Summaries(tmp_path, start_step=-1)
    writer.scalars(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1.0}
    assert np.isnan(shown(tmp_path, "a")[0][1])
    assert np.isinf(shown(tmp_path, "b")[0][1])


def test_a_broken_event_file_is_logged_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    writer = summaries.Summaries(tmp_path, start_step=-1)
    write(writer, 0, [1])

    def fails(self, **fields):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summaries._EventFile, "write", fails)
    write(writer, 0, [2, 3])
    writer.text(3, "note", "x")
    writer.close()
    assert logged(tmp_path) == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    write(summaries.Summaries(tmp_path, start_step=3), 0, [4])  # can't even be made
    assert logged(tmp_path)[-1] == (4, 0.5)


class Disk(io.FileIO):
    """A file on a disk with so much `room` left, in bytes; None = enough."""

    room: int | None = None

    def write(self, data) -> int:
        if Disk.room is None:
            return super().write(data)
        if Disk.room == 0:
            raise OSError(28, "No space left on device")
        taken = super().write(data[: Disk.room])
        Disk.room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch):
    """Let metrics.jsonl lie on a `Disk`."""
    monkeypatch.setattr(line_log, "open", lambda path, mode, buffering: Disk(path, mode), raising=False)
    monkeypatch.setattr(Disk, "room", None)
    return Disk


def levels(caplog) -> list[str]:
    return [record.levelname for record in caplog.records]


@pytest.mark.parametrize("room", [0, 1, 17, 33, 34, 35, 70, 100])
def test_on_a_full_disk_lines_wait_in_memory_and_none_is_torn(tmp_path, disk, room, caplog):
    caplog.set_level("INFO", logger="absl")
    writer = summaries.Summaries(tmp_path, start_step=-1)
    write(writer, 0, [1, 2])
    disk.room = room
    write(writer, 0, range(3, 9))
    expected = [(step, step / 8) for step in range(1, 11)]
    there = logged(tmp_path)
    assert there == expected[: len(there)]
    assert len(there) < 8
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    for _ in range(2):
        assert writer.flush() == f"{tmp_path / 'metrics.jsonl'} can't be written: No space left on device"
    assert levels(caplog) == ["ERROR"]
    disk.room = None
    write(writer, 0, [9])
    assert logged(tmp_path) == expected[:9]
    assert levels(caplog) == ["ERROR", "INFO"]
    assert writer.flush() == ""
    write(writer, 0, [10])
    writer.close()
    assert logged(tmp_path) == expected
    assert shown(tmp_path, "train/loss") == expected
    assert levels(caplog) == ["ERROR", "INFO"]


def test_each_outage_is_logged_once(tmp_path, disk, caplog):
    caplog.set_level("INFO", logger="absl")
    writer = summaries.Summaries(tmp_path, start_step=-1)
    for outage in range(3):
        disk.room = 5
        write(writer, 0, range(10 * outage, 10 * outage + 5))
        disk.room = None
        assert writer.flush() == ""  # ends an outage as a line does
    writer.close()
    assert levels(caplog) == ["ERROR", "INFO"] * 3
    assert [step for step, _ in logged(tmp_path)] == [s for k in range(3) for s in range(10 * k, 10 * k + 5)]


def test_a_torn_part_that_can_t_be_cut_off_at_once_is_cut_off_before_the_next_line(tmp_path, disk, monkeypatch):
    writer = summaries.Summaries(tmp_path, start_step=-1)
    write(writer, 0, [1])

    def fails(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fails)
        disk.room = 10
        write(writer, 0, [2, 3])
        disk.room = None
        write(writer, 0, [4])
        assert "Input/output error" in writer.flush()
    write(writer, 0, [5])
    assert writer.flush() == ""
    writer.close()
    assert logged(tmp_path) == [(step, step / 8) for step in range(1, 6)]


def test_lines_that_a_failed_fsync_lost_are_written_again(tmp_path, monkeypatch, caplog):
    """The kernel says once that pages were lost: the lines since the last good fsync are not taken for written."""
    caplog.set_level("INFO", logger="absl")
    writer = summaries.Summaries(tmp_path, start_step=-1)
    write(writer, 0, [1, 2])
    assert writer.flush() == ""
    write(writer, 0, [3, 4])

    def fails(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        assert "Input/output error" in writer.flush()
        assert [step for step, _ in logged(tmp_path)] == [1, 2]
        write(writer, 0, [5])
    write(writer, 0, [6])
    assert writer.flush() == ""
    assert [step for step, _ in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [record.levelname for record in caplog.records if "metrics.jsonl" in record.getMessage()] == [
        "ERROR",
        "INFO",
    ]


def test_without_a_flush_memory_holds_no_more_than_so_many_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(line_log, "HELD", 10)
    writer = summaries.Summaries(tmp_path, start_step=-1)
    for step in range(1, 36):
        write(writer, 0, [step])
        assert len(writer._log._lines) <= 10
    writer.close()
    assert len(logged(tmp_path)) == 35


def test_closing_on_a_full_disk_raises_nothing_and_leaves_whole_lines(tmp_path, disk, caplog):
    writer = summaries.Summaries(tmp_path, start_step=-1)
    write(writer, 0, [1])
    disk.room = 7
    write(writer, 0, [2, 3])
    writer.close()
    assert logged(tmp_path) == [(1, 0.125)]
    assert levels(caplog) == ["ERROR", "ERROR"]
    assert "the last lines are lost" in caplog.text


def test_pictures_and_texts_that_can_t_be_written_stop_nothing(tmp_path, monkeypatch, caplog):
    writer = summaries.Summaries(tmp_path, start_step=-1)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", fails)
        writer.image(1, "a", np.zeros([2, 2, 3], np.uint8))
    writer.text(1, "a", "b")
    writer.image(1, "a", np.zeros([2, 2, 3], np.uint8))
    write(writer, 0, [1])
    writer.close()
    assert logged(tmp_path) == [(1, 0.125)]
    assert levels(caplog) == ["ERROR"]


def test_flush_reaches_the_disk_with_both_files(tmp_path, monkeypatch):
    writer, synced = summaries.Summaries(tmp_path, start_step=-1), []

    def fsync(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    write(writer, 0, [1])
    assert synced == []
    assert writer.flush() == ""
    (event_file,) = tmp_path.glob("events.*")
    assert synced == ["metrics.jsonl", event_file.name]


def test_what_was_written_before_kill_9_is_in_both_files(tmp_path):
    code = """if True:
        import os, signal, sys
        from deit import summaries
        assert "tensorflow" not in sys.modules
        writer = summaries.Summaries(sys.argv[1], start_step=-1)
        for step in range(1, 4):
            writer.scalars(step, {"train/loss": step / 8})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(summaries.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment).returncode == -9
    expected = [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert logged(tmp_path) == expected
    assert shown(tmp_path, "train/loss") == expected


def test_pictures_and_texts_come_back_as_they_were(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, [5, 7, 3], np.uint8)
    writer = summaries.Summaries(tmp_path, start_step=-1)
    writer.image(3, "train/first_batch", picture)
    writer.text(0, "config", "**ä**")
    writer.close()
    found = events(tmp_path)
    (image,) = found.Images("train/first_batch")
    assert (image.step, image.width, image.height) == (3, 7, 5)
    np.testing.assert_array_equal(np.array(PIL.Image.open(io.BytesIO(image.encoded_image_string))), picture)
    assert found.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (text,) = found.Tensors("config")
    assert tensor_util.make_ndarray(text.tensor_proto).item().decode() == "**ä**"


class Terminal(io.StringIO):
    """A standard error that says whether it is a terminal."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def clock(monkeypatch):
    """Let a test set the seconds that have passed."""
    now = [100.0]
    monkeypatch.setattr(summaries.time, "perf_counter", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_a_log_step_is_one_line(monkeypatch, clock, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    caplog.set_level("INFO", logger="absl")  # a SavedModel that was saved before leaves it at WARNING
    progress = summaries.Progress(start=10, total=258, batch=32, log_every=2)
    for step in range(11, 15):
        clock[0] += 30.0 if step == 11 else 2.0  # the first update compiles
        line = {}
        if step % 2 == 0:
            line = {"train/loss": 1.23456, "perf/images_per_sec": progress.rate(step)}
        progress.show(step, line)
    progress.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "update 12/258  loss 1.235  2.0 images/s  ETA 1:05:36",  # 64 images in 32 s; 246 updates of 16 s
        "update 14/258  loss 1.235  16.0 images/s  ETA 0:08:08",  # 244 updates of 2 s
    ]


def test_time_away_counts_neither_as_speed_nor_as_time_to_go(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    progress = summaries.Progress(start=0, total=10, batch=8, log_every=1)
    for step in range(1, 5):
        clock[0] += 4.0
        assert progress.rate(step) == pytest.approx(2.0)
        progress.pause()
        clock[0] += 1000.0
        progress.resume()
    assert progress._to_go(4) == "0:00:24"


def test_the_last_update_is_shown_whatever_the_interval(monkeypatch, clock, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    caplog.set_level("INFO", logger="absl")  # a SavedModel that was saved before leaves it at WARNING
    progress = summaries.Progress(start=0, total=7, batch=8, log_every=5)
    for step in range(1, 8):
        clock[0] += 1.0
        progress.show(step, {"train/loss": 1.0} if step in (5, 7) else {})
    assert [re.match(r"update (\d)/7", r.getMessage())[1] for r in caplog.records] == ["5", "7"]


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_to_go(monkeypatch, clock):
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = summaries.Progress(start=3, total=5, batch=8, log_every=1)
    for step in (4, 5):
        clock[0] += 2.0
        progress.show(step, {"train/loss": 0.5, "perf/images_per_sec": progress.rate(step)})
        progress.pause()
        progress.resume()
    progress.close()
    states = re.split(r"[\r\n]", terminal.getvalue())
    assert any("update 4/5, loss 0.5  4.0 images/s  ETA 0:00:02" in state for state in states)
    assert any("update 5/5, loss 0.5  4.0 images/s  ETA 0:00:00" in state for state in states)


def test_a_sheet_shows_its_pictures_in_their_rows_and_columns():
    """Each picture is one flat colour: the colours appear in reading order; a short row leaves its place empty."""
    colours = np.array([(255, i * 14, 255 - i * 14) for i in range(11)], np.uint8)
    images = np.broadcast_to(colours[:, None, None], [11, 8, 8, 3])
    rows = [[(images[4 * r + c], ["a $", "c" * 40]) for c in range(4 if r < 2 else 3)] for r in range(3)]
    drawn = pictures.sheet(rows)
    assert drawn.dtype == np.uint8
    assert drawn.ndim == 3
    places = []
    for colour in colours:
        lines, columns = np.nonzero((drawn == colour).all(-1))
        assert len(lines) > 1000
        places.append((lines.mean(), columns.mean()))
    grid = np.array([*places, (np.nan, np.nan)]).reshape(3, 4, 2)
    assert (np.diff(grid[:, 0, 0]) > 100).all()
    assert (np.diff(grid[0, :, 1]) > 100).all()


def test_the_confusion_matrix_is_dark_where_the_counts_are():
    diagonal = pictures.confusion_matrix(np.diag([5, 7]), ("a", "b"))
    swapped = pictures.confusion_matrix(np.diag([5, 7])[::-1], ("a", "b"))
    empty = pictures.confusion_matrix(np.zeros([2, 2], np.int64), ("a", "b"))
    assert diagonal.dtype == np.uint8
    assert diagonal.shape == swapped.shape == empty.shape
    dark = [np.argwhere(picture[..., 2] > picture[..., 0].astype(int) + 60) for picture in (diagonal, swapped)]
    assert [np.corrcoef(places.T)[0, 1] > 0 for places in dark] == [True, False]
    assert not (empty[..., 2] > empty[..., 0].astype(int) + 60).any()


def test_a_thousand_classes_still_make_a_picture():
    matrix = np.eye(1000, dtype=np.int64)
    drawn = pictures.confusion_matrix(matrix, [f"n{i:08d}" for i in range(1000)])
    assert max(drawn.shape) <= 1100
