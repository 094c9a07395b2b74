"""tools/convert_weights.py at the command line: what it writes is read by evaluation, and it refuses in one line."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from deit import checkpoint, convert, errors, export_weights, saved
from tests import family
from tests.test_layouts import huggingface, timm

REPOSITORY = Path(__file__).resolve().parents[1]
VARIANT = "deit_micro_distilled_patch8_32"


@pytest.fixture
def file(tmp_path):
    """Return timm's weights of the micro network in a file."""
    safetensors.numpy.save_file(timm(), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


def run(*arguments, code=0):
    """Run the tool as a user does; return what it printed."""
    command = [sys.executable, "tools/convert_weights.py", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_tool_writes_a_checkpoint_with_its_provenance_and_overwrites_nothing(file, tmp_path):
    out = tmp_path / "ours"
    line = run(f"--from={file}", f"--variant={VARIANT}", f"--out={out}")
    count = sum(value.size for value in timm().values())
    assert f"{count:,} parameters" in line
    assert "3 classes (class 0, class 1, class 2" in line
    opened = saved.open_network(out)
    assert opened.config.resolved.classes == ("class 0", "class 1", "class 2")
    np.testing.assert_array_equal(opened.tensors["student/norm/beta"], timm_values(file, "norm.bias"))
    source = checkpoint.manifest(out)["source"]
    assert source["sha256"] == sha256(file) and source["layout"] == "timm" and source["file"] == "theirs.safetensors"
    from tools import checkpoint_tables, inspect_checkpoint

    table = checkpoint_tables.inspection(inspect_checkpoint.inspect(out))
    assert f"converted from: file theirs.safetensors, sha256 {sha256(file)}, layout timm" in table
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(f"--from={file}", f"--variant={VARIANT}", f"--out={out}", code=1).count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def timm_values(file, name):
    return safetensors.numpy.load_file(file)[name]


def sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_classifier_is_kept_dropped_or_replaced(file, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    convert.load(file, tmp_path / "dropped", variant=VARIANT, classifier="drop")
    convert.load(file, tmp_path / "replaced", variant=VARIANT, classifier="replace", names_file=names)
    with pytest.raises(errors.UserError, match=r"has no classifier \(it was dropped\): it is for init_from"):
        saved.open_network(tmp_path / "dropped")
    opened = saved.open_network(tmp_path / "replaced")
    assert opened.config.resolved.classes == ("cat", "dog")
    head = opened.tensors["student/head/kernel"]
    assert head.shape == (64, 2) and 0 < np.abs(head).max() <= 0.2  # drawn anew: a normal of .1, cut at twice that
    np.testing.assert_array_equal(opened.tensors["student/tokens/cls_token"], timm_values(file, "cls_token"))


def test_another_resolution_is_written_resized(file, tmp_path):
    convert.load(file, tmp_path / "ours", variant=VARIANT, image_size=64)
    opened = saved.open_network(tmp_path / "ours")
    assert opened.network.image_size == 64 and opened.tensors["student/tokens/pos_embed"].shape == (1, 2 + 64, 64)


def test_one_classifier_of_a_distilled_network_of_transformers_becomes_the_class_head(tmp_path):
    w = {name: value for name, value in huggingface(timm()).items() if not name.startswith("distillation")}
    w = {name.replace("cls_classifier", "classifier"): value for name, value in w.items()}
    safetensors.numpy.save_file(w, tmp_path / "theirs.safetensors")
    convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT)
    opened = saved.open_network(tmp_path / "ours")
    assert list(opened.network.model.output) == ["cls"] and opened.config.model.norm_epsilon == 1e-12
    export_weights.export(tmp_path / "ours", tmp_path / "back", layout="huggingface")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == w.keys() and all(back[name].tobytes() == w[name].tobytes() for name in w)
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert content["architectures"] == ["DeiTForImageClassification"] and content["layer_norm_eps"] == 1e-12


def test_export_takes_the_averages_where_it_is_told(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ours", VARIANT, ema=True)
    export_weights.export(ckpt, tmp_path / "raw", layout="timm")
    export_weights.export(ckpt, tmp_path / "ema", layout="timm", weights="ema")
    raw, ema = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("raw", "ema"))
    np.testing.assert_allclose(ema["blocks.1.attn.qkv.weight"], raw["blocks.1.attn.qkv.weight"] / 2, rtol=1e-6)
    with pytest.raises(errors.UserError, match=r"has no averages \(EMA\)"):
        export_weights.export(
            family.checkpoint(tmp_path / "plain", VARIANT), tmp_path / "x", layout="timm", weights="ema"
        )


def damaged(file, how):
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "half":
        w = {name: value.astype(np.float16) for name, value in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(w, file)
    elif how == "nan":
        w = safetensors.numpy.load_file(file)
        w["norm.bias"][3] = np.nan
        safetensors.numpy.save_file(w, file)
    elif how == "grid":
        w = safetensors.numpy.load_file(file)
        w["pos_embed"] = w["pos_embed"][:, :14].copy()
        safetensors.numpy.save_file(w, file)
    elif how == "one head":
        w = {n: v for n, v in safetensors.numpy.load_file(file).items() if not n.startswith("head_dist")}
        safetensors.numpy.save_file(w, file)
    return file


@pytest.mark.parametrize(
    "how, options, message",
    [
        ("truncated", {}, r"is no whole safetensors file"),
        ("half", {}, r"blocks.0.attn.proj.bias is F16, not float32"),
        ("nan", {}, r"the state is not finite: 1 of 64 elements of student/norm/beta"),
        ("grid", {}, r"pos_embed has a grid of 12 patches, which is not square"),
        ("one head", {}, r"missing head_dist.bias; missing head_dist.weight"),
        ("", {"variant": "deit_micro_patch8_32"}, r"left over dist_token"),
        ("", {"variant": "deit3_micro_patch8_32"}, r"missing blocks.0.ls1.gamma"),
        ("", {"patch": 4}, r"patch_embed.proj.weight has shape \[64, 3, 8, 8\], not \[64, 3, 4, 4\]"),
        ("", {"variant": "deit_small_distilled_patch16_224"}, r"blocks.0.attn.proj.bias has shape \[64\], not \[384\]"),
        ("", {"variant": "deit_smal_patch16_224"}, r"nearest: deit_small_patch16_224"),
        ("", {"variant": "backbone"}, r"must be a DeiT or DeiT-III"),
        ("", {"image_size": 7}, r"data.image_size \(7\) must be at least .*patch \(8\)"),
        ("", {"classifier": "replace"}, r"--class_names must be given"),
    ],
)
def test_bad_input_is_refused_by_the_tensor_s_name_and_nothing_is_left(file, tmp_path, how, options, message):
    damaged(file, how)
    with pytest.raises(errors.UserError, match=message):
        convert.load(file, tmp_path / "ours", **{"variant": VARIANT, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant=x"], "--from"),
        (["--from=absent.safetensors", "--variant=deit_tiny_patch16_224", "--out=x"], "absent.safetensors is no file"),
        (
            ["--from=README.md", "--variant=deit_tiny_patch16_224", "--out=x"],
            "README.md must end in .safetensors or .pth",
        ),
        (["--from=README.md", "--out=x"], "--variant must name the network"),
        (["--from=README.md", "--variant=deit_tiny_patch16_224", "--out=README.md"], "exists and is not overwritten"),
        (
            ["--from=README.md", "--variant=deit_tiny_patch16_224", "--out=README.md/dir"],
            "--out (README.md/dir) must lie in a directory",
        ),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_1(arguments, message):
    line = run(*arguments, code=1)
    assert message in line and line.count("\n") == 1


def test_without_torch_a_pickle_is_answered_by_how_to_write_safetensors(tmp_path, monkeypatch):
    from deit import weights_file

    (tmp_path / "deit_tiny.pth").write_bytes(b"\x80\x04N.")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=r"weights_only=True.*save_file\(.*deit_tiny.safetensors"):
        weights_file.read(tmp_path / "deit_tiny.pth")


def test_a_layout_that_is_not_the_file_s_is_named(file, tmp_path):
    with pytest.raises(errors.UserError, match=r"--layout \(huggingface\) is not what .* has: its names are timm's"):
        convert.load(file, tmp_path / "ours", variant=VARIANT, layout="huggingface")
    convert.load(file, tmp_path / "ours", variant=VARIANT, layout="facebook")  # the same names, without LayerScale


def test_a_byte_order_mark_is_no_part_of_a_class_s_name(file, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n", encoding="utf-8-sig")
    convert.load(file, tmp_path / "ours", variant=VARIANT, names_file=tmp_path / "names.txt")
    assert saved.config_of(tmp_path / "ours").resolved.classes == ("cat", "dog", "owl")


def test_sigterm_while_it_writes_leaves_nothing(file, tmp_path):
    """The tool is stopped by the signal at the moment at which its checkpoint is half written."""
    code = (
        "import os, signal, sys; sys.argv[0] = 'tools/convert_weights.py'; sys.path.insert(0, '.')\n"
        "from deit import commit, workdir, cli\n"
        "workdir.sync = lambda path: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from tools import convert_weights\n"
        "cli.run(convert_weights.main)\n"
    )
    flags = [f"--from={file}", f"--variant={VARIANT}", f"--out={tmp_path / 'ours'}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=REPOSITORY, env=environment, timeout=120)
    assert done.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]


@pytest.mark.slow
def test_what_is_written_is_read_by_evaluation_prediction_a_fine_tuning_and_as_a_teacher(file, tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("cat", "dog", "owl")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(16):
            picture = Image.fromarray(random.integers(0, 256, [40, 48, 3], np.uint8))
            picture.save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    out, data = tmp_path / "ours", f"folder:{tmp_path / 'data'}"
    run(f"--from={file}", f"--variant={VARIANT}", f"--out={out}", f"--class_names={tmp_path / 'names.txt'}")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=REPOSITORY, capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    split = ("--split=val", f"--json={tmp_path / 'result.json'}")
    assert re.search(r"eval/images +48\n", python("tools/eval.py", f"--ckpt={out}", f"--data_name={data}", *split))
    picture = tmp_path / "data" / "val" / "cat" / "0.png"
    (answer,) = json.loads(
        python("tools/predict.py", f"--ckpt={out}", picture, "--json", "--top=3").partition("\n]")[0] + "]"
    )
    assert {c["class"] for c in answer["classes"]} == {"cat", "dog", "owl"}
    fields = {
        "data.name": data, "data.train_split": "train", "data.eval_split": "val", "init_from": out, "micro_batch": 16,
        "model.variant": VARIANT, "data.image_size": 32, "global_batch": 16, "total_updates": 2, "eval.batch": 48,
        "distill.kind": "hard", "teacher.kind": "run", "teacher.path": out, "teacher.min_accuracy": 0.0,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    said = python("main.py", "--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *flags)
    assert "heads kept: the same 3 classes" in said and "update 2/2" in said


def test_a_network_that_no_one_else_has_is_not_exported(tmp_path):
    ckpt = family.checkpoint(tmp_path / "ours", "keras_example", size=32)
    with pytest.raises(errors.UserError, match=r"model.variant \(keras_example\) must be a DeiT"):
        export_weights.export(ckpt, tmp_path / "x", layout="timm")


def test_a_grid_of_another_size_is_resized_only_where_the_size_is_asked_for(tmp_path):
    w = {**timm(), "pos_embed": np.ones([1, 2 + 64, 64], np.float32)}
    safetensors.numpy.save_file(w, tmp_path / "theirs.safetensors")
    message = (
        r"pos_embed is of a 8 x 8 grid, deit_micro_distilled_patch8_32 has 4 x 4: --image_size=32 resizes it, "
        r"--image_size=64 keeps it$"
    )
    with pytest.raises(errors.UserError, match=message):
        convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]
    line = convert.load(tmp_path / "theirs.safetensors", tmp_path / "kept", variant=VARIANT, image_size=64)
    assert "resized" not in line and "resized" not in checkpoint.manifest(tmp_path / "kept")["source"]
    line = convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT, image_size=32)
    assert "resized: pos_embed from 8 x 8 to 4 x 4" in line
    assert checkpoint.manifest(tmp_path / "ours")["source"]["resized"] == "pos_embed from 8 x 8 to 4 x 4"


def test_the_other_name_is_told_where_there_is_one(tmp_path):
    from deit import peer_settings
    from deit.models import variants

    found = convert._Source(
        tmp_path, "timm", {"pos_embed": np.zeros([1, 1 + 576, 768])}, peer_settings.Settings(tmp_path)
    )
    name = "deit_base_patch16_224"
    with pytest.raises(errors.UserError, match=r"24 x 24 grid, .* 14 x 14.* --variant=deit_base_patch16_384 keeps it"):
        convert._changes(found, variants.of_name(name), name, 224, asked=False)


def test_a_base_model_of_transformers_is_a_trunk_and_its_pooler_is_said_to_be_left_out(tmp_path):
    w = {n.partition(".")[2]: v for n, v in huggingface(timm()).items() if n.startswith("deit.")}
    w |= {"pooler.dense.weight": np.ones([64, 64], np.float32), "pooler.dense.bias": np.ones(64, np.float32)}
    safetensors.numpy.save_file(w, tmp_path / "theirs.safetensors")
    with pytest.raises(errors.UserError, match="has no classifier: --classifier=drop or --classifier=replace"):
        convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT)
    line = convert.load(tmp_path / "theirs.safetensors", tmp_path / "ours", variant=VARIANT, classifier="drop")
    assert "left out: pooler.dense" in line
    own = checkpoint.read(tmp_path / "ours")[0]
    np.testing.assert_array_equal(own["student/norm/gamma"], w["layernorm.weight"])


def test_other_files_named_tmp_survive_a_conversion(file, tmp_path):
    (tmp_path / "tmp-ours").mkdir()
    (tmp_path / "tmp-ours" / "x").write_text("mine")
    convert.load(file, tmp_path / "ours", variant=VARIANT)
    assert checkpoint.verify(tmp_path / "ours") is None and (tmp_path / "tmp-ours" / "x").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to=timm", "--variant=deit_tiny_patch16_224"], "--variant (deit_tiny_patch16_224) says something only"),
        (["--to=timm", "--classifier=keep"], "--classifier (keep) says something only without --to"),
        (["--to=timm", "--image_size=0"], "--image_size (0) says something only without --to"),
        (["--to=timm", "--layout=timm"], "--layout (timm) says something only without --to"),
        (["--variant=deit_tiny_patch16_224", "--weights=raw"], "--weights (raw) says something only with --to"),
        (["--variant=deit_tiny_patch16_224", "--patch=-1"], "patch"),
        (["--variant=deit_tiny_patch16_224", "--registers=-1"], "registers"),
    ],
)
def test_a_flag_that_says_nothing_here_is_refused(arguments, message):
    line = run("--from=README.md", "--out=x", *arguments, code=1)
    assert message in line and line.count("\n") == 1


def test_initial_values_are_drawn_only_for_heads_that_begin_anew(file, tmp_path, monkeypatch):
    from deit.models import paths

    drawn = []
    real = paths.initialise
    monkeypatch.setattr(paths, "initialise", lambda *a, **o: drawn.append(1) or real(*a, **o))
    convert.load(file, tmp_path / "ours", variant=VARIANT)
    assert drawn == []


def test_a_checkpoint_s_files_are_hashed_once(tmp_path, monkeypatch):
    from deit import workdir

    ckpt = family.checkpoint(tmp_path / "ours", VARIANT)
    hashed, real = [], workdir.describe
    monkeypatch.setattr(workdir, "describe", lambda path: hashed.append(path.name) or real(path))
    opened = saved.open_network(ckpt)
    assert sorted(hashed) == ["config.json", "tensors.safetensors"]
    assert opened.path == opened.run == ckpt
    del hashed[:]
    export_weights.export(ckpt, tmp_path / "x", layout="timm")
    assert sorted(hashed) == ["config.json", "tensors.safetensors"]


def test_a_full_disk_is_one_line_and_nothing_is_left(file, tmp_path, monkeypatch):
    import collections

    monkeypatch.setattr("shutil.disk_usage", lambda _: collections.namedtuple("usage", "free")(5))
    with pytest.raises(errors.UserError, match=r"--out \(.*ours\) can't be written: 5 bytes are free"):
        convert.load(file, tmp_path / "ours", variant=VARIANT)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"]
