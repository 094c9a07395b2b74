"""Out of memory, in one line that says which field to lower, and to what.

Promises: a full disk, which TensorFlow raises as the same error, is not taken for it; nothing is tried again, because a
run that went on with other micro-batches would not end with the same bits.
"""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from deit import errors

_DISK_FULL = "No space left on device"
_LONGEST = 120  # characters of TensorFlow's message that are shown
_SMALLER = "data.image_size, a smaller model.variant, --config.precision=mixed_bfloat16 or --config.xla=True"


@contextlib.contextmanager
def advised(config, field: str, *, prefix: str = "") -> Iterator[None]:
    """Turn running out of memory in the block into a UserError that names `field` and the value to try.

    `config` is resolved; `field` is what decides the memory of the block: micro_batch, teacher.batch or eval.batch.
    `prefix` names a nested configuration (`teacher.train.`).
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        if _DISK_FULL in str(error):
            raise errors.UserError(f"the disk is full: {_short(str(error), around=_DISK_FULL)}") from error
        raise errors.UserError(_advice(config, field, prefix, _short(str(error)))) from error
    except MemoryError as error:
        raise errors.UserError(_advice(config, field, prefix, _short(str(error)))) from error


def _advice(config, field: str, prefix: str, text: str) -> str:
    share = config.global_batch // config.resolved.replicas
    if field == "micro_batch":
        what, now = "a micro-batch", config.micro_batch
        lower = max((size for size in range(1, now) if share % size == 0), default=0)
        effect = f" (accum_steps {share // now} -> {share // lower}, the same update)" if lower else ""
    else:
        what, now = {
            "teacher.batch": ("a teacher pass", min(config.teacher.batch, share)),
            "eval.batch": ("an evaluation pass", config.eval.batch),
        }[field]
        lower, effect = now // 2, ""
    advice = f"try --config.{prefix}{field}={lower}{effect}" if lower else f"try a smaller {_SMALLER}"
    return f"out of memory in {what} of {now}{f' ({text})' if text else ''}: {advice}"


def _short(text: str, around: str = "") -> str:
    """Return what matters of TensorFlow's message: the shape it could not allocate, or its first line."""
    if match := re.search(r"OOM when allocating tensor with shape\[[^\]]*\] and type \w+", text):
        return match[0].removeprefix("OOM when allocating ")
    lines = [re.sub(r"\{\{.*?\}\}", "", line).strip() for line in text.splitlines() if around in line]
    line = next(filter(None, lines), "")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
