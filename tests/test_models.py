"""The student against a NumPy twin, published parameter counts and the rules for initial values."""

import math

import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit import errors, keras
from deit.models import factory, paths, vit

MICRO = "deit_micro_distilled_patch4_32"


def model_config(variant=MICRO, **fields):
    config = base.get_config().model
    config.variant = variant
    for name, value in fields.items():
        config[name] = value
    return config


def build(variant=MICRO, *, size=32, classes=5, precision="float32", **fields):
    config = model_config(variant, **fields)
    return factory.build(config, num_classes=classes, image_size=size, precision=precision)


def images(count=3, size=32):
    return np.random.default_rng(0).uniform(0, 255, [count, size, size, 3]).astype(np.float32)


def scatter(network, scale=0.2):
    """Give every variable, biases and norms too, a value that shows in the output."""
    random = np.random.default_rng(1)
    values = {}
    for path, variable in paths.variables(network.model):
        value = random.normal(0, scale, variable.shape) + path.endswith("gamma")
        values[path] = value
        variable.assign(value.astype(np.float32))
    return values


def twin(w, x, *, heads, patch, mean, std, drop=None, rates=None):
    """Compute DeiT's logits in float64 NumPy, every token through every block."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def dense(x, name):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def attention(x, name):
        q, k, v = np.split(dense(x, f"{name}/qkv"), 3, axis=-1)
        out = []
        for columns in np.split(np.arange(q.shape[-1]), heads):
            scores = q[..., columns] @ k[..., columns].swapaxes(1, 2) / math.sqrt(len(columns))
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(scores / scores.sum(-1, keepdims=True) @ v[..., columns])
        return dense(np.concatenate(out, -1), f"{name}/proj")

    def mlp(x, name):
        x = dense(x, f"{name}/fc1")
        return dense(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), f"{name}/fc2")

    x = (np.asarray(x, np.float64) / 255 - mean) / std
    kernel = w["patch_embed/proj/kernel"]
    grid = x.shape[1] // patch
    rows = []
    for i in range(grid):
        for j in range(grid):
            square = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            rows.append(np.einsum("bhwc,hwcd->bd", square, kernel) + w["patch_embed/proj/bias"])
    tokens = [np.repeat(w[f"tokens/{t}"], len(x), 0) for t in ("cls_token", "dist_token")]
    x = np.concatenate([*tokens, np.stack(rows, 1)], 1) + w["tokens/pos_embed"]
    for i in range(4):
        for j, (part, branch) in enumerate((("attn", attention), ("mlp", mlp))):
            scale = 1.0 if drop is None else (drop[:, 2 * i + j] / (1 - rates[2 * i + j]))[:, None, None]
            x = x + scale * branch(norm(x, f"blocks/{i}/norm{j + 1}"), f"blocks/{i}/{part}")
    x = norm(x, "norm")
    return {"cls": dense(x[:, 0], "head"), "dist": dense(x[:, 1], "head_dist")}


def test_forward_equals_numpy_twin():
    network = build()
    weights = scatter(network)
    mean, std = np.array(model_config().mean), np.array(model_config().std)
    got = network.logits(images())
    want = twin(weights, images(), heads=2, patch=4, mean=mean, std=std)
    assert set(got) == {"cls", "dist"}
    for head in want:
        np.testing.assert_allclose(got[head], want[head], rtol=1e-4, atol=1e-4)
        assert np.abs(want[head]).max() > 0.5
    np.testing.assert_allclose(factory.fused(got), (want["cls"] + want["dist"]) / 2, rtol=1e-4, atol=1e-4)


def test_dropped_branches_equal_numpy_twin():
    network = build(drop_path=0.6)
    weights = scatter(network)
    np.testing.assert_allclose(network.drop_rates, [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6], atol=1e-12)
    drop = np.array([[1, 1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 1]], dtype=np.float32)
    mean, std = np.array(model_config().mean), np.array(model_config().std)
    got = network.logits(images(), drop)
    want = twin(weights, images(), heads=2, patch=4, mean=mean, std=std, drop=drop, rates=np.array(network.drop_rates))
    for head in want:
        np.testing.assert_allclose(got[head], want[head], rtol=1e-4, atol=2e-4)
    assert not np.allclose(got["cls"], network.logits(images())["cls"], atol=0.1)


def test_each_example_has_its_own_flags():
    network = build(drop_path=0.5)
    scatter(network)
    drop = np.ones([3, 8], np.float32)
    before = network.logits(images(), drop)["cls"].numpy()
    drop[1, 6] = 0
    after = network.logits(images(), drop)["cls"].numpy()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_gelu_is_exact():
    mlp = vit.Mlp(1)
    mlp.build([None, None, 1])
    mlp(np.zeros([1, 1, 1], np.float32))
    mlp.fc1.kernel.assign([[1.0, 0, 0, 0]])
    mlp.fc2.kernel.assign([[1.0], [0], [0], [0]])
    points = np.array([-2.0, 1.0, 2.3], np.float32)
    got = mlp(points[:, None, None]).numpy().ravel()
    # x * Phi(x) from a table of the normal distribution; the tanh approximation is off by 1.5e-4 and more.
    np.testing.assert_allclose(got, [-0.0455003, 0.8413447, 2.2753347], atol=2e-6)


def test_gradients_reach_every_variable():
    network = build(drop_path=0.1)
    names, variables = zip(*paths.variables(network.model))
    with tf.GradientTape() as tape:
        outputs = network.logits(images(), np.ones([3, 8], np.float32))
        loss = tf.reduce_sum(outputs["cls"] ** 2) + tf.reduce_sum(outputs["dist"] ** 2)
    gradients = tape.gradient(loss, variables)
    assert [name for name, gradient in zip(names, gradients) if gradient is None] == []
    assert all(np.abs(g).max() > 0 for n, g in zip(names, gradients) if n.endswith("kernel"))


def test_initial_values_do_not_depend_on_what_was_built_before():
    first = paths.variables(build().model)
    build("deit_micro_patch4_32")
    keras.layers.Dense(3)(tf.zeros([1, 2]))
    second = paths.variables(build().model)
    assert [path for path, _ in first] == [path for path, _ in second]
    for (_, a), (_, b) in zip(first, second):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_initial_values_depend_on_path_and_seed_only():
    plain = dict(paths.variables(build("deit_micro_patch4_32").model))
    distilled = dict(paths.variables(build().model))
    other = dict(paths.variables(build(seed=1).model))
    path = "blocks/3/attn/qkv/kernel"
    np.testing.assert_array_equal(plain[path].numpy(), distilled[path].numpy())
    assert not np.array_equal(distilled[path].numpy(), other[path].numpy())
    assert not np.array_equal(distilled[path].numpy(), distilled["blocks/2/attn/qkv/kernel"].numpy())
    assert not np.array_equal(distilled["head/kernel"].numpy(), distilled["head_dist/kernel"].numpy())


@pytest.mark.parametrize("variant, stddev", [("deit_tiny_distilled_patch16_224", 0.02), (MICRO, 0.088)])
def test_initial_values_are_a_truncated_normal_with_zero_biases(variant, stddev):
    values = {path: v.numpy() for path, v in paths.variables(build(variant).model)}
    kernels = np.concatenate([v.ravel() for path, v in values.items() if path.endswith("kernel")])
    assert np.abs(kernels).max() <= 2.28 * stddev  # two spreads of the whole normal, 2 / .88 of what is left
    assert abs(kernels.std() - stddev) < 0.01 * stddev  # PyTorch's trunc_normal_(std=.02), which cuts at 2
    assert abs(kernels.mean()) < 0.01 * stddev
    for path, value in values.items():
        if path.endswith(("bias", "beta")):
            assert not value.any(), path
        if path.endswith("gamma"):
            assert (value == 1).all(), path
    for token in ("cls_token", "dist_token", "pos_embed"):
        assert 0.5 * stddev < values[f"tokens/{token}"].std() < 1.5 * stddev


def test_both_models_share_their_variables():
    network = build()
    inference = {path: id(v) for path, v in paths.variables(network.model)}
    training = {path: id(v) for path, v in paths.variables(network.train_model)}
    assert inference == training
    assert "blocks/3/attn/qkv/kernel" in inference


def test_weight_decay_exclusions_are_deits():
    variables = paths.variables(build().model)
    decayed = {path for path, variable in variables if not paths.no_decay(path, variable)}
    blocks = {f"blocks/{i}/{p}/kernel" for i in range(4) for p in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")}
    assert decayed == blocks | {"patch_embed/proj/kernel", "head/kernel", "head_dist/kernel"}


@pytest.mark.parametrize("variant, size", [(MICRO, 32), ("deit_micro_patch4_32", 32)])
def test_keras_round_trip_gives_equal_logits(variant, size, tmp_path):
    network = build(variant, size=size)
    scatter(network, 0.05)
    network.model.save(tmp_path / "model.keras")
    network.train_model.save(tmp_path / "training.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    training = keras.models.load_model(tmp_path / "training.keras")
    drop = np.ones([3, len(network.drop_rates)], np.float32)
    drop[:, -1] = 0
    for head, want in network.logits(images()).items():
        np.testing.assert_array_equal(loaded(images())[head], want)
    for head, want in network.logits(images(), drop).items():
        np.testing.assert_array_equal(training({"image": images(), "drop": drop})[head], want)


@pytest.mark.parametrize("precision, tolerance", [("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
def test_mixed_precision_keeps_variables_and_logits_in_float32(precision, tolerance):
    full, mixed = build(), build(precision=precision)
    assert {v.dtype for _, v in paths.variables(mixed.model)} == {tf.float32}
    assert mixed.model.get_layer("blocks.1").compute_dtype == precision.removeprefix("mixed_")
    assert keras.mixed_precision.global_policy().name == "float32"
    scatter(full, 0.05)
    scatter(mixed, 0.05)
    want, got = full.logits(images())["cls"], mixed.logits(images())["cls"]
    assert got.dtype == tf.float32
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_keras_example_has_its_size_and_its_initial_values():
    network = build("keras_example", size=224, mean=(0, 0, 0), std=(1, 1, 1))
    values = {path: v.numpy() for path, v in paths.variables(network.model)}
    assert sum(v.size for v in values.values()) == 9_079_498  # worked out by hand for 5 classes
    assert not any(values[f"tokens/{t}"].any() for t in ("cls_token", "dist_token", "pos_embed"))
    limit = math.sqrt(6 / (192 + 768))  # Glorot's, of the first dense layer of an MLP
    kernel = values["blocks/0/fc1/kernel"]
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    assert values["blocks/0/attn/query/kernel"].shape == (192, 3, 192)
    assert len(network.drop_rates) == 24
    assert network.drop_rates[0] == 0.0
    assert network.drop_rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "fields, size, words",
    [
        ({"variant": "deit_tny_patch16_224"}, 224, ["deit_tny_patch16_224", "deit_tiny_patch16_224"]),
        ({"variant": "deit_tiny_patch16_224"}, 15, ["data.image_size (15)", "16"]),
        ({"variant": "keras_example"}, 15, ["data.image_size (15)", "16"]),
        ({"variant": "keras_example.x"}, 224, ["model.variant (keras_example.x)", "nearest: keras_example"]),
        ({"variant": "groupnorm_resnet.a1_in1k"}, 224, ["model.variant (groupnorm_resnet.a1_in1k) is unknown"]),
    ],
)
def test_bad_values_are_named_in_one_line(fields, size, words):
    config = model_config()
    for name, value in fields.items():
        config[name] = value
    with pytest.raises(errors.UserError) as caught:
        factory.check(config, size)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_unknown_precision_is_refused():
    with pytest.raises(errors.UserError, match=r"precision \(float8\).*mixed_bfloat16"):
        build(precision="float8")
