"""The ops at fixed parameters beside Pillow's own calls: one list, for the table of tools/parity.py and for the tests.

Promises: a case runs our op in graph mode with its parameters as tensors, and the same photograph through Pillow;
differences are absolute, of uint8 values, in units of 1/255. Point ops may differ by 1 on average, resampling
ones by 2, the evaluation transform by 1. Parameters are those that RandAugment of magnitude 9 draws (levels
7.5 to 10 of 10, both signs), besides the neutral value and the ends of the range.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from importlib import resources

import numpy as np
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit.data import augment, decode, ops

POINT, RESAMPLING, EVALUATION = 1.0, 2.0, 1.0  # bounds of the mean difference of one picture, in 1/255
FILL = (124, 116, 104)  # ImageNet's mean colour, which RandAugment shows where a picture has moved away
SIZE = 224  # px of a crop and of an evaluated picture
CROP_SEEDS = 4  # windows drawn from each photograph

_ENHANCE = (0.1, 0.19, 0.325, 0.9, 1.0, 1.1, 1.675, 1.81, 1.9)
_ANGLES = (27.0, -27.0, 22.5, -22.5, 30.0, -30.0, 3.0, 0.0)
_SHEARS = (0.27, -0.27, 0.225, -0.225, 0.3, -0.3, 0.01, 0.0)
_SHIFTS = (90.72, -90.72, 75.6, -75.6, 100.8, -100.8, 7.0, -0.5, 0.0)  # px: level / 10 * .45 of 224
_RADII = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0)  # 3-Augment draws .1 to 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at fixed parameters.

    Attributes:
      op, parameter: for people.
      bound: what the mean difference of one picture may be, in 1/255.
      ours: uint8 [H, W, 3] (or an encoded image) -> uint8 [H', W', 3].
      pillow: the same by Pillow, of the same picture.
    """

    op: str
    parameter: str
    bound: float
    ours: Callable[[np.ndarray | bytes], np.ndarray]
    pillow: Callable[[Image.Image], Image.Image]

    def __str__(self) -> str:
        return f"{self.op} {self.parameter}".rstrip()


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; differences in 1/255.

    Attributes:
      mean: over all pictures; worst_mean: of the worst picture; largest: of one value of one pixel.
    """

    op: str
    parameter: str
    mean: float
    worst_mean: float
    largest: int
    bound: float


def sample_photos() -> dict[str, bytes]:
    """Return the two photographs that scikit-learn ships (640 x 427 px), as their JPEG files, by name."""
    folder = resources.files("sklearn.datasets.images")
    return {name: (folder / name).read_bytes() for name in ("china.jpg", "flower.jpg")}


def rows(photos: Sequence[bytes], cases: Iterable[Case] | None = None) -> list[Row]:
    """Return one row a case over encoded `photos`: image ops on each of their `views`, the others on the file."""
    pictures = [view for photo in photos for view in views(pixels(photo))]
    table = []
    for case in IMAGE_CASES + FILE_CASES if cases is None else cases:
        found = [difference(case, subject) for subject in (photos if case in FILE_CASES else pictures)]
        means, largest = zip(*found)
        table.append(Row(case.op, case.parameter, float(np.mean(means)), max(means), max(largest), case.bound))
    return table


def views(image: np.ndarray) -> list[np.ndarray]:
    """Return the central 224 x 224 px of uint8 [H, W, 3] and an uneven corner of 171 x 263 px, or what there is."""
    top, left = (max(0, (side - SIZE) // 2) for side in image.shape[:2])
    return [image[top : top + SIZE, left : left + SIZE], image[-171:, -263:]]


def difference(case: Case, subject: np.ndarray | bytes) -> tuple[float, int]:
    """Return the mean and the largest absolute difference in 1/255. Errors: AssertionError where the sizes differ."""
    expected = np.asarray(case.pillow(_as_pillow(subject)), np.int32)
    got = np.asarray(case.ours(subject))
    assert got.dtype == np.uint8 and got.shape == expected.shape, f"{case}: {got.dtype} {got.shape}, {expected.shape}"
    off = np.abs(got - expected)
    return float(off.mean()), int(off.max())


def pixels(encoded: bytes) -> np.ndarray:
    """Decode by Pillow: uint8 [H, W, 3]."""
    return np.asarray(_as_pillow(encoded))


def readable(encoded: bytes) -> bool:
    """Return whether both Pillow and our decoder decode an image."""
    try:
        pixels(encoded)
        decode.decode(encoded)
    except Exception:  # Pillow's many decoders raise what they like: OSError, SyntaxError, struct.error
        return False
    return True


def _as_pillow(subject: np.ndarray | bytes) -> Image.Image:
    if isinstance(subject, bytes):
        return Image.open(io.BytesIO(subject)).convert("RGB")
    return Image.fromarray(subject)


# --- image ops ------------------------------------------------------------------------------------------------


@functools.cache
def _graph(op: Callable, *kinds: str) -> Callable:
    """Return `op` as one graph for every size and parameter; `kinds`: dtype of each parameter, "fill" for a colour."""
    specs = [tf.TensorSpec([3] if kind == "fill" else [], "uint8" if kind == "fill" else kind) for kind in kinds]
    return tf.function(op, input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), *specs])


def _plain(name: str, op: Callable, pillow: Callable) -> list[Case]:
    return [Case(name, "", POINT, lambda image: _graph(op)(image).numpy(), pillow)]


def _each(
    name: str, op: Callable, pillow: Callable, values: Sequence[float], *, bound: float = POINT, dtype: str = "float32"
) -> list[Case]:
    """Return a case for each value of the op's one parameter; `pillow(image, value)`."""
    return [
        Case(
            name,
            f"{value:g}",
            bound,
            lambda image, value=value: _graph(op, dtype)(image, tf.constant(value, dtype)).numpy(),
            functools.partial(lambda value, image: pillow(image, value), value),
        )
        for value in values
    ]


def _moved(name: str, op: Callable, pillow: Callable, values: Sequence[float]) -> list[Case]:
    """Return a case for each value of an op that moves pixels and fills the rest; `pillow(image, value)`."""
    return [
        Case(
            name,
            f"{value:g}",
            RESAMPLING,
            lambda image, value=value: _graph(op, "float32", "fill")(image, tf.constant(value), FILL).numpy(),
            functools.partial(lambda value, image: pillow(image, value), value),
        )
        for value in values
    ]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR, fillcolor=FILL)


def posterize_by_pillow(image: Image.Image, bits: int) -> Image.Image:
    """Keep the highest 0 to 8 bits. From version 13 on Pillow refuses 0 bits, which made a black picture before."""
    return ImageOps.posterize(image, bits) if bits else image.point([0] * 768)


def solarize_add_by_pillow(image: Image.Image, addition: int) -> Image.Image:
    """By a table of 256 values, of which those below 128 gain `addition`: Pillow has no op of this name."""
    return image.point([min(255, value + addition) if value < 128 else value for value in range(256)] * 3)


IMAGE_CASES = (
    *_plain("autocontrast", ops.autocontrast, ImageOps.autocontrast),
    *_plain("equalize", ops.equalize, ImageOps.equalize),
    *_plain("invert", ops.invert, ImageOps.invert),
    *_plain("grayscale", ops.grayscale, lambda image: image.convert("L").convert("RGB")),
    *_each("posterize", ops.posterize, posterize_by_pillow, range(9), dtype="int32"),
    *_each("solarize", ops.solarize, ImageOps.solarize, (0, 26, 64, 128, 255, 256), dtype="int32"),
    *_each("solarize_add", ops.solarize_add, solarize_add_by_pillow, (0, 82, 99, 110, 128), dtype="int32"),
    *_each("color", ops.color, lambda image, factor: ImageEnhance.Color(image).enhance(factor), _ENHANCE),
    *_each("contrast", ops.contrast, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), _ENHANCE),
    *_each("brightness", ops.brightness, lambda image, f: ImageEnhance.Brightness(image).enhance(f), _ENHANCE),
    *_each(
        "sharpness",
        ops.sharpness,
        lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
        _ENHANCE,
        bound=RESAMPLING,
    ),
    *_each(
        "gaussian_blur",
        ops.gaussian_blur,
        lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)),
        _RADII,
        bound=RESAMPLING,
    ),
    *_moved(
        "rotate",
        ops.rotate,
        lambda image, degrees: image.rotate(degrees, Image.BILINEAR, fillcolor=FILL),
        _ANGLES,
    ),
    *_moved("shear_x", ops.shear_x, lambda image, factor: _affine(image, 1, factor, 0, 0, 1, 0), _SHEARS),
    *_moved("shear_y", ops.shear_y, lambda image, factor: _affine(image, 1, 0, 0, factor, 1, 0), _SHEARS),
    *_moved("translate_x", ops.translate_x, lambda image, px: _affine(image, 1, 0, px, 0, 1, 0), _SHIFTS),
    *_moved("translate_y", ops.translate_y, lambda image, px: _affine(image, 1, 0, 0, 0, 1, px), _SHIFTS),
)


# --- from the file to the model's input -----------------------------------------------------------------------


def _crop(seed: int, scale: tuple[float, float]) -> Case:
    """Return the crop of the window that `seed` draws: decoded alone by us, cut out of the whole picture by Pillow."""
    options = {"scale": scale, "ratio": (3 / 4, 4 / 3)}
    seeds = tf.constant([7, seed], tf.int64)

    def pillow(image: Image.Image) -> Image.Image:
        top, left, tall, wide = augment.crop_window(image.height, image.width, seeds, **options).numpy().tolist()
        return image.crop((left, top, left + wide, top + tall)).resize((SIZE, SIZE), Image.BICUBIC)

    return Case(
        "random_resized_crop",
        f"scale {scale[0]:g}..{scale[1]:g} #{seed}",
        RESAMPLING,
        lambda encoded: augment.random_resized_crop(encoded, seeds, size=SIZE, **options).numpy(),
        pillow,
    )


def _evaluation(crop_ratio: float) -> Case:
    return Case(
        "evaluation",
        f"crop_ratio {crop_ratio:g}",
        EVALUATION,
        lambda encoded: augment.evaluation(decode.decode(encoded), size=SIZE, crop_ratio=crop_ratio).numpy(),
        functools.partial(evaluation_by_pillow, crop_ratio=crop_ratio),
    )


def evaluation_by_pillow(image: Image.Image, *, crop_ratio: float, size: int = SIZE) -> Image.Image:
    """Evaluation of DeiT: short side int(size / crop_ratio) px, bicubic, torchvision's centre crop; 0: plain resize.

    torchvision cuts the long side off to whole pixels and rounds the crop's corner half to even.
    """
    if crop_ratio == 0:
        return image.resize((size, size), Image.BILINEAR)
    short, least = int(size / crop_ratio), min(image.size)
    image = image.resize(tuple(int(short * side / least) for side in image.size), Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


FILE_CASES = (
    Case("decode", "", EVALUATION, lambda encoded: decode.decode(encoded).numpy(), lambda image: image),
    *(_crop(seed, (0.08, 1.0)) for seed in range(CROP_SEEDS)),
    _crop(0, (0.08, 0.08)),
    _crop(0, (1.0, 1.0)),
    *(_evaluation(crop_ratio) for crop_ratio in (0.0, 0.875, 0.9, 1.0)),
)
