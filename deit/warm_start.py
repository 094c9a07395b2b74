"""Initial weights from a checkpoint: fine-tuning on other classes, at another resolution.

Promises: the trunk comes over bit for bit, but for a position embedding of another grid, which is resampled; heads come
over where the classes are the same in the same order, else they keep their fresh initial values, and the log says so.
Whatever else does not fit is refused by the tensor's name, before anything is assigned.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deit import checkpoint, errors, saved
from deit.models import factory, paths, positions, variants

_HEADS = ("head/", "head_dist/")
_POSITIONS = "tokens/pos_embed"


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      path: the checkpoint.
      config: its run's, or the converter's.
      tensors: own path -> array, of the student.
      said: what became of heads and position embedding, for people.
    """

    path: Path
    config: ConfigDict
    tensors: dict[str, np.ndarray]
    said: str


def check(config: Any) -> None:
    """Refuse an init_from that can't be opened or is of another variant, before data or a teacher cost anything.

    Errors: UserError.
    """
    if config.init_from:
        _check_variant(config, saved.config_of(config.init_from))


def load(config: Any, network: factory.Network) -> str:
    """Give the student the weights of `init_from` and return a line on them; "" where there is none.

    Errors: UserError, with nothing assigned.
    """
    if not config.init_from:
        return ""
    found = _read(config, network)
    wanted = [(path, variable) for path, variable in paths.variables(network.model) if path in found.tensors]
    paths.assign(wanted, found.tensors)
    return f"{found.path} ({config.init_weights}); {found.said}"


def _read(config: Any, network: factory.Network) -> Start:
    path = checkpoint.locate(config.init_from)
    source = saved.config_of(path)
    _check_variant(config, source)
    tensors = saved.student(checkpoint.read(path)[0], config.init_weights, path)
    ours = dict(paths.variables(network.model))
    said = [_heads(tensors, config, source)]
    shape = variants.of_model(config.model)
    if shape is not None and _POSITIONS in tensors:
        said.append(_resize(tensors, ours[_POSITIONS].shape[1] - shape.slots, shape.slots))
    _check_fit(config.init_from, tensors, ours)
    return Start(path, source, tensors, "; ".join(filter(None, said)))


def _check_variant(config: Any, source: ConfigDict) -> None:
    """Raise UserError where the trunks differ in more than the resolution."""
    ours, theirs = variants.of_model(config.model), variants.of_model(source.model)
    if ours is None or theirs is None:
        if config.model.variant != source.model.variant:
            raise errors.UserError(
                f"model.variant ({config.model.variant}) must be that of init_from ({source.model.variant})"
            )
        return
    for field, tensor in _TENSOR_OF.items():
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            raise errors.UserError(
                f"init_from ({config.init_from}) is {source.model.variant} with {field} {other}, model.variant is "
                f"{config.model.variant} with {field} {mine}: {tensor} does not fit"
            )


# Fields of a shape that must be alike, in the order in which they are told, and a tensor that shows the difference.
_TENSOR_OF = {
    "dim": "patch_embed/proj/kernel",
    "patch": "patch_embed/proj/kernel",
    "depth": "blocks/*",
    "heads": "blocks/*/attn/qkv/kernel",
    "distilled": "tokens/dist_token",
    "registers": "tokens/reg_token",
    "layer_scale": "blocks/*/ls1/gamma",
    "prefix_slots": "tokens/pos_embed",
}


def _heads(tensors: dict[str, np.ndarray], config: Any, source: ConfigDict) -> str:
    """Take out of `tensors` the heads that do not come over; say what becomes of them."""
    ours, theirs = tuple(config.resolved.classes), tuple(source.resolved.classes)
    had = [prefix for prefix in _HEADS if f"{prefix}kernel" in tensors]
    keep = had if ours == theirs else []
    if config.model.heads == "cls":
        keep = [prefix for prefix in keep if prefix == "head/"]
    for name in [name for name in tensors if name.startswith(_HEADS) and not name.startswith(tuple(keep))]:
        del tensors[name]
    if not had:
        return "heads initialised: it has none"
    if not keep:
        return f"heads re-initialised: {len(theirs)} classes ({_few(theirs)}) -> {len(ours)} ({_few(ours)})"
    dropped = ", head_dist left out (model.heads is cls)" if len(keep) < len(had) else ""
    return f"heads kept: the same {len(ours)} classes{dropped}"


def _resize(tensors: dict[str, np.ndarray], count: int, slots: int) -> str:
    before = tensors[_POSITIONS]
    tensors[_POSITIONS] = positions.resize(before, slots=slots, count=count, name=_POSITIONS)
    here = before.shape[1] - slots
    if here == count:
        return ""
    old, new = positions.side(here, _POSITIONS), positions.side(count, _POSITIONS)
    return f"{_POSITIONS} resized from {old} x {old} to {new} x {new}"


def _check_fit(init_from: str, tensors: dict[str, np.ndarray], ours: dict[str, Any]) -> None:
    """Raise UserError for a tensor of the trunk that is missing, left over, or of another form."""
    heads = [path for path in tensors if path.startswith(_HEADS)]  # all or none: half of them would be no classifier
    kept = {path: variable for path, variable in ours.items() if heads or not path.startswith(_HEADS)}
    problem = paths.misfit(list(kept.items()), tensors)
    if problem:
        raise errors.UserError(f"init_from ({init_from}) does not fit model.variant: {problem}")


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
