"""Measure what a training run is made of, on this machine.

python tools/benchmark.py train|eval|accumulate|memory|startup [--config=FILE] [--rounds=3] [--updates=3] [--json]
    Updates, or evaluation, of the configured student on noise, the teacher's labels given, in processes that take
    turns. train: images/s and peak memory of one micro-batch, the floor (its matrix products alone, at their shapes)
    and the time by kind of operation; timm's update in turn with it, where torch and timm are installed (make peers).
    eval: passes of 64 without gradients, with timm's. accumulate: global_batch against one micro-batch. memory: peaks
    of smaller micro-batches. startup: seconds to the first update, by part.
python tools/benchmark.py scaling [--config=FILE] [--rounds=3] [--updates=3] [--out=FILE.png] [--json]
    The cost of an update against accum_steps 1 to 64 and image sizes 112 to 384 px: fitted laws, and a picture of them.
python tools/benchmark.py set [--config=FILE] [--rounds=3] [--out=FILE.md] [--json]
    All that speed and memory are judged by, tiny and small, float32 and bfloat16, with ratios to timm's: a table in
    Markdown. `make bench` is this; half an hour on 2 cores, which must have nothing else to do.
python tools/benchmark.py calibrate [--config=FILE]
    Two minutes of measurements that let --mode=plan predict images/s and memory on this machine, kept in the user's
    cache directory (or in DEIT_CACHE_DIR).
python tools/benchmark.py data [--config=FILE] [--recipe=config] [--images=2048] [--rounds=3] [--updates=3] [--json]
    The data stream stage by stage (read, decode+crop, augment, batch, mix): images/s, CPU time, the bottleneck; the
    images/s that the configured student takes; which of the two limits training, and by what factor.
    --recipe=crop_flip: random resized crop and flip alone, whatever else the configuration switches on.
python tools/benchmark.py data --peer [--config=FILE] [--recipe=config] [--images=2048] [--rounds=3] [--json]
    The stream with 2 threads against Pillow loaders of the same recipe with 2 processes, alternating.
    --timm_python=PATH: an interpreter with timm, torch and torchvision; timm's own loader takes its turns too.
python tools/benchmark.py teacher [--config=FILE] [--nostand_in] [--rounds=3] [--updates=3] [--json]
    Training without a teacher, with its answers cached and with it at work: images/s. The teacher is a stand-in of
    BiT-M R50x3 (850 MB in the temporary directory, 10 minutes on 2 cores); --nostand_in: the configured one.
python tools/benchmark.py workers [--config=FILE] [--rounds=3] [--updates=3] [--json]
    Two workers on this machine's loopback interface, each on half of the cores, at accum_steps 1 and 16: the bytes of
    an update in its graph and on the wire; images/s against one process on the same cores with the same global_batch,
    2 x micro_batch x accum_steps. No teacher, no mixing, no GPU; Linux. 15 minutes for DeiT-Ti on 2 cores.
python tools/benchmark.py checkpoint [--config=FILE] [--rounds=3] [--updates=3] [--json]
    How long a checkpoint stops the loop and how long its thread writes; images/s with every update (of micro_batch
    images) saved and without. No teacher, no mixing. It is written below the temporary directory: TMPDIR chooses.
"""

import contextlib
import functools
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags
from ml_collections import config_flags

from configs import base
from deit import cli, errors, rules

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration of data and student; configs/base.py has the fields."
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Alternating measurements of each kind; medians count.", lower_bound=1)
UPDATES = flags.DEFINE_integer("updates", 3, "Timed updates of the student a measurement.", lower_bound=1)
IMAGES = flags.DEFINE_integer("images", 2048, "data: timed images of each stage, a round.", lower_bound=1)
PEER = flags.DEFINE_boolean("peer", False, "data: compare the stream with a Pillow loader of the same recipe.")
RECIPE = flags.DEFINE_enum(
    "recipe", "config", ["config", "crop_flip"], "data: the configuration's augmentation, or crop and flip alone."
)
TIMM_PYTHON = flags.DEFINE_string(
    "timm_python", "", "data --peer: an interpreter that has timm, torch and torchvision (Pillow below 13)."
)
STAND_IN = flags.DEFINE_boolean(
    "stand_in", True, "teacher: measure a stand-in of BiT-M R50x3 (random weights) instead of the configured teacher."
)
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object instead of lines.")
OUT = flags.DEFINE_string(
    "out", "", "scaling: a new PNG file for the picture; set: a new .md file for the table. Empty: none."
)
ONE = ("update", "floor", "groups", "evaluate")  # a process of a measurement: its word, then a size
SPEED = ("train", "eval", "accumulate", "memory", "startup", "scaling", "set")
MODES = "|".join((*SPEED, "calibrate", "data", "teacher", "workers", "checkpoint"))
USAGE = f"usage: python tools/benchmark.py {MODES} [--config=FILE]; --help lists the flags"


def main(argv: list[str]) -> int:
    """Dispatch. `update|floor|groups|evaluate SIZE` is one process of a measurement, `worker` one of `workers`."""
    words = argv[1:]
    if len(words) == 2 and words[0] in ONE and words[1].isdecimal():
        print(json.dumps(_one(words[0], int(words[1]))))
    elif words == ["worker"]:
        _worker()
    elif len(words) == 1 and words[0] in COMMANDS:
        result, lines = COMMANDS[words[0]]()
        print(json.dumps(result) if JSON.value else "\n".join(lines))
    else:
        raise errors.UserError(f"{' '.join(words)!r} is no measurement; {USAGE}" if words else USAGE)
    return 0


main.takes_arguments = True


def _speed(mode: str) -> tuple[dict, list[str]]:
    """Measure train, eval, accumulate, memory, startup, scaling, or all of them: the set."""
    _refuse_others(mode)
    out = cli.new_file("--out", OUT.value, {"scaling": ".png", "set": ".md"}.get(mode, ""))
    rules.validate(CONFIG.value)
    from tools.benchmarks import scaling, speed, table

    measure, lines = {
        "train": (speed.train, speed.train_lines),
        "eval": (speed.evaluation, speed.evaluation_lines),
        "accumulate": (speed.accumulate, speed.accumulate_lines),
        "memory": (speed.memory, speed.memory_lines),
        "startup": (speed.startup, speed.startup_lines),
        "scaling": (scaling.measure, scaling.lines),
        "set": (functools.partial(table.measure, out=out), table.markdown),
    }[mode]
    with _reserved(out):
        result = measure(CONFIG.value, rounds=ROUNDS.value, command=_command(mode))
        if mode == "scaling" and out:
            scaling.draw(result, out)
    return result, lines(result)


@contextlib.contextmanager
def _reserved(out: Path | None) -> Iterator[None]:
    """Make the empty file of a result before half an hour goes by; remove it where nothing was written."""
    try:
        if out:
            out.touch(exist_ok=False)
    except OSError as error:
        raise errors.UserError(f"--out ({out}) can't be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        if out and out.exists() and not out.stat().st_size:
            out.unlink()


def _calibrate() -> tuple[dict, list[str]]:
    _refuse_others("calibrate")
    _refuse(["rounds"], "has no meaning for `calibrate`: each of its updates is measured in one process")
    rules.validate(CONFIG.value)
    from tools.benchmarks import calibrate

    result = calibrate.measure(CONFIG.value, command=_command("calibrate"))
    return result, calibrate.lines(result)


def _command(mode: str) -> list[str]:
    """Return this command without its mode and --out: what a process of a measurement is started with."""
    words = [word for word in sys.argv[1:] if not re.match("--?out=", word)]
    for alone in ("--out", "-out"):
        if alone in words:
            place = words.index(alone)
            del words[place : place + 2]
    words.remove(mode)
    return [sys.executable, __file__, *words]


def _one(word: str, size: int) -> dict:
    """Be one process of a measurement."""
    from tools.benchmarks import update

    if word == "evaluate":
        return update.evaluation(CONFIG.value, size, updates=UPDATES.value)
    return update.noise(CONFIG.value, size, updates=UPDATES.value, examine="" if word == "update" else word)


def _data() -> tuple[dict, list[str]]:
    if PEER.value:
        _refuse(["updates"], "times the student, which --peer leaves out")
    else:
        _refuse(["timm_python"], "is compared with --peer only")
    rules.validate(CONFIG.value)
    _check_data()
    from deit import runtime
    from deit.data import sources
    from tools.benchmarks import data, peer, update

    runtime.prepare(CONFIG.value.precision)
    config, said = CONFIG.value, []
    source = sources.open_source(config.data, config.data.train_split)
    if RECIPE.value == "crop_flip":
        config, said = update.copy_of(config, data.CROP_FLIP), ["random resized crop and flip alone"]
    if PEER.value:
        timm_python = TIMM_PYTHON.value
        if timm_python and not shutil.which(timm_python):
            raise errors.UserError(f"--timm_python ({timm_python}) must be a program that can be run")
        result = peer.compare(config, source, images=IMAGES.value, rounds=ROUNDS.value, timm_python=timm_python)
        said += peer.lines(result)
    else:
        result = data.measure(config, source, images=IMAGES.value, rounds=ROUNDS.value, updates=UPDATES.value)
        said += data.lines(result)
    return {"recipe": RECIPE.value, **result}, said


def _teacher() -> tuple[dict, list[str]]:
    _refuse(["peer", "images", "recipe", "timm_python"], "measures `data` and has no meaning for `teacher`")
    rules.validate(CONFIG.value)
    config = CONFIG.value
    if config.distill.kind == "none":
        raise errors.UserError("distill.kind ('none') must be hard or soft to measure a teacher")
    from deit import job, runtime
    from tools.benchmarks import teacher, update

    runtime.prepare(config.precision)
    _, source, eval_source = job.open_data(config, replicas=1)
    with tempfile.TemporaryDirectory(prefix="deit-benchmark-") as directory:
        flops = None
        if STAND_IN.value:
            path, size = Path(directory) / "bit", config.data.image_size
            flops = teacher.stand_in(path, num_classes=len(source.classes), image_size=size)
            own = {"teacher.kind": "saved_model", "teacher.path": str(path)}
            plain = base.get_config().teacher  # the stand-in has no pin, no background, raw input
            names = ("sha256", "members", "background", "class_names", "range", "mean", "std", "image_size")
            config = update.copy_of(config, own | {f"teacher.{name}": plain[name] for name in names})
        result = teacher.measure(
            config,
            source,
            eval_source,
            rounds=ROUNDS.value,
            updates=UPDATES.value,
            directory=Path(directory) / "cache",
        )
    result["flops_per_image"] = flops
    return result, teacher.lines(result)


def _workers() -> tuple[dict, list[str]]:
    _refuse_others("workers")
    rules.validate(CONFIG.value)
    _check_data()
    from tools.benchmarks import workers

    settings = [word for word in sys.argv[1:] if word != "workers"]
    command = [sys.executable, __file__, *settings, "worker"]
    result = workers.measure(CONFIG.value, rounds=ROUNDS.value, updates=UPDATES.value, command=command)
    return result, workers.lines(result)


def _worker() -> None:
    from tools.benchmarks import workers

    workers.serve(CONFIG.value)


def _checkpoint() -> tuple[dict, list[str]]:
    _refuse_others("checkpoint")
    rules.validate(CONFIG.value)
    _check_data()
    config = CONFIG.value
    from deit import runtime
    from deit.data import sources
    from tools.benchmarks import saving

    runtime.prepare(config.precision)
    source = sources.open_source(config.data, config.data.train_split)
    with tempfile.TemporaryDirectory(prefix="deit-benchmark-") as directory:
        result = saving.measure(config, source, rounds=ROUNDS.value, updates=UPDATES.value, directory=Path(directory))
    return result, saving.lines(result)


def _check_data() -> None:
    """Raise UserError where the configured data is absent: a benchmark downloads nothing."""
    from deit.data import sources

    wanted = CONFIG.value.data
    if sources.sizes(wanted) is None:
        raise errors.UserError(
            f"data.name ({wanted.name}) is not prepared in {wanted.data_dir or 'its default directory'}: give "
            "--config.data.data_dir=DIR with prepared data or --config.data.name=folder:PATH"
        )


def _refuse_others(mode: str) -> None:
    """Raise UserError where a flag of `data` or `teacher` alone was given."""
    _refuse(["peer", "images", "recipe", "timm_python"], f"measures `data` and has no meaning for `{mode}`")
    _refuse(["stand_in"], f"chooses what `teacher` measures and has no meaning for `{mode}`")
    if mode not in ("scaling", "set"):
        _refuse(["out"], f"is where `scaling` and `set` write and has no meaning for `{mode}`")


def _refuse(names: list[str], why: str) -> None:
    """Raise UserError where one of these flags was given."""
    for name in names:
        if flags.FLAGS[name].present:
            raise errors.UserError(f"--{name} {why}")


def _leave(code: int) -> None:
    """End the process: as one of several workers at once."""
    if "deit.runtime" in sys.modules:
        sys.modules["deit.runtime"].leave(code)
    sys.exit(code)


COMMANDS = {
    **{mode: functools.partial(_speed, mode) for mode in SPEED},
    "calibrate": _calibrate,
    "data": _data,
    "teacher": _teacher,
    "workers": _workers,
    "checkpoint": _checkpoint,
}

if __name__ == "__main__":
    default = str(ROOT / "configs" / "deit_tiny_flowers.py")
    cli.run(main, config_flag="config", default_config=default, leave=_leave)
