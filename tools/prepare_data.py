"""Check a data set, or bring it into a form that trains: array_record files, which are read by index.

python tools/prepare_data.py check   --config.data.name=folder:pictures [--config.data...] [--json=FILE]
python tools/prepare_data.py convert --config.data.name=folder:pictures --out=DIR [--name=NAME] [--skip_bad]
python tools/prepare_data.py prepare --config.data.name=tfds:imagenet2012 --config.data.data_dir=DIR --manual_dir=DIR
python tools/prepare_data.py digest  --config.data.name=folder:pictures [--config.data...]

check reads every image of data.train_split and data.eval_split; it ends with exit code 1 where something is
unreadable or in both, or a class has no training images. convert copies the whole splits behind those two. Neither
downloads anything, or changes or overwrites a file. digest reads those two once and stores their content digests
beside the data, for caches of what a teacher says about them.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
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
    "Configuration whose data.* is read. Default: configs/base.py; --config.data.FIELD=VALUE changes it.",
)
OUT = flags.DEFINE_string(
    "out", None, "convert: directory for the copy, outside the data; later --config.data.data_dir."
)
NAME = flags.DEFINE_string(
    "name", None, "convert: what the copy is called. Default: the folder's or the data set's name."
)
SKIP_BAD = flags.DEFINE_boolean("skip_bad", False, "convert: leave unreadable images out instead of stopping.")
MANUAL_DIR = flags.DEFINE_string("manual_dir", None, "prepare: where the files that you fetched by hand lie.")
JSON = flags.DEFINE_string(
    "json", None, "check: also write everything that was found to this file; an existing one is kept."
)

SHOWN = 50  # lines of a list that are printed; --json has them all


def main(argv: list[str]) -> int:
    """Dispatch on the command; return 0."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise errors.UserError(f"usage: python tools/prepare_data.py {'|'.join(COMMANDS)}; --help lists the flags")
    rules.validate(CONFIG.value)
    logging.set_verbosity(logging.WARNING)  # TFDS says what it opens, in the middle of the progress bar
    COMMANDS[argv[1]](CONFIG.value.data)
    return 0


main.takes_arguments = True


def check(data) -> None:
    """Print what is in both splits. Errors: UserError, after the report, for what must not stay as it is."""
    target = cli.new_file("--json", JSON.value)

    from deit.data import sources, survey  # TensorFlow starts only now

    surveys = _surveys(data, [data.train_split, data.eval_split])
    found = {"data": data.name, **survey.facts(surveys, max_pixels=data.max_pixels, image_size=data.image_size)}
    print(report(found, data))
    used = {name for split in (data.train_split, data.eval_split) for name in _names(split)}
    others = sorted(set(sources.split_names(data)) - used)
    if others:
        print(f"\nnot read, since data.train_split and data.eval_split do not name them: {', '.join(others)}")
    if target:
        with target.open("x", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=2) + "\n")
    faults = problems(found)
    if faults:
        raise errors.UserError(f"data.name ({data.name}): {'; '.join(faults)}")


def convert(data) -> None:
    """Copy the splits to array_record files and print the flags that train on them."""
    if not OUT.value:
        raise errors.UserError("--out must be given: the directory for the copy")

    from deit.data import records

    name = NAME.value or re.sub(r"[^a-z0-9]+", "_", _own_name(data.name).lower()).strip("_")
    target, source = records.check_target(OUT.value, name).resolve(), _folder(data.name)
    if source and source in target.parents:
        raise errors.UserError(f"--out ({OUT.value}) must lie outside {source}: it would be part of your data")
    wanted = list(dict.fromkeys(_names(data.train_split) + _names(data.eval_split)))
    surveys = _surveys(data, wanted)
    if len({found.classes for found in surveys}) > 1:
        raise errors.UserError(f"data.name ({data.name}) must have the same classes in {' and '.join(wanted)}")
    bad = {split: found.bad() for split, found in zip(wanted, surveys)}
    listed = [f"{found.name(i)} ({why})" for found, split in zip(surveys, wanted) for i, why in bad[split].items()]
    if listed and not SKIP_BAD.value:
        raise errors.UserError(
            f"data.name ({data.name}) has unreadable images ({len(listed)}), nothing was written: "
            f"{', '.join(listed[:5])}{', …' if len(listed) > 5 else ''}; "
            "--skip_bad leaves them out, `check` lists them all"
        )
    for line in listed:
        print(f"left out: {line}")

    copied = _write(data, wanted, bad, name)
    print(f"{sum(info.num_examples for info in copied.info.splits.values()):,} images in {copied.data_dir}; train with")
    print(f"--config.data.name=tfds:{name} --config.data.data_dir={OUT.value}")
    if "all" in wanted:  # a reserved word of TFDS
        print("and `train` in place of `all` in data.train_split and data.eval_split")


def prepare(data) -> None:
    """Let TFDS prepare a named data set as array_record files."""
    if not data.name.startswith("tfds:"):
        raise errors.UserError(f"data.name ({data.name}) must be tfds:NAME; a folder needs no preparation, see convert")
    if MANUAL_DIR.value and not Path(MANUAL_DIR.value).is_dir():
        raise errors.UserError(f"--manual_dir ({MANUAL_DIR.value}) must be a directory that exists")

    from deit.data import tfds_source

    there = tfds_source.prepared(data)
    if there:
        raise errors.UserError(f"data.name ({data.name}) is prepared in {there.data_dir} already")
    builder = tfds_source.prepare(data, manual_dir=MANUAL_DIR.value or "")
    for split in builder.info.splits.values():
        print(f"{split.name}: {split.num_examples:,} images")
    print(f"in {builder.data_dir}; train with")
    print(f"--config.data.name={data.name}" + (f" --config.data.data_dir={data.data_dir}" if data.data_dir else ""))


def digest(data) -> None:
    """Store the content digests of both splits beside the data and print them."""
    from deit.data import digest as digests

    for split in dict.fromkeys([data.train_split, data.eval_split]):
        value, path = digests.store(data, split)
        print(f"{split}: {value}")
    print(f"in {path}" if path else "not stored: digits lie in no file")


COMMANDS = {"check": check, "convert": convert, "prepare": prepare, "digest": digest}


def problems(found: dict) -> list[str]:
    """Return what must not stay as it is, each in a few words."""
    leaks = sum(group["leak"] for group in found["duplicates"])
    empty = [name for name, count in found["splits"][0]["per_class"].items() if not count]
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    return [
        text
        for text, wrong in (
            (f"unreadable images: {len(_unreadable(found))}", _unreadable(found)),
            (f"pictures in both splits: {leaks}", leaks),
            ("the splits have different classes", not found["same_classes"]),
            (f"classes without training images: {', '.join(empty[:5])}{more}", empty),
        )
        if wrong
    ]


def report(found: dict, data) -> str:
    """Return the text for what `survey.facts` found."""
    splits = found["splits"]
    head = ["", *(split["split"] for split in splits)]
    row = lambda title, values: [title, *values]  # noqa: E731
    numbers = [
        row("images", [f"{s['images']:,}" for s in splits]),
        row("unreadable", [f"{len(s['unreadable']):,}" for s in splits]),
        row("width, px (min/median/max)", [_spread(s["width"]) for s in splits]),
        row("height, px (min/median/max)", [_spread(s["height"]) for s in splits]),
        row(f"above data.max_pixels ({data.max_pixels:,})", [f"{s['above_max_pixels']:,}" for s in splits]),
        row(f"a side below data.image_size ({data.image_size})", [f"{s['below_image_size']:,}" for s in splits]),
        row("EXIF orientation not 1 (read as stored)", [f"{s['turned']:,}" for s in splits]),
    ]
    kinds = dict.fromkeys(kind for s in splits for kind in s["formats"])
    numbers += [row(kind, [f"{s['formats'].get(kind, 0):,}" for s in splits]) for kind in kinds]
    labels = [row(name, [f"{s['per_class'][name]:,}" for s in splits]) for name in found["classes"]]
    bad = [f"  {_shown(' and '.join(where), name)}: {why}" for (name, why), where in _unreadable(found).items()]
    parts = [found["data"], _table([head, *numbers]), "images of each class", _table([head, *labels])]
    return "\n\n".join([*parts, *_section("unreadable", bad), *_equal_files(found)])


def _equal_files(found: dict) -> list[str]:
    groups = found["duplicates"]
    lines = {True: [], False: []}
    for group in groups:
        files = (f"{_shown(each['split'], each['name'])} [{each['class']}]" for each in group["files"])
        lines[group["leak"]].append("  " + " = ".join(files))
    parts = []
    if lines[True]:
        parts = _section("LEAK! Pictures in training AND in evaluation, whose accuracy is too high for it", lines[True])
    parts += _section("files with the same content within a split", lines[False])
    contradictions = sum(group["contradiction"] for group in groups)
    if contradictions:
        parts += [f"the same content under different labels: {contradictions}"]
    return parts


def _unreadable(found: dict) -> dict[tuple[str, str], list[str]]:
    """Return the splits by (name, problem): a file is one, however many of the splits hold it."""
    splits = {}
    for split in found["splits"]:
        for each in split["unreadable"]:
            where = splits.setdefault((each["name"], each["problem"]), [])
            where += [split["split"]] if split["split"] not in where else []
    return splits


def _surveys(data, splits: Sequence[str]) -> list:
    from deit.data import sources, stream, survey

    opened = [sources.open_scan(data, split) for split in splits]
    with tqdm(total=sum(map(len, opened)), desc="reading", unit="img", leave=False) as bar:
        threads = data.threads or stream.cores()
        return [
            survey.survey(source, split, max_pixels=data.max_pixels, threads=threads, advance=bar.update)
            for source, split in zip(opened, splits)
        ]


def _write(data, wanted: Sequence[str], bad: dict, name: str):
    from deit.data import records, sources

    renamed = {split: "train" if split == "all" else split for split in wanted}
    opened = {renamed[split]: sources.open_scan(data, split) for split in wanted}
    skip = {renamed[split]: frozenset(bad[split]) for split in wanted}
    with tqdm(total=sum(map(len, opened.values())), desc="writing", unit="img", leave=False) as bar:
        return records.write(opened, out=OUT.value, name=name, skip=skip, advance=bar.update)


def _names(split: str) -> list[str]:
    from deit.data import splits

    return splits.names(split)


def _folder(name: str) -> Path | None:
    kind, _, rest = name.partition(":")
    return Path(rest).expanduser().resolve() if kind == "folder" else None


def _own_name(name: str) -> str:
    kind, _, rest = name.partition(":")
    folder = _folder(name)
    return folder.name if folder else rest or kind


def _shown(split: str, name: str) -> str:
    """Return the name with its split, unless it says it: train/daisy/1.jpg, `tf_flowers train[:90%] record 17`."""
    return name if name.startswith(f"{split}/") or f" {split} record " in name else f"{split} {name}"


def _spread(values: Sequence[float]) -> str:
    return " / ".join(f"{value:g}" for value in values) or "-"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}: {len(lines)}" + "".join(f"\n{line}" for line in _shortened(lines))]


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"  … and {more} more (--json has them all)"] if more > 0 else [])]


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:]))]) for r in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    cli.run(main, config_flag="config", default_config=str(ROOT / "configs" / "base.py"))
