"""What one image costs in a network: floating-point operations and bytes of activations, counted on its forward graph.

Promises: numbers come from the graph, not from tables; functions inside functions are counted; nothing is computed.
Where a graph leaves open what it does (sizes, branches, loops), the count is nan.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

_NO_BYTES = (
    "ReadVariableOp",
    "Const",
    "Placeholder",
    "Reshape",
    "Identity",
    "IdentityN",
    "NoOp",
    "Shape",
    "ExpandDims",
)
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# Control flow, whose branches and turns the graph leaves open, and products that no network here has.
_UNCOUNTED = ("While", "If", "Case", "Conv", "BatchMatMul", "SparseMatMul", "CuDNN")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs: forward floating-point operations (a multiply-add is two) and bytes of activations."""

    flops: float
    activation_bytes: float


def of(forward: Callable[[tf.Tensor], object], image_size: int) -> Cost:
    """Return the cost of `forward` on images float32 [1, image_size, image_size, 3]; it is traced, not run.

    What does not depend on the image is not counted: weights that are cast or scaled once for a batch. Of a function
    that XLA compiles, only the results are bytes.
    """
    images = tf.TensorSpec([1, image_size, image_size, 3], tf.float32)
    graph = tf.function(forward, autograph=False).get_concrete_function(images).graph
    operations = list(_operations(graph, {0}))
    return Cost(sum(_flops(op) for op, _ in operations), sum(_bytes(op) for op, stored in operations if stored))


def _operations(graph, given: set[int]) -> Iterator[tuple[tf.Operation, bool]]:
    """Yield the operations that depend on one of the inputs `given`, by number, and whether their results are stored.

    A grouped convolution, and a SavedModel, are functions that it calls: theirs are yielded.
    """
    known = {graph.inputs[i].ref() for i in given}
    for op in graph.get_operations():  # in the order in which they were made, inputs first
        if not any(tensor.ref() in known for tensor in op.inputs):
            continue
        known |= {tensor.ref() for tensor in op.outputs}
        if op.type not in _CALLS:
            yield op, True
            continue
        called = graph._get_function(op.get_attr("f").name)
        inner = _operations(called.graph, {i for i, tensor in enumerate(op.inputs) if tensor.ref() in known})
        if "_XlaMustCompile" in op.node_def.attr and op.get_attr("_XlaMustCompile"):
            yield op, True
            yield from ((each, False) for each, _ in inner)
        else:
            yield from inner


def _flops(op: tf.Operation) -> float:
    """Return the operations of a matrix product or convolution; everything else is small beside them."""
    if op.type == "Einsum":
        return _einsum_flops(op)
    if op.type not in ("MatMul", "BatchMatMulV2", "Conv2D", "DepthwiseConv2dNative"):
        return math.nan if op.type.removeprefix("Stateless").startswith(_UNCOUNTED) else 0.0
    left, right, out = map(_sides, (*op.inputs, op.outputs[0]))
    if op.type == "MatMul":
        inner = left[0] if op.get_attr("transpose_a") else left[1]
    elif op.type == "BatchMatMulV2":
        inner = left[-2] if op.get_attr("adj_x") else left[-1]
    elif op.type == "Conv2D":
        inner = right[0] * right[1] * right[2]
    else:
        inner = right[0] * right[1]
    return 2.0 * inner * float(np.prod(out, dtype=np.float64))


def _sides(tensor: tf.Tensor) -> list[float]:
    """Return a tensor's shape: an open first side is the one image, any other is not known (nan)."""
    sides = [math.nan if side is None else side for side in tensor.shape.as_list()]
    return [1, *sides[1:]] if sides and math.isnan(sides[0]) else sides


def _einsum_flops(op: tf.Operation) -> float:
    sizes: dict[str, float] = {}
    terms = op.get_attr("equation").decode().split("->")[0].split(",")
    for term, tensor in zip(terms, op.inputs):
        sizes.update(zip(term, _sides(tensor)))
    return 2.0 * float(np.prod([sizes[letter] for letter in sizes], dtype=np.float64))


def _bytes(op: tf.Operation) -> float:
    if op.type in _NO_BYTES:
        return 0.0
    shapes = [(tensor.shape, tensor.dtype.size) for tensor in op.outputs if tensor.shape.is_fully_defined()]
    return float(sum(shape.num_elements() * size for shape, size in shapes))
