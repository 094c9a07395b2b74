"""TF_CONFIG in every form it comes in, and Slurm's variables, against clusters written down by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deit import cluster, errors

ROOT = Path(__file__).resolve().parents[1]


def tf_config(jobs, kind="worker", index=0, **more):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}, **more})}


def test_a_plain_cluster_is_read_as_it_stands():
    found = cluster.from_environment(tf_config({"worker": ["a:1", "b:2"]}, index=1))
    assert found == cluster.Cluster(("a:1", "b:2"), 1)
    assert (found.size, found.index, found.address) == (2, 1, "b:2")


KUBEFLOW = {"chief": ["deit-chief-0.ns.svc:2222"], "worker": ["deit-worker-0.ns.svc:2222", "deit-worker-1.ns.svc:2222"]}
KUBEFLOW_WORKERS = ("deit-chief-0.ns.svc:2222", "deit-worker-0.ns.svc:2222", "deit-worker-1.ns.svc:2222")


@pytest.mark.parametrize("chief", ["chief", "master"])
@pytest.mark.parametrize("kind, index, place", [("chief", 0, 0), ("worker", 0, 1), ("worker", 1, 2)])
def test_kubeflow_s_chief_becomes_worker_0_and_its_workers_follow(chief, kind, index, place):
    jobs = {chief: KUBEFLOW["chief"], "worker": KUBEFLOW["worker"]}
    kind = chief if kind == "chief" else kind
    found = cluster.from_environment(tf_config(jobs, kind, index, environment="cloud"))
    assert found == cluster.Cluster(KUBEFLOW_WORKERS, place)
    assert (found.index == 0) == (kind == chief)


def test_what_is_written_is_read_again_and_names_only_workers():
    found = cluster.from_environment(tf_config(KUBEFLOW, "chief", environment="cloud"))
    assert json.loads(found.tf_config()) == {
        "cluster": {"worker": list(KUBEFLOW_WORKERS)},
        "task": {"type": "worker", "index": 0},
    }
    assert cluster.from_environment({"TF_CONFIG": found.tf_config()}) == found


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TF_CONFIG": ""},
        {"TF_CONFIG": " \n"},
        {"TF_CONFIG": "{}"},
        tf_config({"worker": ["a:1"]}),
        tf_config({"chief": ["a:1"], "ps": []}, "chief"),
        {"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'},
    ],
)
def test_no_cluster_or_one_process_is_no_cluster(environment):
    assert cluster.from_environment(environment) is None


def test_the_local_rank_counts_earlier_workers_on_the_same_machine():
    workers = ("a:1", "b:1", "A:2", "a:3", "[::1]:1", "[::1]:2")
    assert [cluster.Cluster(workers, i).local_rank for i in range(6)] == [0, 0, 1, 2, 0, 1]


TWO = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"TF_CONFIG": "worker"}, ["(worker)", "must be JSON"]),
        ({"TF_CONFIG": '{"cluster": '}, ["must be JSON"]),
        ({"TF_CONFIG": "[1]"}, ["([1])", "JSON object"]),
        ({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}, ["cluster (null)"]),
        ({"TF_CONFIG": '{"cluster": ["a:1"]}'}, ['cluster (["a:1"])']),
        (tf_config({}), ["must have an address"]),
        (tf_config({"worker": []}), ["must have an address"]),
        (tf_config({"worker": "a:1"}), ["cluster.worker (a:1)", "list"]),
        (tf_config(TWO, index=2), ["task.index (2)", "0 to 1"]),
        (tf_config(TWO, index=-1), ["task.index (-1)", "0 to 1"]),
        (tf_config(TWO, index="0"), ["task.index (0)"]),
        (tf_config(TWO, index=True), ["task.index (true)"]),
        (tf_config(TWO, "chief"), ["task.type (chief)", "job type of the cluster"]),
        (tf_config(TWO, ["worker"]), ['task.type (["worker"])']),
        (tf_config(KUBEFLOW, "chief", 1), ["task.index (1)", "0 to 0"]),
        ({"TF_CONFIG": json.dumps({"cluster": TWO})}, ["task (null)", "type"]),
        ({"TF_CONFIG": json.dumps({"cluster": TWO, "task": {"index": 0}})}, ['task ({"index": 0})', "type"]),
        ({"TF_CONFIG": json.dumps({"cluster": TWO, "task": {"type": "worker"}})}, ["task.index (null)"]),
        (tf_config({"worker": ["a:1", "b"]}), ["address (b)", "host:port"]),
        (tf_config({"worker": ["a:1", "b:"]}), ["address (b:)"]),
        (tf_config({"worker": ["a:1", ":2"]}), ["address (:2)"]),
        (tf_config({"worker": ["a:1", "b:http"]}), ["address (b:http)", "1 to 65535"]),
        (tf_config({"worker": ["a:1", "b:0"]}), ["address (b:0)"]),
        (tf_config({"worker": ["a:1", "b:65536"]}), ["address (b:65536)"]),
        (tf_config({"worker": ["a:1", "grpc://b:2"]}), ["address (grpc://b:2)"]),
        (tf_config({"worker": ["a:1", "::1:2"]}), ["address (::1:2)"]),
        (tf_config({"worker": ["a:1", 2]}), ["address (2)"]),
        (tf_config({"worker": ["a:1", "b:2", "A:1"]}), ["(a:1, b:2, A:1)", "once"]),
        (tf_config({"chief": ["a:1"], "worker": ["a:1"]}), ["(a:1, a:1)", "once"]),
        (tf_config({"chief": ["a:1"], "master": ["b:1"], "worker": ["c:1"]}), ["2 chiefs", "one at most"]),
        (tf_config({"chief": ["a:1", "b:1"]}, "chief"), ["2 chiefs"]),
        (tf_config({**TWO, "ps": ["c:3"]}), ["job type (ps)", "chief or worker", "parameter servers"]),
        (tf_config({**TWO, "evaluator": ["c:3"]}), ["job type (evaluator)", "chief or worker"]),
        (tf_config(TWO, "evaluator"), ["job type (evaluator)"]),
        (tf_config({"ps": ["c:3"]}, "ps"), ["job type (ps)"]),
        (tf_config({**TWO, "gateway": ["c:3"]}), ["job type (gateway)"]),
    ],
)
def test_a_malformed_tf_config_is_one_line_with_value_and_rule(environment, words):
    with pytest.raises(errors.UserError) as caught:
        cluster.from_environment(environment)
    text = str(caught.value)
    assert text.startswith("TF_CONFIG") and "\n" not in text and " must " in text
    assert [word for word in words if word not in text] == []


def step(tasks, process, nodes, per_node, job=4_012_345, **more):
    """The variables of a task as srun sets them (Slurm 23); 4012345 modulo 312 is 25: ports from 11600 on."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_JOBID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
        "SLURM_NTASKS": str(tasks), "SLURM_NPROCS": str(tasks), "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": str(process), "SLURM_JOB_NODELIST": nodes, "SLURM_NODELIST": nodes,
        "SLURM_STEP_NODELIST": nodes, "SLURM_TASKS_PER_NODE": per_node, "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_DISTRIBUTION": "block", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    "tasks, nodes, per_node, expected",
    [
        (1, "gpu-a", "1", ["gpu-a:11600"]),
        (4, "gpu-a", "4", ["gpu-a:11600", "gpu-a:11601", "gpu-a:11602", "gpu-a:11603"]),
        (6, "n[7-9]", "2(x3)", ["n7:11600", "n7:11601", "n8:11600", "n8:11601", "n9:11600", "n9:11601"]),
        (5, "n[9-11]", "2(x2),1", ["n9:11600", "n9:11601", "n10:11600", "n10:11601", "n11:11600"]),
        (
            5,
            "node[01-03,07],gpu-a",
            "1(x5)",
            ["node01:11600", "node02:11600", "node03:11600", "node07:11600", "gpu-a:11600"],
        ),
        (3, "c[098-100]", "1(x3)", ["c098:11600", "c099:11600", "c100:11600"]),
        (
            4,
            "rack[1-2]-n[08-09]",
            "1(x4)",
            ["rack1-n08:11600", "rack1-n09:11600", "rack2-n08:11600", "rack2-n09:11600"],
        ),
        (3, "a,b[1-2]x", "1,1,1", ["a:11600", "b1x:11600", "b2x:11600"]),
        (2, "login.example.org,x_1", "1(x2)", ["login.example.org:11600", "x_1:11600"]),
    ],
)
def test_a_slurm_step_is_the_cluster_of_its_tasks_node_after_node(tasks, nodes, per_node, expected):
    for process in range(tasks):
        found = cluster.from_slurm(step(tasks, process, nodes, per_node))
        assert found == cluster.Cluster(tuple(expected), process)


def test_the_local_rank_in_a_step_is_slurm_s_local_id():
    places = [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("2", "0")]
    for process, (node, local) in enumerate(places):
        variables = step(5, process, "n[1-3]", "2(x2),1", SLURM_NODEID=node, SLURM_LOCALID=local)
        assert cluster.from_slurm(variables).local_rank == int(local)


def test_a_step_on_part_of_the_job_counts_and_not_the_job():
    variables = step(
        2, 1, "n[2-3]", "1(x2)", SLURM_JOB_NODELIST="n[1-4]", SLURM_TASKS_PER_NODE="2(x4)", SLURM_NTASKS="8"
    )
    assert cluster.from_slurm(variables).workers == ("n2:11600", "n3:11600")


def test_the_variables_of_the_job_serve_where_those_of_the_step_are_missing():
    variables = step(2, 1, "n[2-3]", "1(x2)")
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"):
        del variables[name]
    assert cluster.from_slurm(variables) == cluster.Cluster(("n2:11600", "n3:11600"), 1)


def test_a_given_port_replaces_the_one_of_the_job_id():
    assert cluster.from_slurm(step(3, 0, "a,b", "2,1"), port=5000).workers == ("a:5000", "a:5001", "b:5000")


@pytest.mark.parametrize("job, port", [(1, 10_064), (311, 29_904), (312, 10_000), (4_000_000_019, 27_600)])
def test_ports_stay_below_those_that_linux_hands_out(job, port):
    assert cluster.from_slurm(step(1, 0, "a", "1", job=job)).workers == (f"a:{port}",)


def test_neighbouring_jobs_on_one_node_share_no_port_up_to_64_tasks():
    ports = [
        [int(worker.removeprefix("a:")) for worker in cluster.from_slurm(step(64, 0, "a", "64", job=job)).workers]
        for job in (100, 101, 311)
    ]
    assert ports == [list(range(16_400, 16_464)), list(range(16_464, 16_528)), list(range(29_904, 29_968))]


def test_more_tasks_on_a_node_than_a_job_has_ports_need_a_port():
    variables = step(67, 0, "n[1-2]", "65,2")
    with pytest.raises(errors.UserError, match=r"SLURM_STEP_TASKS_PER_NODE \(65,2\) must be 64 .*--port"):
        cluster.from_slurm(variables)
    assert cluster.from_slurm(variables, port=20_000).workers[64:66] == ("n1:20064", "n2:20000")


def test_a_batch_script_and_a_machine_without_slurm_are_outside_a_step():
    batch = {name: value for name, value in step(4, 0, "n[1-2]", "2(x2)").items() if "STEP" not in name}
    assert cluster.from_slurm(batch) is None
    assert cluster.from_slurm({}) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"SLURM_STEP_NUM_TASKS": "5"}, ["SLURM_STEP_TASKS_PER_NODE (2(x2))", "SLURM_STEP_NUM_TASKS (5)", "not to 4"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, ["SLURM_STEP_TASKS_PER_NODE (2(x3))", "2 nodes", "(n[1-2])"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE (two)", "2(x3),1"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x999999)"}, ["SLURM_STEP_TASKS_PER_NODE (2(x999999))", "2 nodes"]),
        ({"SLURM_PROCID": "4"}, ["SLURM_PROCID (4)", "below SLURM_STEP_NUM_TASKS (4)"]),
        ({"SLURM_PROCID": "-1"}, ["SLURM_PROCID (-1)", "whole number"]),
        ({"SLURM_PROCID": ""}, ["SLURM_PROCID", "must be set"]),
        ({"SLURM_STEP_NUM_TASKS": "four"}, ["SLURM_STEP_NUM_TASKS (four)", "whole number"]),
        ({"SLURM_JOB_ID": "12_3"}, ["SLURM_JOB_ID (12_3)", "whole number"]),
        ({"SLURM_STEP_NODELIST": "n[1-2"}, ["SLURM_STEP_NODELIST (n[1-2)", "node list"]),
        ({"SLURM_STEP_NODELIST": "n1,,n2"}, ["SLURM_STEP_NODELIST (n1,,n2)", "node list"]),
        ({"SLURM_STEP_NODELIST": "n[1-2]" + "a" * 60 + "!"}, ["SLURM_STEP_NODELIST", "node list"]),
        ({"SLURM_STEP_NODELIST": "n[2-1]"}, ["SLURM_STEP_NODELIST (n[2-1])", "ascend"]),
        ({"SLURM_STEP_NODELIST": "n[1-99999999999]"}, ["SLURM_STEP_NODELIST (n[1-99999999999])", "65536"]),
        ({"SLURM_STEP_NODELIST": "n[1-60000]-[1-60000]"}, ["65537 nodes"]),
        ({"SLURM_STEP_NODELIST": "n1,n1"}, ["SLURM_STEP_NODELIST (n1,n1)", "once"]),
        ({"SLURM_DISTRIBUTION": "cyclic"}, ["SLURM_DISTRIBUTION (cyclic)", "block"]),
        ({"SLURM_DISTRIBUTION": "cyclic:block"}, ["SLURM_DISTRIBUTION (cyclic:block)", "block"]),
        ({"SLURM_DISTRIBUTION": "plane=2"}, ["SLURM_DISTRIBUTION (plane=2)", "block"]),
        ({"SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, ["SLURM_NODEID (1)", "must be 0 for task 1", "node after node"]),
        ({"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}, ["SLURM_LOCALID (0)", "must be 1 for task 1"]),
    ],
)  # fmt: skip
def test_slurm_variables_that_contradict_each_other_are_one_line_with_value_and_rule(change, words):
    with pytest.raises(errors.UserError) as caught:
        cluster.from_slurm({**step(4, 1, "n[1-2]", "2(x2)"), **change})
    text = str(caught.value)
    assert "\n" not in text and " must " in text
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("distribution", ["", "block", "block:cyclic", "block,NoPack", "*"])
def test_every_block_distribution_is_accepted(distribution):
    assert cluster.from_slurm(step(4, 1, "n[1-2]", "2(x2)", SLURM_DISTRIBUTION=distribution)).index == 1


def test_a_port_too_high_for_the_tasks_of_a_node_is_refused():
    assert cluster.from_slurm(step(2, 0, "a", "2"), port=65_534).workers == ("a:65534", "a:65535")
    with pytest.raises(errors.UserError, match=r"port \(65535\) must be 1 to 65534"):
        cluster.from_slurm(step(2, 0, "a", "2"), port=65_535)


def command(*arguments, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TF_CONFIG"))}
    return subprocess.run(
        [sys.executable, "-m", "deit.cluster", *arguments],
        cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_command_prints_one_line_of_json_for_the_task_it_runs_in():
    done = command("--print-tf-config", "--port=7000", **step(3, 2, "n[1-2]", "2,1"))
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    expected = {"cluster": {"worker": ["n1:7000", "n1:7001", "n2:7000"]}, "task": {"type": "worker", "index": 2}}
    assert json.loads(done.stdout) == expected


def test_the_command_prefers_tf_config_to_slurm():
    done = command("--print-tf-config", **step(3, 2, "n[1-2]", "2,1"), **tf_config(TWO, index=1))
    assert json.loads(done.stdout) == {"cluster": TWO, "task": {"type": "worker", "index": 1}}


@pytest.mark.parametrize(
    "arguments, variables, word",
    [
        (["--print-tf-config"], {}, "Slurm step"),
        (["--print-tf-config"], {"TF_CONFIG": "no"}, "JSON"),
        ([], {}, "--print-tf-config"),
        (["--print-tf-config", "--port=x"], {}, "--port"),
    ],
)
def test_the_command_answers_what_it_cannot_do_in_one_line_and_exits_with_1(arguments, variables, word):
    done = command(*arguments, **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ") and word in done.stderr


def test_the_module_needs_no_tensorflow():
    code = "import sys; import deit.cluster; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
