"""Peak memory of this process."""

from pathlib import Path


def peak() -> float:
    """MiB at most so far. (`ru_maxrss` would count the parent's memory, too.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
