"""A Pillow loader of the DeiT recipe in worker processes: the peer that the data stream is measured against.

python tools/benchmarks/pillow_loader.py [--data_dir=DIR] [--recipe=full|crop_flip] [--workers=2] [--json]

It stands in for a PyTorch DataLoader with timm's transforms (Touvron et al., arXiv:2012.12877, section 6) and does
the work of deit/data/stream.py: whole batches a worker, two of them ahead, handed over through shared memory.
Where there was a choice it takes the faster one: affine operations are bilinear, as in the stream (timm: bicubic;
--affine), images stay [H, W, 3], mixing works on pairs in place. Workers import Pillow and NumPy, never TensorFlow.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

AHEAD = 2  # batches a worker makes ahead of their use: PyTorch's prefetch_factor
_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
WARM_UP = 1.5  # seconds


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to an image; the defaults are DeiT's. `num_ops` 0, `erasing` 0, `mix` False: crop and flip."""

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
    affine: int = Image.BILINEAR  # timm under DeiT: BICUBIC
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


RECIPES = {"full": Recipe(), "crop_flip": Recipe(num_ops=0, erasing=0.0, mix=False)}


# --- one image --------------------------------------------------------------------------------------------


def augmented(encoded: memoryview, recipe: Recipe, rng: random.Random) -> Image.Image:
    """Decode, random-resized-crop (bicubic), flip, RandAugment."""
    image = Image.open(BytesIO(encoded)).convert("RGB")
    left, top, width, height = crop_window(*image.size, recipe, rng)
    image = image.crop((left, top, left + width, top + height)).resize((recipe.size, recipe.size), Image.BICUBIC)
    if rng.random() < recipe.flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    fill = tuple(min(255, round(255 * channel)) for channel in recipe.mean)
    for operation in rng.choices(OPERATIONS, k=recipe.num_ops):
        if rng.random() < recipe.op_probability:
            level = min(10.0, max(0.0, rng.gauss(recipe.magnitude, recipe.magnitude_std)))
            image = operation(image, level / 10, rng.choice((-1, 1)), fill, recipe.affine)
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


# --- one batch --------------------------------------------------------------------------------------------


def mix(batch: np.ndarray, recipe: Recipe, rng: random.Random) -> float:
    """Mix uint8 [B, H, W, 3] with itself reversed, in place, by mixup or cutmix; return the share of the own label."""
    if rng.random() < recipe.mix_switch:
        return _cutmix(batch, rng.betavariate(recipe.cutmix, recipe.cutmix), rng)
    share = rng.betavariate(recipe.mixup, recipe.mixup)
    for i in range(len(batch) // 2):
        one, other = batch[i], batch[-1 - i]
        change = (other.astype(np.float32) - one) * np.float32(1 - share)
        np.rint(change, out=change)  # own + round(change) is the rounded mixture
        step = change.astype(np.int16)
        one += step.astype(np.uint8)  # modulo 256 the negative steps are right too
        other -= step.astype(np.uint8)
    return share


def _cutmix(batch: np.ndarray, share: float, rng: random.Random) -> float:
    height, width = batch.shape[1:3]
    h, w = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
    y, x = rng.randrange(height), rng.randrange(width)
    rows = slice(max(0, y - h // 2), min(height, y + h // 2))
    columns = slice(max(0, x - w // 2), min(width, x + w // 2))
    half = len(batch) // 2
    first = batch[:half, rows, columns].copy()
    batch[:half, rows, columns] = batch[: -half - 1 : -1, rows, columns]
    batch[: -half - 1 : -1, rows, columns] = first
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


# --- processes --------------------------------------------------------------------------------------------


class Loader:
    """Batches of one pass after the other over encoded images, made by worker processes; a context manager.

    Idle workers wait with AHEAD batches each. Iterating yields (uint8 [B, S, S, 3], int32 [B], share of the own
    label); the arrays are views that stay valid until the next batch is asked for.
    """

    def __init__(self, encoded: Sequence[bytes], labels: np.ndarray, recipe: Recipe, *, workers: int, batch: int):
        self._shape = (batch, recipe.size, recipe.size, 3)
        context = multiprocessing.get_context("spawn")  # a fork would inherit TensorFlow's threads half-way
        # Files in memory: what shared_memory is, without views that keep it from being closed.
        self._folder = tempfile.TemporaryDirectory(prefix="pillow-loader-", dir=_MEMORY if _MEMORY.is_dir() else None)
        images = Path(self._folder.name) / "encoded"
        images.write_bytes(b"".join(encoded))
        ends = np.cumsum([len(data) for data in encoded])
        self._slots, self._channels, self._processes = [], [], []
        for number in range(workers):
            slots = Path(self._folder.name) / f"slots-{number}"
            self._slots.append(np.asarray(np.memmap(slots, np.uint8, "w+", shape=(AHEAD, *self._shape))))
            ours, theirs = context.Pipe()
            arguments = (
                number,
                workers,
                images,
                ends,
                np.asarray(labels, np.int32),
                recipe,
                self._shape,
                slots,
                theirs,
            )
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # with its end only in the worker, a worker that dies ends the pipe
            self._channels.append(ours)
            self._processes.append(process)
            for slot in range(AHEAD):
                ours.send(slot)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        for channel, process in zip(self._channels, self._processes):
            channel.close()
            process.join(timeout=60)
        self._folder.cleanup()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """Yield batches for ever, from the workers in turn. Errors: RuntimeError where a worker has died."""
        while True:
            for number, channel in enumerate(self._channels):
                try:
                    slot, labels, share = channel.recv()
                except EOFError:
                    raise RuntimeError(f"worker {number} of the Pillow loader has died; its message is above") from None
                yield self._slots[number][slot], labels, share
                channel.send(slot)


def _work(number, workers, images, ends, labels, recipe, shape, slots, channel) -> None:
    """Make every `workers`-th batch in the slots that the channel names, until it is closed."""
    rng, noise = random.Random(number), np.random.default_rng(number)
    slots = np.asarray(np.memmap(slots, np.uint8, "r+", shape=(AHEAD, *shape)))
    data = memoryview(np.memmap(images, np.uint8, "r"))
    starts = np.concatenate([[0], ends[:-1]])
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        for rows in _rows(len(ends), number, workers, shape[0]):
            slot = channel.recv()
            for pixels, row in zip(slots[slot], rows):
                pixels[...] = augmented(data[starts[row] : ends[row]], recipe, rng)
                if recipe.erasing:
                    erase(pixels, recipe, rng, noise)
            share = mix(slots[slot], recipe, rng) if recipe.mix else 1.0
            channel.send((slot, labels[rows], share))


def _rows(count: int, number: int, workers: int, batch: int) -> Iterator[np.ndarray]:
    """Yield this worker's share of the batches of an endless sequence of permutations of `count`."""
    order, waiting = np.random.default_rng(0), np.array([], np.int64)  # the same in every worker
    for turn in range(sys.maxsize):
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, order.permutation(count)])
        if turn % workers == number:
            yield waiting[:batch]
        waiting = waiting[batch:]


def timed(batches: Iterator, *, images: int, batch: int, discard: int, warm_up: float = WARM_UP) -> tuple[float, float]:
    """Return images/s, and ms of this process's CPU an image, over the next `images`.

    Before, `discard` batches are taken that don't count, or as many as come in `warm_up` seconds if that is more.
    """
    started = time.perf_counter()
    while discard > 0 or time.perf_counter() - started < warm_up:
        next(batches)
        discard -= 1
    wanted = max(1, math.ceil(images / batch))
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(wanted):
        next(batches)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return wanted * batch / seconds, 1000 * cpu / (wanted * batch)


def main() -> None:
    """Read the flowers, run the loader, print images/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="TFDS directory; default: TFDS's own")
    parser.add_argument("--name", default="tfds:tf_flowers", help="data set, as in data.name")
    parser.add_argument("--split", default="train[:90%]")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="full")
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=4096, help="images that are timed")
    parser.add_argument("--affine", choices=("bilinear", "bicubic"), default="bilinear")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from configs import base
    from deit import cli, errors
    from deit.data import sources

    config = base.get_config()
    config.data.name, config.data.data_dir = asked.name, asked.data_dir
    try:
        source = sources.open_source(config.data, asked.split)
    except errors.UserError as error:
        cli.complain(str(error))
        sys.exit(1)
    encoded, labels = source.read(np.arange(len(source)))
    affine = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[asked.affine]
    recipe = dataclasses.replace(RECIPES[asked.recipe], size=asked.size, affine=affine)
    with Loader(encoded, labels, recipe, workers=asked.workers, batch=asked.batch) as loader:
        found, _ = timed(iter(loader), images=asked.images, batch=asked.batch, discard=2 * AHEAD * asked.workers)
    if asked.json:
        print(json.dumps({"recipe": asked.recipe, "workers": asked.workers, "images_per_sec": found}))
    else:
        print(f"Pillow, {asked.workers} processes, {asked.recipe}: {found:.1f} images/s")


if __name__ == "__main__":
    main()
