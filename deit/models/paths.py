"""Own paths of variables, such as `blocks/3/attn/qkv/kernel`, and initial values as a function of them.

Keras' names of variables and its seeded draws depend on what was built earlier in the process; these do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from deit import errors

TOKENS = ("pos_embed", "cls_token", "dist_token", "reg_token")
POSITIONS = "tokens/pos_embed"
HEADS = {"cls": "head", "dist": "head_dist"}  # output of a network -> layer of its own path
# Weights whose initializer Keras keeps under another name than `<weight>_initializer`.
_INITIALIZERS = {"depthwise_kernel": "depthwise_initializer", "pointwise_kernel": "pointwise_initializer"}


def variables(model: Any) -> list[tuple[str, tf.Variable]]:
    """Return (own path, variable) of all variables of `model`, trainable or not, sorted by path.

    A path joins the names that the layers were given; a dot in a layer's name starts a new part.
    """
    found = [(path, variable) for path, _, _, variable in _walk(model)]
    names = [path for path, _ in found]
    if len(set(names)) != len(names) or len(names) != len(model.weights):
        raise ValueError(f"{model.name}: {len(model.weights)} variables, {len(set(names))} different paths")
    return sorted(found, key=lambda item: item[0])


def initialise(model: Any, seed: int, *, loaded: Collection[str] = ()) -> None:
    """Give every variable its initial value, a pure function of (seed, path, shape, its layer's initializer).

    Paths that start with one of `loaded` came out of a weights file and are left alone.
    """
    for path, layer, name, variable in _walk(model):
        if not any(path.startswith(f"{prefix}/") for prefix in loaded):
            initial = _initial(layer, name, variable, derived_seed(seed, path))
            variable.assign(initial)


def derived_seed(seed: int, path: str) -> int:
    """Return a 31-bit seed for one variable."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def no_decay(path: str, variable: tf.Variable) -> bool:
    """Say whether DeiT spares this variable weight decay: 1-D tensors, biases, tokens, position embedding."""
    return len(variable.shape) <= 1 or path.rsplit("/", 1)[-1] in ("bias", *TOKENS)


def layer(path: str, last: int) -> int:
    """Return the depth of a transformer's variable: 0 before the blocks, i + 1 in block i, `last` after them."""
    first, _, rest = path.partition("/")
    if first == "blocks":
        return int(rest.partition("/")[0]) + 1
    return 0 if first in ("patch_embed", "tokens") else last


def is_head(path: str) -> bool:
    """Say whether a variable is of a classifier."""
    return path.partition("/")[0] in HEADS.values()


def trains(path: str, only: str) -> bool:
    """Say whether `optim.train_only` leaves a variable to be trained.

    `attention`: attention layers, heads and position embedding, as facebookresearch/deit's --attn-only
    (arXiv:2203.09795); `heads`: the heads (linear probing); "": all.
    """
    if only == "attention":
        return is_head(path) or "/attn/" in path or path == POSITIONS
    return is_head(path) if only == "heads" else True


def assign(named: Sequence[tuple[str, tf.Variable]], tensors: Mapping[str, np.ndarray]) -> None:
    """Assign tensors by name, all or none. UserError lists names missing, left over, of other form."""
    problem = misfit(named, tensors)
    if problem:
        raise errors.UserError(f"the checkpoint does not fit this model: {problem}")
    for name, variable in named:
        variable.assign(tensors[name])


def misfit(named: Sequence[tuple[str, tf.Variable]], tensors: Mapping[str, np.ndarray | tf.TensorSpec]) -> str:
    """Return which tensors are missing, left over, or of another form, the first five; empty where all fit."""
    wanted = dict(named)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"left over {name}" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        have = (tensors[name].dtype.name, tuple(tensors[name].shape))
        want = (wanted[name].dtype.name, tuple(wanted[name].shape))
        if have != want:
            problems.append(f"{name} is {have}, not {want}")
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _walk(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, tf.Variable]]:
    children = list(layer._flatten_layers(recursive=False, include_self=False))
    below = {id(variable) for child in children for variable in child.weights}
    for variable in layer.weights:
        if id(variable) not in below:
            name = variable.name.rsplit("/", 1)[-1].split(":")[0]
            yield f"{prefix}{name}", layer, name, variable
    for child in children:
        yield from _walk(child, f"{prefix}{child.name.replace('.', '/')}/")


def _initial(layer: Any, name: str, variable: tf.Variable, seed: int) -> tf.Tensor | np.ndarray:
    initializer = getattr(layer, _INITIALIZERS.get(name, f"{name}_initializer"), None)
    if initializer is None:
        value = variable.numpy()
        if np.ptp(value) != 0:
            raise TypeError(f"layer {layer.name}: no initializer is declared for its weight {name!r}")
        return value  # a constant depends on no draw
    config = initializer.get_config()
    if "seed" in config:  # a seeded initializer of legacy Keras draws statelessly: the same seed, the same numbers
        initializer = type(initializer).from_config({**config, "seed": seed})
    return initializer(variable.shape, dtype=tf.float32)
