"""torch, timm and transformers, where they are installed: imported without TensorFlow, and torchvision mended."""

from __future__ import annotations

import importlib.util
from typing import Any

NEEDED = ("torch", "torchvision", "timm", "transformers")
_KEPT = []  # a library that is collected takes its names with it


def missing(wanted: tuple[str, ...] = NEEDED) -> list[str]:
    """Return which of the packages are not installed."""
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def torch_and_timm() -> tuple[Any, Any]:
    """Return (torch, timm)."""
    import torch

    # PyPI's torchvision is built for CUDA. Beside a torch for CPUs its compiled operations are absent, and it can't be
    # imported for lack of these two names, which timm never calls.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    import timm

    return torch, timm


def load() -> tuple[Any, Any, Any]:
    """Return (torch, timm, transformers)."""
    torch, timm = torch_and_timm()
    import transformers

    return torch, timm, transformers
