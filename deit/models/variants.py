"""The sizes of every DeiT and DeiT-III by timm's names, as far as they need no TensorFlow.

A name is deit_SIZE[_distilled]_patchP_S or deit3_SIZE_patchP_S, and timm has it; the number S at its end is where its
published weights were trained, data.image_size decides: a small DeiT at 384 px is the one of 224 with another size.
timm's tag after a dot (`.fb_in1k`) says which weights, not which network: it is not looked at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# facebookresearch/deit and timm cut at 2, so their weights spread by .02; Keras cuts at twice the spread, which leaves
# .8796 of it.
INITIAL_STDDEV = 0.02 / 0.87962566
NORM_EPSILON = 1e-6  # of facebookresearch/deit and timm; transformers has 1e-12
LAYER_SCALE = 1e-4  # DeiT-III's first value (facebookresearch/deit); timm starts at 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one variant.

    Attributes:
      dim: channels of a token.
      depth: blocks.
      num_heads: attention heads (DeiT: dim / 64).
      patch: px, the side of a patch.
      distilled: whether there is a distillation token.
      stddev: of the normal distribution that initial weights are drawn from, truncated at twice that.
      layer_scale: first value of each branch's scale (LayerScale, arXiv:2103.17239); 0 = there is none.
      prefix_slots: whether prefix tokens have position embeddings (DeiT) or only patches (DeiT-III).
      constant_drop: whether every block drops at the same rate (DeiT-III), or from 0 up, linearly (DeiT).
      registers: register tokens after class and distillation token (arXiv:2309.16588).
      two_heads: whether the distillation token has a head of its own.
      norm_epsilon: added to the variance in every layer normalisation.
    """

    dim: int
    depth: int
    num_heads: int
    patch: int
    distilled: bool = False
    stddev: float = INITIAL_STDDEV
    layer_scale: float = 0.0
    prefix_slots: bool = True
    constant_drop: bool = False
    registers: int = 0
    two_heads: bool = False
    norm_epsilon: float = NORM_EPSILON

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.distilled + self.registers

    @property
    def slots(self) -> int:
        """Entries of the position embedding before those of the patches."""
        return self.prefix if self.prefix_slots else 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """The heads, in the order of their tokens."""
        return ("cls", "dist") if self.two_heads else ("cls",)

    def rates(self, drop_path: float) -> tuple[float, ...]:
        """Return the drop rate of each block."""
        if self.constant_drop:
            return (drop_path,) * self.depth
        return tuple(drop_path * i / max(self.depth - 1, 1) for i in range(self.depth))


def names() -> tuple[str, ...]:
    """Return the names of all DeiT variants."""
    return tuple(_SHAPES)


def at_size(name: str, image_size: int) -> str:
    """Return the name that differs from this one by its resolution alone; "" where there is none."""
    found = f"{untagged(name).rpartition('_')[0]}_{image_size}"
    return found if found in _SHAPES else ""


def untagged(name: str) -> str:
    """Return timm's name of a network without the tag of its weights."""
    return name.partition(".")[0]


def size_of(name: str) -> int:
    """Return the resolution, px, at the end of a variant's name."""
    return int(untagged(name).rpartition("_")[2])


def of_name(name: str) -> Shape | None:
    """Return the sizes that a name stands for; None where it is no DeiT."""
    return _SHAPES.get(untagged(name))


def of_model(model_config: Any) -> Shape | None:
    """Return the sizes of `config.model`: its variant's, changed by the fields beside it."""
    shape = of_name(model_config.variant)
    if shape is None:
        return None
    return dataclasses.replace(
        shape,
        patch=model_config.patch or shape.patch,
        registers=model_config.registers,
        two_heads=shape.distilled and model_config.heads == "all",
        norm_epsilon=model_config.norm_epsilon,
    )


def _deit(size: str, dim: int, heads: int, images: tuple[int, ...]) -> dict[str, Shape]:
    return {
        f"deit_{size}{'_distilled' if distilled else ''}_patch16_{image}": Shape(
            dim, 12, heads, 16, distilled, two_heads=distilled
        )
        for image in images
        for distilled in (False, True)
    }


def _deit3(size: str, dim: int, depth: int, heads: int, patch: int, images: tuple[int, ...]) -> dict[str, Shape]:
    shape = Shape(dim, depth, heads, patch, layer_scale=LAYER_SCALE, prefix_slots=False, constant_drop=True)
    return {f"deit3_{size}_patch{patch}_{image}": shape for image in images}


def _micro(patch: int, *, distilled: bool) -> Shape:
    # So narrow, .02 leaves attention flat: 68 % of held-out digits after 20 epochs (patch 8, batch 32, peak lr 2e-3)
    # where .1 has 96 %.
    return Shape(64, 4, 2, patch, distilled, 0.1, two_heads=distilled)


_SHAPES = {
    **_deit("tiny", 192, 3, (224,)),
    **_deit("small", 384, 6, (224,)),
    **_deit("base", 768, 12, (224, 384)),
    **_deit3("small", 384, 12, 6, 16, (224, 384)),
    **_deit3("medium", 512, 12, 8, 16, (224,)),
    **_deit3("base", 768, 12, 12, 16, (224, 384)),
    **_deit3("large", 1024, 24, 16, 16, (224, 384)),
    **_deit3("huge", 1280, 32, 16, 14, (224,)),
    # Ours, for the quickstart and the tests.
    **{
        f"deit_micro{'_distilled' if distilled else ''}_patch{patch}_32": _micro(patch, distilled=distilled)
        for patch in (4, 8)
        for distilled in (False, True)
    },
    "deit3_micro_patch8_32": dataclasses.replace(
        _micro(8, distilled=False), layer_scale=LAYER_SCALE, prefix_slots=False, constant_drop=True
    ),
}
