"""docs/data.md: its commands name what exists, and its way to an ImageNet folder works on two small archives."""

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from configs import base
from deit import config as configuration
from deit import rules
from deit.data import sources

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def test_every_flag_file_and_section_that_the_page_names_exists():
    fields = {name for name, _ in configuration.flatten(base.get_config())}
    assert set(re.findall(r"--config\.([\w.]+?)=", PAGE)) <= fields
    assert set(re.findall(r"`((?:data|augment|eval)\.\w+)`", PAGE)) <= fields
    assert all((ROOT / path).is_file() for path in re.findall(r"(?:tools|configs)/\w+\.py|main\.py", PAGE))
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


def test_every_flag_of_the_tool_is_one_it_has():
    source = (ROOT / "tools" / "prepare_data.py").read_text(encoding="utf-8")
    commands = [c for block in BLOCKS for c in block.replace("\\\n", " ").splitlines() if "prepare_data.py" in c]
    assert {shlex.split(command)[2] for command in commands} == {"check", "convert", "prepare", "digest"}
    for word in (word for command in commands for word in shlex.split(command)[3:]):
        assert word.startswith("--config.") or f'"{word[2:].partition("=")[0]}"' in source


def test_the_imagenet_command_trains_the_whole_recipe():
    (command,) = [block for block in BLOCKS if "runs/imagenet" in block]
    words = shlex.split(command.replace("\\\n", " ").partition("main.py")[2])
    flags = dict(word[2:].split("=", 1) for word in words)
    path, _, arg = flags.pop("config").partition(":")
    config = runpy.run_path(str(ROOT / path))["get_config"](arg)
    config.update_from_flattened_dict({name.removeprefix("config."): value for name, value in flags.items()
                                       if name.startswith("config.")})  # fmt: skip
    rules.validate(config)
    assert (config.augment.crop, config.eval.crop_ratio, config.epochs) == ("random_resized", 0.875, 300)
    assert config.augment.randaugment and config.data.eval_split == "validation" and config.teacher.kind == "none"


def test_no_line_is_longer_than_120_columns():
    assert [line for line in PAGE.splitlines() if len(line) > 120] == []


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 256, [20, 30, 3], np.uint8)).save(out, "JPEG")
    return out.getvalue()


def test_imagenet_unpacked_as_the_page_says_is_a_folder_with_the_right_labels(tmp_path):
    # The first three validation images are of these classes (ILSVRC2012_validation_ground_truth).
    synsets = ["n01751748", "n09193705", "n02105855"]
    train = {s: {f"{s}_{k}.JPEG": jpeg(10 * i + k) for k in range(2)} for i, s in enumerate(synsets)}
    held_out = {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(100 + k) for k in (3, 1, 2)}
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(archive({f"{s}.tar": archive(train[s]) for s in synsets}))
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(archive(held_out))
    (block,) = [block for block in BLOCKS if "tar -xf" in block]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert block.count("| while") == 1
    block = block.replace("| while", "| head -n 3 | while")  # the other labels have no image in this archive
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)

    config = base.get_config().data
    config.name, config.train_split, config.eval_split = f"folder:{tmp_path / 'imagenet'}", "train", "val"
    assert sources.sizes(config) == (6, 3, 3)
    source = sources.open_source(config, "train")
    assert source.classes == tuple(sorted(synsets)) and len(source) == 6
    for index, (data, label) in enumerate(source.scan()):
        _, synset, name = source.name(index).split("/")
        assert train[synset][name] == data and source.classes[label] == synset
    for number, synset in enumerate(synsets, 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        assert (tmp_path / "imagenet" / "val" / synset / name).read_bytes() == held_out[name]
