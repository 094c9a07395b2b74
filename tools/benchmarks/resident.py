"""The resident memory of a process, without TensorFlow: for our side of a measurement and for timm's."""

from pathlib import Path


def peak() -> float:
    """Return the largest resident memory of this process so far, MB (Linux; getrusage's would be its parent's too)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
