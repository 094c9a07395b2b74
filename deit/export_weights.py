"""Weights of a run or checkpoint in another code base's layout: tools/convert_weights.py --to.

Promises: the line that comes back is Python that opens what was written, with the same logits, in timm or transformers;
a directory says what the network does to a picture and what its classes are called, as its code base says it; a network
that the other code base has not is refused before anything is written, and nothing that exists is replaced.
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

    `out`: a directory; of facebookresearch/deit, which has none of its own, a .safetensors file.
    Errors: UserError, with nothing written.
    """
    commit.check_new(out)
    if (out.suffix == ".safetensors") != (layout == "facebook"):
        kind = "end in .safetensors" if layout == "facebook" else f"be a directory, which {layout} opens as a whole"
        raise errors.UserError(f"--out ({out}) must {kind}")
    content = saved.contents(source)
    config, shape = content.config, variants.of_model(content.config.model)
    if shape is None:
        raise errors.UserError(f"model.variant ({config.model.variant}) must be a DeiT: {layout} has no such network")
    tensors = layouts.from_own(
        saved.student(content.tensors, weights, content.path),
        shape,
        layout=layout,
        image_size=config.data.image_size,
        num_classes=len(config.resolved.classes),
    )
    try:
        return f"{out}: {_WRITE[layout](out, tensors, config, shape)}"
    except OSError as error:
        raise errors.UserError(f"--out ({out}) can't be written: {error.strerror or error}") from error


def _write_directory(out: Path, tensors: Mapping[str, np.ndarray], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write model.safetensors and JSON files. Errors: OSError."""
    with commit.whole(out) as under_way:
        under_way.mkdir()
        weights_file.write(under_way / "model.safetensors", tensors)
        for name, content in files.items():
            (under_way / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_facebook(out: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict, shape: variants.Shape) -> str:
    """Write the file and return Python that opens it in timm, whose networks have the same parts."""
    mean, std = tuple(config.model.mean), tuple(config.model.std)
    usual = base.get_config().model
    if (mean, std) != (tuple(usual.mean), tuple(usual.std)):
        logging.warning(
            "this network was trained with mean %s and std %s, which the file can't say, instead of ImageNet's",
            *(mean, std),
        )
    with commit.whole(out) as under_way:
        weights_file.write(under_way, tensors)
    name, options = _timm_network(config, shape)
    arguments = [repr(name), *(f"{option}={value!r}" for option, value in options.items()), *_norm_layer(shape)]
    modules, opened = {"safetensors.torch", *_modules(shape)}, f"safetensors.torch.load_file({str(out)!r})"
    if shape.layer_scale:  # models_v2.py of facebookresearch/deit has names of its own
        modules.add("re")
        opened = f"{{re.sub(r'gamma_(.)', r'ls\\1.gamma', k): v for k, v in {opened}.items()}}"
    call = f"timm.create_model({', '.join(arguments)})"
    return f"import {', '.join(sorted(modules))}; model = {call}; model.load_state_dict({opened})"


def _write_timm(out: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict, shape: variants.Shape) -> str:
    """Write the directory and return Python that opens it."""
    name, options = _timm_network(config, shape)
    side, crop, classes = config.data.image_size, config.eval.crop_ratio, list(config.resolved.classes)
    content = {
        "architecture": name,
        "num_classes": len(classes),
        "model_args": options,
        "layer_norm_eps": shape.norm_epsilon,  # ours to read back: timm has no name for it
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic" if crop else "bilinear",
            "crop_pct": crop or 1.0,
            "crop_mode": "center" if crop else "squash",
            "mean": list(config.model.mean),
            "std": list(config.model.std),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if shape.two_heads else "head",
            **({"label_names": classes} if classes else {}),
        },
    }
    _write_directory(out, tensors, {"config.json": content})
    arguments = [repr(f"local-dir:{out}"), "pretrained=True", *_norm_layer(shape)]
    return f"import {', '.join(sorted(_modules(shape)))}; model = timm.create_model({', '.join(arguments)})"


def _timm_network(config: ConfigDict, shape: variants.Shape) -> tuple[str, dict[str, Any]]:
    """Return timm's name of the network and what it must be told beside."""
    name = variants.untagged(config.model.variant)
    options = {"img_size": config.data.image_size, "num_classes": len(config.resolved.classes)}
    if "_micro_" in name:  # ours: timm has no such name
        name = "deit_tiny_distilled_patch16_224" if shape.distilled else "deit_tiny_patch16_224"
        name = "deit3_small_patch16_224" if shape.layer_scale else name
        options |= {"embed_dim": shape.dim, "depth": shape.depth, "num_heads": shape.num_heads}
    if shape.patch != variants.of_name(name).patch:
        options["patch_size"] = shape.patch
    if shape.registers:
        options["reg_tokens"] = shape.registers
    return name, options


def _norm_layer(shape: variants.Shape) -> list[str]:
    """Return timm's argument that says the epsilon where it is not timm's own, which JSON can't."""
    if shape.norm_epsilon == variants.NORM_EPSILON:
        return []
    return [f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={shape.norm_epsilon!r})"]


def _modules(shape: variants.Shape) -> set[str]:
    return {"timm", *(("functools", "torch") if _norm_layer(shape) else ())}


def _write_huggingface(out: Path, tensors: Mapping[str, np.ndarray], config: ConfigDict, shape: variants.Shape) -> str:
    """Write the directory and return Python that opens it."""
    architecture, arguments = _architecture(config, shape)
    files = {"config.json": _network(config, shape, architecture), "preprocessor_config.json": _picture(config)}
    _write_directory(out, tensors, files)
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
        "num_attention_heads": shape.num_heads,
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
    before = int(side / crop) if crop else side
    return {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": before} if crop else {"height": before, "width": before},
        "resample": 3 if crop else 2,
        "do_center_crop": bool(crop),
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.model.mean),
        "image_std": list(config.model.std),
    }


_WRITE = {"timm": _write_timm, "facebook": _write_facebook, "huggingface": _write_huggingface}
