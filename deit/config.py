"""Convert a configuration's units once, freeze it, write it, compare it. Its rules are in `rules.py`.

Promises: `resolve` is the only place where epochs become updates and a learning rate is scaled; everything after counts
in updates. `difference` lists exactly the fields that change a run's result.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from deit import errors


def resolve(
    config: ConfigDict, *, train_size: int, eval_size: int, classes: Sequence[str], replicas: int
) -> FrozenConfigDict:
    """Return the frozen configuration with `resolved`: every duration in updates, lr scaled, batch split.

    Errors: UserError where the batch does not divide (`batch_problem`).
    """
    problem = batch_problem(config, replicas)
    if problem:
        raise errors.UserError(problem)
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
            accum_steps=config.global_batch // (replicas * config.micro_batch),
            train_size=train_size,
            eval_size=eval_size,
            classes=tuple(classes),
        )
    )
    return FrozenConfigDict(mutable)


def batch_problem(config: Any, replicas: int) -> str | None:
    """Return what is wrong with the batch on so many replicas: it must divide into micro-batches and mixing groups."""
    step = replicas * config.micro_batch
    if config.global_batch % step:
        return (
            f"global_batch ({config.global_batch}) must be divisible by replicas * micro_batch "
            f"({replicas} * {config.micro_batch})"
        )
    share, group = config.global_batch // replicas, config.augment.mix_group
    if mixes(config.augment) and share % group:
        return (
            f"augment.mix_group ({group}) must divide a replica's share of a batch, global_batch / replicas "
            f"({config.global_batch} / {replicas})"
        )
    return None


def mixes(augment: Any) -> bool:
    """Return whether examples are mixed (mixup, cutmix) under the `augment` part of a configuration."""
    return augment.mix_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0)


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
    "tpu",
    "startup_seconds",
    "micro_batch",
    "max_skipped",
    "model.fused_gradients",  # roundings, as micro_batch; in mixed precision also where they happen
    "data.data_dir",
    "data.threads",
    "data.max_bad_fraction",
    "data.max_ram_bytes",
    "data.train_size",
    "data.eval_size",
    "data.num_classes",
    "teacher.batch",
    "teacher.min_accuracy",
    "teacher.cache",  # and cache_dir
    "teacher.allow_ties",
    "checkpoint.",
    "eval.every_updates",
    "eval.batch",
    "log.",
    "resolved.replicas",
    "resolved.accum_steps",
)
