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


def run(*arguments, code=0):
    command = [sys.executable, "tools/predict.py", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=120)
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
    text = run(f"--ckpt={two_heads}", folder / "a.png", f"--picture={folder / 'sheet.png'}")
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size[0] > 100
    (folder / "sheet.png").unlink()
    lines = text.splitlines()
    assert lines[0] == str(folder / "a.png") and len(lines) == 1 + 3  # three classes, though five are asked for
    assert lines[1].split() == [f"{want.max():.2%}", "abc"[want.argmax()]]
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    complaint = run(f"--ckpt={two_heads}", folder, code=1)
    assert "1 of 4 pictures can't be read" in complaint and "torn.png" in complaint


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
    assert "must end in .npz and not exist" in run(*arguments, code=1)


def test_averaged_weights_give_other_answers(two_heads, one_head):
    images = RANDOM.uniform(0, 255, [1, 32, 32, 3]).astype(np.float32)
    raw, ema = (
        predict.logits(predict.open_network(str(two_heads), weights=w), images, raw=False) for w in ("raw", "ema")
    )
    assert np.abs(raw["logits"] - ema["logits"]).max() > 1e-3
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        predict.open_network(str(one_head), weights="ema")


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
    ],
)
def test_a_bad_flag_is_one_line_and_exit_1(one_head, arguments, message):
    line = run(f"--ckpt={one_head}", *arguments, code=1)
    assert message in line and line.count("\n") == 1


def test_a_path_that_is_no_checkpoint_is_one_line(tmp_path):
    assert "is no run, checkpoint or export" in run(f"--ckpt={tmp_path}", "README.md", code=1)
