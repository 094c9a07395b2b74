"""Where the time of a graph goes, by TensorFlow's own profiler: matrix products, softmax, GELU, LayerNorm, and so on.

Promises: times are those of TensorFlow's kernels, per run, as long as one kernel runs at a time: ask for that with
TF_NUM_INTEROP_THREADS=1 before TensorFlow starts. What no rule names is `other`, nothing is left out.
"""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import tensorflow as tf

# The first that fits an operation's "name:type" decides. Names are scopes of deit/models, train_step and mixing.
RULES = (
    ("optimizer", r"optimizer\w*/|guard\w*/|ResourceApply"),
    ("matrix products", r":.*(MatMul|Conv2D)"),
    ("attention softmax", r"softmax\w*/|blocks.*softmax|attn/.*:(_Mkl)?(Softmax|Neg|Sum|Mul|Sub)$|:_MklSoftmax$"),
    ("GELU", r"gelu\w*/"),
    ("input", r"normalize/"),
    ("LayerNorm", r"layer_norm\w*/|norm[12]?/"),
    ("layout", r":(_Mkl)?(Transpose|Pack|Unpack|ConcatV2|Split|StridedSlice|StridedSliceGrad|Tile|Slice|Pad)$"),
    ("bias and residual", r"add(_?\d*|N|V2)?[:/]|BiasAdd|:(_Mkl)?Add|blocks\.\d+/mul"),
    ("other", r""),
)


def group(name: str) -> str:
    """Return the group of an operation, named "scope/name:Type"."""
    return next(group for group, rule in RULES if re.search(rule, name, re.IGNORECASE))


def measure(run: Callable[[], object], *, runs: int) -> dict[str, float]:
    """Return seconds of each group in one run, the mean of `runs`, the largest first."""
    with tempfile.TemporaryDirectory(prefix="deit-benchmark-") as directory:
        tf.profiler.experimental.start(directory)
        try:
            for _ in range(runs):
                run()
        finally:
            tf.profiler.experimental.stop()
        (trace,) = Path(directory).rglob("*.xplane.pb")
        totals = dict.fromkeys((name for name, _ in RULES), 0.0)
        for name, seconds in _events(trace.read_bytes()):
            totals[group(name)] += seconds / runs
    return dict(sorted(((n, s) for n, s in totals.items() if s), key=lambda item: -item[1]))


def _events(trace: bytes) -> Iterable[tuple[str, float]]:
    """Yield ("name:Type", seconds) of every kernel in a trace; a kernel that calls a function is its start."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(trace)
    for plane in space.planes:
        named = {key: data.name for key, data in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                data = plane.event_metadata[event.metadata_id]
                if data.display_name and ":" in data.name:
                    yield data.name, event.duration_ps / 1e12
                elif data.name == "ExecutorState::ProcessAsync::Start":
                    stats = {
                        named[stat.metadata_id]: stat.str_value or named.get(stat.ref_value) for stat in event.stats
                    }
                    yield f"{stats['name']}:{stats['kernel_type']}", event.duration_ps / 1e12
