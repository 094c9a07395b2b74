"""Several teachers as one: their probabilities are averaged. Each carries its own preprocessing."""

import itertools
import math
from pathlib import Path
from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

from deit import config as configuration
from deit import errors, members
from deit.teachers import base, keras_application, run, saved_model

KINDS = {"saved_model": saved_model, "keras_application": keras_application, "run": run}  # what a member may be


def build(config, *, classes: tuple[str, ...], workdir: Path) -> base.Teacher:
    """Return the mean of the members of teacher.members as one teacher: logits are log(mean of probabilities).

    Errors: UserError of a member, or where two of them disagree on number, names or order of classes.
    """
    built = _each(config, lambda kind, member: kind.build(member, classes=classes, workdir=workdir))
    first = next((teacher for teacher in built if teacher.classes is not None), built[0])
    for teacher in built:
        _check_same(first, teacher)
    return base.Teacher(
        name=f"ensemble of {'; '.join(teacher.describe() for teacher in built)}",
        forward=lambda images: mean([teacher.logits(images) for teacher in built]),
        input=base.Input(size=0),  # each member resizes and scales for itself
        num_classes=first.num_classes,
        parameters=sum(teacher.parameters for teacher in built),
        classes=first.classes,
        identity=_joined([teacher.identity for teacher in built]),
    )


def mean(logits: list[tf.Tensor]) -> tf.Tensor:
    """Return log(mean over members of softmax(logits)) [B, C] float32 of the members' [B, C].

    In logarithms throughout: a probability of e-200 has its share too.
    """
    logs = tf.stack([tf.nn.log_softmax(tf.cast(each, tf.float32)) for each in logits])  # [members, B, C]
    return tf.reduce_logsumexp(logs, 0) - math.log(len(logits))


def check(config) -> None:
    """Raise UserError for what a look at the files of any member shows."""
    _each(config, lambda kind, member: kind.check(member))


def describe(config, num_classes: int) -> base.Described:
    """Return one line on all members, and what they cost together."""
    found = _each(config, lambda kind, member: kind.describe(member, num_classes))
    line = f"ensemble of {'; '.join(member.line for member in found)}"
    return base.Described(line, sum(member.flops for member in found))


def identity(config, *, workdir: Path) -> str:
    """Return the members' identities in their order: float32 sums depend on it."""
    return _joined(_each(config, lambda kind, member: kind.identity(member, workdir=workdir)))


def preprocessing(config) -> dict[str, object]:
    """Return that of each member, in order."""
    return {"teacher.members": _each(config, lambda kind, member: kind.preprocessing(member))}


def classes(config, *, workdir: Path) -> list[tuple[str, ...]]:
    """Return the class names of the members that have some."""
    return list(itertools.chain(*_each(config, lambda kind, member: kind.classes(member, workdir=workdir))))


def absent(config) -> bool:
    """Return whether a member has nothing to load."""
    return any(_each(config, lambda kind, member: kind.absent(member)))


def _joined(identities: list[str]) -> str:
    return f"ensemble ({', '.join(identities)})"


def _each(config, call) -> list[Any]:
    """Return call(module of its kind, configuration with it as the teacher) of every member."""
    try:
        parsed = members.parse(config.teacher)
    except ValueError as error:
        raise errors.UserError(f"teacher.members: {error}") from error
    found = []
    for text, teacher in zip(config.teacher.members, parsed):
        member = ConfigDict(configuration.plain(config), convert_dict=True)
        member.teacher = teacher
        try:
            found.append(call(KINDS[teacher.kind], member))
        except errors.UserError as error:
            raise errors.UserError(f"teacher.members ({text!r}): {error}") from error
    return found


def _check_same(first: base.Teacher, other: base.Teacher) -> None:
    if first.num_classes != other.num_classes:
        raise errors.UserError(
            f"teacher.members: {first.name} has {first.num_classes} classes and {other.name} {other.num_classes}, "
            "they must have as many"
        )
    if other.classes is not None and other.classes != first.classes:
        i = next(i for i, pair in enumerate(zip(first.classes, other.classes)) if pair[0] != pair[1])
        raise errors.UserError(
            f"teacher.members: class {i} of {first.name} is {first.classes[i]!r} and that of {other.name} "
            f"{other.classes[i]!r}, they must be the same"
        )
