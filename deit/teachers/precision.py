"""A graph of others computed in bfloat16 or float16: its products, not its sums, by TensorFlow's own graph rewriter.

A SavedModel's operations have the dtypes that it was saved with, and no Keras policy reaches them. Its variables are
frozen into constants and grappler's mixed precision pass is run over this one graph; options of the process, which the
student shares, are not touched.
"""

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import wrap_function
from tensorflow.python.framework import convert_to_constants
from tensorflow.python.grappler import tf_optimizer
from tensorflow.python.training import saver

from deit import errors

MAX_BYTES = 2**31 - 2**24  # of constants: a graph is a protobuf of at most 2 GB
_PASSES = {"mixed_bfloat16": "auto_mixed_precision_onednn_bfloat16", "mixed_float16": "auto_mixed_precision"}
_DTYPES = {"mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}
_PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "DepthwiseConv2dNative")


def lowered(function, policy: str, *, path: str):
    """Return `function` (a concrete one: one tensor to one tensor) with its products in a policy's low precision.

    Its variables are copied; they must not be a strategy's. `path` is the model's, for messages.
    Errors: UserError where it holds more than a graph can, where the rewriter fails, or where it leaves every product
    as it was, as for float16 without a GPU.
    """
    size = sum(variable.shape.num_elements() * variable.dtype.size for variable in function.graph.variables)
    if size > MAX_BYTES:
        raise _refused(policy, f"{path} holds {size:,} bytes and a graph of constants at most {MAX_BYTES:,}")
    try:
        frozen = convert_to_constants.convert_variables_to_constants_v2(function)
        ((fed,), (fetched,)) = frozen.inputs, frozen.outputs
        graph = _rewritten(frozen.graph, fetched.name, _PASSES[policy])
        found = wrap_function.function_from_graph_def(graph, fed.name, fetched.name)
    except Exception as error:  # whatever a graph can't be frozen or rewritten for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refused(policy, f"the graph of {path} can't be rewritten: {reason}") from error
    if not _low_products(graph, _DTYPES[policy]):
        raise _refused(policy, f"no product of {path} can be in {_DTYPES[policy].name} on this device")
    return found


def _rewritten(graph: tf.Graph, output: str, optimizer: str):
    """Return the GraphDef of a graph after one grappler pass, on no particular device."""
    definition = graph.as_graph_def()
    for nodes in (definition.node, *(function.node_def for function in definition.library.function)):
        for node in nodes:
            node.device = ""  # a replica calls it on its own device
    meta = saver.export_meta_graph(graph_def=definition, graph=graph)
    meta.collection_def["train_op"].node_list.value.append(output)  # how grappler is told what must stay
    options = config_pb2.ConfigProto()
    rewrites = options.graph_options.rewrite_options
    rewrites.min_graph_nodes = -1
    rewrites.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
    rewrites.optimizers.append(optimizer)
    return tf_optimizer.OptimizeGraph(options, meta)


def _low_products(graph, dtype: tf.DType) -> int:
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return sum(node.op in _PRODUCTS and node.attr["T"].type == dtype.as_datatype_enum for node in nodes)


def _refused(policy: str, reason: str) -> errors.UserError:
    return errors.UserError(
        f"teacher.precision ({policy!r}) must be empty or float32 where teacher.kind is saved_model: {reason}"
    )
