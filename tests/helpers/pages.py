"""Results folders of every kind, and a reader of the page that is made of them."""

import json
import math
from html.parser import HTMLParser

import torch

from osrm_peft.evaluation.interference import Interference, Solve
from osrm_peft.merging.overlap import Overlap
from osrm_peft.selection.selection import Estimate, Line, Selection

SCRIPT = "<script>document.body.id='pwned'</script>"
IMAGE = '"><img src=x onerror="document.body.id=\'pwned\'">'


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
    shared = torch.full_like(matrix, 0.9).fill_diagonal_(1)
    unknown = Overlap(*[shared * math.nan] * 3, math.nan)
    overlap = {"layer.0": Overlap(shared, shared, shared / 30, 0.7), "layer.1": unknown}
    solves = {"layer.0": Solve(math.inf, 1e-6, None)}
    layers = {"layer.0": matrix, "layer.1": matrix}
    return Interference(list(tasks), layers, "base", overlap, {"layer.0": unknown}, solves).to_dict()


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


def estimate(value, off=0.02, sure=True):
    """A score with its interval."""
    return Estimate(value, value - off, value + off) if sure else Estimate(value)


def line(name, scores, *, rows=200, behind=None, kept=0.8, value=None, sure=True, **candidate):
    """A line of a selection; `candidate` is its method and scale."""
    mean = sum(scores.values()) / len(scores)
    return Line(
        name,
        rows,
        {task: estimate(score, sure=sure) for task, score in scores.items()},
        estimate(mean, sure=sure),
        estimate(mean if value is None else value, sure=sure),
        estimate(kept) if candidate else None,
        None if behind is None else estimate(behind, sure=sure),
        candidate or None,
    )


def selection(p="p", q="q", *, behind=-0.05, rule="mean", sure=True, method="tsv", **others):
    """What `osrm-peft select` writes: two candidates on all rows, one that dropped out, EMR, and the test."""
    value = None if rule == "mean" else 0.85
    both = {"rows": 200, "test_rows": 150}
    ranked = [
        line(f"{method}, λ 1", {p: 0.8, q: 0.6}, sure=sure, value=value, method=method, scale=1.0),
        line(f"{method}, λ 0.5", {p: 0.7, q: 0.6}, sure=sure, value=value, behind=behind, method=method, scale=0.5),
        line("ties, density 0.2, λ by features", {p: 0.5, q: 0.5}, rows=40, sure=sure, value=value, behind=-0.2,
             method="ties", scale=None),
    ]  # fmt: skip
    apart = [line("emr, λ 1", {p: 0.85, q: 0.7}, sure=sure, value=value, method="emr", scale=1.0)]
    alone, bare = line("individual adapters", {p: 0.9, q: 0.7}), line("base under the heads", {p: 0.3, q: 0.1})
    test = [line(f"{method}, λ 1", {p: 0.75, q: 0.55}, rows=300, method=method, scale=1.0)]
    test = [line("emr, λ 1", {p: 0.8, q: 0.7}, rows=300, method="emr", scale=1.0), *test, alone, bare]
    tasks = {p: {"metric": "accuracy", **both}, q: {"metric": "matthews", **both}}
    made = {"settings": {"rows": 512}, "inputs": {p: {}, q: {}}, "candidates": [one.name for one in ranked]} | others
    return Selection(rule, tasks, ranked, apart, alone, bare, test, None, None, made).to_dict()


def scored(*values, metrics=("accuracy", "matthews"), tasks=("p", "q"), rows=200):
    """The scores of a manifest."""
    return [
        {"task": task, "metric": metric, "value": value, "split": "validation", "rows": rows, "dataset": None}
        for task, metric, value in zip(tasks, metrics, values, strict=False)
    ]


def evaluation(adapter, scores, rows=None, **manifest):
    """The file of `osrm-peft evaluate --out`."""
    settings = {"adapter": str(adapter), "suite": "packaged", "model": None, "rows": rows, "max_length": 128}
    return {"scores": scores, "settings": settings, "manifest": manifest, "versions": {"peft": "0.21"}}


def fill(root):
    """Every kind of result, as the commands write them."""
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


def fill_with_html(root):
    """Every name that a file can bring in is a piece of HTML."""
    names, about = (SCRIPT, IMAGE), {"settings": {SCRIPT: IMAGE, IMAGE: [SCRIPT]}}
    scores = [row | {"init": SCRIPT + row["init"]} for row in rows(*names, method=IMAGE)]
    put(root / "scores.json", {"scores": scores} | about)
    put(root / "interference.json", {"interference": {SCRIPT: {IMAGE: crosstalk(*names)}}} | about)
    put(root / "cross/interference.json", crosstalk(*names) | about)
    put(root / "spectrum.json", {"singular_values": {SCRIPT: {IMAGE: [2.0, 1.0]}, IMAGE: {"w": [1.0]}}} | about)
    put(root / IMAGE / "osrm_peft.json", adapter(SCRIPT, IMAGE) | about)
    put(root / "merged/osrm_peft.json", merge(*names, method=SCRIPT, space=IMAGE, written_rank=SCRIPT) | about)
    put(root / "selection.json", selection(*names, method=SCRIPT) | about)
    put(root / "evaluated.json", evaluation(IMAGE, {SCRIPT: 0.5, IMAGE: 0.4}, kind="merged", method=SCRIPT, scale=0.3))


class Page(HTMLParser):
    """Tables as lists of rows of texts, the best of each table, headings, and every attribute, of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.marked, self.headings, self.open = [], [], [], [], []
        self.feed(text)
        self.tables = [[[" ".join(cell.split()) for cell in row] for row in table] for table in self.tables]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
            self.marked.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif self.in_cell() and tag != "wbr":
            self.tables[-1][-1][-1] += " "
        if tag not in ("img", "meta", "wbr", "input"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        closed, attributes = self.open.pop()
        assert closed == tag
        if "best" in attributes.get("class", "").split():
            self.marked[-1].append(" ".join(self.tables[-1][-1][-1].split()))

    def handle_data(self, data):
        if self.in_cell():
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1][0] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def in_cell(self):
        return any(tag in ("td", "th") for tag, _ in self.open)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]
