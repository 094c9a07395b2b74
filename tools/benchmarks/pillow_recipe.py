"""DeiT's augmentation of one image with Pillow's own operations (Touvron et al., arXiv:2012.12877, section 6).

It is the work of deit/data/views.py as timm does it, for comparison only. Imports Pillow and NumPy, never TensorFlow.
"""

import dataclasses
import math
import random
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to an image; the defaults are DeiT's. `num_ops` 0, `erasing` 0, `mix` False: crop and flip.

    Attributes:
      style: `timm` takes timm's steps: bicubic affine operations, batches [B, 3, S, S] as PyTorch wants them, each
        image mixed in float32 by itself. `lean` does as little as the recipe allows: bilinear affine operations (as
        the stream), batches [B, S, S, 3], mixing of pairs in place.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    num_ops: int = 2  # RandAugment
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    op_probability: float = 0.5
    erasing: float = 0.25
    mix: bool = True  # one lambda a batch, partner = the batch reversed
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_switch: float = 0.5
    style: str = "timm"  # timm | lean
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


STYLES = {"timm": "as timm", "lean": "lean"}


def augmented(encoded: memoryview, recipe: Recipe, rng: random.Random) -> Image.Image:
    """Decode, random-resized-crop (bicubic), flip, RandAugment."""
    image = Image.open(BytesIO(encoded)).convert("RGB")
    left, top, width, height = crop_window(*image.size, recipe, rng)
    image = image.crop((left, top, left + width, top + height)).resize((recipe.size, recipe.size), Image.BICUBIC)
    if rng.random() < recipe.flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    affine = {"timm": Image.BICUBIC, "lean": Image.BILINEAR}[recipe.style]
    fill = tuple(min(255, round(255 * channel)) for channel in recipe.mean)
    for operation in rng.choices(OPERATIONS, k=recipe.num_ops):
        if rng.random() < recipe.op_probability:
            level = min(10.0, max(0.0, rng.gauss(recipe.magnitude, recipe.magnitude_std)))
            image = operation(image, level / 10, rng.choice((-1, 1)), fill, affine)
    return image


def crop_window(width: int, height: int, recipe: Recipe, rng: random.Random) -> tuple[int, int, int, int]:
    """Draw left, top, width, height by torchvision's law."""
    low, high = (math.log(bound) for bound in recipe.ratio)
    for _ in range(10):
        area = width * height * rng.uniform(*recipe.scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    aspect = min(max(width / height, recipe.ratio[0]), recipe.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def _enhance(kind) -> Callable:
    return lambda image, share, sign, *_: kind(image).enhance(max(0.1, 1 + sign * 0.9 * share))


def _affine(matrix: Callable[[float, Image.Image], tuple]) -> Callable:
    return lambda image, share, sign, fill, resample: image.transform(
        image.size, Image.AFFINE, matrix(sign * share, image), resample, fillcolor=fill
    )


def _solarize_add(image: Image.Image, share: float, *_) -> Image.Image:
    addition = min(128, int(share * 110))
    table = [min(255, i + addition) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


# timm's "increasing" set, its order and its magnitudes; `share` is the level / 10.
OPERATIONS: tuple[Callable[[Image.Image, float, int, tuple, int], Image.Image], ...] = (
    lambda image, *_: ImageOps.autocontrast(image),
    lambda image, *_: ImageOps.equalize(image),
    lambda image, *_: ImageOps.invert(image),
    lambda image, share, sign, fill, resample: image.rotate(sign * share * 30, resample, fillcolor=fill),
    lambda image, share, *_: ImageOps.posterize(image, max(1, 4 - int(share * 4))),
    lambda image, share, *_: ImageOps.solarize(image, 256 - min(256, int(share * 256))),
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _affine(lambda level, _: (1, level * 0.3, 0, 0, 1, 0)),
    _affine(lambda level, _: (1, 0, 0, level * 0.3, 1, 0)),
    _affine(lambda level, image: (1, 0, level * 0.45 * image.width, 0, 1, 0)),
    _affine(lambda level, image: (1, 0, 0, 0, 1, level * 0.45 * image.height)),
)


def erase(pixels: np.ndarray, recipe: Recipe, rng: random.Random, noise: np.random.Generator) -> None:
    """Fill a random box of uint8 [H, W, 3] with noise, N(0, 1) in the model's scale, with the recipe's probability."""
    if rng.random() >= recipe.erasing:
        return
    height, width = pixels.shape[:2]
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            drawn = noise.standard_normal((h, w, 3), np.float32)
            drawn *= np.float32(255) * np.float32(recipe.std)
            drawn += np.float32(255) * np.float32(recipe.mean)
            pixels[top : top + h, left : left + w] = np.clip(drawn, 0, 255, out=drawn)
            return
