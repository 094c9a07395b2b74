"""timm, facebookresearch/deit's layout and transformers beside ours: same weights, same pictures, same logits?

Needs the extra `peers` of setup.py (torch, timm, transformers). Nothing is downloaded: their networks are initialised
at random and scattered, so that no bias is zero, no scale one and no two heads alike.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deit import convert, export_weights, saved
from deit.models import paths, variants
from tools.peer_packages import load

WITHIN = 1e-4  # absolute difference of a logit, float32
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: a variant, where its weights come from (timm, facebook, huggingface), the side in px."""

    variant: str
    source: str
    size: int

    def __str__(self) -> str:
        return f"{self.variant} {self.source} {self.size}"


@dataclasses.dataclass(frozen=True)
class Row:
    """What a comparison found.

    Attributes:
      difference: the largest of any logit of any head, absolute.
      largest: the largest logit, for scale.
      parameters: of both networks, which must agree.
      round_trip: whether their tensors came back from our checkpoint bit for bit; None at a resized resolution.
    """

    case: Case
    difference: float
    largest: float
    parameters: int
    round_trip: bool | None

    @property
    def agrees(self) -> bool:
        """Whether the logits are the same within 1e-4 and the tensors came back, where that was asked."""
        return self.difference <= WITHIN and self.round_trip is not False  # nan is within nothing


def compare(case: Case, *, classes: int = 1000) -> Row:
    """Convert their weights, compare the logits of two pictures, and convert back."""
    with tempfile.TemporaryDirectory() as scratch:
        return _SOURCES[case.source](case, Path(scratch), classes)


def _timm(case: Case, scratch: Path, classes: int) -> Row:
    torch, timm, _ = load()
    model = scatter(timm.create_model(case.variant, num_classes=classes))
    state = model.state_dict()
    file = scratch / "theirs.safetensors"
    if case.source == "facebook":
        renamed = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in state.items()}
        file = scratch / "theirs.pth"
        torch.save({"model": renamed}, file)
    else:
        _save(state, file)
    if case.size != variants.size_of(case.variant):
        resized = timm.create_model(case.variant, num_classes=classes, img_size=case.size)
        resized.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, resized))
        model = resized.eval()
    images = pictures(2, case.size)
    return _finish(case, scratch, file, images, timm_logits(model, images), _count(model))


def _count(model: Any) -> int:
    return sum(value.numel() for value in model.parameters())


def timm_logits(model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return each head's logits; timm itself gives only their mean outside training."""
    torch, _, _ = load()
    with torch.no_grad():
        if not hasattr(model, "head_dist"):
            return {"cls": model(_normalised(images)).numpy()}
        tokens = model.forward_features(_normalised(images))
        return {"cls": model.head(tokens[:, 0]).numpy(), "dist": model.head_dist(tokens[:, 1]).numpy()}


def _huggingface(case: Case, scratch: Path, classes: int) -> Row:
    _, _, transformers = load()
    shape, native = variants.of_name(case.variant), variants.size_of(case.variant)
    sizes = {
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": 4 * shape.dim,
        "image_size": native,
        "patch_size": shape.patch,
        "num_labels": classes,
    }
    if shape.distilled:
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    scatter(model).save_pretrained(scratch / "theirs")
    if case.size != native:  # theirs resamples with another cubic: our grid is opened there
        convert.load(scratch / "theirs", scratch / "resized", variant=case.variant, image_size=case.size)
        export_weights.export(scratch / "resized", scratch / "back", layout="huggingface")
        model = type(model).from_pretrained(scratch / "back").eval()
    images = pictures(2, case.size)
    outputs = _huggingface_logits(model, images)
    return _finish(case, scratch, scratch / "theirs", images, outputs, _count(model))


def _huggingface_logits(model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    torch, _, _ = load()
    with torch.no_grad():
        found = model(pixel_values=_normalised(images))
    if hasattr(found, "cls_logits"):
        return {"cls": found.cls_logits.numpy(), "dist": found.distillation_logits.numpy()}
    return {"cls": found.logits.numpy()}


def _finish(case: Case, scratch: Path, file: Path, images, expected, theirs: int) -> Row:
    native = variants.size_of(case.variant)
    convert.load(file, scratch / "ours", variant=case.variant, image_size=case.size)
    opened = saved.open_network(scratch / "ours")
    got = {name: value.numpy() for name, value in opened.network.logits(images).items()}
    assert got.keys() == expected.keys(), f"{case}: heads {sorted(got)}, theirs {sorted(expected)}"
    count = sum(int(np.prod(v.shape)) for _, v in paths.variables(opened.network.model))
    assert count == theirs, f"{case}: {count} parameters, theirs {theirs}"
    del opened
    round_trip = _comes_back(case, scratch, file) if case.size == native else None
    gc.collect()
    difference = float(np.max([np.abs(got[name] - expected[name]).max() for name in got]))  # nan if any is
    largest = float(np.max([np.abs(value).max() for value in expected.values()]))
    return Row(case, difference, largest, theirs, round_trip)


def _comes_back(case: Case, scratch: Path, file: Path) -> bool:
    """Return whether their file and what we export again hold the same tensors bit for bit."""
    import safetensors.numpy

    out = scratch / ("again.safetensors" if case.source == "facebook" else "again")
    export_weights.export(scratch / "ours", out, layout=case.source)
    back = safetensors.numpy.load_file(out / "model.safetensors" if out.is_dir() else out)
    if file.suffix == ".pth":
        torch, _, _ = load()
        before = {name: v.numpy() for name, v in torch.load(file, weights_only=True)["model"].items()}
    else:
        before = safetensors.numpy.load_file(file / "model.safetensors" if file.is_dir() else file)
    return before.keys() == back.keys() and all(
        before[name].shape == back[name].shape and before[name].tobytes() == back[name].tobytes() for name in before
    )


def scatter(model: Any, seed: int = 0) -> Any:
    """Give every parameter a value that shows in the logits, and return the model in evaluation mode."""
    torch, _, _ = load()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            norm_scale = "norm" in name and name.endswith("weight")
            value.copy_(norm_scale + (0.2 if "gamma" in name else 0.04) * torch.randn(value.shape, generator=draws))
    return model.eval()


def pictures(count: int, size: int) -> np.ndarray:
    """Return pixels in [0, 255], float32 [count, size, size, 3], coarse squares under noise."""
    random = np.random.default_rng(3)
    side = -(-size // 8)
    coarse = np.kron(random.uniform(0, 255, [count, side, side, 3]), np.ones([1, 8, 8, 1]))[:, :size, :size]
    return np.clip(coarse + random.normal(0, 12, coarse.shape), 0, 255).astype(np.float32)


def _normalised(images: np.ndarray) -> Any:
    torch, _, _ = load()
    return torch.from_numpy(np.ascontiguousarray(((images / 255 - _MEAN) / _STD).transpose(0, 3, 1, 2), np.float32))


def _save(state: dict[str, Any], path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({name: value.contiguous() for name, value in state.items()}, path)


_SOURCES = {"timm": _timm, "facebook": _timm, "huggingface": _huggingface}
CASES = (
    *(
        Case(f"deit_{size}{distilled}_patch16_224", "timm", px)
        for size in ("tiny", "small", "base")
        for distilled in ("", "_distilled")
        for px in (224, 288)
    ),
    *(Case(f"deit_base{distilled}_patch16_384", "timm", 384) for distilled in ("", "_distilled")),
    *(
        Case(f"deit3_{size}_patch16_224", "timm", px)
        for size in ("small", "medium", "base", "large")
        for px in (224, 288)
    ),
    Case("deit3_small_patch16_384", "timm", 384),
    Case("deit3_huge_patch14_224", "timm", 224),
    Case("deit_tiny_distilled_patch16_224", "facebook", 224),
    Case("deit3_small_patch16_224", "facebook", 224),
    *(
        Case(f"deit_{size}{distilled}_patch16_224", "huggingface", px)
        for size in ("tiny", "small", "base")
        for distilled in ("", "_distilled")
        for px in (224, 288)
    ),
)
