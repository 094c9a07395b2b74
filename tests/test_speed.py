"""Speed and memory: floors counted by hand, groups by name, fits of made-up laws, and small measurements for real."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from configs import quickstart
from deit import errors
from tests.test_benchmark import REPOSITORY
from tools import peer_packages
from tools.benchmarks import groups, products, scaling, sides, speed, table, update

TINY = "deit_tiny_distilled_patch16_224"


def graph_of(function, *shapes):
    return tf.function(function, autograph=False).get_concrete_function(*(tf.TensorSpec(s) for s in shapes)).graph


def test_the_products_of_a_graph_are_counted_with_their_gradients_by_definition():
    def trained(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            loss = tf.reduce_sum(tf.matmul(x, w) ** 2)
        return tape.gradient(loss, [x, w])

    found = products.of(graph_of(trained, [6, 4], [4, 10]))
    assert sum(found.values()) == 3
    assert {product.flops for product in found} == {2 * 6 * 4 * 10}


def test_a_convolution_and_the_gradient_of_its_kernel_cost_the_same_and_what_nobody_needs_costs_nothing():
    def trained(images, kernel):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            y = tf.nn.conv2d(images, kernel, 4, "VALID")
        return tape.gradient(y, [images, kernel])[1]  # the gradient of the images is built, and never run

    found = products.of(graph_of(trained, [2, 8, 8, 3], [4, 4, 3, 5]))
    flops = 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)
    assert {product.kind: product.flops for product in found} == {"Conv2DBackpropFilter": flops}
    whole = products.of(graph_of(lambda x, k: tf.nn.conv2d(x, k, 4, "VALID"), [2, 8, 8, 3], [4, 4, 3, 5]))
    assert [(product.kind, product.flops) for product in whole] == [("Conv2D", flops)]


def test_products_of_batches_are_told_apart_by_shape_and_transposition():
    def attention(q, k):
        return tf.matmul(q, k, transpose_b=True), tf.matmul(q, k, transpose_b=True), tf.matmul(k, q, transpose_a=True)

    found = products.of(graph_of(attention, [3, 5, 7], [3, 5, 7]))
    assert sorted(found.values()) == [1, 2]
    assert {product.flops for product in found} == {2 * 3 * 5 * 5 * 7, 2 * 3 * 7 * 7 * 5}
    assert products.seconds(found, repeats=1) > 0


def test_a_loop_is_refused_because_its_turns_are_not_known():
    def looped(x):
        return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, tf.matmul(y, y)), (0, x))

    with pytest.raises(ValueError, match=r"is a (Stateless)?While, which is not counted"):
        products.of(graph_of(looped, [2, 2]))


@pytest.mark.parametrize(
    "name, group",
    [
        ("net_training/blocks.3/MatMul_1:_MklBatchMatMulV2", "matrix products"),
        ("net/patch_embed/proj/BiasAdd:_MklNativeFusedConv2D", "matrix products"),
        ("gelu_17/PartitionedCall:PartitionedCall", "GELU"),
        ("gradient_tape/net/blocks.0/mlp/Gelu/mul_1/Mul:Mul", "GELU"),
        ("net/blocks.1/layer_norm_1/PartitionedCall:PartitionedCall", "LayerNorm"),
        ("gradient_tape/net/blocks.0/norm1/batchnorm/mul/Sum:Sum", "LayerNorm"),
        ("net/normalize/sub:Sub", "input"),
        ("softmax_3/PartitionedCall:PartitionedCall", "attention softmax"),
        ("net/blocks.0/Softmax:_MklSoftmax", "attention softmax"),
        ("cond/optimizer/optimizer/update_7/ResourceApplyAdam:ResourceApplyAdam", "optimizer"),
        ("guard/mul_4:Mul", "optimizer"),
        ("net/blocks.5/add_1:AddV2", "bias and residual"),
        ("net/blocks.5/transpose:_MklTranspose", "layout"),
        ("IsFinite:IsFinite", "other"),
    ],
)
def test_a_kernel_is_in_the_group_that_its_scope_and_type_say(name, group):
    assert groups.group(name) == group


def small(**changes):
    """Return digits with a small network, micro-batches of 4."""
    fields = {"global_batch": 8, "micro_batch": 4, "model.variant": "deit_micro_distilled_patch8_32"}
    return update.copy_of(quickstart.get_config("distilled"), fields | changes)


def test_the_profile_of_an_update_has_every_group_and_no_more_time_than_went_by():
    step, network = update.student(small(global_batch=4), classes=list("abcde"), train_size=100)
    batch = update.pictures(4, 32, len(network.drop_rates))
    update.timed(lambda: step(batch), 4)
    seconds = []

    def once():
        started = time.perf_counter()
        step(batch).numpy()
        seconds.append(time.perf_counter() - started)

    found = groups.measure(once, runs=2)
    named = {"matrix products", "attention softmax", "GELU", "LayerNorm", "optimizer", "input"}
    assert named <= found.keys()
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert 0 < sum(found.values()) < np.mean(seconds) * os.cpu_count()  # of one run, a kernel on each core
    assert products.of(step.trace(batch))


def test_a_product_that_is_not_counted_is_refused_by_its_name_and_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match="is a Einsum, which is not counted"):
        products.of(graph_of(lambda x, y: tf.einsum("ab,cb->ac", x, y), [2, 3], [4, 3]))
    assert not products.of(graph_of(lambda x, y: tf.matmul(x, y), [1, 3], [3, 4]))


def test_two_laws_are_found_again_from_their_own_values():
    x = np.array([1, 2, 4, 8, 16])
    line = scaling.fit(x, 0.02 + 0.7 * x, powers=(0, 1))
    np.testing.assert_allclose(line["coefficients"], [0.02, 0.7], rtol=1e-9)
    assert line["worst"] < 1e-9
    square = scaling.fit(x, 1e-3 + 3e-4 * x + 2e-7 * x**2, powers=(0, 1, 2))
    np.testing.assert_allclose(scaling.law(square, np.array([100])), [0.001 + 0.03 + 0.002], rtol=1e-6)


def test_a_measurement_that_leaves_its_law_is_told_by_how_much():
    assert scaling.fit([1, 2, 3], [1.0, 2.0, 4.0], powers=(0, 1))["worst"] > 0.05


def test_the_picture_of_both_laws_is_a_picture(tmp_path):
    result = {
        "model": "m", "precision": "float32", "micro_batch": 4, "accum_steps": [1, 2, 4], "update_seconds": [1, 2, 4],
        "accum_peak_mb": [500, 510, 520], "image_size": [16, 32, 64], "tokens": [5, 17, 65],
        "image_seconds": [0.1, 0.3, 1.2], "size_peak_mb": [400, 500, 900],
    }  # fmt: skip
    result["accum_law"] = scaling.fit(result["accum_steps"], result["update_seconds"], powers=(0, 1))
    result["token_law"] = scaling.fit(result["tokens"], result["image_seconds"], powers=(0, 1, 2))
    scaling.draw(result, tmp_path / "laws.png")
    height, width, _ = tf.io.decode_png((tmp_path / "laws.png").read_bytes()).shape
    assert width > 800 and height > 300
    assert len(scaling.lines(result)) == 8


def printing(value) -> sides.Side:
    return sides.Side((sys.executable, "-c", f"print('noise'); print('{json.dumps(value)}')"))


def test_sides_take_turns_and_their_medians_and_rounds_are_kept():
    runs = sides.alternate({"a": printing({"images_per_sec": 2.0, "peak_mb": 5.0})}, rounds=3, said="test")
    assert sides.summary(runs["a"]) == {"images_per_sec": 2.0, "rounds": [2.0] * 3, "peak_mb": 5.0}


def test_a_product_under_a_condition_is_refused_and_a_condition_without_one_is_nothing():
    def chosen(branch):
        return lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: branch(x), lambda: x)

    with pytest.raises(ValueError, match="MatMul is computed under a condition, which is not counted"):
        products.of(graph_of(chosen(lambda x: tf.matmul(x, x)), [2, 2]))
    assert not products.of(graph_of(chosen(lambda x: x + 1.0), [2, 2]))


def test_where_timm_fails_ours_is_measured_all_the_same(monkeypatch):
    ours = {"images_per_sec": 2.0, "peak_mb": 5.0}
    broken = sides.Side((sys.executable, "-c", "raise SystemExit('Input size must be a multiple')"))
    monkeypatch.setattr(sides, "peer", lambda *args: broken)
    code = f"import json; print(json.dumps({ours}))"
    found = sides.compare(small(), "train", 4, command=[sys.executable, "-c", code], rounds=1)
    assert found["ours"]["images_per_sec"] == 2.0 and "ratio" not in found
    assert found["unmatched"].endswith("of timm ended with exit code 1: Input size must be a multiple")
    found = speed.memory(small(), rounds=1, command=[sys.executable, "-c", code])
    assert found["peak_mb"] == [5.0] * 3 and "timm_peak_mb" not in found


def test_a_last_line_that_is_no_number_is_told():
    chatty = sides.Side((sys.executable, "-c", "print('{}'); print('goodbye')"))
    with pytest.raises(errors.UserError, match="of chatty ended with a line that is no JSON: goodbye"):
        sides.alternate({"chatty": chatty}, rounds=1, said="test")


def test_a_side_that_fails_ends_the_measurement_with_its_last_line():
    broken = sides.Side((sys.executable, "-c", "raise SystemExit('no such network')"))
    with pytest.raises(errors.UserError, match="of theirs ended with exit code 1: no such network"):
        sides.alternate({"theirs": broken}, rounds=1, said="test")


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, r"model.variant \(deit_micro_distilled_patch8_32\) must be one of timm's deit_\*"),
        ({"precision": "mixed_float16"}, r"precision \(mixed_float16\) must be one of float32, mixed_bfloat16"),
        (
            {"model.variant": "deit_tiny_patch16_224"},
            r"model.variant \(deit_tiny_patch16_224\) must be a distilled one",
        ),
        ({"model.variant": TINY, "distill.kind": "soft"}, r"distill.kind \(soft\) must be hard"),
        ({"model.variant": TINY, "model.registers": 2}, r"model.registers \(2\) must be 0"),
    ],
)
def test_where_timm_has_not_the_same_network_the_reason_is_the_field_its_value_and_the_rule(
    fields, reason, monkeypatch
):
    monkeypatch.setattr(sides.peer_packages, "missing", lambda wanted: [])
    assert re.match(reason, sides.peer(small(**fields), "train", 4))


def test_timm_s_side_gets_the_network_of_the_configuration(monkeypatch):
    monkeypatch.setattr(sides.peer_packages, "missing", lambda wanted: [])
    side = sides.peer(small(**{"model.variant": TINY, "model.drop_path": 0.2}), "train", 4)
    assert {f"--model={TINY}", "--precision=fp32", "--batch=4", "--size=32", "--drop_path=0.2"} <= set(side.command)
    monkeypatch.setattr(sides.peer_packages, "missing", lambda wanted: ["timm"])
    assert sides.peer(small(), "train", 4) == "timm not installed (make peers)"


def found(ours, theirs, **more):
    side = {"images_per_sec": ours, "rounds": [ours] * 2, "peak_mb": 800.0}
    other = {"images_per_sec": theirs, "rounds": [theirs] * 2, "peak_mb": 1000.0}
    ratio = {"images_per_sec": ours / theirs, "rounds": [ours / theirs] * 2, "peak_mb": 0.8}
    return {"ours": side, "timm": other, "ratio": ratio, "batch": 16, "versions": {"timm": "9.9"}, **more}


def test_the_table_has_a_row_a_measurement_and_says_what_could_not_be_measured():
    floor = {"floor_fraction": 0.9, "floor_seconds": 0.5, "floor_gflops": 100.0, "floor_rounds": [0.9]}
    result = {
        "machine": "two cores", "date": "2026-01-02", "rounds": 2,
        "train tiny float32": found(30.0, 20.0, groups={"GELU": 0.1}, **floor),
        "eval tiny float32": found(60.0, 50.0),
        "eval tiny float16": {"missing": "out of memory"},
        "accumulate": {
            "micro_batch": 16, "global_batch": 256, "speed_ratio": 0.98, "memory_ratio": 1.05,
            "images_per_sec": [30.0, 25.6], "ratio_rounds": [0.97, 0.99],
        },
        "startup": {"seconds": {"import": 2.0, "trace": 3.0}, "total": 5.0, "batch": 16},
        "optimizer": {"seconds": 0.1, "log_seconds": 0.001},
        "checkpoint": {"missing": "tf_flowers is not prepared"},
    }  # fmt: skip
    rows = table.markdown(result)
    assert rows[0] == "two cores, timm 9.9; 2026-01-02, 2 rounds."
    train = "| train tiny float32, 16 | 30.00 | 20.00 | **1.50** (1.50 to 1.50) | 800 | 1000 | 0.80 | 0.900 |"
    assert rows[4] == train and rows[5].endswith("| **1.20** (1.20 to 1.20) | 800 | 1000 | 0.80 |  |")
    assert "not measured: out of memory" in rows[6]
    assert {row.count("|") for row in rows[2:7]} == {9}
    assert "- first update of 16 done after 5.00 s: import 2.00, trace 3.00" in rows
    share = "100.0 ms of kernels, 1.000% of an update of 256; a log line: 1.00 ms, 0.010% of an update of 256"
    assert f"- optimizer, EMA, clipping, guard: {share}" in rows
    assert "- checkpoint not measured: tf_flowers is not prepared" in rows


def test_a_row_that_fails_leaves_the_others(monkeypatch, tmp_path):
    def failing(*args, **settings):
        raise errors.UserError("too little memory")

    for name in ("train", "evaluation", "accumulate"):
        monkeypatch.setattr(table.speed, name, failing)
    monkeypatch.setattr(table.speed, "startup", lambda *args, **settings: {"seconds": {}, "total": 1.0, "batch": 4})
    monkeypatch.setattr(table, "optimizer", lambda *args: {"seconds": 0.1, "log_seconds": 0.001})
    monkeypatch.setattr(table, "checkpoint", lambda *args: {"seconds": 0.2, "every_updates": 0})
    table.measure(small(), rounds=1, command=[], out=tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert text.count("not measured: too little memory") == 9
    assert "- a checkpoint stops the loop for 200 ms, at the end alone" in text


def test_the_lines_of_train_name_floor_groups_and_ratio():
    floor = {"floor_fraction": 0.9, "floor_seconds": 0.48, "floor_gflops": 111.0, "floor_rounds": [0.9, 0.91]}
    result = found(30.0, 20.0, groups={"matrix products": 0.3, "GELU": 0.1}, **floor)
    lines = speed.train_lines(result)
    assert lines[2].startswith("ratio      1.50 (rounds: 1.50, 1.50); memory 0.80")
    assert "33.33 images/s if there were nothing but its 111 GFLOP of matrix products: 0.900" in lines[3]
    assert lines[-1].split() == ["GELU", "100.0", "ms", "25.0%"]


def tool(*words, timeout=240):
    command = [sys.executable, "tools/benchmark.py", *words, "--config=configs/quickstart.py:distilled", "--rounds=1"]
    fields = ["--config.global_batch=8", "--config.micro_batch=4", "--updates=1"]
    return subprocess.run([*command, *fields], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


def test_accumulate_measures_both_in_processes_of_their_own():
    done = tool("accumulate", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["micro_batch"], result["global_batch"]) == (4, 8)
    assert min(result["images_per_sec"]) > 0 and min(result["peak_mb"]) > 100
    assert result["speed_ratio"] == pytest.approx(result["images_per_sec"][1] / result["images_per_sec"][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval", "memory", "startup"])
def test_every_measurement_runs_for_a_small_network_without_a_peer(mode):
    done = tool(mode, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if mode in ("train", "eval"):
        assert result["ours"]["images_per_sec"] > 0 and "ratio" not in result
    if mode == "train":
        assert result["floor_fraction"] > 0 and result["groups"]["matrix products"] > 0
    if mode == "memory":
        assert result["micro_batch"] == [1, 2, 4] and len(result["peak_mb"]) == 3
    if mode == "startup":
        assert result["seconds"].keys() == {"import", "build", "trace", "optimise", "run"}
        assert result["total"] == pytest.approx(sum(result["seconds"].values()))
        assert result["seconds"]["import"] > 0.5


@pytest.mark.parametrize(
    ("mode", "out", "why"),
    [
        ("set", "README.md", "--out (README.md) exists; nothing is overwritten"),
        ("scaling", "laws.xyz", "--out (laws.xyz) must end in .png"),
        ("set", "no/such.md", "--out (no/such.md) must lie in a directory that exists"),
    ],
)
def test_a_place_that_can_t_be_written_is_refused_before_anything_is_measured(mode, out, why):
    done = tool(mode, f"--out={out}", timeout=30)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {why}"), done.stderr


@pytest.mark.parametrize(
    "out", [["--out=t.md"], ["--out", "t.md"], ["-out=t.md"]], ids=["one word", "two words", "one dash"]
)
def test_a_process_of_a_measurement_is_started_without_its_mode_and_where_the_result_goes(out):
    code = "import sys; from tools import benchmark; print(benchmark._command('set')[2:])"
    command = [sys.executable, "-c", code, "set", *out, "--rounds=2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['--rounds=2']", done.stderr


def test_a_flag_of_another_measurement_is_refused():
    done = tool("train", "--peer")
    assert (done.returncode, done.stderr.strip()) == (
        1,
        "error: --peer measures `data` and has no meaning for `train`",
    )


@pytest.mark.slow
def test_timm_s_side_trains_and_evaluates():
    missing = peer_packages.missing(("torch", "torchvision", "timm"))
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[peers]'")
    for what in ("train", "eval"):
        command = [sys.executable, str(sides.PEER), what, "--batch=1", "--steps=1", "--precision=bf16"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["images_per_sec"] > 0
