"""The floor of an update: its matrix products alone, at their real shapes, timed in the same process.

Promises: the products are those of the update's own graph, gradients included; nothing is assumed about the network.
Products with a vector (sums written as one, a shift that goes through a kernel) are no part of the floor.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

_TYPES = ("MatMul", "BatchMatMulV2", "Conv2D", "Conv2DBackpropFilter", "Conv2DBackpropInput")
_OTHERS = ("Einsum", "Depthwise", "Conv", "BatchMatMul", "SparseMatMul", "CuDNN", "While", "Case")  # beginnings
_ATTRIBUTES = ("transpose_a", "transpose_b", "adj_x", "adj_y", "strides", "padding")
_AT_ONCE = 5  # runs in one graph: the time of starting one is no product's
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
      kind: TensorFlow's name of the operation.
      shapes: of its inputs; a filter's or an image's sizes, given as a tensor, as themselves.
      out: its result's shape.
      dtype: of what is multiplied.
      attributes: (name, value) of the transpositions, or of strides and padding.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    out: tuple[int, ...]
    dtype: tf.DType
    attributes: tuple[tuple[str, object], ...]

    @property
    def with_vector(self) -> bool:
        """Whether one side of a matrix product is a vector."""
        return self.kind in ("MatMul", "BatchMatMulV2") and 1 in self.out[-2:]

    @property
    def flops(self) -> float:
        """Floating-point operations, a multiply-add is two."""
        settings = dict(self.attributes)
        if self.kind == "MatMul":
            inner = self.shapes[0][0 if settings["transpose_a"] else 1]
        elif self.kind == "BatchMatMulV2":
            inner = self.shapes[0][-2 if settings["adj_x"] else -1]
        elif self.kind == "Conv2D":
            inner = np.prod(self.shapes[1][:3])
        else:  # each value of the output's gradient meets a patch of the image in each filter
            filter_shape = self.out if self.kind == "Conv2DBackpropFilter" else self.shapes[1]
            return 2.0 * float(np.prod(self.shapes[2], dtype=np.float64) * np.prod(filter_shape[:3]))
        return 2.0 * float(inner * np.prod(self.out, dtype=np.float64))


def of(graph: tf.Graph) -> collections.Counter[Product]:
    """Count the products of a graph, functions that it calls included.

    Errors: ValueError for a product that is not counted, for a loop, whose turns a graph does not say, and for a shape
    that is not known.
    """
    found = collections.Counter(_product(op) for op in _operations(graph))
    return collections.Counter({product: count for product, count in found.items() if not product.with_vector})


def _operations(graph) -> Iterator[tf.Operation]:
    """Yield the products that a graph always computes."""
    for op in _needed(graph):
        kind = op.type.removeprefix("Stateless")
        if op.type in _TYPES:
            yield op
        elif op.type in _CALLS:
            yield from _operations(graph._get_function(op.get_attr("f").name).graph)
        elif kind.startswith(_OTHERS):
            raise ValueError(f"{op.name} is a {op.type}, which is not counted")
        elif kind == "If":  # the optimizer's, of an update whose gradients are finite
            for branch in ("then_branch", "else_branch"):
                product = next(_operations(graph._get_function(op.get_attr(branch).name).graph), None)
                if product is not None:
                    raise ValueError(f"{product.name} is computed under a condition, which is not counted")


def _needed(graph) -> set[tf.Operation]:
    """Return the operations that a function's results or effects need: the others never run."""
    needed, waiting = set(), [*(tensor.op for tensor in graph.outputs), *graph.control_outputs]
    while waiting:
        op = waiting.pop()
        if op not in needed:
            needed.add(op)
            waiting += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    return needed


def _product(op: tf.Operation) -> Product:
    shapes = []
    for tensor in op.inputs:
        known = tf.get_static_value(tensor) if tensor.dtype == tf.int32 else None
        if known is None and tensor.dtype == tf.int32:  # of a convolution's gradient: the sizes of what comes out
            known = np.array(op.outputs[0].shape)
        if known is None and not tensor.shape.is_fully_defined():
            raise ValueError(f"{op.name}: the shape {tensor.shape} is not known")
        shapes.append(tuple(known.tolist()) if known is not None else tuple(tensor.shape))
    attributes = tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name in _ATTRIBUTES
        if name in op.node_def.attr
        for value in [op.get_attr(name)]
    )
    return Product(op.type, tuple(shapes), tuple(op.outputs[0].shape), op.outputs[0].dtype, attributes)


def seconds(counted: collections.Counter[Product], *, repeats: int = 5) -> float:
    """Return the time of all products: of each kind the median of `repeats` runs, times its number."""
    return sum(_seconds(product, repeats) * count for product, count in counted.items())


def _seconds(product: Product, repeats: int) -> float:
    rng = np.random.default_rng(0)
    sizes = {"Conv2DBackpropFilter": 1, "Conv2DBackpropInput": 0}.get(product.kind)  # which input is a shape
    inputs = [
        tf.constant(shape, tf.int32) if i == sizes else tf.cast(rng.random(shape, np.float32), product.dtype)
        for i, shape in enumerate(product.shapes)
    ]
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in product.attributes}
    operation = getattr(tf.raw_ops, product.kind)
    names = _INPUTS[product.kind]
    fixed = {names[i]: inputs[i] for i in range(len(names)) if i == sizes}
    given = {names[i]: inputs[i] for i in range(len(names)) if i != sizes}

    @tf.function(autograph=False)  # as in the update: TensorFlow chooses the kernel when it optimises a graph
    def run(given):
        corners = []
        for _ in range(_AT_ONCE):
            with tf.control_dependencies(corners[-1:]):  # one after the other, and each is needed
                corners.append(tf.cast(tf.reshape(operation(**given, **fixed, **settings), [-1])[0], tf.float32))
        return tf.add_n(corners)

    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run(given).numpy()
        found.append((time.perf_counter() - started) / _AT_ONCE)
    return statistics.median(found[1:])


_INPUTS = {
    "MatMul": ("a", "b"),
    "BatchMatMulV2": ("x", "y"),
    "Conv2D": ("input", "filter"),
    "Conv2DBackpropFilter": ("input", "filter_sizes", "out_backprop"),
    "Conv2DBackpropInput": ("input_sizes", "filter", "out_backprop"),
}
