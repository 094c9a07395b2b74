"""Networks of keras.applications: each family's declared input against its own `preprocess_input`."""

import hashlib
import inspect
import sys

import numpy as np
import pytest
import tensorflow as tf

from deit import errors, keras, teachers
from deit.teachers import keras_application
from tests.stand_ins import build, config, describe, identity


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    network = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=None)
    rng = np.random.default_rng(0)
    for variable in network.variables:
        if "moving_mean" in variable.name:
            variable.assign(rng.normal(0, 0.1, variable.shape))
    path = tmp_path_factory.mktemp("weights") / "mobilenet.h5"
    network.save_weights(str(path))
    return network, path


def test_a_keras_application_preprocesses_for_itself_and_keeps_its_statistics(mobilenet):
    network, path = mobilenet
    teacher = build(kind="keras_application", name="MobileNet", weights=str(path), image_size=32)
    images = np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    answers = network(images / 127.5 - 1, training=False)
    first, alone = teacher.logits(tf.constant(images)), teacher.logits(tf.constant(images[:1]))
    assert np.ptp(answers) > 1e-3
    np.testing.assert_allclose(first, answers, atol=1e-5)
    np.testing.assert_allclose(alone, answers[:1], atol=1e-5)  # whatever else is in the batch
    assert teacher.parameters == network.count_params()
    assert teacher.num_classes == 3
    assert identity(kind="keras_application", name="MobileNet", weights=str(path)) == teacher.identity
    assert teacher.identity == f"MobileNet {hashlib.sha256(path.read_bytes()).hexdigest()}"
    line = describe(kind="keras_application", name="MobileNet", weights=str(path), image_size=32)
    assert f"MobileNet ({path}), {network.count_params():,} parameters, 32 px in [-1, 1]" in line


def test_an_application_that_cannot_be_built_is_one_line(mobilenet, tmp_path):
    _, path = mobilenet
    with pytest.raises(errors.UserError, match=r"'ResNet51'.*nearest: ResNet50"):
        build(kind="keras_application", name="ResNet51")
    with pytest.raises(errors.UserError, match=r"has 1000 classes, the data has 3"):
        build(kind="keras_application", name="ResNet50", weights="imagenet")
    with pytest.raises(errors.UserError, match=r"teacher.weights .*none.h5.* must be imagenet or"):
        build(kind="keras_application", name="ResNet50", weights=str(tmp_path / "none.h5"))
    with pytest.raises(errors.UserError, match=r"VGG16\) with teacher.weights .* can't be built"):
        build(kind="keras_application", name="VGG16", weights=str(path), image_size=32)


def family(name):
    """Return the module of tf_keras that a network comes from."""
    return sys.modules[getattr(keras.applications, name).__module__]


def test_every_family_s_declared_input_is_its_own_preprocess_input():
    images = np.random.default_rng(5).uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    families = set()
    for name in keras_application.names():
        found = teachers.preprocessing(config(kind="keras_application", name=name))
        declared = keras_application._NETWORKS[name][1].apply(tf.constant(images))
        families.add(family(name).__name__.split(".")[-1])
        np.testing.assert_allclose(
            declared, family(name).preprocess_input(images.copy()), rtol=1e-5, atol=1e-5, err_msg=name
        )
        assert found["teacher.image_size"] == 8
    assert len(families) == 17


def test_networks_fed_raw_have_the_scaling_inside():
    for name in keras_application.names():
        module = family(name).__name__.split(".")[-1]
        raw = keras_application._NETWORKS[name][1].describe() == "0 px in [0, 255]"
        option = inspect.signature(getattr(keras.applications, name)).parameters.get("include_preprocessing")
        assert raw == (module == "efficientnet" or (option is not None and option.default is True)), name
    for name, size in (("MobileNetV3Small", 32), ("EfficientNetB0", 32), ("RegNetX002", 32)):
        network = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=3)
        first = {type(layer).__name__ for layer in network.layers[:3]}
        inner = {type(layer).__name__ for layer in network._flatten_layers(include_self=False)}
        assert "Rescaling" in first | inner, name


def test_the_deit_paper_s_teacher_family_is_known_to_its_largest_published_member():
    assert {f"RegNetY{flops}" for flops in ("002", "040", "080", "160", "320")} <= set(keras_application.names())
    teachers.check(config(kind="keras_application", name="RegNetY160"))
    assert identity(kind="keras_application", name="RegNetY160") == "RegNetY160 imagenet"
    found = teachers.preprocessing(config(kind="keras_application", name="RegNetY160", image_size=224))
    assert (found["teacher.image_size"], found["teacher.range"]) == (224, [0.0, 255.0])


@pytest.mark.slow
def test_regnety160_has_the_published_number_of_parameters():
    line = describe(kind="keras_application", name="RegNetY160", image_size=224)
    count = int(line.split(", ")[1].split()[0].replace(",", "")) if ", " in line else 0
    assert abs(count - 83.6e6) < 0.2e6  # Radosavovic et al. 2020, table of RegNetY-16GF


def test_an_application_s_names_and_precision_are_its_own(mobilenet, tmp_path):
    _, path = mobilenet
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    given = {"kind": "keras_application", "name": "MobileNet", "weights": str(path), "image_size": 32}
    exact = build(**given, class_names=str(tmp_path / "names.txt"))
    assert exact.classes == ("a", "b", "c")
    low = build(**given, precision="mixed_bfloat16")
    images = tf.constant(np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3)).astype(np.float32))
    assert low.logits(images).dtype == tf.float32
    assert 0 < np.abs(exact.logits(images) - low.logits(images)).max() < 0.02
    assert keras.mixed_precision.global_policy().name == "float32"
