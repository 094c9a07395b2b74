"""Teachers: a SavedModel, a network of keras.applications, a run of ours, or several of them, behind one `Teacher`."""

from pathlib import Path

from deit.teachers import base, ensemble, run

Teacher = base.Teacher
Input = base.Input


def build(config, *, classes: tuple[str, ...], workdir: Path) -> Teacher | None:
    """Return the frozen teacher of a configuration, None where teacher.kind is none.

    Reads teacher.*, data.image_size and precision; `classes` are the data's. `train` is the run that
    main.py finished in `workdir`/teacher. Call it inside `strategy.scope()`.
    Errors: UserError for a path that is none, a network that can't be built, other classes than the data's.
    """
    if config.teacher.kind == "none":
        return None
    teacher = _KINDS[config.teacher.kind].build(config, classes=tuple(classes), workdir=Path(workdir))
    base.check_classes(teacher, classes)
    return teacher


def check(config) -> None:
    """Raise UserError for what a look at teacher.* and the files it names shows; touches no device and no data.

    A URL and a teacher that is yet to be trained are not looked at.
    """
    if config.teacher.kind != "none":
        base.precision(config)
        _KINDS[config.teacher.kind].check(config)


def describe(config, num_classes: int) -> base.Described:
    """Return a line on the teacher and its cost for the plan, without downloading, unpacking or writing anything.

    `num_classes` is the data's. Errors: UserError where what is there can't be built or loaded.
    """
    if config.teacher.kind == "none":
        return base.Described("none", 0.0)
    return _KINDS[config.teacher.kind].describe(config, num_classes)


def identity(config, *, workdir: Path) -> str:
    """Return `build(...).identity` without building or loading a network; "" where teacher.kind is none.

    It is what the files say: sha256 of an archive or a directory's files, state_sha256 of a run's newest checkpoint,
    name and weights of an application, all of these of an ensemble. An archive that is absent has the sha256 that pins
    it; one behind a URL that nothing pins is downloaded. Errors: UserError.
    """
    if config.teacher.kind == "none":
        return ""
    return _KINDS[config.teacher.kind].identity(config, workdir=Path(workdir))


def preprocessing(config) -> dict[str, object]:
    """Return what decides how the teacher sees a picture in [0, 255]: {dotted name: value}, ready for JSON.

    Together with `identity` and the picture it decides the logits, up to rounding. Nothing is built; of a run the
    configuration is read. Errors: UserError.
    """
    return {} if config.teacher.kind == "none" else _KINDS[config.teacher.kind].preprocessing(config)


def check_names(config, *, classes: tuple[str, ...], workdir: Path) -> None:
    """Raise UserError where the teacher's class names, as its files say, are not the data's; nothing is built."""
    if config.teacher.kind != "none":
        for names in _KINDS[config.teacher.kind].classes(config, workdir=Path(workdir)):
            base.check_names(f"the teacher ({config.teacher.kind})", names, tuple(classes))


def absent(config) -> bool:
    """Return whether the teacher can't be built because its archive, which is pinned, is not there."""
    return config.teacher.kind != "none" and _KINDS[config.teacher.kind].absent(config)


# Each has the functions above, and `classes` for check_names.
_KINDS = {**ensemble.KINDS, "train": run, "ensemble": ensemble}
