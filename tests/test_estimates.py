"""Predictions of speed and memory against numbers worked out by hand, and the file that calibrations are kept in."""

import numpy as np
import pytest

from configs import base
from deit import cost, errors, estimates, plan
from deit.models import factory, fused_block
from tools.benchmarks import calibrate


def test_an_update_takes_three_passes_of_products_and_of_bytes_that_are_written_and_read():
    machine = estimates.Machine(flops=1e12, bandwidth=1e11)
    spent = cost.Cost(flops=2e9, activation_bytes=5e7)
    assert machine.images_per_sec(spent) == pytest.approx(1 / (3 * (0.002 + 0.001)))


def test_a_gpu_is_taken_at_half_of_its_data_sheet_in_the_precision_asked_for():
    spent = cost.Cost(flops=15.7e9, activation_bytes=0.0)
    v100 = estimates.GPUS["V100-16GB"]
    assert estimates.gpu_images_per_sec(v100, spent, "float32") == pytest.approx(1000 * 0.5 / 3)
    assert estimates.gpu_images_per_sec(v100, spent, "tf32") == pytest.approx(1000 * 0.5 / 3)  # a V100 has none
    assert estimates.gpu_images_per_sec(v100, spent, "mixed_float16") == pytest.approx(1000 * 125 / 15.7 * 0.5 / 3)
    a100 = estimates.GPUS["A100-40GB"]
    assert estimates.gpu_images_per_sec(a100, spent, "tf32") == pytest.approx(156e12 / 15.7e9 * 0.5 / 3)


def v100_images_per_sec(variant, size, precision):
    c = base.get_config()
    c.model.variant = variant
    network = factory.build(c.model, num_classes=1000, image_size=size, precision=precision, load_weights=False)
    with fused_block.compiling(True):
        spent = cost.of(network.logits, size)
    return estimates.gpu_images_per_sec(estimates.GPUS["V100-16GB"], spent, precision)


def test_deit_b_on_a_v100_is_promised_what_the_paper_measured():
    """53 hours of 8 V100 for 300 epochs of 1,281,167 images: 252 images/s each (arXiv:2012.12877, section 5.6)."""
    measured = 300 * 1_281_167 / (53 * 3600 * 8)
    assert v100_images_per_sec("deit_base_patch16_224", 224, "mixed_float16") == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("variant", "size", "published"),
    [
        ("deit_tiny_patch16_224", 224, 2536),
        ("deit_small_patch16_224", 224, 940),
        ("deit_base_patch16_224", 224, 292),
        ("deit_base_patch16_384", 384, 86),
    ],
)
def test_the_paper_s_forward_passes_are_the_same_part_of_the_data_sheet_for_every_size(variant, size, published):
    """arXiv:2012.12877, images/s of a V100. A forward pass is a third of an update, `REACHED` of the sheet."""
    sheet = 3 * v100_images_per_sec(variant, size, "float32") / estimates.REACHED
    assert published / sheet == pytest.approx(0.79, abs=0.03)


def test_a_machine_s_two_rates_are_found_again_from_its_own_updates():
    machine = estimates.Machine(flops=2e11, bandwidth=3e10)
    costs = [cost.Cost(f, b) for f, b in ((1e9, 1e8), (2e9, 1e8), (9e9, 2e8))]
    found, worst = calibrate.fit(costs, [1 / machine.images_per_sec(spent) for spent in costs])
    np.testing.assert_allclose([found.flops, found.bandwidth], [2e11, 3e10], rtol=1e-6)
    assert worst < 1e-6


def test_where_bytes_explain_nothing_products_explain_all():
    costs = [cost.Cost(1e9, 2e8), cost.Cost(4e9, 1e8)]
    found, worst = calibrate.fit(costs, [3 * 1e9 / 1e11, 3.3 * 4e9 / 1e11])
    assert 0 < found.flops < np.inf and found.bandwidth > 1e300
    assert worst < 0.1
    assert found.images_per_sec(costs[0]) == pytest.approx(found.flops / 3e9, rel=1e-6)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration.json"


def known(date="2026-01-02"):
    return estimates.Calibration(estimates.Machine(1e11, 1e10), 5e8, 0.5, 0.04, date)


def digits(**fields):
    c = base.get_config()
    c.data.name, c.data.train_split, c.data.eval_split = "digits", "train", "test"
    c.model.variant, c.data.image_size, c.total_updates = "deit_micro_patch8_32", 32, 1000
    c.update_from_flattened_dict(fields)
    return c


def test_a_calibration_is_read_as_it_was_written_beside_those_of_other_settings(cache):
    half, plain = digits(precision="mixed_bfloat16"), digits(**{"model.fused_gradients": False})
    assert estimates.read(digits()) is None
    assert estimates.write(digits(), known()) == cache
    estimates.write(half, known("2026-03-04"))
    assert estimates.read(digits()) == known()
    assert estimates.read(half) == known("2026-03-04")
    assert estimates.read(plain) is None and estimates.read(digits(xla=True)) is None


def test_a_calibration_is_of_deits_and_says_nothing_of_other_networks(cache):
    estimates.write(digits(), known())
    assert estimates.read(digits(**{"model.variant": "groupnorm_resnet"})) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0}'])
def test_a_damaged_calibration_is_none_and_is_written_anew(cache, damage):
    estimates.write(digits(), known())
    cache.write_text(damage)
    assert estimates.read(digits()) is None
    estimates.write(digits(), known())
    assert estimates.read(digits()) == known()


def test_a_user_without_a_home_has_no_calibration_and_is_told_so_before_anything_is_measured(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DEIT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert estimates.read(digits()) is None
    with pytest.raises(errors.UserError, match="DEIT_CACHE_DIR names a directory"):
        calibrate.measure(digits(), command=["false"])


def rows(config):
    lines = (line.strip().partition("  ") for line in plan.offline(config, replicas=1).splitlines())
    return {name: text.strip() for name, _, text in lines}


def test_the_plan_says_how_to_calibrate_and_afterwards_what_the_calibration_predicts(cache):
    c = digits(precision="mixed_float16")
    found = rows(c)
    assert found["speed here"].startswith(
        "not calibrated: python tools/benchmark.py calibrate --config.precision=mixed_float16 ("
    )
    assert found["memory"].endswith("(estimate)")
    assert found["V100-16GB"].endswith("of 16 GB for a micro-batch of 16 (estimate from FLOPs and bytes)")
    rate, hours = (float(found["V100-16GB"].replace(",", "").split()[i]) for i in (1, 7))
    assert hours == pytest.approx(1000 * 256 / rate / 3600, rel=0.02)
    assert found["other GPUs"].count(",") >= 4 and found["other GPUs"].endswith("images/s (estimates)")
    estimates.write(c, known())
    found = rows(c)
    assert found["memory"].endswith("(calibrated 2026-01-02)")
    rate, hours = (float(found["speed here"].split()[i]) for i in (1, 7))
    assert hours == pytest.approx(1000 * 256 / rate / 3600, rel=0.02)


def test_a_v100_is_promised_no_bfloat16(cache):
    found = rows(digits(precision="mixed_bfloat16"))
    assert found["V100-16GB"].startswith("has no units for bfloat16 (mixed_bfloat16)")
    assert "T4" not in found["other GPUs"] and "A100-40GB" in found["other GPUs"]


def test_a_cnn_has_rows_for_gpus_but_no_speed_here(cache):
    found = rows(digits(**{"model.variant": "groupnorm_resnet"}))
    assert "speed here" not in found and "estimate" in found["V100-16GB"]


def test_a_plan_is_the_same_where_the_compiler_fails_and_where_a_softmax_sums_in_half_precision(cache, monkeypatch):
    here = rows(digits(precision="mixed_bfloat16"))
    monkeypatch.setattr(fused_block, "_compiler_works", lambda: False)
    monkeypatch.setattr(fused_block, "_kernel_sums_in_float32", lambda dtype: False)
    assert rows(digits(precision="mixed_bfloat16")) == here


def test_the_usual_configuration_is_calibrated_without_a_flag():
    assert estimates.flags(base.get_config()) == []


def test_heads_alone_take_a_third_of_an_update(cache):
    c = digits()
    estimates.write(c, known())
    whole, heads = (rows(digits(**{"optim.train_only": only})) for only in ("", "heads"))
    for name in ("V100-16GB", "speed here"):
        few, many = (float(found[name].replace(",", "").split()[1]) for found in (whole, heads))
        assert many == pytest.approx(3 * few, rel=0.01)


def test_heads_alone_need_little_memory_for_a_large_micro_batch(cache):
    c = {"global_batch": 4096, "micro_batch": 4096, "model.variant": "deit_tiny_patch16_224", "data.image_size": 224}
    for name, place in (("V100-16GB", 9), ("memory", 1)):
        whole, heads = (rows(digits(**c, **{"optim.train_only": only})) for only in ("", "heads"))
        few, many = (float(found[name].split()[place]) for found in (heads, whole))
        assert many > 100 and few < 10


def test_half_precision_that_a_v100_has_not_is_given_no_hours_of_one(cache):
    assert rows(digits(precision="mixed_bfloat16"))["compute"].endswith("FLOPs; a V100 has no units for bfloat16")


def test_a_calibration_splits_memory_into_images_weights_and_the_rest(cache, monkeypatch):
    """Made-up processes: 100 MB, weights, two moments, EMA, two gradients, .6 folded, 7 MB an image."""
    parameters = {"deit_tiny_distilled_patch16_224": 5_526_730}  # with two heads of 5 classes

    def alternate(measured, *, rounds, said):
        answers = {}
        for (variant, _, micro), name in zip(calibrate.CASES, measured):
            weights = 4 * parameters.get(variant, 0) * (1 + 5 + 0.6) / 2**20
            answers[name] = [{"images_per_sec": 10.0, "peak_mb": 100 + weights + 7 * micro}]
        return answers

    monkeypatch.setattr(calibrate.sides, "alternate", alternate)
    monkeypatch.setattr(calibrate.runtime, "prepare", lambda precision: None)
    c = digits(**{"optim.ema_decay": 0.9, "optim.amsgrad": False})
    result = calibrate.measure(c, command=["none"])
    assert result["base_mb"] == pytest.approx(100, abs=1)
    assert estimates.read(c).base_bytes == pytest.approx(100 * 2**20, rel=0.01)
    assert result["machine"] == estimates.fingerprint()
