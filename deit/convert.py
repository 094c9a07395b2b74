"""Weights of other code bases into a checkpoint of ours, and back: what tools/convert_weights.py does.

Promises: a checkpoint that is written opens: it was assigned to the network before; nothing is left half written and
nothing that exists is overwritten. The manifest says where the weights came from.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import deit
from configs import base
from deit import checkpoint, commit, errors, saved, weights_file
from deit import config as configuration
from deit.models import factory, layouts, paths, variants

_IMAGENET = 1000
_EPSILON_OF_HUGGINGFACE = 1e-12  # transformers' DeiTConfig and ViTConfig
_HEADS = ("head/", "head_dist/")


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
    _check_new(out)
    if variants.of_name(variant) is None:
        factory.check(_model(variant, patch, registers), image_size or 224)  # says which names are near
        raise errors.UserError(f"--variant ({variant}) must be a DeiT or DeiT-III: other code bases have no {variant}")
    file = weights_file.file_of(source)
    tensors = weights_file.read(file)
    layout = layout or layouts.detect(list(tensors))
    model = _model(variant, patch, registers)
    beside = weights_file.settings(file) if layout == "huggingface" else {}
    if layout == "huggingface":
        model.norm_epsilon = float(beside.get("layer_norm_eps", _EPSILON_OF_HUGGINGFACE))
        if "classifier.weight" in tensors and variants.of_name(variant).distilled:
            model.heads = "cls"  # DeiTForImageClassification
    size = image_size or variants.size_of(variant)
    factory.check(model, size)
    count = _count(file, layouts.classes(tensors, layout), classifier)
    names = _names(count, classifier, names_file, weights_file.class_names(beside))

    shape = variants.of_model(model)
    own = layouts.to_own(tensors, shape, layout=layout, image_size=size, num_classes=count)
    network = factory.build(model, num_classes=len(names) or 1, image_size=size, precision="float32")
    ours = paths.variables(network.model)
    paths.assign([(path, v) for path, v in ours if path in own], own)
    if classifier == "replace":
        own.update({path: v.numpy() for path, v in ours if path.startswith(_HEADS)})
    provenance = {
        "file": file.name,
        "sha256": weights_file.sha256(file),
        "layout": layout,
        "variant": variant,
        "classifier": classifier,
    }
    _commit(out, own, _config(model, size, names), provenance)
    heads = "no classifier: for init_from" if not names else f"{len(names)} classes ({', '.join(names[:3])}, ...)"
    return (
        f"{out}: {variant} at {size} px, {sum(v.size for v in own.values()):,} parameters, {heads}; from {file.name} "
        f"({layout}, sha256 {provenance['sha256'][:12]})"
    )


def export(source: Path, out: Path, *, layout: str, weights: str = "raw") -> str:
    """Write weights of a run or checkpoint in another code base's layout and return how to open them there.

    Errors: UserError, with nothing written.
    """
    _check_new(out)
    where = checkpoint.locate(source)
    config = saved.config_of(where)
    shape = variants.of_model(config.model)
    if shape is None:
        raise errors.UserError(f"model.variant ({config.model.variant}) must be a DeiT: {layout} has no such network")
    classes = tuple(config.resolved.classes)
    own = saved.student(checkpoint.read(where)[0], weights, where)
    size = config.data.image_size
    foreign = layouts.from_own(own, shape, layout=layout, image_size=size, num_classes=len(classes))
    if layout == "huggingface":
        return _write_huggingface(out, foreign, config, shape)
    if out.suffix != ".safetensors":
        raise errors.UserError(f"--out ({out}) must end in .safetensors")
    with _whole(out) as temporary:
        weights_file.write(temporary, foreign)
    if shape.norm_epsilon != variants.NORM_EPSILON:
        logging.warning("timm normalises with epsilon 1e-6, this network with %g: logits differ", shape.norm_epsilon)
    return f"{out}: {_timm_call(config, shape, out.name)}"


def _timm_call(config: ConfigDict, shape: variants.Shape, file: str) -> str:
    """Return the Python that opens an exported file."""
    name = variants.untagged(config.model.variant)
    options = {"img_size": config.data.image_size, "num_classes": len(config.resolved.classes)}
    if config.model.patch:
        options["patch_size"] = shape.patch
    if shape.registers:
        options["reg_tokens"] = shape.registers
    if "_micro_" not in name:
        return f"timm.create_model('{name}', {_arguments(options)}, checkpoint_path='{file}')"
    options |= {"patch_size": shape.patch, "embed_dim": shape.dim, "depth": shape.depth, "num_heads": shape.heads}
    if shape.layer_scale:
        options |= {"init_values": shape.layer_scale, "no_embed_class": not shape.prefix_slots}
    kind = "deit.VisionTransformerDistilled" if shape.distilled else "VisionTransformer"
    return (
        f"model = timm.models.{kind}({_arguments(options)}); "
        f"model.load_state_dict(safetensors.torch.load_file('{file}'))"
    )


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _check_new(out: Path) -> None:
    if os.path.lexists(out):
        raise errors.UserError(f"--out ({out}) exists and is not overwritten")
    if not out.absolute().parent.is_dir():
        raise errors.UserError(f"--out ({out}) must lie in an existing directory")


def _model(variant: str, patch: int, registers: int) -> ConfigDict:
    model = base.get_config().model
    model.variant, model.patch, model.registers = variants.untagged(variant), patch, registers
    return model


def _count(file: Path, found: int, classifier: str) -> int:
    """Return how many classes are taken over; 0 = no heads are."""
    if classifier != "keep":
        return 0
    if not found:
        raise errors.UserError(f"{file} has no classifier: --classifier=drop or --classifier=replace")
    return found


def _names(count: int, classifier: str, names_file: Path | None, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the name of each class of the checkpoint."""
    if names_file is not None:
        found = tuple(filter(None, (line.strip() for line in names_file.read_text(encoding="utf-8").splitlines())))
        if len(set(found)) != len(found) or len(found) < 2:
            raise errors.UserError(f"--class_names ({names_file}) must hold two different names or more, one a line")
    if classifier == "drop":
        return ()
    if classifier == "replace":
        if names_file is None:
            raise errors.UserError("--class_names must be given with --classifier=replace")
        return found
    if found and len(found) != count:
        raise errors.UserError(f"--class_names has {len(found)} names, the classifier {count} classes")
    if not found and count == _IMAGENET:
        return _imagenet()
    return found or tuple(f"class {index}" for index in range(count))


def _imagenet() -> tuple[str, ...]:
    """Return ImageNet's classes as its folders and TensorFlow Datasets name them: n01440764, ..."""
    (folder,) = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations
    return tuple((Path(folder) / "datasets" / "imagenet2012" / "labels.txt").read_text().split())


def _config(model: ConfigDict, image_size: int, names: tuple[str, ...]) -> ConfigDict:
    """Return the configuration of the checkpoint: how its network is built, and how its recipe evaluates."""
    c = base.get_config()
    c.model, c.data.image_size = model, image_size
    c.eval.crop_ratio = 1.0 if model.variant.startswith("deit3") else 0.875
    c.data.name, c.data.train_split, c.data.eval_split = "tfds:imagenet2012", "train", "validation"
    if names != _imagenet():
        c.data.name, c.data.train_split, c.data.eval_split = "folder:pictures", "train", "val"
    resolved = ConfigDict(configuration.resolve(c, train_size=1_281_167, eval_size=50_000, classes=names, replicas=1))
    resolved.resolved.total_updates = 0  # nothing is left to train
    return resolved


def _commit(out: Path, own: Mapping[str, np.ndarray], config: ConfigDict, provenance: dict[str, str]) -> None:
    tensors = {f"student/{path}": value for path, value in own.items()}
    try:
        commit.commit(
            out,
            tensors,
            step=0,
            config_json=configuration.to_json(config),
            metrics={},
            versions={"deit": deit.__version__},
            temporary=f"tmp-{out.name}",
            source=provenance,
        )
    except commit.NotFinite as error:
        raise errors.UserError(f"the weights can't be used: {error}") from None


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a path beside `out` that becomes `out` when the block ends, and is removed when it fails."""
    temporary = out.with_name(f"tmp-{out.name}")
    try:
        yield temporary
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise


def _write_huggingface(out: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict, shape: variants.Shape) -> str:
    architecture = "ViTForImageClassification"
    if shape.distilled:
        architecture = f"DeiTForImageClassification{'WithTeacher' if shape.two_heads else ''}"
    names = dict(enumerate(config.resolved.classes))
    content = {
        "architectures": [architecture],
        "model_type": "deit" if shape.distilled else "vit",
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.model.norm_epsilon,
        "qkv_bias": True,
        "image_size": config.data.image_size,
        "patch_size": shape.patch,
        "num_channels": 3,
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }
    side, crop = config.data.image_size, config.eval.crop_ratio
    picture = {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": int(side / (crop or 1.0)), "width": int(side / (crop or 1.0))},
        "resample": 3 if crop else 2,
        "do_center_crop": bool(crop),
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(config.model.mean),
        "image_std": list(config.model.std),
    }
    with _whole(out) as temporary:
        temporary.mkdir()
        weights_file.write(temporary / "model.safetensors", tensors)
        (temporary / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        (temporary / "preprocessor_config.json").write_text(json.dumps(picture, indent=2) + "\n")
    return f"{out}: transformers.{architecture}.from_pretrained('{out.name}')"
