"""Weights of a run or checkpoint in another code base's layout: tools/convert_weights.py --to.

Promises: the line that comes back is Python that opens what was written, with the same logits, in timm or transformers;
a network that the other code base has not is refused before anything is written, and nothing that exists is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from configs import base
from deit import commit, errors, saved, weights_file
from deit.models import layouts, variants


def export(source: Path, out: Path, *, layout: str, weights: str = "raw") -> str:
    """Write weights of a run or checkpoint in another code base's layout and return how to open them there.

    Errors: UserError, with nothing written.
    """
    commit.check_new(out)
    if layout != "huggingface" and out.suffix != ".safetensors":
        raise errors.UserError(f"--out ({out}) must end in .safetensors")
    content = saved.contents(source)
    config, shape = content.config, variants.of_model(content.config.model)
    if shape is None:
        raise errors.UserError(f"model.variant ({config.model.variant}) must be a DeiT: {layout} has no such network")
    foreign = layouts.from_own(
        saved.student(content.tensors, weights, content.path),
        shape,
        layout=layout,
        image_size=config.data.image_size,
        num_classes=len(config.resolved.classes),
    )
    try:
        if layout == "huggingface":
            return f"{out}: {_write_huggingface(out, foreign, config, shape)}"
        with commit.whole(out) as under_way:
            weights_file.write(under_way, foreign)
    except OSError as error:
        raise errors.UserError(f"--out ({out}) can't be written: {error.strerror or error}") from error
    _warn_of_pixels(config)
    return f"{out}: {_timm_call(config, shape, out, layout)}"


def _warn_of_pixels(config: ConfigDict) -> None:
    """Log where pixels are normalised otherwise than timm's and facebookresearch/deit's transforms do it."""
    mean, std = tuple(config.model.mean), tuple(config.model.std)
    usual = base.get_config().model
    if (mean, std) != (tuple(usual.mean), tuple(usual.std)):
        logging.warning(
            "this network was trained with mean %s and std %s, which the file can't say: give them to "
            "timm.data.create_transform, whose own are ImageNet's",
            *(mean, std),
        )


def _timm_call(config: ConfigDict, shape: variants.Shape, out: Path, layout: str) -> str:
    """Return Python that opens an exported file in timm, its imports included."""
    name, modules = variants.untagged(config.model.variant), {"safetensors.torch", "timm"}
    options = {"img_size": config.data.image_size, "num_classes": len(config.resolved.classes)}
    arguments = []
    if "_micro_" in name:  # ours: timm has no such name
        network = f"timm.models.{'deit.VisionTransformerDistilled' if shape.distilled else 'VisionTransformer'}"
        options |= {"patch_size": shape.patch, "embed_dim": shape.dim, "depth": shape.depth, "num_heads": shape.heads}
        if shape.layer_scale:
            options |= {"init_values": shape.layer_scale, "no_embed_class": not shape.prefix_slots}
    else:
        network, arguments = "timm.create_model", [repr(name)]
        if config.model.patch:
            options["patch_size"] = shape.patch
    if shape.registers:
        options["reg_tokens"] = shape.registers
    arguments += [f"{option}={value!r}" for option, value in options.items()]
    if shape.norm_epsilon != variants.NORM_EPSILON:
        modules |= {"functools", "torch"}
        arguments.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={shape.norm_epsilon!r})")
    tensors = f"safetensors.torch.load_file({str(out)!r})"
    if layout == "facebook" and shape.layer_scale:  # models_v2.py of facebookresearch/deit has names of its own
        modules.add("re")
        tensors = f"{{re.sub(r'gamma_(.)', r'ls\\1.gamma', k): v for k, v in {tensors}.items()}}"
    imports = f"import {', '.join(sorted(modules))}"
    return f"{imports}; model = {network}({', '.join(arguments)}); model.load_state_dict({tensors})"


def _write_huggingface(out: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict, shape: variants.Shape) -> str:
    """Write the directory and return Python that opens it."""
    architecture, arguments = _architecture(config, shape)
    files = {
        "config.json": _network(config, shape, architecture),
        "preprocessor_config.json": _picture(config),
    }
    with commit.whole(out) as under_way:
        under_way.mkdir()
        weights_file.write(under_way / "model.safetensors", tensors)
        for name, content in files.items():
            (under_way / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return f"import transformers; model = transformers.{architecture}.from_pretrained({str(out)!r}{arguments})"


def _architecture(config: ConfigDict, shape: variants.Shape) -> tuple[str, str]:
    """Return the class of transformers that has these tensors, and what it must be told."""
    kind = "DeiT" if shape.distilled else "ViT"
    if not config.resolved.classes:
        return f"{kind}Model", ", add_pooling_layer=False"
    return f"{kind}ForImageClassification{'WithTeacher' if shape.two_heads else ''}", ""


def _network(config: ConfigDict, shape: variants.Shape, architecture: str) -> dict[str, Any]:
    """Return the content of config.json."""
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
        "layer_norm_eps": shape.norm_epsilon,
        "qkv_bias": True,
        "image_size": config.data.image_size,
        "patch_size": shape.patch,
        "num_channels": 3,
    }
    names = dict(enumerate(config.resolved.classes))
    if names:
        content["id2label"] = {str(index): name for index, name in names.items()}
        content["label2id"] = {name: index for index, name in names.items()}
    return content


def _picture(config: ConfigDict) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    side, crop = config.data.image_size, config.eval.crop_ratio
    before = int(side / (crop or 1.0))
    return {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": before, "width": before},
        "resample": 3 if crop else 2,
        "do_center_crop": bool(crop),
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.model.mean),
        "image_std": list(config.model.std),
    }
