"""What a run shows and keeps, update by update: log lines, evaluations, pictures, checkpoints. The chief has one.

Promises: the last update is always logged, evaluated and saved, whatever the intervals; no checkpoint is ahead of its
log; a disk that fills up stops neither. Nothing here is a collective: the other workers wait in their next update.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from deit import config as configuration
from deit import contact_sheet, evaluate, job, memory, pictures, saver, summaries, train_step
from deit.data import stream
from deit.teachers import labeller
from deit.teachers import report as teacher_report


class Recorder:
    """Keeps the record of one run; a context manager that ends with everything written that could be.

    Attributes:
      metrics: of the evaluation of the last update; empty where there was none.
    """

    def __init__(
        self,
        run: job.Job,
        state: train_step.TrainState,
        *,
        step: int,
        resumed: bool,
        teacher: labeller.Labeller | None,
        taught: teacher_report.Report | None,
        versions: dict[str, str],
    ):
        """Begin, or continue after `step` finished updates. Errors: UserError where the workdir can't be written."""
        self._run, self._config, self._state = run, run.config, state
        self._teacher, self._taught = teacher, taught
        self._total = run.config.resolved.total_updates
        self.metrics: dict[str, float] = {}
        config = run.config
        if not resumed:
            job.write_config(config, run.workdir)
        self._writer = summaries.Summaries(run.workdir, start_step=step if resumed else -1)
        if not resumed:
            self._show_start()
        self._saver = saver.Saver(
            run.workdir,
            config_json=configuration.to_json(config),
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            max_failed=config.checkpoint.max_failed,
            versions=versions,
        )
        self._saved_at = time.monotonic()
        self._eval_batches = stream.evaluation(run.eval_source, config, batch=config.eval.batch)
        self._predict, self._evaluated = evaluate.predictor(state.network), False
        self._progress = summaries.Progress(
            start=step, total=self._total, batch=config.global_batch, log_every=config.log.every_updates
        )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._saver.finish()
            else:
                self._saver.wait()
        finally:
            self._writer.close()
            self._progress.close()

    def after(self, step: int, vector: np.ndarray, rate: float, *, leaving: bool) -> None:
        """Record that `step` updates are finished; `leaving`: the run stops here and is saved. Errors: UserError."""
        due, config = due_at(step, self._total), self._config
        line: dict[str, float] = {}
        if due(config.log.every_updates):
            line = train_metrics(config, vector, rate, self._state)
            line["perf/images_per_sec"] = self._progress.rate(step)
            line.update(self._teacher.news() if self._teacher is not None else {})
        self._progress.show(step, line)

        self.metrics = {}
        if due(config.eval.every_updates):
            self.metrics = self._evaluate(step)
            line.update(self.metrics)
        if line:
            self._writer.scalars(step, line)

        minutes = config.checkpoint.every_minutes
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        if due(config.checkpoint.every_updates) or late or leaving:
            self._save(step)

    def _save(self, step: int) -> None:
        reason = self._writer.flush()  # before the manifest: no checkpoint is ahead of its log
        if reason:
            self._saver.fail(step, reason)
        else:
            self._saver.settle()  # the save before: two snapshots at once would be two states in memory
            self._saver.save(step, train_step.snapshot(self._state), metrics=self.metrics)
        self._saved_at = time.monotonic()

    def _evaluate(self, step: int) -> dict[str, float]:
        self._progress.pause()
        logging.info("evaluating after update %d on %s", step, self._config.data.eval_split)
        classes = self._config.resolved.classes
        with memory.advised(self._config, "eval.batch", prefix=self._run.prefix):
            report = evaluate.student(
                self._state.network,
                self._eval_batches,
                classes,
                predict=self._predict,
                averages={path: variable.numpy() for path, variable in self._state.ema},
                teacher_labels=self._taught.labels if self._taught is not None else None,
                source=None if self._evaluated else self._run.eval_source,  # what can't be read is named once
            )
        self._evaluated = True
        logging.info("update %d/%d  %s", step, self._total, headline(report.metrics))
        self._writer.image(step, "eval/confusion", pictures.confusion_matrix(report.confusion, classes))
        self._progress.resume()
        return report.metrics

    def _show_start(self) -> None:
        self._writer.text(0, "config", f"```json\n{configuration.to_json(self._config)}\n```")
        if self._taught is not None:
            show_teacher(self._writer, self._taught, self._config.resolved.classes)
        self._writer.image(0, "train/views", contact_sheet.draw(self._run.train_source, self._config))


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


def headline(metrics: dict[str, float]) -> str:
    """Return the numbers of an evaluation that people look for first."""
    return "  ".join(
        f"{name} {value:.4f}" for name, value in metrics.items() if "/recall/" not in name and "/images" not in name
    )
