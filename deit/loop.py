"""train(config, workdir): the one long function, in named acts that read top to bottom.

Promises: the same command in the same workdir continues the run and ends with the same bits as a run that was
never stopped; a finished run is printed, not repeated; a workdir of another configuration is refused untouched;
the last update is always logged, evaluated and checkpointed, whatever the intervals.
"""

import contextlib
import dataclasses
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import FrozenConfigDict

import deit
from configs import base
from deit import checkpoint, contact_sheet, errors, evaluate, feed, pictures, plan, summaries, train_step
from deit import config as configuration
from deit import workdir as run_directory
from deit.data import sources, stream, unreadable
from deit.models import factory
from deit.teachers import labeller
from deit.teachers import report as teacher_report


class Diverged(Exception):
    """Non-finite gradients in `max_skipped` updates in a row: exit code 4."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last update and the metrics of its last evaluation."""

    step: int
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that can start: everything that can be refused without a network has been checked.

    Attributes:
      config: resolved and frozen.
      workdir: where the run lives.
      train_source, eval_source: the two splits, opened.
    """

    config: FrozenConfigDict
    workdir: Path
    train_source: sources.Source
    eval_source: sources.Source


def prepare(config, workdir: Path, *, replicas: int) -> Job:
    """Open the data, resolve a validated configuration and look at the workdir; write nothing.

    Errors: UserError for absent data, a batch that does not divide, a workdir of another configuration.
    """
    resolved, train_source, eval_source = open_data(config, replicas=replicas)
    check_workdir(resolved, workdir)
    return Job(resolved, workdir, train_source, eval_source)


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


def train(job: Job, *, strategy: tf.distribute.Strategy) -> Result:
    """Train a job in its workdir, or continue there, and return the result. The caller holds the workdir's lock.

    Errors: UserError for what a user can put right; Diverged. On every error the newest checkpoint stays.
    """
    config, workdir = job.config, job.workdir
    check_workdir(config, workdir)  # again: another process may have written it before it was locked
    total = config.resolved.total_updates
    newest = checkpoint.newest(workdir, set_aside=True)
    if newest is not None and checkpoint.manifest(newest)["step"] >= total:
        return finished(newest, workdir)

    # --- Teacher, student and the state of the run --------------------------------------------------------
    teacher = labeller.open_labeller(
        config, strategy, workdir=workdir, train_source=job.train_source, eval_source=job.eval_source
    )
    with strategy.scope():
        network = factory.build(
            config.model,
            num_classes=len(config.resolved.classes),
            image_size=config.data.image_size,
            precision=config.precision,
        )
        state = train_step.create_state(config, network)
        if newest is not None:
            train_step.restore(state, checkpoint.read(newest)[0])
    written_by = versions(teacher)
    if newest is not None:
        check_versions(checkpoint.manifest(newest)["versions"], written_by, workdir)
    step = int(state.step.numpy())
    taught_by = teacher.describe() if teacher is not None else "none"
    logging.info("plan of %s\n%s", workdir, plan.describe(config, network=network, teacher=taught_by))

    # --- Data, from this update on ------------------------------------------------------------------------
    batches = feed.batches(config, strategy, job.train_source, start_update=step, drop_rates=network.drop_rates)
    iterator = iter(batches)
    eval_batches = stream.evaluation(job.eval_source, config, batch=config.eval.batch)

    # --- The teacher is measured before it teaches --------------------------------------------------------
    taught = None
    if teacher is not None:
        taught = teacher.measure(eval_batches, config.resolved.classes)
        logging.info("teacher: %s", teacher_report.describe(taught))
        teacher_report.gate(taught, config.teacher.min_accuracy)

    # --- From here on the run exists: its directory is written ---------------------------------------------
    if newest is None:
        write_config(config, workdir)
    writer = summaries.Summaries(workdir, start_step=step if newest is not None else -1)
    if newest is None:
        writer.text(0, "config", f"```json\n{configuration.to_json(config)}\n```")
        if taught is not None:
            show_teacher(writer, taught, config.resolved.classes)
        writer.image(0, "train/views", contact_sheet.draw(job.train_source, config))
    else:
        logging.info("continuing %s after update %d of %d", workdir, step, total)

    # --- The loop -------------------------------------------------------------------------------------------
    update = train_step.make(config, strategy, state)
    predict = evaluate.predictor(network)
    lost, evaluated = unreadable.Unreadable(job.train_source, config), False
    saver = checkpoint.Saver(
        workdir, config_json=configuration.to_json(config), keep=config.checkpoint.keep, versions=written_by
    )
    learning_rate = state.optimizer.learning_rate_at
    progress = summaries.Progress(
        start=step, total=total, batch=config.global_batch, log_every=config.log.every_updates
    )
    with contextlib.ExitStack() as at_exit:
        for close in (progress.close, writer.close, saver.join):  # called in reverse: the save under way comes first
            at_exit.callback(close)
        while step < total:
            batch = next(iterator)
            rate = float(learning_rate(step))
            answers = teacher(batch, step) if config.distill.kind != "none" else None
            vector = update(batch, answers).numpy()  # the one read of the device; a cache looks at the weights, too
            step += 1
            guard(config, vector, step)
            if missing(config, vector):
                lost.note(*(feed.local(strategy, batch[name]) for name in ("position", "weight")))
                lost.check(state.bad_images.numpy(), step)
            due = due_at(step, total)

            line: dict[str, float] = {}
            if due(config.log.every_updates):
                line = train_metrics(config, vector, rate, state)
                line["perf/images_per_sec"] = progress.rate(step)
                line.update(teacher.news() if teacher is not None else {})
            progress.show(step, line)

            metrics = {}
            if due(config.eval.every_updates):
                progress.pause()
                logging.info("evaluating after update %d on %s", step, config.data.eval_split)
                report = evaluate.student(
                    network,
                    eval_batches,
                    config.resolved.classes,
                    predict=predict,
                    averages={path: variable.numpy() for path, variable in state.ema},
                    teacher_labels=taught.labels if taught is not None else None,
                    source=None if evaluated else job.eval_source,  # what can't be read is named once
                )
                evaluated = True
                metrics = report.metrics
                line.update(metrics)
                logging.info("update %d/%d  %s", step, total, headline(metrics))
                matrix = pictures.confusion_matrix(report.confusion, config.resolved.classes)
                writer.image(step, "eval/confusion", matrix)
                progress.resume()
            if line:
                writer.scalars(step, line)

            if due(config.checkpoint.every_updates):
                writer.flush()  # before the manifest: no checkpoint is ahead of its log
                saver.save(step, train_step.snapshot(state), metrics=metrics)
    if config.teacher.cache != "off":
        logging.info("teacher: %s", teacher.summary())
    return Result(step, metrics)


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


def check_same_classes(teacher: Job, student: Job) -> None:
    """Raise UserError where a teacher would be trained on other classes than its student's."""
    ours, theirs = student.config.resolved.classes, teacher.config.resolved.classes
    if ours != theirs:
        raise errors.UserError(
            f"teacher.train.data.name ({teacher.config.data.name}) must have the classes of data.name "
            f"({student.config.data.name}): {', '.join(theirs[:6])} are not {', '.join(ours[:6])}"
        )


def write_config(config, workdir: Path) -> None:
    """Write config.json, whole or not at all."""
    run_directory.write(workdir / "config.json", configuration.to_json(config).encode())
    run_directory.sync_directory(workdir)


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


def finished(newest: Path, workdir: Path) -> Result:
    """Print a run that has reached its last update."""
    manifest = checkpoint.manifest(newest)
    logging.info("%s is finished: update %d  %s", workdir, manifest["step"], headline(manifest["metrics"]))
    return Result(manifest["step"], manifest["metrics"])


def show_teacher(writer: summaries.Summaries, taught: teacher_report.Report, classes: Sequence[str]) -> None:
    """Write what the teacher is worth as step 0: numbers, which classes it takes for which, its calibration."""
    writer.scalars(0, taught.metrics)
    writer.image(0, "teacher/confusion", pictures.confusion_matrix(taught.confusion, classes))
    writer.image(0, "teacher/calibration", pictures.reliability(taught.calibration, taught.metrics["teacher/ece"]))


def due_at(step: int, total: int) -> Callable[[int], bool]:
    """Return `due(every)`: whether something done every so many updates (0 = only at the end) is due now."""
    return lambda every: step == total or (every > 0 and step % every == 0)


def train_metrics(config, vector: np.ndarray, rate: float, state) -> dict[str, float]:
    """Name the entries of an update's vector; without a teacher there is no distillation term to log."""
    named = dict(zip(train_step.METRICS, vector.tolist()))
    names = ["train/loss", "train/loss_cls", "optim/grad_norm"]
    if config.distill.kind != "none":
        names.insert(2, "train/loss_distill")
    line = {name: named[name] for name in names}
    line["optim/lr"] = rate
    line["data/bad_images"] = float(state.bad_images.numpy())
    if config.precision == "mixed_float16":
        line["optim/loss_scale"] = float(state.loss_scale.numpy())
    return line


def guard(config, vector: np.ndarray, step: int) -> None:
    """Warn of a skipped update; raise Diverged after max_skipped in a row."""
    named = dict(zip(train_step.METRICS, vector.tolist()))
    if named["finite"]:
        return
    first = (step - 1) * config.global_batch
    why = "every image was unreadable" if named["data/weight"] == 0 else "non-finite gradients"
    if named["data/weight"] and math.isfinite(named["train/loss_cls"]) and not math.isfinite(named["train/loss"]):
        why = "the teacher's answers are not finite"
    logging.warning("update %d skipped: %s (positions %d to %d)", step, why, first, first + config.global_batch - 1)
    if named["skipped_in_row"] >= config.max_skipped:
        raise Diverged(
            f"update {step}: {config.max_skipped} updates in a row were skipped (max_skipped), the last: {why}"
        )


def missing(config, vector: np.ndarray) -> bool:
    """Tell whether an update met images that could not be read."""
    return vector[train_step.METRICS.index("data/weight")] < config.global_batch


def headline(metrics: dict[str, float]) -> str:
    """Return the numbers of an evaluation that people look for first."""
    return "  ".join(
        f"{name} {value:.4f}" for name, value in metrics.items() if "/recall/" not in name and "/images" not in name
    )


def versions(teacher) -> dict[str, str]:
    """Return what a checkpoint's manifest says about the software that wrote it and the teacher that taught it."""
    return {
        "deit": deit.__version__,
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
        "stream": str(stream.VERSION),
        "teacher": teacher.identity if teacher is not None else "",
    }
