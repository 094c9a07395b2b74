"""The layers of a vision transformer. Shapes: B images, S px, N tokens, D channels, k prefix tokens.

No layer draws a random number: which residual branches are dropped is an input, drawn on the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from deit import keras
from deit.models.variants import INITIAL_STDDEV, NORM_EPSILON

_serializable = keras.utils.register_keras_serializable(package="deit")


def plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep AutoGraph off a `call` without control flow on tensors: a network builds several times faster."""
    wrapped = tf.autograph.experimental.do_not_convert(call)
    wrapped.__signature__ = inspect.signature(call)  # Keras looks at it to see whether `training` is taken
    return wrapped


def truncated_normal(stddev: float = INITIAL_STDDEV) -> Any:
    """Return an initializer of kernels, tokens, positions, truncated at 2 stddev; `paths.initialise` seeds it."""
    return keras.initializers.TruncatedNormal(stddev=stddev, seed=0)


def layer_norm(name: str, policy: Any, epsilon: float = NORM_EPSILON) -> Any:
    """Return a layer normalisation; legacy Keras takes its statistics in float32 in mixed precision too."""
    return keras.layers.LayerNormalization(epsilon=epsilon, name=name, dtype=policy)


def apply_branch(x: tf.Tensor, branch: tf.Tensor, kept: tf.Tensor | None, rate: float) -> tf.Tensor:
    """Return x + branch * kept / (1 - rate) [B, N, D]; `kept` [B] is 1 or 0 (stochastic depth, Huang 2016).

    A branch of rate 0 is always kept, so its flag is not looked at: one product less.
    """
    if kept is None or rate == 0.0:
        return x + branch
    scale = tf.cast(kept, branch.dtype) * tf.cast(1.0 / (1.0 - rate), branch.dtype)
    return x + branch * scale[:, None, None]


@_serializable
class Normalize(keras.layers.Layer):
    """(x / 255 - mean) / std of images [B, S, S, 3] in [0, 255], in float32; gives the policy's dtype."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # bfloat16 has too few bits for a mixed pixel in [0, 255]
        self.mean = [float(m) for m in mean]
        self.std = [float(s) for s in std]

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        scale = tf.constant([1.0 / (255.0 * s) for s in self.std], tf.float32)
        shift = tf.constant([m / s for m, s in zip(self.mean, self.std)], tf.float32)
        return tf.cast(tf.cast(x, tf.float32) * scale - shift, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mean": self.mean, "std": self.std}


@_serializable
class PatchEmbed(keras.layers.Layer):
    """Cut images [B, S, S, 3] into squares and project each: [B, (S // patch)^2, D], row by row.

    What is left of S at the right and at the bottom is not seen.
    """

    def __init__(self, dim: int, patch: int, *, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.patch = patch
        self.initializer = keras.initializers.get(initializer or truncated_normal())
        self.proj = keras.layers.Conv2D(
            dim,
            patch,
            strides=patch,
            kernel_initializer=self.initializer,
            name="proj",
            dtype=self.dtype_policy,
        )

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        tokens = (x.shape[1] // self.patch) * (x.shape[2] // self.patch)
        return tf.reshape(self.proj(x), [-1, tokens, self.dim])

    def get_config(self) -> dict[str, Any]:
        initializer = keras.initializers.serialize(self.initializer)
        return {**super().get_config(), "dim": self.dim, "patch": self.patch, "initializer": initializer}


@_serializable
class PrefixTokens(keras.layers.Layer):
    """Put class token, distillation token if `distilled`, and `registers` before [B, N, D]; add position embedding.

    `slots` (DeiT): prefix tokens have position embeddings too, [1, k + N, D]; without (DeiT-III) only patches have,
    [1, N, D].
    """

    def __init__(
        self, distilled: bool, *, registers: int = 0, slots: bool = True, initializer: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.distilled, self.registers, self.slots = distilled, registers, slots
        self.initializer = keras.initializers.get(initializer or truncated_normal())
        # Names that paths.initialise looks for.
        self.cls_token_initializer = self.initializer
        self.dist_token_initializer = self.initializer
        self.reg_token_initializer = self.initializer
        self.pos_embed_initializer = self.initializer

    def build(self, shape: Any) -> None:
        count, dim = int(shape[1]), int(shape[2])
        sizes = {"cls_token": 1, "dist_token": int(self.distilled), "reg_token": self.registers}
        self.tokens = [self.add_weight(n, [1, k, dim], initializer=self.initializer) for n, k in sizes.items() if k]
        positions = count + (sum(sizes.values()) if self.slots else 0)
        self.pos_embed = self.add_weight("pos_embed", [1, positions, dim], initializer=self.initializer)
        super().build(shape)

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        prefix = tf.concat([tf.cast(token, x.dtype) for token in self.tokens], axis=1)  # [1, k, D]
        prefix = tf.repeat(prefix, tf.shape(x)[0], axis=0)
        positions = tf.cast(self.pos_embed, x.dtype)
        if self.slots:
            return tf.concat([prefix, x], axis=1) + positions
        return tf.concat([prefix, x + positions], axis=1)

    def get_config(self) -> dict[str, Any]:
        fields = {"distilled": self.distilled, "registers": self.registers, "slots": self.slots}
        return {**super().get_config(), **fields, "initializer": keras.initializers.serialize(self.initializer)}


@_serializable
class LayerScale(keras.layers.Layer):
    """Multiply each channel of [B, N, D] by a trained number that starts at `initial` (arXiv:2103.17239)."""

    def __init__(self, initial: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.initial = float(initial)
        self.gamma_initializer = keras.initializers.Constant(self.initial)

    def build(self, shape: Any) -> None:
        self.gamma = self.add_weight("gamma", [int(shape[-1])], initializer=self.gamma_initializer)
        super().build(shape)

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * tf.cast(self.gamma, x.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "initial": self.initial}


@_serializable
class Attention(keras.layers.Layer):
    """Multi-head self-attention with one fused projection, columns in timm's order (q|k|v, head, channel).

    With `keep` > 0 only the first `keep` tokens ask, so [B, keep, D] comes back.
    """

    def __init__(self, dim: int, heads: int, *, keep: int = 0, stddev: float = INITIAL_STDDEV, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim, self.heads, self.keep, self.stddev = dim, heads, keep, stddev
        self.qkv = _dense(3 * dim, "qkv", self.dtype_policy, stddev)
        self.proj = _dense(dim, "proj", self.dtype_policy, stddev)

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        count, head_dim = x.shape[1], self.dim // self.heads
        qkv = tf.reshape(self.qkv(x), [-1, count, 3, self.heads, head_dim])
        q, k, v = tf.unstack(tf.transpose(qkv, [2, 0, 3, 1, 4]))  # each [B, heads, N, head_dim]
        if self.keep:
            q, count = q[:, :, : self.keep], self.keep
        scores = tf.matmul(q * tf.cast(head_dim**-0.5, q.dtype), k, transpose_b=True)  # [B, heads, N, N]
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), v.dtype)
        mixed = tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3])
        return self.proj(tf.reshape(mixed, [-1, count, self.dim]))

    def get_config(self) -> dict[str, Any]:
        fields = {"dim": self.dim, "heads": self.heads, "keep": self.keep, "stddev": self.stddev}
        return {**super().get_config(), **fields}


@_serializable
class Mlp(keras.layers.Layer):
    """Two dense layers, four times as wide between, with the exact (erf) GELU: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, *, stddev: float = INITIAL_STDDEV, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim, self.stddev = dim, stddev
        self.fc1 = _dense(4 * dim, "fc1", self.dtype_policy, stddev)
        self.fc2 = _dense(dim, "fc2", self.dtype_policy, stddev)

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.fc2(tf.nn.gelu(self.fc1(x), approximate=False))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dim": self.dim, "stddev": self.stddev}


@_serializable
class Block(keras.layers.Layer):
    """One pre-norm block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))); `drop` [B, 2] holds kept flags.

    `layer_scale` is the first value of ls1 and ls2; 0 = there are none (DeiT). With `keep` > 0 only the first `keep`
    tokens leave the block: the last block's patch tokens feed nothing, and leaving them out saves about a seventeenth
    of DeiT's work without changing a logit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rate: float = 0.0,
        keep: int = 0,
        stddev: float = INITIAL_STDDEV,
        layer_scale: float = 0.0,
        epsilon: float = NORM_EPSILON,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dim, self.heads, self.rate, self.keep = dim, heads, float(rate), keep
        self.stddev, self.layer_scale, self.epsilon = stddev, float(layer_scale), float(epsilon)
        policy = self.dtype_policy
        self.norm1 = layer_norm("norm1", policy, epsilon)
        self.attn = Attention(dim, heads, keep=keep, stddev=stddev, name="attn", dtype=policy)
        self.norm2 = layer_norm("norm2", policy, epsilon)
        self.mlp = Mlp(dim, stddev=stddev, name="mlp", dtype=policy)
        if layer_scale:
            self.ls1 = LayerScale(layer_scale, name="ls1", dtype=policy)
            self.ls2 = LayerScale(layer_scale, name="ls2", dtype=policy)

    @plain
    def call(self, x: tf.Tensor, drop: tf.Tensor | None = None) -> tf.Tensor:
        kept = (None, None) if drop is None else (drop[:, 0], drop[:, 1])
        branch = self.attn(self.norm1(x))
        x = x[:, : self.keep] if self.keep else x
        x = apply_branch(x, self.ls1(branch) if self.layer_scale else branch, kept[0], self.rate)
        branch = self.mlp(self.norm2(x))
        return apply_branch(x, self.ls2(branch) if self.layer_scale else branch, kept[1], self.rate)

    def get_config(self) -> dict[str, Any]:
        names = ("dim", "heads", "rate", "keep", "stddev", "layer_scale", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@_serializable
class SplitDrop(keras.layers.Layer):
    """Cut the kept flags [B, 2 * depth] into one [B, 2] for each block."""

    def __init__(self, depth: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.depth = depth

    @plain
    def call(self, x: tf.Tensor) -> list[tf.Tensor]:
        return tf.split(x, self.depth, axis=1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "depth": self.depth}


@_serializable
class TakeToken(keras.layers.Layer):
    """Pick one token: [B, N, D] -> [B, D]."""

    def __init__(self, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index = index

    @plain
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x[:, self.index]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "index": self.index}


def _dense(units: int, name: str, policy: Any, stddev: float) -> Any:
    return keras.layers.Dense(units, kernel_initializer=truncated_normal(stddev), name=name, dtype=policy)
