"""Initial weights from a checkpoint: fine-tuning on other classes, at another resolution.

Promises: the trunk comes over bit for bit, but for a position embedding of another grid, which is resampled; heads come
over where the classes are the same in the same order, else they keep their fresh initial values, and the plan says so.
Whatever else does not fit is refused by the tensor's name, from the names, shapes and dtypes alone, before data is
opened or a teacher trained. What is no tensor does not come over: where `model.mean`, `std` or `norm_epsilon` differ,
the plan warns.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import tensorflow as tf
from ml_collections import ConfigDict

from deit import checkpoint, errors, saved
from deit import config as configuration
from deit.data import sources
from deit.models import factory, paths, positions, variants


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      path: the checkpoint.
      names: own paths of the tensors that come over.
      said: the line on it: what becomes of heads and position embedding.
      identity: sha256 of the checkpoint's tensors, once they were read.
    """

    path: Path
    names: tuple[str, ...]
    said: str
    identity: str = ""


def check(config: Any, classes: Sequence[str] | None) -> None:
    """Refuse an `init_from` that can't be opened or does not fit; no tensor is read.

    `classes`: of the data, None where they aren't known yet: then the heads are not looked at. Errors: UserError.
    """
    if not config.init_from:
        return
    path, source = _opened(config)
    with tf.device("/cpu:0"):
        network = factory.build(
            config.model,
            num_classes=len(classes or source.resolved.classes) or 1,
            image_size=config.data.image_size,
            precision=config.precision,
            load_weights=False,
        )
    _fit(config, path, source, network, classes)


def describe(config: Any, network: factory.Network, classes: Sequence[str] | None) -> str:
    """Return the line on what `load` does to this network, "" where there is no `init_from`; no tensor is read.

    `classes` as `check` has them. Errors: UserError.
    """
    return _fit(config, *_opened(config), network, classes).said if config.init_from else ""


def load(config: Any, network: factory.Network) -> Start | None:
    """Give the student of a resolved configuration the weights of `init_from`, if there is one, and say what it was.

    The network may come as `factory.build(load_weights=False)` leaves it: heads that don't come over are drawn here.
    Errors: UserError, with nothing assigned.
    """
    if not config.init_from:
        return None
    with _named(config):
        source = saved.contents(config.init_from)
    _check_variant(config, source.config)
    found = _fit(config, source.path, source.config, network, config.resolved.classes)
    tensors = saved.student(source.tensors, config.init_weights, found.path)
    wanted = [(path, variable) for path, variable in paths.variables(network.model) if path in found.names]
    coming = {path: tensors[path] for path, _ in wanted}
    shape = factory.shape_of(config.model)
    if shape is not None:
        count = dict(wanted)[paths.POSITIONS].shape[1] - shape.slots
        coming[paths.POSITIONS] = positions.resize(
            coming[paths.POSITIONS], slots=shape.slots, count=count, name=paths.POSITIONS
        )
    # Only heads may be left to be drawn: the trunk is whole, or `_fit` had refused it.
    paths.initialise(network.model, config.model.seed, loaded={path.rpartition("/")[0] for path in found.names})
    paths.assign(wanted, coming)
    return dataclasses.replace(found, identity=source.manifest["state_sha256"])


@contextlib.contextmanager
def _named(config: Any) -> Iterator[None]:
    """Name the field in what is wrong with the path; a file of weights is told how it becomes a checkpoint."""
    try:
        yield
    except errors.UserError as error:
        is_file = Path(config.init_from).is_file()
        hint = ": tools/convert_weights.py makes a checkpoint of a file of weights" if is_file else ""
        raise errors.UserError(f"init_from ({config.init_from}): {error}{hint}") from error


def _opened(config: Any) -> tuple[Path, ConfigDict]:
    """Return the checkpoint of `init_from` and its configuration. Errors: UserError, also where the variants differ."""
    with _named(config):
        path = checkpoint.locate(config.init_from)
        source = saved.config_beside(path)
    _check_variant(config, source)
    return path, source


def _fit(config: Any, path: Path, source: ConfigDict, network: factory.Network, classes: Sequence[str] | None) -> Start:
    """Return what comes over into a network. Errors: UserError naming what does not fit."""
    forms = saved.student(_forms(path), config.init_weights, path)
    ours = dict(paths.variables(network.model))
    said = [_heads(forms, config, source, classes)]
    shape = factory.shape_of(config.model)
    if shape is not None and paths.POSITIONS in forms:
        said.append(_positions(forms, tf.TensorShape(ours[paths.POSITIONS].shape), shape.slots))
    _check_fit(config.init_from, forms, ours)
    said.append(_not_coming(config, source))
    line = f"{path} ({config.init_weights}); {'; '.join(filter(None, said))}"
    return Start(path, tuple(forms), line)


def _forms(path: Path) -> dict[str, tf.TensorSpec]:
    """Return dtype and shape of every tensor of a checkpoint, from the head of its file."""
    try:
        with safetensors.safe_open(path / checkpoint.TENSORS, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  a file is no dict
            return {name: tf.TensorSpec(p.get_shape(), _DTYPES[p.get_dtype()]) for name, p in parts.items()}
    except (safetensors.SafetensorError, OSError, KeyError) as error:  # its sha256 was right a moment ago
        raise errors.UserError(f"checkpoint {path} can't be read: {error}") from error


# What a checkpoint of ours can hold, the optimizer's counters included, by safetensors' names.
_DTYPES = {
    "BOOL": tf.bool, "U8": tf.uint8, "U16": tf.uint16, "U32": tf.uint32, "U64": tf.uint64, "I8": tf.int8,
    "I16": tf.int16, "I32": tf.int32, "I64": tf.int64, "F16": tf.float16, "BF16": tf.bfloat16, "F32": tf.float32,
    "F64": tf.float64,
}  # fmt: skip


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
    "num_heads": "blocks/*/attn/qkv/kernel",
    "distilled": "tokens/dist_token",
    "registers": "tokens/reg_token",
    "layer_scale": "blocks/*/ls1/gamma",
    "prefix_slots": paths.POSITIONS,
}


def _heads(forms: dict[str, Any], config: Any, source: ConfigDict, classes: Sequence[str] | None) -> str:
    """Take out of `forms` the heads that do not come over; say what becomes of them."""
    theirs = tuple(source.resolved.classes)
    had = [head for head in paths.HEADS.values() if f"{head}/kernel" in forms]
    keep = had if classes is not None and tuple(classes) == theirs else []
    if config.model.heads == "cls":
        keep = [head for head in keep if head == paths.HEADS["cls"]]
    for name in [name for name in forms if paths.is_head(name) and name.partition("/")[0] not in keep]:
        del forms[name]
    if not had:
        return "heads initialised: it has none"
    if classes is None:
        return "heads: re-initialised unless the classes are the same"
    if not keep:
        few = sources.few
        return f"heads re-initialised: {len(theirs)} classes ({few(theirs)}) -> {len(classes)} ({few(classes)})"
    dropped = ", head_dist left out (model.heads is cls)" if len(keep) < len(had) else ""
    shape = factory.shape_of(config.model)
    added = ", head_dist initialised: it has none" if shape is not None and shape.two_heads and len(had) == 1 else ""
    return f"heads kept: the same {len(classes)} classes{dropped}{added}"


def _positions(forms: dict[str, Any], wanted: tf.TensorShape, slots: int) -> str:
    """Give the position embedding the form that it is resized to, if it can be; say from what to what."""
    name, before = paths.POSITIONS, forms[paths.POSITIONS]
    if before.shape.rank != 3 or before.shape[1] <= slots:
        raise errors.UserError(f"{name} has shape {list(before.shape)}, not [1, {slots} + patches, channels]")
    here, count = before.shape[1] - slots, wanted[1] - slots
    if here == count:
        return ""
    old, new = positions.side(here, name), positions.side(count, name)
    forms[name] = tf.TensorSpec([before.shape[0], wanted[1], before.shape[2]], before.dtype)
    return f"{name} resized from {old} x {old} to {new} x {new}"


def _check_fit(init_from: str, forms: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise UserError for a tensor of the trunk that is missing, left over, or of another form."""
    heads = {path.partition("/")[0] for path in forms if paths.is_head(path)}  # each whole or not at all
    kept = {p: variable for p, variable in ours.items() if not paths.is_head(p) or p.partition("/")[0] in heads}
    problem = paths.misfit(list(kept.items()), forms)
    if problem:
        raise errors.UserError(f"init_from ({init_from}) does not fit model.variant: {problem}")


def _not_coming(config: Any, source: ConfigDict) -> str:
    """Warn of what the weights were trained with that is a field, so that it does not come over with them."""
    ours, theirs = (dict(configuration.flatten(each.model)) for each in (config, source))
    fields = ("norm_epsilon",) if config.model.variant == "backbone" else ("mean", "std", "norm_epsilon")
    differ = [f"model.{name} {theirs[name]} -> {ours[name]}" for name in fields if theirs[name] != ours[name]]
    kept = "the weights were trained with the first, which --config.FIELD=VALUE keeps"
    return f"warning: {', '.join(differ)}: {kept}" if differ else ""
