"""Reading what save_pretrained wrote: against safetensors' own reader, and damaged in every way."""

import json
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from osrm_peft import merge_checkpoints
from osrm_peft.checkpoints.model_files import DTYPES, INDEX, WEIGHTS, ModelFiles, crc32_of, read_header
from tests.helpers.checkpoints import write
from tests.helpers.models import make_base

SHAPES = [(), (1,), (6,), (5, 3), (1, 4), (4, 1), (3, 2, 2), (2, 3, 1, 2), (0, 3), (3, 0), (0,)]


def of_every_kind():
    """A tensor of each shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        for place, shape in enumerate(SHAPES):
            drawn = torch.randn(shape, generator=generator) * 50
            tensors[f"{dtype}.{place}"] = (drawn > 0) if dtype == torch.bool else drawn.abs().clamp_max(120).to(dtype)
    return tensors


def with_header(path, header, data=b""):
    """A file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def sharded(folder, **tensors):
    """A folder with a shard for each tensor."""
    folder.mkdir()
    weight_map = {}
    for name, tensor in tensors.items():
        weight_map[name] = f"{name}.safetensors"
        save_file({name: tensor}, folder / weight_map[name], {"format": "pt"})
    index(folder, weight_map)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


def index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def assert_as_safetensors_reads(folder):
    files, seen = ModelFiles(folder), set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                expected, entry = opened.get_tensor(name), files.tensors[name]
                assert (entry.path, entry.shape, entry.dtype) == (path, tuple(expected.shape), expected.dtype)
                found = files.read(name)
                assert found.shape == (entry.rows, entry.width) and entry.entries == expected.numel()
                assert torch.equal(found.view(expected.shape), expected)
                seen.add(name)
    assert set(files.tensors) == seen
    files.close()


# what is sound


def test_every_dtype_and_shape_is_read_as_safetensors_does(tmp_path):
    assert_as_safetensors_reads(write(tmp_path / "m", of_every_kind()))


@pytest.mark.parametrize("size", ["5GB", "10KB", "1KB"])
def test_models_in_one_file_or_many_are_read_as_safetensors_does(tmp_path, size):
    make_base().save_pretrained(tmp_path / "m", max_shard_size=size)
    assert (tmp_path / "m" / WEIGHTS).is_file() == (size == "5GB")
    assert_as_safetensors_reads(tmp_path / "m")
    files = ModelFiles(tmp_path / "m")
    assert sorted(path.name for path in files.paths) == sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert files.config["model_type"] == "bert" and files.source == str(tmp_path / "m")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("kinds") / "m", of_every_kind())
    return ModelFiles(folder), load_file(folder / WEIGHTS)


@settings(max_examples=60)
@given(st.data())
def test_rows_are_those_of_the_whole_tensor(every_kind, data):
    files, tensors = every_kind
    name = data.draw(st.sampled_from(sorted(tensors)))
    rows = files.tensors[name].rows
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows + 2))  # beyond the last: as a slice
    whole = tensors[name].reshape(rows, files.tensors[name].width)
    assert torch.equal(files.read(name, start, stop), whole[start:stop])


def test_what_was_read_is_a_copy(every_kind):
    files, tensors = every_kind
    files.read("torch.float32.3").fill_(0)
    assert torch.equal(files.read("torch.float32.3"), tensors["torch.float32.3"])


def test_links_to_files_are_followed(tmp_path):
    """As in the cache of the Hub."""
    folder = write(tmp_path / "m", {"x": torch.arange(6.0)})
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        target = tmp_path / "blobs" / path.name
        path.rename(target)
        path.symlink_to(target)
    assert_as_safetensors_reads(folder)


def test_files_are_opened_again_after_they_were_closed(every_kind):
    files, tensors = every_kind
    files.read("torch.int64.2")
    files.close()
    files.close()
    assert torch.equal(files.read("torch.int64.2")[0], tensors["torch.int64.2"])


def test_the_identity_changes_with_the_file(tmp_path):
    folder = write(tmp_path / "m", {"x": torch.ones(3)})
    files = ModelFiles(folder)
    before = files.identity()
    stat = (folder / WEIGHTS).stat()
    assert before == {WEIGHTS: [stat.st_size, stat.st_mtime_ns]} and files.identity() == before
    write(folder, {"x": torch.zeros(3)})
    assert files.identity() != before


@settings(max_examples=20)
@given(st.binary(max_size=300))
def test_the_checksum_is_crc32(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    assert int(crc32_of(path), 16) == zlib.crc32(content) and len(crc32_of(path)) == 8


def test_the_checksum_of_a_large_file_is_crc32(tmp_path):
    content = bytes(range(256)) * 2**15  # 8 MiB
    (tmp_path / "large").write_bytes(content + b"x")
    assert int(crc32_of(tmp_path / "large"), 16) == zlib.crc32(content + b"x")


# what is not


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two models, the first of which the tests below damage."""
    root = tmp_path_factory.mktemp("sound")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        tensors = {"layer.weight": torch.randn(4, 3, generator=generator), "norm": torch.randn(5, generator=generator)}
        write(root / name, tensors | {"ids": torch.arange(4)})
    merge_checkpoints({"a": root / "a", "b": root / "b"}, root / "out")
    return root, (root / "a" / WEIGHTS).read_bytes()


@settings(max_examples=60)
@given(st.data())
def test_a_file_that_is_cut_short_is_refused_by_its_name(sound, data):
    root, content = sound
    path = root / "cut" / WEIGHTS
    write(root / "cut", {"x": torch.ones(1)})
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is damaged or cut short"):
        ModelFiles(root / "cut")
    path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=20)))
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is damaged or cut short"):
        ModelFiles(root / "cut")


@settings(max_examples=250)
@given(st.data())
def test_flipped_bytes_of_a_header_are_refused_or_do_no_harm(sound, data):
    root, content = sound
    header = 8 + int.from_bytes(content[:8], "little")
    flipped = bytearray(content)
    for _ in range(data.draw(st.integers(1, 2))):
        flipped[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    write(root / "flipped", {"x": torch.ones(1)})
    (root / "flipped" / WEIGHTS).write_bytes(flipped)
    models = {"flipped": root / "flipped", "b": root / "b"}
    try:
        out = merge_checkpoints(models, root / "fuzzed", overwrite=True)
    except ValueError as error:
        assert str(root / "flipped" / WEIGHTS) in str(error) or "'flipped'" in str(error)
    else:
        found, expected = load_file(out / WEIGHTS), load_file(root / "out" / WEIGHTS)
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        {"x": entry((3,))},
        {"x": entry((2, 2))},
        {"x": entry(offsets=(0, 4))},
        {"x": entry(offsets=(4, 12))},
        {"x": entry(offsets=(8, 0))},
        {"x": entry(offsets=(-8, 0))},
        {"x": entry(offsets=(0, 8, 8))},
        {"x": entry(offsets=("0", "8"))},
        {"x": entry((1,), (0, 4)), "y": entry((1,), (0, 4))},
        {"x": entry((2,), (0, 8)), "y": entry((1,), (4, 8))},
        {"x": entry((1,), (0, 4))},
        {"x": entry((-2, -1))},
        {"x": entry((2.0,))},
        {"x": entry(("2",))},
        {"x": entry((2**32, 2**32), (0, 0)), "y": entry()},
        {"x": entry((10**30,))},
        {"x": entry(dtype="F33")},
        {"x": entry(dtype=["F32"])},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"x": {"shape": [2], "data_offsets": [0, 8]}},
        {"x": 3},
        {"x": None},
        [],
        [["x", 1]],
        3,
        {},
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path, header):
    path = with_header(tmp_path / WEIGHTS, header, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 8, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_wrong_length_of_the_header_is_refused(tmp_path, length):
    path = with_header(tmp_path / WEIGHTS, {"x": entry()}, bytes(8))
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        read_header(path)


def test_other_dtypes_are_refused_by_name(tmp_path):
    path = with_header(tmp_path / WEIGHTS, {"x": entry((8,), dtype="F8_E4M3")}, bytes(8))
    with pytest.raises(ValueError, match="'x' has the dtype F8_E4M3, which cannot be merged"):
        read_header(path)


def test_a_file_cut_while_it_is_read_is_told(tmp_path):
    folder = write(tmp_path / "m", {"x": torch.ones(100, 100), "y": torch.ones(100, 100)})
    files = ModelFiles(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-40])
    files.read("x")
    with pytest.raises(ValueError, match=r"model\.safetensors ended within 'y': it was changed while it was read"):
        files.read("y")


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = sharded(tmp_path / "m", x=torch.ones(2), y=torch.ones(3))
    (folder / "y.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks its shard y\.safetensors"):
        ModelFiles(folder)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", 5, None, ["x.safetensors"]],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, file):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    folder = sharded(tmp_path / "m", x=torch.ones(2))
    index(folder, {"x": file})
    with pytest.raises(ValueError, match=r"index\.json names .*, which is no shard in its folder"):
        ModelFiles(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x": "x.safetensors", "y": "x.safetensors"},
        {"x": "y.safetensors", "y": "x.safetensors"},
        {"x": "x.safetensors", "y": "y.safetensors", "z": "y.safetensors"},
        {"x": "x.safetensors", "z": "y.safetensors"},
    ],
)
def test_an_index_and_its_shards_must_agree(tmp_path, weight_map):
    folder = sharded(tmp_path / "m", x=torch.ones(2), y=torch.ones(3))
    index(folder, weight_map)
    with pytest.raises(ValueError, match=r"\.safetensors and .*index\.json disagree about '[xyz]': download"):
        ModelFiles(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff"])
def test_a_damaged_index_is_refused(tmp_path, content):
    folder = sharded(tmp_path / "m", x=torch.ones(2))
    (folder / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ModelFiles(folder)


def test_pickled_weights_are_not_read(tmp_path):
    folder = write(tmp_path / "m", {"x": torch.ones(2)})
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pickled weights, which can run code .*\.save_pretrained\(folder\)"):
        ModelFiles(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    with pytest.raises(ValueError, match="pickled weights"):
        ModelFiles(folder)
    save_file({"x": torch.ones(2)}, folder / WEIGHTS)
    assert set(ModelFiles(folder).tensors) == {"x"}


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/such/folder' is neither a model folder nor a Hub repository"):
        ModelFiles("no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json: give a folder that save_pretrained wrote"):
        ModelFiles(tmp_path)
    for content in ("", "{", "[]", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            ModelFiles(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"holds neither {WEIGHTS} nor {INDEX}"):
        ModelFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nothing\.safetensors"):
        read_header(tmp_path / "nothing.safetensors")


def test_files_without_a_checksum_or_with_the_right_one_are_sound(tmp_path):
    folder = write(tmp_path / "m", {"x": torch.ones(2)})
    ModelFiles(folder).verify()
    manifest = folder / "osrm_peft.json"
    manifest.write_text(json.dumps({"crc32": {WEIGHTS: crc32_of(folder / WEIGHTS)}}))
    ModelFiles(folder).verify()
    manifest.write_text(json.dumps({"crc32": {WEIGHTS: "00000000"}}))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its checksum is not that in osrm_peft\.json"):
        ModelFiles(folder).verify()
