"""A run before it trains: its data opened, its configuration resolved, its directory looked at.

Promises: everything that can be refused without a network is refused here, in one line, with nothing written. A
workdir of another configuration, of another teacher or of other random draws is never continued.
"""

import dataclasses
import json
import platform
from pathlib import Path

import tensorflow as tf
from ml_collections import FrozenConfigDict

import deit
from configs import base
from deit import config as configuration
from deit import errors, summaries, warm_start
from deit import workdir as run_directory
from deit.data import sources, stream


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can start.

    Attributes:
      config: resolved and frozen.
      workdir: where the run lives.
      train_source, eval_source: the two splits, opened.
      prefix: of its fields in the flags: `teacher.train.` where it is the teacher that is trained first.
    """

    config: FrozenConfigDict
    workdir: Path
    train_source: sources.Source
    eval_source: sources.Source
    prefix: str = ""


def prepare(config, workdir: Path, *, replicas: int) -> Job:
    """Open the data, resolve a validated configuration and look at the workdir; write nothing.

    `init_from` comes before the data, which may take hours to prepare; a run with checkpoints of its own no longer
    needs it. Errors: UserError for an `init_from` that does not fit, absent data, a batch that does not divide, a
    workdir of another configuration.
    """
    begins = bool(config.init_from) and not has_checkpoints(workdir)
    classes = sources.classes(config.data) if begins else None
    if begins:
        warm_start.check(config, classes)
    resolved, train_source, eval_source = open_data(config, replicas=replicas)
    check_workdir(resolved, workdir)
    if begins and classes is None:  # of data that was prepared just now
        warm_start.check(resolved, train_source.classes)
    return Job(resolved, workdir, train_source, eval_source)


def has_checkpoints(workdir: Path) -> bool:
    """Say whether a run is continued rather than begun; one whose checkpoints are all damaged isn't begun either."""
    return any((workdir / "checkpoints").glob("step-*")) or any((workdir / "checkpoints").glob("corrupt-*"))


def open_data(config, *, replicas: int) -> tuple[FrozenConfigDict, sources.Source, sources.Source]:
    """Return (resolved configuration, training split, evaluation split). Errors: UserError."""
    train_source = sources.open_source(config.data, config.data.train_split)
    eval_source = sources.open_source(config.data, config.data.eval_split)
    sources.check_classes(train_source, eval_source)
    resolved = configuration.resolve(
        config,
        train_size=len(train_source),
        eval_size=len(eval_source),
        classes=train_source.classes,
        replicas=replicas,
    )
    return resolved, train_source, eval_source


def check_workdir(config, workdir: Path) -> None:
    """Raise UserError where the workdir holds a run of a configuration with another result."""
    path = workdir / "config.json"
    if not path.exists():
        for name in ("checkpoints", summaries.METRICS):  # config.json is written before either
            if (workdir / name).exists():
                raise errors.UserError(f"{workdir} has {name} but no config.json: choose another --workdir=")
        return
    changes = configuration.difference(configuration.read(path, base.get_config()), config)
    if changes:
        raise errors.UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changes[:8])}): "
            "choose another --workdir= or put the fields back"
        )


def prepare_teacher(student: Job, *, replicas: int) -> Job:
    """Return the job of the teacher that is trained first, in `teacher` below its student's workdir.

    Errors: UserError as `prepare` has them, and where it would be trained on other classes.
    """
    own = student.config.teacher.train
    try:
        teacher = prepare(own, student.workdir / "teacher", replicas=replicas)
    except errors.UserError as error:
        raise errors.UserError(f"teacher.train: {error}") from error
    ours, theirs = student.config.resolved.classes, teacher.config.resolved.classes
    if ours != theirs:
        raise errors.UserError(
            f"teacher.train.data.name ({own.data.name}) must have the classes of data.name "
            f"({student.config.data.name}): {', '.join(theirs[:6])} are not {', '.join(ours[:6])}"
        )
    return dataclasses.replace(teacher, prefix="teacher.train.")


def write_config(config, workdir: Path) -> None:
    """Write config.json, whole or not at all. Errors: UserError where it can't be written."""
    try:
        run_directory.write(workdir / "config.json", configuration.to_json(config).encode())
        run_directory.sync_directory(workdir)
    except OSError as error:
        raise errors.UserError(f"{workdir / 'config.json'} can't be written: {error.strerror or error}") from error


# What each machine may have its own of: where things lie, how many threads.
_OWN = ("data.data_dir", "data.threads", "teacher.cache_dir", "startup_seconds")


def fingerprint(run: Job) -> str:
    """Return what all workers of a run must have alike: its configuration and which examples there are."""
    fields = {name: str(value) for name, value in configuration.flatten(run.config) if name not in _OWN}
    count = len(run.train_source)
    names = [run.train_source.name(index) for index in range(0, count, max(1, count // 64))]
    return json.dumps([fields, names], sort_keys=True)


def check_versions(before: dict[str, str], now: dict[str, str], workdir: Path) -> None:
    """Raise UserError where the run to be continued had another teacher, or other draws, than there are now."""
    if before.get("stream", "1") != now["stream"]:
        raise errors.UserError(
            f"{workdir} was begun with other random draws (stream version {before.get('stream', '1')}, now "
            f"{now['stream']}) and would see other pictures: choose another --workdir= or continue it with deit "
            f"{before.get('deit', '')}"
        )
    if before.get("teacher", "") != now["teacher"]:
        raise errors.UserError(
            f"the teacher of {workdir} has changed since its last checkpoint ({before.get('teacher', '')[:80]} -> "
            f"{now['teacher'][:80]}): put it back or choose another --workdir="
        )


def versions(teacher, *, start: str = "") -> dict[str, str]:
    """Return what a checkpoint's manifest says about the software that wrote it, its teacher, and where it started.

    `start`: digest of the checkpoint that `init_from` was.
    """
    return {
        "deit": deit.__version__,
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
        "stream": str(stream.VERSION),
        "teacher": teacher.identity if teacher is not None else "",
        "start": start,
    }
