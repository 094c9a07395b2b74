"""A Pillow loader of the DeiT recipe in worker processes: the peer that the data stream is measured against.

It stands in for a PyTorch DataLoader with timm's transforms and does the work of deit/data/stream.py: whole batches a
worker, two of them ahead, handed over through shared memory. Workers import Pillow and NumPy, never TensorFlow.
"""

import contextlib
import math
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tools.benchmarks.pillow_recipe import Recipe, augmented, erase

AHEAD = 2  # batches a worker makes ahead of their use: PyTorch's prefetch_factor
_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux


# --- one batch --------------------------------------------------------------------------------------------


def collate(pictures: Sequence[np.ndarray], out: np.ndarray, recipe: Recipe, rng: random.Random) -> float:
    """Put uint8 [H, W, 3] pictures into `out` [B, 3, H, W], mixed one by one; return the share of the own label."""
    planes = [np.moveaxis(picture, 2, 0) for picture in pictures]  # a view; the copy into `out` reorders
    share, box = _drawn_mixture(out.shape[2:], recipe, rng) if recipe.mix else (1.0, None)
    for i, own in enumerate(planes):
        other = planes[-1 - i]
        if box:
            mixed = own.copy()
            mixed[(slice(None), *box)] = other[(slice(None), *box)]
        elif share < 1:
            mixed = own.astype(np.float32) * share + other.astype(np.float32) * (1 - share)
            np.rint(mixed, out=mixed)
        else:
            mixed = own
        out[i] = mixed
    return share


def mix(batch: np.ndarray, recipe: Recipe, rng: random.Random) -> float:
    """Mix uint8 [B, H, W, 3] with itself reversed, in place, pair by pair; return the share of the own label."""
    share, box = _drawn_mixture(batch.shape[1:3], recipe, rng)
    half = len(batch) // 2
    if box:
        first = batch[(slice(half), *box)].copy()
        batch[(slice(half), *box)] = batch[(slice(None, -half - 1, -1), *box)]
        batch[(slice(None, -half - 1, -1), *box)] = first
        return share
    for i in range(half):
        one, other = batch[i], batch[-1 - i]
        change = (other.astype(np.float32) - one) * np.float32(1 - share)
        np.rint(change, out=change)  # own + round(change) is the rounded mixture
        step = change.astype(np.int16)
        one += step.astype(np.uint8)  # modulo 256 the negative steps are right too
        other -= step.astype(np.uint8)
    return share


def _drawn_mixture(shape: tuple[int, int], recipe: Recipe, rng: random.Random) -> tuple[float, tuple | None]:
    """Draw the share of the own label and the box (rows, columns) of a cutmix, or None for a mixup."""
    if rng.random() >= recipe.mix_switch:
        return rng.betavariate(recipe.mixup, recipe.mixup), None
    height, width = shape
    side = math.sqrt(1 - rng.betavariate(recipe.cutmix, recipe.cutmix))
    h, w = int(height * side), int(width * side)
    y, x = rng.randrange(height), rng.randrange(width)
    rows = slice(max(0, y - h // 2), min(height, y + h // 2))
    columns = slice(max(0, x - w // 2), min(width, x + w // 2))
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width), (rows, columns)


# --- processes --------------------------------------------------------------------------------------------


class Loader:
    """Batches of one pass after the other over encoded images, made by worker processes; a context manager.

    Idle workers wait with AHEAD batches each. Iterating yields (uint8 [B, S, S, 3] or [B, 3, S, S], int32 [B],
    share of the own label); the arrays are views that stay valid until the next batch is asked for.
    """

    def __init__(self, encoded: Sequence[bytes], labels: np.ndarray, recipe: Recipe, *, workers: int, batch: int):
        size = recipe.size
        self._shape = (batch, 3, size, size) if recipe.style == "timm" else (batch, size, size, 3)
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
            share = _fill(slots[slot], [data[starts[row] : ends[row]] for row in rows], recipe, rng, noise)
            channel.send((slot, labels[rows], share))


def _fill(out: np.ndarray, encoded: Sequence[memoryview], recipe: Recipe, rng, noise) -> float:
    """Make one batch in `out`; return the share of the own label."""
    pictures = []
    for i, data in enumerate(encoded):
        image = augmented(data, recipe, rng)
        if recipe.style == "lean":  # straight into its place
            out[i] = image
            pixels = out[i]
        else:
            pixels = np.array(image)
            pictures.append(pixels)
        if recipe.erasing:
            erase(pixels, recipe, rng, noise)
    if recipe.style == "timm":
        return collate(pictures, out, recipe, rng)
    return mix(out, recipe, rng) if recipe.mix else 1.0


def _rows(count: int, number: int, workers: int, batch: int) -> Iterator[np.ndarray]:
    """Yield this worker's share of the batches of an endless sequence of permutations of `count`."""
    order, waiting = np.random.default_rng(0), np.array([], np.int64)  # the same in every worker
    for turn in range(sys.maxsize):
        while len(waiting) < batch:
            waiting = np.concatenate([waiting, order.permutation(count)])
        if turn % workers == number:
            yield waiting[:batch]
        waiting = waiting[batch:]
