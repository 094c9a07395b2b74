"""What a run gives away: nothing of its environment in its files, no port to others, no file to others."""

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import workers

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds after which a run fails rather than waits on
SECRET = "hunter2-4f1c9b7e"
HOST = "host-of-somebody"
UMASKS = {"022": 0o022, "077": 0o077}

needs_proc = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="sockets are read from Linux's /proc")


def processes(pid: int) -> set[int]:
    """Return a process and all below it."""
    found, waiting = set(), [pid]
    while waiting:
        found.add(each := waiting.pop())
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting.extend(map(int, (task / "children").read_text().split()))
    return found


def listening(pid: int) -> set[tuple[str, int]]:
    """Return (address as the kernel writes it, port) of every TCP socket that a process or one below it listens on."""
    found = set()
    for each in processes(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            inodes = set()
            for handle in os.listdir(f"/proc/{each}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    inodes.add(os.readlink(f"/proc/{each}/fd/{handle}"))
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{each}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                        address, port = fields[1].split(":")
                        found.add((address, int(port, 16)))
    return found


def is_loopback(address: str) -> bool:
    """Tell whether a kernel's address is 127.x.x.x, ::1 or the former as IPv6; words of 4 bytes, the lowest first."""
    if address == "00000000000000000000000001000000":
        return True
    head, last = address[:-8], address[-8:]
    return head in ("", "0000000000000000FFFF0000") and last.endswith("7F")


@needs_proc
def test_listening_sockets_are_found_and_told_apart():
    with socket.create_server(("127.0.0.1", 0)) as inner, socket.create_server(("", 0)) as outer:
        found = {port: address for address, port in listening(os.getpid())}
        assert is_loopback(found[inner.getsockname()[1]])
        assert not is_loopback(found[outer.getsockname()[1]])
    assert {inner_port for _, inner_port in listening(os.getpid())}.isdisjoint(found)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("0100007F", True),
        ("0200007F", True),
        ("00000000", False),
        ("0A00A8C0", False),  # 192.168.0.10
        ("00000000000000000000000001000000", True),
        ("00000000000000000000000000000000", False),
        ("0000000000000000FFFF00000100007F", True),
        ("0000000000000000FFFF00000A00A8C0", False),
        ("0000000000000000000000000100007F", False),
    ],
)
def test_an_address_is_loopback_or_not(address, loopback):
    assert is_loopback(address) is loopback


def renamed() -> list[str]:
    """Return what to put before a command so that the machine is called HOST for it; [] where that is not allowed."""
    command = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', HOST]
    with contextlib.suppress(OSError):  # there is no such program
        done = subprocess.run([*command, "hostname"], capture_output=True, text=True, timeout=60)
        if done.stdout.strip() == HOST:
            return command
    return []


def host() -> str:
    """Return what a run takes for the machine's name; "" for a name so short that bytes spell it by chance."""
    name = HOST if renamed() else socket.gethostname()
    return name if len(name) >= 6 else ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One update under each umask, both at once: umask -> (run directory, home, the sockets that it listened on)."""
    root = tmp_path_factory.mktemp("exposure")
    started = {}
    try:
        for name, mask in UMASKS.items():
            home = root / f"home-{name}-of-somebody"
            home.mkdir()
            variables = {"SECRET_TOKEN": SECRET, "HOME": str(home), "USER": "somebody-else", "HOSTNAME": HOST}
            with open(root / f"log-{name}", "w") as log:
                started[name] = subprocess.Popen(
                    [
                        *renamed(),
                        sys.executable,
                        str(ROOT / "main.py"),
                        f"--config={ROOT / 'configs'}/quickstart.py:scratch",
                        "--config.total_updates=1",
                        f"--workdir=runs/{name}",
                    ],
                    cwd=root, env={**os.environ, "PYTHONPATH": "", **variables}, umask=mask,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                )  # fmt: skip
        sockets, looks = {name: set() for name in UMASKS}, 0
        while any(process.poll() is None for process in started.values()) and looks < PATIENCE * 10:
            for name, process in started.items():
                sockets[name] |= listening(process.pid)
            looks += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(p for p in started.values() if p.returncode is None).wait(timeout=0.1)
        for name, process in started.items():
            assert process.wait(timeout=PATIENCE) == 0, (root / f"log-{name}").read_text()
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    assert looks > 20
    return {name: (root / "runs" / name, root / f"home-{name}-of-somebody", sockets[name]) for name in UMASKS}


def files_of(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in found}
    assert names >= {"config.json", "metrics.jsonl", "manifest.json", "tensors.safetensors"}, names
    assert any("tfevents" in name for name in names)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("umask", UMASKS)
def test_no_file_of_a_run_holds_anything_of_its_environment(runs, umask):
    folder, home, _ = runs[umask]
    private = {
        "the value of a variable": SECRET,
        "the name of a variable": "SECRET_TOKEN",
        "the home directory": str(home),
        "its name": home.name,
        "the directory it was started in": str(folder.parents[1]),
        "the user": "somebody-else",
        "the host": host(),
    }
    for path in files_of(folder):
        name = path.relative_to(folder)
        data = str(name).encode() + path.read_bytes()
        assert [what for what, text in private.items() if text and text.encode() in data] == [], name


@pytest.mark.slow
def test_under_umask_022_others_may_read_and_none_may_write(runs):
    folder, _, _ = runs["022"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(folder)} == {0o644}
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o755}


@pytest.mark.slow
def test_under_umask_077_a_run_is_its_owners_alone(runs):
    folder, _, _ = runs["077"]
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, f"{path} has mode {path.stat().st_mode:o}"


@needs_proc
@pytest.mark.slow
def test_a_run_in_one_process_listens_to_nobody_but_its_own_machine(runs):
    for _, _, sockets in runs.values():
        assert {each for each in sockets if not is_loopback(each[0])} == set()


@needs_proc
@pytest.mark.skipif(not shutil.which("ss"), reason="only ss (iproute2) tells the interface that a socket is bound to")
@pytest.mark.slow
def test_a_cluster_on_loopback_that_is_up_listens_to_nobody_but_its_own_machine(tmp_path):
    config = f"--config={ROOT / 'configs'}/quickstart.py:scratch"
    chief, other = workers(2, config, f"--workdir={tmp_path / 'run'}")
    with chief, other:
        ports = {int(each.wait_for(r"127\.0\.0\.1:(\d+), waits for")[1]) for each in (chief, other)}
        for each in (chief, other):
            each.wait_for(r"cluster of 2 workers is up")
        found = listening(chief.process.pid) | listening(other.process.pid)
        told = subprocess.run(["ss", "-tlnH"], capture_output=True, text=True, check=True).stdout
        assert {each.process.poll() for each in (chief, other)} == {None}, chief.output() + other.output()
    bound = {int(port) for port in re.findall(r"%lo:(\d+)\s", told)}
    assert len(ports) == 2 and ports <= bound & {port for _, port in found}, told
    assert {port for address, port in found if not is_loopback(address)} <= bound, told
