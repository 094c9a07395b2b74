"""Compute a teacher's answers ahead of training, once for every run that reads the same stream.

python tools/cache_teacher.py --config=FILE --config.teacher.cache_dir=DIR [--shard=I/N] [--updates=A:B]

Takes the flags of the training command; that one then reads the answers with --config.teacher.cache=read. What is there
is kept, so that the same command continues after any kill. --shard=0/4 to --shard=3/4, in parallel processes or on
several machines, share the work: their files lie side by side in DIR.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from deit import cli, errors, rules

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration of the training run, FILE.py[:ARG] or a run's config.json. Default: configs/deit_tiny_flowers.py; "
    "--config.FIELD=VALUE changes a field. teacher.cache_dir must be given.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory, where teacher.kind=train finds its teacher. Default: as main.py has it."
)
SHARD = flags.DEFINE_string("shard", "0/1", "I/N: compute part I of N, 0 <= I < N; parts are whole files.")
UPDATES = flags.DEFINE_string("updates", ":", "A:B: updates A to B - 1 only; an empty end is the schedule's.")


def main(_) -> int:
    """Fill the cache, print its size, return 0."""
    config = CONFIG.value
    with config.unlocked():
        config.teacher.cache = "readwrite"  # what is there is kept
        if config.strategy in ("auto", "multi_worker"):  # shards know nothing of each other
            config.strategy = "one_device"
    rules.validate(config)
    shard, bounds = numbers("shard", SHARD.value, r"(\d+)/(\d+)"), numbers("updates", UPDATES.value, r"(\d*):(\d*)")
    if shard[0] >= shard[1]:
        raise errors.UserError(f"--shard ({SHARD.value}) must be I/N with 0 <= I < N")
    workdir = Path(WORKDIR.value or cli.default_workdir(flags.FLAGS["config"].config_filename))

    from deit import job, runtime, teachers  # TensorFlow starts only now
    from deit.data import stream
    from deit.teachers import ahead, labeller, report

    teachers.check(config)
    if config.teacher.kind == "train":
        check_trained(workdir)
    runtime.prepare(config.precision, logical_cpus=runtime.logical_cpus(config))
    strategy = runtime.make_strategy(config)
    resolved, train_source, eval_source = job.open_data(config, replicas=strategy.num_replicas_in_sync)
    first, last = wanted(bounds, resolved.resolved.total_updates)
    teacher = labeller.open_labeller(
        resolved, strategy, workdir=workdir, train_source=train_source, eval_source=eval_source, keeps_on=False
    )
    batches = stream.evaluation(eval_source, resolved, batch=resolved.eval.batch)
    measured = teacher.measure(batches, resolved.resolved.classes)  # by one shard, where they do not start at once
    logging.info("teacher: %s", report.describe(measured))
    report.gate(measured, resolved.teacher.min_accuracy)
    fill(resolved, strategy, train_source, teacher, ahead.shard(range(first, last), *shard))
    return 0


def check_trained(workdir: Path) -> None:
    """Raise UserError unless the teacher that main.py trains into `workdir` is finished: it would be another one."""
    from deit import checkpoint, saved

    try:
        where = checkpoint.locate(workdir / "teacher")
        done = checkpoint.manifest(where)["step"] == saved.config_of(where).resolved.total_updates
    except errors.UserError:
        done = False
    if not done:
        raise errors.UserError(
            f"teacher.kind ('train'): the teacher in {workdir / 'teacher'} must be trained first: run main.py with the "
            "same --config and --workdir until the student starts"
        )


def numbers(flag: str, text: str, form: str) -> tuple[int | None, ...]:
    """Return the numbers of a flag, None for one that is left out. Errors: UserError."""
    match = re.fullmatch(form, text)
    if not match:
        raise errors.UserError(f"--{flag} ({text}) must be {'I/N' if flag == 'shard' else 'A:B'}")
    return tuple(int(number) if number else None for number in match.groups())


def wanted(bounds: Sequence[int | None], total: int) -> tuple[int, int]:
    """Return the updates [first, last) of A:B in a schedule of `total`. Errors: UserError."""
    first, last = bounds[0] or 0, total if bounds[1] is None else bounds[1]
    if not first < last <= total:
        raise errors.UserError(f"--updates ({UPDATES.value}) must be A:B with 0 <= A < B <= {total}, the schedule's")
    return first, last


def fill(config, strategy, source, teacher, updates: list[int]) -> None:
    """Compute what the cache lacks of `updates`, with a bar, and print sizes. Errors: UserError."""
    from deit import plan
    from deit.teachers import ahead, chunks

    cache, often = teacher.cache, 0.5 if sys.stderr.isatty() else 60  # seconds: a log file needs fewer lines
    looked = tqdm(updates, unit="update", desc="looking at what is there", leave=False, mininterval=often)
    lacking = ahead.missing(config, teacher, looked)
    there = len(updates) - len(lacking)
    logging.info("%d of %d updates are there; %d to compute", there, len(updates), len(lacking))
    if not updates:
        logging.warning("nothing is left for this shard: parts are files of %d updates", chunks.CHUNKS)
    with tqdm(total=len(updates), initial=there, unit="update", desc="answers", mininterval=often) as bar:
        lost = ahead.fill(config, strategy, source, teacher, lacking, advance=bar.update)
    total, now, whole = config.resolved.total_updates, cache.disk_bytes(), cache.chunk_bytes()
    print(
        f"{len(updates) - len(lost)} of {len(updates)} updates in {cache.directory}, {plan.size(now)} on disk; the "
        f"schedule's {total} take {plan.size(whole * total)}, {whole / config.global_batch:,.2f} bytes a position"
    )
    if lost:
        raise errors.UserError(f"the teacher gave no finite answers to {len(lost)} updates, the first is {lost[0]}")


if __name__ == "__main__":
    cli.run(
        main,
        config_flag="config",
        default_config=str(ROOT / "configs" / "deit_tiny_flowers.py"),
        after_interrupt="the same command continues",
    )
