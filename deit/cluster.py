"""Which processes make up a run, from the environment: the one place that reads and writes TF_CONFIG.

    python -m deit.cluster --print-tf-config [--port=N]

prints the TF_CONFIG of this process as one line of JSON: TF_CONFIG's own where it is set, else that of the Slurm step.
Imports no TensorFlow.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping

from deit import errors

VARIABLE = "TF_CONFIG"

_CHIEFS = ("chief", "master")  # what TFJob calls worker 0 where it is a job of its own
_UNSUPPORTED = {
    "ps": "this code has no parameter servers",
    "evaluator": "the workers evaluate themselves",
}
_BASE_PORT, _BLOCKS, _BLOCK = 10_000, 312, 64  # 64 ports a job; below 32768 Linux hands out no ports of its own
_LARGEST = 65_536  # nodes, as many as Slurm takes in one bracket: a typing error is no reason to fill the memory


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of one run.

    Attributes: workers: "host:port" of each, the chief first; index: which of them this process is.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def size(self) -> int:
        """How many processes there are."""
        return len(self.workers)

    @property
    def address(self) -> str:
        """This process's own "host:port"."""
        return self.workers[self.index]

    @property
    def local_rank(self) -> int:
        """How many workers with a lower index have the same host: which device of its machine a process takes."""
        return sum(_host(worker) == _host(self.address) for worker in self.workers[: self.index])

    def tf_config(self) -> str:
        """Return the JSON that TensorFlow reads from TF_CONFIG, with every process a worker."""
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.workers)}, "task": task})


def up(size: int) -> str:
    """Return how a worker's log says that all are connected: a supervisor waits for it."""
    return f"cluster of {size} workers is up"


def from_environment(environment: Mapping[str, str]) -> Cluster | None:
    """Return the cluster of TF_CONFIG, None where that is unset or empty or names only one process.

    A job of type chief or master becomes worker 0, as Kubeflow means it. Errors: UserError for everything else that
    is not one chief at most, workers, and a task that is one of them.
    """
    text = environment.get(VARIABLE, "")
    if not text.strip():
        return None
    try:
        content = json.loads(text)
    except ValueError:
        raise errors.UserError(f"{VARIABLE} ({_short(text)}) must be JSON") from None
    if not isinstance(content, dict):
        raise errors.UserError(f"{VARIABLE} ({_short(text)}) must be a JSON object with cluster and task")
    if not content:
        return None
    jobs, task = content.get("cluster"), content.get("task")
    if not isinstance(jobs, dict):
        raise errors.UserError(f"{VARIABLE}: cluster ({_short(jobs)}) must be an object of lists of addresses")
    _check_types(jobs, task)
    chiefs = [(job, address) for job in _CHIEFS for address in _addresses(jobs, job)]
    if len(chiefs) > 1:
        raise errors.UserError(f"{VARIABLE}: cluster has {len(chiefs)} chiefs and must have one at most")
    order = [(job, 0) for job, _ in chiefs] + [("worker", i) for i in range(len(_addresses(jobs, "worker")))]
    workers = tuple([address for _, address in chiefs] + _addresses(jobs, "worker"))
    if not workers:
        raise errors.UserError(f"{VARIABLE}: cluster ({_short(jobs)}) must have an address of a worker")
    _check_addresses(workers)
    if len(workers) == 1:
        return None
    return Cluster(workers, _own_index(task, order))


def from_slurm(environment: Mapping[str, str], *, port: int = 0) -> Cluster | None:
    """Return the cluster of a Slurm step whose tasks fill node after node, None outside a step.

    A task listens on `port` plus its position among the tasks of its node. 0 = 10000 + 64 * (job id modulo 312): a
    restart listens where it did before, and jobs that share a node do not meet unless their ids are a multiple of 312
    apart. A batch script is outside a step: it is no task. Errors: UserError where the variables contradict each
    other, another distribution of the tasks was asked for, or a node has more than 64 tasks and no `port` is given.
    """
    if not any(environment.get(name) for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")):
        return None
    tasks_name, tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    process_name, index = _number(environment, "SLURM_PROCID")
    nodes_name, nodes_text = _variable(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    counts_name, counts_text = _variable(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    distribution = environment.get("SLURM_DISTRIBUTION", "")
    if re.split("[:,]", distribution)[0] not in ("", "*", "block"):
        raise errors.UserError(
            f"SLURM_DISTRIBUTION ({distribution}) must be block: tasks that fill node after node (srun -m block)"
        )
    if not 0 <= index < tasks:
        raise errors.UserError(f"{process_name} ({index}) must be 0 or more and below {tasks_name} ({tasks})")
    nodes = tuple(itertools.islice(_nodes(nodes_name, nodes_text), _LARGEST + 1))
    counts = tuple(itertools.islice(_counts(counts_name, counts_text), _LARGEST + 1))
    if len(nodes) != len(counts):
        raise errors.UserError(
            f"{counts_name} ({counts_text}) must have a number for each of the {len(nodes)} nodes of {nodes_name} "
            f"({nodes_text}), not {len(counts)}"
        )
    if sum(counts) != tasks:
        raise errors.UserError(
            f"{counts_name} ({counts_text}) must add up to {tasks_name} ({tasks}), not to {sum(counts)}"
        )
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    for name, expected in zip(("SLURM_NODEID", "SLURM_LOCALID"), places[index]):
        if environment.get(name) and _number(environment, name)[1] != expected:
            raise errors.UserError(
                f"{name} ({environment[name]}) must be {expected} for task {index} where tasks fill node after node "
                "(srun -m block)"
            )
    if not port and max(counts) > _BLOCK:
        raise errors.UserError(
            f"{counts_name} ({counts_text}) must be {_BLOCK} tasks a node at most, a port each, without --port"
        )
    base = port or _BASE_PORT + _number(environment, "SLURM_JOB_ID", "SLURM_JOBID")[1] % _BLOCKS * _BLOCK
    if not 0 < base <= 65_536 - max(counts):
        raise errors.UserError(f"port ({port}) must be 1 to {65_536 - max(counts)}: {max(counts)} tasks share a node")
    workers = tuple(f"{nodes[node]}:{base + local}" for node, local in places)
    _check_unique(nodes_name, nodes_text, workers)
    return Cluster(workers, index)


def _check_types(jobs: dict, task: object) -> None:
    """Refuse job types that no process of this code can be."""
    own = task.get("type") if isinstance(task, dict) else None
    for job in [*(job for job, addresses in jobs.items() if addresses), own]:
        if job in list(_UNSUPPORTED):  # compared, not hashed: the type may be anything
            raise errors.UserError(f"{VARIABLE}: job type ({job}) must be chief or worker: {_UNSUPPORTED[job]}")
    for job in jobs:
        if job not in (*_CHIEFS, *_UNSUPPORTED, "worker"):
            raise errors.UserError(f"{VARIABLE}: job type ({_short(job)}) must be chief or worker")


def _addresses(jobs: dict, job: str) -> list:
    found = jobs.get(job) or []
    if not isinstance(found, list):
        raise errors.UserError(f"{VARIABLE}: cluster.{job} ({_short(found)}) must be a list of host:port")
    return found


def _check_addresses(workers: tuple) -> None:
    for worker in workers:
        match = (
            re.fullmatch(r"([^\s:/@\[\]]+|\[[0-9A-Fa-f:.%]+\]):([0-9]{1,5})", worker)
            if isinstance(worker, str)
            else None
        )
        if match is None or not 1 <= int(match[2]) <= 65_535:
            raise errors.UserError(
                f"{VARIABLE}: address ({_short(worker)}) must be host:port with a port of 1 to 65535"
            )
    _check_unique(f"{VARIABLE}: cluster", ", ".join(workers), workers)


def _check_unique(name: str, value: str, workers: tuple[str, ...]) -> None:
    seen = set()
    for worker in workers:
        if worker.lower() in seen:
            raise errors.UserError(f"{name} ({_short(value)}) must have every address once; {worker} is there twice")
        seen.add(worker.lower())


def _own_index(task: object, order: list[tuple[str, int]]) -> int:
    """Return which of `order`'s (job type, index) the task is."""
    if not isinstance(task, dict) or not task.get("type"):
        raise errors.UserError(f"{VARIABLE}: task ({_short(task)}) must have a type, chief or worker, and an index")
    kind, index = task["type"], task.get("index")
    count = sum(job == kind for job, _ in order)
    if not count:
        raise errors.UserError(f"{VARIABLE}: task.type ({_short(kind)}) must be a job type of the cluster")
    if type(index) is not int or not 0 <= index < count:
        raise errors.UserError(
            f"{VARIABLE}: task.index ({_short(index)}) must be 0 to {count - 1}, a {kind} of the cluster"
        )
    return order.index((kind, index))


def _host(address: str) -> str:
    return address.rpartition(":")[0].lower()


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _variable(environment: Mapping[str, str], *names: str) -> tuple[str, str]:
    """Return (name, value) of the first variable that is set. Errors: UserError where none is."""
    for name in names:
        if environment.get(name, "").strip():
            return name, environment[name].strip()
    raise errors.UserError(f"{' or '.join(names)} must be set in a Slurm step")


def _number(environment: Mapping[str, str], *names: str) -> tuple[str, int]:
    name, text = _variable(environment, *names)
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise errors.UserError(f"{name} ({_short(text)}) must be a whole number")
    return name, int(text)


_BRACKET = r"\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\]"
_NODE = rf"(?:[A-Za-z0-9._-]|{_BRACKET})+"


def _nodes(name: str, text: str) -> Iterator[str]:
    """Yield the nodes of a list in Slurm's compressed form: rack[1-2]-n[08-11],gpu-a."""
    if not re.fullmatch(rf"{_NODE}(,{_NODE})*", text):
        raise errors.UserError(f"{name} ({_short(text)}) must be a node list as node[01-03,07],gpu-a")
    for node in re.findall(_NODE, text):
        pieces = re.split(rf"({_BRACKET})", node)
        choices = [list(_range(name, text, p[1:-1])) if p.startswith("[") else [p] for p in pieces]
        yield from map("".join, itertools.product(*choices))


def _range(name: str, text: str, inner: str) -> Iterator[str]:
    """Yield the numbers of one bracket, as wide as their first: 08-11 is 08 09 10 11."""
    for part in inner.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high < low + _LARGEST:
            raise errors.UserError(f"{name} ({_short(text)}) must have ranges that ascend, of {_LARGEST} at most")
        yield from (f"{number:0{len(first)}d}" for number in range(low, high + 1))


def _counts(name: str, text: str) -> Iterator[int]:
    """Yield the tasks of each node from 2(x3),1."""
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise errors.UserError(f"{name} ({_short(text)}) must be tasks of each node as 2(x3),1")
        yield from itertools.repeat(int(match[1]), int(match[2] or 1))


def _main(_) -> int:
    if not flags.FLAGS["print-tf-config"].value:
        raise errors.UserError("--print-tf-config must be given: there is nothing else to do")
    found = from_environment(os.environ) or from_slurm(os.environ, port=flags.FLAGS.port)
    if found is None:
        raise errors.UserError(f"{VARIABLE} must name several processes, or a Slurm step must be around (srun ...)")
    print(found.tf_config())
    return 0


if __name__ == "__main__":
    from absl import flags

    from deit import cli

    flags.DEFINE_boolean("print-tf-config", False, "Print this process's TF_CONFIG as one line of JSON.")
    flags.DEFINE_integer(
        "port", 0, "First port of the tasks of a Slurm node; 0 = from the job id.", lower_bound=0, upper_bound=65_535
    )
    cli.run(_main)
