import base64
import hashlib
import html
import json
import os
import re

import pytest

from osrm_peft.cli import report as cli_report  # noqa: F401 (the command)
from osrm_peft.evaluation.page import html_report
from osrm_peft.evaluation.results import gather
from osrm_peft.evaluation.tables import AVERAGE
from tests.helpers.pages import (
    IMAGE,
    SCRIPT,
    Page,
    adapter,
    crosstalk,
    fill,
    fill_with_html,
    merge,
    put,
    rows,
    scored,
    selection,
)

CSP = re.compile(r"<meta http-equiv=.Content-Security-Policy.*?>")


@pytest.fixture
def results(tmp_path):
    fill(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def hostile(tmp_path):
    root = tmp_path / IMAGE.replace("/", "")
    fill_with_html(root)
    return root


def test_a_page_has_every_kind_of_result(results):
    text = html_report(gather([results]))
    page = Page(text)
    assert not page.open  # every tag is closed
    expected = ["ties, λ 1 of x adapters", "Scores", "Interference", "cross", "demo", "Spectra", "spec", "Drift"]
    expected += ["OSRM", "Merged folders"]
    assert [heading.rpartition("/")[2] for heading in page.headings] == expected
    alts = [image["alt"] for image in page.all("img")]
    assert [alt.partition(" ")[0] for alt in alts] == ["average", "heat", "heat", "singular", "drift"]
    assert "tweets, spam, news" in alts[1] and "plain, OSRM" in alts[2] and "first, second" in alts[4]
    assert "seed7: off the diagonal plain 2 %, OSRM 0.1 %" in " ".join(html.unescape(text).split())
    assert text.count("&#34;k&#34;: 17") == 4 and "0.0321" in text and "&#34;log&#34;" not in text
    _, _, drift, merged = page.tables
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
        ["merge", "λ", "average over tasks", "difference to the adapters alone", "a", "b"],
        ["ties x", "1", "66.0 ± 1.4", "−33.5", "41.0 ± 1.4", "91.0 ± 1.4"],
        ["ties x", "0.3", "56.5 ± 1.4", "−43.0", "51.0 ± 1.4", "62.0 ± 1.4"],
        ["average y", "1", "46.0 ± 1.4", "–", "71.0 ± 1.4", "21.0 ± 1.4"],
        ["To compare with"],
        ["individual adapters x", "", "99.5 ± 1.4", "–", "100.0 ± 1.4", "99.0 ± 1.4"],
    ]
    assert page.tables[1] == [
        ["merge", "λ", "a", "b", AVERAGE],
        ["x", ""],
        ["individual", "", "100.0 ± 1.4", "99.0 ± 1.4", "99.5 ± 1.4"],
        ["ties", "0.3", "51.0 ± 1.4", "62.0 ± 1.4", "56.5 ± 1.4"],
        ["ties", "1", "41.0 ± 1.4", "91.0 ± 1.4", "66.0 ± 1.4"],
        ["y", ""],
        ["average", "1", "71.0 ± 1.4", "21.0 ± 1.4", "46.0 ± 1.4"],
    ]
    assert page.marked[0] == ["66.0 ± 1.4", "91.0 ± 1.4", "71.0 ± 1.4"]  # not the single adapters'
    assert page.marked[1] == ["91.0 ± 1.4", "66.0 ± 1.4", "71.0 ± 1.4"]


def test_equal_means_are_both_the_best(tmp_path):
    """Means over the same seeds' scores in another order: the last bits may differ."""
    orders = {"ties": (0.1, 0.7, 0.3), "lore": (0.3, 0.1, 0.7), "tsv": (0.7, 0.3, 0.1), "average": (0.1, 0.2, 0.3)}
    scores = [
        {"init": "x", "method": method, "scale": 1.0, "seed": seed, "task": "a", "score": score + 1e-12 * len(method)}
        for method, order in orders.items()
        for seed, score in enumerate(order)
    ]
    page = Page(html_report(gather([put(tmp_path / "scores.json", {"scores": scores})])))
    assert [len(marked) for marked in page.marked] == [3, 3]  # in the one column: one task has no average


def test_one_seed_has_no_spread_and_one_scale_no_curve(tmp_path):
    one = [row for row in rows() if row["seed"] == 0 and row["scale"] in (None, 1.0)]
    page = html_report(gather([put(tmp_path / "other.json", {"scores": one})]))
    assert "±" not in page and "<img" not in page and f"The table of {tmp_path}/other.json" in page


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
    assert len(page.all("img")) == 5 and len(page.all("a")) == 5 and len(page.all("script")) == 1
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "svg")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "background")
            if name == "src":
                assert value.startswith("data:image/svg+xml;base64,")
            if name == "href":
                assert value[0] == "#" and value[1:] in ids
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in CSP.search(text)[0] and f"script-src 'sha256-{allowed}'" in CSP.search(text)[0]


def test_a_plot_has_the_colour_and_the_type_of_the_page(results):
    (image, *_) = Page(html_report(gather([results]))).all("img")
    drawn = base64.b64decode(image["src"].partition(",")[2]).decode()
    assert "currentColor" in drawn and "prefers-color-scheme:dark" in drawn and "#010203" not in drawn
    assert "<text" in drawn and "http://www.w3.org/1999/xlink" in drawn and "DOCTYPE" not in drawn
    assert set(re.findall(r"fill: (#\w+)", drawn)) <= {"#3a86d4", "#e0762f"}  # no background


def test_names_from_files_are_text(hostile):
    text = html_report(gather([hostile]))
    page = Page(text)
    assert text.count("<script") == 1 and "<img src=x" not in text
    methods = {box["value"] for box in page.all("input") if box["type"] == "checkbox"}
    assert methods == {IMAGE, SCRIPT, "average", "emr"}
    assert len(page.all("img")) == 5 and all(image["src"].startswith("data:") for image in page.all("img"))
    tables = {table[0][0]: table for table in page.tables}
    assert page.tables[0][0][5:7] == [f"{SCRIPT} accuracy · 200 rows", f"{IMAGE} matthews · 200 rows"]
    assert page.tables[0][1][0].startswith(f"{SCRIPT} winner")
    assert ["merge", "λ", SCRIPT, IMAGE, AVERAGE] in [table[0] for table in page.tables]
    assert [row[0] for row in tables["layer"]] == ["layer", "step", "mean", SCRIPT, IMAGE]
    assert tables["folder"][1][1:] == [SCRIPT, "0.3", IMAGE, SCRIPT, "0.8750", f"{SCRIPT}, {IMAGE}"]
    assert any(SCRIPT in image["alt"] and IMAGE in image["alt"] for image in page.all("img"))
    assert html.escape(SCRIPT).replace("&#x27;", "&#39;") in text.rpartition("<pre>")[2]


def test_names_are_no_mathematics_in_plots(tmp_path):
    """matplotlib refuses the one, and leaves the other out of its legend."""
    odd = (r"$\oops$", "_hidden")
    put(tmp_path / "scores.json", {"scores": rows(*odd, method=odd[0])})
    put(tmp_path / "interference.json", {"interference": {"s": {odd[0]: crosstalk(*odd)}}})
    put(tmp_path / "spectrum.json", {"singular_values": {odd[0]: {"w": [2.0, 1.0]}}})
    put(tmp_path / odd[0] / "osrm_peft.json", adapter())
    assert Page(html_report(gather([tmp_path]))).tables[0][0][4:6] == list(odd)


def test_the_page_says_what_adapters_share(tmp_path):
    put(tmp_path / "interference.json", crosstalk("spam", "news"))
    (found,) = gather([tmp_path]).interference
    one = found.content[""]["adapters"]
    assert one.to_dict() == crosstalk("spam", "news")  # read as it was written, unknown numbers too
    text = html.unescape(html_report(gather([tmp_path])))
    assert f"<p>adapters: {one.verdict()}</p>" in text and one.verdict().startswith("'spam', 'news' share A (")
    assert "on each other's features, and what they share of A and B" in text
    older = {key: value for key, value in crosstalk("spam").items() if key not in ("overlap", "regmean", "verdict")}
    put(tmp_path / "interference.json", older)
    assert "what they share" not in html_report(gather([tmp_path]))


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
        (
            {
                "tasks": ["a"],
                "layers": {},
                "relative_to": None,
                "overlap": {"A": {"layers": {"l": {"shared": [[2, 3]]}}}},
            },
            "overlap of A in layer 'l' is not a matrix of 1 tasks",
        ),
        (crosstalk("a") | {"regmean": {"l": {"condition": "big", "ridge": 0, "exact_ridge": 0}}}, "'l'='big' must be"),
        ({"singular_values": {"m": [1.0]}}, "no attribute 'items'"),
        ({"kind": "merged", "method": "ties"}, "no 'scale'"),
        ({"kind": "adapter", "log": [{"osrm/drift": 0.1}]}, "no 'step'"),
        ({"kind": "adapter", "scores": [{"value": 0.5}]}, "no 'task'"),
        (
            {"kind": "merged", "method": "ties", "scale": 1.0, "inputs": {}, "scores": [scored(0.5)[0] | {"rows": -1}]},
            "rows=-1",
        ),
        ({"scores": {"a": "many"}}, "score of 'a'='many'"),
        ({"scores": {"a": 0.5}, "settings": {"rows": "all"}}, "rows='all'"),
        ({"kind": "selection"}, "no 'tasks'"),
        (selection() | {"ranked": [], "apart": []}, "no candidates"),
        (selection() | {"tasks": {"p": {"metric": "accuracy", "rows": 1.5, "test_rows": 1}}}, "rows=1.5"),
        (selection() | {"base": {"name": "base"}}, "no 'scores'"),
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
    empty = put(tmp_path / "plain/scores.json", {"scores": {}})
    put(tmp_path / "plain/config.json", {"scores_of_attention": 1})
    for path in (results / "demo/adapters/plain", empty.parent, empty):
        assert f"{path} holds no results to show: expected selection.json, scores" in call(
            "report", results, path, "--out", page, code=2
        )
    assert "name it *.html" in call("report", results, "--out", results / "demo/scores.json", code=2)
    assert not page.exists() and json.loads((results / "demo/scores.json").read_text())["scores"]


def test_the_command_writes_the_page(results, tmp_path, call):
    page = tmp_path / "new/page.html"
    said = call("report", results / "demo", results / "one/osrm_peft.json", "--out", page)
    assert said == f"wrote {page}: scores: 1, interference: 1, drift: 2, merged: 1"
    assert page.read_text() == html_report(gather([results / "demo", results / "one/osrm_peft.json"]), page.parent)
