"""The backbone with a new head and the small group-norm ResNet."""

import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import addons, errors, keras
from deit.models import cnn, factory, paths

WEIGHTS = os.environ.get("DEIT_TEST_WEIGHTS", "")


def config(**fields):
    model = base.get_config().model
    model.variant = "backbone"
    model.cut = "conv_pw_2_relu"
    for name, value in fields.items():
        model[name] = value
    return model


def build(size=32, classes=4, precision="float32", **fields):
    return factory.build(config(**fields), num_classes=classes, image_size=size, precision=precision)


def images(count=2, size=32):
    return np.random.default_rng(0).uniform(0, 255, [count, size, size, 3]).astype(np.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Write a MobileNet whose batch-norm statistics are not their initial ones; return (path, network)."""
    network = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(32, 32, 3))
    random = np.random.default_rng(3)
    for variable in network.weights:
        variable.assign(random.uniform(0.1, 0.3, variable.shape))
    path = tmp_path_factory.mktemp("weights") / "mobilenet.h5"
    network.save_weights(path)
    return str(path), network


def test_backbone_equals_the_network_it_was_loaded_from(stored):
    path, network = stored
    got = build(weights=path)
    inside = keras.Model(network.input, network.get_layer("conv_pw_2_relu").output)
    features = inside(images() / 127.5 - 1, training=False).numpy().mean((1, 2))  # MobileNet wants [-1, 1]
    head = {p: v.numpy() for p, v in paths.variables(got.model) if p.startswith("head/")}
    want = features @ head["head/kernel"] + head["head/bias"]
    np.testing.assert_allclose(got.logits(images())["cls"], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert got.drop_rates == ()
    assert got.train_model is got.model


def test_loaded_weights_are_kept_and_the_head_depends_on_the_seed(stored):
    path, network = stored
    first, second = build(weights=path), build(weights=path, seed=5)
    one, two = dict(paths.variables(first.model)), dict(paths.variables(second.model))
    assert list(one) == list(two)
    want = network.get_layer("conv_pw_1").kernel.numpy()
    np.testing.assert_array_equal(one["backbone/conv_pw_1/kernel"].numpy(), want)
    np.testing.assert_array_equal(two["backbone/conv_pw_1/kernel"].numpy(), want)
    assert not np.array_equal(one["head/kernel"].numpy(), two["head/kernel"].numpy())
    assert not any("conv_pw_3" in p for p in one)  # behind the cut


def test_batch_norm_stays_frozen_in_training_mode(stored):
    network = build(weights=stored[0])
    before = {path: v.numpy() for path, v in paths.variables(network.model)}
    want = network.model(images(), training=False)["cls"].numpy()
    with tf.GradientTape() as tape:
        got = network.model(images(), training=True)["cls"]
    np.testing.assert_array_equal(got, want)
    for path, variable in paths.variables(network.model):
        np.testing.assert_array_equal(variable.numpy(), before[path])
    trainable = {p for p, v in paths.variables(network.model) if v.trainable}
    assert "backbone/conv1/kernel" in trainable  # fine-tuned
    assert "backbone/conv1_bn/moving_mean" not in trainable
    assert None not in tape.gradient(got, network.model.trainable_variables)


def test_mixed_precision_leaves_the_global_policy_alone(stored):
    network = build(weights=stored[0], precision="mixed_bfloat16")
    assert keras.mixed_precision.global_policy().name == "float32"
    assert network.model.get_layer("backbone").get_layer("conv1").compute_dtype == "bfloat16"
    assert network.logits(images())["cls"].dtype == tf.float32


def test_backbone_round_trips_as_keras_file(stored, tmp_path):
    assert addons.AdamW  # with it, and a second Keras beside ours, loading this never ended
    network = build(weights=stored[0])
    network.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images())["cls"], network.logits(images())["cls"])


@pytest.mark.parametrize(
    "mode, want",
    [
        ("tf", [1.0, -1.0, 0.0]),
        ("torch", [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.5 - 0.406) / 0.225]),
        ("caffe", [127.5 - 103.939, 0 - 116.779, 255 - 123.68]),
        ("none", [255.0, 0.0, 127.5]),
    ],
)
def test_input_ranges_are_those_of_keras_applications(mode, want):
    pixel = np.array([255.0, 0.0, 127.5], np.float32).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(cnn.InputRange(mode)(pixel).numpy().ravel(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"backbone": "MobilNet"}, ["model.backbone (MobilNet)", "MobileNet"]),
        ({"weights": "none"}, ["model.weights (none)", "batch-norm"]),
        ({"weights": "nowhere.h5"}, ["model.weights (nowhere.h5)", "existing"]),
    ],
)
def test_check_names_field_value_and_rule(fields, words):
    with pytest.raises(errors.UserError) as caught:
        factory.check(config(**fields), 32)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_unknown_cut_names_the_nearest_layers(stored):
    with pytest.raises(errors.UserError, match=r"model.cut \(conv_pw_2_rel\).*conv_pw_2_relu"):
        build(weights=stored[0], cut="conv_pw_2_rel")


def test_weights_file_of_another_network_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2, name="conv1", input_shape=(3,))])
    model.save_weights(tmp_path / "other.h5")
    with pytest.raises(errors.UserError, match=r"lacks .* of the backbone's layers, the first is conv1_bn"):
        build(weights=str(tmp_path / "other.h5"))


def test_file_that_is_no_hdf5_is_refused(tmp_path):
    path = tmp_path / "text.h5"
    path.write_text("no weights")
    with pytest.raises(errors.UserError, match="is no Keras HDF5 weights file"):
        build(weights=str(path))


def test_group_norm_resnet_is_small_and_has_no_state():
    network = build(variant="groupnorm_resnet", classes=10)
    variables = paths.variables(network.model)
    assert all(v.trainable for _, v in variables)
    assert sum(np.prod(v.shape) for _, v in variables) < 400_000
    logits = network.logits(images(4))["cls"]
    assert logits.shape == (4, 10)
    # An example's logits don't depend on its batch, as they would with batch statistics.
    np.testing.assert_allclose(network.logits(images(4)[:1])["cls"], logits[:1], atol=1e-5)


def test_group_norm_resnet_has_the_same_paths_and_values_when_built_again():
    first = paths.variables(build(variant="groupnorm_resnet").model)
    second = paths.variables(build(variant="groupnorm_resnet").model)
    assert [p for p, _ in first] == [p for p, _ in second]
    for (_, a), (_, b) in zip(first, second):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.skipif(not pathlib.Path(WEIGHTS).is_file(), reason="DEIT_TEST_WEIGHTS names no MobileNet weights")
def test_real_mobilenet_features_are_alive():
    network = build(size=224, weights=WEIGHTS, cut="conv_pw_12_relu")
    features = network.model.get_layer("pool").output
    pooled = keras.Model(network.model.input, features)(images(2, 224)).numpy()
    assert pooled.shape == (2, 1024)
    assert pooled.min() >= 0 and pooled.max() <= 6
    assert (pooled > 0).mean() > 0.2
