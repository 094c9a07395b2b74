"""The contact sheet: views at their real positions, as training makes them, with words that are true."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from conftest import REPOSITORY

from configs import deit_tiny_flowers
from deit import contact_sheet, pictures
from deit.data import mixing, sources, stream

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


def test_views_are_the_pictures_of_the_training_stream_mixing_included():
    source, config = make()
    batches = list(stream.training(source, config, start_update=0, slice_start=0, slice_size=8, drop_rates=()).take(6))
    trained = np.concatenate([mixing.images(batch, 0, 8) for batch in batches])
    places = np.arange(48)
    shown = contact_sheet.as_trained(source, config, places)
    for position, (image, _) in enumerate(shown):
        np.testing.assert_array_equal(image, np.clip(np.rint(trained[position]), 0, 255))


def test_words_name_labels_shares_and_operations():
    source, config = make(**{"augment.mix_switch": 1.0})
    batches = list(stream.training(source, config, start_update=0, slice_start=0, slice_size=8, drop_rates=()).take(6))
    shares = np.concatenate([batch["mix_lambda"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    partners = np.concatenate([batch["mix_partner"] for batch in batches])
    for position, (_, (title, words)) in enumerate(contact_sheet.as_trained(source, config, np.arange(48))):
        share, own, other = shares[position], labels[position], labels[partners[position]]
        if share < 1:
            assert title == f"{share:.2f} class{own} + {1 - share:.2f} class{other}"
            assert words.split(", ")[-1] == "cutmix"
        else:
            assert title == f"class{own}"


def test_rows_show_one_example_at_its_first_positions():
    source, config = make(**{"augment.repeats": 1})
    for index, positions in contact_sheet.positions_of(source, config, [0, 1, 2], 4).items():
        assert [position // N for position in positions] == [0, 1, 2, 3]  # once an epoch
        assert (stream.indices_at(source, config, positions) == index).all()


def test_an_unreadable_image_is_said_to_be_so():
    source, config = make(**{"augment.mixup": 0.0, "augment.cutmix": 0.0})
    source = sources.InMemory([b"text"] * N, np.arange(N), classes=source.classes)
    shown = contact_sheet.as_trained(source, config, np.arange(2))
    assert all(title.endswith(": unreadable") for _, (title, _) in shown)
    assert contact_sheet.draw(source, config, examples=1, count=1).shape[-1] == 3


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


@pytest.mark.parametrize("out", ["sheet.jpg", "missing/sheet.png"])
def test_a_place_where_no_picture_can_go_is_refused(out, tmp_path):
    done = run(f"--out={tmp_path / out}")
    assert done.returncode == 1 and "--out" in done.stderr and "Traceback" not in done.stderr
