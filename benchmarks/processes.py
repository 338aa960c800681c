"""Measurements in a process of their own, whose peak memory is theirs alone."""

import json
import subprocess
import sys
from pathlib import Path


def in_process(program: str, *words: str) -> dict[str, float]:
    """What `python PROGRAM --one WORDS` prints in its last line."""
    done = subprocess.run([sys.executable, program, "--one", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> float:
    """MiB of this process at most so far. (`ru_maxrss` would count the parent's memory, too.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
