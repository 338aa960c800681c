"""Every kind of score that is written is read, and what agrees in tasks and metrics is one table."""

import pytest

from osrm_peft.evaluation import answer
from osrm_peft.evaluation.page import html_report
from osrm_peft.evaluation.page_table import Links, curves, table_view
from osrm_peft.evaluation.results import gather
from osrm_peft.evaluation.scored import adapters_alone, combine
from osrm_peft.selection.selection import RULES
from tests.helpers.pages import Page, evaluation, merge, put, rows, scored, selection


def folder(root, name, *values, **manifest):
    """A folder with a manifest that has scores of p and q."""
    space = "weight" if manifest.get("kind") == "emr" else "core"
    about = merge("p", "q", **{"space": space, **manifest})
    return put(root / name / "osrm_peft.json", about | {"scores": scored(*values)}).parent


def adapter_of(root, task, value, **score):
    metric = {"p": "accuracy", "q": "matthews"}[task]
    about = {"kind": "adapter", "task": task, "scores": scored(value, tasks=(task,), metrics=(metric,), **score)}
    return put(root / task / "osrm_peft.json", about).parent


def tables(*paths):
    return combine(gather(paths).lines())


def names(table):
    return [line.name for line in table.lines]


def test_each_kind_of_score_is_a_line_of_one_table(tmp_path):
    folder(tmp_path, "ties", 0.5, 0.4, method="ties", scale=0.3, options={"density": 0.4, "trim": "model"})
    folder(tmp_path, "emr", 0.9, 0.8, method="emr", scale=1.0, kind="emr")
    folder(tmp_path, "model", 0.62, 0.4, method="lore", scale=1.5, kind="checkpoint", rank=16)
    put(tmp_path / "mine.json", evaluation("far/away", {"q": 0.3, "p": 0.2}, kind="merged", method="iso", scale=1.0))
    put(tmp_path / "demo/scores.json", {"scores": rows("p", "q", method="dare")})
    put(tmp_path / "chosen/selection.json", selection())
    (table,) = tables(tmp_path)
    assert table.metrics == {"p": "accuracy", "q": "matthews"}
    assert names(table) == [
        "emr, λ 1", "emr, λ 1", "tsv, λ 1", "dare, λ 1", "tsv, λ 0.5", "dare, λ 0.3",
        "lore, rank 16, λ 1.5", "ties, density 0.2, λ by features", "average, λ 1", "ties in core, density 0.4, λ 0.3",
        "iso, λ 1",
    ]  # fmt: skip
    assert [line.name for line in table.references] == [
        "individual adapters", "base under the heads", "individual adapters",
    ]  # fmt: skip
    assert gather([tmp_path]).summary() == "selections: 1, scores: 1, evaluations: 4, merged: 3"


def test_a_file_of_evaluate_is_told_by_its_first_line(tmp_path):
    put(tmp_path / "scores.json", evaluation("a", {"p": 0.5}, kind="merged", method="iso"))
    measured = {"tasks": {"p": {"metric": "accuracy", "rows": 31, "split": "validation"}}}
    put(tmp_path / "some.json", evaluation("b", {"p": 0.4}, kind="merged", method="ties") | measured)
    put(tmp_path / "tokenizer.json", '{"scores": [broken')
    put(tmp_path / "config.json", {"hidden": {"scores": {"p": 0.4}}})
    (table,) = tables(tmp_path)
    assert names(table) == ["iso", "ties"]
    assert table.metrics == {"p": "accuracy"} and [line.rows for line in table.lines][1] == {"p": 31}


def test_the_scores_of_a_sweep_are_a_line_for_each_of_its_folders(tmp_path):
    for scale in (0.3, 1.0):
        folder(tmp_path, f"sweep/scale_{scale}", method="ties", scale=scale, space="weight")
    by_name = {"sweep/scale_0.3": {"p": 0.5, "q": 0.4}, "sweep/scale_1.0": {"p": 0.6, "q": 0.5}}
    content = evaluation(tmp_path / "sweep", by_name, 60, kind="merged", method="ties", scale=0.3)
    put(tmp_path / "sweep.json", content)
    (table,) = tables(tmp_path)
    found = [(line.name, line.place.name) for line in table.lines]
    assert found == [("ties, λ 1", "scale_1.0"), ("ties, λ 0.3", "scale_0.3")]
    put(tmp_path / "sweep.json", content | {"settings": {"adapter": "user/on_the_hub"}})
    assert names(tables(tmp_path)[0]) == ["ties", "ties, λ 0.3"]  # the file has the manifest of the first


def test_other_tasks_or_another_metric_make_another_table(tmp_path):
    folder(tmp_path, "a", 0.5, 0.4, method="ties")
    folder(tmp_path, "b", 0.4, method="lore")
    other = merge("p", "q") | {"scores": scored(0.9, 0.9, metrics=("accuracy", "accuracy"))}
    put(tmp_path / "c/osrm_peft.json", other)
    assert [table.metrics for table in tables(tmp_path)] == [
        {"p": "accuracy", "q": "matthews"},
        {"p": "accuracy", "q": "accuracy"},
        {"p": "accuracy"},
    ]


def test_a_folder_that_was_scored_on_other_rows_is_there_twice_and_the_same_scores_once(tmp_path):
    place = folder(tmp_path, "a", 0.5, 0.4)
    put(tmp_path / "same.json", evaluation(place, {"p": 0.5, "q": 0.4}, kind="merged", method="lore", scale=0.3))
    put(tmp_path / "few.json", evaluation(place, {"p": 0.7, "q": 0.6}, 50, kind="merged", method="lore", scale=0.3))
    (table,) = tables(tmp_path)
    assert [(line.rows, line.place.name) for line in table.lines] == [
        ({"p": 50, "q": 50}, "a"),
        ({"p": 200, "q": 200}, "a"),
    ]
    page = Page(html_report(gather([tmp_path])))
    assert [row[-1] for row in page.tables[0][1:]] == ["100", "400"]
    assert [row[0] for row in page.tables[0][1:]] == ["lore a · few.json", "lore a"]
    assert page.tables[0][0][-3:] == ["p accuracy · 50–200 rows", "q matthews · 50–200 rows", "rows scored"]
    assert "Not all lines are of the same rows" in html_report(gather([tmp_path]))


def test_a_merge_is_compared_with_the_adapters_that_it_is_made_of(tmp_path):
    for kind, better in (("plain", 0.0), ("osrm", 0.1)):
        inputs = {task: {"source": str(adapter_of(tmp_path / kind, task, 0.7 + better))} for task in ("p", "q")}
        folder(tmp_path, f"of_{kind}", 0.5, 0.4, inputs=inputs)
    folder(tmp_path, "of_others", 0.5, 0.4)
    results = gather([tmp_path])
    (table,) = combine(results.lines())
    found = {line.place.name: line.alone for line in table.lines}
    assert found == {"of_plain": pytest.approx(0.7), "of_osrm": pytest.approx(0.8), "of_others": None}
    assert len(adapters_alone(results.lines())) == 4


def test_a_merge_is_compared_with_the_only_adapters_of_its_tasks(tmp_path):
    folder(tmp_path, "a", 0.5, 0.4)
    adapter_of(tmp_path, "p", 0.7)
    assert tables(tmp_path)[0].lines[0].alone is None  # that of q was not scored
    adapter_of(tmp_path, "q", 0.9)
    assert tables(tmp_path)[0].lines[0].alone == pytest.approx(0.8)


def test_a_winner_s_folder_is_the_line_of_its_selection(tmp_path):
    put(tmp_path / "selection.json", selection())
    folder(tmp_path, "winner", 0.75, 0.55, method="tsv", scale=1.0)  # as the selection's test line
    (table,) = tables(tmp_path)
    assert names(table).count("tsv, λ 1") == 1
    assert [line.place and line.place.name for line in table.lines if line.winner] == ["winner"]
    folder(tmp_path, "winner", 0.76, 0.55, method="tsv", scale=1.0)  # scored anew
    assert names(tables(tmp_path)[0]).count("tsv, λ 1") == 2


def test_a_candidate_on_fewer_rows_is_folded_and_marked_in_the_curve(tmp_path):
    made = selection()
    made["ranked"][2]["candidate"] |= {"method": "tsv", "scale": 2.0}
    made["ranked"][2]["name"] = "tsv, λ 2"
    put(tmp_path / "selection.json", made)
    (table,) = tables(tmp_path)
    view = table_view(table, Links(None))
    assert [row["line"].name for row in view["dropped"]] == ["tsv, λ 2"]
    assert view["dropped"][0]["rows"]["text"] == "80" and view["dropped"][0]["off"] == ""  # adapters on other rows
    (points,) = curves(table)["tsv"].values()
    assert [(point.scale, point.dropped) for point in points] == [(1.0, False), (0.5, False), (2.0, True)]
    assert "1 candidates that dropped out" in html_report(gather([tmp_path]))


def test_results_that_differ_by_task_are_ranked_apart(tmp_path):
    put(tmp_path / "selection.json", selection())
    put(tmp_path / "scores.json", {"scores": rows("p", "q", method="emr")})
    groups = table_view(tables(tmp_path)[0], Links(None))["groups"]
    assert {title: [row["line"].method for row in lines] for title, lines in groups.items()} == {
        "": ["tsv", "tsv", "average"],
        "With a mask for each task": ["emr", "emr", "emr"],
    }


def test_a_seed_s_own_rows_are_read_until_the_demo_is_finished(tmp_path):
    put(tmp_path / "seed42/scores.json", rows())
    assert len(gather([tmp_path]).scores) == 1
    put(tmp_path / "scores.json", {"scores": rows()})
    assert [found.name for found in gather([tmp_path]).scores] == [str(tmp_path)]


def said(root, **made):
    put(root / "selection.json", selection(**made))
    (found,) = gather([root / "selection.json"]).selections
    return answer.of_choice(found.content)


def test_the_answer_says_which_merge_why_how_sure_and_at_what_cost(tmp_path):
    folder(tmp_path, "winner", 0.75, 0.55, method="tsv", scale=1.0, written_rank=48)
    put(tmp_path / "winner/adapter_model.safetensors", "x" * 1_500_000)
    folder(tmp_path, "best_per_task", 0.85, 0.7, method="emr", kind="emr")
    put(tmp_path / "best_per_task/emr.safetensors", "x" * 2_000_000)
    found = said(tmp_path)
    assert found.merge == "tsv, λ 1" and found.certain and found.folder == tmp_path / "winner"
    assert found.why == (
        "It is the best of 3 candidates by the mean score over tasks, on 400 rows of 2 tasks that took no part in "
        "training."
    )
    assert found.facts == {
        "Score": "70.0 [68.0, 72.0], the mean over 2 tasks; the adapters alone 80.0, the base 20.0",
        "How sure": "It is 5.0 ahead of the next, tsv, λ 0.5 [3.0, 7.0]: more than chance.",
        "Adaptation kept": "80 % of what the adapters learned [78, 82]",
        "On rows that had no say in the choice": "65.0 [63.0, 67.0]; the adapters alone 80.0, the base 20.0",
        "What it costs": "One adapter for all tasks, rank 48, 1.5\N{NO-BREAK SPACE}MB.",
        "With a mask for each task": "emr, λ 1 has 77.5 [75.5, 79.5]; a mask for each task at serving time, rank 24, "
        "2.0\N{NO-BREAK SPACE}MB",
    }


@pytest.mark.parametrize(
    "made, expected",
    [
        ({"behind": -0.01}, "It is 1.0 ahead of the next, tsv, λ 0.5 [−1.0, 3.0]: within chance, so either will do."),
        ({"sure": False}, "It is 5.0 ahead of the next, tsv, λ 0.5; how much of that is chance is not known."),
        ({"behind": None}, "Nothing else was scored on as many rows."),
    ],
)
def test_the_answer_says_what_is_chance(tmp_path, made, expected):
    assert said(tmp_path, **made).facts["How sure"] == expected


def test_the_answer_and_the_order_follow_the_rule(tmp_path):
    found = said(tmp_path, rule="worst")
    assert RULES["worst"] in found.why and found.facts["Ranked by"] == "85.0 [83.0, 87.0] % of the adapter alone"
    put(tmp_path / "other/scores.json", {"scores": rows("p", "q", method="dare")})
    (table,) = tables(tmp_path)
    assert table.rule and [line.value is not None for line in table.lines] == [True] * 4 + [False] * 3
    page = Page(html_report(gather([tmp_path])))
    assert "ranked by % of alone" in page.tables[0][0] and "aria-sort" not in page.all("th")[2]


def test_without_a_selection_the_best_is_named_with_a_caveat(tmp_path):
    folder(tmp_path, "a", 0.5, 0.4, method="ties", scale=1.0, written_rank=8)
    folder(tmp_path, "b", 0.6, 0.4, method="lore", scale=0.3)
    folder(tmp_path, "c", 0.9, 0.9, method="emr", scale=1.0, kind="emr")
    found = answer.of_scores(tables(tmp_path)[0])
    assert found.merge == "lore, λ 0.3" and not found.certain and found.folder == tmp_path / "b"
    assert found.facts["Score"] == "50.0, the mean over 2 tasks" and "5.0 behind" in found.facts["The next"]
    assert "too high" in found.facts["How sure"] and found.facts["With a mask for each task"] == "emr, λ 1 has 90.0"


def test_folders_and_cards_beside_the_page_are_linked_by_relative_addresses(tmp_path):
    odd = "javascript:alert(1)#?%"
    for name in ("a", odd, "far/b"):
        folder(tmp_path / "work", f"merged/{name}", 0.5, 0.4)
    put(tmp_path / "work/merged/a/README.md", "a card")
    page = tmp_path / "work/results/report.html"
    links = [one["href"] for one in Page(html_report(gather([tmp_path / "work"]), page.parent)).all("a")]
    assert {"../merged/a", "../merged/a/README.md", "../merged/far/b"} <= set(links)
    assert "../merged/javascript%3Aalert%281%29%23%3F%25" in links
    assert Links(tmp_path / "work/merged").to(tmp_path / "work/merged" / odd).startswith("./javascript%3A")
    assert Links(tmp_path / "elsewhere/results").to(tmp_path / "work/merged/a") is None  # would show other folders
    assert not any(str(tmp_path) in one for one in links)


def test_no_selection_s_winner_is_an_adapter_of_another_place(tmp_path):
    put(tmp_path / "selection.json", selection())
    (found,) = gather([tmp_path]).selections
    assert [line.place for line in found.content.lines] == [None] * 6
