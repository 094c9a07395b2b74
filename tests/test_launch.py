"""The files in launch/: valid for those who read them, and what the Slurm script decides, with stand-ins for Slurm."""

import copy
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow.training import api_client, models

import deit
from configs import base
from deit import config as configuration
from deit import rules

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SHELL = ["slurm.sbatch", "gcp_tpu.sh"]
COMMENTED = [*SHELL, "kubernetes.yaml", "Dockerfile"]
LABELS = ["Needs:", "Starts:", "Resume:", "Watch:", "Stop:"]


def text(name):
    return (LAUNCH / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMENTED)
def test_a_header_says_in_five_lines_what_it_needs_starts_and_how_to_resume_watch_and_stop(name):
    lines = [line for line in text(name).splitlines() if not line.startswith("#!")]
    header = lines[: lines.index("")]
    assert [line.split()[1] for line in header] == LABELS
    assert all(line.startswith("# ") and len(line) <= 120 for line in header)


@pytest.mark.parametrize("name", SHELL)
def test_a_script_is_correct_bash(name):
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


FORBIDDEN = re.compile(
    r"bind_all|0\.0\.0\.0|privileged|hostPath|hostNetwork|hostPID|hostIPC|runAsUser: 0\b", re.IGNORECASE
)


@pytest.mark.parametrize(
    "line", ["tensorboard --bind_all", "privileged: true", "  hostPath: {path: /}", "--host 0.0.0.0"]
)
def test_the_search_for_open_doors_finds(line):
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize(
    "path", sorted(path for path in LAUNCH.iterdir() if path.is_file()), ids=lambda path: path.name
)
def test_nothing_listens_to_the_world_or_takes_rights_of_the_machine(path):
    assert FORBIDDEN.findall(path.read_text(encoding="utf-8")) == []


FIELDS = {name for name, _ in configuration.flatten(base.get_config())}
PLACEHOLDERS = {"configs/FILE.py"}


@pytest.mark.parametrize("name", COMMENTED)
def test_every_flag_and_file_that_is_named_exists(name):
    content = text(name)
    assert set(re.findall(r"--config\.([\w.]+)=", content)) - FIELDS == set()
    files = set(re.findall(r"--config=([\w./]+)", content)) - PLACEHOLDERS - {"..."}
    assert [file for file in files if not (ROOT / file).is_file()] == []
    for module in re.findall(r"-m (deit[\w.]*)", content):
        assert importlib.util.find_spec(module)


# --- kubernetes.yaml


@pytest.fixture
def documents():
    """The documents of kubernetes.yaml by kind."""
    found = list(yaml.safe_load_all(text("kubernetes.yaml")))
    assert len({document["kind"] for document in found}) == len(found)
    return {document["kind"]: document for document in found}


OLDEST = "1.31"  # where podFailurePolicy became stable


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "NetworkPolicy", "Job"])
def test_an_object_of_kubernetes_is_valid_in_its_schema(documents, kind, version):
    kubernetes_validate.validate(documents[kind], version, strict=True)


class Answer:
    """What the client takes for an answer of a cluster."""

    def __init__(self, content):
        self.data = json.dumps(content)


def tfjob_errors(document):
    """Return what Kubeflow's own models say against a TFJob; its pods are held against the schema of Kubernetes."""
    found = list(unknown_fields(document, "KubeflowOrgV1TFJob"))
    try:
        api_client.ApiClient().deserialize(Answer(document), "KubeflowOrgV1TFJob")
    except (ValueError, TypeError) as error:
        found.append(str(error))
    for replica in document["spec"]["tfReplicaSpecs"].values():
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": replica["template"]}
        try:
            kubernetes_validate.validate(pods, OLDEST, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(error.message)
    return found


def unknown_fields(value, kind, path=""):
    """Yield fields that a model does not have (its client drops them) and values of another type; pods apart."""
    if kind == "V1PodTemplateSpec":
        return
    many = re.fullmatch(r"(list\[|dict\(str, )(\w+)[\])]", kind)
    if not isinstance(value, _types(kind)):
        yield f"{path} is no {kind}"
    elif many:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unknown_fields(part, many[2], f"{path}.{key}")
    elif hasattr(models, kind):
        model = getattr(models, kind)
        types = {model.attribute_map[name]: inner for name, inner in model.openapi_types.items()}
        for key, part in value.items():
            if key in types:
                yield from unknown_fields(part, types[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"


def _types(kind):
    """Return the types of Python that a value may have in YAML."""
    if kind.startswith("list["):
        return list
    if kind.startswith("dict(") or hasattr(models, kind):
        return dict
    return {"int": int, "bool": bool, "str": str}.get(kind, object)


def test_the_tfjob_is_valid_in_kubeflow_s_models(documents):
    assert tfjob_errors(documents["TFJob"]) == []
    policy, worker = documents["TFJob"]["spec"]["runPolicy"], documents["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]
    # The models take any text here; these are the values of the operator's API reference.
    assert policy["cleanPodPolicy"] in ("All", "Running", "None")
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert documents["TFJob"]["spec"]["successPolicy"] in ("", "AllWorkers")
    assert set(documents["TFJob"]["spec"]["tfReplicaSpecs"]) <= {"Chief", "Worker"}


def broken(document, path, value):
    copied = copy.deepcopy(document)
    *parents, last = path
    inner = copied
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return copied


WORKER = ["spec", "tfReplicaSpecs", "Worker"]


@pytest.mark.parametrize(
    "path, value",
    [
        (["spec", "cleanPodPolicy"], "Running"),
        (["spec", "runPolicy", "backofLimit"], 3),
        (["spec", "runPolicy", "backoffLimit"], "three"),
        ([*WORKER, "replicas"], "two"),
        ([*WORKER, "template", "spec", "hostNetworking"], True),
        ([*WORKER, "template", "spec", "containers", 0, "ports"], 2222),
        (["spec", "tfReplicaSpecs"], {}),
    ],
)
def test_the_check_of_a_tfjob_finds(documents, path, value):
    document = broken(documents["TFJob"], path, value)
    if value == {}:
        del document["spec"]["tfReplicaSpecs"]
        document["spec"]["tfReplicaSpecs"] = {"Worker": {"replica": 2, "template": {"spec": {"containers": []}}}}
    assert tfjob_errors(document)


@pytest.mark.parametrize(
    "kind, path, value",
    [
        ("Job", ["spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"], "1"),
        ("Job", ["spec", "template", "spec", "containers", 0, "image"], 3),
        ("PersistentVolumeClaim", ["spec", "accessMode"], ["ReadWriteMany"]),
    ],
)
def test_the_check_of_an_object_of_kubernetes_finds(documents, kind, path, value):
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken(documents[kind], path, value), OLDEST, strict=True)


def pod_specs(documents):
    return {
        "TFJob": documents["TFJob"]["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"],
        "Job": documents["Job"]["spec"]["template"]["spec"],
    }


@pytest.mark.parametrize("kind, name", [("TFJob", "tensorflow"), ("Job", "deit")])
def test_a_pod_has_one_gpu_runs_and_no_rights(documents, kind, name):
    pod = pod_specs(documents)[kind]
    (container,) = pod["containers"]
    assert container["name"] == name
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["terminationGracePeriodSeconds"] == 180
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
    assert not any(variable["name"] == "TF_CONFIG" for variable in container.get("env", []))


@pytest.mark.parametrize("kind", ["TFJob", "Job"])
def test_the_arguments_of_a_pod_are_a_configuration(documents, kind):
    (container,) = pod_specs(documents)[kind]["containers"]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    path, _, variant = given.pop("config").partition(":")
    assert given.pop("workdir").startswith("/runs/")
    config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(variant)
    config.update_from_flattened_dict({name.removeprefix("config."): value for name, value in given.items()})
    rules.validate(config)
    assert config.data.data_dir.startswith("/runs/")


def test_the_image_is_the_one_that_the_dockerfile_makes_and_of_this_version(documents):
    (made,) = re.findall(r"build .* -t (\S+)", text("Dockerfile").partition("\n\n")[0])
    assert made == f"deit:{deit.__version__}"
    assert {pod["containers"][0]["image"] for pod in pod_specs(documents).values()} == {made}


def test_the_user_of_the_image_is_the_user_of_the_pods(documents):
    (user,) = re.findall(r"^USER (\d+):\d+$", text("Dockerfile"), re.MULTILINE)
    assert {pod["securityContext"]["runAsUser"] for pod in pod_specs(documents).values()} == {int(user)}
    assert re.search(rf"useradd --uid {user} ", text("Dockerfile"))


def test_the_image_starts_main_py_with_the_tested_versions():
    content = text("Dockerfile")
    assert 'ENTRYPOINT ["python", "main.py"]' in content and "FROM python:3.11-slim" in content
    assert content.count("pip install --constraint constraints.txt") == 2
    before = content.partition("pip install")[0]
    assert "LICENSE" in before and "LICENSE" in (ROOT / "setup.py").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.+) \S+$", content, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())


def program(path, script):
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


CODES = [("TFJob", 3, 131), ("TFJob", 42, 170), ("Job", 3, 3), ("Job", 42, 42)]  # a Job has rules for the codes
CODES += [(kind, code, code) for kind in ("TFJob", "Job") for code in (0, 1, 4, 137)]


@pytest.mark.parametrize("kind, code, seen", CODES)
def test_a_worker_s_pod_ends_with_128_or_more_only_where_a_restart_helps(documents, tmp_path, kind, code, seen):
    (container,) = pod_specs(documents)[kind]["containers"]
    program(tmp_path / "python", f'echo "$@"; exit {code}')
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (seen, ["main.py", *container["args"]])


@pytest.mark.parametrize(
    "kind, trap, seen",
    [("TFJob", 'trap "echo saved; exit 42" TERM', (170, "saved\n")), ("TFJob", ":", (143, "")),
     ("Job", 'trap "echo saved; exit 42" TERM', (42, "saved\n")), ("Job", ":", (143, ""))],
)  # fmt: skip
def test_a_pod_passes_the_request_to_stop_on_and_waits_for_the_save(documents, tmp_path, kind, trap, seen):
    (container,) = pod_specs(documents)[kind]["containers"]
    program(tmp_path / "python", f"{trap}; kill -TERM $PPID; for ((i = 0; i < 3000000; i++)); do :; done")
    done = subprocess.run(
        container["command"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == seen


# --- slurm.sbatch


def options():
    """Return the #SBATCH lines, as {option: value}."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text("slurm.sbatch"), re.MULTILINE)
    return dict(lines)


def test_the_job_asks_for_a_signal_to_its_steps_a_requeue_and_one_log():
    found = options()
    assert found["signal"] == "TERM@120" and found["output"] == "slurm-%j.log" and found["open-mode"] == "append"
    assert {"nodes", "ntasks-per-node", "cpus-per-task", "requeue"} <= set(found)
    body = text("slurm.sbatch")
    first_command = body.index("\nset -")
    assert body.rindex("#SBATCH") < first_command, "Slurm reads no option behind the first command"


class Slurm:
    """A submit directory with stand-ins: srun runs the tasks one by one, scontrol writes down what it is told."""

    def __init__(self, folder):
        self.folder, self.workdir = folder, folder / "runs" / "x"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "main.py").touch()
        program(
            self.bin / "srun",
            """trap : TERM
            echo "srun $*" >>calls
            [ -z "$SRUN_FAILS" ] || exit "$SRUN_FAILS"
            while [ "$1" != bash ]; do shift; done
            worst=0 index=0
            for code in $CODES; do
                SLURM_PROCID=$index CODE=$code "$@"
                own=$?
                [ "$own" -le "$worst" ] || worst=$own
                index=$((index + 1))
            done
            exit "$worst" """,
        )
        program(
            self.bin / "scontrol",
            """echo "scontrol $*" >>calls
            [ "$1" != show ] || printf 'JobId=7 JobName=deit\\n   JobState=%s Reason=None Dependency=(null)\\n' "$STATE"
            [ "$1" != requeue ] || exit "${REQUEUE_FAILS:-0}" """,
        )
        program(
            self.bin / "python",
            """if [ "$1 $2" = "-m deit.cluster" ]; then
                [ "$CODE" != config ] || { echo "error: SLURM_NTASKS" >&2; exit 1; }
                echo "config of $SLURM_PROCID"
                exit
            fi
            printf '%s|' "$TF_CONFIG" "$@" >>"tasks"
            [ -z "$STEP" ] || mkdir -p "runs/x/checkpoints/step-$STEP"
            [ "$CODE" != shell ] || kill -KILL $PPID
            [ "$CODE" != group ] || { trap 'exit 42' TERM; kill -TERM 0; for ((i = 0; i < 3000000; i++)); do :; done; }
            [ "$CODE" != KILL ] || kill -KILL $$
            exit "$CODE" """,
        )

    def run(self, codes, *arguments, restart=0, **variables):
        """Run the job with tasks that end with `codes`; return (exit code, whether it was requeued)."""
        (self.folder / "calls").unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": str(self.bin / "python"), "CODES": codes,
            "STATE": "RUNNING", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(self.folder), "SLURM_CPUS_PER_TASK": "8",
            "TF_CONFIG": "left over", **({"SLURM_RESTART_COUNT": str(restart)} if restart else {}), **variables,
        }  # fmt: skip
        self.done = subprocess.run(
            ["bash", str(LAUNCH / "slurm.sbatch"), *(arguments or ["--config=a b", "--workdir=runs/x"])],
            cwd="/", env=environment, capture_output=True, text=True, timeout=60, start_new_session=True,
        )  # fmt: skip
        return self.done.returncode, "scontrol requeue 7" in self.calls()

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.parametrize("codes", ["0", "0 0", "0 0 0 0"])
def test_a_job_whose_tasks_are_done_is_done(slurm, codes):
    assert slurm.run(codes) == (0, False)


@pytest.mark.parametrize(
    "codes", ["42", "42 42", "42 3", "3 42 42", "3 3", "0 3", "42 KILL", "3 143", "shell 3", "134", "0 42"]
)
def test_a_job_that_was_preempted_or_lost_a_worker_is_requeued(slurm, codes):
    assert slurm.run(codes) == (0, True), slurm.done.stderr


@pytest.mark.parametrize(
    "codes, seen",
    [("1", 1), ("1 3 3", 1), ("3 3 1", 1), ("42 1", 1), ("4 4", 4), ("3 4", 4), ("KILL 4", 4), ("2", 2), ("42 2 3", 2),
     ("config 3", 1), ("3 127", 127), ("143 1", 1)],
)  # fmt: skip
def test_an_error_or_a_divergence_of_any_task_ends_the_job_with_its_code(slurm, codes, seen):
    assert slurm.run(codes) == (seen, False), slurm.done.stderr


@pytest.mark.parametrize("code, expected", [(1, (1, False)), (137, (0, True))])
def test_where_no_task_was_started_the_code_of_srun_decides(slurm, code, expected):
    assert slurm.run("0", SRUN_FAILS=str(code)) == expected


def test_a_signal_to_everything_leaves_the_script_waiting_until_the_workers_have_saved(slurm):
    assert slurm.run("group") == (0, True), slurm.done.stderr
    assert "waiting for the workers" in slurm.done.stderr and "task-0:42" in slurm.done.stderr


def test_each_task_gets_its_own_tf_config_and_the_arguments_as_they_were(slurm):
    slurm.run("0 0")
    expected = [f"config of {i}|main.py|--config=a b|--workdir=runs/x|" for i in range(2)]
    assert (slurm.folder / "tasks").read_text() == "".join(expected)
    (call, *_) = slurm.calls()
    assert call.startswith("srun --kill-on-bad-exit=0 ") and "--distribution=block" in call


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", "PENDING"])
def test_a_job_that_slurm_is_ending_is_not_brought_back(slurm, state):
    assert slurm.run("42 42", STATE=state) == (42, False)


def test_a_requeue_that_slurm_refuses_ends_the_job_with_the_code(slurm):
    assert slurm.run("42", REQUEUE_FAILS="1") == (42, True)


def test_three_starts_in_a_row_without_a_new_checkpoint_are_the_last(slurm):
    assert [slurm.run("3 3", restart=i) for i in range(3)] == [(0, True), (0, True), (3, False)]
    assert "giving up" in slurm.done.stderr
    assert slurm.run("3 3") == (0, True), "a new submission counts from the beginning"


def test_a_new_checkpoint_starts_the_count_anew(slurm):
    assert slurm.run("3", restart=1) == (0, True)
    assert slurm.run("3", restart=2, STEP="00000005") == (0, True)
    assert slurm.run("3", restart=3) == (0, True)
    assert slurm.run("3", restart=4, STEP="00000004") == (0, True), "an older one is no progress"
    assert slurm.run("3", restart=5) == (3, False)


def test_a_checkpoint_of_the_teacher_is_progress_too(slurm):
    checkpoints = slurm.workdir / "teacher" / "checkpoints"
    for restart in range(1, 6):
        (checkpoints / "tmp-00000009").mkdir(parents=True, exist_ok=True)
        assert slurm.run("3", restart=restart, STEP=f"{restart:08d}/../../../teacher/checkpoints/step-{restart:08d}")[1]


@pytest.mark.parametrize(
    "arguments, variables, word",
    [
        (["--config=a"], {}, "--workdir must"),
        (["--workdir=runs/x", "--workdir="], {}, "--workdir must"),
        (["--workdir=runs/x"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID"),
        (["--workdir=runs/x"], {"SLURM_SUBMIT_DIR": "/"}, "no main.py"),
    ],
)
def test_a_job_that_cannot_start_says_so_in_one_line(slurm, arguments, variables, word):
    assert slurm.run("0", *arguments, **variables) == (1, False)
    assert slurm.done.stderr.startswith("error: ") and slurm.done.stderr.count("\n") == 1 and word in slurm.done.stderr
    assert slurm.calls() == []


@pytest.mark.parametrize("arguments", [["--workdir", "runs/x"], ["-workdir=runs/y", "-workdir=runs/x"]])
def test_the_workdir_is_found_in_every_way_to_write_it(slurm, arguments):
    assert slurm.run("42", *arguments) == (0, True)
    assert (slurm.workdir / "slurm" / "7-0" / "task-0").read_text() == "42\n"


def test_with_the_real_module_two_tasks_get_one_cluster_and_a_single_task_none(slurm):
    (slurm.folder / "main.py").write_text("import os, deit.cluster as c; print(c.from_environment(os.environ))")
    step = {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[08-09]",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }  # fmt: skip
    assert slurm.run("0 0", **step) == (0, False), slurm.done.stderr
    workers = "workers=('n08:10448', 'n09:10448')"
    assert slurm.done.stdout.splitlines() == [f"Cluster({workers}, index={i})" for i in range(2)]
    alone = {"SLURM_STEP_NODELIST": "n08", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert slurm.run("0", **{**step, **alone}) == (0, False), slurm.done.stderr
    assert slurm.done.stdout == "None\n"


# --- gcp_tpu.sh


def test_the_script_for_a_tpu_says_what_is_missing_in_one_line():
    for arguments in ([], ["name", "zone"], ["name", "zone", "--config=a"]):
        done = subprocess.run(["bash", LAUNCH / "gcp_tpu.sh", *arguments], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith("error: ")


def test_the_script_for_a_tpu_is_marked_as_never_run_and_stops_at_the_first_error():
    assert "Never run" in text("gcp_tpu.sh").partition("\n\n")[0]
    assert "\nset -euo pipefail\n" in text("gcp_tpu.sh")


class Tpu:
    """A repository with gcp_tpu.sh, and a VM that is a directory: gcloud runs there what it is told."""

    def __init__(self, folder):
        self.here, self.vm, self.bin = folder / "here", folder / "vm", folder / "bin"
        for directory in (self.here / "launch", self.vm, self.bin):
            directory.mkdir(parents=True)
        (self.here / "launch" / "gcp_tpu.sh").write_text(text("gcp_tpu.sh"))
        program(
            self.bin / "gcloud",
            """shift 3
            case $1 in
                describe) cat "$HOME/../state" ;;
                create) echo READY >"$HOME/../state" ;;
                ssh)
                    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
                    case $command in *"$BROKEN"*) [ -z "$BROKEN" ] || exit "$BREAKS" ;; esac
                    cd && bash -c "$command"
                    ;;
                scp) case $2 in *:*) cp "$HOME/${2#*:}" "$3" ;; *) cp "$2" "$HOME/${3#*:}" ;; esac ;;
            esac""",
        )
        program(self.bin / "git", 'touch main.py && tar -czf "${3#--output=}" main.py')
        program(self.bin / "sudo", "")
        packages = f"mkdir -p .venv/bin; cp {self.bin}/main .venv/bin/python; cp {self.bin}/sudo .venv/bin/pip"
        program(self.bin / "python3", packages)
        program(self.bin / "sleep", "exec /bin/sleep 0.05")
        program(
            self.bin / "pgrep",
            """found=1
            for id in $(/usr/bin/env -u PATH /usr/bin/pgrep "$@"); do
                [ "$(readlink "/proc/$id/cwd")" != "$HOME/deit" ] || found=0
            done
            exit "$found" """,
        )
        self.main("mkdir -p runs/x")

    def main(self, script):
        """Let main.py do this."""
        program(self.bin / "main", f'echo "$@" >>tasks\n{script}')

    def checkpoints(self, where, *steps):
        for step in steps:
            (where / "runs" / "x" / "checkpoints" / step).mkdir(parents=True)

    def found(self, where):
        return sorted(path.name for path in (where / "runs" / "x" / "checkpoints").iterdir())

    def start(self, *arguments, broken="", breaks=255):
        """Start the script; the command that contains `broken` ends with the code `breaks`, without running."""
        return subprocess.Popen(
            ["bash", "launch/gcp_tpu.sh", "name", "zone", *(arguments or ["--config=a b", "--workdir=runs/x"])],
            cwd=self.here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.vm), "BROKEN": broken,
                 "BREAKS": str(breaks)},
        )  # fmt: skip

    def run(self, *arguments, **broken):
        """Return the exit code of the script."""
        process = self.start(*arguments, **broken)
        self.said, _ = process.communicate(timeout=60)
        return process.returncode


@pytest.fixture
def tpu(tmp_path):
    return Tpu(tmp_path)


def test_a_run_on_a_new_vm_goes_on_from_the_copy_and_comes_back_without_what_it_removed(tpu):
    tpu.checkpoints(tpu.here, "step-00000001")
    tpu.main(
        """[ -d runs/x/checkpoints/step-00000001 ] || exit 0
        mkdir runs/x/checkpoints/step-00000002 runs/x/checkpoints/tmp-3 && rmdir runs/x/checkpoints/step-00000001
        exit 42"""
    )
    assert tpu.run("--config=a b", "--workdir=runs/x/") == 0, tpu.said
    assert (
        tpu.vm / "deit" / "tasks"
    ).read_text() == "main.py --config=a b --workdir=runs/x/ --config.strategy=tpu\n" * 2
    assert tpu.found(tpu.here) == ["step-00000002"]
    assert [path.name for path in (tpu.here / "runs").iterdir()] == ["x"]


def test_a_run_that_ends_before_it_has_a_directory_ends_the_script_with_its_code(tpu):
    tpu.main("exit 1")
    assert tpu.run() == 1
    assert "not fetched" in tpu.said


def test_a_run_on_the_vm_is_not_replaced_by_an_older_copy(tpu):
    tpu.checkpoints(tpu.here, "step-00000001")
    tpu.checkpoints(tpu.vm / "deit", "step-00000005")
    assert tpu.run() == 0, tpu.said
    assert tpu.found(tpu.here) == tpu.found(tpu.vm / "deit") == ["step-00000005"]


@pytest.mark.parametrize("breaks", [1, 255])
@pytest.mark.parametrize("broken", ["test -d deit/runs/x", "pgrep"])
def test_a_vm_that_does_not_answer_is_no_vm_without_the_run(tpu, broken, breaks):
    tpu.checkpoints(tpu.here, "step-00000001")
    tpu.checkpoints(tpu.vm / "deit", "step-00000005")
    assert tpu.run(broken=broken, breaks=breaks) == breaks
    assert tpu.found(tpu.vm / "deit") == ["step-00000005"] and tpu.found(tpu.here) == ["step-00000001"]
    assert not (tpu.vm / "deit" / "tasks").exists()


def test_a_run_under_way_is_joined_whatever_its_first_flag_is(tpu):
    tpu.main("mkdir -p runs/x; while [ ! -f go ]; do sleep 1; done")
    scripts = [tpu.start("--workdir=runs/x", "--config=a")]
    try:
        wait_for(tpu.vm / "deit" / "tasks")
        scripts.append(tpu.start("--workdir=runs/x", "--config=a"))
        assert scripts[1].stdout.readline() == "already running\n"
    finally:
        (tpu.vm / "deit" / "go").touch()
        said = [script.communicate(timeout=30)[0] for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    assert (tpu.vm / "deit" / "tasks").read_text().count("main.py") == 1


def wait_for(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.05)
