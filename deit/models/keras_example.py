"""The architecture of the Keras example "Distilling Vision Transformers", kept for comparison.

It differs from DeiT-Ti in three things: each of the 3 heads is 192 wide instead of 64 (9.08 M parameters
instead of 5.53 M), tokens and position embedding start at zero, kernels start with Keras' default (Glorot).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from deit import keras
from deit.models import deit, variants, vit

SHAPE = variants.Shape(dim=192, depth=12, num_heads=3, patch=16, distilled=True, two_heads=True)
NAME = "keras_example"


@keras.utils.register_keras_serializable(package="deit")
class ExampleBlock(keras.layers.Layer):
    """One pre-norm block over Keras' attention, `key_dim` channels a head; `drop` as in `vit.Block`."""

    def __init__(self, dim: int, heads: int, key_dim: int, *, rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim, self.heads, self.key_dim, self.rate = dim, heads, key_dim, float(rate)
        policy = self.dtype_policy
        self.norm1 = vit.layer_norm("norm1", policy)
        self.attn = keras.layers.MultiHeadAttention(heads, key_dim, name="attn", dtype=policy)
        self.norm2 = vit.layer_norm("norm2", policy)
        self.fc1 = keras.layers.Dense(4 * dim, name="fc1", dtype=policy)
        self.fc2 = keras.layers.Dense(dim, name="fc2", dtype=policy)

    @vit.plain
    def call(self, x: tf.Tensor, drop: tf.Tensor | None = None) -> tf.Tensor:
        kept = (None, None) if drop is None else (drop[:, 0], drop[:, 1])
        y = self.norm1(x)
        x = vit.apply_branch(x, self.attn(y, y), kept[0], self.rate)
        y = self.fc2(tf.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return vit.apply_branch(x, y, kept[1], self.rate)

    def get_config(self) -> dict[str, Any]:
        fields = {"dim": self.dim, "heads": self.heads, "key_dim": self.key_dim, "rate": self.rate}
        return {**super().get_config(), **fields}


def build(
    *,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    drop_path: float,
    policy: Any,
) -> tuple[Any, Any]:
    """Return the inference and the training model (`deit.connect`); the example has mean 0 and std 1."""
    glorot = keras.initializers.GlorotUniform
    blocks = [
        ExampleBlock(SHAPE.dim, SHAPE.num_heads, key_dim=SHAPE.dim, rate=rate, name=f"blocks.{i}", dtype=policy)
        for i, rate in enumerate(SHAPE.rates(drop_path))
    ]
    parts = deit.Parts(
        normalize=vit.Normalize(mean, std, name="normalize", dtype=policy),
        patch_embed=vit.PatchEmbed(SHAPE.dim, SHAPE.patch, initializer=glorot(), name="patch_embed", dtype=policy),
        tokens=vit.PrefixTokens(True, initializer="zeros", name="tokens", dtype=policy),
        blocks=blocks,
        norm=vit.layer_norm("norm", policy),
        heads=deit.heads(num_classes, SHAPE.outputs, initializer=glorot),
    )
    return deit.connect(parts, NAME, image_size=image_size)
