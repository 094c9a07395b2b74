"""Weights of other code bases: their names and shapes, in and out. No file is read or written here.

Three layouts: `timm`; `facebook` (facebookresearch/deit: timm's but for DeiT-III's scales); `huggingface`
(transformers: `deit.*` for distilled variants, `vit.*` for plain ones; it has no DeiT-III).

Promises: a conversion reorders axes, joins or splits q, k and v, and computes nothing: out and back is bitwise equal.
Every name, shape and dtype is checked; what is missing, left over or of another form is listed and refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from deit import errors
from deit.models import paths, positions
from deit.models.variants import Shape

LAYOUTS = ("timm", "facebook", "huggingface")
_POOLER = re.compile(r"((deit|vit)\.)?pooler\.dense\.(weight|bias)")
_BASE = ("embeddings.", "encoder.", "layers.", "layernorm.")  # how names of a base model of transformers begin


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our tensors and where it lies in a layout.

    Attributes:
      own: own path.
      names: the foreign tensor, or the three that are joined (q, k, v).
      axes: order of a foreign tensor's axes that makes it ours; empty for as they are.
      shape: of each foreign tensor.
    """

    own: str
    names: tuple[str, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def detect(names: Collection[str]) -> str:
    """Return the layout of a file by its tensors' names. Errors: UserError."""
    if any(name.startswith(("deit.", "vit.", "embeddings.")) for name in names):
        return "huggingface"
    if any(name.endswith(".gamma_1") for name in names):
        return "facebook"
    if "patch_embed.proj.weight" in names:
        return "timm"
    some = ", ".join(sorted(names)[:3]) or "no tensor at all"
    raise errors.UserError(f"the file is of no layout that is known ({', '.join(LAYOUTS)}): it has {some}")


def classes(tensors: Mapping[str, np.ndarray], layout: str) -> int:
    """Return how many classes the classifier of a file has; 0 where there is none. Errors: UserError."""
    for name in ("cls_classifier.weight", "classifier.weight") if layout == "huggingface" else ("head.weight",):
        if name in tensors:
            if tensors[name].ndim != 2:
                raise errors.UserError(f"{name} has shape {list(tensors[name].shape)}, not [classes, channels]")
            return int(tensors[name].shape[0])
    return 0


def poolers(names: Collection[str], layout: str) -> list[str]:
    """Return which tensors `to_own` leaves out: those of transformers' pooler, which no logit comes through."""
    return sorted(name for name in names if layout == "huggingface" and _POOLER.fullmatch(name))


def grid(tensors: Mapping[str, np.ndarray], shape: Shape, layout: str) -> int:
    """Return the side of the position embedding's grid in a file that `to_own` has taken."""
    root, names = _naming(shape, layout)
    name = root + names["positions"]
    return positions.side(_renamed(tensors, shape, layout)[name].shape[1] - shape.slots, name)


def to_own(
    tensors: Mapping[str, np.ndarray], shape: Shape, *, layout: str, image_size: int, num_classes: int
) -> dict[str, np.ndarray]:
    """Return our tensors by own path, float32, from those of a file.

    `num_classes` = 0: without heads; the file's, if it has any, are left out. The position embedding is that of
    `image_size`, resized where the file's grid is another. Errors: UserError naming tensors.
    """
    wanted = list(entries(shape, layout=layout, image_size=image_size, num_classes=num_classes))
    given = _renamed(tensors, shape, layout)
    if not num_classes:
        for entry in heads(shape, layout=layout, num_classes=1):
            for name in entry.names:
                given.pop(name, None)
    if given.keys() == {name for entry in wanted for name in entry.names}:  # else it is another network altogether
        position = next(entry for entry in wanted if entry.own == paths.POSITIONS)
        given = _resized(given, position.names[0], position.shape, shape.slots)
    _check(given, wanted, layout)
    return {entry.own: _ours(entry, [given[name] for name in entry.names]) for entry in wanted}


def from_own(
    tensors: Mapping[str, np.ndarray], shape: Shape, *, layout: str, image_size: int, num_classes: int
) -> dict[str, np.ndarray]:
    """Return a layout's tensors by name from ours by own path. Errors: UserError naming tensors."""
    result: dict[str, np.ndarray] = {}
    wanted = list(entries(shape, layout=layout, image_size=image_size, num_classes=num_classes))
    left = sorted(tensors.keys() - {entry.own for entry in wanted})
    missing = sorted({entry.own for entry in wanted} - tensors.keys())
    if left or missing:
        raise errors.UserError(_listed([f"missing {name}" for name in missing] + [f"left over {n}" for n in left]))
    for entry in wanted:
        for name, part in zip(entry.names, np.split(tensors[entry.own], len(entry.names), axis=-1)):
            back = np.argsort(entry.axes) if entry.axes else range(part.ndim)
            result[name] = np.ascontiguousarray(part.transpose(*back))
    return result


def entries(shape: Shape, *, layout: str, image_size: int, num_classes: int) -> Iterator[Entry]:
    """Yield every tensor of a variant in a layout. Errors: UserError where the layout does not know the variant."""
    _check_known(shape, layout)
    root, names = _naming(shape, layout)
    yield from _stem(shape, root, names, (image_size // shape.patch) ** 2)
    for i in range(shape.depth):
        yield from _block(shape, layout, f"blocks/{i}", f"{root}{names['block'].format(i)}", names)
    yield from _norm("norm", root + names["norm"], shape.dim)
    if num_classes:
        yield from heads(shape, layout=layout, num_classes=num_classes)


def _stem(shape: Shape, root: str, names: Mapping, count: int) -> Iterator[Entry]:
    """Yield what comes before the blocks."""
    dim, proj = shape.dim, root + names["patch"]
    yield Entry("patch_embed/proj/kernel", (f"{proj}.weight",), (2, 3, 1, 0), (dim, 3, shape.patch, shape.patch))
    yield Entry("patch_embed/proj/bias", (f"{proj}.bias",), (), (dim,))
    yield Entry("tokens/cls_token", (root + names["cls"],), (), (1, 1, dim))
    if shape.distilled:
        yield Entry("tokens/dist_token", (root + names["dist"],), (), (1, 1, dim))
    if shape.registers:
        yield Entry("tokens/reg_token", (f"{root}reg_token",), (), (1, shape.registers, dim))
    yield Entry(paths.POSITIONS, (root + names["positions"],), (), (1, shape.slots + count, dim))


def _block(shape: Shape, layout: str, own: str, block: str, names: Mapping) -> Iterator[Entry]:
    """Yield one block's tensors: `own` and `block` are its prefixes here and there."""
    dim = shape.dim
    yield from _norm(f"{own}/norm1", f"{block}.{names['norm1']}", dim)
    yield from _linear(f"{own}/attn/qkv", [f"{block}.{part}" for part in names["qkv"]], dim, 3 * dim)
    yield from _linear(f"{own}/attn/proj", [f"{block}.{names['proj']}"], dim, dim)
    yield from _norm(f"{own}/norm2", f"{block}.{names['norm2']}", dim)
    yield from _linear(f"{own}/mlp/fc1", [f"{block}.{names['fc1']}"], dim, 4 * dim)
    yield from _linear(f"{own}/mlp/fc2", [f"{block}.{names['fc2']}"], 4 * dim, dim)
    for j in (1, 2) if shape.layer_scale else ():
        scale = f"gamma_{j}" if layout == "facebook" else f"ls{j}.gamma"
        yield Entry(f"{own}/ls{j}/gamma", (f"{block}.{scale}",), (), (dim,))


def _linear(own: str, parts: Sequence[str], given: int, units: int) -> Iterator[Entry]:
    each = units // len(parts)
    yield Entry(f"{own}/kernel", tuple(f"{part}.weight" for part in parts), (1, 0), (each, given))
    yield Entry(f"{own}/bias", tuple(f"{part}.bias" for part in parts), (), (each,))


def _norm(own: str, name: str, dim: int) -> Iterator[Entry]:
    yield Entry(f"{own}/gamma", (f"{name}.weight",), (), (dim,))
    yield Entry(f"{own}/beta", (f"{name}.bias",), (), (dim,))


def heads(shape: Shape, *, layout: str, num_classes: int) -> Iterator[Entry]:
    """Yield the classifiers' tensors."""
    names = paths.HEADS
    if layout == "huggingface":
        names = {"cls": "cls_classifier" if shape.two_heads else "classifier", "dist": "distillation_classifier"}
    for output in shape.outputs:
        own = paths.HEADS[output]
        yield Entry(f"{own}/kernel", (f"{names[output]}.weight",), (1, 0), (num_classes, shape.dim))
        yield Entry(f"{own}/bias", (f"{names[output]}.bias",), (), (num_classes,))


def _naming(shape: Shape, layout: str) -> tuple[str, Mapping]:
    """Return what the trunk's names start with, and the names."""
    if layout == "huggingface":
        return ("deit." if shape.distilled else "vit."), _HUGGINGFACE
    return "", _TIMM


def _renamed(tensors: Mapping[str, np.ndarray], shape: Shape, layout: str) -> dict[str, np.ndarray]:
    """Return a file's tensors under the names that `entries` has, poolers left out. Errors: UserError.

    transformers has three spellings of one tensor: with its classifiers' prefix or, in a base model, without; and with
    the names of the file or, since its version 5, of the module in memory.
    """
    if layout != "huggingface":
        return dict(tensors)
    root, _ = _naming(shape, layout)
    spelled: dict[str, str] = {}
    for name in sorted(tensors.keys() - set(poolers(tensors, layout))):
        known = _classic(root + name if name.startswith(_BASE) else name)
        if known in spelled:
            raise errors.UserError(f"{spelled[known]} and {name} are two names of one tensor: the file must have one")
        spelled[known] = name
    return {known: tensors[name] for known, name in spelled.items()}


def _classic(name: str) -> str:
    """Return the name in a file that transformers writes, from that of the module in memory since its version 5."""
    match = re.fullmatch(r"(deit|vit)\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not match:
        return name
    root, block, inner, end = match.groups()
    return f"{root}.encoder.layer.{block}.{_SINCE_5.get(inner, inner)}.{end}"


def _check_known(shape: Shape, layout: str) -> None:
    """Raise UserError where a layout has no such network."""
    if layout == "huggingface" and (shape.layer_scale or not shape.prefix_slots or shape.registers):
        raise errors.UserError("transformers has no DeiT-III and no register tokens: use the layout timm")
    if layout != "huggingface" and shape.distilled and not shape.two_heads:
        raise errors.UserError(f"{layout} has no distilled network with one head (model.heads is cls): use huggingface")
    if layout == "facebook" and shape.registers:
        raise errors.UserError("facebookresearch/deit has no register tokens (model.registers): use the layout timm")
    if layout == "timm" and shape.distilled and shape.registers:
        raise errors.UserError("timm has no register tokens (model.registers) in a distilled network")


def _resized(given: dict[str, np.ndarray], name: str, wanted: tuple[int, ...], slots: int) -> dict[str, np.ndarray]:
    """Return the tensors with the position embedding `name` on the wanted grid, if it is there and of another."""
    have = given.get(name)
    if have is None or have.shape == wanted or have.dtype != np.float32 or have.shape[-1:] != wanted[-1:]:
        return given
    return {**given, name: positions.resize(have, slots=slots, count=wanted[1] - slots, name=name)}


def _check(given: Mapping[str, np.ndarray], wanted: Sequence[Entry], layout: str) -> None:
    shapes = {name: entry.shape for entry in wanted for name in entry.names}
    problems = []
    for name in sorted(shapes.keys() & given.keys()):
        have = given[name]
        if have.shape != shapes[name]:
            problems.append(f"{name} has shape {list(have.shape)}, not {list(shapes[name])}")
        elif have.dtype != np.float32:
            problems.append(f"{name} is {have.dtype.name}, not float32")
    problems += [f"missing {name}" for name in sorted(shapes.keys() - given.keys())]
    problems += [f"left over {name}" for name in sorted(given.keys() - shapes.keys())]
    if problems:
        raise errors.UserError(f"the weights ({layout}) do not fit: {_listed(problems)}")


def _listed(problems: Sequence[str]) -> str:
    return "; ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")


def _ours(entry: Entry, parts: Sequence[np.ndarray]) -> np.ndarray:
    turned = [part.transpose(*entry.axes) if entry.axes else part for part in parts]
    return np.ascontiguousarray(np.concatenate(turned, axis=-1))


_TIMM = {
    "patch": "patch_embed.proj",
    "cls": "cls_token",
    "dist": "dist_token",
    "positions": "pos_embed",
    "block": "blocks.{}",
    "norm1": "norm1",
    "qkv": ("attn.qkv",),
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm": "norm",
}

_HUGGINGFACE = {
    "patch": "embeddings.patch_embeddings.projection",
    "cls": "embeddings.cls_token",
    "dist": "embeddings.distillation_token",
    "positions": "embeddings.position_embeddings",
    "block": "encoder.layer.{}",
    "norm1": "layernorm_before",
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm": "layernorm",
}

_SINCE_5 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
