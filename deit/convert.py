"""Weights of other code bases into a checkpoint of ours: what tools/convert_weights.py does without --to.

Promises: a checkpoint that is written opens: it was assigned to the network before; nothing is left half written and
nothing that exists is overwritten. What lies beside the weights (names of classes, mean and std of pixels, the crop)
comes along. The manifest says where the weights came from and what became of them.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import deit
from configs import base
from deit import commit, errors, peer_settings, weights_file, workdir
from deit import config as configuration
from deit.models import factory, layouts, paths, variants

_IMAGENET = 1000


@dataclasses.dataclass(frozen=True)
class _Source:
    """A weights file that was read.

    Attributes:
      file: its path.
      layout: given or seen.
      tensors: its own, by its names.
      beside: what lies in its directory.
    """

    file: Path
    layout: str
    tensors: dict[str, np.ndarray]
    beside: peer_settings.Settings


def load(
    source: Path,
    out: Path,
    *,
    variant: str,
    layout: str = "",
    image_size: int = 0,
    patch: int = 0,
    registers: int = 0,
    classifier: str = "keep",
    names_file: Path | None = None,
) -> str:
    """Write the checkpoint `out` from a weights file and return a line on it; flags as the tool has them.

    Errors: UserError, with nothing written.
    """
    commit.check_new(out)
    _check_request(variant, classifier, names_file)
    model, size = _model(variant, patch, registers), image_size or variants.size_of(variant)
    factory.check(model, size)
    found = _read(source, layout, model)
    _adapt(model, found)
    count = _count(found, classifier)
    names = _names(count, classifier, names_file, found)
    shape = variants.of_model(model)
    own = layouts.to_own(found.tensors, shape, layout=found.layout, image_size=size, num_classes=count)
    done = _changes(found, shape, variant, size, asked=bool(image_size))
    found.tensors.clear()  # a large network's are a gigabyte
    own = _assigned(own, model, size, len(names), fresh_heads=classifier == "replace")
    provenance = {
        "file": found.file.name,
        "sha256": workdir.describe(found.file)["sha256"],
        "layout": found.layout,
        "variant": variant,
        "classifier": classifier,
        **done,
        **{path.name: f"sha256 {workdir.describe(path)['sha256']}" for path in found.beside.files()},
    }
    config = _config(model, size, names, found.beside.crop_ratio)
    _commit(out, own, config, provenance)
    beside = "".join(f", {path.name} beside it" for path in found.beside.files())
    return (
        f"{out}: {variant} at {size} px, crop {config.eval.crop_ratio:g}, {_described(own, names, done)}; "
        f"from {_origin(provenance)}{beside}"
    )


def _check_request(variant: str, classifier: str, names_file: Path | None) -> None:
    """Raise UserError for flags that can't be answered, before a file is read."""
    if variants.of_name(variant) is None:
        factory.check(_model(variant, 0, 0), 224)  # says which names are near
        raise errors.UserError(f"--variant ({variant}) must be a DeiT or DeiT-III: other code bases have no {variant}")
    if classifier == "replace" and names_file is None:
        raise errors.UserError("--class_names must be given with --classifier=replace")
    if classifier == "drop" and names_file is not None:
        raise errors.UserError(f"--class_names ({names_file}) names the classes of a classifier: --classifier is drop")


def _model(variant: str, patch: int, registers: int) -> ConfigDict:
    model = base.get_config().model
    model.variant, model.patch, model.registers = variants.untagged(variant), patch, registers
    return model


def _read(source: Path, layout: str, model: ConfigDict) -> _Source:
    file = weights_file.file_of(source)
    tensors = weights_file.read(file)
    seen = layouts.detect(tensors)
    if layout == "facebook" and seen == "timm":  # the same names, where there is no LayerScale
        seen = layout
    if layout and layout != seen:
        raise errors.UserError(f"--layout ({layout}) is not what {file} has: its names are {seen}'s")
    layout = seen
    return _Source(file, layout, tensors, peer_settings.read(file.parent, layout, variants.of_model(model)))


def _adapt(model: ConfigDict, found: _Source) -> None:
    """Change `model` to what the file and its neighbours say."""
    model.norm_epsilon = found.beside.norm_epsilon
    model.mean, model.std = found.beside.mean or model.mean, found.beside.std or model.std
    one_head = found.layout == "huggingface" and "classifier.weight" in found.tensors
    if one_head and variants.of_model(model).distilled:
        model.heads = "cls"  # DeiTForImageClassification


def _count(found: _Source, classifier: str) -> int:
    """Return how many classes are taken over; 0 = no heads are."""
    if classifier != "keep":
        return 0
    count = layouts.classes(found.tensors, found.layout)
    if not count:
        raise errors.UserError(f"{found.file} has no classifier: --classifier=drop or --classifier=replace")
    return count


def _names(count: int, classifier: str, names_file: Path | None, found: _Source) -> tuple[str, ...]:
    """Return the name of each class of the checkpoint: of --class_names, else of the file's neighbour, else made up."""
    if classifier == "drop":
        return ()
    if names_file is not None:
        names = _names_in(names_file)
        if classifier == "keep" and len(names) != count:
            raise errors.UserError(
                f"--class_names ({names_file}) has {len(names)} names, the classifier {count} classes"
            )
        return names
    names = found.beside.class_names()
    if names and len(names) != count:
        path = found.beside.where / "config.json"
        raise errors.UserError(f"{path} has {len(names)} labels, the classifier {count} classes")
    if count == _IMAGENET and (not names or _are_imagenet_s(names)):
        return _imagenet()
    return names or tuple(f"class {index}" for index in range(count))


def _names_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # a byte order mark is no part of a name
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is no UTF-8 text"
        raise errors.UserError(f"--class_names ({path}) can't be read: {why}") from None
    names = tuple(filter(None, (line.strip() for line in lines)))
    again = [name for name, times in collections.Counter(names).items() if times > 1]
    if again:
        listed = ", ".join(repr(name) for name in again[:3])
        raise errors.UserError(f"--class_names ({path}) must hold different names, one a line: {listed} comes again")
    if len(names) < 2:
        raise errors.UserError(f"--class_names ({path}) must hold two different names or more, one a line")
    return names


def _are_imagenet_s(names: tuple[str, ...]) -> bool:
    """Say whether a thousand names are ImageNet's in words, as published files of Hugging Face have them."""
    return names[0].startswith("tench") and names[-1].startswith("toilet tissue")


def _imagenet() -> tuple[str, ...]:
    """Return ImageNet's classes as its folders and TensorFlow Datasets name them: n01440764, ..."""
    (folder,) = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations
    return tuple((Path(folder) / "datasets" / "imagenet2012" / "labels.txt").read_text().split())


def _changes(found: _Source, shape: variants.Shape, variant: str, size: int, *, asked: bool) -> dict[str, str]:
    """Return {resized, left_out} as far as tensors did not just come over, in words.

    Errors: UserError where the position embedding is of another grid and nobody `asked` for a size.
    """
    done = {}
    before, after = layouts.grid(found.tensors, shape, found.layout), size // shape.patch
    if before != after and not asked:
        native = before * shape.patch
        other = variants.at_size(variant, native)
        raise errors.UserError(
            f"pos_embed is of a {before} x {before} grid, {variant} has {after} x {after}: --image_size={size} resizes "
            f"it, {f'--variant={other}' if other else f'--image_size={native}'} keeps it"
        )
    if before != after:
        done["resized"] = f"pos_embed from {before} x {before} to {after} x {after}"
    if layouts.poolers(found.tensors, found.layout):
        done["left_out"] = "pooler.dense, which no logit comes through"
    return done


def _assigned(
    own: dict[str, np.ndarray], model: ConfigDict, size: int, classes: int, *, fresh_heads: bool
) -> dict[str, np.ndarray]:
    """Return the tensors once the network has taken them, with heads drawn anew where they are wanted."""
    network = factory.build(
        model, num_classes=classes or 1, image_size=size, precision="float32", load_weights=fresh_heads
    )
    ours = paths.variables(network.model)
    paths.assign([(path, variable) for path, variable in ours if path in own], own)
    fresh = {path: v.numpy() for path, v in ours if fresh_heads and paths.is_head(path)}
    return own | fresh


def _config(model: ConfigDict, image_size: int, names: tuple[str, ...], crop_ratio: float | None) -> ConfigDict:
    """Return the configuration of the checkpoint: how its network is built, and how its recipe evaluates."""
    c = base.get_config()
    c.model, c.data.image_size = model, image_size
    c.eval.crop_ratio = crop_ratio
    if crop_ratio is None:
        c.eval.crop_ratio = 1.0 if model.variant.startswith("deit3") else 0.875
    c.data.name, c.data.train_split, c.data.eval_split = "tfds:imagenet2012", "train", "validation"
    if names != _imagenet():
        c.data.name, c.data.train_split, c.data.eval_split = "folder:pictures", "train", "val"
    resolved = ConfigDict(configuration.resolve(c, train_size=1_281_167, eval_size=50_000, classes=names, replicas=1))
    resolved.resolved.total_updates = 0  # nothing is left to train
    return resolved


def _commit(out: Path, own: Mapping[str, np.ndarray], config: ConfigDict, provenance: dict[str, str]) -> None:
    try:
        commit.commit(
            out,
            {f"student/{path}": value for path, value in own.items()},
            step=0,
            config_json=configuration.to_json(config),
            metrics={},
            versions={"deit": deit.__version__},
            source=provenance,
        )
    except commit.NotFinite as error:
        raise errors.UserError(f"the weights can't be used: {error}") from None
    except OSError as error:
        raise errors.UserError(f"--out ({out}) can't be written: {error.strerror or error}") from error


def _described(own: Mapping[str, np.ndarray], names: tuple[str, ...], done: Mapping[str, str]) -> str:
    heads = f"{len(names)} classes ({', '.join(names[:3])}, ...)" if names else "no classifier: for init_from"
    words = [f"{sum(value.size for value in own.values()):,} parameters", heads]
    words += [f"{name.replace('_', ' ')}: {text}" for name, text in done.items()]
    return ", ".join(words)


def _origin(provenance: Mapping[str, str]) -> str:
    return f"{provenance['file']} ({provenance['layout']}, sha256 {provenance['sha256'][:12]})"
