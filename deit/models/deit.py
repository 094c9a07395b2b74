"""DeiT (arXiv:2012.12877): a vision transformer with a class token and, distilled, a second token and head.

DeiT-III (arXiv:2204.07118) is the same with LayerScale and without position embeddings of prefix tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from deit import keras
from deit.models import fused_block, paths, variants, vit


@dataclasses.dataclass(frozen=True)
class Parts:
    """A transformer as layers that are not connected yet."""

    normalize: Any
    patch_embed: Any
    tokens: Any
    blocks: Sequence[Any]
    norm: Any
    heads: dict[str, Any]  # "cls" and perhaps "dist", in the order of their tokens


def build(
    shape: variants.Shape,
    name: str,
    *,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    drop_path: float,
    policy: Any,
    fused_gradients: bool,
) -> tuple[Any, Any]:
    """Return the inference model and the training model of one set of variables (see `connect`)."""
    initializer = functools.partial(vit.truncated_normal, shape.stddev)
    last = shape.depth - 1
    parts = Parts(
        normalize=vit.Normalize(mean, std, name="normalize", dtype=policy),
        patch_embed=vit.PatchEmbed(shape.dim, shape.patch, initializer=initializer(), name="patch_embed", dtype=policy),
        tokens=vit.PrefixTokens(
            shape.distilled,
            registers=shape.registers,
            slots=shape.prefix_slots,
            initializer=initializer(),
            name="tokens",
            dtype=policy,
        ),
        blocks=[
            (fused_block.Block if fused_gradients else vit.Block)(
                shape.dim,
                shape.num_heads,
                rate=rate,
                keep=len(shape.outputs) if i == last else 0,
                stddev=shape.stddev,
                layer_scale=shape.layer_scale,
                epsilon=shape.norm_epsilon,
                name=f"blocks.{i}",
                dtype=policy,
            )
            for i, rate in enumerate(shape.rates(drop_path))
        ],
        norm=vit.layer_norm("norm", "float32", shape.norm_epsilon),  # of a few tokens: float32 costs nothing there
        heads=heads(num_classes, shape.outputs, initializer=initializer),
    )
    return connect(parts, name, image_size=image_size)


def heads(num_classes: int, outputs: Sequence[str], *, initializer: Any) -> dict[str, Any]:
    """Return the linear heads by output name, float32 in every precision, each with its `initializer()`."""
    return {
        output: keras.layers.Dense(
            num_classes, kernel_initializer=initializer(), name=paths.HEADS[output], dtype="float32"
        )
        for output in outputs
    }


def connect(parts: Parts, name: str, *, image_size: int) -> tuple[Any, Any]:
    """Connect the layers into two functional models over the same variables.

    The first takes image [B, S, S, 3] float32 in [0, 255], the second a dict of it and drop [B, 2 * depth]
    (1 = branch kept, 0 = dropped). Both return {"cls": [B, C]} or {"cls", "dist"}: float32 logits.
    """
    image = keras.Input([image_size, image_size, 3], name="image", dtype="float32")
    drop = keras.Input([2 * len(parts.blocks)], name="drop", dtype="float32")
    x = parts.tokens(parts.patch_embed(parts.normalize(image)))  # [B, N, D]
    take = {output: vit.TakeToken(i, name=f"take_{output}", dtype="float32") for i, output in enumerate(parts.heads)}

    def finish(x: Any) -> dict[str, Any]:
        x = parts.norm(x)
        return {key: head(take[key](x)) for key, head in parts.heads.items()}

    plain, dropped = x, x
    split = vit.SplitDrop(len(parts.blocks), name="split_drop", dtype="float32")(drop)
    for block, kept in zip(parts.blocks, split):
        plain = block(plain)
        dropped = block(dropped, drop=kept)
    return (
        keras.Model(image, finish(plain), name=name),
        keras.Model({"image": image, "drop": drop}, finish(dropped), name=f"{name}_training"),
    )
