"""Print how far every image op is from Pillow's: mean and largest difference in units of 1/255, over photographs.

python tools/parity.py [--images=FOLDER | --config=FILE [--config.data.data_dir=DIR]] [--count=16] [--json=FILE]

Without a source: the two photographs that scikit-learn ships. A photograph that can't be read is left out with a
warning. Exit code 1 where a bound is broken.
"""

import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags, logging
from ml_collections import config_flags

from deit import cli, errors

IMAGES = flags.DEFINE_string("images", "", "A folder of photographs, searched with its sub-folders.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Photographs of this configuration's data.eval_split.")
COUNT = flags.DEFINE_integer("count", 16, "Photographs used, spread evenly over the source.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "Also write the table to this file, which must not exist.")


def main(_) -> int:
    """Compare on the chosen photographs, print the table; 1 where the mean of a picture is beyond its bound."""
    out = cli.new_file("--json", JSON.value)
    if IMAGES.value and CONFIG.value is not None:
        raise errors.UserError("--images and --config exclude each other: both name photographs")
    photos = chosen()

    import PIL

    from tools import parity_cases  # TensorFlow starts only now, with everything checked that can be

    broken = [name for name, photo in photos.items() if not parity_cases.readable(photo)]
    for name in broken:
        logging.warning("%s can't be read and is left out", name)
        del photos[name]
    if not photos:
        raise errors.UserError(f"none of the {len(broken)} photographs can be read: {', '.join(broken)}")
    table = parity_cases.rows(list(photos.values()))
    print(f"{len(photos)} photographs against Pillow {PIL.__version__}; differences in 1/255")
    print(text(table))
    if out:
        content = {
            "pillow": PIL.__version__,
            "photographs": list(photos),
            "rows": [dataclasses.asdict(r) for r in table],
        }
        out.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(row.worst_mean > row.bound for row in table))


def chosen() -> dict[str, bytes]:
    """Return the encoded photographs by name. Errors: UserError where there are none."""
    if IMAGES.value:
        return from_folder(Path(IMAGES.value), COUNT.value)
    if CONFIG.value is not None:
        return from_data(CONFIG.value.data, COUNT.value)
    from tools import parity_cases

    return parity_cases.sample_photos()


def from_folder(folder: Path, count: int) -> dict[str, bytes]:
    """Read up to `count` JPEG, PNG or BMP files below `folder`, evenly spread over their sorted names."""
    if not folder.is_dir():
        raise errors.UserError(f"--images ({folder}) must be a directory")
    paths = sorted(path for path in folder.rglob("*") if _is_photo(path))
    if not paths:
        raise errors.UserError(f"--images ({folder}) must hold .jpg, .jpeg, .png or .bmp files, in itself or below")
    return {str(paths[i].relative_to(folder)): paths[i].read_bytes() for i in _spread(len(paths), count)}


def from_data(data_config, count: int) -> dict[str, bytes]:
    """Read up to `count` examples of the evaluation split, evenly spread."""
    from deit.data import sources

    split = sources.open_source(data_config, data_config.eval_split)
    indices = _spread(len(split), count)
    encoded, _ = split.read(indices)
    return {split.name(i): photo for i, photo in zip(indices, encoded)}


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp") and path.is_file()


def _spread(total: int, count: int) -> list[int]:
    count = min(total, count)
    return [i * total // count for i in range(count)]


def text(table) -> str:
    """Return rows as aligned text; one beyond its bound is marked."""
    lines = [f"{'op':<20} {'parameter':<20} {'mean':>8} {'worst mean':>10} {'max':>4} {'bound':>5}"]
    for row in table:
        mark = "  <-- beyond its bound" if row.worst_mean > row.bound else ""
        lines.append(
            f"{row.op:<20} {row.parameter:<20} {row.mean:8.4f} {row.worst_mean:10.4f} {row.largest:4d} "
            f"{row.bound:5.0f}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    # A configuration only where one is named: without it scikit-learn's photographs need neither data nor network.
    named = any(word.lstrip("-").startswith("config") for word in sys.argv[1:])
    default = str(ROOT / "configs" / "deit_tiny_flowers.py")
    cli.run(main, config_flag="config" if named else "", default_config=default)
