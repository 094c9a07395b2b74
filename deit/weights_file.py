"""Weight files of other code bases: safetensors, and .pth where torch is installed.

Promises: no pickle is ever opened but by torch's own loader of tensors (`weights_only=True`), which runs no code, and
no message says how to open one otherwise; a file that is cut short, damaged, of half precision, or no weights at all is
refused in one line that names the tensor where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from deit import errors

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_LARGEST = 2**28  # elements: a gigabyte, forty times the largest tensor of DeiT-III
_REFUSED = re.compile(r"(?:GLOBAL|Unsupported class|Trying to load unsupported GLOBAL) ([\w.]+)")  # torch's message


def read(path: Path) -> dict[str, np.ndarray]:
    """Return a file's tensors by name, float32. A directory stands for its model.safetensors. Errors: UserError."""
    path = file_of(path)
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix in _PICKLES:
            return _pickled(path)
    except OSError as error:
        raise errors.UserError(f"{path} can't be read: {error.strerror or error}") from error
    raise errors.UserError(f"{path} must end in .safetensors or {', '.join(_PICKLES)}")


def file_of(path: Path) -> Path:
    """Return the weights file that a path means. Errors: UserError where there is none."""
    found = path / "model.safetensors" if path.is_dir() else path
    if found.is_file():
        return found
    others = [name for name in ("pytorch_model.bin", "model.safetensors.index.json") if (path / name).is_file()]
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        raise errors.UserError(f"{path} is a run or checkpoint of this code base: --to=timm (or another) converts it")
    if others == ["pytorch_model.bin"]:
        raise errors.UserError(f"{found} is no file; this directory's weights are a pickle: --from={path / others[0]}")
    if others:
        raise errors.UserError(f"{found} is no file; these weights are in several files, which no DeiT needs")
    raise errors.UserError(f"{found} is no file")


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as PyTorch's libraries expect it. Errors: OSError."""
    path.write_bytes(safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}))


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  a file is no dict
                kind = file.get_slice(name).get_dtype()
                if kind != "F32":
                    raise errors.UserError(_not_float32(path, name, kind))
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise errors.UserError(f"{path} is no whole safetensors file: {error}") from error


def _pickled(path: Path) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("torch") is None:
        raise errors.UserError(
            f"{path} is a pickle, which only torch opens safely: pip install torch, or, where it is: python -c "
            f'"import argparse, torch, safetensors.torch as t; torch.serialization.add_safe_globals('
            f"[argparse.Namespace]); w = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
            f"w = w.get('model', w); w = w.get('state_dict', w); "
            f"t.save_file({{k: v.detach().contiguous() for k, v in w.items()}}, '{path.stem}.safetensors')\""
        )
    content = _unpickled(path)
    for key in ("model", "state_dict"):  # facebookresearch/deit's and other trainers' files
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            if key == "model" and "model_ema" in content:
                logging.info("%s: `model` is taken; `model_ema`, its average, is left alone", path)
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise errors.UserError(f"{path} must hold a dict of tensors by name, not {type(content).__name__}")
    return {name: _array(path, name, tensor) for name, tensor in content.items()}


def _unpickled(path: Path) -> Any:
    """Return what torch's loader of tensors finds in a file. Errors: OSError, UserError."""
    import torch

    try:
        # Training checkpoints of facebookresearch/deit hold their arguments, which are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: what can't be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes torch fail in every way
        # Never torch's own text, which recommends weights_only=False.
        found = _REFUSED.search(str(error))
        why = f"it asks for {found[1]}" if found else "it is cut short or no file of torch.save"
        raise errors.UserError(f"{path} holds no plain tensors, and nothing else is loaded: {why}") from None


def _array(path: Path, name: Any, tensor: Any) -> np.ndarray:
    import torch

    if not isinstance(name, str):
        raise errors.UserError(f"{path}: the key {name!r} must be the name of a tensor")
    if not isinstance(tensor, torch.Tensor):
        raise errors.UserError(f"{path}: {name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype != torch.float32:
        raise errors.UserError(_not_float32(path, name, str(tensor.dtype)))
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = tensor.device.type if tensor.layout == torch.strided else str(tensor.layout)
        raise errors.UserError(f"{path}: {name} must be a dense tensor, not {kind}")
    if tensor.numel() > _LARGEST:  # a petabyte can be a view of a few bytes
        raise errors.UserError(f"{path}: {name} has shape {list(tensor.shape)}, more than any network's")
    return tensor.detach().contiguous().numpy()


def _not_float32(path: Path, name: str, kind: str) -> str:
    return f"{path}: {name} is {kind}, not float32: convert the file where it came from"
