"""Weight files of other code bases: safetensors, and .pth where torch is installed.

Promises: no pickle is ever opened but by torch's own loader of tensors (`weights_only=True`), which runs no code; a
file that is cut short, of half precision, or no weights at all is refused in a line that names the tensor where there
is one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from deit import errors

_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


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
    if not found.is_file():
        raise errors.UserError(f"{found} is no file")
    return found


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(path: Path) -> dict:
    """Return the config.json beside Hugging Face weights, {} where there is none that can be read."""
    try:
        content = json.loads((file_of(path).parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def class_names(content: dict) -> tuple[str, ...]:
    """Return the names in `settings`, in the order of the logits; () without, or where they are made up."""
    try:
        names = {int(index): str(name) for index, name in content["id2label"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()
    if sorted(names) != list(range(len(names))) or all(name == f"LABEL_{index}" for index, name in names.items()):
        return ()
    return tuple(names[index] for index in range(len(names)))


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
            f'"import torch, safetensors.torch as t; w = torch.load({path.name!r}, weights_only=True); '
            f"t.save_file({{k: v.contiguous() for k, v in w.get('model', w).items()}}, '{path.stem}.safetensors')\""
        )
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise errors.UserError(f"{path} holds no plain tensors, and nothing else is loaded: {first}") from None
    for key in ("model", "state_dict"):  # facebookresearch/deit's and other trainers' files
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict) or not content:
        raise errors.UserError(f"{path} must hold a dict of tensors by name, not {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise errors.UserError(f"{path}: {name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dtype != torch.float32:
            raise errors.UserError(_not_float32(path, name, str(tensor.dtype)))
    return {name: tensor.contiguous().numpy() for name, tensor in content.items()}


def _not_float32(path: Path, name: str, kind: str) -> str:
    return f"{path}: {name} is {kind}, not float32: convert the file where it came from"


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as PyTorch's libraries expect it. Errors: OSError."""
    path.write_bytes(safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}))
