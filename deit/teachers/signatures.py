"""How a loaded SavedModel is called: one that TensorFlow 2 saved, TF-Hub's of it, and TF-Hub's first form.

Promises: whatever a model's author left open (a training mode, several outputs) is decided here or refused.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from deit import errors

SIGNATURE = "serving_default"
_HUB_SIGNATURES, _HUB_INPUT, _HUB_OUTPUTS = ("image_classification", "default"), "images", ("logits", "default")


@dataclasses.dataclass(frozen=True)
class Entry:
    """The way into a model.

    Attributes:
      call: images [B, size, size, 3] float32 -> the only output, a tensor. Errors: UserError for another number.
      size: px that the model fixes, 0 where it leaves them open.
      variables: all that it holds; empty where it does not say.
    """

    call: Callable[[tf.Tensor], tf.Tensor]
    size: int
    variables: tuple[Any, ...]


def open_entry(directory: Path, path: str) -> Entry:
    """Load the SavedModel in `directory` (`path` in messages) and find its entry. Errors: UserError."""
    first_form = (directory / "tfhub_module.pb").is_file()
    try:
        loaded = tf.saved_model.load(str(directory), tags=[] if first_form else None)  # [] is inference there
    except Exception as error:  # OSError, KeyError, protobuf's DecodeError: whatever damage leads to
        raise errors.UserError(f"teacher.path ({path}) can't be loaded: {line(error)}") from error
    call, size = _hub_signature(loaded, path) if first_form else _signature_or_call(loaded, path)
    return Entry(call, size, tuple(getattr(loaded, "variables", ())))


def line(error: Exception) -> str:
    """Return an error's first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _signature_or_call(loaded, path: str):
    """Return (call, size) of a model of TensorFlow 2: its serving_default, else the object itself."""
    signatures = getattr(loaded, "signatures", {})
    inputs = signatures[SIGNATURE].structured_input_signature[1] if SIGNATURE in signatures else {}
    if len(inputs) == 1:
        (name,) = inputs
        return _through(loaded, SIGNATURE, name, lambda output: _single(output, path))
    if not callable(loaded):  # no serving_default, or one with a training mode beside the images
        raise errors.UserError(
            f"teacher.path ({path!r}): the SavedModel must have a {SIGNATURE} of one input or be callable; "
            f"its signatures: {', '.join(sorted(signatures)) or 'none'}"
        )
    return lambda images: _single(_call(loaded, images), path), 0


def _hub_signature(loaded, path: str):
    """Return (call, size) of TF-Hub's first form: the logits of its image signatures, whatever else they give."""
    for signature in (name for name in _HUB_SIGNATURES if name in loaded.signatures):
        inputs = loaded.signatures[signature].structured_input_signature[1]
        outputs = loaded.signatures[signature].structured_outputs
        for output in _HUB_OUTPUTS:
            if set(inputs) == {_HUB_INPUT} and output in outputs:
                return _through(loaded, signature, _HUB_INPUT, lambda found, output=output: found[output])
    raise errors.UserError(
        f"teacher.path ({path!r}): a TF-Hub module must have a signature image_classification or default that makes "
        f"logits or default of images; its signatures: {', '.join(sorted(loaded.signatures)) or 'none'}"
    )


def _through(loaded, signature: str, name: str, chosen):
    """Return (images -> chosen(output of a signature), size that its input fixes)."""
    spec = loaded.signatures[signature].structured_input_signature[1][name]
    square = spec.shape.rank == 4 and spec.shape[1] == spec.shape[2]

    def call(images):
        images = (
            tf.saturate_cast(tf.round(images), spec.dtype) if spec.dtype.is_integer else tf.cast(images, spec.dtype)
        )
        # Through `loaded` each time: a signature refers to its variables weakly and would outlive them.
        return chosen(loaded.signatures[signature](**{name: images}))

    return call, (spec.shape[1] or 0) if square else 0


def _call(loaded, images: tf.Tensor):
    """Call a model that may or may not know of a training mode; it is never left to its own default."""
    try:
        return loaded(images, training=False)
    except (TypeError, ValueError):  # which of the two depends on what was saved
        return loaded(images)


def _single(output, path: str) -> tf.Tensor:
    """Return the logits from a tensor, or from a dict that holds nothing else."""
    values = tf.nest.flatten(output)
    if len(values) != 1:
        named = ", ".join(sorted(output)) if isinstance(output, dict) else str(len(values))
        raise errors.UserError(f"teacher.path ({path!r}) must give one output, it gives {named or 'none'}")
    return values[0]
