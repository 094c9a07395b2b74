"""Ensembles: the mean of probabilities against NumPy, each member fed by its own declaration."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from deit import errors, rules, teachers
from deit.teachers import base, ensemble
from tests import stand_ins
from tests.stand_ins import CLASSES, IMAGES, KERNEL, SIZE, build, config, describe, expected, identity

OTHER = np.random.default_rng(7).normal(0, 1, KERNEL.shape).astype(np.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the directories of two SavedModels of three classes."""
    directory = tmp_path_factory.mktemp("pair")
    kernels = {"one": KERNEL, "two": OTHER}
    return [stand_ins.save(directory / name, kernel=kernel) for name, kernel in kernels.items()]


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def both(pair, one="range=(0,1)", two="range=(-1,1) mean=(.5,.5,.5)", **teacher):
    members = (f"saved_model:{pair[0]} {one}", f"saved_model:{pair[1]} {two}")
    return {"kind": "ensemble", "members": members, **teacher}


def test_an_ensemble_s_logits_are_the_logarithm_of_the_members_mean_probability(pair):
    teacher = build(**both(pair))
    first, second = expected(IMAGES / 255), expected(IMAGES / 255 * 2 - 1 - 0.5, OTHER)
    wanted = np.log((softmax(first) + softmax(second)) / 2)
    np.testing.assert_allclose(teacher.logits(tf.constant(IMAGES)), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.exp(teacher.logits(tf.constant(IMAGES))).sum(-1), 1, atol=1e-5)
    assert (teacher.num_classes, teacher.parameters, teacher.classes) == (3, 2 * KERNEL.size, None)


def test_the_mean_is_stable_where_probabilities_are_too_small_for_float32():
    logits = [np.array([[0.0, -400.0, -500.0]]), np.array([[-1000.0, 0.0, -450.0]])]
    wanted = np.logaddexp(*(each - np.logaddexp.reduce(each, -1, keepdims=True) for each in logits)) - np.log(2)
    found = ensemble.mean([tf.constant(each) for each in logits])
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    alone = ensemble.mean([tf.constant(logits[0])])
    np.testing.assert_allclose(alone, logits[0], atol=1e-6)


def test_each_member_gets_the_picture_in_its_own_size(tmp_path, pair):
    workdir, network = stand_ins.finished_run(tmp_path / "run")
    names = (f"run:{workdir}", f"saved_model:{pair[0]} range=(0,1)")
    teacher = build(kind="ensemble", members=names)
    picture = tf.constant(np.random.default_rng(9).integers(0, 256, (2, 32, 32, 3)).astype(np.float32))
    small = [tf.image.resize(picture, [size, size], antialias=True) for size in (16, SIZE)]
    outputs = network.model(small[0])
    run = softmax(((outputs["cls"] + outputs["dist"]) / 2).numpy().astype(np.float64))
    other = softmax(expected(small[1].numpy() / 255))
    np.testing.assert_allclose(np.exp(teacher.logits(picture)), (run + other) / 2, atol=1e-4)
    assert teacher.classes == CLASSES  # the run's: the SavedModel has none
    with pytest.raises(errors.UserError, match=r"class 0 of ensemble of .* is 'a', it must be the data's 'b'"):
        build(kind="ensemble", members=names, classes=("b", "a", "c"))


def test_members_that_disagree_on_their_classes_are_refused_by_name(tmp_path, pair):
    lists = [tmp_path / "1.txt", tmp_path / "2.txt"]
    lists[0].write_text("a\nb\nc\n")
    lists[1].write_text("a\nc\nb\n")
    fields = [f"class_names={path}" for path in lists]
    with pytest.raises(
        errors.UserError, match=r"^teacher.members: class 1 of .* is 'b' and that of .* 'c', they must be"
    ):
        build(**both(pair, *fields))
    assert build(**both(pair, fields[0], fields[0])).classes == CLASSES
    with pytest.raises(errors.UserError, match=r"^teacher.members: .* has 3 classes and .* 2, they must have as many"):
        build(**both(pair, two="background=True"))
    with pytest.raises(errors.UserError, match=r"has 3 classes, it must have the data's 2"):
        build(**both(pair), classes=("a", "b"))


def test_an_ensemble_s_identity_is_its_members_in_order(pair, tmp_path):
    ones = [identity(kind="saved_model", path=str(path)) for path in pair]
    assert build(**both(pair)).identity == identity(**both(pair)) == f"ensemble ({ones[0]}, {ones[1]})"
    assert identity(**both(pair[::-1])) == f"ensemble ({ones[1]}, {ones[0]})"
    pinned = (f"saved_model:{tmp_path / 'absent.zip'} sha256={hashlib.sha256(b'x').hexdigest()}", "run:runs/none")
    with pytest.raises(errors.UserError, match=r"^teacher.members \('run:runs/none'\): teacher.path .* is no run"):
        identity(kind="ensemble", members=pinned)


def test_an_ensemble_s_preprocessing_is_that_of_all_its_members(pair):
    found = teachers.preprocessing(config(**both(pair)))
    assert list(found) == ["teacher.members"] and json.loads(json.dumps(found)) == found
    assert [each["teacher.range"] for each in found["teacher.members"]] == [[0.0, 1.0], [-1.0, 1.0]]
    assert found != teachers.preprocessing(config(**both(pair, one="range=(0,2)")))


def test_the_plan_s_line_and_the_check_look_at_every_member(pair, tmp_path):
    line = describe(**both(pair))
    parts = [f"{path}, {KERNEL.size} parameters, 8 px in {range}" for path, range in zip(pair, ("[0, 1]", "[-1, 1]"))]
    assert line == f"ensemble of {parts[0]}; {parts[1]}, mean (0.5, 0.5, 0.5)"
    built = build(**both(pair)).describe()
    assert built.startswith("ensemble of SavedModel ") and built.endswith(f", {2 * KERNEL.size:,} parameters")
    teachers.check(config(**both(pair)))
    lost = config(kind="ensemble", members=(f"saved_model:{pair[0]}", f"saved_model:{tmp_path / 'no'}"))
    with pytest.raises(errors.UserError, match=r"^teacher.members \('saved_model:.*no'\): teacher.path .* existing"):
        teachers.check(lost)
    with pytest.raises(errors.UserError, match=r"^teacher.members: 'resnet' must be saved_model:PATH"):
        teachers.check(config(kind="ensemble", members=("resnet", "run:a")))


def test_a_valid_ensemble_passes_the_rules_and_inherits_precision(pair):
    c = config(**both(pair, precision="mixed_bfloat16"))
    c.distill.kind = "soft"
    rules.validate(c)
    exact = build(**both(pair))
    low = teachers.build(c, classes=CLASSES, workdir=Path("."))
    images = tf.constant(IMAGES)
    assert 0 < np.abs(np.exp(exact.logits(images)) - np.exp(low.logits(images))).max() < 0.2


def test_a_logit_that_is_not_a_number_stays_visible():
    bad = base.Teacher("bad", lambda x: tf.fill([len(x), 3], np.nan), base.Input(0), 3, 0, None, "")
    assert not np.isfinite(ensemble.mean([bad.logits(tf.constant(IMAGES)), tf.zeros([2, 3])])).any()
