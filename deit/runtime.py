"""What knows about devices and how a process starts and ends: strategy, precision, determinism, ports.

Promises: `prepare` is called once, before anything touches a device; the same command on the same machine and
layout computes the same bits. `strategy=auto` is one device, the first GPU or else the CPU, even where there are more,
unless TF_CONFIG names several workers. A process of several takes one device, that of its rank on its machine.
A process that waits in vain for the others to start, or loses one, ends by itself: SIGALRM, or exit code 3.
"""

import contextlib
import os
import platform
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf
from absl import logging

from deit import cluster, errors

_ONEDNN = ("TF_ENABLE_ONEDNN_OPTS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")
_PORT_PATIENCE = 30.0  # seconds a process waits for its port: one that was just killed may still hold it


_CLUSTER: list[cluster.Cluster] = []  # that this process belongs to, once it has begun to


def prepare(precision: str, *, logical_cpus: int = 1) -> None:
    """Set what TensorFlow reads only before its devices start: TF32, memory growth, determinism, logical CPUs."""
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    tf.config.experimental.enable_op_determinism()
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if logical_cpus > 1 and not tf.config.list_physical_devices("GPU"):
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * logical_cpus)


def logical_cpus(config) -> int:
    """Return into how many devices a configuration wants a CPU to be split: `devices` of strategy=mirrored."""
    return max(1, config.devices) if config.strategy == "mirrored" else 1


def make_strategy(config) -> tf.distribute.Strategy:
    """Return the strategy of a configuration; with several workers this waits until all of them are up.

    Errors: UserError where the machine has fewer devices than asked for, or TF_CONFIG does not fit.
    """
    workers = cluster.from_environment(os.environ)
    if config.strategy == "multi_worker" and workers is None:
        raise errors.UserError(
            "strategy ('multi_worker') needs TF_CONFIG with two workers or more: launch/local.py -n 2 -- ARGS sets it "
            "on one machine, the scripts in launch/ on several"
        )
    if config.strategy == "multi_worker" or (config.strategy == "auto" and workers is not None):
        return _multi_worker(workers, config.startup_seconds)
    if config.strategy == "tpu":
        return _tpu(config.tpu)
    kind, found = _devices()
    if config.strategy != "mirrored":
        return one_device()
    wanted = config.devices or len(found)
    if wanted > len(found):
        raise errors.UserError(f"devices ({wanted}) must be at most the {len(found)} {kind} devices found")
    return tf.distribute.MirroredStrategy([device.name for device in found[:wanted]])


def one_device() -> tf.distribute.Strategy:
    """Return the strategy of the first GPU, else of the CPU."""
    return tf.distribute.OneDeviceStrategy(_devices()[1][0].name)


def _devices() -> tuple[str, list]:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return kind, tf.config.list_logical_devices(kind)


def replicas(config) -> int:
    """Return on how many devices a configuration would run here, for a plan: it waits for no other worker."""
    workers = cluster.from_environment(os.environ)
    if config.strategy in ("auto", "multi_worker") and workers is not None:
        return workers.size
    return make_strategy(config).num_replicas_in_sync


def _multi_worker(workers: cluster.Cluster, startup_seconds: float) -> tf.distribute.Strategy:
    os.environ["TF_CONFIG"] = workers.tf_config()  # as TensorFlow wants it, whatever wrote it
    gpus = tf.config.list_physical_devices("GPU")
    if len(gpus) > 1:
        if workers.local_rank >= len(gpus):
            raise errors.UserError(
                f"TF_CONFIG has more workers on this machine than its {len(gpus)} GPUs: each takes one of its own"
            )
        tf.config.set_visible_devices(gpus[workers.local_rank], "GPU")
    _wait_for_port(workers.address)
    logging.info(
        "worker %d of %d, %s, waits for the others, at most %.0f s",
        workers.index, workers.size, workers.address, startup_seconds,
    )  # fmt: skip
    tf.get_logger().setLevel("WARNING")  # it tells devices and options in five lines
    _CLUSTER.append(workers)
    with _deadline(startup_seconds):
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    _keep_to_its_interface(workers.address)
    return strategy


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """End the process by SIGALRM where the block takes longer.

    TensorFlow waits in C++, with Python's lock held and SIGTERM swallowed (2.15.1): no thread and no handler of Python
    runs meanwhile, the default action of a signal does.
    """
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGINT, before[1])


def _wait_for_port(address: str) -> None:
    """Return once this process could listen there; TensorFlow would abort. Errors: UserError where it can't."""
    host, _, port = address.rpartition(":")
    until, told = time.monotonic() + _PORT_PATIENCE, False
    while True:
        try:
            with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))  # TensorFlow listens on every interface, whatever the address says
            return
        except OSError as error:
            if time.monotonic() > until:
                raise errors.UserError(f"TF_CONFIG: this worker's address ({address}): {error.strerror}") from error
            if not told:
                logging.warning("%s: %s; trying again for %.0f s", address, error.strerror, _PORT_PATIENCE)
            told = True
            time.sleep(0.5)


def _family(host: str) -> int:
    try:
        return socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror:  # a name that a cluster's DNS learns only once its process is there
        return socket.AF_INET


def _keep_to_its_interface(address: str) -> None:
    """Bind this process's server to the loopback interface where its address is there; else warn who may reach it.

    TensorFlow 2.15 listens on every interface, whatever TF_CONFIG says, and runs any graph that it is sent: until the
    cluster is up the port is open.
    """
    host, _, port = address.rpartition(":")
    if host.strip("[]") not in ("localhost", "::1") and not host.startswith("127."):
        logging.warning("port %s runs code for whoever reaches it, on every interface: use a private network", port)
        return
    bound = 0
    for name in os.listdir("/proc/self/fd") if hasattr(socket, "SO_BINDTODEVICE") else ():
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and each.getsockname()[1] == int(port):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                    bound += 1
    if not bound:
        logging.warning("port %s can't be kept to the loopback interface: whoever reaches it can run code here", port)


def _tpu(name: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except (ValueError, OSError, RuntimeError, tf.errors.OpError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise errors.UserError(f"strategy ('tpu'): no TPU found as tpu ({name!r}): {line}") from error
    if strategy.extended.num_hosts > 1:
        raise errors.UserError(f"tpu ({name!r}) has {strategy.extended.num_hosts} hosts: only one host is supported")
    return strategy


def in_cluster() -> bool:
    """Return whether this process is one of several workers, or is about to be."""
    return bool(_CLUSTER)


def lock_patience() -> float:
    """Return the seconds to wait for a workdir: in a cluster a dead chief's lock may outlive it on a network disk."""
    return 120.0 if _CLUSTER else 0.0


def leave(code: int) -> None:
    """End the process with an exit code; one of several at once, its log flushed.

    The orderly end of a runtime whose peers are gone waits for them or aborts in C++ (TensorFlow 2.15).
    """
    if not _CLUSTER:
        sys.exit(code)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """Return the models of the devices that a run computes on: equal ones give equal bits.

    A GPU comes with the CPU beside it, which decodes and augments. Of a CPU the number of cores belongs to it, which
    decides how sums are cut where oneDNN is off, and so do the variables that switch oneDNN.
    """
    kind = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type
    if kind == "TPU":
        return f"TPU of {strategy.num_replicas_in_sync} cores, {_cpu()}"
    if kind != "GPU":
        switches = [f"{name}={os.environ[name]}" for name in _ONEDNN if name in os.environ]
        return ", ".join([_cpu(), f"{len(os.sched_getaffinity(0))} cores", *switches])
    gpu = tf.config.list_physical_devices("GPU")[0]
    return f"{tf.config.experimental.get_device_details(gpu).get('device_name', 'GPU')}, {_cpu()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.processor() or platform.machine()}"
