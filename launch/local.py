"""Train with several processes of main.py on this machine, restarted together when one is lost.

Needs:  the environment of main.py and free ports of 127.0.0.1; with a list in CUDA_VISIBLE_DEVICES a device a worker.
Starts: python launch/local.py -n 2 -- --config=configs/FILE.py [main.py's flags ...], each worker with its TF_CONFIG.
Resume: the same command goes on from the newest checkpoint; after a crash or a preemption the supervisor does it.
Watch:  worker 0's lines and all warnings here, every line in WORKDIR/logs/worker-N.log (made even for a bad flag).
Stop:   Ctrl-C or SIGTERM: the workers save and end, nothing is restarted. A third signal kills them.
"""

import argparse
import contextlib
import errno
import itertools
import math
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deit import cli, cluster, errors
from deit import workdir as run_directory
from launch import supervisor

HOST = "127.0.0.1"
_LAST_PORT = 65535
_OWN_PORTS = range(20_000, 32_000)  # not from 32768 on: any outgoing connection may take one before its worker does
_MAX_PAUSE = 60.0  # s between two starts
_DEFAULT_CONFIG = "configs/quickstart.py"  # main.py's


def main(argv: Sequence[str], program: Path = ROOT / "main.py") -> int:
    """Supervise workers of `program` and return the exit code; bad input is one line and 1."""
    try:
        options, arguments = parse(argv)
        workdir = run_directory.check_workdir(workdir_of(arguments))
        logs = options.logs or workdir / "logs"
        devices(options.workers)  # says what is wrong before anything is made
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(program), *arguments]
        with (
            supervisor.Supervisor(
                command,
                environments=lambda log: environments(options.workers, options.port, log),
                logs=logs,
                startup=options.startup,
                grace=options.grace,
                verbose=options.verbose,
            ) as group,
            signals_to(group.interrupt),
        ):
            return keep_going(group, workdir, max_restarts=options.max_restarts, backoff=options.backoff)
    except errors.UserError as error:
        cli.complain(str(error))
    except OSError as error:
        cli.complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return errors.ERROR


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (the supervisor's options, main.py's flags) on both sides of `--`. Errors: UserError."""
    parser = _Parser(
        prog="local.py",
        usage="python launch/local.py -n N [options] -- MAIN_FLAG ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", "--workers", type=_whole(1), required=True, metavar="N", help="processes to start; 1 has no TF_CONFIG")
    own = f"any from {_OWN_PORTS[0]} to {_OWN_PORTS[-1]}, anew at each start"
    ports = f"first of N ports, those in use are passed over; 0: {own} (default: 0)"
    add("--port", type=_whole(0, _LAST_PORT), default=0, metavar="BASE", help=ports)
    restarts = "restarts in a row without a new checkpoint before giving up; 0: never restart (default: 5)"
    add("--max-restarts", type=_whole(0), default=5, metavar="K", help=restarts)
    startup = "seconds until all workers must be up (default: 600)"
    add("--startup", type=_seconds, default=600.0, metavar="S", help=startup)
    grace = "seconds between TERM and KILL, time for a save (default: 120)"
    add("--grace", type=_seconds, default=120.0, metavar="S", help=grace)
    backoff = "seconds before the first restart; doubles up to 60, starts anew with a new checkpoint (default: 1)"
    add("--backoff", type=_seconds, default=1.0, metavar="S", help=backoff)
    add("--logs", type=Path, metavar="DIR", help="where worker-0.log and so on are appended to (default: WORKDIR/logs)")
    add("--verbose", action="store_true", help="show every line of every worker")
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    if split == len(words):
        raise errors.UserError(
            "-- is missing: main.py's flags come after it, as in: launch/local.py -n 2 -- --config=…"
        )
    return options, words[split + 1 :]


def keep_going(group: supervisor.Supervisor, workdir: Path, *, max_restarts: int, backoff: float) -> int:
    """Run the workers until all are done, or a restart makes no sense, or a signal came; return the exit code."""
    fruitless, pause = 0, backoff
    for start in itertools.count(1):
        before = progress(workdir)
        workers = group.run_once(start)
        if not group.signals and (code := verdict(workers)) is not None:
            group.log(f"error: {last_words(workers)}; it would end the same again" if code else "all workers are done")
            return code
        if progress(workdir) != before:
            fruitless, pause = 0, backoff
        if not group.signals:
            if fruitless >= max_restarts:
                capped = f"no new checkpoint in {fruitless} restarts, giving up"
                why = capped if max_restarts else "restarts are off (--max-restarts 0)"
                group.log(f"error: {why}: {last_words(workers)}")
                return errors.PEER_LOST
            fruitless += 1
            group.log(f"restart in {pause:g} s, {fruitless} of at most {max_restarts} since the newest checkpoint")
            group.pause(pause)
            pause = min(2 * pause, _MAX_PAUSE)
        if group.signals:
            killed = len(group.signals) > 2
            return 128 + group.signals[-1] if killed else interrupted([worker.code for worker in workers])


def verdict(workers: Sequence[supervisor.Worker]) -> int | None:
    """Return the exit code for how one start ended, None for a restart.

    An error comes back at every start, so it is handed on; what a worker says that was told to end is no evidence.
    """
    own = [each.code for each in workers if supervisor.is_error(each.code) and not each.stopped]
    if own:
        return min(own, key=_rank)
    return None if any(each.code for each in workers) else errors.DONE


def interrupted(codes: Sequence[int]) -> int:
    """Return the exit code of a supervisor that was told to stop: its workers' gravest, as a shell says it."""
    code = min(codes, key=_rank)
    return code if code >= 0 else 128 - code


def _rank(code: int) -> int:
    """Order by gravity, the gravest first: errors, then whether something was saved, "done" last."""
    known = [errors.DIVERGED, errors.ERROR, None, errors.PREEMPTED, errors.PEER_LOST]
    if code in known:
        return known.index(code)
    return 2 if supervisor.is_error(code) else 9 if code == errors.DONE else 5


def last_words(workers: Sequence[supervisor.Worker]) -> str:
    """Return in one line how each worker ended and where its log is."""
    return "; ".join(f"{supervisor.explain(each.index, each.code)} ({each.log})" for each in workers)


def progress(workdir: Path) -> tuple[str, str]:
    """Return the names of the newest checkpoints of a run and of its teacher, "" where there is none."""
    return _newest(workdir / "checkpoints"), _newest(workdir / "teacher" / "checkpoints")


def _newest(checkpoints: Path) -> str:
    names = (path.name for path in checkpoints.glob("step-*"))
    return max(names, key=lambda name: (len(name), name), default="")  # step-100000000 comes after step-99999999


def workdir_of(arguments: Sequence[str]) -> Path:
    """Return the workdir that main.py takes with these flags."""
    config = _flag(arguments, "config") or _DEFAULT_CONFIG
    if config.partition(":")[0].endswith(".json"):
        config = f"recorded.py:{config}"  # as main.py reads a run's config.json
    return Path(_flag(arguments, "workdir") or cli.default_workdir(config))


def _flag(arguments: Sequence[str], name: str) -> str:
    """Return a flag's last value among absl's ways to write it: -name or --name, =value or value as the next word."""
    value, words = "", iter(arguments)
    for word in words:
        left, equals, right = word.partition("=")
        if left in (f"-{name}", f"--{name}"):
            value = right if equals else next(words, "")
    return value


def environments(workers: int, base: int, log: Callable[[str], None]) -> list[dict[str, str]]:
    """Return the variables of each worker; the ports of a cluster are chosen now. Errors: UserError."""
    common = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    common["PYTHONUNBUFFERED"] = "1"
    if workers == 1:
        return [common]
    ports = free_ports(workers, base, log)
    log(f"ports {', '.join(map(str, ports))} of {HOST}")
    addresses = tuple(f"{HOST}:{port}" for port in ports)
    return [
        {**common, "TF_CONFIG": cluster.Cluster(workers=addresses, index=index).tf_config(), **device}
        for index, device in enumerate(devices(workers))
    ]


def devices(workers: int) -> list[dict[str, str]]:
    """Return each worker's own CUDA_VISIBLE_DEVICES, nothing where no list is set. Errors: UserError."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in given.split(",")]
    if workers == 1 or names[0] in ("", "-1"):
        return [{}] * workers
    if len(names) < workers:
        raise errors.UserError(f"CUDA_VISIBLE_DEVICES ({given}) must list a device for each of {workers} workers")
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:workers]]


def free_ports(number: int, base: int, log: Callable[[str], None]) -> list[int]:
    """Return different free ports, the lowest from `base` on, or random ones for 0. Errors: UserError."""
    ports, allowed = [], range(base, _LAST_PORT + 1) if base else _OWN_PORTS
    for port in allowed if base else random.SystemRandom().sample(allowed, len(allowed)):
        if len(ports) == number:
            break
        with socket.socket() as probe:
            if base:  # as gRPC does: closed connections of an earlier start, not forgotten yet, are no obstacle
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise errors.UserError(f"--port ({port}) can't be used: {error.strerror}") from error
                if base:
                    log(f"port {port} is in use, passed over")
            else:
                ports.append(port)
    if len(ports) < number:
        raise errors.UserError(f"--port ({base}) must leave room for {number} free ports up to {allowed[-1]}")
    return ports


@contextlib.contextmanager
def signals_to(handle: Callable[[int], None]) -> Iterator[None]:
    """Hand the signals that ask to stop to `handle` for the block."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: handle(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise errors.UserError(f"{message}; --help tells all options")


def _whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse_whole(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            rule = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"({text}) must be a whole number, {rule}")
        return int(text)

    return parse_whole


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"({text}) must be a number of seconds, at least 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
