"""The parity table: its arithmetic by hand, and the tool as a user meets it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import photos
from tools import parity_cases

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments, cwd):
    """Run the tool; return exit code, stdout, stderr."""
    command = [sys.executable, str(ROOT / "tools" / "parity.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_the_table_averages_over_pictures_and_keeps_the_worst():
    """Two pictures by hand: an op that adds 3 to the first and nothing to the second."""
    white, black = (np.full([224, 224, 3], value, np.uint8) for value in (255, 0))
    case = parity_cases.Case(
        "op", "p", 1.0, lambda image: image - 3 if image.max() == 255 else image, lambda image: image
    )
    assert parity_cases.difference(case, white) == (3.0, 3)
    assert parity_cases.difference(case, black) == (0.0, 0)
    bright, dark = (photos.encode(Image.fromarray(image), "PNG") for image in (white, black))
    assert parity_cases.rows([bright, dark], [case]) == [parity_cases.Row("op", "p", 1.5, 3.0, 3, 1.0)]


def test_views_are_a_central_square_and_an_uneven_corner():
    image = np.arange(300 * 400 * 3).reshape([300, 400, 3])
    square, corner = parity_cases.views(image)
    np.testing.assert_array_equal(square, image[38:262, 88:312])
    np.testing.assert_array_equal(corner, image[129:, 137:])
    assert [view.shape for view in parity_cases.views(image[:100, :90])] == [(100, 90, 3)] * 2


def test_evaluation_by_pillow_has_torchvisions_sizes():
    """640 x 427 at 0.875: 383 x 256, whose corner 79.5 is rounded to the even 80; at 0.9 the short side is 248."""
    ramp = Image.fromarray(np.tile((np.arange(383) // 2).astype(np.uint8), [256, 1]))
    got = np.asarray(parity_cases.evaluation_by_pillow(ramp, crop_ratio=0.875))
    assert got.shape == (224, 224) and (got[0, 0], got[0, -1]) == (80 // 2, (80 + 223) // 2)
    ramp = Image.fromarray(np.tile(np.arange(248, dtype=np.uint8), [248, 1]))
    assert np.asarray(parity_cases.evaluation_by_pillow(ramp, crop_ratio=0.9))[0, 0] == 12


def test_the_tool_prints_and_writes_a_line_for_every_case_and_leaves_out_a_torn_photograph(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.png", "deep/c.png"):
        (tmp_path / name).write_bytes(photos.encode(Image.fromarray(photos.small(96)), "PNG"))
    (tmp_path / "broken.jpg").write_bytes(photos.files()["small"][:3000])
    code, out, err = run(f"--images={tmp_path}", "--count=3", f"--json={tmp_path / 'table.json'}", cwd=tmp_path)
    assert code == 0, out + err
    assert "warning: broken.jpg can't be read and is left out" in err
    lines = out.splitlines()
    cases = parity_cases.IMAGE_CASES + parity_cases.FILE_CASES
    assert lines[0].startswith("2 photographs against Pillow ") and len(lines) == 2 + len(cases)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["photographs"] == ["a.png", "deep/b.png"]
    assert [(row["op"], row["parameter"]) for row in table["rows"]] == [(case.op, case.parameter) for case in cases]
    assert all(0 <= row["mean"] <= row["worst_mean"] <= row["largest"] for row in table["rows"])


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--images=nowhere"], "--images (nowhere) must be a directory"),
        (["--images=empty"], "must hold .jpg, .jpeg, .png or .bmp files"),
        (["--json=nowhere/table.json"], "must lie in a directory that exists"),
        (["--images=.", f"--config={ROOT}/configs/base.py"], "exclude each other"),
        (["--count=0"], "count"),
        (["--json=table.json"], "(table.json) exists; nothing is overwritten"),
        (["--images=broken"], "none of the 1 photographs can be read: a/torn.jpg"),
        (
            [f"--config={ROOT}/configs/base.py", "--config.data.name=folder:broken", "--config.data.eval_split=all"],
            "none of the 1 photographs can be read: a/torn.jpg",
        ),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_1(tmp_path, flags, part):
    (tmp_path / "table.json").write_text("kept")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "torn.jpg").write_bytes(b"no picture")
    code, out, err = run(*flags, cwd=tmp_path)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and not out and len(lines) == 1 and part in lines[0], err
    assert "Traceback" not in err
    assert (tmp_path / "table.json").read_text() == "kept"
