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


_KINDS = {
    "none": lambda config, classes, workdir: None,
    "saved_model": lambda config, classes, workdir: saved_model.build(config),
    "keras_application": lambda config, classes, workdir: keras_application.build(config, classes=classes),
    "run": lambda config, classes, workdir: run.build(config.teacher.path, precision=config.precision),
    "train": lambda config, classes, workdir: run.build(workdir / "teacher", precision=config.precision),
}
