"""A run of ours as a teacher: its newest checkpoint and the configuration beside it, nothing else."""

from pathlib import Path

from absl import logging

from deit import errors, saved
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
        raise errors.UserError(f"teacher.path ({path}): {error}") from error
    network, config = opened.network, opened.config
    network.model.trainable = False
    logging.info("teacher: %s after update %d of %s", config.model.variant, opened.step, opened.run)
    return base.Teacher(
        name=f"{config.model.variant} of {path}",
        forward=lambda images: factory.fused(network.logits(images)),
        image_size=network.image_size,
        num_classes=network.num_classes,
        parameters=base.count(network.model.weights),
        classes=tuple(config.resolved.classes),
    )
