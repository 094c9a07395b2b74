"""Every kind of image file becomes the RGB pixels that Pillow sees, or no bytes at all."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import ndimage

from configs import base
from deit.data import augment, decode, sources, transcode

W, H = 97, 64  # odd, so that rows of a BMP need padding
SIZE = 48


def pixels() -> np.ndarray:
    """Return four smooth channels that use all values: uint8 [H, W, 4]."""
    noise = np.random.RandomState(0).rand(4, H, W)
    smooth = np.stack([ndimage.gaussian_filter(channel, 3) for channel in noise], -1)
    low, high = smooth.min(), smooth.max()
    return np.rint((smooth - low) / (high - low) * 255).astype(np.uint8)


def file(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


RGB = Image.fromarray(pixels()[..., :3])
RGBA = Image.merge("RGBA", [Image.fromarray(channel) for channel in np.moveaxis(pixels(), -1, 0)])
CMYK = Image.merge("CMYK", RGBA.split())
GREY = Image.fromarray(pixels()[..., 0])
GREY_ALPHA = Image.merge("LA", [GREY, RGBA.split()[3]])
PALETTE = RGB.quantize(64)
SIXTEEN_BITS = Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)

# name -> bytes, as Pillow writes them
FILES = {
    "jpeg": file(RGB, "JPEG", quality=90),
    "jpeg progressive": file(RGB, "JPEG", quality=90, progressive=True),
    "jpeg grey": file(GREY, "JPEG", quality=90),
    "jpeg cmyk": file(CMYK, "JPEG", quality=95),
    "png": file(RGB, "PNG"),
    "png rgba": file(RGBA, "PNG"),
    "png grey": file(GREY, "PNG"),
    "png grey alpha": file(GREY_ALPHA, "PNG"),
    "png palette": file(PALETTE, "PNG"),
    "png palette transparent": file(PALETTE, "PNG", transparency=3),
    "png one bit": file(GREY.convert("1"), "PNG"),
    "bmp": file(RGB, "BMP"),
    "bmp rgba": file(RGBA, "BMP"),
    "bmp grey": file(GREY, "BMP"),
    "bmp palette": file(PALETTE, "BMP"),
    "bmp one bit": file(GREY.convert("1"), "BMP"),
    "gif": file(PALETTE, "GIF"),
    "gif grey": file(GREY, "GIF"),
    "gif animated": file(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
    "webp": file(RGB, "WEBP", quality=80),
    "webp lossless": file(RGB, "WEBP", lossless=True),
    "webp rgba": file(RGBA, "WEBP", lossless=True),
    "webp animated": file(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)], lossless=True),
}


def source(data: bytes, **options) -> sources.InMemory:
    return sources.InMemory([data], [0], classes=["a"], **options)


def read(data: bytes, **options) -> bytes:
    return source(data, **options).read(np.arange(1))[0][0]


def difference(found: tf.Tensor, expected: Image.Image | np.ndarray) -> np.ndarray:
    return np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))


def whole(data: bytes) -> tf.Tensor:
    """Return the random-resized crop whose window is the whole image."""
    seed = tf.constant([1, 2], tf.int64)
    return augment.random_resized_crop(tf.constant(data), seed, size=SIZE, scale=(1, 1), ratio=(W / H, W / H))


@pytest.mark.parametrize("name", FILES)
def test_a_file_decodes_to_the_pixels_of_pillow(name):
    expected = Image.open(io.BytesIO(FILES[name])).convert("RGB")
    data = read(FILES[name])
    # CMYK: Pillow and TensorFlow round the two products of the conversion differently.
    mean, most = (1, 1) if name == "jpeg cmyk" else (0, 0)
    error = difference(decode.decode(tf.constant(data)), expected)
    assert error.mean() <= mean and error.max() <= most
    # Pillow resamples in fixed point and clips between its two passes, which shows between black and white dots.
    error = difference(whole(data), expected.resize((SIZE, SIZE), Image.BICUBIC))
    assert error.mean() <= mean + 1 and (error.max() <= most + 2 or "one bit" in name)


def test_sixteen_bits_a_channel_keep_the_upper_eight():
    data = read(file(SIXTEEN_BITS, "PNG"))
    expected = np.repeat(np.asarray(GREY)[..., None], 3, axis=-1)  # not convert("RGB"), which clips at 255
    assert difference(decode.decode(tf.constant(data)), expected).max() == 0
    assert difference(whole(data), Image.fromarray(expected).resize((SIZE, SIZE), Image.BICUBIC)).max() <= 2


def test_only_what_tensorflow_cannot_decode_well_is_touched():
    touched = {name for name, data in FILES.items() if read(data) != data}
    wanted = {name for name in FILES if name.startswith(("webp", "gif"))} | {"bmp grey", "bmp palette", "bmp one bit"}
    assert touched == wanted
    assert all(source(data).raw(np.arange(1))[0] == [data] for data in FILES.values())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("webp", "bmp"))])
def test_the_size_is_read_from_the_first_bytes(name):
    assert transcode.size(FILES[name][:34]) == (W, H)


@pytest.mark.parametrize("name", ["webp", "webp lossless", "webp rgba", "bmp palette"])
def test_a_picture_above_the_limit_of_pixels_is_not_even_opened(name, monkeypatch):
    assert read(FILES[name], max_pixels=W * H) != b""
    monkeypatch.setattr(transcode, "open_image", lambda data: pytest.fail("it was opened"))
    assert read(FILES[name], max_pixels=W * H - 1) == b""


@pytest.mark.parametrize("name", ["webp", "webp lossless", "webp animated", "bmp palette"])
def test_a_broken_picture_is_no_bytes_wherever_it_is_cut(name):
    data = FILES[name]
    assert [read(data[:keep]) for keep in (14, 33, 40, len(data) // 2)] == [b""] * 4


def sparse_gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Return a GIF of one `frame` whose header promises a picture of the size `screen`."""
    data = bytearray(file(Image.new("P", frame), "GIF", comment=b"in front of the frame" * 30))
    data[6:10] = b"".join(side.to_bytes(2, "little") for side in screen)
    return bytes(data)


def test_a_gif_whose_frame_is_larger_than_its_header_says_is_held_to_the_limit_too():
    data = sparse_gif((1, 1), (300, 200))
    assert len(data) < 2000 and transcode.size(data) == (300, 200)
    assert read(data, max_pixels=300 * 200 - 1) == b""
    assert decode.decode(tf.constant(read(data, max_pixels=300 * 200))).shape == (200, 300, 3)


def test_a_gif_whose_frame_is_only_a_part_of_the_picture_has_the_size_of_the_picture():
    data = sparse_gif((50, 40), (30, 20))
    assert read(data, max_pixels=50 * 40 - 1) == b""
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert expected.size == (50, 40) and difference(decode.decode(tf.constant(read(data))), expected).max() == 0


def test_a_later_frame_of_a_gif_is_never_decoded_however_large_it_says_it_is():
    data = bytearray(FILES["gif animated"])
    later = data.index(b",\0\0\0\0", data.index(b",\0\0\0\0") + 1)
    data[later + 5 : later + 9] = b"\xff" * 4  # 65,535 x 65,535 px
    expected = Image.open(io.BytesIO(FILES["gif animated"])).convert("RGB")
    assert difference(decode.decode(tf.constant(read(bytes(data), max_pixels=W * H))), expected).max() == 0


def test_a_gif_that_hides_another_size_in_an_extension_without_blocks_is_refused():
    large = sparse_gif((1, 1), (300, 200))
    start = 13 + (3 << ((large[10] & 7) + 1))
    hidden = b"!\xf9\0" + b"\x0a," + (b"\0" * 4 + b"\1\0\1\0\0") + b"\0"
    assert read(large[:start] + hidden + large[start:], max_pixels=100) == b""


def test_a_gif_is_no_bytes_wherever_it_is_cut():
    data = sparse_gif((30, 20), (30, 20))
    assert decode.decode(tf.constant(read(data))).shape == (20, 30, 3)
    start = data.index(b"in front of the frame")
    assert [read(data[:keep]) for keep in (12, 14, start, start + 500, len(data) - 20)] == [b""] * 5


def test_a_webp_is_known_by_its_content_in_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.webp", "2.jpg", "3.WEBP"):
        (tmp_path / "a" / name).write_bytes(FILES["webp lossless"])
    config = base.get_config().data
    config.name = f"folder:{tmp_path}"
    found = sources.open_source(config, "all")
    encoded, _ = found.read(np.arange(3))
    assert all(difference(decode.decode(tf.constant(data)), RGB).max() == 0 for data in encoded)
    with config.unlocked():
        config.max_pixels = W * H - 1
    assert sources.open_source(config, "all").read(np.arange(3))[0] == [b""] * 3
