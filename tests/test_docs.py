"""The documentation is true: its blocks run, its tree is the tree, its commands exist; and imports point left."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import osrm_peft.cli.main
from osrm_peft.merging import METHODS
from tests import conftest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "osrm_peft"
DOCS = ROOT / "docs"
# Pages in the order in which their blocks run: each goes on with the files and variables of those before it.
PAGES = [
    ROOT / "README.md",
    DOCS / "quickstart.md",
    *(DOCS / f"start/{name}.md" for name in ("tasks", "adapters", "checkpoints", "gpus", "share")),
    *sorted((DOCS / "guides").glob("*.md")),
    *sorted((DOCS / "development").glob("*.md")),
    *(DOCS / f"{name}.md" for name in ("index", "installation", "papers")),
    *sorted((DOCS / "reference").glob("*.md")),
    *sorted((DOCS / "results").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
PARSED_ONLY = r"<!-- parsed only: [^\n]+ -->\n"


def text_of(page):
    """A page without the quoted card, which holds blocks of its own."""
    return re.sub(r"^````markdown\n.*?^````$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def blocks(page):
    """(language, text, runs) of each code block of a page, in order."""
    found = re.findall(rf"({PARSED_ONLY})?^```([a-z]+)\n(.*?)^```$", text_of(page), flags=re.S | re.M)
    return [(language, text, not mark) for mark, language, text in found]


def command_lines(page):
    """(words, runs) of each line of a page's shell blocks."""
    for language, text, runs in blocks(page):
        for line in text.splitlines() if language == "bash" else ():
            for part in line.split("&&"):
                if words := shlex.split(part, comments=True):
                    yield words, runs


def ours(words):
    """The arguments of `osrm-peft` in a command line, in several processes or one; None if it is another program."""
    if words[0] == "osrm-peft":
        return words[1:]
    return words[words.index("osrm_peft") + 1 :] if "osrm_peft" in words and "-m" in words else None


def tree():
    """Files of the tree of the package in docs/development/architecture.md, in its order."""
    text = next(text for _, text, _ in blocks(DOCS / "development/architecture.md") if "osrm_peft/\n" in text)
    names, folders = [], []
    for line in text.splitlines()[1:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not line.startswith(" "):
            break
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            names.append("".join(folders) + name)
    return names


def modules():
    """{module: its place in the tree}; a package has the place of the last file that it imports."""
    places = {f"osrm_peft.{name.removesuffix('.py').replace('/', '.')}": place for place, name in enumerate(tree())}
    for init in PACKAGE.glob("*/**/__init__.py"):
        places[".".join(init.parent.relative_to(ROOT).parts)] = -1
    for init in sorted(PACKAGE.glob("*/**/__init__.py"), key=lambda path: -len(path.parts)):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        places[package] = max((places[target] for target in imports(init, places)), default=-1)
    return places


def imports(path, known):
    """The modules of ours that a file imports, inside of its functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("osrm_peft"):
            yield from {f"{node.module}.{alias.name}" for alias in node.names} & set(known) or {node.module}


def test_the_tree_is_the_tree():
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert len(tree()) == len(set(tree())) > 20
    assert set(tree()) == {name for name in files if not name.endswith("__init__.py")} | {"__init__.py"}


def test_imports_point_up():
    """A file imports only from files above it in the tree."""
    places = modules()
    seen = 0
    for name, place in zip(tree(), range(len(tree())), strict=True):
        for target in imports(PACKAGE / name, places):
            assert places[target] < place, f"{name} imports {target}, which lies below it"
            seen += 1
    assert seen > 300


# What each folder may import from: those in the lines above its own.
LAYERS = [
    {"checks", "libraries", "seeding"}, {"devices"}, {"distributed"}, {"io"}, {"hub"}, {"models"},
    {"tasks", "features", "adapters"}, {"osrm", "merging"},
    {"training", "checkpoints"}, {"evaluation"}, {"selection"}, {"pipeline"}, {"demo"}, {"cli"}, {"__main__"},
]  # fmt: skip


def test_a_folder_imports_from_the_layers_below_it():
    places, seen = modules(), set()
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder == "__init__":
            continue
        (level,) = (level for level, folders in enumerate(LAYERS) if folder in folders)
        for target in imports(path, places):
            other = target.split(".")[1]
            assert other == folder or other in set().union(*LAYERS[:level]), f"{path} imports {target}"
            seen.add(folder)
    assert seen == set().union(*LAYERS) - {"checks", "libraries", "seeding"}


def test_no_function_is_longer_than_a_screen():
    """Fewer than 60 lines, from `def` to the last, the docstring among them."""
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"] if lines >= 60 else []
    assert not long, "\n".join(long)


def test_maths_sees_no_path_config_or_model():
    for name in (
        "features/moments",
        "osrm/subspace",
        "merging/lowrank",
        "merging/spaces",
        "merging/methods/sparsify",
        "merging/methods/svt",
        *map(method_file, METHODS),
    ):
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"import.*(pathlib|transformers|json)|from peft|open\(", text), name


def method_file(method):
    return f"merging/methods/{'dare' if method == 'dare_ties' else method}"


def test_every_python_block_and_every_command_that_needs_no_network_runs(tmp_path):
    """In one process, page by page: what a reader does who follows the documentation from its first line."""
    lines = ["from osrm_peft.cli.main import app", ""]
    ran = {"python": 0, "bash": 0}
    for page in PAGES:
        for language, text, runs in blocks(page):
            where = f"# {page.relative_to(ROOT)}"
            if language == "python":
                lines += [where, text]
                ran["python"] += 1
            elif language == "bash" and runs:
                commands = [ours(shlex.split(line, comments=True)) for line in text.splitlines() if line.strip()]
                for words in filter(None, commands):
                    lines += [f"{where}\nprint({' '.join(words)!r})\napp({words!r}, standalone_mode=False)", ""]
                    ran["bash"] += 1
    assert ran["python"] >= 7 and ran["bash"] >= 15
    (tmp_path / "pages.py").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run([sys.executable, "pages.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = re.findall(
        r"^(one adapter each|weights by features|iso|emr, a mask each) .*tweets (-?\d\.\d+)$",
        done.stdout,
        re.M,
    )
    assert len(table) == 4 and float(table[0][1]) > 0.5
    assert re.search(r"EMR, tweets: 0\.\d+", done.stdout) and "tensor([[" in done.stdout
    for path in (
        "adapters/tweets/adapter_model.safetensors",
        "chosen/winner/heads/tweets.safetensors",
        "statistics/tweets.fisher.safetensors",
        "merged/average/config.json",
        "served/tweets/adapter_config.json",
        "report.html",
    ):
        assert (tmp_path / path).is_file(), path


def test_every_command_line_is_one_that_the_program_takes():
    app = typer.main.get_command(osrm_peft.cli.main.app)
    seen = set()
    for page in PAGES:
        for words, _ in command_lines(page):
            arguments = ours(words)
            if arguments is not None:
                command, rest = app, arguments
                while rest and rest[0] in getattr(command, "commands", {}):
                    command, rest = command.commands[rest[0]], rest[1:]
                assert command is not app, (page.name, words)
                with command.make_context(arguments[0], list(rest)):  # raises for an option that is not there
                    seen.add(arguments[0])
            else:
                assert words[0] in {"make", "pip", "python", "accelerate", "source"}, (page.name, words)
            for word in words:
                if re.match(r"(recipes|accelerate_configs|benchmarks)/", word):
                    assert (ROOT / word).is_file(), (page.name, word)
    assert set(app.commands) - seen <= {"report", "demo"}
    verbs = README.split("## Command line")[1].split("## ")[0]
    assert all(f"`{name}`" in verbs for name in app.commands)


def test_make_targets_and_files_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, flags=re.M))
    assert targets == set(re.findall(r"^([a-z0-9-]+):.*  ## ", makefile, flags=re.M))  # make help lists it
    for page in PAGES:
        text = text_of(page)
        assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, flags=re.M)) <= targets, page
        for path in re.findall(r"(?:recipes|accelerate_configs|benchmarks|tests)/[\w/]+\.\w+", text):
            assert (ROOT / path).is_file(), (page, path)
        for path in re.findall(r"`([\w/]+\.py)`", text):
            assert any((place / path).is_file() for place in (ROOT, PACKAGE)), (page, path)
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_the_marks_of_the_fast_lane_name_tests_that_exist():
    for beginning in sum(conftest.MARKED.values(), ()):
        name, _, function = beginning.partition("::")
        found = [
            path for path in (ROOT / "tests").rglob("*") if path.relative_to(ROOT / "tests").as_posix().startswith(name)
        ]
        assert (name.endswith("/") and (ROOT / "tests" / name).is_dir()) or found, beginning
        assert f"def {function}" in found[0].read_text(encoding="utf-8") if function else True, beginning


def test_every_page_is_in_the_contents_once():
    entries = []
    for page in (DOCS / "index.md", DOCS / "results/index.md"):
        for listed in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            names = [line for line in listed.splitlines() if line and not line.startswith(":")]
            entries += [(page.parent / f"{name}.md").resolve() for name in names]
    pages = [*DOCS.rglob("*.md")]
    tables = {path for path in pages if re.search(r"results/\w+/\w+/", path.as_posix())}
    assert sorted(entries) == sorted({path.resolve() for path in pages} - tables - {DOCS / "index.md"})


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160
    assert len(README.split("## Results")[1].split("\n## ")[0].split("|--:|\n")[1].split("\n\n")[0].splitlines()) <= 8


def test_no_sentence_is_wrapped():
    """Prose has one sentence a line: a line of a paragraph ends as a sentence does, and the next begins a new one."""
    for page in PAGES:
        prose = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "```", text_of(page), flags=re.S | re.M)
        lines = prose.splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            text = line.strip()
            if not text or re.match(r"[#|<`!]|\[!", text):
                continue
            assert text.endswith((".", ":", ";", "?", ".)", ".**", ".*")) or not after.strip(), (page.name, line)
            inner = re.sub(r"`[^`]*`|\([^)]*\)|\b(e\.g|i\.e|et al|Fig|Eq|vs)\.", "", text)
            assert not re.search(r"[a-z]{3}\. [A-Z][a-z]+ [a-z]", inner), (page.name, line)


def test_every_public_name_exists_and_is_documented():
    page = (DOCS / "reference/api.md").read_text(encoding="utf-8")
    for name in osrm_peft.__all__:
        value = getattr(osrm_peft, name)
        assert value.__doc__, name
        assert f".. auto{'class' if inspect.isclass(value) else 'function'}:: osrm_peft.{name}\n" in page, name
    assert dir(osrm_peft) == sorted(osrm_peft.__all__) and osrm_peft.__version__
    with pytest.raises(AttributeError, match="No osrm_peft attribute merge"):
        osrm_peft.merge  # noqa: B018


def configuration():
    """docs/conf.py, which generates the reference (it imports no Sphinx)."""
    names: dict = {}
    exec(compile((DOCS / "conf.py").read_text(encoding="utf-8"), "conf.py", "exec"), names)
    return names


def test_every_method_is_in_both_tables():
    generated = configuration()["methods"]().splitlines()
    for name, method in METHODS.items():
        paper = re.search(r"arXiv:[\d.]+", method.paper)[0]
        assert next(line for line in README.splitlines() if line.startswith(f"| `{name}` |") and paper in line)
        row = next(line for line in generated if line.startswith(f"| `{name}` |"))
        assert f"| {method.scale:g} |" in row and paper in row
        for option, default in method.options.items():
            assert f"`{option}` ({default})" in row, (name, option)


def test_the_reference_of_commands_has_every_option():
    text = configuration()["commands"]()
    app = typer.main.get_command(osrm_peft.cli.main.app)
    for name, command in app.commands.items():
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            assert parameter.name == "help" or any(
                f"`{option}" in section for option in (*parameter.opts, parameter.name.upper())
            ), (name, parameter.name)


def test_a_users_file_that_imports_us_passes_mypy(tmp_path):
    """py.typed is there, and the public names have types: only the user's own mistake is an error."""
    user = "from osrm_peft import MergedAdapter, load_adapter\n\nrank: int = load_adapter('a').source\n"
    (tmp_path / "user.py").write_text(user, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "user.py"],  # its cache
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert re.findall(r"error: (.*)", done.stdout) == [
        'Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]'
    ], done.stdout + done.stderr
    assert (PACKAGE / "py.typed").is_file()
