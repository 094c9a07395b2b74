"""What `main.py` and the tools share at the command line: one clear line for bad input, and exit codes.

Imports no TensorFlow, so that a typing error is answered in a second.
"""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from configs import base
from deit import config as configuration
from deit import errors

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what write() says without a file's name


def new_file(flag: str, value: str | None, ending: str = "") -> Path | None:
    """Return the path of a file that a flag names and that is to be written; None where the flag is empty.

    Errors: UserError where it exists, ends otherwise, or its directory is not there: asked before the work begins.
    """
    if not value:
        return None
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # ~nobody
        raise errors.UserError(f"{flag} ({value}): {error}") from None
    if path.suffix.lower() != ending and ending:
        raise errors.UserError(f"{flag} ({path}) must end in {ending}")
    if path.is_dir():
        raise errors.UserError(f"{flag} ({path}) is a directory: name a file that does not exist yet")
    if os.path.lexists(path):
        raise errors.UserError(f"{flag} ({path}) exists; nothing is overwritten: remove it or choose another")
    if not path.absolute().parent.is_dir():
        raise errors.UserError(f"{flag} ({path}) must lie in a directory that exists")
    return path


def run(
    main: Callable[[list[str]], int],
    *,
    config_flag: str = "",
    default_config: str = "",
    after_interrupt: str = "",
    leave: Callable[[int], None] = sys.exit,
) -> None:
    """Parse the flags, call `main(argv)` and leave with its exit code; a UserError is one line and exit 1.

    `config_flag`: name of a config_flags file flag; `default_config` is its value where none is given.
    `after_interrupt`: what Ctrl-C is told beyond "interrupted". `leave`: how the process ends, given the code.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    logging.get_absl_handler().setFormatter(_Plain())

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            if config_flag:
                argv = _with_config(list(argv), config_flag, default_config)
            rest = flags.FLAGS(argv)
            if len(rest) > 1 and not _takes_arguments(main):
                raise errors.UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
            return rest
        except SystemExit:
            raise
        except Exception as error:
            _leave(_explain(error, argv, config_flag))

    def guarded(argv: list[str]) -> None:
        leave(_code(main, argv, after_interrupt))

    app.run(guarded, flags_parser=parse)


def _code(main: Callable[[list[str]], int], argv: list[str], after_interrupt: str) -> int:
    """Return `main`'s exit code, or that of the error it ended with, told in a line where a line is enough."""
    try:
        code = main(argv)
        sys.stdout.flush()  # here, where a reader that has gone can be answered
        return code
    except errors.UserError as error:
        complain(str(error))
    except BrokenPipeError:
        # `tool | head` has enough. What is still buffered goes nowhere, or the interpreter complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename:
            complain(f"{error.filename}: {error.strerror}")
        elif error.errno in _NO_ROOM:
            complain(f"a file could not be written: {error.strerror}")
        else:
            traceback.print_exc()
    except KeyboardInterrupt:
        complain("interrupted" + (f"; {after_interrupt}" if after_interrupt else ""))
        return 130
    except Exception:
        traceback.print_exc()
    return 1


def default_workdir(config_path: str) -> Path:
    """Return runs/<config name>[-<config arg>]; for a recorded config.json, runs/<its run>-repeat."""
    path, _, arg = config_path.partition(":")
    if Path(path).name == _RECORDED:
        return Path("runs") / f"{Path(arg).resolve().parent.name}-repeat"
    name = Path(path).stem + (f"-{arg}" if arg else "")
    return Path("runs") / re.sub(r"[^\w.=-]+", "_", name)


_RECORDED = "recorded.py"


def _with_config(argv: list[str], flag: str, default: str) -> list[str]:
    """Return argv with one --flag=FILE.py[:ARG] first: the default where none is given, config.json by recorded.py."""
    value, rest, words = default, [], iter(argv[1:])
    for word in words:
        name, equals, text = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            value = text if equals else next(words, "")
        else:
            rest.append(word)
    path = value.partition(":")[0]
    if not Path(path).is_file():
        raise errors.UserError(
            f"--{flag} ({path}) must be a configuration file or the config.json of a run: no such file"
        )
    if path.endswith(".json"):
        value = f"{Path(default).with_name(_RECORDED)}:{path}"
    return [argv[0], f"--{flag}={value}", *rest]


def _explain(error: Exception, argv: Sequence[str], flag: str) -> str:
    """Return one line for what went wrong while the flags were read."""
    prefix = f"--{flag}."
    known = [name for name, _ in configuration.flatten(base.get_config())]
    for word in argv if isinstance(error, (AttributeError, KeyError)) and flag else ():
        name = word.partition("=")[0].removeprefix(prefix)
        if word.startswith(prefix) and name.removeprefix("teacher.train.") not in known:
            return configuration.unknown_field(name, [*known, *(f"teacher.train.{field}" for field in known)])
        if name.startswith("teacher.train."):
            return f"{name}: this configuration has no teacher.train; a preset with teacher.kind=train has"
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def _takes_arguments(main: Callable) -> bool:
    return bool(getattr(main, "takes_arguments", False))


def complain(text: str) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr)


def _leave(text: str) -> None:
    complain(text)
    sys.exit(1)


class _Plain(logging.PythonFormatter):
    """Time and text; the level only where it is a warning or worse."""

    def format(self, record) -> str:
        level = "" if record.levelno <= 20 else record.levelname.lower() + ": "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
