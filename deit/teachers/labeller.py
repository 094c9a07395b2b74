"""The teacher of a run at work: measured before it teaches, asked for every batch, or not at all where a cache has it.

Promises: an answer that comes from the cache is the one that the teacher would give, bit by bit (under the conditions
that were recorded; under others only with teacher.allow_ties, and then the agreement is measured). What the cache
lacks, or has of pictures that were unreadable then and are not now, is computed. Each of several workers answers its
own share, with a teacher of its own. The teacher is built when it is first
needed: a run that finds everything in the cache never loads it. A disk that fills up ends the writing and not the
training.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf
from absl import logging

from deit import errors, feed, runtime, teachers, workers
from deit.data import digest, sources
from deit.teachers import base, cache, fingerprint, labels, report


class Labeller:
    """Gives the answers to batches of a stream.

    Attributes:
      identity: what pins the teacher's answers.
      cache: where they are kept, None where they are not.
      from_cache, computed: updates answered so far.
    """

    def __init__(
        self,
        config,
        strategy: tf.distribute.Strategy,
        build: Callable[[], base.Teacher],
        *,
        identity: str,
        kept: cache.Cache | None = None,
        report_key: dict | None = None,
        keeps_on: bool = True,
    ):
        """Take a teacher that is built by `build` when it is needed, and with `kept` a cache that is open.

        `identity` is what the teacher must have then. `keeps_on`: whether work goes on where an answer can't be kept;
        else that is a UserError.
        """
        self._config, self._strategy, self._build = config, strategy, build
        self.cache, self._report_key, self._keeps_on = kept, report_key, keeps_on
        self._reads = kept is not None and config.teacher.cache in ("read", "readwrite")
        self._writes = kept is not None and config.teacher.cache in ("write", "readwrite")
        self._teacher: base.Teacher | None = None
        self._answer: Callable | None = None
        self._news: dict[str, float] = {}
        self._compared = False
        self.identity = identity
        self.from_cache = self.computed = 0

    def teacher(self) -> base.Teacher:
        """Return the teacher, built at the first call. Errors: UserError where it is not what it was at the start."""
        if self._teacher is None:
            with workers.local_scope(self._strategy):
                built = self._build()
            if built.identity != self.identity:  # its answers would be kept, or told, as another one's
                raise errors.UserError(
                    f"the teacher ({built.name}) has changed since this run began ({self.identity[:80]} -> "
                    f"{built.identity[:80]}): start again when it is finished"
                )
            self._teacher = built
        return self._teacher

    def describe(self) -> str:
        """Return one line for the plan."""
        if self._teacher is not None:
            return self._teacher.describe()
        return f"{self._config.teacher.kind}, not loaded yet: its answers are looked for in {self.cache.directory}"

    def flops(self) -> float:
        """Return what an answer to one image costs, nan while the teacher is not loaded."""
        return self._teacher.flops(self._config.data.image_size) if self._teacher is not None else math.nan

    def measure(self, batches: Iterable, classes: tuple[str, ...]) -> report.Report:
        """Return the teacher's report on the evaluation batches, from the cache where it has it."""
        parts = self.cache.read_report(self._report_key) if self._reads else None
        if parts is not None:
            return report.rebuild(**parts, classes=classes)
        logging.info("measuring the teacher on %s", self._config.data.eval_split)
        found = report.measure(self.teacher(), batches, classes)
        whole = found.metrics["teacher/images"] == self._config.resolved.eval_size
        if self._writes and whole:  # an image that could not be read now may be read the next time
            self._keep(lambda: self.cache.write_report(self._report_key, found.arrays()))
        return found

    def __call__(self, batch: dict, update: int) -> labels.Answers:
        """Return the answers to the batch of an update (0 is the first), per replica as the batch is."""
        own, count = feed.share(self._config, self._strategy)
        first = update * self._config.global_batch + own
        readable = feed.local(self._strategy, batch["weight"]) > 0 if self.cache else None
        found = self.cache.read(first, count) if self._reads else None
        if found is not None and np.array_equal(found.readable, readable):
            self.from_cache += 1
            if not found.own and not self._compared:
                self._compare(batch, found.answers, update)
            return feed.spread(self._strategy, found.answers)
        answers = self._computed(batch)
        self.computed += 1
        if self._writes:
            self._write(first, self._host(answers), readable)
        return answers

    def news(self) -> dict[str, float]:
        """Return metrics that came up since the last call."""
        found, self._news = self._news, {}
        return found

    def summary(self) -> str:
        """Return where the answers so far came from, in words."""
        return f"{self.from_cache} updates answered from the cache, {self.computed} by the teacher"

    def _computed(self, batch: dict) -> labels.Answers:
        if self._answer is None:
            each = labels.function(self._config, self.teacher())
            self._answer = tf.function(lambda batch: self._strategy.run(each, args=(batch,)), autograph=False)
        return self._answer(batch)

    def _write(self, first: int, answers: dict[str, np.ndarray], readable: np.ndarray) -> None:
        finite = answers["class"] >= 0 if self._config.distill.kind == "hard" else np.isfinite(answers["logits"])
        if not finite.all():
            last = first + len(readable) - 1
            logging.warning("positions %d to %d: the teacher's logits are not finite; not kept", first, last)
        else:
            self._keep(lambda: self.cache.write(first, answers, readable))

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            where = f"teacher.cache_dir ({self.cache.directory}) can't be written: {error.strerror or error}"
            if not self._keeps_on:
                raise errors.UserError(where) from error
            logging.warning("%s; training goes on, its answers are no longer kept", where)
            self._writes = False

    def _compare(self, batch: dict, cached: dict[str, np.ndarray], update: int) -> None:
        """Measure, once, how far answers made under other conditions are those that are given here."""
        self._compared = True
        if teachers.absent(self._config):
            logging.warning("the teacher is absent: how many answers of other conditions agree is not measured")
            return
        form = labels.layout(self._config)
        told = [
            form.targets({name: tf.constant(value) for name, value in answers.items()}).numpy()
            for answers in (cached, self._host(self._computed(batch)))
        ]
        best = told if form.kind == "hard" else [each.argmax(-1) for each in told]
        agreement = float((best[0] == best[1]).mean())
        apart = "" if form.kind == "hard" else f", logits at most {np.abs(told[0] - told[1]).max():.3g} apart"
        logging.info("update %d: %.4f of the cache's answers, made otherwise, agree%s", update + 1, agreement, apart)
        if update == 0:  # a later one is that of a continued run, which logs what it would have without the stop
            self._news["teacher/cache_agreement"] = agreement

    def _host(self, answers: labels.Answers) -> dict[str, np.ndarray]:
        return {name: feed.local(self._strategy, value) for name, value in answers.items()}


def open_labeller(
    config,
    strategy: tf.distribute.Strategy,
    *,
    workdir: Path,
    train_source: sources.Source,
    eval_source: sources.Source,
    keeps_on: bool = True,
) -> Labeller | None:
    """Return the labeller of a resolved configuration, its cache open; None where there is no teacher.

    Without a cache the teacher is built at once. Errors: UserError, as `teachers.build` and `cache.Cache.open` have it.
    """
    if config.teacher.kind == "none":
        return None
    classes, mode = config.resolved.classes, config.teacher.cache
    if mode in ("write", "readwrite") and workers.place(strategy).count > 1:
        raise errors.UserError(
            f"teacher.cache ({mode!r}) must be 'read' or 'off' with several workers: each has a part of a chunk; "
            "tools/cache_teacher.py fills the cache ahead, in as many shards as there are machines"
        )

    def build():
        return teachers.build(config, classes=classes, workdir=workdir)

    if mode == "off":
        if config.teacher.cache_dir:
            logging.warning("teacher.cache_dir (%s) is not used: teacher.cache is 'off'", config.teacher.cache_dir)
        with workers.local_scope(strategy):
            teacher = build()
        found = Labeller(config, strategy, lambda: teacher, identity=teacher.identity)
        found.teacher()  # at once: it is used, and the plan describes it
        return found
    cache.manifest(config.teacher.cache_dir, writes=mode != "read")  # before the data is read for its digest
    teachers.check_names(config, classes=classes, workdir=workdir)
    identity = teachers.identity(config, workdir=workdir)
    known = {"identity": identity, "preprocessing": teachers.preprocessing(config)}
    train_digest = digest.of_split(train_source, config.data, config.data.train_split)
    eval_digest = digest.of_split(eval_source, config.data, config.data.eval_split)
    kept = cache.Cache(
        config.teacher.cache_dir,
        fingerprint=fingerprint.of(config, data_digest=train_digest, **known),
        conditions=fingerprint.conditions(config, device=runtime.device_kind(strategy)),
        layout=labels.layout(config),
    )
    kept.open(reads=mode != "write", writes=mode != "read", allow_ties=config.teacher.allow_ties)
    _tell(config, kept)
    key = fingerprint.of_evaluation(config, data_digest=eval_digest, **known)
    return Labeller(config, strategy, build, identity=identity, kept=kept, report_key=key, keeps_on=keeps_on)


def _tell(config, kept: cache.Cache) -> None:
    """Log how much of the schedule the cache has. Errors: UserError where it is not all and there is no teacher."""
    total = config.resolved.total_updates
    own, there = kept.count(total)
    tied = f", {there - own} of other conditions" if config.teacher.allow_ties else ""
    logging.info("answers to %d of %d updates are in %s%s", there, total, kept.directory, tied)
    if teachers.absent(config) and there < total:
        raise errors.UserError(
            f"teacher.path ({config.teacher.path!r}) is not there, and {kept.directory} has the answers to "
            f"{there} of {total} updates: it must have them all, or the teacher be put there"
        )
