"""Measure one update with and without accumulation: images/s and peak memory, alternating, a process each.

python tools/benchmark.py accumulate [--config=configs/deit_tiny_flowers.py] [--rounds=3] [--updates=3] [--json]

The images are noise and the teacher's labels are given, so that nothing but the update is measured.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags
from ml_collections import config_flags

from deit import cli, errors

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration of the student; configs/base.py has the fields."
)
ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Pairs of processes: one micro-batch, then a whole global batch.", lower_bound=1
)
UPDATES = flags.DEFINE_integer(
    "updates", 3, "Timed updates of a whole global batch; as many images without it.", lower_bound=1
)
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of lines.")
CLASSES = 5


class GivenLabels:
    """A teacher whose answer is a cheap function of the picture."""

    num_classes = CLASSES

    def logits(self, images):
        """Return logits [B, C] from the first pixels."""
        return images[:, 0, :CLASSES, 0]


def main(argv: list[str]) -> int:
    """Dispatch: `accumulate` alternates processes of `update GLOBAL_BATCH`."""
    if argv[1:2] == ["update"] and len(argv) == 3:
        print(json.dumps(measure(CONFIG.value, int(argv[2]))))
    elif argv[1:] == ["accumulate"]:
        accumulate()
    else:
        raise errors.UserError("usage: python tools/benchmark.py accumulate [--config=FILE]; --help lists the flags")
    return 0


main.takes_arguments = True


def accumulate() -> None:
    """Alternate single micro-batches and whole batches, print both and the ratios."""
    config = CONFIG.value
    if config.micro_batch == config.global_batch:
        raise errors.UserError(f"global_batch ({config.global_batch}) must be larger than micro_batch to compare them")
    found: dict[int, list[dict]] = {config.micro_batch: [], config.global_batch: []}
    for _ in range(ROUNDS.value):
        for size in found:
            settings = [word for word in sys.argv[1:] if word != "accumulate"]
            command = [sys.executable, __file__, "update", str(size), *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise errors.UserError(f"the measurement ended with exit code {done.returncode}: {last}")
            found[size].append(json.loads(done.stdout.splitlines()[-1]))
    rates, peaks = ({size: statistics.median(r[key] for r in runs) for size, runs in found.items()}
                    for key in ("images_per_sec", "peak_mb"))  # fmt: skip
    one, whole = config.micro_batch, config.global_batch
    result = {
        "micro_batch": one, "global_batch": whole,
        "images_per_sec": [rates[one], rates[whole]], "peak_mb": [peaks[one], peaks[whole]],
        "speed_ratio": rates[whole] / rates[one], "memory_ratio": peaks[whole] / peaks[one],
    }  # fmt: skip
    if JSON.value:
        print(json.dumps(result))
        return
    print(f"one update of {one:>4}: {rates[one]:6.2f} images/s  {peaks[one]:6.0f} MB peak")
    print(f"one update of {whole:>4}: {rates[whole]:6.2f} images/s  {peaks[whole]:6.0f} MB peak")
    print(f"ratio             : {result['speed_ratio']:6.3f}           {result['memory_ratio']:6.3f}")


def measure(config, size: int) -> dict:
    """Time updates of `size` images in this process: median images/s after the first two, peak resident MB."""
    import numpy as np
    import tensorflow as tf

    from deit import config as configuration
    from deit import runtime, train_step
    from deit.models import factory

    with config.unlocked():
        config.global_batch, config.total_updates = size, 1000
    runtime.prepare(config.precision)
    strategy = runtime.make_strategy("one_device")
    config = configuration.resolve(
        config, train_size=1000, eval_size=1, classes=[str(i) for i in range(CLASSES)], replicas=1
    )
    with strategy.scope():
        network = factory.build(
            config.model, num_classes=CLASSES, image_size=config.data.image_size, precision=config.precision
        )
        state = train_step.create_state(config, network)
    update = train_step.make(config, strategy, state, GivenLabels())
    rng = np.random.default_rng(0)
    side = config.data.image_size
    batch = {
        "image": tf.constant(rng.integers(0, 256, [size, side, side, 3], np.uint8)),
        "label": tf.constant(rng.integers(0, CLASSES, [size]).astype("i4")),
        "weight": tf.ones([size]),
        "position": tf.range(size, dtype=tf.int64),
        "drop": tf.constant((rng.random([size, len(network.drop_rates)]) > 0.1).astype("f4")),
    }
    wanted = UPDATES.value if size > config.micro_batch else max(UPDATES.value, 12)
    seconds = []
    for _ in range(wanted + 2):
        started = time.perf_counter()
        update(batch).numpy()
        seconds.append(time.perf_counter() - started)
    return {
        "images_per_sec": size / statistics.median(seconds[2:]),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    cli.run(main, config_flag="config", default_config=str(ROOT / "configs" / "deit_tiny_flowers.py"))
