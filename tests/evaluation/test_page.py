import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from osrm_peft.cli import report as cli_report  # noqa: F401 (the command)
from osrm_peft.evaluation.interference import Interference
from osrm_peft.evaluation.page import html_report, write_report
from osrm_peft.evaluation.results import gather
from osrm_peft.evaluation.tables import AVERAGE

SCRIPT = "<script>document.body.id='pwned'</script>"
IMAGE = '"><img src=x onerror="document.body.id=\'pwned\'">'
CSP = re.compile(r"<meta http-equiv=.Content-Security-Policy.*?>")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def rows(a="a", b="b", method="ties"):
    """Two seeds, two tasks: the single adapters, one merge at two λ, and an average that is best on the first task."""
    values = {
        ("x", "individual", None): (0.99, 0.98),
        ("x", method, 0.3): (0.5, 0.61),
        ("x", method, 1.0): (0.4, 0.9),
        ("y", "average", 1.0): (0.7, 0.2),
    }
    return [
        {"init": init, "method": name, "scale": scale, "seed": seed, "task": task, "score": score + seed / 100}
        for (init, name, scale), scores in values.items()
        for seed in (0, 2)
        for task, score in zip((a, b), scores, strict=True)
    ]


def crosstalk(*tasks, share=0.02):
    matrix = torch.full((len(tasks), len(tasks)), share, dtype=torch.float64).fill_diagonal_(0.5)
    matrix[0, 0] = math.nan
    return Interference(list(tasks), {"layer.0": matrix, "layer.1": matrix}, "base").to_dict()


def adapter(*layers):
    log = [
        {"step": step, "loss": 1 / step, "osrm/drift": step / 1000, **{f"osrm/drift/{x}": step / 500 for x in layers}}
        for step in (10, 20)
    ]
    log = [{"step": 5, "loss": 3.0}, *log, {"step": 20, "train_loss": 2.0}]
    return {"kind": "adapter", "task": "t", "training": {"learning_rate": 0.0321}, "log": log}


def merge(*inputs, **others):
    manifest = {"kind": "merged", "method": "lore", "scale": 0.3, "space": "core", "rank": None, "written_rank": 24}
    manifest |= {"inputs": {name: {"source": "s"} for name in inputs}, "energy_kept": {"l0": 0.99, "l1": 0.875}}
    return manifest | others


@pytest.fixture
def results(tmp_path):
    """Every kind of result, as the commands write them."""
    root = tmp_path / "results"
    about = {"settings": {"k": 17, "out": "/home/me/results"}, "versions": {"peft": "0.21"}}
    put(root / "demo/scores.json", {"scores": rows()} | about)
    shares = {"seed7": {"plain": crosstalk("a", "b"), "OSRM": crosstalk("a", "b", share=0.001)}}
    put(root / "demo/interference.json", {"interference": shares} | about)
    put(root / "demo/seed7/scores.json", rows()[:2])  # a list: the demo's rows of one seed
    put(root / "demo/adapters/OSRM/first/osrm_peft.json", adapter("layer.0", "layer.1"))
    put(root / "demo/adapters/OSRM/second/osrm_peft.json", adapter("layer.0"))
    put(root / "demo/adapters/plain/first/osrm_peft.json", {"kind": "adapter", "log": [{"step": 10, "loss": 1.0}]})
    put(root / "cross/interference.json", crosstalk("tweets", "spam", "news") | about)
    put(root / "spec/spectrum.json", {"singular_values": {"m": {"w": [3.0, 1.0], "v": [2.0]}, "z": {"w": []}}} | about)
    put(root / "one/osrm_peft.json", merge("p", "q"))
    put(
        root / "two/osrm_peft.json",
        merge("p", kind="emr", method="emr", scale=1.0, energy_kept=None, written_rank=None),
    )
    put(
        root / "three/osrm_peft.json",
        {"kind": "checkpoint", "method": "tsv", "scale": 2.0, "inputs": {"u": {}, "base": {}}},
    )
    return root


class Page(HTMLParser):
    """Tables as lists of rows of texts, images, headings, and every attribute, of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.marked, self.headings, self.open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("img", "meta"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += data
            if attributes.get("class") == "best":
                self.marked.append(data)
        elif tag in ("h2", "h3"):
            self.headings.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_a_page_has_every_kind_of_result(results):
    text = html_report(gather([results]))
    page = Page(text)
    assert not page.open  # every tag is closed
    expected = ["Scores", "demo", "Interference", "cross", "demo", "Spectra", "spec", "Drift", "OSRM", "Merged folders"]
    assert [heading.rpartition("/")[2] for heading in page.headings] == expected
    alts = [image["alt"] for image in page.all("img")]
    assert [alt.partition(" ")[0] for alt in alts] == ["average", "heat", "heat", "singular", "drift"]
    assert "tweets, spam, news" in alts[1] and "plain, OSRM" in alts[2] and "first, second" in alts[4]
    assert "seed7: off the diagonal plain 2 %, OSRM 0.1 %" in " ".join(html.unescape(text).split())
    assert text.count("&#34;k&#34;: 17") == 4 and "0.0321" in text and "&#34;log&#34;" not in text
    _, drift, merged = page.tables
    assert drift == [
        ["layer", "first", "second"],
        ["step", "20", "20"],
        ["mean", "0.020", "0.020"],
        ["layer.0", "0.040", "0.040"],
        ["layer.1", "0.040", "–"],
    ]
    assert merged == [
        ["folder", "method", "λ", "space", "rank", "least energy kept", "inputs"],
        [f"{results}/one", "lore", "0.3", "core", "24", "0.8750", "p, q"],
        [f"{results}/three", "tsv", "2", "–", "–", "–", "u, base"],
        [f"{results}/two", "emr", "1", "core", "–", "–", "p"],
    ]


def test_scores_are_mean_and_spread_and_the_best_merge_is_marked(results):
    page = Page(html_report(gather([results / "demo/scores.json"])))
    assert page.tables[0] == [
        ["merge", "λ", "a", "b", AVERAGE],
        ["x", ""],
        ["individual", "", "100.0 ± 1.4", "99.0 ± 1.4", "99.5 ± 1.4"],
        ["ties", "0.3", "51.0 ± 1.4", "62.0 ± 1.4", "56.5 ± 1.4"],
        ["ties", "1", "41.0 ± 1.4", "91.0 ± 1.4", "66.0 ± 1.4"],
        ["y", ""],
        ["average", "1", "71.0 ± 1.4", "21.0 ± 1.4", "46.0 ± 1.4"],
    ]
    assert page.marked == ["91.0 ± 1.4", "66.0 ± 1.4", "71.0 ± 1.4"]  # not the single adapters'


def test_equal_means_are_both_the_best(tmp_path):
    """Means over the same seeds' scores in another order: the last bits may differ."""
    orders = {"ties": (0.1, 0.7, 0.3), "lore": (0.3, 0.1, 0.7), "tsv": (0.7, 0.3, 0.1), "average": (0.1, 0.2, 0.3)}
    scores = [
        {"init": "x", "method": method, "scale": 1.0, "seed": seed, "task": "a", "score": score + 1e-12 * len(method)}
        for method, order in orders.items()
        for seed, score in enumerate(order)
    ]
    page = Page(html_report(gather([put(tmp_path / "scores.json", {"scores": scores})])))
    assert len(page.marked) == 3  # in the one column: one task has no average


def test_one_seed_has_no_spread_and_one_scale_no_curve(tmp_path):
    one = [row for row in rows() if row["seed"] == 0 and row["scale"] in (None, 1.0)]
    page = html_report(gather([put(tmp_path / "other.json", {"scores": one})]))
    assert "±" not in page and "<img" not in page and Page(page).headings[1] == str(tmp_path / "other.json")


def test_a_merged_folder_that_was_scored_is_still_one(tmp_path):
    scored = merge("p", "q") | {"scores": [{"task": "p", "metric": "accuracy", "value": 0.5}]}
    put(tmp_path / "one/osrm_peft.json", scored)
    found = gather([tmp_path])
    assert len(found.merged) == 1 and not found.scores


def test_folders_of_this_machine_are_not_shown(results, monkeypatch):
    monkeypatch.chdir(results.parent)
    page = html_report(gather(["results"]))
    assert "/home/me" not in page and str(results.parent) not in page and "results/demo" in page


def test_nothing_comes_from_elsewhere(results):
    text = html_report(gather([results]))
    page = Page(text)
    assert len(page.all("img")) == 5 and len(page.all("a")) == 5
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "svg")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "background")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            if name == "href":
                assert value[0] == "#" and value[1:] in ids
    assert "url(" not in text and "@import" not in text and CSP.search(text)


@pytest.fixture
def hostile(tmp_path):
    """Every name that a file can bring in is a piece of HTML."""
    names, about = (SCRIPT, IMAGE), {"settings": {SCRIPT: IMAGE, IMAGE: [SCRIPT]}}
    root = tmp_path / IMAGE.replace("/", "")
    scores = [row | {"init": SCRIPT + row["init"]} for row in rows(*names, method=IMAGE)]
    put(root / "scores.json", {"scores": scores} | about)
    put(root / "interference.json", {"interference": {SCRIPT: {IMAGE: crosstalk(*names)}}} | about)
    put(root / "cross/interference.json", crosstalk(*names) | about)
    put(root / "spectrum.json", {"singular_values": {SCRIPT: {IMAGE: [2.0, 1.0]}, IMAGE: {"w": [1.0]}}} | about)
    put(root / IMAGE / "osrm_peft.json", adapter(SCRIPT, IMAGE) | about)
    put(root / "merged/osrm_peft.json", merge(*names, method=SCRIPT, space=IMAGE, written_rank=SCRIPT) | about)
    return root


def test_names_from_files_are_text(hostile):
    text = html_report(gather([hostile]))
    page = Page(text)
    assert "<script" not in text and "<img src=x" not in text
    assert len(page.all("img")) == 5 and all(image["src"].startswith("data:") for image in page.all("img"))
    assert page.tables[0][0] == ["merge", "λ", SCRIPT, IMAGE, AVERAGE] and page.tables[0][3][0] == IMAGE
    assert [row[0] for row in page.tables[1]] == ["layer", "step", "mean", SCRIPT, IMAGE]
    assert page.tables[2][1][1:] == [SCRIPT, "0.3", IMAGE, SCRIPT, "0.8750", f"{SCRIPT}, {IMAGE}"]
    assert any(SCRIPT in image["alt"] and IMAGE in image["alt"] for image in page.all("img"))
    assert html.escape(SCRIPT).replace("&#x27;", "&#39;") in text.rpartition("<pre>")[2]


def test_names_are_no_mathematics_in_plots(tmp_path):
    """matplotlib refuses the one, and leaves the other out of its legend."""
    odd = (r"$\oops$", "_hidden")
    put(tmp_path / "scores.json", {"scores": rows(*odd, method=odd[0])})
    put(tmp_path / "interference.json", {"interference": {"s": {odd[0]: crosstalk(*odd)}}})
    put(tmp_path / "spectrum.json", {"singular_values": {odd[0]: {"w": [2.0, 1.0]}}})
    put(tmp_path / odd[0] / "osrm_peft.json", adapter())
    assert Page(html_report(gather([tmp_path]))).tables[0][0][2:4] == list(odd)


def test_what_is_not_searched(results, tmp_path):
    outside = put(tmp_path / "outside/osrm_peft.json", merge("far"))
    put(results / ".hidden/osrm_peft.json", merge("hidden"))
    put(results / "run.checkpoints/osrm_peft.json", merge("checkpoint"))
    (results / "folder").symlink_to(outside.parent)
    (results / "file").mkdir()
    (results / "file/osrm_peft.json").symlink_to(outside)
    (results / "four").mkdir()
    (results / "four/osrm_peft.json").symlink_to(results / "one/osrm_peft.json")  # the same again
    found = gather([results, results / "one", tmp_path / "outside"]).merged
    assert [one.content["inputs"] for one in found] == ["p, q", "u, base", "p", "far"]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "Expecting property name"),
        ('"\xff"', None),
        ({"scores": [{"init": "x"}]}, "missing 5 required"),
        ({"scores": []}, "no row of it has a score of every task"),
        ({"scores": [rows()[0] | {"score": "many"}]}, "many"),
        ({"interference": {"s": {"x": {"tasks": ["a"], "layers": {}, "relative_to": "base"}}}}, "no layers"),
        ({"tasks": ["a", "b"], "layers": {"l": [[1.0]]}, "relative_to": "base"}, "not a matrix of 2 tasks"),
        ({"interference": {"s": {"x": {}}}}, "no 'tasks'"),
        ({"singular_values": {"m": [1.0]}}, "no attribute 'items'"),
        ({"kind": "merged", "method": "ties"}, "no 'scale'"),
        ({"kind": "adapter", "log": [{"osrm/drift": 0.1}]}, "no 'step'"),
    ],
)
def test_a_damaged_file_is_named(results, content, reason, call):
    path = results / "zzz/spectrum.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("latin-1") if isinstance(content, str) else json.dumps(content).encode())
    said = call("report", results, "--out", results / "page.html", code=2)
    assert f"{path} is damaged: " in said and (reason or "can't decode") in said
    assert not list(results.glob("*.html")) and not list(results.glob(".*partial"))


def test_a_fifo_is_not_waited_for(tmp_path, call):
    os.mkfifo(tmp_path / "scores.json")
    assert "is neither a folder nor a file" in call("report", tmp_path / "scores.json", code=2)
    assert "holds no results to show" in call("report", tmp_path, code=2)


def test_nothing_is_written_where_there_is_nothing_to_show(results, tmp_path, call):
    page = tmp_path / "page.html"
    assert f"{tmp_path}/none does not exist" in call("report", results, tmp_path / "none", "--out", page, code=2)
    evaluated = put(
        tmp_path / "plain/scores.json", {"scores": {"a": 0.5}}
    )  # of `osrm-peft evaluate`: one number a task
    for path in (results / "demo/adapters/plain", evaluated.parent, evaluated):
        assert f"{path} holds no results to show: expected scores.json" in call(
            "report", results, path, "--out", page, code=2
        )
    assert "name it *.html" in call("report", results, "--out", results / "demo/scores.json", code=2)
    assert not page.exists() and json.loads((results / "demo/scores.json").read_text())["scores"]


def test_the_command_writes_the_page(results, tmp_path, call):
    page = tmp_path / "new/page.html"
    said = call("report", results / "demo", results / "one/osrm_peft.json", "--out", page)
    assert said == f"wrote {page}: scores: 1, interference: 1, drift: 2, merged: 1"
    assert page.read_text() == html_report(gather([results / "demo", results / "one/osrm_peft.json"]))


@pytest.fixture
def browse(tmp_path):
    """browse(page, *options): the DOM of a page, after its scripts, in a browser without a window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")

    def browsed(page, *options):
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            *quiet,
            "--hide-scrollbars",
        ]
        command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return browsed


PROBE = """<!DOCTYPE html><iframe width="380" height="900" srcdoc="{page}"></iframe><pre></pre><script>
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument
  document.querySelector("pre").textContent = JSON.stringify({{
    pwned: inside.body.id, scripts: inside.scripts.length, images: [...inside.images].map(one => one.naturalWidth),
    width: inside.documentElement.scrollWidth, rows: inside.querySelectorAll("#scores tbody tr").length,
    best: [...inside.querySelectorAll("td.best")].map(one => one.textContent),
  }})
}}
</script>"""


def test_a_browser_shows_it_on_a_phone_and_runs_nothing(hostile, tmp_path, browse):
    page = html_report(gather([hostile]))
    open_to_scripts = CSP.sub("", page)  # so that one could run
    assert open_to_scripts != page
    probe = put(tmp_path / "probe.html", PROBE.format(page=html.escape(open_to_scripts)))
    dom = browse(probe, "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.S)[1]))
    assert seen["pwned"] == "" and seen["scripts"] == 0
    assert len(seen["images"]) == 5 and min(seen["images"]) > 200  # all were loaded
    assert seen["rows"] == 6 and seen["best"] == ["91.0 ± 1.4", "66.0 ± 1.4", "71.0 ± 1.4"]
    assert seen["width"] <= 380  # what is wider scrolls in its own box


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_light_or_dark(results, tmp_path, browse, scheme):
    from matplotlib.image import imread

    write_report([results], tmp_path / "page.html")
    shot = tmp_path / "shot.png"
    dark = {"light": "1", "dark": "0"}[scheme]
    browse(tmp_path / "page.html", f"--screenshot={shot}", "--window-size=900,700",
           f"--blink-settings=preferredColorScheme={dark}")  # fmt: skip
    pixels = imread(shot)[..., :3]
    assert pixels.shape == (700, 900, 3) and pixels.std() > 0.02
    assert (pixels[:10].mean() > 0.9) == (scheme == "light")
