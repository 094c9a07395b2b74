"""What the tools share at the command line: a full disk and a reader that has gone are no traceback."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from deit import cli

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "5 bytes are free, 9 are needed"), "a file could not be written: 5 bytes are free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file could not be written: Disk quota exceeded"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_line(error, line, capsys):
    def main(_):
        raise error

    assert cli._code(main, [], "") == 1
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_an_error_of_the_system_that_nothing_explains_keeps_its_traceback(capsys):
    def main(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    assert cli._code(main, [], "") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_enough_ends_the_tool_quietly(tmp_path, lines):
    """`tool | head -0`: the pipe breaks in the middle of the output, or when the buffer is emptied at the end."""
    tool = tmp_path / "tool.py"
    tool.write_text(
        f"import sys, time\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom deit import cli\n"
        f"def main(_):\n    time.sleep(0.3)\n    for _ in range({lines}):\n        print('a line of a table')\n"
        "    return 0\ncli.run(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, tool], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 128 + 13
    assert said == ""
