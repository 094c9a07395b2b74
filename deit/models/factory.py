"""Variant names to networks. To the rest of the house a network is a `Network`, whatever it is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from deit import errors, keras
from deit.models import cnn, deit, keras_example, paths, variants


@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier that takes images [B, S, S, 3] float32 in [0, 255] and carries its own preprocessing.

    Attributes:
      model: functional Keras model of image, gives {"cls": [B, C]} or {"cls", "dist"}: float32 logits.
      train_model: the same variables, inputs {"image", "drop"}; `model` itself where `drop_rates` is empty.
      drop_rates: probability that a residual branch is dropped, two for each block (attention, MLP).
      image_size: px, S.
      num_classes: C.
    """

    model: Any
    train_model: Any
    drop_rates: tuple[float, ...]
    image_size: int
    num_classes: int

    def logits(self, images: tf.Tensor, drop: tf.Tensor | None = None) -> dict[str, tf.Tensor]:
        """Return each head's logits; `drop` [B, len(drop_rates)] is 1 for kept branches, 0 for dropped."""
        if drop is None or not self.drop_rates:
            return self.model(images, training=False)
        return self.train_model({"image": images, "drop": drop}, training=False)


def fused(outputs: dict[str, tf.Tensor]) -> tf.Tensor:
    """Return the logits of the prediction [B, C]: the mean of both heads' or those of the only head."""
    if "dist" in outputs:
        return (outputs["cls"] + outputs["dist"]) * 0.5
    return outputs["cls"]


def names() -> tuple[str, ...]:
    """Return every legal value of `model.variant`."""
    return (*variants.names(), *_OTHERS)


def check(model_config: Any, image_size: int, *, load_weights: bool = True) -> None:
    """Raise UserError if `build` would refuse this; builds nothing. Rates, mean and std are `config.validate`'s."""
    name = _name(model_config)
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise errors.UserError(f"model.variant ({model_config.variant}) is unknown; nearest: {', '.join(near)}")
    shape = shape_of(model_config)
    if shape is not None:
        _check_patch(shape.patch, model_config, image_size)
    for field, default in _OF_DEIT.items() if name in _OTHERS else ():
        if model_config[field] != default:
            raise errors.UserError(f"model.{field} ({model_config[field]}) is for DeiT's variants, not {name}")
    if name == "backbone" and load_weights:
        cnn.check(model_config)


def build(
    model_config: Any, *, num_classes: int, image_size: int, precision: str, load_weights: bool = True
) -> Network:
    """Build the network of `config.model` and give it its initial weights.

    `load_weights=False` leaves variables at zero and a backbone's weights unread, for a caller that only counts or
    assigns all.

    `precision` is float32, tf32, mixed_bfloat16 or mixed_float16; variables and logits are float32 in each.

    Raises:
      UserError: unknown variant or backbone, a patch that is larger than the image, a missing weights file.
    """
    check(model_config, image_size, load_weights=load_weights)
    if precision not in _POLICIES:
        raise errors.UserError(f"precision ({precision}) must be one of {', '.join(_POLICIES)}")
    sizes = {"num_classes": num_classes, "image_size": image_size}
    policy = keras.mixed_precision.Policy(_POLICIES[precision])
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(tf.variable_creator_scope(_one_copy))
        if not load_weights:
            scopes.enter_context(tf.variable_creator_scope(_undrawn))
        return _build(model_config, sizes, policy, load_weights=load_weights)


def _one_copy(creator: Callable, **settings: Any) -> tf.Variable:
    """Create a variable that is the same on every replica.

    Statistics of BatchNorm, which are frozen here, would be read as the mean over replicas: a collective among workers
    that only some call, and with three replicas not the number that was assigned.
    """
    if settings.get("synchronization") == tf.VariableSynchronization.ON_READ:
        settings["synchronization"] = tf.VariableSynchronization.AUTO
    return creator(**settings)


def _undrawn(creator: Callable, **settings: Any) -> tf.Variable:
    """Create a variable that is zero: half a minute of drawing less in the largest network."""
    if callable(settings["initial_value"]) and settings.get("shape") is not None:
        settings["initial_value"] = functools.partial(tf.zeros, settings["shape"], settings["dtype"])
    return creator(**settings)


def _build(model_config: Any, sizes: dict[str, int], policy: Any, *, load_weights: bool) -> Network:
    name, image_size, num_classes = _name(model_config), sizes["image_size"], sizes["num_classes"]
    if name in ("backbone", "groupnorm_resnet"):
        model, loaded = _OTHERS[name](model_config, **sizes, policy=policy, load_weights=load_weights)
        if load_weights:
            paths.initialise(model, model_config.seed, loaded=loaded)
        return Network(model, model, (), image_size, num_classes)
    shared = {
        **sizes,
        "mean": model_config.mean,
        "std": model_config.std,
        "drop_path": model_config.drop_path,
        "policy": policy,
    }
    shape = shape_of(model_config)
    if name in _OTHERS:
        model, train_model = _OTHERS[name](**shared)
    else:
        model, train_model = deit.build(shape, name, **shared, fused_gradients=model_config.fused_gradients)
    if load_weights:
        paths.initialise(model, model_config.seed)
    drop_rates = tuple(rate for rate in shape.rates(model_config.drop_path) for _ in range(2))
    return Network(model, train_model, drop_rates, image_size, num_classes)


def _name(model_config: Any) -> str:
    """Return the name of the network: timm's tag of the weights is cut off where timm's names have one."""
    variant = model_config.variant
    return variants.untagged(variant) if variant.startswith("deit") else variant


def shape_of(model_config: Any) -> variants.Shape | None:
    """Return the sizes of a transformer, None for a CNN."""
    return keras_example.SHAPE if model_config.variant == keras_example.NAME else variants.of_model(model_config)


def _check_patch(patch: int, model_config: Any, image_size: int) -> None:
    if image_size < patch:
        owner = "model.patch" if model_config.patch else f"{model_config.variant}'s patch"
        raise errors.UserError(f"data.image_size ({image_size}) must be at least {owner} ({patch})")


# Fields that only DeiT's variants look at, as they are where they say nothing.
_OF_DEIT = {"patch": 0, "registers": 0, "heads": "all", "norm_epsilon": variants.NORM_EPSILON}

_POLICIES = {
    "float32": "float32",
    "tf32": "float32",  # the same dtypes; the runtime switches the tensor cores on
    "mixed_bfloat16": "mixed_bfloat16",
    "mixed_float16": "mixed_float16",
}

_OTHERS = {
    "keras_example": keras_example.build,
    "backbone": cnn.backbone,
    "groupnorm_resnet": cnn.groupnorm_resnet,
}
