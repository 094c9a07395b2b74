"""Time the data stream against Pillow loaders of the same recipe (pillow_loader.py), and timm's own where it is.

Promises: stream and loaders take turns, on as many threads as processes, and do the same work; whatever of the
configuration the comparison leaves out is refused by name or said in a line.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deit import config as configuration
from deit import errors, rules
from deit.data import sources, stream
from tools.benchmarks import data, pillow_loader, pillow_recipe, update

WORKERS = 2  # threads of the stream, processes of the Pillow loader
_IMAGES = 4096  # of the split, held in memory for the Pillow loader


_TIMM = {"timm_loader": "timm", "deit_loader": "deit"}  # styles of timm_loader.py
_NAMES = {
    **{f"pillow_{style}": f"Pillow {how}" for style, how in pillow_recipe.STYLES.items()},
    "timm_loader": "timm's own loader",
    "deit_loader": "facebookresearch/deit's loader",
}


def compare(
    config,
    source: sources.Source,
    *,
    images: int,
    rounds: int,
    warm_up: float = data.WARM_UP,
    timm_python: str = "",
) -> dict[str, Any]:
    """Time the stream with 2 threads and two Pillow loaders of the same recipe with 2 processes, in turn.

    `timm_python`: an interpreter that has timm, torch and torchvision; its loaders then take their turns too.

    Each does the whole recipe and ends in mixed float32 micro-batches: the stream mixes on the device, the Pillow
    loaders in their workers, and their images become float32 where they are used. Of the loaders one takes timm's
    steps, the other as few as the recipe allows (pillow_recipe.Recipe).
    The loaders show an image once an epoch, so the stream does too, whatever augment.repeats is.
    Errors: UserError for an augmentation that the Pillow loaders lack.
    """
    recipe = recipe_of(config)
    repeats = config.augment.repeats
    config = update.copy_of(config, {"data.threads": WORKERS, "augment.repeats": 1})
    rows = np.sort(np.random.default_rng(0).permutation(len(source))[:_IMAGES])
    encoded, labels = source.read(rows)
    group = config.augment.mix_group
    with contextlib.ExitStack() as stack:
        kinds = {"stream": (data.mixed(config, data.stream_of(config, source, ())), config.global_batch)}
        for style in pillow_recipe.STYLES:
            like = dataclasses.replace(recipe, style=style)
            loader = pillow_loader.Loader(encoded, labels, like, workers=WORKERS, batch=group)
            batches = _floats(iter(stack.enter_context(loader)), config.micro_batch)
            kinds[f"pillow_{style}"] = (functools.partial(iter, batches), group)  # goes on in every round
        for name, style in _TIMM.items() if timm_python else ():
            turn = stack.enter_context(timm_loader(timm_python, encoded, labels, recipe, style, config.global_batch))
            kinds[name] = (turn, config.global_batch)
        found = data.alternating(kinds, images=images, rounds=rounds, warm_up=warm_up)
    rates = {name: [rate for rate, _ in timings] for name, timings in found.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "image_size": config.data.image_size,
        "workers": WORKERS,
        "cpus": stream.cores(),
        "repeats": 1,
        "configured_repeats": repeats,
        "images_per_sec": medians["stream"],
        **{f"{name}_images_per_sec": rate for name, rate in medians.items() if name != "stream"},
        **{f"ratio_{name}": medians["stream"] / rate for name, rate in medians.items() if name != "stream"},
        "rounds": rates,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """Return what `compare` found as text."""
    shown = {name: ", ".join(f"{rate:,.0f}" for rate in rates) for name, rates in result["rounds"].items()}
    workers = result["workers"]
    said = [f"{result['image_size']} px, {result['cpus']} CPUs"]
    if result["configured_repeats"] > 1:
        configured = result["configured_repeats"]
        said.append(f"augment.repeats is 1 in this comparison, not {configured}: the Pillow loader repeats no image")
    said.append(f"{f'stream, {workers} threads':<43} {result['images_per_sec']:>8,.0f} images/s ({shown['stream']})")
    for kind in filter(shown.get, _NAMES):
        name = f"{_NAMES[kind]}, {workers} processes"
        rate, ratio = result[f"{kind}_images_per_sec"], result[f"ratio_{kind}"]
        said.append(f"{name:<43} {rate:>8,.0f} images/s ({shown[kind]})   ratio {ratio:.2f}")
    return said


def recipe_of(config) -> pillow_recipe.Recipe:
    """Return the Pillow loader's recipe of a configuration. Errors: UserError for what the loader lacks."""
    augment = config.augment
    lacking = {
        "augment.crop": augment.crop != "random_resized",
        "augment.three_augment": augment.three_augment,
        "augment.jitter": augment.jitter > 0,
        "augment.mix_prob": configuration.mixes(augment) and augment.mix_prob < 1,
    }
    for name in filter(lacking.get, lacking):
        raise errors.UserError(
            f"{name} ({getattr(augment, name.partition('.')[2])}) is not in the Pillow loader's recipe: --peer wants "
            "random_resized crops and of the rest flip, randaugment, erasing, mixup, cutmix (preset :full), or "
            "--recipe=crop_flip"
        )
    policy = rules.randaugment_policy(augment.randaugment) if augment.randaugment else None
    return pillow_recipe.Recipe(
        size=config.data.image_size,
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        flip=augment.flip,
        num_ops=policy.num_ops if policy else 0,
        magnitude=policy.magnitude if policy else 0.0,
        magnitude_std=policy.std if policy else 0.0,
        erasing=augment.erasing,
        mix=configuration.mixes(augment),
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mix_switch=augment.mix_switch if augment.mixup and augment.cutmix else float(augment.cutmix > 0),
        mean=tuple(config.model.mean),
        std=tuple(config.model.std),
    )


def _floats(batches: Iterator, micro: int) -> Iterator[np.ndarray]:
    """Turn each batch of the Pillow loader into float32 micro-batches, as a device would; yield the last."""
    for images, _, _ in batches:
        for start in range(0, len(images), micro):
            last = images[start : start + micro].astype(np.float32)
        yield last


@contextlib.contextmanager
def timm_loader(
    python: str, encoded: Sequence[bytes], labels: np.ndarray, recipe: pillow_recipe.Recipe, style: str, batch: int
) -> Iterator[Callable[[], Iterator[None]]]:
    """Run timm_loader.py under `python`; what is given makes iterators, an item a batch, that end a turn by closing.

    Between its turns the loader stands still, or its workers would fill their queues in the turn of another.
    Errors: UserError where it ends.
    """
    with tempfile.TemporaryDirectory(prefix="timm-loader-") as folder:
        images = Path(folder) / "images.npz"
        ends = np.cumsum([len(each) for each in encoded])
        np.savez(images, encoded=np.frombuffer(b"".join(encoded), np.uint8), ends=ends, labels=labels)
        script = str(Path(__file__).with_name("timm_loader.py"))
        log = Path(folder) / "log"
        command = [python, script, json.dumps(timm_settings(recipe, style, batch)), str(images)]
        with open(log, "w") as errors_of_it:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors_of_it,
                text=True,
                start_new_session=True,  # its workers get the signals, too
            )

        def ask() -> None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("next\n")
                process.stdin.flush()
            if not process.stdout.readline():
                last = (log.read_text().strip().splitlines() or ["no message"])[-1]
                raise errors.UserError(f"--timm_python ({python}): timm's loader has ended: {last}")

        def turn() -> Iterator[None]:
            _signal(process, signal.SIGCONT)
            try:
                while True:
                    yield ask()
            finally:
                _signal(process, signal.SIGSTOP)

        try:
            ask()  # the start is nobody's turn
            _signal(process, signal.SIGSTOP)
            yield turn
        finally:
            _signal(process, signal.SIGKILL)
            process.communicate()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def timm_settings(recipe: pillow_recipe.Recipe, style: str, batch: int) -> dict[str, Any]:
    """Return what timm_loader.py passes on to timm.data.create_loader and its mixing."""
    policy = f"rand-m{recipe.magnitude:g}-n{recipe.num_ops}-mstd{recipe.magnitude_std:g}-inc1"
    mixing = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix, "switch_prob": recipe.mix_switch}
    return {
        "style": style,
        "mixing": {**mixing, "label_smoothing": 0.1} if recipe.mix else None,
        "loader": {
            "input_size": [3, recipe.size, recipe.size],
            "batch_size": batch,
            "num_workers": WORKERS,
            "interpolation": "bicubic",
            "scale": recipe.scale,
            "ratio": recipe.ratio,
            "hflip": recipe.flip,
            "auto_augment": policy if recipe.num_ops else None,
            "color_jitter": 0.0,
            "re_prob": recipe.erasing,
            "re_mode": "pixel",
            "mean": recipe.mean,
            "std": recipe.std,
            "persistent_workers": True,
            "pin_memory": False,
        },
    }
