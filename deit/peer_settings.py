"""What other code bases keep beside their weights: how the network is built, what it does to a picture, its classes.

Hugging Face: config.json and preprocessor_config.json. timm on the hub: config.json with `pretrained_cfg`.

Promises: a file that is not there says nothing; one that is there is read or refused in a line that names it, the field
and the rule. What tensors don't show (attention heads, the activation) must be as in the variant: it would convert to
wrong logits without a word. What is done to a picture otherwise than evaluation here does it is warned of.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from deit import errors
from deit.models.variants import NORM_EPSILON, Shape

EPSILON_OF_HUGGINGFACE = 1e-12  # transformers' DeiTConfig and ViTConfig
_CONFIG, _PICTURE = "config.json", "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What lies beside a weights file; None where nothing is said.

    Attributes:
      where: the directory.
      norm_epsilon: of the layer normalisations.
      mean, std: of pixels in [0, 1], three each.
      crop_ratio: as eval.crop_ratio.
      labels: {index: name}, Hugging Face's id2label, unchecked: a classifier that is dropped needs none.
    """

    where: Path
    norm_epsilon: float = NORM_EPSILON
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_ratio: float | None = None
    labels: Any = None

    def files(self) -> tuple[Path, ...]:
        """Return what was there to be read."""
        return tuple(path for name in (_CONFIG, _PICTURE) if (path := self.where / name).is_file())

    def class_names(self) -> tuple[str, ...]:
        """Return the names in the order of the logits; () without, or where transformers made them up.

        A name that several classes have gets their numbers: "crane (134)", "crane (517)". Errors: UserError.
        """
        if self.labels is None:
            return ()
        path = self.where / _CONFIG
        names = _by_index(self.labels)
        if names is None:
            raise errors.UserError(f"{path}: the labels must be a name for each of the indices 0 to classes - 1")
        if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
            return ()
        times = collections.Counter(names)
        numbered = tuple(f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names))
        if len(set(numbered)) != len(numbered):
            again = sorted(name for name, count in collections.Counter(numbered).items() if count > 1)
            raise errors.UserError(f"{path}: the labels have {again[0]!r} twice")
        return numbered


def read(where: Path, layout: str, shape: Shape) -> Settings:
    """Return what lies in a directory beside weights of a layout, held against the variant. Errors: UserError."""
    if layout == "huggingface":
        return _huggingface(where, shape)
    return _timm(where, shape)


def _huggingface(where: Path, shape: Shape) -> Settings:
    content, path = _object(where / _CONFIG), where / _CONFIG
    wanted = {
        "num_attention_heads": shape.num_heads,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "intermediate_size": 4 * shape.dim,
    }
    for name, value in wanted.items():
        _check_same(path, name, content.get(name, value), value)
    epsilon = _epsilon(path, content, EPSILON_OF_HUGGINGFACE)
    return Settings(where, epsilon, labels=content.get("id2label"), **_picture(where / _PICTURE))


def _epsilon(path: Path, content: Mapping[str, Any], usual: float) -> float:
    epsilon = content.get("layer_norm_eps", usual)
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        raise errors.UserError(f"{path}: layer_norm_eps ({epsilon!r}) must be a number between 0 and 1")
    return float(epsilon)


def _picture(path: Path) -> dict[str, Any]:
    """Return {mean, std, crop_ratio} as far as an image processor says them."""
    content, found = _object(path), {}
    if not content:
        return found
    factor = content.get("rescale_factor", 1 / 255)
    if content.get("do_rescale", True) is not True or not _is_number(factor) or not math.isclose(factor * 255, 1.0):
        raise errors.UserError(f"{path}: do_rescale must be true and rescale_factor 1/255, as pixels are scaled here")
    if content.get("do_normalize", True):
        found["mean"] = _three(path, "image_mean", content.get("image_mean"))
        found["std"] = _three(path, "image_std", content.get("image_std"), least=0.0)
    else:
        found["mean"], found["std"] = (0.0,) * 3, (1.0,) * 3
    found["crop_ratio"] = _crop_ratio(path, content)
    method = content.get("resample")
    method = _RESAMPLE.get(method, method) if isinstance(method, int) else method
    _warn_of(path, "resample", method, found["crop_ratio"])
    return found


def _crop_ratio(path: Path, content: Mapping[str, Any]) -> float | None:
    """Return eval.crop_ratio: side of the centre crop / side before it; 0 = resized without a crop."""
    if not content.get("do_resize", True) or "size" not in content:
        return None
    size = _side(path, "size", content["size"])
    if not content.get("do_center_crop", "crop_size" in content):
        return None if isinstance(content["size"], Mapping) and "shortest_edge" in content["size"] else 0.0
    crop = _side(path, "crop_size", content.get("crop_size", size))
    if isinstance(content["size"], Mapping) and "shortest_edge" not in content["size"] and crop != size:
        logging.warning("%s: size (%s): here the short side is resized and the aspect kept", path, content["size"])
    ratio = crop / size
    if int(crop / ratio) != size:  # evaluation resizes to int(S / ratio): 384 / (384 / 438) may round down
        ratio = math.nextafter(ratio, 0.0)
    return _ratio(path, "crop_size / size", ratio)


def _side(path: Path, name: str, value: Any) -> int:
    """Return the px of a side: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    sides = set(value.values()) if isinstance(value, Mapping) and _hashable(value.values()) else {0}
    side = next(iter(sides)) if len(sides) == 1 else 0
    side = value if isinstance(value, int) else side
    if isinstance(side, bool) or not isinstance(side, int) or side <= 0:
        raise errors.UserError(f"{path}: {name} ({value!r}) must be the px of a square")
    return side


def _timm(where: Path, shape: Shape) -> Settings:
    """Return what timm's config.json says: `pretrained_cfg`, or the same fields at its top in older ones."""
    path = where / _CONFIG
    content = _object(path)
    if not {"architecture", "pretrained_cfg"} & content.keys():
        return Settings(where)  # of something else
    arguments = content.get("model_args") or {}
    if isinstance(arguments, Mapping):
        _check_same(path, "model_args.num_heads", arguments.get("num_heads", shape.num_heads), shape.num_heads)
        for name, value in _TIMM.items():
            _check_same(path, f"model_args.{name}", arguments.get(name) or value, value)
    _check_same(path, "global_pool", content.get("global_pool") or "token", "token")
    fields = content.get("pretrained_cfg", content)
    if not isinstance(fields, Mapping):
        raise errors.UserError(f"{path}: pretrained_cfg must be an object")
    found = {name: _three(path, name, fields[name], least) for name, least in _LEAST.items() if name in fields}
    if fields.get("crop_pct") is not None:
        found["crop_ratio"] = _ratio(path, "crop_pct", fields["crop_pct"])
        if (fields["crop_pct"], fields.get("crop_mode")) == (1, "squash"):
            found["crop_ratio"] = 0.0  # resized to the square, whatever the picture's sides
        elif fields.get("crop_mode", "center") not in ("center", None):
            logging.warning("%s: crop_mode (%s): here the centre is cropped", path, fields["crop_mode"])
    _warn_of(path, "interpolation", fields.get("interpolation"), found.get("crop_ratio"))
    names = content.get("label_names", fields.get("label_names", fields.get("labels")))
    labels = dict(enumerate(names)) if isinstance(names, list) else names
    return Settings(where, _epsilon(path, content, NORM_EPSILON), labels=labels, **found)


_LEAST = {"mean": -math.inf, "std": 0.0}
_TIMM = {"act_layer": "gelu", "norm_layer": None, "global_pool": "token"}  # of a VisionTransformer, unless it says so
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _warn_of(path: Path, name: str, method: Any, crop_ratio: float | None) -> None:
    """Warn where a picture was resized by another method than evaluation's."""
    ours = "bilinear" if crop_ratio == 0 else "bicubic"
    if method not in (None, ours):
        logging.warning("%s: %s (%s): here a picture is resized %s", path, name, method, ours)


def _object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, {} where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise errors.UserError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{path} must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise errors.UserError(f"{path} must be a JSON object, not {type(content).__name__}")
    return content


def _check_same(path: Path, name: str, have: Any, wanted: Any) -> None:
    if type(have) is not type(wanted) or have != wanted:
        raise errors.UserError(f"{path}: {name} ({have!r}) must be {wanted!r}: it is another network than --variant")


def _three(path: Path, name: str, value: Any, least: float = -math.inf) -> tuple[float, ...]:
    if not (isinstance(value, Sequence) and len(value) == 3 and all(_is_number(v) and v > least for v in value)):
        rule = "three numbers above 0" if least == 0.0 else "three numbers"
        raise errors.UserError(f"{path}: {name} ({value!r}) must be {rule}")
    return tuple(float(v) for v in value)


def _ratio(path: Path, name: str, value: Any) -> float:
    if not (_is_number(value) and 0.25 <= value <= 1):  # the rule of eval.crop_ratio
        raise errors.UserError(f"{path}: {name} ({value!r}) must be between 0.25 and 1")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not, either


def _hashable(values: Any) -> bool:
    return all(isinstance(value, int | float | str) for value in values)


def _by_index(labels: Any) -> list[str] | None:
    """Return the names of {"0": name, ...}; None where it is no such thing."""
    try:
        names = {int(index): name for index, name in labels.items()}
    except (ValueError, TypeError, AttributeError):
        return None
    if sorted(names) != list(range(len(labels))) or not all(isinstance(n, str) and n.strip() for n in names.values()):
        return None
    return [names[index] for index in range(len(names))]
