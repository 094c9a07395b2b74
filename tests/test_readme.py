"""The README's commands are real: every one parses, names files that exist, and plans or explains itself."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    """Return the commands of the README's shell blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def run(words, cwd):
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)


def test_the_two_commands_stand_within_the_first_25_lines_with_the_table_to_expect():
    head = "\n".join(README.splitlines()[:25])
    assert "make quickstart" in head and "make tensorboard" in head
    assert re.search(r"runs/quickstart/distilled\s+deit_micro_distilled_\S+\s+hard\s+\S+\s+0\.\d{4}", head)


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert links and missing == []


PLACEHOLDER = re.compile(r"^[A-Z_]{8,}$", re.MULTILINE)


def test_no_page_has_a_line_that_still_waits_for_its_text():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(pages) > 1 and PLACEHOLDER.search("text\nRESULT_TABLE\n")
    found = {page.name: PLACEHOLDER.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_a_make_target_of_the_readme_exists(command):
    done = run([*shlex.split(command), "-n"], ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def recorded(tmp_path):
    """A directory to stand in: a pictures folder and a recorded configuration, where the README assumes them."""
    import tensorflow as tf

    from configs import quickstart
    from deit import config as configuration

    for name in ("daisy", "rose"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(10):
            tf.io.write_file(str(folder / f"{i}.png"), tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)))
    run_dir = tmp_path / "runs" / "deit_tiny_flowers"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(configuration.to_json(quickstart.get_config("scratch")))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({c for c in commands() if "main.py --config" in c}))
def test_a_training_command_of_the_readme_plans(command, recorded):
    script, *flags = shlex.split(command)[1:]
    flags = [flag.replace("--config=configs", f"--config={ROOT}/configs") for flag in flags]
    done = run([sys.executable, str(ROOT / script), *flags, "--mode=plan"], recorded)
    assert done.returncode == 0, done.stderr
    assert "global_batch" in done.stdout


LAUNCHES = [c for c in commands() if " launch/" in c]


@pytest.mark.parametrize("command", LAUNCHES)
def test_a_launch_command_names_a_file_that_is_there(command):
    (path,) = [word for word in shlex.split(command) if word.startswith("launch/")]
    assert (ROOT / path).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in LAUNCHES if "--config" in c])
def test_what_a_launch_command_hands_to_main_plans(command, recorded):
    flags = [word for word in shlex.split(command) if word.startswith("--")]
    flags = [flag.replace("--config=configs", f"--config={ROOT}/configs") for flag in flags if flag != "--"]
    done = run([sys.executable, str(ROOT / "main.py"), *flags, "--mode=plan"], recorded)
    assert done.returncode == 0, done.stderr
    assert "global_batch" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if "tools/" in c or "--mode=eval" in c])
def test_a_tool_of_the_readme_knows_its_flags(command):
    script, *flags = shlex.split(command)[1:]
    done = run([sys.executable, str(ROOT / script), "--help"], ROOT)
    for flag in (flag for flag in flags if flag.startswith("--")):
        assert flag.split("=")[0] in done.stdout


def test_nothing_else_is_promised_in_a_shell_block():
    known = (
        *("make ", "python main.py", "python tools/", "python launch/", "sbatch launch/", "kubectl apply -f launch/"),
        *(". .venv/bin/activate", "tensorboard --logdir runs/"),
    )
    assert [c for c in commands() if not c.startswith(known)] == []


@pytest.mark.slow
def test_the_quickstart_trains_a_good_teacher_and_reuses_what_is_there(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    steps = list((ROOT / "Makefile").read_text().split("quickstart: ")[1].split("\n\n")[0].splitlines()[1:])
    outputs = []
    for _ in range(2):
        text = ""
        for step in steps:
            words = shlex.split(step.replace("$(BIN)/", "").replace("$(RUNS)", "runs/quickstart"))
            words[1] = str(ROOT / words[1])
            words = [w.replace("--config=configs", f"--config={ROOT}/configs") for w in words]
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            text += done.stderr + done.stdout
        outputs.append(text)
    teacher = re.search(r"quickstart/teacher\s+groupnorm_resnet\s+-\s+\S+\s+(0\.\d+|1\.0+)", outputs[0])
    assert float(teacher[1]) >= 0.97
    assert outputs[1].count("is finished") == 3
