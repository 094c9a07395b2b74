"""A TensorFlow SavedModel as a teacher: a directory, an archive of one, or the URL of such an archive.

A SavedModel is a program: loading one runs what its author wrote. Pin what you trust with teacher.sha256.
"""

import hashlib
import os
from concurrent import futures
from pathlib import Path

import tensorflow as tf
from absl import logging

from deit import cost, errors
from deit import workdir as run_directory
from deit.teachers import base, download, precision, signatures


def build(config, *, classes: tuple[str, ...], workdir: Path) -> base.Teacher:
    """Return the SavedModel at teacher.path, fed as teacher.range, mean and std say, which gives logits.

    Its input is teacher.image_size px; where that is 0, what its signature fixes, else data.image_size. It computes in
    the dtypes that it was saved with unless teacher.precision names a lower one.
    Errors: UserError where the path holds no SavedModel, or the model does not take images and give [B, C].
    """
    _check(config.teacher, may_be_absent=False)
    path = config.teacher.path
    file = download.fetch(path) if _is_url(path) else Path(path)
    pinned = identity(config, workdir=workdir)  # before anything is unpacked
    return _load(config, _inside(file if file.is_dir() else download.unpack(file, pinned), path), pinned)


def check(config) -> None:
    """Raise UserError for a local teacher.path that is absent, a directory that teacher.sha256 can't pin, lost names.

    An archive that is pinned may be absent where a cache of its answers may do.
    """
    teacher = config.teacher
    _check(teacher, may_be_absent=bool(teacher.sha256) and teacher.cache in ("read", "readwrite"))
    base.class_names(teacher.class_names)


def describe(config, num_classes: int) -> base.Described:
    """Return path, size, input and cost of the model if it is there to be loaded; writes and downloads nothing."""
    path = config.teacher.path
    file = _file(path)
    with base.readable(f"teacher.path ({path})"):
        if file.is_dir():
            directory = file
        else:
            directory = download.unpacked(file, download.sha256(file)) if file.is_file() else None
        if directory is None or not directory.is_dir():
            lacking = "unpacked" if file.is_file() else "downloaded" if _is_url(path) else "there"
            return base.Described(f"{path}: not {lacking}, parameters not checked")
    teacher = _load(config, _inside(directory, path), "")
    line = base.described(f"{path}, {teacher.parameters:,} parameters", teacher.input)
    return base.Described(line, cost.of(teacher.logits, config.data.image_size).flops)


def identity(config, *, workdir: Path) -> str:
    """Return the archive's sha256, checked against teacher.sha256 and its first use, or that of a directory's files.

    An archive that is absent has the one that pins it; if nothing pins it, its URL is downloaded. Errors: UserError.
    """
    path, pin = config.teacher.path, config.teacher.sha256.lower()
    file = _file(path)
    with base.readable(f"teacher.path ({path})"):
        if file.is_dir():
            return _sha256_of_files(_inside(file, path))
        if pin and not file.exists():
            return pin
    if _is_url(path):
        file = download.fetch(path)
    return download.check_sha256(file, pin)


def preprocessing(config) -> dict[str, object]:
    """Return the declared input (size 0: what the model fixes, else the picture's) and what is cut off its logits."""
    return base.fields(_input(config, config.teacher.image_size)) | {"teacher.background": config.teacher.background}


def classes(config, *, workdir: Path) -> list[tuple[str, ...]]:
    """Return the class names of teacher.class_names, if any."""
    found = base.class_names(config.teacher.class_names)
    return [] if found is None else [found]


def absent(config) -> bool:
    """Return whether there is nothing to load: an archive that is pinned and not there."""
    file = _file(config.teacher.path)
    return bool(config.teacher.sha256) and not _is_url(config.teacher.path) and not file.exists()


def _input(config, size: int) -> base.Input:
    teacher = config.teacher
    return base.Input(size, tuple(teacher.range), tuple(teacher.mean), tuple(teacher.std))


def _load(config, directory: Path, pinned: str) -> base.Teacher:
    if not _lowered(config.teacher):
        return _teacher(config, directory, pinned)
    # A strategy's variables can't be frozen, and its scope is the thread's: the copies are made in another one.
    with futures.ThreadPoolExecutor(1) as outside:
        return outside.submit(_teacher, config, directory, pinned).result()


def _lowered(teacher) -> bool:
    return teacher.precision not in ("", "float32")


def _teacher(config, directory: Path, pinned: str) -> base.Teacher:
    teacher, path = config.teacher, config.teacher.path
    entry = signatures.open_entry(directory, path)
    if entry.size and teacher.image_size and entry.size != teacher.image_size:
        raise errors.UserError(f"teacher.image_size ({teacher.image_size}) must be 0 or the {entry.size} px of {path}")
    size = entry.size or teacher.image_size or config.data.image_size
    graph, num_classes = _trace(entry.call, size, teacher)
    call = precision.lowered(graph, teacher.precision, path=path) if _lowered(teacher) else entry.call
    first = 1 if teacher.background else 0
    return base.Teacher(
        name=f"SavedModel {path}",
        forward=lambda images: call(images)[:, first:],
        input=_input(config, size),
        num_classes=num_classes,
        parameters=base.count(entry.variables or graph.variables),
        classes=base.named(teacher.class_names, path, num_classes),
        identity=pinned,
    )


def _trace(call, size: int, teacher):
    """Return (graph of one call on [B, size, size, 3], number of classes): seen without running it."""
    path, spec = teacher.path, tf.TensorSpec([None, size, size, 3], tf.float32)
    try:
        graph = tf.function(call, autograph=False).get_concrete_function(spec)
    except errors.UserError:
        raise
    except Exception as error:
        reason = signatures.line(error)
        raise errors.UserError(
            f"teacher.path ({path!r}) does not take images [B, {size}, {size}, 3]: {reason}"
        ) from error
    given = graph.structured_outputs
    shape = given.shape if isinstance(given, (tf.Tensor, tf.TensorSpec)) and given.dtype.is_floating else None
    if shape is None or shape.rank != 2 or shape[-1] is None:
        raise errors.UserError(f"teacher.path ({path!r}) must give logits [B, classes], it gives {shape or given}")
    num_classes = shape[-1] - (1 if teacher.background else 0)
    logging.info("teacher: SavedModel %s, %d px, %d classes", path, size, num_classes)
    return graph, num_classes


def _check(teacher, *, may_be_absent: bool) -> None:
    path = teacher.path
    if _is_url(path):
        return
    with base.readable(f"teacher.path ({path})"):
        if not (may_be_absent or Path(path).is_dir() or Path(path).is_file()):
            raise errors.UserError(
                f"teacher.path ({path!r}) must be an existing SavedModel directory, zip, tar or tar.gz of one, "
                "or the http(s) URL of such a file"
            )
        if teacher.sha256 and Path(path).is_dir():
            raise errors.UserError("teacher.sha256 must be empty where teacher.path is a directory: it pins an archive")


def _file(path: str) -> Path:
    """Return where a path's file or directory is, or would be once it is downloaded."""
    return download.location(path) if _is_url(path) else Path(path)


def _is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _inside(directory: Path, path: str) -> Path:
    with base.readable(f"teacher.path ({path})"):
        found = [file.parent for file in directory.rglob("saved_model.pb")]
    if len(found) != 1:
        raise errors.UserError(
            f"teacher.path ({path!r}) must hold one SavedModel: {len(found)} saved_model.pb files in it"
        )
    return found[0]


def _sha256_of_files(directory: Path) -> str:
    """Return the sha256 over relative name and sha256 of every file in a directory, sorted by name."""
    digest = hashlib.sha256()
    with base.readable(f"teacher.path ({directory})"):
        # Path.rglob enters no linked directory, where the variables may be.
        found = [Path(folder) / name for folder, _, names in os.walk(directory, followlinks=True) for name in names]
        files = {file.relative_to(directory).as_posix(): file for file in found}
        for name in sorted(files):
            digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
            digest.update(bytes.fromhex(run_directory.describe(files[name])["sha256"]))
    return digest.hexdigest()
