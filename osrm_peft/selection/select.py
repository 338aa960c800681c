"""select_merge: merge every candidate once, score on held-out rows, rank, and say how sure the choice is."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from osrm_peft.adapters.live import LiveBase
from osrm_peft.adapters.lora_adapter import LoraAdapter
from osrm_peft.checks import choice, integer
from osrm_peft.evaluation.text import written_by
from osrm_peft.hub.privacy import public_name
from osrm_peft.io.manifest import command, versions
from osrm_peft.io.places import alone_in, check_folder
from osrm_peft.merging.emr_adapter import EMRAdapter
from osrm_peft.merging.inputs import Adapters, Inputs, check_names, gather
from osrm_peft.merging.merge import execute
from osrm_peft.merging.merged_adapter import MergedAdapter
from osrm_peft.merging.plan import MergePlan, plan_merge
from osrm_peft.merging.statistics import Statistics
from osrm_peft.models.identity import weight_files
from osrm_peft.models.loading import load_tokenizer
from osrm_peft.models.packaged import resolve_model
from osrm_peft.selection.candidates import Candidate, default_candidates, expand, read_candidates
from osrm_peft.selection.contestants import Alone, Contestant, Merge, Scorer
from osrm_peft.selection.folder import SelectionFolder
from osrm_peft.selection.race import FACTOR, rounds, survivors
from osrm_peft.selection.selection import Estimate, Line, Selection, kept_of, value_of
from osrm_peft.selection.split import Split
from osrm_peft.tasks.task import Task, fingerprint
from osrm_peft.tasks.text import TextTask

Rule = Literal["mean", "relative", "worst"]
Score = Callable[[PreTrainedModel, Task], float]
MOST_BYTES = 4 * 2**30  # of merges in memory; more are merged again when they are scored again


def select_merge(
    adapters: Adapters,
    candidates: Sequence[Mapping[str, Any]] | str | Path | None = None,
    score: Score | None = None,
    *,
    tasks: Mapping[str, Task],
    base_model: str | None = None,
    rule: Rule = "mean",
    rows: int | None = 512,
    features: Statistics | None = None,
    gram: Statistics | None = None,
    fisher: Statistics | None = None,
    max_length: int = 128,
    seed: int = 0,
    rank: int | Literal["serving"] | None = None,
    halving: bool = True,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Selection:
    """Choose a merge of these adapters by its scores on held-out rows of every task.

    Each candidate is merged once; candidates that differ in λ share a merge. All are scored on few rows, the best third
    (and those within one standard error of the best) on three times as many, the last on all: successive halving. The
    base model is loaded once, and takes each task vector into its weights. Half of the validation rows, or the tasks'
    own test rows, have no say; the winner is scored on them last.

    Args:
        adapters: {task: folder, Hub id, live PeftModel or LoraAdapter}.
        candidates: merge recipes without files, `{"method": "ties", "scale": [0.5, 1.0], "rank": 16}`, where a list is
            a sweep; or a YAML file of them. None: our tables' best over their scales, as far as files are given.
        score: score(model, task) → higher is better, on `task.validation`; `model` is the base model with the adapter
            in its weights. None: the task's metric; only then are there error bars.
        tasks: {task: its rows}, the names as in `adapters`.
        base_model: the base model, where the adapters name it differently.
        rule: `"mean"` over tasks, `"relative"` (the mean of score / individual score), or `"worst"` (the least).
        rows: rows a task to choose on, at most, and as many for the test; None: all.
        features, gram, fisher: {task: file or object} for weights and λ by features, RegMean and Fisher merging.
        max_length, seed: tokens a row is cut to; of the order of rows and of the resamples.
        rank: of the candidates that do not name one, see `merge_adapters`.
        halving: False scores every candidate on all rows.
        out: folder for `selection.json`, `selection.md`, `winner`, `best_per_task` (the best whose result differs by
            task), and `cache`, by which an interrupted selection goes on; not of live adapters or a `score` of yours.
        overwrite: replace another selection in `out`.
        progress: show a bar over rows with the time that is left.

    Raises:
        FileExistsError: `out` holds something else, or another selection (without `overwrite`).
        ValueError: from the checks of each merge, before any is made; other tasks than adapters; too few rows.
    """
    choice("rule", rule, get_args(Rule))
    if out is not None:
        check_folder(out)
    files = {"features": features, "gram": gram, "fisher": fisher, "base_model": base_model}
    found = _candidates(candidates, len(adapters), files, rank)
    integer("max_length", max_length, 1)
    field = _Field.of(adapters, found, files, tasks, rows, integer("seed", seed, 0), score is not None)
    settings = {"rule": rule, "rows": rows, "max_length": max_length, "seed": seed, "halving": halving}
    return _select(field, settings, score, out, overwrite, progress)


def _select(field: "_Field", settings: dict[str, Any], score: Any, out: Any, overwrite: bool, bars: bool) -> Selection:
    """Claim the folder, which no other process writes to meanwhile, and fill it."""
    named = None if score is None else getattr(score, "identity", None) or getattr(score, "__name__", "a function")
    made = field.made() | {"settings": settings | {"score": named}}
    with nullcontext() if out is None else alone_in(check_folder(out)):
        folder = None if out is None else SelectionFolder(out, made, overwrite)
        selection = _run(field, settings, score, folder, made, bars)
    return selection


def _run(field: "_Field", settings: dict[str, Any], score: Any, folder: Any, made: Any, bars: bool) -> Selection:
    """Run the race, and write what it found."""
    field.read(None if folder is None else folder.cache, settings["max_length"], score)
    live, tokenizer = LiveBase(field.base), load_tokenizer(field.base)
    lengths = {name: settings[name] for name in ("max_length", "seed")}
    scorer = Scorer(field.rows, live, tokenizer, score=score, **lengths)
    race = _Race(scorer, settings["rule"], field, settings["halving"])
    with tqdm(total=race.work(), desc="select", unit="row", disable=not bars) as bar:
        scorer.step = lambda what, count: (bar.set_postfix_str(what[:60]), bar.update(count))  # type: ignore[assignment]
        ranked, apart = (race.run(group) for group in race.groups)
        selection = race.selection(ranked, apart, race.test(ranked, apart), made)
    if folder is not None:
        folder.write(selection)
    return selection


def _candidates(given: Any, adapters: int, files: Mapping[str, Any], rank: Any) -> list[Candidate]:
    if given is None:
        found = default_candidates(adapters, files)
    else:
        found = read_candidates(given) if isinstance(given, (str, Path)) else expand(given)
    return [one if rank is None or one.per_task else one.of_rank(rank) for one in found]


class _Merges:
    """The merges of the plans, each made when it is first asked for, and kept while all of them fit into memory."""

    def __init__(self, plans: Mapping[str, MergePlan]) -> None:
        self.plans, self.made = plans, dict[str, MergedAdapter | EMRAdapter]()
        self.last: tuple[str, float | None, MergedAdapter | EMRAdapter] | None = None
        self.keeps_all = sum(plan.output_bytes() for plan in plans.values()) <= MOST_BYTES

    def of(self, key: str) -> MergedAdapter | EMRAdapter:
        """The merge of this plan, at the scale of the plan."""
        if key not in self.made:
            if not self.keeps_all:
                self.made.clear()
            self.made[key] = execute(self.plans[key])
        return self.made[key]

    def at(self, key: str, scale: float | None) -> MergedAdapter | EMRAdapter:
        """The merge at this scale; the last one that was asked for is kept."""
        if self.last is None or self.last[:2] != (key, scale):
            merged = self.of(key)
            self.last = key, scale, merged if scale is None else merged.at_scale(scale)
        return self.last[2]


@dataclass
class _Field:
    """All that takes part: checked, and nothing merged or loaded yet.

    Attributes:
        inputs: the adapters.
        base: the base model's name.
        rows: {task: its rows}.
        candidates: in the order given.
        contestants: one a candidate.
        alone: the adapters, each on its own task.
        bare: the base model under the adapters' heads.
    """

    inputs: Inputs
    base: str
    rows: dict[str, Split]
    candidates: list[Candidate]
    contestants: list[Contestant]
    alone: Contestant
    bare: Contestant

    @classmethod
    def of(
        cls,
        adapters: Adapters,
        candidates: list[Candidate],
        files: Mapping[str, Any],
        tasks: Mapping[str, Task],
        rows: Any,
        seed: int,
        own_score: bool = False,
    ) -> "_Field":
        if set(tasks) != set(check_names(adapters)):
            raise ValueError(f"tasks {sorted(tasks)} for adapters {sorted(adapters)}: give each adapter its task")
        for kind, given in files.items():
            unknown = sorted(set(given) - set(tasks)) if isinstance(given, Mapping) else []
            if unknown:
                raise ValueError(f"{kind} of {', '.join(unknown)}, which are no tasks of the adapters {sorted(tasks)}")
        inputs = gather(adapters, base_model=files.get("base_model"), heads="per_task")
        if inputs.base is None:
            raise ValueError("the adapters name no base model: give base_model=, its Hub id or folder")
        causal = [
            name
            for name, one in inputs.adapters.items()
            if one.config.get("task_type") == "CAUSAL_LM" and not isinstance(tasks[name], TextTask)
        ]
        if causal and not own_score:
            raise ValueError(
                f"the adapter of {causal[0]!r} is of a causal language model, which has no head for the classes of a "
                "task: give tasks in words (rows of prompt and completion), or a score of your own, score= (--score)"
            )
        plans: dict[str, MergePlan] = {}
        for candidate in candidates:
            if candidate.merge not in plans:
                plans[candidate.merge] = plan_merge(candidate.request(inputs.adapters, files, sweep=True))
        merges, contestants = _Merges(plans), []
        for candidate in candidates:
            entry = Merge(partial(merges.at, candidate.merge, candidate.scale))
            sources = plans[candidate.merge].sources
            about = [candidate.merge, candidate.scale, {kind: _hashes(found) for kind, found in sources.items()}]
            contestants.append(Contestant(candidate.name, entry, about))
        alone = Contestant("individual adapters", Alone(inputs.adapters), "individual")
        bare = Contestant("base under the heads", Alone(inputs.adapters, bare=True), "base")
        split = {name: Split.of(tasks[name], rows, seed) for name in inputs.adapters}
        return cls(inputs, inputs.base, split, candidates, contestants, alone, bare)

    def read(self, cache: Path | None, max_length: int, score: Score | None) -> None:
        """Take over what an earlier run has found."""
        hashes = {name: [one.sha256, _config_hash(one)] for name, one in self.inputs.adapters.items()}
        identity = getattr(score, "identity", None)  # of a function nobody knows whether it is the same
        known = all(weights is not None for weights, _ in hashes.values())
        if cache is None or not known or (score is not None and identity is None):
            return
        rows = self.fingerprints
        made = {name: versions()[name] for name in ("osrm_peft", "torch", "transformers")}
        context = [
            hashes,
            identity,
            public_name(self.base),
            weight_files(resolve_model(self.base)),
            rows,
            max_length,
            made,
        ]
        for contestant in (self.alone, self.bare, *self.contestants):
            contestant.read(cache, context)

    @cached_property
    def fingerprints(self) -> dict[str, list[str]]:
        """{task: hashes of the rows that choose, and of the rows for the test}."""
        return {
            name: [fingerprint(task.validation) for task in (one.choose, one.test) if task is not None]
            for name, one in self.rows.items()
        }

    def made(self) -> dict[str, Any]:
        """How the selection is made, for its file."""
        inputs = {
            name: {"source": one.source, "sha256": one.sha256, "config": _config_hash(one), "rank": one.rank}
            for name, one in self.inputs.adapters.items()
        }
        names = [candidate.name for candidate in self.candidates]
        data = {name: [one.choose.metric, *self.fingerprints[name]] for name, one in self.rows.items()}
        about = {"base_model": self.base, "inputs": inputs, "candidates": names, "data": data}
        return about | {"command": command(), "versions": versions()}


_Ranking = list[tuple[Contestant, float]]  # best first, each with the share of the rows that it was scored on


class _Race:
    """The candidates against each other, on more and more rows."""

    def __init__(self, scorer: Scorer, rule: str, field: _Field, halving: bool) -> None:
        self.scorer, self.rule, self.field, self.halving = scorer, rule, field, halving
        pairs = list(zip(field.contestants, field.candidates, strict=True))
        self.candidate_of = {contestant.name: candidate for contestant, candidate in pairs}
        self.groups = [[one for one, candidate in pairs if candidate.per_task is apart] for apart in (False, True)]

    def shares(self, group: Sequence[Contestant]) -> list[float]:
        """The share of the rows in each round."""
        largest = max(len(rows.choose.validation) for rows in self.field.rows.values())
        return rounds(len(group), largest) if self.halving else [1.0]

    def work(self) -> int:
        """Rows that there are to score, about."""
        choose = sum(len(rows.choose.validation) for rows in self.field.rows.values())
        test = sum(0 if rows.test is None else len(rows.test.validation) for rows in self.field.rows.values())
        total = 2.0 * choose + test * (2 + sum(map(bool, self.groups)))
        for group in self.groups:
            before, number = 0.0, len(group)
            for share in self.shares(group):
                total += number * (share - before) * choose
                before, number = share, -(-number // FACTOR)
        return int(total)

    def run(self, group: Sequence[Contestant]) -> _Ranking:
        """All of the group, best first; those that dropped out early last."""
        alive, out = list(group), _Ranking()
        for share in self.shares(group) if group else []:
            values = [self.value(contestant, share) for contestant in alive]
            order = sorted(range(len(alive)), key=lambda place: -values[place][0])
            stay = order if share == 1 else survivors(values)
            out = [(alive[place], share) for place in order if place not in stay] + out
            alive = [alive[place] for place in stay]
        return [(contestant, 1.0) for contestant in alive] + out

    def value(self, contestant: Contestant, share: float) -> np.ndarray:
        """(1 + B,) what the rule ranks by."""
        return value_of(self.rule, self.scorer.on(contestant, share), self.alone())

    def alone(self) -> dict[str, float]:
        """{task: the score of its own adapter on all rows that choose}, what the rules compare with."""
        return {task: float(values[0]) for task, values in self.scorer.on(self.field.alone, 1.0).items()}

    def test(self, *rankings: _Ranking) -> list[Line]:
        """The best of each ranking, the adapters and the base, on rows that had no say in the choice."""
        alone, bare = (self.scorer.on_test(one) for one in (self.field.alone, self.field.bare))
        if not alone:
            return []
        rows = sum(0 if one.test is None else len(one.test.validation) for one in self.field.rows.values())
        entries = [*(ranking[0][0] for ranking in rankings if ranking), self.field.alone, self.field.bare]
        return [self._line(one, rows, self.scorer.on_test(one), alone, bare) for one in entries]

    def selection(self, ranked: _Ranking, apart: _Ranking, test: list[Line], made: dict[str, Any]) -> Selection:
        """The result."""
        tasks = {
            name: {
                "metric": rows.choose.metric,
                "rows": len(rows.choose.validation),
                "test_rows": 0 if rows.test is None else len(rows.test.validation),
                **written_by(rows.choose, self.scorer.tokenizer),
            }
            for name, rows in self.field.rows.items()
        }
        winners: list[Any] = [ranking[0][0].entry.make() if ranking else None for ranking in (ranked, apart)]  # type: ignore[attr-defined]
        alone, bare = (self.lines([(one, 1.0)])[0] for one in (self.field.alone, self.field.bare))
        lines, others = self.lines(ranked), self.lines(apart)
        made = made | {"rows_scored": self.scorer.scored}
        return Selection(self.rule, tasks, lines, others, alone, bare, test, winners[0], winners[1], made)

    def lines(self, ranking: _Ranking) -> list[Line]:
        """The lines of a ranking; each is compared with the first on the rows that it was scored on itself."""
        lines = []
        for place, (contestant, share) in enumerate(ranking):
            scores, alone, bare = (
                self.scorer.on(one, share) for one in (contestant, self.field.alone, self.field.bare)
            )
            behind = self.value(contestant, share) - self.value(ranking[0][0], share) if place else None
            rows = sum(self.scorer.size(task, share) for task in self.field.rows)
            lines.append(self._line(contestant, rows, scores, alone, bare, behind))
        return lines

    def _line(
        self, contestant: Contestant, rows: int, scores: Any, alone: Any, bare: Any, behind: np.ndarray | None = None
    ) -> Line:
        candidate = self.candidate_of.get(contestant.name)
        return Line(
            contestant.name,
            rows,
            {task.removesuffix("/test"): Estimate.of(values) for task, values in scores.items()},
            Estimate.of(np.mean(list(scores.values()), axis=0)),
            Estimate.of(value_of(self.rule, scores, {task: float(values[0]) for task, values in alone.items()})),
            None if contestant in (self.field.alone, self.field.bare) else kept_of(scores, alone, bare),
            None if behind is None else Estimate.of(behind),
            None if candidate is None else {**candidate.fields, "scale": candidate.scale},
        )


def _config_hash(adapter: LoraAdapter) -> str:
    """Of an adapter's config, which scales its weights; without the name of its base model."""
    config = {name: value for name, value in adapter.config.items() if name != "base_model_name_or_path"}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _hashes(files: Mapping[str, str]) -> dict[str, str]:
    """{task: what a statistics file holds}, or its name where it is not a file here."""
    return {
        task: hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else name
        for task, name in files.items()
    }
