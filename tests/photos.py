"""Real photographs for tests, without network: scikit-learn's two in several sizes, and the flowers where they are."""

import functools
import io
import pathlib

import numpy as np
from PIL import Image

from configs import base
from deit.data import sources
from tools import parity_cases


@functools.cache
def files() -> dict[str, bytes]:
    """Return JPEG files by name: the originals (640 x 427 px) and others of odd, small and upright sizes."""
    originals = parity_cases.sample_photos()
    china, flower = (Image.fromarray(parity_cases.pixels(originals[name])) for name in ("china.jpg", "flower.jpg"))
    return {
        **originals,
        "upright": encode(china.transpose(Image.ROTATE_90), quality=92),
        "small": encode(flower.resize((201, 133), Image.LANCZOS), quality=90),
        "square": encode(china.crop((100, 0, 501, 401)), quality=85),
        "odd": encode(flower.resize((377, 283), Image.LANCZOS), quality=95, subsampling=0),
        "progressive": encode(china.resize((500, 333), Image.LANCZOS), quality=75, progressive=True),
    }


def opened(name: str) -> Image.Image:
    """Return one of `files` as Pillow decodes it."""
    return Image.fromarray(parity_cases.pixels(files()[name]))


def views() -> list[np.ndarray]:
    """Return the parts of the two originals that image ops are compared on: uint8 [H, W, 3]."""
    return [
        view
        for photo in parity_cases.sample_photos().values()
        for view in parity_cases.views(parity_cases.pixels(photo))
    ]


def small(side: int = 48) -> np.ndarray:
    """Return a photograph of side x side px, uint8."""
    whole = Image.fromarray(parity_cases.pixels(parity_cases.sample_photos()["china.jpg"]))
    return np.asarray(whole.crop((0, 0, 427, 427)).resize((side, side), Image.LANCZOS))


def flowers(directory: pathlib.Path, count: int) -> list[bytes]:
    """Return the files of the first `count` flowers in the TFDS directory of fixture `flowers_dir`."""
    data = base.get_config().data
    data.data_dir = str(directory)
    return sources.open_source(data, f"train[:{count}]").read(np.arange(count))[0]


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """Return the bytes of an image file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
