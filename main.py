"""Train, plan or evaluate a run: flags, logging, strategy, dispatch, exit code.

python main.py --config=configs/deit_tiny_flowers.py [--config.FIELD=VALUE ...] [--workdir=runs/NAME]
               [--mode=train|plan|eval]
"""

import contextlib
import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from deit import cli, cluster, errors, rules
from deit import workdir as run_directory

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file FILE.py[:ARG] (code that runs), or the config.json of a run to repeat it. Default: "
    "configs/quickstart.py. --config.FIELD=VALUE changes a field; configs/base.py lists them all.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config name>[-<config arg>].")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "plan", "eval"],
    "train: train, or continue the run in the workdir. plan: resolve everything and print it. eval: evaluate the "
    "newest checkpoint of the workdir with its own configuration; of --config only data.data_dir is taken.",
)


def main(_) -> int:
    """Dispatch on the mode and return an exit code: 0 done, 1 error, 3 a peer was lost, 4 diverged, 42 preempted."""
    config = CONFIG.value
    rules.validate(config)
    workdir = run_directory.check_workdir(WORKDIR.value or cli.default_workdir(flags.FLAGS["config"].config_filename))

    import tensorflow as tf  # only now: a bad flag is answered in a second

    from deit import evaluate, plan, runtime, signals, teachers, workers
    from deit.models import factory

    if MODE.value == "eval":
        print(evaluate.table(evaluate.checkpointed(workdir, data_dir=config.data.data_dir)[1].metrics))
        return errors.DONE
    for each in (config, config.teacher.train) if config.teacher.kind == "train" else (config,):
        factory.check(each.model, each.data.image_size)
        if MODE.value == "train":  # a plan may be ahead of its teacher
            teachers.check(each)
    runtime.prepare(config.precision, logical_cpus=runtime.logical_cpus(config))
    if MODE.value == "plan":
        print(plan.offline(config, replicas=runtime.replicas(config), workdir=workdir))
        return errors.DONE
    try:
        strategy = runtime.make_strategy(config)
    except tf.errors.OpError as error:
        if not runtime.in_cluster():
            raise
        cli.complain(f"the workers did not come together, start all again: {error}")
        return errors.PEER_LOST
    place = workers.place(strategy)
    with signals.listening(alone=place.count == 1) as stop:  # at once: until now TensorFlow swallows SIGTERM
        if place.count > 1:
            logging.info("%s, this is worker %d", cluster.up(place.count), place.index)
        return train(config, workdir, strategy, stop)


def train(config, workdir: Path, strategy, stop) -> int:
    """Train in a workdir that the chief locks and makes, only once everything fits; a teacher to train comes first."""
    from deit import guard, job, loop, plan, runtime, workers

    with contextlib.ExitStack() as held:
        try:
            with workers.chief_first(strategy):  # it may prepare the data
                replicas = strategy.num_replicas_in_sync
                student, teacher = job.prepare(config, workdir, replicas=replicas), None
                if config.teacher.kind == "train":
                    teacher = job.prepare_teacher(student, replicas=replicas)
            chief = workers.place(strategy).chief
            for each in filter(None, (student, teacher) if chief else ()):
                held.enter_context(run_directory.lock(each.workdir, patience=runtime.lock_patience()))
            if teacher is not None:
                if chief:  # told before an hour of the teacher's training
                    logging.info("plan of %s\n%s", workdir, plan.offline(config, replicas=replicas, workdir=workdir))
                    logging.info("the teacher first, into %s", teacher.workdir)
                loop.train(teacher, strategy=strategy, stop=stop)
            loop.train(student, strategy=strategy, stop=stop)
        except loop.Preempted as ended:
            logging.info("%s", ended)
            return errors.PREEMPTED
        except guard.Diverged as error:
            cli.complain(str(error))
            return errors.DIVERGED
        except Exception as error:
            told = workers.lost_peer(error, strategy)
            if not told:
                raise
            cli.complain(f"another worker of this run is gone, start all again ({told})")
            return errors.PEER_LOST
    return errors.DONE


def leave(code: int) -> None:
    """End the process with an exit code."""
    if "deit.runtime" in sys.modules:
        sys.modules["deit.runtime"].leave(code)
    sys.exit(code)


if __name__ == "__main__":
    cli.run(
        main,
        config_flag="config",
        default_config=str(Path(__file__).with_name("configs") / "quickstart.py"),
        after_interrupt="the same command continues from the newest checkpoint",
        leave=leave,
    )
