"""tools/predict.py: classes and probabilities of pictures, logits of an array; both against the network itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit import errors, predict, saved
from tests import family

REPOSITORY = Path(__file__).resolve().parents[1]
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    return family.checkpoint(tmp_path_factory.mktemp("two") / "ckpt", "deit_micro_distilled_patch8_32", ema=True)


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    return family.checkpoint(tmp_path_factory.mktemp("one") / "ckpt", "deit_micro_patch8_32")


@pytest.fixture
def folder(tmp_path):
    """Return a directory with three pictures of the network's own size, one of them further down."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name in ("b.png", "a.png", "below/c.png"):
        Image.fromarray(RANDOM.integers(0, 256, [32, 32, 3], np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def start(*arguments, limit="unlimited"):
    """Run the tool, with files of at most `limit` kB."""
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", sys.executable, "tools/predict.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command += map(str, arguments)
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=120)


def run(*arguments, code=0):
    done = start(*arguments)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def expected(ckpt, path):
    """Return the probabilities of one picture, by Pillow and NumPy around the network."""
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)[None]
    logits = saved.open_network(ckpt).network.logits(pixels)
    return softmax(np.mean([value.numpy()[0] for value in logits.values()], 0))


def test_pictures_of_a_directory_get_the_probabilities_of_the_fused_logits(two_heads, folder):
    printed = json.loads(run(f"--ckpt={two_heads}", folder, "--json", "--top=2"))
    assert [row["file"] for row in printed] == [str(folder / name) for name in ("a.png", "b.png", "below/c.png")]
    for row in printed:
        want = expected(two_heads, row["file"])
        order = np.argsort(-want)[:2]
        assert [c["class"] for c in row["classes"]] == ["abc"[i] for i in order]
        np.testing.assert_allclose([c["probability"] for c in row["classes"]], want[order], atol=1e-4)


def test_a_table_names_file_class_and_share_and_what_cannot_be_read_is_exit_1(two_heads, folder):
    want = expected(two_heads, folder / "a.png")
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    sheet = folder.parent / "sheet.png"
    done = start(f"--ckpt={two_heads}", folder / "a.png", folder / "torn.png", f"--picture={sheet}")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == str(folder / "a.png") and lines[4] == str(folder / "torn.png")  # three classes, five asked for
    assert lines[1].split() == [f"{want.max():.2%}", "abc"[want.argmax()]]
    assert lines[5].startswith("  can't be read: cannot identify image file") and len(lines) == 6
    assert done.stderr.splitlines()[-1].endswith(f"1 of 2 pictures can't be read: {folder / 'torn.png'}")
    with Image.open(sheet) as drawn:
        assert drawn.size[0] > 100


def test_an_array_that_is_normalised_already_gets_the_logits_of_its_pixels(two_heads, one_head):
    pixels = RANDOM.uniform(0, 255, [3, 32, 32, 3]).astype(np.float32)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    ready = ((pixels / 255 - mean) / std).astype(np.float32)
    for ckpt in (two_heads, one_head):
        opened = predict.open_network(str(ckpt))
        own = {name: value.numpy() for name, value in opened.network.logits(pixels).items()}
        for images, raw in ((pixels, False), (ready, True)):
            got = predict.logits(opened, images, raw=raw)
            assert sorted(got) == sorted(["logits", *(f"logits_{name}" for name in own)])
            for name, value in own.items():
                np.testing.assert_allclose(got[f"logits_{name}"], value, atol=2e-5)
            np.testing.assert_allclose(got["logits"], np.mean(list(own.values()), 0), atol=2e-5)
            if len(own) == 1:
                np.testing.assert_array_equal(got["logits"], got["logits_cls"])


def test_many_images_go_through_in_batches_and_give_what_one_by_one_gives(two_heads):
    opened = predict.open_network(str(two_heads))
    with opened.config.unlocked():
        opened.config.eval.batch = 2
    images = RANDOM.uniform(0, 255, [5, 32, 32, 3]).astype(np.float32)
    together = predict.logits(opened, images, raw=False)["logits"]
    for i in range(5):
        alone = predict.logits(opened, images[i : i + 1], raw=False)["logits"][0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


def test_the_tool_writes_the_logits_of_an_array_once(two_heads, tmp_path):
    images = RANDOM.normal(size=[2, 32, 32, 3]).astype(np.float32)
    np.save(tmp_path / "x.npy", images)
    arguments = [f"--ckpt={two_heads}", f"--array={tmp_path / 'x.npy'}", "--raw", f"--out={tmp_path / 'y.npz'}"]
    assert "logits_dist [2, 3]" in run(*arguments)
    found = np.load(tmp_path / "y.npz", allow_pickle=False)
    want = predict.logits(predict.open_network(str(two_heads)), images, raw=True)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
        assert found[name].dtype == np.float32
    assert "exists; nothing is overwritten" in run(*arguments, code=1)


def test_an_archive_of_arrays_is_no_array(one_head, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros([1, 32, 32, 3], np.float32))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    for name, message in (
        ("x.npz", "is an .npz archive, not a .npy file"),
        ("torn.npz", "can't be read as a .npy file"),
    ):
        line = run(f"--ckpt={one_head}", f"--array={tmp_path / name}", f"--out={tmp_path / 'y.npz'}", code=1)
        assert message in line and line.count("\n") == 1


def test_a_disk_that_is_full_leaves_nothing_behind(one_head, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros([99, 32, 32, 3], np.float32))
    arguments = [f"--ckpt={one_head}", f"--array={tmp_path / 'x.npy'}", f"--out={tmp_path / 'y.npz'}"]
    done = start(*arguments, limit=1)
    assert done.returncode == 1 and "y.npz can't be written: File too large" in done.stderr.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["x.npy"]


def test_a_picture_that_asks_to_be_turned_is_answered_as_it_is_stored_and_said(two_heads, folder, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    with Image.open(folder / "a.png") as image:
        image.save(folder / "upright.jpg")
        image.save(folder / "turned.jpg", exif=exif)
    opened = predict.open_network(str(two_heads))
    with caplog.at_level("WARNING", logger="absl"):
        # Each alone: two rows of one batch may be summed in another order.
        (upright,) = predict.pictures(opened, [str(folder / "upright.jpg")], top=3)
        assert caplog.text == ""
        (turned,) = predict.pictures(opened, [str(folder / "turned.jpg")], top=3)
    assert upright.classes == turned.classes
    assert "EXIF orientation in 1 of 1 pictures" in caplog.text


def test_what_cannot_be_read_has_its_reason(two_heads, folder, caplog):
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    with caplog.at_level("INFO", logger="absl"):
        files = predict.find([str(folder)])
    assert "files of other kinds are left out (1)" in caplog.text
    answers = predict.pictures(predict.open_network(str(two_heads)), files, top=1)
    problems = {os.path.basename(answer.file): answer.problem for answer in answers}
    assert [name for name, problem in problems.items() if problem] == ["empty.png", "torn.png"]
    assert problems["empty.png"] == "the file is empty or can't be read"
    assert "cannot identify image file" in problems["torn.png"]


def test_the_sheet_shows_every_picture_at_the_same_width(two_heads, tmp_path):
    """Two red pictures beside each other: the runs of red in a row of the sheet are equally long."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full([32, 32, 3], (255, 0, 0), np.uint8)).save(tmp_path / name)
    opened = predict.open_network(str(two_heads))
    answers = predict.pictures(opened, predict.find([str(tmp_path)]), top=3)
    drawn = predict.sheet(opened, answers)
    red = (drawn == (255, 0, 0)).all(-1)
    (row,) = red[[red.sum(1).argmax()]]
    edges = np.flatnonzero(np.diff(row.astype(int)))
    widths = np.diff(edges)[::2]
    assert len(widths) == 2 and abs(int(widths[0]) - int(widths[1])) <= 1 and widths[0] > 50


def test_averaged_weights_give_other_answers(two_heads, one_head):
    images = RANDOM.uniform(0, 255, [1, 32, 32, 3]).astype(np.float32)
    raw, ema = (
        predict.logits(predict.open_network(str(two_heads), weights=w), images, raw=False) for w in ("raw", "ema")
    )
    assert np.abs(raw["logits"] - ema["logits"]).max() > 1e-3
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        predict.open_network(str(one_head), weights="ema")


def test_a_network_that_was_trained_in_half_precision_answers_in_single(tmp_path, one_head):
    def half(config):
        config.precision = "mixed_float16"

    ckpt = family.checkpoint(tmp_path / "half", "deit_micro_patch8_32", change=half)
    images = RANDOM.uniform(0, 255, [1, 32, 32, 3]).astype(np.float32)
    whole, now = (predict.logits(predict.open_network(str(c)), images, raw=False)["logits"] for c in (one_head, ckpt))
    assert saved.config_of(ckpt).precision == "mixed_float16"
    np.testing.assert_array_equal(whole, now)


def test_a_header_that_promises_more_than_memory_is_one_line(one_head, tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999, 32, 3), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    line = run(f"--ckpt={one_head}", f"--array={tmp_path / 'x.npy'}", f"--out={tmp_path / 'y.npz'}", code=1)
    assert "can't be read as a .npy file" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "images, raw, message",
    [
        (np.zeros([2, 32, 32, 3], np.float64), True, r"--array is float64, not float32$"),
        (np.zeros([2, 32, 32, 3], np.uint8), True, r"--array is uint8, not float32$"),
        (np.zeros([2, 32, 32, 3], np.int32), False, r"--array is int32, not float32 or uint8"),
        (np.zeros([32, 32, 3], np.float32), True, r"has shape \[32, 32, 3\], not \[N, 32, 32, 3\]"),
        (np.zeros([2, 3, 32, 32], np.float32), True, r"has shape \[2, 3, 32, 32\]"),
        (np.zeros([0, 32, 32, 3], np.float32), True, r"has shape \[0, 32, 32, 3\]"),
        (np.full([1, 32, 32, 3], np.nan, np.float32), True, r"not finite"),
    ],
)
def test_an_array_of_another_form_is_refused(one_head, images, raw, message):
    with pytest.raises(errors.UserError, match=message):
        predict.logits(predict.open_network(str(one_head)), images, raw=raw)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name pictures or directories of pictures, or an --array"),
        (["--array=x.npy"], "--array and --out go together"),
        (["README.md", "--raw"], "--raw goes with them"),
        (["no/such.png"], "no/such.png is no file or directory"),
        (["launch"], "launch holds no pictures"),
        (["--array=README.md", "--out=y.npz"], "README.md) can't be read as a .npy file"),
        (["--array=no.npy", "--out=no/such/y.npz"], "--out (no/such/y.npz) must lie in a directory that exists"),
        (["README.md", "--picture=no/such/y.png"], "--picture (no/such/y.png) must lie in a directory that exists"),
        (["README.md", "--picture=README.md"], "--picture (README.md) must end in .png"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_1(one_head, arguments, message):
    line = run(f"--ckpt={one_head}", *arguments, code=1)
    assert message in line and line.count("\n") == 1


def test_a_path_that_is_no_checkpoint_is_one_line(tmp_path):
    assert "is no run, checkpoint or export" in run(f"--ckpt={tmp_path}", "README.md", code=1)
