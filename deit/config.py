"""Check a configuration, convert its units once, freeze it, write it, compare it.

Promises: `validate` needs no device and no data, and names field, value and rule of the first thing that is wrong.
`resolve` is the only place where epochs become updates and a learning rate is scaled; everything after counts
in updates. `difference` lists exactly the fields that change a run's result.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from deit import errors


def validate(config: ConfigDict, prefix: str = "") -> None:
    """Raise UserError for the first value out of range or pair of values that do not fit.

    Types are held by the locked ConfigDict; `prefix` names a nested configuration (`teacher.train.`).
    """
    values = dict(flatten(config))
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise errors.UserError(f"{prefix}{name} ({value}) must be finite")
        if name in _RULES:
            legal, rule = _RULES[name]
            if not legal(value):
                raise errors.UserError(f"{prefix}{name} ({_show(value)}) must be {rule}{_nearest(value, rule)}")
    for relation in _RELATIONS:
        problem = relation(config)
        if problem:
            raise errors.UserError(prefix + problem)
    if config.teacher.kind == "train":
        validate(config.teacher.train, f"{prefix}teacher.train.")


def resolve(
    config: ConfigDict, *, train_size: int, eval_size: int, classes: Sequence[str], replicas: int
) -> FrozenConfigDict:
    """Return the frozen configuration with `resolved`: every duration in updates, lr scaled, batch split.

    Errors: UserError where global_batch is not replicas x micro_batch x a whole number of accum_steps.
    """
    step = replicas * config.micro_batch
    if config.global_batch % step:
        raise errors.UserError(
            f"global_batch ({config.global_batch}) must be divisible by replicas * micro_batch "
            f"({replicas} * {config.micro_batch})"
        )
    natural = max(1, round(config.epochs * train_size / config.global_batch))
    total = config.total_updates or natural
    shrink = total / natural  # total_updates shortens the warm-up in proportion: a 3-update run has all its phases
    warmup = config.optim.warmup_epochs * train_size / config.global_batch * shrink
    scale = config.global_batch / config.optim.lr_batch if config.optim.lr_batch else 1.0
    mutable = ConfigDict(plain(config), convert_dict=True)
    mutable.resolved = ConfigDict(
        dict(
            total_updates=total,
            warmup_updates=min(round(warmup), total - 1),
            peak_lr=config.optim.peak_lr * scale,
            replicas=replicas,
            accum_steps=config.global_batch // step,
            train_size=train_size,
            eval_size=eval_size,
            classes=tuple(classes),
        )
    )
    return FrozenConfigDict(mutable)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf, nested teachers left out (they are validated on their own)."""
    for name in sorted(config.keys()):
        value = config[name]
        if hasattr(value, "keys"):
            if prefix + name != "teacher.train":
                yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def plain(config: Any) -> dict:
    """Return nested plain dicts, without `resolved`."""
    result = {}
    for name in config:
        value = config[name]
        if name != "resolved":
            result[name] = plain(value) if hasattr(value, "keys") else value
    return result


def to_json(config: Any) -> str:
    """Return the configuration as JSON, `resolved` included: what `config.json` holds."""

    def walk(node):
        if hasattr(node, "keys"):
            return {name: walk(node[name]) for name in sorted(node.keys())}
        return list(node) if isinstance(node, tuple) else node

    return json.dumps(walk(config), indent=2) + "\n"


def from_json(text: str, template: ConfigDict) -> ConfigDict:
    """Return a locked configuration from `to_json`'s text, types taken from `template` (configs/base.py).

    `resolved` is kept where it is (FrozenConfigDict readers want it). Errors: UserError for text that is no
    JSON object, and for a field that the template lacks.
    """
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError("it holds no JSON object")
        config = _fill(ConfigDict(plain(template), convert_dict=True), data, template)
        if "resolved" in data:
            config.resolved = ConfigDict({**data["resolved"], "classes": tuple(data["resolved"]["classes"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise errors.UserError(f"config.json is damaged: {error}") from None
    return config.lock()


def read(path: Path, template: ConfigDict) -> ConfigDict:
    """Return `from_json` of a file. Errors: UserError with the path where it can't be read or is damaged."""
    try:
        return from_json(path.read_text(encoding="utf-8"), template)
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} can't be read: {error}") from None
    except errors.UserError as error:
        raise errors.UserError(f"{path}: {error}") from None


def _fill(config: ConfigDict, data: dict, template: ConfigDict, prefix: str = "") -> ConfigDict:
    for name, value in data.items():
        if prefix + name == "resolved":
            continue
        if name not in config:
            raise errors.UserError(unknown_field(prefix + name, [key for key, _ in flatten(template)]))
        if prefix + name == "teacher.train":
            nested = ConfigDict(plain(template), convert_dict=True)
            config[name] = _fill(nested, value, template) if value else ConfigDict()
        elif isinstance(value, dict):
            _fill(config[name], value, template, f"{prefix}{name}.")
        else:
            config[name] = tuple(value) if isinstance(value, list) else value
    return config


def unknown_field(name: str, known: Sequence[str]) -> str:
    """Return the line for a field that does not exist, with the nearest name that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown config field {name}" + (f"; did you mean {near[0]}?" if near else "")


def difference(old: Any, new: Any) -> list[str]:
    """Return `field: old -> new` for every field that changes the result (design: what may differ on resume)."""
    before, after = _leaves(old), _leaves(new)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if not name.removeprefix("teacher.train.").startswith(_FREE) and before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}")
    return lines


def _leaves(config: Any) -> dict[str, Any]:
    leaves = dict(flatten(config))
    if config.teacher.kind == "train":
        leaves.update({f"teacher.train.{k}": v for k, v in flatten(config.teacher.train)})
    return {name: tuple(v) if isinstance(v, list) else v for name, v in leaves.items()}


# What may differ when a run is continued: it changes where or how often, not what is computed.
_FREE = (
    "strategy",
    "devices",
    "micro_batch",
    "data.data_dir",
    "data.threads",
    "data.train_size",
    "data.eval_size",
    "data.num_classes",
    "teacher.batch",
    "teacher.min_accuracy",
    "checkpoint.",
    "eval.every_updates",
    "eval.batch",
    "log.",
    "resolved.replicas",
    "resolved.accum_steps",
)


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _nearest(value: Any, rule: str) -> str:
    if not isinstance(value, str) or not rule.startswith("one of "):
        return ""
    near = difflib.get_close_matches(value, rule.removeprefix("one of ").split(", "), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


_Rule = tuple[Callable[[Any], bool], str]


def _one_of(*names: str) -> _Rule:
    return (lambda value: value in names), "one of " + ", ".join(names)


def _at_least(bound: float) -> _Rule:
    return (lambda value: value >= bound), f"at least {bound}"


def _numbers(value: tuple, count: int) -> bool:
    return len(value) == count and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


_POSITIVE: _Rule = (lambda value: value > 0), "greater than 0"
_FRACTION: _Rule = (lambda value: 0 <= value <= 1), "between 0 and 1"
_BELOW_ONE: _Rule = (lambda value: 0 <= value < 1), "at least 0 and below 1"
_SEED: _Rule = (lambda value: 0 <= value < 2**31), "between 0 and 2147483647"
_THREE: _Rule = (lambda value: _numbers(value, 3)), "three numbers, one a channel"
_THREE_POSITIVE: _Rule = (lambda value: _numbers(value, 3) and min(value) > 0), "three numbers greater than 0"
_DATA: _Rule = (
    (lambda value: value == "digits" or (value.startswith(("tfds:", "folder:")) and len(value.split(":", 1)[1]) > 0)),
    "tfds:NAME, folder:PATH or digits",
)

_RULES: dict[str, _Rule] = {
    "seed": _SEED,
    "epochs": _POSITIVE,
    "total_updates": _at_least(0),
    "global_batch": _at_least(1),
    "micro_batch": _at_least(1),
    "precision": _one_of("float32", "tf32", "mixed_bfloat16", "mixed_float16"),
    "strategy": _one_of("auto", "one_device", "mirrored"),
    "devices": _at_least(0),
    "max_skipped": _at_least(1),
    "data.name": _DATA,
    "data.image_size": _at_least(8),
    "data.train_size": _at_least(1),
    "data.eval_size": _at_least(1),
    "data.num_classes": _at_least(2),
    "data.max_bad_fraction": _FRACTION,
    "data.threads": _at_least(0),
    "augment.crop": _one_of("resize_crop", "random_resized"),
    "augment.resize_margin": _at_least(0),
    "augment.scale": (
        (lambda v: _numbers(v, 2) and 0 < v[0] <= v[1] <= 1),
        "two fractions of the area, 0 < low <= high <= 1",
    ),
    "augment.ratio": ((lambda v: _numbers(v, 2) and 0 < v[0] <= v[1]), "two ratios, 0 < low <= high"),
    "augment.flip": _FRACTION,
    "model.seed": _SEED,
    "model.drop_path": _BELOW_ONE,
    "model.mean": _THREE,
    "model.std": _THREE_POSITIVE,
    "optim.peak_lr": _POSITIVE,
    "optim.lr_batch": _at_least(0),
    "optim.schedule": _one_of("cosine", "constant"),
    "optim.warmup_epochs": _at_least(0),
    "optim.warmup_lr": _at_least(0),
    "optim.final_lr": _at_least(0),
    "optim.weight_decay": _at_least(0),
    "optim.beta_1": _BELOW_ONE,
    "optim.beta_2": _BELOW_ONE,
    "optim.epsilon": _POSITIVE,
    "optim.clip_norm": _at_least(0),
    "optim.ema_decay": _BELOW_ONE,
    "loss.kind": _one_of("ce", "bce"),
    "loss.smoothing": _BELOW_ONE,
    "distill.kind": _one_of("none", "soft", "hard"),
    "distill.alpha": _FRACTION,
    "distill.tau": _POSITIVE,
    "distill.form": _one_of("kl", "ce"),
    "distill.reduction": _one_of("batch", "batch_classes"),
    "distill.weighting": _one_of("convex", "sum"),
    "teacher.kind": _one_of("none", "saved_model", "keras_application", "run", "train"),
    "teacher.image_size": _at_least(0),
    "teacher.batch": _at_least(1),
    "teacher.min_accuracy": _FRACTION,
    "checkpoint.every_updates": _at_least(0),
    "checkpoint.keep": _at_least(1),
    "eval.every_updates": _at_least(0),
    "eval.batch": _at_least(1),
    "eval.crop_ratio": _FRACTION,
    "log.every_updates": _at_least(1),
}


def _batch_divides(config) -> str | None:
    replicas = max(1, config.devices) if config.strategy == "mirrored" else 1  # 0 devices: known once they are counted
    if config.global_batch % (replicas * config.micro_batch):
        return (
            f"global_batch ({config.global_batch}) must be divisible by replicas * micro_batch "
            f"({replicas} * {config.micro_batch})"
        )
    return None


def _teacher_fits(config) -> str | None:
    kind, teacher = config.distill.kind, config.teacher.kind
    if kind != "none" and teacher == "none":
        return f"teacher.kind ('none') must name a teacher where distill.kind is {kind!r}"
    if teacher in ("saved_model", "run") and not config.teacher.path:
        return f"teacher.path ('') must be given where teacher.kind is {teacher!r}"
    if teacher == "train" and not len(config.teacher.train):
        return "teacher.train must hold a configuration where teacher.kind is 'train'"
    if teacher == "train" and config.teacher.train.teacher.kind == "train":
        return "teacher.train.teacher.kind ('train') must be another kind: one teacher is trained before a student"
    if teacher == "train" and config.teacher.train.strategy not in ("auto", config.strategy):
        return f"teacher.train.strategy ({config.teacher.train.strategy!r}) must be 'auto' or the student's"
    return None


def _sha_is_hex(config) -> str | None:
    sha = config.teacher.sha256
    if sha and (len(sha) != 64 or set(sha.lower()) - set("0123456789abcdef")):
        return f"teacher.sha256 ({sha!r}) must be 64 hexadecimal digits"
    return None


_RELATIONS = (_batch_divides, _teacher_fits, _sha_is_hex)
