"""Time the data stream against Pillow loaders of the same recipe (pillow_loader.py).

Promises: stream and loaders take turns, on as many threads as processes, and do the same work; whatever of the
configuration the comparison leaves out is refused by name or said in a line.
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from deit import config as configuration
from deit import errors, rules
from deit.data import sources, stream
from tools.benchmarks import data, pillow_loader, pillow_recipe, update

WORKERS = 2  # threads of the stream, processes of the Pillow loader
_IMAGES = 4096  # of the split, held in memory for the Pillow loader


def compare(
    config, source: sources.Source, *, images: int, rounds: int, warm_up: float = data.WARM_UP
) -> dict[str, Any]:
    """Time the stream with 2 threads and two Pillow loaders of the same recipe with 2 processes, in turn.

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
            kinds[style] = (functools.partial(iter, batches), group)  # goes on in every round
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
        **{f"pillow_{style}_images_per_sec": medians[style] for style in pillow_recipe.STYLES},
        **{f"ratio_{style}": medians["stream"] / medians[style] for style in pillow_recipe.STYLES},
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
    said.append(f"{f'stream, {workers} threads':<32} {result['images_per_sec']:>8,.0f} images/s ({shown['stream']})")
    for style, how in pillow_recipe.STYLES.items():
        name = f"Pillow {how}, {workers} processes"
        rate, ratio = result[f"pillow_{style}_images_per_sec"], result[f"ratio_{style}"]
        said.append(f"{name:<32} {rate:>8,.0f} images/s ({shown[style]})   ratio {ratio:.2f}")
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
