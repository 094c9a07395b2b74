"""Unreadable training images: named once, allowed up to a fraction."""

import logging
import types

import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import errors
from deit.data import sources, unreadable

BATCH, TRAIN_SIZE = 32, 1347


def make(limit=0.01, *, n=6, repeats=1):
    config = base.get_config()
    config.global_batch, config.data.max_bad_fraction, config.augment.repeats = BATCH, limit, repeats
    config.resolved = types.SimpleNamespace(train_size=TRAIN_SIZE)
    source = sources.InMemory([b""] * n, np.zeros(n), classes=["a"], name="file{}.jpg".format)
    return unreadable.Unreadable(source, config)


# (update, most unreadable images allowed): 1 % of an epoch's 1347, later of what was read, 32 an update.
@pytest.mark.parametrize(("step", "most"), [(1, 13), (42, 13), (100, 32), (1000, 320)])
def test_more_unreadable_images_than_the_limit_end_the_run(step, most):
    lost = make()
    lost.check(float(most), step)
    with pytest.raises(errors.UserError, match=r"data\.max_bad_fraction \(0\.01\)"):
        lost.check(float(most + 1), step)


def test_the_list_says_that_it_holds_only_what_this_start_of_the_run_has_met():
    lost = make()
    with pytest.raises(errors.UserError, match="this start of the run: none; the log of an earlier start names them"):
        lost.check(1000.0, 42)
    lost.note([np.arange(2)], [np.zeros(2)])
    with pytest.raises(errors.UserError, match=r"this start of the run: file\d.jpg, file\d.jpg$"):
        lost.check(1000.0, 42)


def test_each_image_is_named_once_however_often_it_is_met(caplog):
    lost = make()
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):  # each a permutation of the six; two replicas
            positions = np.arange(epoch * 6, epoch * 6 + 6)
            lost.note([positions[:3], positions[3:]], [np.zeros(3), np.zeros(3)])
    assert sorted(record.getMessage().split()[1] for record in caplog.records) == [f"file{i}.jpg" for i in range(6)]


def test_only_images_of_weight_zero_are_named_and_repeats_are_followed():
    lost = make(repeats=3)
    lost.note([np.arange(6)], [np.array([0, 1, 1, 1, 1, 0])])
    assert len(lost.names) == 2  # positions 0 and 5 are views of two examples
    same = make(repeats=3)
    same.note([np.arange(6)], [np.array([0, 0, 0, 1, 1, 1])])
    assert len(same.names) == 1
    make().note([np.arange(6)], [np.ones(6)])


def test_a_long_list_is_cut_off_with_its_length():
    assert unreadable.listed(["a", "b"]) == "a, b"
    text = unreadable.listed([f"n{i}" for i in range(60)])
    assert text.endswith("n49 and 10 more, all in the log")


def test_an_image_that_can_be_read_after_all_is_said_to_be_so(caplog):
    lost = make(n=1)
    with caplog.at_level(logging.WARNING):
        lost.note([np.arange(1)], [np.zeros(1)])
    assert "it can't be read" in caplog.text
    picture = tf.io.encode_png(np.zeros([9, 9, 3], np.uint8)).numpy()
    config = base.get_config()
    lost = unreadable.Unreadable(sources.InMemory([picture], np.zeros(1), classes=["a"]), config)
    with caplog.at_level(logging.WARNING):
        lost.note([np.arange(1)], [np.zeros(1)])
    assert "it can be read now" in caplog.text
