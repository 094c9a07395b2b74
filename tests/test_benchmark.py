"""The benchmark: arithmetic on made-up timings, the Pillow peer against laws worked out by hand, the command line."""

import dataclasses
import io
import json
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from configs import base, deit_tiny_flowers, quickstart
from deit import checkpoint, errors, keras, rules
from deit.data import sources
from tests import photos
from tools.benchmarks import data, peer, pillow_loader, pillow_recipe, saving, teacher, update

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FULL = pillow_recipe.Recipe()


def full_config():
    """Return the DeiT recipe's augmentation."""
    config = base.get_config()
    config.augment.crop, config.augment.randaugment = "random_resized", "rand-m9-mstd0.5-inc1"
    config.augment.erasing, config.augment.mixup, config.augment.cutmix = 0.25, 0.8, 1.0
    return config


def small_config():
    """Return digits in mixed batches of 32, with a teacher."""
    config = quickstart.get_config()
    changes = {"global_batch": 32, "micro_batch": 8, "augment.mix_group": 16, "augment.mixup": 0.8}
    return update.copy_of(config, changes)


def timings(**changes: data.Timing) -> dict[str, data.Timing]:
    """Return a measurement in which reading costs .01, cropping .8, augmenting 1.2, batching .04, mixing .1 ms."""
    found = {
        "read": data.Timing(100_000.0, 0.01),
        "crop": data.Timing(4_000.0, 0.85),
        "augment": data.Timing(1_900.0, 2.05),
        "batch": data.Timing(25_000.0, 0.04),
        "mix": data.Timing(30_000.0, 0.1),
        "whole": data.Timing(1_600.0, 2.15),
    }
    return {**found, **changes}


def test_a_stage_costs_what_it_adds_and_the_shares_are_of_the_whole():
    rows = data.stages(**timings(), workers=4)
    assert [row["stage"] for row in rows] == ["read", "decode+crop", "augment", "batch", "mix"]
    assert [row["cpu_ms"] for row in rows] == pytest.approx([0.01, 0.8, 1.2, 0.04, 0.1])
    assert [row["share"] for row in rows] == pytest.approx(np.array([0.01, 0.8, 1.2, 0.04, 0.1]) / 2.15)


def test_what_a_stage_allows_by_itself_counts_its_threads():
    rows = data.stages(**timings(), workers=4)
    assert [row["limit"] for row in rows] == pytest.approx([100_000, 4 / 0.0008, 4 / 0.0012, 25_000, 30_000])


def test_a_slow_disk_is_the_bottleneck_although_it_takes_no_cpu():
    rows = data.stages(**timings(read=data.Timing(90.0, 0.01)), workers=4)
    assert min(rows, key=lambda row: row["limit"])["stage"] == "read"


def test_the_rates_are_of_the_stream_so_far_and_batching_is_taken_off_what_comes_before_it():
    rows = data.stages(**timings(), workers=4)
    crop, augment = 4_000 * 0.85 / 0.81, 1_900 * 2.05 / 2.01
    assert [row["images_per_sec"] for row in rows] == pytest.approx([100_000, crop, augment, 1_900, 1_600])


def test_a_stage_that_is_less_than_the_noise_costs_nothing():
    row = data.stages(**timings(augment=data.Timing(4_010.0, 0.84)), workers=4)[2]
    assert (row["cpu_ms"], row["share"]) == (0.0, 0.0)
    assert row["limit"] > 100_000


def test_every_stage_of_a_real_stream_is_timed_and_one_of_stream_and_model_is_named():
    config = small_config()
    source = sources.open_source(config.data, "train")
    result = data.measure(config, source, images=64, rounds=1, updates=1, warm_up=0.0)
    assert all(row["images_per_sec"] > 0 for row in result["stages"])
    assert sum(row["share"] for row in result["stages"]) == pytest.approx(1)
    rates = {"data": result["images_per_sec"], "model": result["model_images_per_sec"]}
    assert result["limited_by"] == min(rates, key=rates.get)
    assert result["factor"] == pytest.approx(max(rates.values()) / min(rates.values()))
    text = "\n".join(data.lines(result))
    assert f"bottleneck of the stream: {result['bottleneck']} " in text
    assert "the model limits training" in text or "the data stream limits training" in text
    assert result["teacher_left_out"] and text.endswith("makes the model slower still")
    assert "teacher" not in "\n".join(data.lines({**result, "teacher_left_out": False}))


def test_the_peer_s_recipe_is_the_configuration_s():
    assert peer.recipe_of(full_config()) == FULL


@pytest.mark.parametrize(
    ("field", "value"), [("crop", "resize_crop"), ("three_augment", True), ("jitter", 0.3), ("mix_prob", 0.5)]
)
def test_what_the_peer_lacks_is_refused_by_name(field, value):
    config = full_config()
    config.augment[field] = value
    with pytest.raises(errors.UserError, match=rf"augment\.{field} \({value}\)"):
        peer.recipe_of(config)


@pytest.mark.parametrize("preset", ["", "full"])
def test_crop_and_flip_alone_switches_everything_else_off(preset):
    config = deit_tiny_flowers.get_config(preset)
    with config.unlocked():
        config.augment.jitter, config.augment.flip = 0.3, 0.0
    recipe = peer.recipe_of(update.copy_of(config, data.CROP_FLIP))
    assert (recipe.num_ops, recipe.erasing, recipe.mix, recipe.flip) == (0, 0.0, False, 0.5)


def test_the_peer_repeats_no_image_so_the_stream_repeats_none_and_a_line_says_so(monkeypatch):
    config = update.copy_of(small_config(), {"augment.crop": "random_resized", "augment.repeats": 3})
    seen, stream_of = [], data.stream_of
    monkeypatch.setattr(data, "stream_of", lambda config, *rest: seen.append(config) or stream_of(config, *rest))
    source = sources.open_source(config.data, "train")
    result = peer.compare(config, source, images=32, rounds=1, warm_up=0.0)
    assert [each.augment.repeats for each in seen] == [1]
    assert result["ratio_pillow_lean"] == pytest.approx(result["images_per_sec"] / result["pillow_lean_images_per_sec"])
    assert "augment.repeats is 1 in this comparison, not 3" in peer.lines(result)[1]
    assert "repeats" not in "\n".join(peer.lines({**result, "configured_repeats": 1}))


def test_timm_s_own_loader_gets_the_configuration_s_recipe():
    settings = peer.timm_settings(FULL, "timm", 256)
    loader = settings["loader"]
    assert rules.randaugment_policy(loader["auto_augment"]) == rules.randaugment_policy("rand-m9-mstd0.5-inc1")
    assert (loader["re_prob"], loader["re_mode"], loader["hflip"], loader["num_workers"]) == (0.25, "pixel", 0.5, 2)
    assert (loader["scale"], loader["ratio"]) == ((0.08, 1.0), (3 / 4, 4 / 3))
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}
    assert settings["mixing"] == mixing
    recipe = peer.recipe_of(update.copy_of(full_config(), data.CROP_FLIP))
    plain = peer.timm_settings(recipe, "timm", 256)
    assert (plain["loader"]["auto_augment"], plain["loader"]["re_prob"], plain["mixing"]) == (None, 0.0, None)


def test_an_interpreter_without_timm_is_one_line_with_its_own_last_words(tmp_path):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\necho 'No module named timm' >&2\n")
    silent.chmod(0o755)
    wanted = rf"--timm_python \({re.escape(str(silent))}\): timm's loader has ended: No module named timm"
    with (
        pytest.raises(errors.UserError, match=wanted),
        peer.timm_loader(str(silent), [b"a"], np.zeros(1), FULL, "timm", 1),
    ):
        pytest.fail("it has started")


def mixed_by(style, batch, recipe, seed):
    """Mix uint8 [B, H, W, 3] as the loader of a style does; return the mixture [B, H, W, 3] and the own share."""
    rng, recipe = random.Random(seed), dataclasses.replace(recipe, style=style)
    if style == "lean":
        mixed = batch.copy()
        return mixed, pillow_loader.mix(mixed, recipe, rng)
    planes = np.zeros([len(batch), 3, *batch.shape[1:3]], np.uint8)
    share = pillow_loader.collate(list(batch), planes, recipe, rng)
    return np.moveaxis(planes, 1, 3), share


@pytest.mark.parametrize("style", pillow_recipe.STYLES)
def test_the_peer_s_mixup_is_the_rounded_mixture_of_both_images(style):
    batch = np.random.default_rng(0).integers(0, 256, [6, 8, 8, 3], np.uint8)
    mixed, share = mixed_by(style, batch, dataclasses.replace(FULL, mix_switch=0.0), 3)
    expected = share * batch.astype(np.float64) + (1 - share) * batch[::-1]
    assert 0 < share < 1
    assert np.abs(mixed - expected).max() <= 0.5 + 1e-3  # rounded to the nearest


@pytest.mark.parametrize("style", pillow_recipe.STYLES)
def test_the_peer_s_cutmix_pastes_one_box_and_reports_its_area(style):
    batch = np.random.default_rng(0).integers(0, 256, [4, 32, 32, 3], np.uint8)
    mixed, share = mixed_by(style, batch, dataclasses.replace(FULL, mix_switch=1.0), 5)
    pasted = (mixed == batch[::-1]).all((0, 3))  # [32, 32]
    rows, columns = np.nonzero(pasted)
    assert 0 < pasted.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # one full rectangle
    assert share == pytest.approx(1 - pasted.mean())
    np.testing.assert_array_equal(mixed[:, ~pasted], batch[:, ~pasted])


def test_the_peer_erases_one_box_with_noise_of_the_model_s_mean_and_deviation():
    pixels, recipe = np.full([224, 224, 3], 77, np.uint8), dataclasses.replace(FULL, erasing=1.0)
    pillow_recipe.erase(pixels, recipe, random.Random(1), np.random.default_rng(0))
    erased = (pixels != 77).any(-1)
    rows, columns = np.nonzero(erased)
    assert 0.019 < erased.mean() < 0.34 and erased.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    found = np.quantile(pixels[erased], [0.1587, 0.5, 0.8413], axis=0)  # no clipping reaches one sigma
    expected = 255 * (np.array(FULL.mean) + np.array([[-1], [0], [1]]) * FULL.std)
    np.testing.assert_allclose(found, expected, atol=2.5)


def test_the_peer_erases_as_often_as_the_recipe_says():
    rng, noise, count = random.Random(0), np.random.default_rng(0), 0
    for _ in range(2000):
        pixels = np.full([12, 12, 3], 77, np.uint8)
        pillow_recipe.erase(pixels, FULL, rng, noise)
        count += bool((pixels != 77).any())
    assert count / 2000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("place", "sign", "by_pillow"),  # at level 9 of 10, the place in timm's list
    [
        (3, -1, lambda image, fill: image.rotate(-27, Image.BICUBIC, fillcolor=fill)),
        (4, 1, lambda image, _: ImageOps.posterize(image, 1)),
        (9, 1, lambda image, _: ImageEnhance.Brightness(image).enhance(1.81)),
        (13, 1, lambda im, fill: im.transform(im.size, Image.AFFINE, (1, 0, 19.44, 0, 1, 0), 3, fillcolor=fill)),
    ],
    ids=["rotate", "posterize", "brightness", "translate_x"],
)
def test_the_peer_s_operations_are_pillow_s_at_timm_s_magnitudes(place, sign, by_pillow):
    image, fill = Image.fromarray(photos.small(48)), (124, 116, 104)
    assert len(pillow_recipe.OPERATIONS) == 15
    got = pillow_recipe.OPERATIONS[place](image, 0.9, sign, fill, Image.BICUBIC)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(by_pillow(image, fill)))
    assert (np.asarray(got) != np.asarray(image)).any()


def test_the_peer_s_windows_obey_the_law_of_the_random_resized_crop():
    rng, areas = random.Random(0), []
    for _ in range(10_000):
        left, top, width, height = pillow_recipe.crop_window(384, 384, FULL, rng)
        assert left >= 0 and top >= 0 and left + width <= 384 and top + height <= 384
        assert 0.73 < width / height < 1.37  # a px of rounding beyond 3/4 and 4/3
        areas.append(width * height / 384**2)
    assert min(areas) > 0.078 and max(areas) > 0.97
    # Of a square a window of area s and ratio r fits where s * max(r, 1 / r) <= 1: surely up to 3/4, beyond it with
    # probability -ln(s) / ln(4/3), whose integral to 1 is 0.119. The others are drawn again.
    assert np.mean(np.array(areas) < 0.5) == pytest.approx(0.42 / (0.67 + 0.119), abs=0.02)


@pytest.mark.parametrize(("style", "shape"), [("lean", (4, 8, 8, 3)), ("timm", (4, 3, 8, 8))])
def test_the_peer_s_workers_show_every_image_once_an_epoch(style, shape):
    encoded = []
    for shade in range(8):
        file = io.BytesIO()
        Image.new("RGB", (20, 16), (shade * 30,) * 3).save(file, "PNG")
        encoded.append(file.getvalue())
    recipe = pillow_recipe.Recipe(size=8, num_ops=0, erasing=0.0, mix=False, style=style)
    with pillow_loader.Loader(encoded, np.arange(8), recipe, workers=2, batch=4) as loader:
        batches = iter(loader)
        for _ in range(2):
            seen = []
            for _ in range(2):
                images, labels, share = next(batches)
                assert share == 1.0
                np.testing.assert_array_equal(images, np.broadcast_to(labels[:, None, None, None] * 30, shape))
                seen.extend(labels)
            assert sorted(seen) == list(range(8))


def test_the_teacher_s_lines_are_the_ratios_of_the_medians():
    rates = {"none": 20.0, "cached": 19.8, "online": 2.2, "teacher": 2.5, "teacher_small": 2.0}
    result = {
        "teacher": "BiT", "teacher_batches": [64, 16], "images_per_sec": rates, "matmul_flops_per_sec": 200e9,
        "bytes_per_position": 2, "flops_per_image": 72e9,
    }  # fmt: skip
    text = "\n".join(teacher.lines(result))
    for part in (
        "0.990 of that",
        "cached: 9.00x",
        "batches of 16; 64: 1.25x",
        "180.0 GFLOP/s (72.0 GFLOP an image), 0.90 of",
    ):
        assert part in text
    assert len(teacher.lines({**result, "flops_per_image": None})) == len(teacher.lines(result)) - 1


@pytest.mark.slow
def test_a_configured_teacher_is_timed_beside_its_cache(tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), "teacher", "--nostand_in", "--json"]
    smoke = [f"--config={REPOSITORY / 'configs'}/deit_tiny_flowers.py:smoke", "--config.teacher.kind=keras_application"]
    weights = tmp_path / "weights.h5"
    keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=10, alpha=1.0).save_weights(weights)
    flags = ["--config.teacher.name=MobileNet", f"--config.teacher.weights={weights}", "--rounds=1", "--updates=2"]
    done = subprocess.run([*command, *smoke, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {
        "none": 2, "cached": 2, "online": 1, "teacher": 1, "teacher_small": 1, "matmul": 1,
    }  # fmt: skip
    assert found["images_per_sec"]["cached"] == pytest.approx(
        found["global_batch"] / np.median(found["seconds"]["cached"]), rel=1e-6
    )
    assert "asked its teacher" not in done.stderr and found["bytes_per_position"] == 1


def test_what_a_save_costs_is_snapshot_and_wait_and_the_loss_is_that_of_the_medians():
    seconds = {
        "never": [0.5, 0.4, 0.9], "each": [0.75, 0.6, 0.625], "snapshot": [0.01, 0.02, 0.04], "wait": [0.0, 0.3, 0.01],
        "write": [0.2, 0.4, 0.3],
    }  # fmt: skip
    found = saving.summary(seconds, 16)
    assert (found["stop_seconds"], found["stop_seconds_max"]) == pytest.approx((0.05, 0.32))
    assert (found["snapshot_seconds"], found["wait_seconds"], found["write_seconds"]) == (0.02, 0.01, 0.3)
    assert found["images_per_sec"] == pytest.approx({"never": 32.0, "each": 25.6})
    run = {
        "model": "deit", "data": "digits", "precision": "float32", "batch": 16, "directory": "/disk",
        "bytes": 88_500_000, "tensors": 627, "every_updates": 50, "global_batch": 64,
    }  # fmt: skip
    text = "\n".join(saving.lines({**run, **found}))
    for part in (
        "updates of 16 images of digits; no teacher",
        "88.5 MB, 627 tensors, written below /disk",
        "0.0500 s median, 0.3200 s max; medians: snapshot 0.0200 s, wait for the save before 0.0100 s",
        "0.3000 s median, until it is committed",
        "32.00 images/s",
        "25.60 images/s, 0.800 of that; an update takes +0.1250 s",
        "every 50 updates of 64 images: +0.125% of the time",  # 0.125 s in 50 * 64 / 32 s
    ):
        assert part in text
    assert "as configured" not in "\n".join(saving.lines({**run, **found, "every_updates": 0}))


def test_real_updates_are_saved_one_by_one_and_the_newest_checkpoint_is_whole(tmp_path):
    config = update.copy_of(small_config(), {"checkpoint.keep": 2})
    source = sources.open_source(config.data, "train")
    result = saving.measure(config, source, rounds=2, updates=2, directory=tmp_path)
    counts = {name: len(each) for name, each in result["seconds"].items()}
    assert counts == {"never": 2, "each": 2, "snapshot": 4, "wait": 4, "write": 4}
    # A round is 1 + 2 updates that are not saved, one that is not timed, and 2 that are saved: 5 and 6, 11 and 12.
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.committed(tmp_path / "checkpoints")]
    assert steps == [12, 11]
    newest = tmp_path / "checkpoints" / checkpoint.name_of(12)
    assert checkpoint.verify(newest) is None
    assert result["bytes"] == sum(path.stat().st_size for path in newest.iterdir())
    assert all(min(each) > 0 for each in result["seconds"].values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            (),
            "usage: python tools/benchmark.py train|eval|accumulate|memory|startup|scaling|set|calibrate|data|teacher",
        ),
        (("speed",), "'speed' is no measurement; usage"),
        (("accumulate", "--peer"), "--peer measures `data` and has no meaning for `accumulate`"),
        (("accumulate", "--images=8"), "--images measures `data`"),
        (("data", "--peer", "--updates=2"), "--updates times the student, which --peer leaves out"),
        (("data", "--timm_python=python3"), "--timm_python is compared with --peer only"),
        (("data", "--recipe=full"), "recipe"),
        (("teacher", "--config=configs/deit_tiny_flowers.py:scratch"), "distill.kind ('none')"),
        (("workers", "--images=8"), "--images measures `data` and has no meaning for `workers`"),
        (("workers", "--nostand_in"), "--stand_in chooses what `teacher` measures and has no meaning for `workers`"),
        (("checkpoint", "--peer"), "--peer measures `data` and has no meaning for `checkpoint`"),
        (("checkpoint", "--stand_in"), "--stand_in chooses what `teacher` measures and has no meaning"),
        (("checkpoint", "--config.data.name=tfds:tf_flowers", "--config.data.data_dir=/nowhere"), "/nowhere"),
        (("workers", "--config.data.name=tfds:tf_flowers", "--config.data.data_dir=/nowhere"), "/nowhere"),
        (("workers", "checkpoint"), "'workers checkpoint' is no measurement"),
        (("data", "--config.data.name=folder:/nowhere/at/all"), "/nowhere/at/all"),
        (("data", "--config.data.name=tfds:tf_flowers", "--config.data.data_dir=/nowhere"), "/nowhere"),
    ],
)
def test_a_wrong_command_line_and_absent_data_are_one_line_and_exit_code_1(words, said):
    command = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py"), *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
