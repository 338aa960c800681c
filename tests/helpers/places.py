"""Places that cannot be written to, and what lies at a place."""

import os
import stat

import pytest


def plant(path, kind):
    """What is no folder and no regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.startswith("link to a "):
        plant(path.with_name("behind"), kind.removeprefix("link to a "))
        path.symlink_to("behind")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "device":
        if os.getuid() != 0:
            pytest.skip("only root makes devices")
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a null device of our own
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "file":
        path.write_text("kept")
    elif kind == "folder":
        path.mkdir()
        (path / "kept").touch()


def state(folder):
    """{name below `folder`: what it is}."""
    return {str(one.relative_to(folder)): (one.lstat().st_ino, one.lstat().st_mode) for one in folder.rglob("*")}


ODD = ["fifo", "socket", "device", "loop", "link to a fifo", "link to a socket", "link to a device"]
