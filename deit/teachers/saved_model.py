"""A TensorFlow SavedModel as a teacher: a directory, a zip of one, or the URL of such a zip.

A SavedModel is a program: loading one runs what its author wrote. Pin what you trust with teacher.sha256.
"""

import hashlib
from pathlib import Path

import tensorflow as tf
from absl import logging

from deit import errors
from deit import workdir as run_directory
from deit.teachers import base, download

SIGNATURE = "serving_default"


def build(config) -> base.Teacher:
    """Return the SavedModel at teacher.path, which takes raw [0, 255] images and gives logits.

    Its input is teacher.image_size px; where that is 0, what its signature fixes, else data.image_size.
    Errors: UserError where the path holds no SavedModel, or the model does not take images and give [B, C].
    """
    check(config.teacher)
    directory, identity = locate(config.teacher.path, config.teacher.sha256)
    return _load(config, directory, identity)


def check(teacher) -> None:
    """Raise UserError for a local teacher.path that is absent, or a directory that teacher.sha256 can't pin."""
    path = teacher.path
    if _is_url(path):
        return
    with base.readable(f"teacher.path ({path})"):
        if not (Path(path).is_dir() or Path(path).is_file()):
            raise errors.UserError(
                f"teacher.path ({path!r}) must be an existing SavedModel directory or zip of one, "
                "or the http(s) URL of a zip"
            )
        if teacher.sha256 and Path(path).is_dir():
            raise errors.UserError("teacher.sha256 must be empty where teacher.path is a directory: it pins a zip")


def describe(config) -> str:
    """Return path and size of the model where it is there to be loaded; downloads, unpacks and writes nothing."""
    path = config.teacher.path
    file = download.location(path) if _is_url(path) else Path(path)
    with base.readable(f"teacher.path ({path})"):
        if file.is_dir():
            directory = file
        else:
            directory = download.unpacked(file, download.sha256(file)) if file.is_file() else None
        if directory is None or not directory.is_dir():
            lacking = "unpacked" if file.is_file() else "downloaded" if _is_url(path) else "there"
            return f"{path}: not {lacking}, parameters not checked"
    return f"{path}, {_load(config, _inside(directory, path), '').parameters:,} parameters"


def _load(config, directory: Path, identity: str) -> base.Teacher:
    path = config.teacher.path
    try:
        loaded = tf.saved_model.load(str(directory))
    except Exception as error:  # OSError, KeyError, protobuf's DecodeError: whatever damage leads to
        raise errors.UserError(f"teacher.path ({path}) can't be loaded: {_line(error)}") from error
    size, call = _callable(loaded, path, config.teacher.image_size)
    size = size or config.data.image_size
    graph = _trace(call, size, path)
    return base.Teacher(
        name=f"SavedModel {path}",
        forward=lambda images: _single(call(images), path),
        image_size=size,
        num_classes=graph.structured_outputs.shape[-1],
        parameters=base.count(getattr(loaded, "variables", None) or graph.variables),
        classes=None,
        identity=identity,
    )


def locate(path: str, sha256: str) -> tuple[Path, str]:
    """Return (directory of saved_model.pb, sha256 that pins it), after download, check and unpacking.

    The sha256 is the zip's, or that of the directory's files. Errors: UserError.
    """
    file = download.fetch(path) if _is_url(path) else Path(path)
    with base.readable(f"teacher.path ({path})"):
        if file.is_dir():
            directory = _inside(file, path)
            return directory, _sha256_of_files(directory)
    found = download.check_sha256(file, sha256)
    return _inside(download.unpack(file, found), path), found


def _sha256_of_files(directory: Path) -> str:
    """Return the sha256 over relative name and sha256 of every file in a directory, sorted by name."""
    digest = hashlib.sha256()
    files = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    for name in sorted(files):
        digest.update(len(name.encode()).to_bytes(8, "little") + name.encode())
        digest.update(bytes.fromhex(run_directory.describe(files[name])["sha256"]))
    return digest.hexdigest()


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


def _callable(loaded, path: str, wanted: int):
    """Return (size that the model fixes or that is wanted, 0 for neither; images -> its raw output)."""
    signature = getattr(loaded, "signatures", {}).get(SIGNATURE)
    inputs = signature.structured_input_signature[1] if signature is not None else {}
    if len(inputs) != 1:  # none, or one with a training mode beside the images
        if not callable(loaded):
            raise errors.UserError(
                f"teacher.path ({path!r}): the SavedModel must have a {SIGNATURE} of one input or be callable"
            )
        return wanted, lambda images: _call(loaded, images)
    ((name, spec),) = inputs.items()
    fixed = spec.shape[1] if spec.shape.rank == 4 and spec.shape[1] == spec.shape[2] else None
    if fixed and wanted and fixed != wanted:
        raise errors.UserError(f"teacher.image_size ({wanted}) must be 0 or the {fixed} px that {path} takes")
    # Through `loaded` each time: a signature refers to its variables weakly and would outlive them.
    return fixed or wanted, lambda images: loaded.signatures[SIGNATURE](**{name: tf.cast(images, spec.dtype)})


def _call(loaded, images: tf.Tensor):
    """Call a model that may or may not know of a training mode; it is never left to its own default."""
    try:
        return loaded(images, training=False)
    except (TypeError, ValueError):  # which of the two depends on what was saved
        return loaded(images)


def _trace(call, size: int, path: str):
    """Return the graph of one call on [B, size, size, 3]: it shows the number of classes without running."""
    spec = tf.TensorSpec([None, size, size, 3], tf.float32)
    try:
        graph = tf.function(lambda images: _single(call(images), path)).get_concrete_function(spec)
    except errors.UserError:
        raise
    except Exception as error:
        raise errors.UserError(
            f"teacher.path ({path!r}) does not take images [B, {size}, {size}, 3]: {_line(error)}"
        ) from error
    shape = graph.structured_outputs.shape
    if shape.rank != 2 or shape[-1] is None:
        raise errors.UserError(f"teacher.path ({path!r}) must give logits [B, classes], it gives {shape}")
    logging.info("teacher: SavedModel %s, %d px, %d classes", path, size, shape[-1])
    return graph


def _single(output, path: str) -> tf.Tensor:
    """Return the logits from a tensor, or from a dict that holds nothing else."""
    values = tf.nest.flatten(output)
    if len(values) != 1:
        names = sorted(output) if isinstance(output, dict) else len(values)
        raise errors.UserError(f"teacher.path ({path!r}) must give one output, it gives {names}")
    return values[0]


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
