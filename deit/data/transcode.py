"""Pictures that TensorFlow 2.15 cannot decode, or decodes wrongly, become plain BMP through Pillow when they are read.

Those are WebP, BMP with a palette (TensorFlow shows its indices) or packed pixels, and GIF (TensorFlow decodes every
frame, each as large as it says itself, whatever the header says). Promises: the size is taken from the header before
anything is decoded or allocated for it; what is too large or broken becomes b"", which the stream counts as unreadable.
Alpha is dropped and of an animation the first frame taken, as the other decoders do.
"""

import io

_HEADER = 34  # bytes, enough for the sizes of both


def needed(data: bytes) -> bool:
    """Tell by the content, not the name: many a .jpg from the web is a WebP."""
    return is_webp(data) or (data[:2] == b"BM" and not _plain_bmp(data)) or is_gif(data)


def is_webp(data: bytes) -> bool:
    """Tell whether this is a WebP, from its first 12 bytes."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in px from the header of a WebP, BMP or GIF, or None where it is cut short."""
    if len(data) < _HEADER:
        return None
    if is_gif(data):
        return _gif_size(data)
    return _webp_size(data) if is_webp(data) else _bmp_size(data)


def to_bmp(data: bytes, *, max_pixels: int | None) -> bytes:
    """Return the picture as 24-bit BMP, b"" where it is broken or has more than `max_pixels` (None = no limit)."""
    extent = size(data)
    # Pillow's WebP decoder allocates two canvases when it opens a file, so the limit is checked on the header here.
    if extent is None or (max_pixels is not None and extent[0] * extent[1] > max_pixels):
        return b""
    try:
        with open_image(data) as image:
            if image.size != extent:  # a header made to be read in two ways
                return b""
            out = io.BytesIO()
            image.convert("RGB").save(out, "BMP")
            return out.getvalue()
    except Exception:  # the plugins raise SyntaxError, OSError, ValueError, EOFError for one damage or another
        return b""


def open_image(data: bytes):
    """Open a WebP, BMP or GIF with Pillow."""
    from PIL import BmpImagePlugin, GifImagePlugin, WebPImagePlugin

    # The plugins themselves, not Image.open: that has a limit of pixels of its own, which data.max_pixels replaces.
    if is_gif(data):
        return GifImagePlugin.GifImageFile(io.BytesIO(data))
    plugin = WebPImagePlugin.WebPImageFile if is_webp(data) else BmpImagePlugin.BmpImageFile
    return plugin(io.BytesIO(data))


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Read the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8X":  # extended: the canvas, to which frames are drawn
        return _number(data, 24, 3) + 1, _number(data, 27, 3) + 1
    if kind == b"VP8L":  # lossless: 14 bits each after the signature byte
        both = _number(data, 21, 4)
        return (both & 0x3FFF) + 1, ((both >> 14) & 0x3FFF) + 1
    if kind == b"VP8 ":  # lossy: 14 bits each after frame tag and start code
        return _number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF
    return None


def _bmp_size(data: bytes) -> tuple[int, int]:
    if _number(data, 14, 4) == 12:  # OS/2's header
        return _number(data, 18, 2), _number(data, 20, 2)
    height = int.from_bytes(data[22:26], "little", signed=True)  # negative: the top row comes first
    return _number(data, 18, 4), abs(height)


def _plain_bmp(data: bytes) -> bool:
    """Tell whether pixels are stored as 3 or 4 bytes without compression or masks: what TensorFlow expects."""
    return _number(data, 14, 4) != 12 and _number(data, 28, 2) in (24, 32) and _number(data, 30, 4) == 0


def is_gif(data: bytes) -> bool:
    """Tell whether this is a GIF, from its first 4 bytes."""
    return data[:4] == b"GIF8"


def _gif_size(data: bytes) -> tuple[int, int] | None:
    """Return the extent of the screen and the first frame together, which is what Pillow makes."""
    if (frame := _gif_frame(data)) is None:
        return None
    left, top, width, height = frame
    return max(left + width, _number(data, 6, 2)), max(top + height, _number(data, 8, 2))


def _gif_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """Return left, top, width, height of the first frame (GIF89a, sections 18 to 26), None where there is none."""
    table = 3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0
    place = 13 + table
    while data[place : place + 1] == b"!":  # an extension: its label and blocks, each with its length in front
        place += 2
        if data[place : place + 1] == b"\0":  # Pillow reads on beyond an extension without blocks
            return None
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    if data[place : place + 1] != b"," or len(data) < place + 9:
        return None
    left, top, width, height = (_number(data, place + 1 + 2 * i, 2) for i in range(4))
    return left, top, width, height


def _number(data: bytes, first: int, count: int) -> int:
    return int.from_bytes(data[first : first + count], "little")
