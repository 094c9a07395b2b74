"""A transformer of ours as layers that Keras itself has: what a file needs that opens where this package is not.

Promises: `tf_keras.models.load_model` opens the model without custom objects; logits are the network's, but for
roundings. It is made for inference and fine-tuning elsewhere: residual branches are never dropped. What was folded:
- Patches are cut by reshapes; class, distillation and register tokens start as rows of zeros before them. Projection,
  tokens and position embedding are then one dense layer with a bias for every row: x W + b, b = token + position, or
  the projection's bias + position.
- LayerScale is multiplied into the layer before it: g (x W + b) = x (W diag(g)) + g b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deit import keras
from deit.models import paths, variants

_EXAMPLE_ATTENTION = ("query", "key", "value", "attention_output")  # own names of `keras_example`'s attention


def build(
    tensors: Mapping[str, np.ndarray],
    shape: variants.Shape,
    *,
    name: str,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """Return a functional model of images float32 [B, S, S, 3] in [0, 255] with the student's `tensors` by own path.

    It gives {"cls": [B, C]} or {"cls", "dist"}: float32 logits.
    """
    side, patch, prefix = image_size // shape.patch, shape.patch, shape.prefix
    layers = keras.layers
    image = keras.Input([image_size, image_size, 3], name="image", dtype="float32")
    scale, offset = [1.0 / (255.0 * s) for s in std], [-m / s for m, s in zip(mean, std)]
    x = layers.Rescaling(scale, offset, name="normalize")(image)
    left = image_size - side * patch
    if left:
        x = layers.Cropping2D(((0, left), (0, left)), name="crop")(x)
    x = layers.Reshape([side, patch, side, patch * 3], name="rows")(x)
    x = layers.Permute([1, 3, 2, 4], name="squares")(x)
    x = layers.Reshape([side * side, patch * patch * 3], name="patches")(x)
    x = layers.ZeroPadding1D((prefix, 0), name="prefix")(x)
    tokens = prefix + side * side
    embed = layers.EinsumDense("bnp,pd->bnd", [tokens, shape.dim], bias_axes="nd", name="embed")
    x = embed(x)
    embed.set_weights(_embedding(tensors, shape))
    for i in range(shape.depth):
        keep = len(shape.outputs) if i == shape.depth - 1 else 0
        x = _block(x, tensors, shape, i, keep=keep, tokens=tokens)
    norm = layers.LayerNormalization(epsilon=shape.norm_epsilon, name="norm")
    x = norm(x)
    norm.set_weights([tensors["norm/gamma"], tensors["norm/beta"]])
    outputs = {}
    for i, output in enumerate(shape.outputs):
        token = layers.Cropping1D((i, len(shape.outputs) - 1 - i), name=f"take_{output}")(x)
        path = paths.HEADS[output]
        head = layers.Dense(tensors[f"{path}/bias"].shape[0], name=path)
        outputs[output] = head(layers.Reshape([shape.dim], name=f"flat_{output}")(token))
        head.set_weights([tensors[f"{path}/kernel"], tensors[f"{path}/bias"]])
    return keras.Model(image, outputs, name=name)


def _embedding(tensors: Mapping[str, np.ndarray], shape: variants.Shape) -> list[np.ndarray]:
    """Return the kernel [P P 3, D] and the bias of every row [k + N, D]."""
    kernel, positions = tensors["patch_embed/proj/kernel"], tensors[paths.POSITIONS][0]
    present = [name for name in ("cls_token", "dist_token", "reg_token") if f"tokens/{name}" in tensors]
    prefix = np.concatenate([tensors[f"tokens/{name}"][0] for name in present])
    of_prefix, of_patches = positions[: shape.slots], positions[shape.slots :]
    rows = np.concatenate([prefix + (of_prefix if shape.slots else 0.0), tensors["patch_embed/proj/bias"] + of_patches])
    return [kernel.reshape(-1, shape.dim), rows]


def _block(x: Any, tensors: Mapping[str, np.ndarray], shape: variants.Shape, i: int, *, keep: int, tokens: int) -> Any:
    """Add block `i`: x [B, tokens, D] to [B, keep or tokens, D]."""
    layers, own, name = keras.layers, f"blocks/{i}", f"block_{i}"
    attention_weights, key_dim = _attention(tensors, shape, own)
    norm1 = layers.LayerNormalization(epsilon=shape.norm_epsilon, name=f"{name}_norm1")
    attention = layers.MultiHeadAttention(shape.num_heads, key_dim, name=f"{name}_attention")
    y = norm1(x)
    asking = y
    if keep:
        asking = layers.Cropping1D((0, tokens - keep), name=f"{name}_asking")(y)
        x = layers.Cropping1D((0, tokens - keep), name=f"{name}_kept")(x)
    x = layers.Add(name=f"{name}_add1")([x, attention(asking, y)])
    norm2 = layers.LayerNormalization(epsilon=shape.norm_epsilon, name=f"{name}_norm2")
    fc1 = layers.Dense(4 * shape.dim, activation="gelu", name=f"{name}_fc1")
    fc2 = layers.Dense(shape.dim, name=f"{name}_fc2")
    x = layers.Add(name=f"{name}_add2")([x, fc2(fc1(norm2(x)))])
    for layer, path in ((norm1, "norm1"), (norm2, "norm2")):
        layer.set_weights([tensors[f"{own}/{path}/{part}"] for part in ("gamma", "beta")])
    attention.set_weights(attention_weights)
    mlp = own if f"{own}/fc1/kernel" in tensors else f"{own}/mlp"
    gamma = tensors.get(f"{own}/ls2/gamma", np.float32(1.0))
    fc1.set_weights([tensors[f"{mlp}/fc1/{part}"] for part in ("kernel", "bias")])
    fc2.set_weights([tensors[f"{mlp}/fc2/{part}"] * gamma for part in ("kernel", "bias")])
    return x


def _attention(tensors: Mapping[str, np.ndarray], shape: variants.Shape, own: str) -> tuple[list[np.ndarray], int]:
    """Return the weights of Keras' attention (kernel and bias of query, key, value, output), and a head's channels."""
    if f"{own}/attn/query/kernel" in tensors:
        found = [tensors[f"{own}/attn/{name}/{part}"] for name in _EXAMPLE_ATTENTION for part in ("kernel", "bias")]
        return found, found[0].shape[-1]
    dim, heads = shape.dim, shape.num_heads
    width = dim // heads
    kernels = np.split(tensors[f"{own}/attn/qkv/kernel"].reshape(dim, 3, heads, width), 3, axis=1)
    biases = np.split(tensors[f"{own}/attn/qkv/bias"].reshape(3, heads, width), 3)
    weights = [part[:, 0] if part.ndim == 4 else part[0] for pair in zip(kernels, biases) for part in pair]
    gamma = tensors.get(f"{own}/ls1/gamma", np.float32(1.0))
    kernel, bias = (tensors[f"{own}/attn/proj/{part}"] * gamma for part in ("kernel", "bias"))
    return [*weights, kernel.reshape(heads, width, dim), bias], width
