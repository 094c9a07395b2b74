"""Draw what a configuration does to pictures: originals, then the views that training will see of them.

python tools/show_batch.py [--config=configs/deit_tiny_flowers.py:full] [--out=sheet.png] [--examples=6] [--views=4]

Each view stands at its real position in the stream, mixing included; above it the shares of the labels and the
operations in their order. Trains and downloads nothing but a TFDS data set that is not prepared yet.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags
from ml_collections import config_flags

from deit import cli, errors, rules

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration FILE.py[:ARG] or a run's config.json; --config.FIELD=VALUE changes a field."
)
OUT = flags.DEFINE_string("out", "sheet.png", "Where to write the picture, a .png file; an existing one is kept.")
EXAMPLES = flags.DEFINE_integer("examples", 6, "Rows, an example each.", lower_bound=1, upper_bound=100)
VIEWS = flags.DEFINE_integer("views", 4, "Views of each example.", lower_bound=1, upper_bound=20)


def main(_) -> int:
    """Open the data, draw, write."""
    config, out = CONFIG.value, cli.new_file("--out", OUT.value, ".png")
    if out is None:
        raise errors.UserError("--out ('') must name a .png file")
    rules.validate(config)

    import PIL.Image

    from deit import contact_sheet
    from deit.data import sources

    source = sources.open_source(config.data, config.data.train_split)
    sheet = contact_sheet.draw(source, config, examples=EXAMPLES.value, count=VIEWS.value)
    PIL.Image.fromarray(sheet).save(out)
    print(f"{out}: {sheet.shape[1]} x {sheet.shape[0]} px")
    return 0


if __name__ == "__main__":
    cli.run(main, config_flag="config", default_config=str(ROOT / "configs" / "deit_tiny_flowers.py"))
