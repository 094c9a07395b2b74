"""train(job): the one long function, in named acts that read top to bottom.

Promises: the same command in the same workdir continues the run and ends with the same bits as a run that was
never stopped; a finished run is printed, not repeated. All workers of a run start from the checkpoint that the chief
found, stop after the same update, and only the chief writes.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path

import tensorflow as tf
from absl import logging

from deit import checkpoint, feed, guard, job, memory, plan, recorder, signals, train_step, warm_start, workers
from deit.data import stream, unreadable
from deit.models import factory
from deit.teachers import labeller
from deit.teachers import report as teacher_report

_PATIENCE = 90.0  # seconds until a network disk has shown every worker what the chief sees
_STOP = train_step.METRICS.index("stop")


class Preempted(Exception):
    """The run was asked to stop and is saved: exit code 42."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last update and the metrics of its last evaluation (the chief's; others have none)."""

    step: int
    metrics: dict[str, float]


def train(run: job.Job, *, strategy: tf.distribute.Strategy, stop: signals.Stop | None = None) -> Result:
    """Train a job in its workdir, or continue there, and return the result. The chief's caller holds the lock.

    Every worker calls it. Errors: UserError for what a user can put right; guard.Diverged; Preempted where `stop` was
    requested in any worker; TensorFlow's where a worker is lost. On every error the newest checkpoint stays.
    """
    config, workdir = run.config, run.workdir
    place, stop = workers.place(strategy), stop or signals.Stop()
    job.check_workdir(config, workdir)  # again: another process may have written it before it was locked
    total = config.resolved.total_updates
    if place.count == 1 and stop.requested:  # in the last moments of a teacher's training
        raise Preempted(f"{workdir} was not begun or continued: the same command does it")
    workers.agree(strategy, job.fingerprint(run), "configuration or data")
    newest = resume_point(workdir, strategy)
    if newest is not None and checkpoint.step_of(newest) >= total:
        return finished(newest, workdir)

    # --- Teacher, student and the state of the run --------------------------------------------------------
    with workers.chief_first(strategy):  # it may download
        teacher = labeller.open_labeller(
            config, strategy, workdir=workdir, train_source=run.train_source, eval_source=run.eval_source
        )
        fresh = newest is None and not config.init_from
        build = functools.partial(
            factory.build,
            config.model,
            num_classes=len(config.resolved.classes),
            image_size=config.data.image_size,
            precision=config.precision,
            load_weights=fresh,  # else a checkpoint has them
        )
        if place.count > 1 and fresh and config.model.variant == "backbone":
            build()  # for its download: two at once would write one file
    with strategy.scope():
        network = build()
        started = warm_start.load(config, network) if newest is None else None
        state = train_step.create_state(config, network)
        versions = job.versions(teacher, start=started.identity if started is not None else "")
        if newest is not None:
            tensors, manifest = checkpoint.read(newest)
            job.check_versions(manifest["versions"], versions, workdir)
            versions["start"] = manifest["versions"].get("start", "")
            train_step.restore(state, tensors)
    workers.agree(strategy, versions["teacher"], "the teacher that they find")
    step = int(state.step.numpy())
    if place.chief:
        planned = plan.describe(
            config,
            network=network,
            teacher=teacher.describe() if teacher is not None else "none",
            teacher_flops=teacher.flops() if teacher is not None else math.nan,
            start=started.said if started is not None else "",
        )
        logging.info("plan of %s\n%s", workdir, planned)

    # --- Data, from this update on ------------------------------------------------------------------------
    batches = feed.batches(config, strategy, run.train_source, start_update=step, drop_rates=network.drop_rates)
    iterator = iter(batches)

    # --- The teacher is measured before it teaches --------------------------------------------------------
    taught = None
    if teacher is not None and place.chief:
        eval_batches = stream.evaluation(run.eval_source, config, batch=config.eval.batch)
        with memory.advised(config, "teacher.batch", prefix=run.prefix):
            taught = teacher.measure(eval_batches, config.resolved.classes)
        logging.info("teacher: %s", teacher_report.describe(taught))
        teacher_report.gate(taught, config.teacher.min_accuracy)

    # --- The loop; from here on the run exists: the chief writes its directory -----------------------------
    update = train_step.make(config, strategy, state)
    check = guard.Guard(config, run.train_source, strategy, state, workdir if place.chief else None)
    lost = unreadable.Unreadable(run.train_source, config)
    learning_rate = state.optimizer.learning_rate_at
    with contextlib.ExitStack() as at_exit:
        at_exit.enter_context(stop.training())
        record = None
        if place.chief:
            record = recorder.Recorder(
                run, state, step=step, resumed=newest is not None, teacher=teacher, taught=taught, versions=versions
            )
            at_exit.enter_context(record)
        if newest is not None:
            logging.info("continuing %s after update %d of %d", workdir, step, total)
        leaving = workers.total(strategy, int(stop.requested)) > 0  # asked before there was anything to save
        while step < total and not leaving:
            batch = next(iterator)
            rate = float(learning_rate(step))
            with memory.advised(config, "teacher.batch", prefix=run.prefix):
                answers = teacher(batch, step) if config.distill.kind != "none" else None
            with memory.advised(config, "micro_batch", prefix=run.prefix):
                # The one read of the device; a cache looks at the weights, too.
                vector = update(batch, answers, tf.constant(float(stop.requested))).numpy()
            step += 1
            with memory.advised(config, "micro_batch", prefix=run.prefix):  # it may look at the batch once more
                check(vector, step, batch, answers, rate)
            if guard.missing(config, vector):
                lost.note(*(feed.local(strategy, batch[name]) for name in ("position", "weight")))
                lost.check(state.bad_images.numpy(), step)
            leaving = vector[_STOP] > 0
            if record is not None:
                record.after(step, vector, rate, leaving=leaving)
    workers.barrier(strategy)  # the chief has saved: who leaves earlier takes the others with it
    if step < total:
        raise Preempted(f"{workdir} stopped after update {step} of {total}: the same command continues")
    if config.teacher.cache != "off":
        logging.info("teacher: %s", teacher.summary())
    return Result(step, record.metrics if record is not None else {})


def resume_point(workdir: Path, strategy: tf.distribute.Strategy) -> Path | None:
    """Return the checkpoint that all workers start from, the chief's newest valid one; None for a new run.

    Errors: UserError where none is valid, or a worker does not see the chief's: the workdir must be shared.
    """
    if workers.place(strategy).chief:
        newest = checkpoint.newest(workdir, set_aside=True)
        workers.from_chief(strategy, -1 if newest is None else checkpoint.step_of(newest))
        return newest
    step = workers.from_chief(strategy, 0)
    return None if step < 0 else checkpoint.wait_for(workdir, step, patience=_PATIENCE)


def finished(newest: Path, workdir: Path) -> Result:
    """Print a run that has reached its last update."""
    manifest = checkpoint.manifest(newest)
    logging.info("%s is finished: update %d  %s", workdir, manifest["step"], recorder.headline(manifest["metrics"]))
    return Result(manifest["step"], manifest["metrics"])
