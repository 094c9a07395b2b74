"""Teachers: a SavedModel, a network of keras.applications, or a run of ours, behind one `Teacher`."""

from pathlib import Path

from deit.teachers import base, keras_application, run, saved_model

Teacher = base.Teacher


def build(config, *, classes: tuple[str, ...], workdir: Path) -> Teacher | None:
    """Return the frozen teacher of a configuration, None where teacher.kind is none.

    Reads teacher.*, data.image_size and precision; `classes` are the data's. `train` is the run that
    main.py finished in `workdir`/teacher. Call it inside `strategy.scope()`.
    Errors: UserError for a path that is none, a network that can't be built, other classes than the data's.
    """
    teacher = _KINDS[config.teacher.kind](config, classes, Path(workdir))
    if teacher is not None:
        base.check_classes(teacher, classes)
    return teacher


def check(config) -> None:
    """Raise UserError for what a look at teacher.* and the files it names shows; touches no device and no data.

    A URL and a teacher that is yet to be trained are not looked at.
    """
    _CHECKS[config.teacher.kind](config)


def describe(config, num_classes: int) -> str:
    """Return one line on the teacher for the plan, without downloading, unpacking or writing anything.

    `num_classes` is the data's. Errors: UserError where what is there can't be built or loaded.
    """
    return _DESCRIPTIONS[config.teacher.kind](config, num_classes)


_KINDS = {
    "none": lambda config, classes, workdir: None,
    "saved_model": lambda config, classes, workdir: saved_model.build(config),
    "keras_application": lambda config, classes, workdir: keras_application.build(config, classes=classes),
    "run": lambda config, classes, workdir: run.build(config.teacher.path, precision=config.precision),
    "train": lambda config, classes, workdir: run.build(workdir / "teacher", precision=config.precision),
}

_CHECKS = {
    "none": lambda config: None,
    "saved_model": lambda config: saved_model.check(config.teacher),
    "keras_application": lambda config: keras_application.check(config.teacher),
    "run": lambda config: run.check(config.teacher.path),
    "train": lambda config: None,
}

_DESCRIPTIONS = {
    "none": lambda config, num_classes: "none",
    "saved_model": lambda config, num_classes: saved_model.describe(config),
    "keras_application": keras_application.describe,
    "run": lambda config, num_classes: run.describe(config.teacher.path),
    "train": lambda config, num_classes: f"train: {run.network_line(config.teacher.train, num_classes)}",
}
