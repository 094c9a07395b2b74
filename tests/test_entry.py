"""main.py and the tools as a user meets them: in a process of their own, good input and bad."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deit import workdir

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, cwd, timeout=240, **variables):
    """Run a script of the project in `cwd` with environment `variables`; return (exit code, stdout, stderr)."""
    script, *rest = arguments
    environment = {**os.environ, "PYTHONPATH": "", **variables}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def main(*arguments, cwd, config="quickstart.py:scratch", **options):
    return run("main.py", f"--config={ROOT / 'configs'}/{config}", *arguments, cwd=cwd, **options)


def assert_one_line(result, *parts):
    code, out, err = result
    assert code == 1, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0], lines[0]


# Flag -> what the one line must say. All but model.variant and model.patch are answered without TensorFlow.
BAD_FLAGS = {
    "--config.global_bach=3": ["global_bach", "did you mean global_batch"],
    "--config.optim.peak_rl=3": ["optim.peak_rl", "did you mean optim.peak_lr"],
    "--config.optim.peak_lr=-1": ["optim.peak_lr (-1.0)", "greater than 0"],
    "--config.optim.peak_lr=nan": ["optim.peak_lr", "finite"],
    "--config.global_batch=1.5": ["global_batch", "1.5"],
    "--config.global_batch=100": ["global_batch (100)", "divisible by replicas * micro_batch (1 * 64)"],
    "--config.distill.kind=warm": ["distill.kind ('warm')", "none, soft, hard"],
    "--config.model.variant=deit_tini": ["model.variant", "deit_tiny"],
    "--config.model.patch=64": ["data.image_size (32)", "model.patch (64)"],
    "--config.teacher.kind=run": ["teacher.path", "must be given"],
    "--mode=trian": ["mode", "trian"],
    "--wrkdir=x": ["wrkdir", "workdir"],
    "stray": ["stray"],
    "--workdir=gs://bucket/run": ["workdir", "gs:"],
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_exit_1(tmp_path, flag):
    assert_one_line(main(flag, cwd=tmp_path), *BAD_FLAGS[flag])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "parts"),
    [("nope.py", ["nope.py", "no such file"]), ("quickstart.py:warm", ["'warm'", "scratch"])],
)
def test_a_configuration_that_does_not_exist_is_one_line(tmp_path, config, parts):
    assert_one_line(main(cwd=tmp_path, config=config), *parts)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("main.py", "error: interrupted; the same command continues from the newest checkpoint"),
        ("tools/prepare_data.py check", "error: interrupted"),
    ],
)
def test_ctrl_c_is_one_line_that_promises_to_continue_only_where_it_does(tmp_path, script, line):
    path, *arguments = script.split()
    code = (
        "import runpy, sys\n"
        "from deit import rules\n"
        "def interrupt(config): raise KeyboardInterrupt\n"
        "rules.validate = interrupt\n"
        f"sys.argv = {[str(ROOT / path), *arguments]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == line


def test_help_names_the_flags_and_a_config_field(tmp_path):
    code, out, err = main("--help", cwd=tmp_path)
    assert code == 1, err
    assert "--workdir" in out and "--mode" in out and "configs/base.py" in out


# (flags, parts): found only once data, teacher or workdir are looked at.
MISSING = [
    (["--config.data.name=folder:nowhere"], ["nowhere"]),
    (["--config.data.train_split=valid"], ["valid", "train"]),
    (["--config.distill.kind=hard", "--config.teacher.kind=run", "--config.teacher.path=nowhere"], ["nowhere"]),
    (
        ["--config.distill.kind=hard", "--config.teacher.kind=saved_model", "--config.teacher.path=nowhere"],
        ["nowhere"],
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "parts"), MISSING)
def test_what_is_missing_is_named_in_one_line(tmp_path, flags, parts):
    assert_one_line(main(*flags, "--workdir=w", cwd=tmp_path), *parts)
    assert not (tmp_path / "w").exists()


class Refusing(http.server.BaseHTTPRequestHandler):
    """A proxy that lets nothing through."""

    def do_GET(self):
        self.send_error(403)

    do_HEAD = do_CONNECT = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def no_network():
    """Return the environment of a process that reaches no network, also where the host has one."""
    # A refusal, not a dead address: TFDS tries that ten times, for more than three minutes.
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        yield {**dict.fromkeys(names, f"http://127.0.0.1:{server.server_port}"), "NO_PROXY": "", "no_proxy": ""}
        server.shutdown()


@pytest.mark.slow
def test_without_data_and_network_the_three_ways_on_are_named(tmp_path, no_network):
    flags = [f"--config.data.data_dir={tmp_path / 'empty'}", "--workdir=w"]
    result = main(*flags, cwd=tmp_path, config="deit_tiny_flowers.py:scratch", **no_network)
    assert_one_line(result, "data.data_dir", "folder:", "make quickstart")


def test_a_workdir_in_use_is_refused_with_the_process_that_has_it(tmp_path):
    with workdir.lock(tmp_path / "w"):
        assert_one_line(main("--workdir=w", cwd=tmp_path), "workdir (w) is in use", f"pid {os.getpid()}")
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".lock"]


def test_the_plan_of_the_main_job_needs_neither_data_nor_network_and_writes_nothing(tmp_path):
    flag = "--config.data.data_dir=" + str(tmp_path / "empty")
    code, out, err = main("--mode=plan", flag, cwd=tmp_path, config="deit_tiny_flowers.py")
    assert code == 0, err
    plan = " ".join(out.split())
    for part in (
        "3,303 train", "367 evaluation", "not checked", "1 replicas x 16 micro_batch x 16 accum_steps = 256",
        "258", "peak 0.001", "0.05 x lr", "MB a checkpoint", "GB",
    ):  # fmt: skip
        assert part in plan, part
    assert "5,526,730 parameters" in plan  # 5,524,800 and two heads of 192 * 5 + 5
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_the_card_says_that_its_decay_is_not_coupled(tmp_path):
    code, out, err = main("--mode=plan", cwd=tmp_path, config="deit_tiny_flowers.py:card")
    assert code == 0, err
    plan = " ".join(out.split())
    assert "peak 6.25e-05" in plan and "not x lr" in plan and "on everything" in plan and "9,079,498" in plan


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished run of the smoke preset, teacher and all."""
    cwd = tmp_path_factory.mktemp("smoke")
    code, out, err = main("--workdir=runs/smoke", cwd=cwd, config="deit_tiny_flowers.py:smoke")
    assert code == 0, err
    return cwd


def test_a_run_leaves_checkpoints_metrics_events_and_its_configuration(smoke):
    run_dir = smoke / "runs/smoke"
    for directory in (run_dir, run_dir / "teacher"):
        assert (directory / "config.json").is_file()
        assert list(directory.glob("events.out.tfevents.*"))
        assert list(directory.glob("checkpoints/step-*"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for name in ("train/loss", "train/loss_cls", "train/loss_distill", "optim/lr", "optim/grad_norm",
                 "perf/images_per_sec", "data/bad_images"):  # fmt: skip
        assert all(name in line for line in lines[1:]), name
    for name in ("eval/top1", "eval/top1_softmax", "eval/top1_cls", "eval/top1_dist", "eval/top1_ema",
                 "eval/teacher_agreement"):  # fmt: skip
        assert 0 <= lines[-1][name] <= 1
    assert 0 <= lines[0]["teacher/top1"] <= 1


def test_a_finished_run_is_printed_and_left_alone(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "runs/smoke").rglob("*") if path.name != ".lock"}
    code, out, err = main("--workdir=runs/smoke", cwd=smoke, config="deit_tiny_flowers.py:smoke")
    assert code == 0 and "finished" in err and "eval/top1" in err
    after = {path: path.stat().st_mtime_ns for path in (smoke / "runs/smoke").rglob("*") if path.name != ".lock"}
    assert before == after


def test_eval_prints_the_number_that_training_logged(smoke):
    target = smoke / "eval.json"
    code, out, err = run("tools/eval.py", "--ckpt=runs/smoke", f"--json={target}", cwd=smoke)
    assert code == 0, err
    found = json.loads(target.read_text())
    logged = json.loads((smoke / "runs/smoke/metrics.jsonl").read_text().splitlines()[-1])
    for name in ("eval/top1", "eval/top1_softmax", "eval/top1_cls", "eval/top1_dist", "eval/top1_ema",
                 "eval/teacher_agreement", "eval/images"):  # fmt: skip
        assert found[name] == logged[name], name
    assert found["eval/images"] == 450 and found["step"] == 3
    assert "eval/recall/7" in found and re.search(r"eval/top1\s+0\.\d{4}", out)


def test_the_mode_eval_evaluates_the_newest_checkpoint_of_the_workdir(smoke):
    code, out, err = run("main.py", "--workdir=runs/smoke", "--mode=eval", cwd=smoke)
    assert code == 0, err
    assert re.search(r"eval/images\s+450", out)


def test_a_workdir_of_another_configuration_is_refused_with_the_difference(smoke):
    before = (smoke / "runs/smoke/config.json").read_bytes()
    result = main("--workdir=runs/smoke", "--config.optim.peak_lr=0.5", cwd=smoke, config="deit_tiny_flowers.py:smoke")
    assert_one_line(result, "optim.peak_lr: 0.001 -> 0.5", "--workdir=")
    assert (smoke / "runs/smoke/config.json").read_bytes() == before


def test_a_recorded_configuration_repeats_the_run_in_a_directory_of_its_own(smoke):
    code, out, err = run("main.py", "--config=runs/smoke/config.json", "--mode=plan", cwd=smoke)
    assert code == 0, err
    assert "32 global_batch" in out and "deit_micro_distilled" in out


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_evaluating_what_is_no_run_is_one_line(tmp_path, path):
    assert_one_line(run("tools/eval.py", f"--ckpt={path}", cwd=tmp_path), "is no run")


def test_a_table_of_runs_has_a_line_a_run(smoke):
    code, out, err = run("tools/compare_runs.py", "runs/smoke", "runs/smoke/teacher", cwd=smoke)
    assert code == 0, err
    assert re.search(r"runs/smoke\s+deit_micro_distilled_patch4_32\s+hard\s+3/3\s+0\.\d{4}", out)
    assert "tensorboard --logdir runs" in out


def test_runs_are_drawn_to_a_new_picture_and_a_metric_that_is_not_there_is_one_line(smoke):
    shutil.copytree(smoke / "runs/smoke", smoke / "runs/copy")
    with (smoke / "runs/copy/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": null}\n')  # as a value that was not finite is logged
    words = ("tools/compare_runs.py", "runs/smoke", "runs/copy", "--picture=curves.png")
    code, _, err = run(*words, cwd=smoke)
    assert code == 0, err
    assert (smoke / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line(run(*words, cwd=smoke), "--picture (curves.png) exists; nothing is overwritten")
    assert_one_line(
        run(*words[:3], "--picture=b.png", "--metric=train/los", cwd=smoke), "--metric (train/los) is not in"
    )
    assert_one_line(run(*words[:3], "--metric=eval/top1", cwd=smoke), "--metric chooses what --picture")
