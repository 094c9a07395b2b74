"""A run of ours as a teacher: its newest checkpoint and the configuration beside it, nothing else."""

import os
from pathlib import Path

from absl import logging

from deit import checkpoint, errors, saved
from deit.models import factory
from deit.teachers import base


def build(path: str | Path, *, precision: str) -> base.Teacher:
    """Return the student of a run (its directory or one checkpoint) as a teacher, with its raw weights.

    It answers with its fused logits and computes in the `precision` of the run that it teaches.
    Errors: UserError where `path` is no run, has no checkpoint yet, or its tensors do not fit its model.
    """
    try:
        opened = saved.open_network(path, precision=precision)
    except errors.UserError as error:
        raise _named(path, error) from error
    network, config = opened.network, opened.config
    network.model.trainable = False
    logging.info("teacher: %s after update %d of %s", config.model.variant, opened.step, opened.run)
    if opened.step < config.resolved.total_updates:
        logging.warning(
            "teacher.path (%s) is not finished (update %d of %d): its answers change if it trains on",
            *(path, opened.step, config.resolved.total_updates),
        )
    return base.Teacher(
        name=f"{config.model.variant} of {path}",
        forward=lambda images: factory.fused(network.logits(images)),
        image_size=network.image_size,
        num_classes=network.num_classes,
        parameters=base.count(network.model.weights),
        classes=tuple(config.resolved.classes),
        identity=opened.state_sha256,
    )


def check(path: str) -> None:
    """Raise UserError where `path` is no run, has no checkpoint yet, or can't be trusted."""
    try:
        checkpoint.locate(path)
    except errors.UserError as error:
        raise _named(path, error) from error


def describe(path: str) -> str:
    """Return variant and size of a run's network, from the configuration beside its newest checkpoint."""
    if not os.path.exists(path):
        return f"{path}: absent"
    try:
        config = saved.config_of(path)
    except errors.UserError as error:
        raise _named(path, error) from error
    return f"{path}: {network_line(config, len(config.resolved.classes))}"


def network_line(config, num_classes: int) -> str:
    """Return variant and size of a configuration's network: it is built, its weights are not loaded."""
    network = factory.build(
        config.model,
        num_classes=num_classes,
        image_size=config.data.image_size,
        precision=config.precision,
        load_weights=False,
    )
    return f"{config.model.variant}, {base.count(network.model.weights):,} parameters"


def _named(path: str | Path, error: errors.UserError) -> errors.UserError:
    return errors.UserError(f"teacher.path ({path}): {error}")
