"""The block with hand-written gradients that `model.fused_gradients` chooses: fewer passes over memory, less kept.

Promises: variables, own paths and numbers of `vit.Block`, the order of roundings apart (1e-5 in float32); statistics,
GELU and what is summed along a row are computed in float32 at least. Every formula here has its source beside it, and
the rest of the model knows nothing of it. R = B * N rows, D channels, h heads of d channels.

What is kept for the gradients of a micro-batch, for each block: two standardized inputs [R, D], q, k, v, attention
[B, h, N, N], its output [R, D] and the MLP's hidden layer before GELU [R, 4 D], with LayerScale (DeiT-III) also both
branches [R, D] in float32; besides, whatever the batch, the two kernels [D, 3 D] and [D, 4 D] that a layer
normalisation's scale was multiplied into, and in mixed precision the other two, rounded. Such kernels are made anew in
every pass: that pays where R > D, and costs a single picture of a wide network time (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from absl import logging

from deit import keras
from deit.models import vit

_EPSILON = {tf.bfloat16: 2.0**-7, tf.float16: 2.0**-10}  # from 1 to the next value
_COUNTING: list[bool] = []  # inside of `compiling`: its argument, the innermost last


@contextlib.contextmanager
def compiling(yes: bool) -> Iterator[None]:
    """Trace the block with or without the compiler, whatever this machine can do: its cost is counted so.

    The softmax of half precision is taken to sum in float32, as a GPU's does.
    """
    _COUNTING.append(yes)
    try:
        yield
    finally:
        _COUNTING.pop()


def _compiles() -> bool:
    return _COUNTING[-1] if _COUNTING else _compiler_works()


@functools.cache
def _compiler_works() -> bool:
    """Try XLA where a GPU is: it needs parts of CUDA that TensorFlow does without. A CPU's compiler is always there."""
    if not tf.config.list_physical_devices("GPU"):
        return True
    try:
        with tf.init_scope():
            tf.function(tf.math.erf, autograph=False, jit_compile=True)(tf.ones([8]))
    except tf.errors.OpError as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        logging.warning("XLA can't compile for this GPU (%s): model.fused_gradients=False may be faster", why)
        return False
    return True


def one_pass(scope: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile arithmetic on each value, or along a row, into one loop (XLA); a profile names it `scope`.

    TensorFlow's kernels would read and write memory once for every operation.
    """

    def decorate(call):
        compiled = tf.function(call, autograph=False, jit_compile=True)

        @functools.wraps(call)
        def either(*args):
            with tf.name_scope(scope):
                return (compiled if _compiles() else call)(*args)

        return either

    return decorate


def _wide(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if x.dtype in (tf.bfloat16, tf.float16) else x


def _normal(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the normal distribution's Phi(x) and density phi(x); the compiler's erf stays 1e-7 short of 1 far out."""
    cumulative = tf.where(tf.abs(x) < 9.0, 0.5 + 0.5 * tf.math.erf(x * 0.5**0.5), tf.cast(x > 0, x.dtype))
    return cumulative, tf.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)


def _column_sums(dy: tf.Tensor) -> tf.Tensor:
    """Return a bias' gradient [C] of dy [R, C]. TensorFlow's kernel sums bfloat16 in bfloat16, a product does not."""
    if dy.dtype != tf.bfloat16:
        return tf.raw_ops.BiasAddGrad(out_backprop=dy)
    return tf.matmul(tf.ones([1, tf.shape(dy)[0]], dy.dtype), dy)[0]


@tf.custom_gradient
def _add_bias(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    return tf.nn.bias_add(x, bias), lambda dy: (dy, _column_sums(dy))


@one_pass("gelu")
def _gelu(x: tf.Tensor) -> tf.Tensor:
    wide = _wide(x)
    return tf.cast(wide * _normal(wide)[0], x.dtype)


@one_pass("gelu")
def _gelu_and_gradient(x: tf.Tensor, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    wide = _wide(x)
    cumulative, density = _normal(wide)
    return tf.cast(wide * cumulative, x.dtype), tf.cast(_wide(dy) * (cumulative + wide * density), x.dtype)


@tf.custom_gradient
def gelu_dense(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Return GELU(x) kernel + bias [R, D] of x [R, 4 D], with GELU(x) = x Phi(x) (arXiv:1606.08415).

    Only x is kept: GELU(x), which the kernel's gradient needs, is computed again with its derivative
    Phi(x) + x phi(x), in the same pass.
    """
    y = tf.nn.bias_add(tf.matmul(_gelu(x), kernel), bias)

    def gradient(dy):
        hidden, dx = _gelu_and_gradient(x, tf.matmul(dy, kernel, transpose_b=True))
        return dx, tf.matmul(hidden, dy, transpose_a=True), _column_sums(dy)

    return y, gradient


@one_pass("layer_norm")
def _standardize(x: tf.Tensor, epsilon: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    centred = x - tf.reduce_mean(x, -1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(centred * centred, -1, keepdims=True) + epsilon)
    return centred * scale, scale


@one_pass("layer_norm")
def _standardize_gradient(y: tf.Tensor, scale: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    y, dy = _wide(y), _wide(dy)
    along_y = tf.reduce_mean(dy * y, -1, keepdims=True)
    return (dy - tf.reduce_mean(dy, -1, keepdims=True) - y * along_y) * scale


def standardize(x: tf.Tensor, epsilon: float, dtype: Any) -> tf.Tensor:
    """Return y = (x - mean) / sqrt(variance + epsilon) along the last axis, rounded to `dtype` (arXiv:1607.06450).

    dx = (dy - mean(dy) - y mean(dy y)) / sqrt(variance + epsilon): y and the root are kept, x is not.
    """

    @tf.custom_gradient
    def rounded(x):
        y, scale = _standardize(x, tf.constant(epsilon, x.dtype))
        y = tf.cast(y, dtype)
        return y, lambda dy: _standardize_gradient(y, scale, dy)

    return rounded(x)


@one_pass("softmax")
def _row_sums(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(_wide(a) * _wide(b), -1)


@one_pass("softmax")
def _score_gradient(weights: tf.Tensor, d_weights: tf.Tensor, sums: tf.Tensor) -> tf.Tensor:
    return tf.cast(_wide(weights) * (_wide(d_weights) - sums), weights.dtype)


@tf.custom_gradient
def attention(q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """Return O = P V [B, Q, h, d] with P = softmax(q k^T), of scaled q [B, h, Q, d], k and v [B, h, N, d].

    With S = q k^T: dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), dq = dS k, dk = dS^T q (arXiv:2205.14135, appendix
    B.2): the row sums of the softmax's gradient come from two small tensors instead of two of [B, h, Q, N].
    """
    weights = softmax(tf.matmul(q, k, transpose_b=True))
    mixed = tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3])

    def gradient(dy):
        sums = tf.transpose(_row_sums(dy, mixed), [0, 2, 1])[..., None]  # [B, h, Q, 1]
        dy = tf.transpose(dy, [0, 2, 1, 3])
        dv = tf.matmul(weights, dy, transpose_a=True)
        scores = _score_gradient(weights, tf.matmul(dy, v, transpose_b=True), sums)
        return tf.matmul(scores, k), tf.matmul(scores, q, transpose_a=True), dv

    return mixed, gradient


def softmax(scores: tf.Tensor) -> tf.Tensor:
    """Return the softmax along the last axis, its sums in float32 whatever the dtype."""
    if scores.dtype in _EPSILON and not (_COUNTING or _kernel_sums_in_float32(scores.dtype)):
        return tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), scores.dtype)
    return tf.nn.softmax(scores)


@functools.cache
def _kernel_sums_in_float32(dtype: tf.DType) -> bool:
    """Try the softmax of half precision on this machine: rows of 512 scores, within a rounding of float32's."""
    with tf.init_scope():
        scores = tf.cast(tf.random.stateless_uniform([64, 512], [0, 0]), dtype)  # no weight is below float16's range
        found = tf.cast(tf.function(tf.nn.softmax, autograph=False)(scores), tf.float32)
        exact = tf.nn.softmax(tf.cast(scores, tf.float32))
        return bool(tf.reduce_all(tf.abs(found / exact - 1.0) <= _EPSILON[dtype]))


@keras.utils.register_keras_serializable(package="deit", name="FusedBlock")
class Block(vit.Block):
    """`vit.Block` with the gradients above; scales that stand before a dense layer are multiplied into its weights.

    (y g + b) W + c = y (diag(g) W) + (b W + c) for a layer normalisation's scale g and shift b, and from the other side
    for attention's d^-.5: products of [D, 4 D] instead of passes over [R, 4 D]. LayerScale stays where it is: in half
    precision a kernel times 1e-6 is zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, autocast=False, **kwargs)  # the residual stream is float32

    def build(self, shape: Any) -> None:
        """Make the variables of the plain block's layers, under their names: this block never calls them."""
        shape = tf.TensorShape(shape)
        hidden = tf.TensorShape([*shape[:-1], 4 * self.dim])
        layers = {
            "norm1": (self.norm1, shape),
            "attn/qkv": (self.attn.qkv, shape),
            "attn/proj": (self.attn.proj, shape),
            "norm2": (self.norm2, shape),
            "mlp/fc1": (self.mlp.fc1, shape),
            "mlp/fc2": (self.mlp.fc2, hidden),
        }
        if self.layer_scale:
            layers |= {"ls1": (self.ls1, shape), "ls2": (self.ls2, shape)}
        for name, (layer, given) in layers.items():
            with tf.name_scope(name):
                layer.build(given)
        super().build(shape)

    @vit.plain
    def call(self, x: tf.Tensor, drop: tf.Tensor | None = None) -> tf.Tensor:
        kept = (None, None) if drop is None else (drop[:, 0], drop[:, 1])
        with keras.uncast_variables():
            x = tf.cast(x, self.variable_dtype)
            branch = self._attention(x)
            x = x[:, : self.keep] if self.keep else x
            x = vit.apply_branch(x, branch, kept[0], self.rate)
            return vit.apply_branch(x, self._mlp(x), kept[1], self.rate)

    def _attention(self, x: tf.Tensor) -> tf.Tensor:
        count, heads, width = x.shape[1], self.heads, self.dim // self.heads
        scale = tf.repeat(tf.constant([width**-0.5, 1.0, 1.0], self.variable_dtype), self.dim)
        qkv = self._dense(self._rows(x), *_scaled(*_after(self.norm1, self.attn.qkv), scale))
        q, k, v = tf.unstack(tf.transpose(tf.reshape(qkv, [-1, count, 3, heads, width]), [2, 0, 3, 1, 4]))
        q = q[:, :, : self.keep] if self.keep else q
        mixed = tf.reshape(attention(q, k, v), [-1, self.dim])
        branch = self._dense(mixed, self.attn.proj.kernel, self.attn.proj.bias)
        return self._branch(branch, self.keep or count, self.ls1 if self.layer_scale else None)

    def _mlp(self, x: tf.Tensor) -> tf.Tensor:
        hidden = self._dense(self._rows(x), *_after(self.norm2, self.mlp.fc1))
        branch = gelu_dense(hidden, self._rounded(self.mlp.fc2.kernel), self._rounded(self.mlp.fc2.bias))
        return self._branch(branch, x.shape[1], self.ls2 if self.layer_scale else None)

    def _rows(self, x: tf.Tensor) -> tf.Tensor:
        """Return [B, N, D] standardized, as rows [R, D] in the compute dtype."""
        return tf.reshape(standardize(x, self.epsilon, self.compute_dtype), [-1, self.dim])

    def _dense(self, rows: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        """Return rows [R, C] kernel [C, E] + bias."""
        # On rows, not on [B, N, D]: TensorFlow then adds the bias in the product's own kernel.
        return _add_bias(tf.matmul(rows, self._rounded(kernel)), self._rounded(bias))

    def _branch(self, rows: tf.Tensor, count: int, scale: vit.LayerScale | None) -> tf.Tensor:
        """Return what is added to the residual stream, [B, count, D], of rows [B * count, D]."""
        branch = tf.cast(tf.reshape(rows, [-1, count, self.dim]), self.variable_dtype)
        return branch if scale is None else branch * scale.gamma

    def _rounded(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(x, self.compute_dtype)


def _after(norm: Any, dense: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Return kernel and bias that do to a standardized input what `dense` does to `norm`'s output."""
    kernel = tf.convert_to_tensor(dense.kernel)
    return norm.gamma[:, None] * kernel, tf.linalg.matvec(kernel, norm.beta, transpose_a=True) + dense.bias


def _scaled(kernel: tf.Tensor, bias: tf.Tensor, scale: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return kernel * scale, bias * scale
