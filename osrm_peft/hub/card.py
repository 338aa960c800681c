"""Model cards, made from a folder's manifest alone."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osrm_peft.hub.privacy import public, public_name
from osrm_peft.io.json import write_json
from osrm_peft.io.manifest import MANIFEST, label_names_in, read_manifest
from osrm_peft.io.places import check_file, new_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

OSRM = "OSRM (Zhang & Zhou, ACL 2025), arXiv:2505.22934"
REPO = "USER/NAME"  # where a card does not know its repository
_LIBRARIES = {"adapter": "peft", "merged": "peft", "checkpoint": "transformers"}
_PIPELINES = {  # {PEFT's task type: (the Hub's name, transformers' class)}
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text-generation", "AutoModelForSeq2SeqLM"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_METRICS = {"matthews": "matthews_correlation"}  # the Hub's names
_RECIPE = ("base_model", "method", "options", "scale", "weights", "space", "rank", "seed", "statistics", "features")
_FACTS = {
    "method": "method", "scale": "scale λ", "space": "space", "seed": "seed", "written_rank": "rank as written",
    "vocab": "vocabulary", "train_rows": "training rows",
}  # fmt: skip
_SETTINGS = (
    "statistic",
    "null_space",
    "objective",
    "protect_rank",
    "protect_energy",
    "min_effect_kept",
    "freeze_a",
    "osrm_seed",
)


class _Plain(str):
    """Text that goes into a card as it is."""


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Write a folder's manifest, and its card `README.md`."""
    card = card_text(manifest)
    write_json(Path(folder) / MANIFEST, manifest)
    with new_file(Path(folder) / "README.md") as path:
        path.write_text(card, encoding="utf-8", errors="backslashreplace")  # a path may hold any bytes


def record_scores(folder: str | Path, scores: list[dict[str, Any]]) -> None:
    """Put scores into a folder's manifest and card, in place of earlier ones of the same tasks.

    Scores by lm-eval stand beside ours, one of each metric.

    Args:
        scores: {"task", "metric", "value"} each, and where known "split", "rows" and "dataset" (its Hub id); of
            lm-eval also "harness", its settings.

    Raises:
        ValueError: the folder has no manifest.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise ValueError(f"{folder} has no {MANIFEST} that could hold scores: osrm_peft did not write it")
    check_own_files(folder)
    places = {_place(score) for score in scores}
    model_card(manifest)  # a damaged manifest shows here
    kept = [score for score in manifest.get("scores") or [] if _place(score) not in places]
    write_manifest(folder, manifest | {"scores": kept + scores})


def _place(score: Mapping[str, Any]) -> tuple[str, str | None]:
    """What a score takes the place of."""
    return score["task"], score["metric"] if score.get("harness") else None


def check_own_files(folder: str | Path) -> None:
    """Check that manifest and card of this folder can be written anew.

    Raises:
        ValueError: they are links out of the folder, as in the Hub's cache, whose files others share.
        FileExistsError, PermissionError: see `check_file`.
    """
    for name in (MANIFEST, "README.md"):
        if not check_file(Path(folder) / name).is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"{Path(folder) / name} is a link out of its folder: copy the folder (of the Hub's cache: download "
                "with local_dir=…), and write there"
            )


def model_card(manifest: Mapping[str, Any]) -> "ModelCard":
    """The card of `card_text`, read by huggingface_hub.

    Raises:
        ValueError: see `card_text`.
    """
    from huggingface_hub import ModelCard

    text = card_text(manifest)
    try:
        return ModelCard(text)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _damaged(error) from error


def card_text(manifest: Mapping[str, Any]) -> str:
    """The card of an adapter, a merged adapter, an EMR merge, a merged checkpoint or features, as it is written.

    The card shows no folder of this machine, and escapes what comes from files.

    Args:
        manifest: the content of `osrm_peft.json`; its `repo_id` names the repository that holds it.

    Raises:
        ValueError: a field of the manifest is of another kind than we write.
    """
    from jinja2 import TemplateError

    try:
        return _card_text(manifest)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, TemplateError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"the manifest {MANIFEST} is damaged ({type(error).__name__}: {error}): write it anew")


def _card_text(manifest: Mapping[str, Any]) -> str:
    import yaml
    from jinja2 import Environment, PackageLoader

    about, base = public(dict(manifest)), public_name(manifest.get("base_model"))
    inputs, task_type = list(about.get("inputs") or {}), about.get("task_type")
    merged = about.get("kind") != "adapter"  # an extracted adapter has inputs, too
    auto = _PIPELINES.get(str(task_type), ("", "AutoModel"))[1]
    labels = f", num_labels={int(about['num_labels'])}" if about.get("num_labels") and task_type == "SEQ_CLS" else ""
    label_names = label_names_in(about)
    if labels and label_names and len(label_names) == about["num_labels"]:
        labels += f", id2label={dict(enumerate(label_names))!r}"
    name = base if base and base != "packaged" else "BASE_MODEL"
    repo = about.get("repo_id") or REPO
    files = list(about.get("files") or {}) if about.get("kind") == "features" else []
    recipe: dict[str, Any] = {
        "adapters": {task: one.get("source", "") for task, one in (about.get("inputs") or {}).items()}
    }
    recipe |= {key: about[key] for key in _RECIPE if about.get(key) not in (None, {})}
    if all(_weight(about.get("weights"), task) == 1 for task in inputs):
        recipe.pop("weights", None)
    recipe |= {"scale": "features"} if about.get("scale_of_layers") else {}
    recipe |= {"modules": about["modules_policy"]} if about.get("modules_policy") else {}
    environment = Environment(loader=PackageLoader("osrm_peft.hub", "."), finalize=_shown, keep_trailing_newline=True)
    body = environment.get_template("model_card.md").render(
        about=about,
        base=base,
        osrm=OSRM,
        set_by_osrm=_is_osrm(about),
        by_name=task_type in ("SEQ_CLS", "CAUSAL_LM"),
        title=_title(about),
        code=_code,
        link=_link,
        repo=repr(repo),
        base_name=repr(base or name),
        load_base=f"from transformers import {auto}\n\nbase = {auto}.from_pretrained({name!r}{labels})\n",
        head=f", task={inputs[0]!r}" if inputs and merged and task_type == "SEQ_CLS" else "",
        first_task=repr(inputs[0]) if inputs else "task",
        features="\n".join(f"TaskFeatures.load({f'{repo}:{file}'!r})" for file in files),
        facts=list(_facts(about)),
        weights={task: _weight(about.get("weights"), task) for task in inputs},
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if about.get("kind") == "merged" else "",
        versions=", ".join(f"{library} {version}" for library, version in (about.get("versions") or {}).items()),
    )
    body = re.sub(r"\n{3,}", "\n\n", body)
    return f"---\n{_metadata(about, base).to_yaml()}\n---\n\n{body}"


def escaped(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    line = "".join(char for char in " ".join(str(text).split()) if char.isprintable())
    return re.sub(r"([\\`*_{}\[\]<>|#~!&$])", r"\\\1", line)


def _shown(value: object) -> object:
    return value if isinstance(value, _Plain) else "" if value is None else escaped(value)


def _code(text: str, language: str = "python") -> _Plain:
    """A code block that its own content cannot end."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Plain(f"{ticks}{language}\n{text.strip()}\n{ticks}")


def _link(base: str) -> _Plain:
    if base == "packaged":
        return _Plain("the packaged all-MiniLM-L6-v2")
    return _Plain(f"[{escaped(base)}](https://huggingface.co/{base})" if _is_repository(base) else escaped(base))


def _metadata(about: dict[str, Any], base: str | None) -> "ModelCardData":
    from huggingface_hub.repocard_data import EvalResult, ModelCardData

    kind, pipeline = about.get("kind"), _PIPELINES.get(str(about.get("task_type")), ("", ""))[0]
    baked = about.get("method") == "bake"
    merge = kind in ("merged", "emr", "checkpoint") and not baked
    tags = ["osrm_peft", *(["lora"] if kind in ("adapter", "merged", "emr") else [])]
    tags += ["osrm"] if _is_osrm(about) or about.get("projected") else []
    tags += ["merge", str(about.get("method"))] if merge else ["features"] if kind == "features" else []
    fields: dict[str, Any] = {"library_name": _LIBRARIES.get(str(kind), "osrm_peft"), "tags": tags}
    models = [base] if base and _is_repository(base) else []
    if kind == "checkpoint":
        inputs = about.get("inputs") or {}
        found = (_repository(one.get("source")) for name, one in inputs.items() if not baked or name == "base")
        models = [name for name in dict.fromkeys(found) if name]
    if models and kind != "features":
        fields["base_model"] = models[0] if len(models) == 1 else models
        fields["base_model_relation"] = "adapter" if kind != "checkpoint" else "finetune" if baked else "merge"
    scores = about.get("scores") or []
    ours = (score for score in scores if not score.get("harness"))
    datasets = dict.fromkeys(score["dataset"] for score in ours if score.get("dataset"))
    fields |= {"pipeline_tag": pipeline, "datasets": list(datasets)}
    fields["model_name"] = (about.get("repo_id") or _title(about)).split("/")[-1] if scores else None
    fields["eval_results"] = [
        EvalResult(
            task_type=pipeline or "text-classification",
            dataset_type=score.get("dataset") or score["task"],
            dataset_name=score["task"],
            dataset_config=_config_of(score) if score.get("dataset") else None,
            dataset_split=score.get("split"),
            metric_type=_METRICS.get(score["metric"], score["metric"]),
            metric_value=score["value"],
            metric_name=f"{score['metric']} by lm-eval" if score.get("harness") else None,
        )
        for score in scores
    ]
    return ModelCardData(**{key: value for key, value in fields.items() if value})


def _config_of(score: Mapping[str, Any]) -> str | None:
    return score["harness"].get("config") if score.get("harness") else score["task"]


def _title(about: dict[str, Any]) -> str:
    kind, tasks = about.get("kind"), ", ".join(about.get("inputs") or {})
    if about.get("method") == "bake":
        return "A LoRA adapter in the weights of its base model"
    if kind in ("merged", "emr", "checkpoint"):
        return f"{about.get('method')} merge of {'models' if kind == 'checkpoint' else 'LoRA adapters'}: {tasks}"
    if kind == "features":
        return f"Task features: {', '.join(one['task'] for one in about.get('files', {}).values())}"
    if about.get("method") == "extract":
        return "LoRA adapter from a fine-tuned model"
    how = "OSRM-projected LoRA" if about.get("projected") else "OSRM LoRA" if _is_osrm(about) else "LoRA"
    return f"{how} adapter" + (f": {about['task']}" if about.get("task") else "")


def _is_osrm(about: dict[str, Any]) -> bool:
    """Whether OSRM set A (an OSRMLoraConfig alone does not)."""
    return bool((about.get("osrm") or {}).get("initialized"))


def _weight(weights: Any, task: str) -> object:
    found = weights.get(task, "") if isinstance(weights, dict) else weights
    if isinstance(found, dict):
        return found["*"] if set(found) == {"*"} else "by layer"
    return found


def _facts(about: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """(fact, value) lines that say how the result was made."""
    yield from ((name, about[key]) for key, name in _FACTS.items() if about.get(key) is not None)
    named = about.get("label_names") or []
    for task, names in named.items() if isinstance(named, dict) else [(None, named)] if named else []:
        listed = ", ".join(f"{label} {name}" for label, name in enumerate(names[:20]))
        yield "labels" + (f" of {task}" if task else ""), listed + (" and more" if len(names) > 20 else "")
    yield from ((f"option {name}", value) for name, value in (about.get("options") or {}).items())
    fates = about.get("modules") or {}
    for fate in dict.fromkeys(fates.values()):
        names = [name for name, one in fates.items() if one == fate]
        yield f"modules: {fate}", ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if about.get("energy_kept"):
        yield "energy kept", f"at least {min(about['energy_kept'].values()):.6g} in every layer"
    for rank, kept in (about.get("serving") or {}).items():
        yield f"energy that rank {rank} would keep", f"{kept:.6g} in the worst layer"
    for key in ("statistics", "features"):
        sources = about.get(key)
        yield from ((f"{key} of {task}", one) for task, one in (sources if isinstance(sources, dict) else {}).items())
    osrm, projected = about.get("osrm") or {}, about.get("projected") or {}
    settings, provenance = osrm.get("settings") or projected, osrm.get("provenance") or projected
    shown = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if not {"protect_rank", "protect_energy", "min_effect_kept"} & set(shown) and "protect_energy" in settings:
        shown["protect_energy"] = "all directions"
    yield from ((f"OSRM {name}", value) for name, value in shown.items())
    others = [one["task"] for one in provenance.get("out_of_task") or [] if isinstance(one, dict)]
    if others:
        yield "kept away from", ", ".join(others)
    if about.get("kind") == "features":
        for file, one in about["files"].items():
            yield file, f"{one['task']}, statistic {one['statistic']}, {one['k']} rows, weights {one['weight_hash']}"
    if about.get("command"):
        yield "command", about["command"]


def _repository(source: object) -> str | None:
    """The Hub repository of a pinned source."""
    repo, _, revision = str(source).partition("@")
    return repo if re.match(r"[0-9a-f]{40}", revision) and _is_repository(repo) else None


def _is_repository(name: str) -> bool:
    """Whether a name can be that of a Hub repository with an owner (a folder's last part cannot)."""
    if "/" not in name:
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
