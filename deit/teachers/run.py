"""A run of ours as a teacher: its newest checkpoint and the configuration beside it, nothing else.

teacher.kind `run` is the one at teacher.path; `train` the one that main.py trained into <workdir>/teacher.
"""

import os
from pathlib import Path

from absl import logging

from deit import checkpoint, cost, errors, saved
from deit.models import factory, variants
from deit.teachers import base


def build(config, *, classes: tuple[str, ...], workdir: Path) -> base.Teacher:
    """Return the student of a run (its directory or one checkpoint) as a teacher, with its raw weights.

    It answers with its fused logits and computes in teacher.precision, else in that of the run that it teaches.
    Errors: UserError where the path is no run, has no checkpoint yet, or its tensors do not fit its model.
    """
    path = _path(config, workdir)
    where, pinned = _newest(path)
    try:
        opened = saved.open_network(where, precision=base.precision(config))
    except errors.UserError as error:
        raise _named(path, error) from error
    network, of_run = opened.network, opened.config
    network.model.trainable = False
    logging.info("teacher: %s after update %d of %s", of_run.model.variant, opened.step, opened.path)
    if opened.step < of_run.resolved.total_updates:
        logging.warning(
            "teacher.path (%s) is not finished (update %d of %d): its answers change if it trains on",
            *(path, opened.step, of_run.resolved.total_updates),
        )
    return base.Teacher(
        name=f"{of_run.model.variant} of {path}",
        forward=lambda images: factory.fused(network.logits(images)),
        input=_input(of_run),
        num_classes=network.num_classes,
        parameters=base.count(network.model.weights),
        classes=tuple(of_run.resolved.classes),
        identity=pinned,
    )


def check(config) -> None:
    """Raise UserError where teacher.path is no run, has no checkpoint yet, or can't be trusted."""
    if config.teacher.kind == "run":
        _newest(config.teacher.path)


def describe(config, num_classes: int) -> base.Described:
    """Return variant, size and cost of a run's network, from the configuration beside its newest checkpoint."""
    if config.teacher.kind == "train":
        return _described("train", config.teacher.train, num_classes)
    path = config.teacher.path
    if not os.path.exists(path):
        return base.Described(f"{path}: absent")
    of_run = _config_of(path)
    return _described(path, of_run, len(of_run.resolved.classes))


def identity(config, *, workdir: Path) -> str:
    """Return the state_sha256 of the run's newest checkpoint that verifies."""
    return _newest(_path(config, workdir))[1]


def preprocessing(config) -> dict[str, object]:
    """Return what the run's network does to a picture: state_sha256 is of tensors only and does not say."""
    of_run = config.teacher.train if config.teacher.kind == "train" else _config_of(config.teacher.path)
    model = of_run.model
    inside = {"variant": model.variant, "backbone": model.backbone, "cut": model.cut}
    inside |= {"mean": [float(v) for v in model.mean], "std": [float(v) for v in model.std]}
    if model.norm_epsilon != variants.NORM_EPSILON:
        inside["norm_epsilon"] = model.norm_epsilon
    return base.fields(_input(of_run)) | {f"teacher.model.{name}": value for name, value in inside.items()}


def classes(config, *, workdir: Path) -> list[tuple[str, ...]]:
    """Return the class names of the run."""
    return [tuple(_config_of(_path(config, workdir)).resolved.classes)]


def absent(config) -> bool:
    """Return False: a run that is not there is refused at the start."""
    return False


def _input(of_run) -> base.Input:
    return base.Input(of_run.data.image_size)  # the model scales for itself


def _path(config, workdir: Path) -> str | Path:
    return workdir / "teacher" if config.teacher.kind == "train" else config.teacher.path


def _newest(path: str | Path) -> tuple[Path, str]:
    """Return (checkpoint that a path means, its state_sha256). Errors: UserError naming teacher.path."""
    try:
        where = checkpoint.locate(path)
        return where, checkpoint.manifest(where)["state_sha256"]
    except errors.UserError as error:
        raise _named(path, error) from error


def _config_of(path: str | Path):
    try:
        return saved.config_of(path)
    except errors.UserError as error:
        raise _named(path, error) from error


def _described(where: str, config, num_classes: int) -> base.Described:
    """Return variant, size and cost of a configuration's network: it is built, its weights are not loaded."""
    network = factory.build(
        config.model,
        num_classes=num_classes,
        image_size=config.data.image_size,
        precision=config.precision,
        load_weights=False,
    )
    line = f"{where}: {config.model.variant}, {base.count(network.model.weights):,} parameters"
    flops = cost.of(network.logits, network.image_size).flops
    return base.Described(base.described(line, _input(config)), flops)


def _named(path: str | Path, error: errors.UserError) -> errors.UserError:
    return errors.UserError(f"teacher.path ({path}): {error}")
