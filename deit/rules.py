"""What a configuration may say: the rule of every field, RandAugment's notation. How fields go together: `relations`.

Promises: `validate` needs no device, no data and no TensorFlow, and names field, value and rule of the first thing
that is wrong.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from deit import config as configuration
from deit import errors, members, relations

MAX_LEVEL = 10.0  # timm's scale of RandAugment magnitudes


@dataclasses.dataclass(frozen=True)
class Policy:
    """RandAugment in timm's notation, on its scale of 0 to 10.

    Attributes:
      magnitude, std: a level is drawn from N(magnitude, std) and clipped to 0 .. 10.
      num_ops: operations drawn an image.
    """

    magnitude: float
    std: float
    num_ops: int


def randaugment_policy(text: str) -> Policy:
    """Return the policy of `rand-m9-mstd0.5-inc1` or `rand-m9-n2-mstd0.5-inc1`. Errors: ValueError.

    `inc1` must be there: without it timm means another set of operations, whose strength does not grow with m.
    """
    match = re.fullmatch(r"rand-m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?-inc1", text)
    if not match:
        raise ValueError(f"{text!r} is not rand-mM[-nN][-mstdS]-inc1")
    policy = Policy(float(match[1]), float(match[3] or 0), int(match[2] or 2))
    if max(policy.magnitude, policy.std) > MAX_LEVEL or not 1 <= policy.num_ops <= 15:
        raise ValueError("m and mstd must be at most 10 and n between 1 and 15")
    return policy


def validate(config: ConfigDict, prefix: str = "") -> None:
    """Raise UserError for the first value out of range or pair of values that do not fit.

    Types are held by the locked ConfigDict; `prefix` names a nested configuration (`teacher.train.`).
    """
    values = dict(configuration.flatten(config))
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise errors.UserError(f"{prefix}{name} ({value}) must be finite")
        if name in _RULES:
            legal, rule = _RULES[name]
            if not legal(value):
                raise errors.UserError(f"{prefix}{name} ({_show(value)}) must be {rule}{_nearest(value, rule)}")
    problem = relations.problem(config) or _members_problem(config)
    if problem:
        raise errors.UserError(prefix + problem)
    if config.teacher.kind == "train":
        validate(config.teacher.train, f"{prefix}teacher.train.")


def _members_problem(config: Any) -> str | None:
    """Return what is wrong with the members of an ensemble, each a configuration of its own."""
    teacher = config.teacher
    if teacher.kind != "ensemble":
        given = f"teacher.members ({teacher.members}) must be empty unless teacher.kind is 'ensemble'"
        return given if teacher.members else None
    if len(teacher.members) < 2:
        return f"teacher.members ({teacher.members}) must name two teachers or more"
    try:
        for text, member in zip(teacher.members, members.parse(teacher), strict=True):
            try:
                validate(_of_teacher(config, member))
            except errors.UserError as error:
                raise ValueError(f"{text!r}: {error}") from error
    except ValueError as error:
        return f"teacher.members: {error}"
    return None


def _of_teacher(config: Any, teacher: ConfigDict) -> ConfigDict:
    """Return a copy of a configuration with another teacher."""
    copied = ConfigDict(configuration.plain(config), convert_dict=True)
    copied.teacher = teacher
    return copied


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


def _is_policy(text: str) -> bool:
    try:
        return not text or bool(randaugment_policy(text))
    except ValueError:
        return False


_POSITIVE: _Rule = (lambda value: value > 0), "greater than 0"
_FRACTION: _Rule = (lambda value: 0 <= value <= 1), "between 0 and 1"
_BELOW_ONE: _Rule = (lambda value: 0 <= value < 1), "at least 0 and below 1"
_SEED: _Rule = (lambda value: 0 <= value < 2**31), "between 0 and 2147483647"
_THREE: _Rule = (lambda value: _numbers(value, 3)), "three numbers, one a channel"
_THREE_POSITIVE: _Rule = (lambda value: _numbers(value, 3) and min(value) > 0), "three numbers greater than 0"


def _is_data(name: str) -> bool:
    kind, colon, rest = name.partition(":")
    if kind == "digits":
        return not colon or (rest.isascii() and rest.isdecimal() and len(set(rest)) == len(rest) > 1)
    return kind in ("tfds", "folder") and bool(rest)


DATA_NAMES = "tfds:NAME, folder:PATH, digits, or digits:01234 (two different digits or more)"

_RULES: dict[str, _Rule] = {
    "seed": _SEED,
    "epochs": _POSITIVE,
    "total_updates": _at_least(0),
    "global_batch": _at_least(1),
    "micro_batch": _at_least(1),
    "precision": _one_of("float32", "tf32", "mixed_bfloat16", "mixed_float16"),
    "strategy": _one_of("auto", "one_device", "mirrored", "multi_worker", "tpu"),
    "devices": _at_least(0),
    "tpu": (lambda value: len(value) > 0, "the name or grpc:// address of a TPU, or local"),
    "startup_seconds": _POSITIVE,
    "init_weights": _one_of("raw", "ema"),
    "max_skipped": _at_least(1),
    "data.name": (_is_data, DATA_NAMES),
    "data.image_size": _at_least(8),
    "data.train_size": _at_least(1),
    "data.eval_size": _at_least(1),
    "data.num_classes": _at_least(2),
    "data.split_seed": _SEED,
    "data.max_ram_bytes": _POSITIVE,
    "data.max_pixels": _POSITIVE,
    "data.max_bad_fraction": _FRACTION,
    "data.threads": _at_least(0),
    "augment.crop": _one_of("resize_crop", "random_resized", "simple"),
    "augment.resize_margin": _at_least(0),
    "augment.scale": (
        (lambda v: _numbers(v, 2) and 0 < v[0] <= v[1] <= 1),
        "two fractions of the area, 0 < low <= high <= 1",
    ),
    "augment.ratio": ((lambda v: _numbers(v, 2) and 0 < v[0] <= v[1]), "two ratios, 0 < low <= high"),
    "augment.flip": _FRACTION,
    "augment.randaugment": (
        _is_policy,
        "rand-mM[-nN][-mstdS]-inc1 (in this order; M and S at most 10, N 1 to 15) or empty",
    ),
    "augment.jitter": _FRACTION,
    "augment.erasing": _FRACTION,
    "augment.mixup": _at_least(0),
    "augment.cutmix": _at_least(0),
    "augment.mix_prob": _FRACTION,
    "augment.mix_switch": _FRACTION,
    "augment.mix_group": (lambda value: value >= 2 and value % 2 == 0, "even and at least 2: mixed in pairs"),
    "augment.repeats": _at_least(1),
    "model.seed": _SEED,
    "model.patch": _at_least(0),
    "model.registers": _at_least(0),
    "model.heads": _one_of("all", "cls"),
    "model.norm_epsilon": _POSITIVE,
    "model.drop_path": _BELOW_ONE,
    "model.mean": _THREE,
    "model.std": _THREE_POSITIVE,
    "optim.name": _one_of("adamw", "lamb"),
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
    "optim.layer_decay": ((lambda value: 0 < value <= 1), "greater than 0 and at most 1"),
    "optim.train_only": (lambda value: value in ("", "attention", "heads"), "attention, heads, or empty (everything)"),
    "optim.ema_decay": _BELOW_ONE,
    "loss.kind": _one_of("ce", "bce"),
    "loss.smoothing": _BELOW_ONE,
    "distill.kind": _one_of("none", "soft", "hard"),
    "distill.alpha": _FRACTION,
    "distill.tau": _POSITIVE,
    "distill.form": _one_of("kl", "ce"),
    "distill.reduction": _one_of("batch", "batch_classes"),
    "distill.weighting": _one_of("convex", "sum"),
    "teacher.kind": _one_of("none", "saved_model", "keras_application", "run", "train", "ensemble"),
    "teacher.image_size": _at_least(0),
    "teacher.range": ((lambda v: _numbers(v, 2) and v[0] < v[1]), "two numbers, low < high"),
    "teacher.mean": _THREE,
    "teacher.std": _THREE_POSITIVE,
    "teacher.batch": _at_least(1),
    "teacher.precision": (
        (lambda value: value in ("", "float32", "mixed_bfloat16", "mixed_float16")),
        "one of float32, mixed_bfloat16, mixed_float16, or empty (the student's)",
    ),
    "teacher.min_accuracy": _FRACTION,
    "teacher.top_k": _at_least(0),
    "teacher.logits_dtype": _one_of("float32", "float16"),
    "teacher.cache": _one_of("off", "read", "write", "readwrite"),
    "checkpoint.every_updates": _at_least(0),
    "checkpoint.every_minutes": _at_least(0),
    "checkpoint.keep": _at_least(1),
    "checkpoint.keep_every": _at_least(0),
    "checkpoint.max_failed": _at_least(0),
    "eval.every_updates": _at_least(0),
    "eval.batch": _at_least(1),
    "eval.crop_ratio": (lambda value: value == 0 or 0.25 <= value <= 1, "0 (plain resize) or between 0.25 and 1"),
    "log.every_updates": _at_least(1),
}
