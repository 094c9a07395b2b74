"""Train, plan or evaluate a run: flags, logging, strategy, dispatch, exit code.

python main.py --config=configs/deit_tiny_flowers.py [--config.FIELD=VALUE ...] [--workdir=runs/NAME]
               [--mode=train|plan|eval]
"""

from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from deit import cli, rules
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
    """Dispatch on the mode and return an exit code: 0 done, 1 error, 4 diverged."""
    config = CONFIG.value
    rules.validate(config)
    workdir = run_directory.check_workdir(WORKDIR.value or cli.default_workdir(flags.FLAGS["config"].config_filename))

    from deit import evaluate, plan, runtime, teachers  # TensorFlow is imported only now, and starts no device yet
    from deit.models import factory

    if MODE.value == "eval":
        print(evaluate.table(evaluate.checkpointed(workdir, data_dir=config.data.data_dir)[1].metrics))
        return runtime.DONE
    for each in (config, config.teacher.train) if config.teacher.kind == "train" else (config,):
        factory.check(each.model, each.data.image_size)
        if MODE.value == "train":  # a plan may be ahead of its teacher
            teachers.check(each)
    runtime.prepare(config.precision, logical_cpus=config.devices if config.strategy == "mirrored" else 1)
    strategy = runtime.make_strategy(config.strategy, config.devices)
    if MODE.value == "plan":
        print(plan.offline(config, replicas=strategy.num_replicas_in_sync))
        return runtime.DONE
    return train(config, workdir, strategy)


def train(config, workdir: Path, strategy) -> int:
    """Train in a locked workdir, made only once everything fits: first the teacher, where it is a configuration."""
    from deit import loop, plan, runtime

    replicas = strategy.num_replicas_in_sync
    student, teacher = loop.prepare(config, workdir, replicas=replicas), None
    if config.teacher.kind == "train":
        teacher = loop.prepare(config.teacher.train, workdir / "teacher", replicas=replicas)
        loop.check_same_classes(teacher, student)
        logging.info("plan of %s\n%s", workdir, plan.offline(config, replicas=replicas))
    try:
        with run_directory.lock(workdir):
            if teacher is not None:
                logging.info("the teacher first, into %s", teacher.workdir)
                with run_directory.lock(teacher.workdir):
                    loop.train(teacher, strategy=strategy)
            loop.train(student, strategy=strategy)
    except loop.Diverged as error:
        cli.complain(str(error))
        return runtime.DIVERGED
    return runtime.DONE


if __name__ == "__main__":
    cli.run(
        main,
        config_flag="config",
        default_config=str(Path(__file__).with_name("configs") / "quickstart.py"),
        after_interrupt="the same command continues from the newest checkpoint",
    )
