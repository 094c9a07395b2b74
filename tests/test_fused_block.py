"""Hand-written gradients against automatic differentiation of the plain formula, and against finite differences."""

import numpy as np
import pytest
import tensorflow as tf

from configs import base
from deit.models import factory, fused_block, paths

SCALES = {"tiny": 1e-6, "ordinary": 1.0, "large": 20.0}
SHAPES = {"odd": (7, 3, 5, 9), "one row": (1, 1, 1, 1), "even": (8, 2, 4, 16)}  # rows, heads, channels a head, tokens


def drawn(*shape, scale=1.0, seed=0, dtype=np.float64):
    return tf.constant(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def gelu_dense_case(shape, scale):
    rows, _, channels, tokens = shape
    inputs = drawn(rows, tokens, scale=scale), drawn(tokens, channels, seed=1), drawn(channels, seed=2)

    def plain(x, kernel, bias):
        return x * 0.5 * (1.0 + tf.math.erf(x / np.sqrt(2.0))) @ kernel + bias

    return fused_block.gelu_dense, plain, inputs


def standardize_case(shape, scale):
    rows, _, channels, tokens = shape
    epsilon = 1e-6 * scale**2  # so that tiny inputs are no constant

    def plain(x):
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) / tf.sqrt(variance + epsilon)

    return (lambda x: fused_block.standardize(x, epsilon, x.dtype)), plain, [drawn(rows, tokens, channels, scale=scale)]


def attention_case(shape, scale):
    rows, heads, channels, tokens = shape
    asking = (tokens + 1) // 2
    inputs = (
        drawn(rows, heads, asking, channels, scale=scale**0.5),
        drawn(rows, heads, tokens, channels, scale=scale**0.5, seed=1),
        drawn(rows, heads, tokens, channels, seed=2),
    )

    def plain(q, k, v):
        scores = tf.exp(tf.einsum("bhqd,bhkd->bhqk", q, k))
        return tf.einsum("bhqk,bhkd->bqhd", scores / tf.reduce_sum(scores, -1, keepdims=True), v)

    return fused_block.attention, plain, inputs


def add_bias_case(shape, scale):
    rows, _, channels, tokens = shape
    inputs = drawn(rows * tokens, channels, scale=scale), drawn(channels, seed=1)
    return fused_block._add_bias, (lambda x, bias: x + bias[None]), inputs


CASES = {
    "gelu_dense": gelu_dense_case,
    "standardize": standardize_case,
    "attention": attention_case,
    "add_bias": add_bias_case,
}


@pytest.fixture
def tried_anew():
    """Forget what this machine's kernels were found to do, before and after."""
    for tried in (fused_block._kernel_sums_in_float32, fused_block._compiler_works):
        tried.cache_clear()
    yield
    for tried in (fused_block._kernel_sums_in_float32, fused_block._compiler_works):
        tried.cache_clear()


def gradients(function, inputs, upstream):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
    return y, tape.gradient(y, inputs, output_gradients=upstream)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "as on a GPU"])
def test_a_hand_written_gradient_is_that_of_the_plain_formula_in_float64(compiled, case, scale, shape):
    function, plain, inputs = case(shape, scale)
    upstream = drawn(*plain(*inputs).shape, seed=3)
    want_y, want = gradients(plain, inputs, upstream)
    with fused_block.compiling(compiled):
        got_y, got = gradients(function, inputs, upstream)
    np.testing.assert_allclose(got_y, want_y, rtol=1e-10, atol=1e-12)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=1e-8, atol=1e-10 * max(1.0, np.abs(w).max()))


@pytest.mark.parametrize("shape", [(3, 1, 3, 5), (2, 2, 2, 4)], ids=["odd", "even"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 4.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hand_written_gradient_is_the_slope_that_finite_differences_find(case, scale, shape):
    function, _, inputs = case(shape, scale)
    written, found = tf.test.compute_gradient(function, list(inputs), delta=1e-5 * scale)
    for w, f in zip(written, found):
        np.testing.assert_allclose(w, f, rtol=1e-6, atol=1e-7 * max(1.0, np.abs(f).max()))


def test_gelu_and_its_slope_are_finite_far_out_and_exact_at_zero():
    points = tf.constant([[-1e18], [-40.0], [-1e-30], [0.0], [1e-30], [40.0], [1e18]])
    one, zero = tf.ones([1, 1]), tf.zeros([1])
    y, (slope, _, _) = gradients(fused_block.gelu_dense, (points, one, zero), tf.ones([7, 1]))
    np.testing.assert_allclose(y.numpy().ravel(), [0, 0, -5e-31, 0, 5e-31, 40, 1e18], rtol=1e-6)
    np.testing.assert_allclose(slope.numpy().ravel(), [0, 0, 0.5, 0.5, 0.5, 1, 1], atol=1e-7)


def test_attention_that_looks_at_one_token_alone_has_finite_gradients():
    q, k = tf.constant([[[[300.0]]]]), tf.constant([[[[300.0], [-300.0]]]])  # scores 90,000 and -90,000
    y, got = gradients(fused_block.attention, (q, k, tf.constant([[[[2.0], [5.0]]]])), tf.ones([1, 1, 1, 1]))
    assert float(y) == 2.0
    np.testing.assert_array_equal(np.concatenate([g.numpy().ravel() for g in got]), [0, 0, 0, 1, 0])


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16], ids=["bfloat16", "float16"])
def test_sums_along_a_row_of_half_precision_are_taken_in_float32(dtype):
    """Summed in bfloat16, 4096 ones stop at 256; in float16, at 2048."""
    ones = tf.ones([4096, 1], dtype)
    _, (_, _, bias) = gradients(fused_block.gelu_dense, (ones, tf.ones([1, 1], dtype), tf.zeros([1], dtype)), ones)
    assert float(bias[0]) == 4096
    # A value whose mean is far from zero: in half precision the variance would be that of rounding.
    row = 100 + np.arange(4096) % 2
    got = fused_block.standardize(tf.constant(row[None], tf.float32), 1e-6, dtype)
    np.testing.assert_array_equal(tf.cast(got, tf.float32), [np.where(row == 100, -1.0, 1.0)])


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("trusted", [None, False], ids=["tried", "not trusted"])
def test_a_softmax_of_half_precision_is_float32_s_within_its_own_rounding(dtype, trusted, monkeypatch):
    if trusted is not None:
        monkeypatch.setattr(fused_block, "_kernel_sums_in_float32", lambda dtype: trusted)
    scores = tf.cast(np.random.default_rng(5).uniform(-1, 1, [50, 300]), dtype)
    exact = np.exp(tf.cast(scores, tf.float64).numpy())
    exact /= exact.sum(-1, keepdims=True)
    rounding = {tf.bfloat16: 2.0**-7, tf.float16: 2.0**-10}[dtype]
    np.testing.assert_allclose(tf.cast(fused_block.softmax(scores), tf.float64), exact, rtol=rounding)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16], ids=["bfloat16", "float16"])
def test_a_softmax_kernel_that_sums_in_half_precision_is_found_out(dtype, monkeypatch, tried_anew):
    def summed_in_half(scores):
        powers = tf.exp(scores)
        halves = powers
        while halves.shape[-1] > 1:  # a tree, as TensorFlow's own kernel: far better than one after the other
            halves = halves[:, ::2] + halves[:, 1::2]
        return powers / halves

    monkeypatch.setattr(tf.nn, "softmax", lambda x: summed_in_half(x) if x.dtype == dtype else tf.exp(
        x - tf.reduce_logsumexp(x, -1, keepdims=True)
    ))  # fmt: skip
    assert not fused_block._kernel_sums_in_float32(dtype)


def test_a_gpu_without_a_compiler_gets_single_operations_and_a_warning(monkeypatch, caplog, tried_anew):
    def failing(x):
        raise tf.errors.InternalError(None, None, "libdevice not found\nat all")

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["GPU:0"])
    assert fused_block._compiler_works()  # a CPU compiles here
    fused_block._compiler_works.cache_clear()
    monkeypatch.setattr(tf.math, "erf", failing)
    with caplog.at_level("WARNING", logger="absl"):
        assert not fused_block._compiler_works()
    assert "(libdevice not found): model.fused_gradients=False may be faster" in caplog.text


def test_the_softmax_gradient_of_half_precision_sums_in_float32():
    """With uniform attention over n tokens and v = i % 2, dS_j = (v_j - mean v) / n times the upstream gradient."""
    n, d = 512, 512
    v = np.repeat((np.arange(n) % 2)[:, None], d, 1)[None, None]
    inputs = [tf.cast(x, tf.bfloat16) for x in (np.zeros([1, 1, 1, d]), np.eye(n, d)[None, None], v)]
    _, (dq, _, _) = gradients(fused_block.attention, inputs, tf.ones([1, 1, 1, d], tf.bfloat16))
    np.testing.assert_array_equal(tf.cast(dq, tf.float32).numpy().ravel(), d * (v[0, 0, :, 0] - 0.5) / n)


def built(variant, *, fused_gradients, precision="float32", drop_path=0.4, num_classes=5):
    config = base.get_config().model
    with config.unlocked():
        config.variant, config.drop_path, config.fused_gradients = variant, drop_path, bool(fused_gradients)
    return factory.build(config, num_classes=num_classes, image_size=32, precision=precision)


def scattered(network, seed=0):
    """Give every variable another value, so that no scale is one and no bias zero; return (paths, variables)."""
    names, variables = zip(*paths.variables(network.model))
    rng = np.random.default_rng(seed)
    for name, variable in zip(names, variables):
        around = 1.0 if name.endswith(("gamma", "moving_variance")) else 0.0
        variable.assign(around + rng.normal(size=variable.shape) * (0.3 if around else 0.1))
    return names, variables


def measured(network, *, dropped, seed=0):
    """Return logits and gradients by own path of a batch of 3."""
    names, variables = scattered(network, seed)
    rng = np.random.default_rng(seed + 1)
    images = tf.constant(rng.integers(0, 256, [3, 32, 32, 3]), tf.float32)
    drop = None
    if dropped:  # each branch in one example of the three
        drop = tf.cast((np.arange(3)[:, None] + np.arange(len(network.drop_rates))) % 3 > 0, tf.float32)
    with tf.GradientTape() as tape:
        outputs = network.logits(images, drop)
        loss = tf.add_n([tf.reduce_sum(tf.math.log_softmax(y)[:, 1]) for y in outputs.values()])
    return outputs, dict(zip(names, tape.gradient(loss, variables)))


VARIANTS = ["deit_micro_distilled_patch8_32", "deit_micro_patch4_32", "deit3_micro_patch8_32"]


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "branches dropped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_has_the_logits_and_gradients_of_the_plain_layers_to_1e_5(variant, dropped):
    want, want_gradients = measured(built(variant, fused_gradients=False), dropped=dropped)
    got, got_gradients = measured(built(variant, fused_gradients=True), dropped=dropped)
    assert got_gradients.keys() == want_gradients.keys() and got.keys() == want.keys()
    for head in want:
        assert np.abs(want[head]).max() > 0.3
        np.testing.assert_allclose(got[head], want[head], atol=1e-5 * np.abs(want[head]).max())
    for path, gradient in want_gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, path
        if not path.endswith("qkv/bias"):  # a third of it, the keys', is rounding noise
            np.testing.assert_allclose(got_gradients[path], gradient, atol=1e-5 * largest, err_msg=path)


def test_the_bias_of_queries_and_values_has_its_gradient_too():
    width = 64
    both = [measured(built(VARIANTS[0], fused_gradients=f), dropped=True)[1] for f in (False, True)]
    for path in (path for path in both[0] if path.endswith("qkv/bias")):
        want, got = (np.delete(gradients[path].numpy(), range(width, 2 * width)) for gradients in both)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=path)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_in_mixed_precision_a_network_is_no_farther_from_float32_than_the_plain_layers(precision):
    """Root mean squares over six networks and batches of the relative distance of logits, and of gradients."""
    networks = [
        built(VARIANTS[0], fused_gradients=f, precision=p) for f, p in ((1, "float32"), (1, precision), (0, precision))
    ]
    distances = []
    for seed in range(6):
        exact, *others = (
            [*outputs.values(), *found.values()]
            for outputs, found in (measured(n, dropped=True, seed=seed) for n in networks)
        )
        assert all(value.dtype == tf.float32 for other in others for value in other)
        distances.append(
            [[np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(other, exact)] for other in others]
        )
    quick, plain = np.sqrt(np.mean(np.square(distances), 0))
    assert quick[:2].mean() < 1.1 * plain[:2].mean()
    assert np.median(quick[2:] / plain[2:]) < 1.1


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_layer_scale_that_half_precision_would_round_away_in_a_sum_counts(precision):
    """One branch of the last block changes the logits as in float32, to a few bits of half precision."""

    def effect(precision):
        network = built(VARIANTS[2], fused_gradients=True, precision=precision)
        names, variables = scattered(network)
        gamma = variables[names.index("blocks/3/ls2/gamma")]
        images = np.random.default_rng(1).integers(0, 256, [2, 32, 32, 3]).astype("f4")
        before = []
        for factor in (0.0, 1.0):
            gamma.assign(tf.fill(gamma.shape, factor * 1e-4))
            before.append(network.logits(images)["cls"].numpy())
        return before[1] - before[0]

    want = effect("float32")
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(effect(precision), want, atol=0.1 * np.abs(want).max())


def test_both_kinds_of_block_have_the_same_names_paths_initial_values_and_count():
    networks = [built(VARIANTS[2], fused_gradients=f).model for f in (False, True)]
    names = [[variable.name for variable in model.weights] for model in networks]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])
    plain, quick = map(paths.variables, networks)
    assert [path for path, _ in plain] == [path for path, _ in quick]
    for (path, a), (_, b) in zip(plain, quick):
        np.testing.assert_array_equal(a, b, err_msg=path)


def test_a_network_with_hand_written_gradients_is_a_keras_model_like_any_other(tmp_path):
    network = built(VARIANTS[0], fused_gradients=True)
    scattered(network)
    images = np.random.default_rng(1).integers(0, 256, [3, 32, 32, 3]).astype("f4")
    clone = type(network.model).from_config(network.model.get_config())
    clone.set_weights(network.model.get_weights())
    np.testing.assert_array_equal(clone(images)["cls"], network.logits(images)["cls"])
    network.model.save_weights(tmp_path / "weights.h5")  # by the variables' names
    plain = built(VARIANTS[0], fused_gradients=False)
    plain.model.load_weights(tmp_path / "weights.h5")
    for (path, a), (_, b) in zip(paths.variables(plain.model), paths.variables(network.model)):
        np.testing.assert_array_equal(a, b, err_msg=path)
