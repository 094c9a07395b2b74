"""The stand-in of BiT-M R50x3: its size by a formula, its arithmetic against NumPy, its interface as a SavedModel."""

import numpy as np
import pytest
import tensorflow as tf

from deit import cost
from tools.benchmarks import bit

R50 = (3, 4, 6, 3)
SMALL = {"num_classes": 3, "width": 0.5, "blocks": (2, 1)}
SIDE = 40


def parameters(width, blocks, classes):
    """Return the number of parameters by hand: kernels without bias, two numbers a normalised channel, the head."""
    base = int(64 * width)
    total, channels = 7 * 7 * 3 * base, base
    for stage, count in enumerate(blocks):
        inner = base * 2**stage
        out = 4 * inner
        rest = 9 * inner**2 + inner * out + 2 * 2 * inner  # 3x3, 1x1 and the norms before them
        total += channels * out  # the projection
        total += channels * inner + 2 * channels + rest  # the first unit
        total += (count - 1) * (out * inner + 2 * out + rest)
        channels = out
    return total + 2 * channels + channels * classes + classes


def held(network):
    return sum(variable.shape.num_elements() for variable in network.variables)


def convolve(x, kernel, stride):
    """Convolve [B, H, W, I] by the definition, zeros of half a kernel around it, with a standardised [H, W, I, O]."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    kernel = ((flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-10)).reshape(kernel.shape)
    half = kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel, optimize=True)


def normalise(x, norm):
    """Return ReLU of GroupNorm of [B, H, W, D], image by image and group by group."""
    gamma, beta = norm.gamma.numpy().ravel(), norm.beta.numpy().ravel()
    y, size = np.empty_like(x), x.shape[-1] // 32
    for image in range(len(x)):
        for group in range(32):
            own = x[image, :, :, group * size : (group + 1) * size]
            y[image, :, :, group * size : (group + 1) * size] = (own - own.mean()) / np.sqrt(own.var() + 1e-5)
    return np.maximum(y * gamma + beta, 0)


def unit_of(x, unit):
    """Return the unit's output; it strides in its 3x3 convolution and in its projection."""
    first, second, third = (conv.kernel.numpy().astype(float) for conv in unit.convs)
    active = normalise(x, unit.norms[0])
    shortcut = x
    if unit.projection is not None:
        shortcut = convolve(active, unit.projection.kernel.numpy().astype(float), unit.stride)
    y = normalise(convolve(active, first, 1), unit.norms[1])
    y = normalise(convolve(y, second, unit.stride), unit.norms[2])
    return convolve(y, third, 1) + shortcut


def logits_of(images, network):
    """Return logits [B, C] of a network by NumPy in double precision."""
    x = convolve(images / 127.5 - 1, network.root.kernel.numpy().astype(float), 2)
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-2, -1))
    for unit in network.units:
        x = unit_of(x, unit)
    return normalise(x, network.norm).mean((1, 2)) @ network.kernel.numpy() + network.bias.numpy()


def disturb(network):
    """Give every gamma, beta and bias a value of its own, and every kernel a mean that is not 0."""
    rng = np.random.default_rng(0)
    for variable in network.variables:
        variable.assign_add(rng.normal(0.1, 0.2, variable.shape).astype(np.float32))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, [2, SIDE, SIDE, 3]).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bit") / "saved"
    bit.export(str(directory), **SMALL, image_size=SIDE, seed=7)
    return directory


def test_r50x3_with_5_classes_has_211_million_parameters():
    assert parameters(3, R50, 5) == 211_204_805
    assert 211e6 < parameters(3, R50, 5) < 212e6


@pytest.mark.parametrize(("width", "blocks"), [(0.5, R50), (0.5, (1, 2)), (1, (1, 1, 1))])
def test_the_variables_are_as_many_as_the_formula_says(width, blocks):
    assert held(bit.Network(num_classes=5, width=width, blocks=blocks)) == parameters(width, blocks, 5)


def test_r50x3_itself_has_the_variables_of_the_formula_and_costs_72_gflops(monkeypatch):
    monkeypatch.setattr(bit, "_He", lambda seed: lambda shape: tf.zeros(shape))  # 850 MB need not be drawn
    network = bit.Network(num_classes=5)
    assert held(network) == parameters(3, R50, 5)
    assert cost.of(network.logits, 224).flops == pytest.approx(72.15e9, rel=1e-3)


def test_the_sides_are_halved_by_root_pooling_and_every_stage_but_the_first():
    network = bit.Network(num_classes=5, width=0.5)
    assert [unit.stride for unit in network.units] == [1] * 3 + [2] + [1] * 3 + [2] + [1] * 5 + [2] + [1] * 2
    assert [unit.projection is not None for unit in network.units] == [i in (0, 3, 7, 13) for i in range(16)]


def test_a_standardised_convolution_is_that_of_its_definition(images):
    conv = bit.StdConv([3, 3, 3, 8], bit._He(0))
    conv.kernel.assign_add(tf.random.stateless_uniform(conv.kernel.shape, [0, 1]))
    for stride in (1, 2):
        expected = convolve(images, conv.kernel.numpy().astype(float), stride)
        np.testing.assert_allclose(conv(images, stride=stride), expected, rtol=1e-4, atol=1e-2)


def test_a_kernel_times_a_number_plus_a_number_is_the_same_kernel(images):
    conv = bit.StdConv([3, 3, 3, 8], bit._He(0))
    before = conv(images)
    conv.kernel.assign(5 * conv.kernel + 0.3)
    np.testing.assert_allclose(conv(images), before, rtol=1e-4, atol=1e-2)


def test_a_constant_kernel_is_0_and_not_nan(images):
    conv = bit.StdConv([3, 3, 3, 8], tf.ones)
    np.testing.assert_array_equal(conv(images), np.zeros([2, SIDE, SIDE, 8]))


def test_a_group_is_normalised_over_its_pixels_and_channels():
    x = np.random.default_rng(2).normal(3, 2, [2, 5, 7, 64]).astype(np.float32)
    x[1] *= np.linspace(0.01, 20, 64, dtype=np.float32)
    norm = bit.GroupNormRelu(64)
    disturb(norm)
    np.testing.assert_allclose(norm(x), normalise(x.astype(float), norm), rtol=1e-4, atol=1e-5)


def test_a_constant_group_is_beta_and_not_nan():
    norm = bit.GroupNormRelu(64)
    norm.beta.assign_add(tf.ones_like(norm.beta))
    np.testing.assert_allclose(norm(tf.fill([1, 4, 4, 64], 37.3)), np.ones([1, 4, 4, 64]), atol=0.05)


def test_a_variance_that_rounds_below_0_is_0():
    x = np.random.default_rng(4).uniform(1e3, 1e5, [64, 1, 1, 32]).astype(np.float32) * np.ones([1, 7, 9, 1], "f4")
    assert np.isfinite(bit.GroupNormRelu(32)(x)).all()


@pytest.mark.parametrize(("first", "stride", "channels"), [(True, 1, 32), (True, 2, 64), (False, 1, 128)])
def test_a_unit_is_that_of_its_definition(first, stride, channels):
    unit = bit.Unit(channels, 32, bit._He(0), first=first, stride=stride)
    disturb(unit)
    x = np.random.default_rng(3).normal(0, 1, [2, 6, 6, channels]).astype(np.float32)
    expected = unit_of(x.astype(float), unit)
    np.testing.assert_allclose(unit(x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_network_is_that_of_its_definition(images):
    network = bit.Network(**SMALL)
    disturb(network)
    expected = logits_of(images.astype(float), network)
    assert expected.shape == (2, 3) and np.ptp(expected, axis=0).min() > 1e-3  # the pictures do differ
    np.testing.assert_allclose(network.logits(images), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_saved_model_takes_one_raw_batch_and_gives_one_named_output(saved, images):
    signature = tf.saved_model.load(str(saved)).signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    assert (name, spec.dtype, spec.shape.as_list()) == ("images", tf.float32, [None, SIDE, SIDE, 3])
    assert {name: value.shape.as_list() for name, value in signature.structured_outputs.items()} == {
        "logits": [None, 3]
    }
    expected = logits_of(images.astype(float), bit.Network(**SMALL, seed=7))
    np.testing.assert_allclose(signature(images=tf.constant(images))["logits"], expected, rtol=1e-3, atol=1e-3)


def test_an_image_s_logits_do_not_depend_on_its_batch(saved, images):
    signature = tf.saved_model.load(str(saved)).signatures["serving_default"]
    alone = signature(images=tf.constant(images[:1]))["logits"]
    np.testing.assert_allclose(alone, signature(images=tf.constant(images))["logits"][:1], rtol=1e-4, atol=1e-5)


def test_without_a_size_it_takes_any(tmp_path, images):
    bit.export(str(tmp_path / "saved"), **SMALL)
    serve = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    assert serve(images=tf.constant(images[:, :24]))["logits"].shape == (2, 3)


def test_the_seed_chooses_the_weights_and_every_kernel_is_drawn_anew():
    one, same, other = (bit.Network(**SMALL, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.kernel, same.kernel)
    assert np.abs(one.kernel - other.kernel).min() > 0
    assert np.abs(one.units[1].convs[1].kernel - one.units[0].convs[1].kernel).max() > 0.01
    assert np.std(one.kernel) == pytest.approx(np.sqrt(2 / one.kernel.shape[0]), rel=0.1)
