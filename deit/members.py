"""The members of an ensemble of teachers, as teacher.members writes them.

Promises: needs no TensorFlow; a member is a teacher configuration like any other, of a kind that is a single network.
"""

import ast
import shlex
from typing import Any

from ml_collections import ConfigDict

from deit import config as configuration

_KINDS = ("saved_model", "keras_application", "run")
_FIELDS = ("sha256", "image_size", "range", "mean", "std", "class_names", "background", "weights")


def parse(teacher: Any) -> tuple[ConfigDict, ...]:
    """Return `teacher` once for each of teacher.members, as the single teacher that it is. Errors: ValueError.

    A member is KIND:PATH or keras_application:NAME, then FIELD=VALUE after spaces, split as a shell does; what it does
    not say is the ensemble's.
    """
    found = []
    for text in teacher.members:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} must be a text such as 'run:runs/a'")
        first, *fields = shlex.split(text) or [""]
        kind, _, where = first.partition(":")
        if kind not in _KINDS or not where:
            raise ValueError(f"{text!r} must be saved_model:PATH, run:PATH or keras_application:NAME")
        member = ConfigDict(configuration.plain(teacher), convert_dict=True)
        member.kind, member.members = kind, ()
        member["name" if kind == "keras_application" else "path"] = where
        for field in fields:
            name, _, value = field.partition("=")
            if name not in _FIELDS:
                raise ValueError(f"{name!r} in {text!r} must be one of {', '.join(_FIELDS)}")
            member[name] = _of_type(value, member[name], text)
        found.append(member)
    return tuple(found)


def _of_type(value: str, default: Any, text: str) -> Any:
    if isinstance(default, str):
        return value
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval lets through
        given = None
    if isinstance(default, tuple) and isinstance(given, tuple) and all(type(v) in (int, float) for v in given):
        return tuple(map(float, given))
    if type(given) is not type(default):
        raise ValueError(f"{value!r} in {text!r} must be of type {type(default).__name__}")
    return given
