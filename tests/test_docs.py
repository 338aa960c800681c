"""The README is true: its example runs, its tree is the tree, its commands and files exist; and imports point left."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import osrm_peft
from osrm_peft.merging import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "osrm_peft"


def block(language, containing):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)
    return next(text for text in blocks if containing in text)


def tree():
    """{file: line number} of the README's tree of the package, in its order."""
    names, folder = [], ""
    for line in block("text", "osrm_peft/\n").splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not line.startswith(" "):
            break
        folder = folder if len(indent) > 2 else ""
        if name.endswith("/"):
            folder = name
        else:
            names.append(folder + name)
    return names


def modules():
    """{module: its place in the README's tree}."""
    return {f"osrm_peft.{name.removesuffix('.py').replace('/', '.')}": place for place, name in enumerate(tree())}


def test_the_tree_is_the_tree():
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert len(tree()) == len(set(tree())) > 20
    assert set(tree()) == {name for name in files if not name.endswith("__init__.py")} | {"__init__.py"}


def test_imports_point_left():
    """A file imports only from files above it in the README's tree; the package's front door imports lazily."""
    places = modules()
    seen = 0
    for module, place in places.items():
        if module == "osrm_peft.__init__":
            continue
        path = ROOT / (module.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("osrm_peft"):
                targets = {f"{node.module}.{alias.name}" for alias in node.names} & set(places) or {node.module}
                for target in targets - {"osrm_peft.merging"}:
                    assert places[target] < place, f"{module} imports {target}, which lies to its right"
                if "osrm_peft.merging" in targets:
                    assert place > places["osrm_peft.merging.merge"], module
                seen += 1
    assert seen > 40


def test_maths_sees_no_path_config_or_model():
    for name in (
        "moments",
        "subspace",
        "merging/lowrank",
        "merging/spaces",
        "merging/sparsify",
        *map(method_file, METHODS),
    ):
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"import.*(pathlib|transformers|json)|from peft|open\(", text), name


def method_file(method):
    return f"merging/{'dare' if method == 'dare_ties' else method}"


def test_the_example_runs_as_it_stands(tmp_path):  # field trap B5(a): the released quick start does not run
    script = tmp_path / "example.py"
    script.write_text(block("python", "OSRMCallback") + block("python", "collect_gram"), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tweets: -?0\.\d+", done.stdout)
    assert re.search(r"EMR, tweets: -?0\.\d+", done.stdout) and "tensor([[" in done.stdout
    assert (tmp_path / "merged/heads/tweets.safetensors").is_file()
    assert (tmp_path / "statistics/tweets.fisher.safetensors").is_file()


def test_every_public_name_exists_and_is_documented():
    for name in osrm_peft.__all__:
        assert getattr(osrm_peft, name).__doc__, name
    with pytest.raises(AttributeError, match=r"has no attribute 'merge'"):
        osrm_peft.merge  # noqa: B018


def test_every_method_is_in_the_table_with_its_scale():
    for name, method in METHODS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {method.scale:g} |" in row and re.search(r"arXiv:[\d.]+", method.paper)[0] in row
        for option in method.options:
            assert f"`{option}`" in row, (name, option)


def test_commands_and_files_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, flags=re.M)) <= targets
    commands = set(re.findall(r"osrm-peft ([a-z]+)", README))
    assert {"features", "train", "merge", "evaluate", "demo", "inspect", "interference", "statistics"} <= commands
    printed = subprocess.run(
        [Path(sys.executable).with_name("osrm-peft"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(command in printed for command in commands)
    for path in re.findall(r"(?:recipes|accelerate_configs|tests|docs)/[\w/]+\.\w+", README):
        assert (ROOT / path).is_file(), path
