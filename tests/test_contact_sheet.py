"""The contact sheet: views at their real positions, as training makes them, with words that are true."""

import functools
import itertools
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import REPOSITORY
from PIL import ImageEnhance, ImageFilter, ImageOps

from configs import deit_tiny_flowers
from deit import contact_sheet, pictures
from deit.data import augment, mixing, ops, sources, stream
from tests import photos
from tools import parity_cases

N = 8


def make(**fields):
    config = deit_tiny_flowers.get_config("full")
    config.global_batch, config.data.image_size, config.augment.mix_group = 8, 32, 4
    config.update_from_flattened_dict(fields)
    rng = np.random.RandomState(0)
    encoded = [
        tf.io.encode_jpeg(np.kron(rng.randint(0, 256, [5, 6, 3]), np.ones([8, 8, 1])).astype(np.uint8)).numpy()
        for _ in range(N)
    ]
    return sources.InMemory(encoded, np.arange(N), classes=[f"class{i}" for i in range(N)]), config


@pytest.fixture(scope="module")
def six_updates():
    """The first 48 positions of the `full` preset: the joined batch, the student's pictures, what the sheet shows."""
    source, config = make()
    batches = list(stream.training(source, config, start_update=0, slice_start=0, slice_size=8, drop_rates=()).take(6))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    trained = np.concatenate([mixing.images(batch, 0, 8) for batch in batches])
    return joined, trained, contact_sheet.as_trained(source, config, np.arange(48))


def test_views_are_the_pictures_of_the_training_stream_mixing_included(six_updates):
    batch, trained, shown_of_them = six_updates
    assert (trained != batch["image"]).any()
    for position, (image, _) in enumerate(shown_of_them):
        np.testing.assert_array_equal(image, np.clip(np.rint(trained[position]), 0, 255))


def test_words_name_labels_shares_and_what_was_mixed(six_updates):
    batch, _, shown_of_them = six_updates
    shares, labels, kinds = batch["mix_lambda"], batch["label"], set()
    others = labels[batch["mix_partner"]]
    for position, (_, (title, words)) in enumerate(shown_of_them):
        share, own, other = shares[position], labels[position], others[position]
        kind = "mixup" if batch["mix_box"][position].tolist() == [0, 0, 32, 32] else "cutmix"
        if share < 1:
            assert title == f"{share:.2f} class{own} + {1 - share:.2f} class{other}"
            assert words.split(", ")[-1] == kind
            kinds.add(kind)
        else:
            assert title == f"class{own}"
            assert not words.endswith(("mixup", "cutmix"))
    assert kinds == {"mixup", "cutmix"}


def test_rows_show_one_example_at_its_first_positions():
    source, config = make(**{"augment.repeats": 1})
    for index, positions in contact_sheet.positions_of(source, config, [0, 1, 2], 4).items():
        assert [position // N for position in positions] == [0, 1, 2, 3]  # once an epoch
        assert (stream.indices_at(source, config, positions) == index).all()


def test_an_unreadable_image_is_said_to_be_so():
    source, config = make(**{"augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.randaugment": ""})
    source = sources.InMemory([b"text"] * N, np.arange(N), classes=source.classes)
    shown = contact_sheet.as_trained(source, config, np.arange(2))
    assert all(title.endswith(": unreadable") for _, (title, _) in shown)
    assert contact_sheet.draw(source, config, examples=1, count=1).shape[-1] == 3


# --- Words against pixels: 48 unmixed views of photographs, 64 px --------------------------------------------------

PLACES = np.arange(48)
UNMIXED = {"data.image_size": 64, "augment.mixup": 0.0, "augment.cutmix": 0.0}
PLAIN = {**UNMIXED, "augment.erasing": 0.0}  # the `full` preset but for mixing and erasing
DEIT_III = {
    **PLAIN,
    "augment.crop": "simple",
    "augment.randaugment": "",
    "augment.three_augment": True,
    "augment.jitter": 0.3,
}
FILL = (124, 116, 104)  # ImageNet's mean colour
THREE = ("grey", "solarize 128", "blur 1.0 px")
JITTER = ("brightness", "contrast", "saturation")
SAME = {"solarize": "Solarize", "brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}


@functools.cache
def shown(**fields) -> list[tuple[np.ndarray, list[str]]]:
    """Return the pictures and words that a sheet shows at PLACES."""
    files = list(photos.files().values())
    source = sources.InMemory(files, np.zeros(len(files), np.int64), classes=["photograph", "none"])
    views_of_them = contact_sheet.as_trained(source, make(**fields)[1], PLACES)
    assert all(title == "photograph" for _, (title, _) in views_of_them)
    return [(image, [] if words == "crop only" else words.split(", ")) for image, (_, words) in views_of_them]


@functools.cache
def cropped(**fields) -> list[np.ndarray]:
    """Return what a sheet shows at PLACES where everything but the crop is off, without words."""
    nothing = {"flip": 0.0, "randaugment": "", "three_augment": False, "jitter": 0.0, "erasing": 0.0}
    views_of_them = shown(**{**fields, **{f"augment.{name}": value for name, value in nothing.items()}})
    assert not any(words for _, words in views_of_them)
    return [image for image, _ in views_of_them]


def by_pillow(image: PIL.Image.Image, word: str) -> PIL.Image.Image:
    """Do what a word says, by Pillow and by nothing but the word."""
    name, _, number = word.removesuffix(" px").partition(" ")
    name, value = SAME.get(name, name), float(number or "nan")
    width, height = image.size

    def moved(*matrix):
        return image.transform(image.size, PIL.Image.AFFINE, matrix, PIL.Image.BILINEAR, fillcolor=FILL)

    return {
        "flip": lambda: ImageOps.mirror(image),
        "grey": lambda: image.convert("L").convert("RGB"),
        "blur": lambda: image.filter(ImageFilter.GaussianBlur(value)),
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Posterize": lambda: parity_cases.posterize_by_pillow(image, int(value)),
        "Solarize": lambda: ImageOps.solarize(image, value),
        "SolarizeAdd": lambda: parity_cases.solarize_add_by_pillow(image, int(value)),
        "Color": lambda: ImageEnhance.Color(image).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "Rotate": lambda: image.rotate(value, PIL.Image.BILINEAR, fillcolor=FILL),
        "ShearX": lambda: moved(1, value, 0, 0, 1, 0),
        "ShearY": lambda: moved(1, 0, 0, value, 1, 0),
        "TranslateX": lambda: moved(1, 0, value * width, 0, 1, 0),
        "TranslateY": lambda: moved(1, 0, 0, 0, 1, value * height),
    }[name]()


def off(image: np.ndarray, crop: np.ndarray, words: list[str]) -> float:
    """Return how far a picture is from what its words make of its crop, mean, of 255."""
    made = functools.reduce(by_pillow, words, PIL.Image.fromarray(crop))
    return float(np.abs(np.asarray(made, np.int32) - image).mean())


def test_the_words_alone_rebuild_the_picture_of_a_deit_view():
    seen = set()
    for place, ((image, words), crop) in enumerate(zip(shown(**PLAIN), cropped(**UNMIXED), strict=True)):
        # Parameters are printed to three digits. Without any one of its words a picture is further off than 1.
        assert off(image, crop, words) <= (0.5 if words else 0), (place, words)
        for i in range(len(words)):
            assert off(image, crop, words[:i] + words[i + 1 :]) > 1, (place, words[i])
        seen |= {word.split()[0] for word in words} or {"nothing"}
    assert {"flip", "nothing"} < seen and len(seen) >= 14, seen


def test_the_words_alone_rebuild_the_picture_of_a_deit_iii_view():
    seen = set()
    for place, ((image, words), crop) in enumerate(zip(shown(**DEIT_III), cropped(**DEIT_III), strict=True)):
        known, *jitter = words[-4:]
        found = off(image, crop, words)
        assert known in THREE[:2] or re.fullmatch(r"blur [0-2]\.\d px", known), known
        assert found <= 1.3, (place, words)  # the radius is printed to one digit, each factor to two
        assert words[:-4] in ([], ["flip"]) and sorted(word.split()[0] for word in jitter) == sorted(JITTER)
        for other in THREE:
            if other.split()[0] != known.split()[0]:
                assert off(image, crop, [*words[:-4], other, *jitter]) > 2 * found, (place, words, other)
        assert (np.ptp(image, axis=-1) == 0).all() == (known == "grey")
        seen.add(known.split()[0])
    assert seen == {"grey", "solarize", "blur"}


def jittered(image: np.ndarray, order: tuple[str, ...], factors: dict[str, float]) -> np.ndarray:
    apply = dict(zip(JITTER, (ops.brightness, ops.contrast, ops.color)))
    for name in order:
        image = apply[name](image, factors[name]).numpy()
    return image


def test_jitter_is_told_in_the_order_in_which_it_was_done():
    """Only rounding and clipping tell the orders apart, so the factors are the drawn ones, with all their digits."""
    config, told = make(**DEIT_III)[1], 0
    before = shown(**{**DEIT_III, "augment.jitter": 0.0})
    for place, ((image, words), (start, words_before)) in enumerate(zip(shown(**DEIT_III), before, strict=True)):
        drawn = augment.jitter_factors(stream.augmentation_seed(config, place), strength=0.3)
        factors = dict(zip(JITTER, drawn.numpy()))
        names = tuple(word.split()[0] for word in words[-3:])
        assert words == [*words_before, *(f"{name} {factors[name]:.2f}" for name in names)]
        orders = itertools.permutations(JITTER)
        fitting = [order for order in orders if (jittered(start, order, factors) == image).all()]
        assert names in fitting, (place, words, fitting)
        told += len(fitting) == 1
    assert told >= 24  # of 48; a grey picture, for one, has no saturation to change


def test_what_is_said_to_be_erased_is_a_box_of_that_size_and_all_that_differs():
    boxes = 0
    for place, ((image, words), (whole, rest)) in enumerate(zip(shown(**UNMIXED), shown(**PLAIN), strict=True)):
        rows, columns = np.nonzero((image != whole).any(-1))
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert words == [*rest, f"erase {width}x{height}"], place
            assert len(rows) > 0.95 * height * width  # noise seldom hits all three values of a pixel
            boxes += height != width
        else:
            assert words == rest, place
    assert boxes >= 6


def test_a_sheet_holds_the_pictures_it_was_given():
    red = np.tile(np.array([[[255, 0, 0]]], np.uint8), [20, 20, 1])
    sheet = pictures.sheet([[(red, ["$title$", "words " * 40]), (red, ["view"])], [(red // 2, ["other"])]])
    assert ((sheet == [255, 0, 0]).all(-1)).sum() > 2 * 100 * 100  # two pictures drawn much larger than 20 px


def run(*arguments):
    command = [sys.executable, "tools/show_batch.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_tool_writes_a_picture_and_overwrites_nothing(tmp_path):
    out = tmp_path / "sheet.png"
    config = ["--config=configs/quickstart.py:scratch", "--examples=2", "--views=2", f"--out={out}"]
    done = run(*config)
    assert done.returncode == 0, done.stderr
    with PIL.Image.open(out) as image:
        width, height = image.size
    assert f"{width} x {height} px" in done.stdout and width > 500
    again = run(*config)
    assert again.returncode == 1 and "nothing is overwritten" in again.stderr


def test_a_picture_without_a_name_is_refused():
    done = run("--out=")
    assert (done.returncode, done.stderr.strip()) == (1, "error: --out ('') must name a .png file")


@pytest.mark.parametrize("out", ["sheet.jpg", "missing/sheet.png", "."])
def test_a_place_where_no_picture_can_go_is_refused(out, tmp_path):
    done = run(f"--out={tmp_path / out}")
    assert done.returncode == 1 and "--out" in done.stderr and "Traceback" not in done.stderr
