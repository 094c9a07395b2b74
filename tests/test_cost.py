"""The cost of an image, against counts made by hand and published ones."""

import math

import pytest
import tensorflow as tf

from deit import cost, keras


def counted(forward, size=16):
    return cost.of(forward, size).flops


def test_products_and_convolutions_are_counted_by_their_definition():
    kernel, depthwise, matrix = tf.zeros([3, 3, 3, 8]), tf.zeros([3, 3, 3, 2]), tf.zeros([5, 7])
    assert counted(lambda x: tf.nn.conv2d(x, kernel, 2, "SAME")) == 2 * (8 * 8 * 8) * (3 * 3 * 3)
    assert counted(lambda x: tf.nn.depthwise_conv2d(x, depthwise, [1, 1, 1, 1], "SAME")) == 2 * (16 * 16 * 6) * 9
    assert counted(lambda x: tf.matmul(x[0, :4, :5, 0], matrix)) == 2 * 4 * 5 * 7
    assert counted(lambda x: tf.matmul(x[0, :5, :4, 0], matrix, transpose_a=True)) == 2 * 4 * 5 * 7
    keys = tf.zeros([2, 3, 5])
    assert counted(lambda x: tf.linalg.matmul(x[0, :2, :4, :1] + keys[:, :1], keys, transpose_b=True)) == 240
    assert counted(lambda x: tf.einsum("bqd,bkd->bqk", x[0, :2, :4, :1] + keys[:, :1], keys)) == 2 * 2 * 4 * 5 * 3
    assert counted(lambda x: tf.reduce_sum(x) + tf.matmul(matrix, matrix, transpose_b=True)) == 0  # not of the image


def test_a_grouped_convolution_is_counted_inside_the_function_that_it_is():
    inputs = keras.Input([16, 16, 3])
    widened = keras.layers.Conv2D(8, 1, use_bias=False)(inputs)
    model = keras.Model(inputs, keras.layers.Conv2D(32, 3, groups=4, padding="same", use_bias=False)(widened))
    assert counted(model) == 2 * 16 * 16 * (8 * 3 + 32 * (9 * 8 // 4))


@pytest.mark.parametrize(("compiled", "tensors"), [(True, 2), (False, 4)])
def test_of_a_function_that_xla_compiles_only_the_results_are_bytes(compiled, tensors):
    @tf.function(autograph=False, jit_compile=compiled)
    def two_results(x):
        return tf.sin(x) + 1.0, tf.cos(x) * 2.0

    assert cost.of(two_results, 16).activation_bytes == tensors * 16 * 16 * 3 * 4


def test_sizes_that_the_graph_leaves_open_are_no_number():
    kernel = tf.zeros([3, 3, 3, 8])

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def anywhere(images):
        return tf.nn.conv2d(images, kernel, 1, "SAME")

    assert math.isnan(counted(anywhere))


def test_control_flow_and_unknown_products_are_no_number():
    kernel = tf.zeros([3, 3, 3, 3])

    def convolved(x):
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    turns = tf.Variable(2)
    assert math.isnan(
        counted(lambda x: tf.while_loop(lambda i, y: i < turns, lambda i, y: (i + 1, convolved(y)), (0, x)))
    )
    assert math.isnan(counted(lambda x: tf.cond(turns > 1, lambda: convolved(x), lambda: x)))
    assert math.isnan(counted(lambda x: tf.nn.conv3d(x[None], tf.zeros([1, 3, 3, 3, 3]), [1] * 5, "SAME")))
    assert math.isnan(counted(lambda x: tf.nn.conv2d_transpose(x, kernel, [1, 32, 32, 3], 2)))


@pytest.mark.parametrize(
    "name, multiply_adds",
    [("RegNetY004", 0.4e9), ("MobileNet", 569e6)],  # arXiv:2003.13678, table 3; arXiv:1704.04861, table 8
)
def test_published_networks_cost_what_their_papers_say(name, multiply_adds):
    network = getattr(keras.applications, name)(weights=None)
    assert counted(lambda images: network(images, training=False), 224) == pytest.approx(2 * multiply_adds, rel=0.02)


def test_bytes_are_those_of_an_image_and_not_of_weights_that_are_cast_for_all():
    kernel = tf.Variable(tf.zeros([16 * 16 * 3, 7]))

    def forward(x):
        return tf.matmul(tf.cast(tf.reshape(x, [-1, 16 * 16 * 3]), tf.bfloat16), tf.cast(kernel, tf.bfloat16))

    assert cost.of(forward, 16).activation_bytes == 2 * (16 * 16 * 3 + 7)
