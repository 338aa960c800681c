"""Bytes of files: read from any place, by several threads, on any system."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from osrm_peft.io import tensors


@pytest.mark.parametrize("preadv", [True, False])
def test_threads_read_one_file(tmp_path, monkeypatch, preadv):
    content = bytes(range(251)) * 400
    path = tmp_path / "numbers"
    path.write_bytes(content)
    if not preadv:  # as on Windows
        monkeypatch.delattr(tensors.os, "preadv", raising=False)

    def read(place, size=999):
        memory = bytearray(size)
        tensors.read_at(file, place, memoryview(memory), "it ended")
        return bytes(memory)

    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
        places = [7919 * number % 99_000 for number in range(400)]
        assert list(pool.map(read, places)) == [content[place : place + 999] for place in places]
        assert read(5, 0) == b""
        with pytest.raises(ValueError, match="it ended: it was changed"):
            read(len(content) - 998)
