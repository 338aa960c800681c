"""Scores by lm-eval: on our tasks they are ours, they land where ours do, and nothing is left behind."""

import dataclasses
import json
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from osrm_peft import TaskData, evaluate_task, load_task, merge_adapters
from osrm_peft.cli import harness as cli_harness
from osrm_peft.evaluation import harness
from osrm_peft.evaluation.harness import check_harness_tasks, evaluate_with_harness
from osrm_peft.evaluation.page import write_report
from osrm_peft.evaluation.scored import combine, of_manifest
from osrm_peft.io.manifest import read_manifest
from osrm_peft.tasks.harness import write_harness_tasks
from osrm_peft.tasks.text import tokenize_labelled
from tests.helpers.adapters import make_adapter
from tests.helpers.causal import TEMPLATE, WORDS, save_tiny
from tests.tasks.test_text import CHATS, ROWS, write

GUIDE = Path(__file__).parents[2] / "docs/guides/language_models.md"
METRICS = {"accuracy": "acc", "matthews": "mcc", "exact_match": "exact_match", "rouge_l": "rouge_l"}


def adapted(model, seed, **config):
    """With an adapter that changes what the model says from row to row."""
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    found = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=2)
    return found.eval()


@pytest.fixture(scope="module")
def words():
    """The commonest words of two packaged tasks, their answers among them."""
    data = load_task("packaged-text", "questions"), load_task("packaged-text", "sms_spam")
    known = Counter(word for task in data for row in task.train for word in (row["prompt"] + row["completion"]).split())
    return [word for word, _ in known.most_common(200)]


@pytest.fixture
def tiny(tmp_path, words):
    return save_tiny(tmp_path / "base", words=words)


def own(folder, rows, metric):
    write(folder, rows)
    files = {split: str(folder / f"films/{split}.jsonl") for split in ("train", "validation")}
    return load_task({"films": TaskData(**files, metric=metric)}, "films")


def one_value(found, task):
    (value,) = (one.value for one in found if one.task == task.name and one.metric == METRICS[task.metric])
    return value


def test_acc_and_mcc_are_accuracy_and_matthews_on_the_same_rows(tiny):
    model, tokenizer = tiny
    model = adapted(model, 0)
    tasks = [load_task("packaged-text", name).sample(validation=40) for name in ("questions", "sms_spam")]
    found = evaluate_with_harness(model, tasks, tokenizer, batch_size=7)
    ours = {task.name: evaluate_task(model, task, tokenizer, max_length=512, progress=False) for task in tasks}
    assert [(one.task, one.metric, one.rows) for one in found] == [
        ("questions", "acc", 40), ("sms_spam", "mcc", 40), ("sms_spam", "acc", 40)
    ]  # fmt: skip
    assert {task.name: one_value(found, task) for task in tasks} == ours
    assert 0 < ours["questions"] < 1 and ours["sms_spam"] != 0
    with model.disable_adapter():
        base = evaluate_with_harness(model, tasks, tokenizer)
    assert {one.metric: one.value for one in base} != {one.metric: one.value for one in found}
    stderr = (ours["questions"] * (1 - ours["questions"]) / 39) ** 0.5
    assert found[0].stderr == pytest.approx(stderr) and found[1].stderr is None


@pytest.mark.parametrize(
    ("rows", "metric"), [(ROWS, "exact_match"), (ROWS, "rouge_l"), (ROWS, "accuracy"), (CHATS, "exact_match")]
)
def test_what_is_written_scores_as_it_does_with_us(rows, metric, tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base", TEMPLATE)
    task = own(tmp_path / "data", rows, metric)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    rows = tokenize_labelled(task.train, tokenizer, 32)
    for _ in range(20):
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate_with_harness(model, [task], tokenizer, batch_size=3)
    ours = evaluate_task(model, task, tokenizer, progress=False)
    assert one_value(found, task) == pytest.approx(ours, abs=1e-12) and ours > 0, ours
    assert found[0].settings["generation"] is None or found[0].settings["generation"]["max_gen_toks"] == 3


def test_nothing_stays_on_the_model_or_in_the_streams_and_caches(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, tokenizer = tiny
    model = adapted(model, 1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    kept, random_before = torch.get_rng_state(), random.getstate()
    evaluate_with_harness(model, [load_task("packaged-text", "questions")], tokenizer, rows=3)
    assert model.training and not (tmp_path / "cache").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), kept) and random.getstate() == random_before


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_a_trained_head_of_a_model_with_tied_weights_is_scored(tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base")
    task = own(tmp_path / "data", ROWS, "accuracy")
    tied = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True}))
    model = adapted(tied, 0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = evaluate_with_harness(model, [task], tokenizer)
    assert one_value(found, task) == evaluate_task(model, task, tokenizer, progress=False)


def test_few_shot_examples_are_training_rows_and_are_recorded(tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base")
    task = own(tmp_path / "data", ROWS, "accuracy")
    found = evaluate_with_harness(model, [task], tokenizer, shots=2, rows=3, max_length=64)
    about = found[0].settings
    assert (about["num_fewshot"], about["limit"], about["max_length"], about["task_version"]) == (2, 3, 64, 1.0)
    assert found[0].rows == 3 and about["seeds"]["fewshot"] == 1234 and not about["chat_template"]
    with pytest.raises(ValueError, match="shots=9: 'films' has 4 training rows"):
        evaluate_with_harness(model, [task], tokenizer, shots=9)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        evaluate_with_harness(model, [task], tokenizer, chat_template=True)


def test_prompts_that_are_cut_are_warned_of_and_no_room_for_them_refused(tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base")
    task = own(tmp_path / "data", ROWS, "accuracy")
    with pytest.warns(UserWarning, match="lm-eval cut prompts at their beginning: raise max_length"):
        evaluate_with_harness(model, [task], tokenizer, max_length=2)
    with pytest.raises(ValueError, match="'films' writes up to 3 tokens, and max_length=3 leaves none for the prompt"):
        evaluate_with_harness(model, [own(tmp_path / "data", ROWS, "exact_match")], tokenizer, max_length=3)


def test_the_chat_template_is_applied_when_it_is_asked_for(tmp_path):
    _, tokenizer = save_tiny(tmp_path / "base", TEMPLATE)
    asked = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
             for row in ROWS]  # fmt: skip
    chats = own(tmp_path / "chats", [{"messages": messages} for messages in asked], "accuracy")
    plain, values = own(tmp_path / "plain", ROWS, "accuracy"), set()
    for seed in range(4):
        adapter = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), seed)
        found = [evaluate_with_harness(adapter, [plain], tokenizer, chat_template=yes) for yes in (True, False)]
        assert found[0][0].value == evaluate_task(adapter, chats, tokenizer, progress=False)
        assert [one[0].settings["chat_template"] for one in found] == [True, False]
        values.add(tuple(one[0].value for one in found))
    assert any(asked != alone for asked, alone in values), values


def test_rows_that_are_messages_go_through_the_template_once(tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base", TEMPLATE)
    task = own(tmp_path / "data", CHATS, "exact_match")
    for more in ({"shots": 1}, {"chat_template": True}):
        with pytest.raises(ValueError, match="the rows of 'films' are messages"):
            evaluate_with_harness(model, [task], tokenizer, **more)
    with pytest.raises(ValueError, match="are messages: give the tokenizer"):
        write_harness_tasks([task], tmp_path / "files")
    assert not (tmp_path / "files").exists()
    joined = own(tmp_path / "joined", CHATS, "accuracy")
    with pytest.raises(
        ValueError, match=r"the completion 'no' has no tokens of its own.*begin completions with a space"
    ):
        evaluate_with_harness(model, [joined], tokenizer)


def test_the_files_are_tasks_of_lm_eval_wherever_they_lie(tmp_path):
    from lm_eval.tasks import TaskManager

    tasks = [own(tmp_path / "data", ROWS, "accuracy"), load_task("packaged-text", "tweets").sample(train=5)]
    written = write_harness_tasks(tasks, tmp_path / "files")
    (tmp_path / "files").rename(tmp_path / "moved")
    loaded = TaskManager(include_path=str(tmp_path / "moved"), include_defaults=False).load("osrm_peft")["tasks"]
    assert [path.name for path in written] == ["films.yaml", "tweets.yaml"] and set(loaded) == {"films", "tweets"}
    doc = loaded["tweets"].eval_docs[3]
    assert doc == tasks[1].validation[3] and loaded["tweets"].doc_to_choice(doc) == list(tasks[1].answers)
    with pytest.raises(ValueError, match="films: the harness has no inverse_perplexity of text tasks"):
        write_harness_tasks([tasks[0].measured_by("inverse_perplexity")], tmp_path / "other")
    with pytest.raises(FileExistsError, match="holds files"):
        write_harness_tasks(tasks, tmp_path / "moved")


@pytest.fixture
def few_tasks(tmp_path, monkeypatch):
    """lm-eval's index, of two tasks that are none of ours and a group of both; the real one takes long to read."""
    from lm_eval.tasks import TaskManager

    theirs = own(tmp_path / "theirs", ROWS, "matthews")
    write_harness_tasks([theirs, dataclasses.replace(theirs, name="songs")], tmp_path / "index")
    group = {"group": "both", "task": ["films", "songs"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "index/both.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_path=str(tmp_path / "index"), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda all_tasks: manager)


def test_a_task_that_lm_eval_does_not_know_is_refused_with_those_that_are_near(few_tasks):
    assert check_harness_tasks(["films"])
    with pytest.raises(ValueError, match=r"lm-eval [\d.]+ knows no task 'flims': did you mean films\?"):
        check_harness_tasks(["flims"])
    with pytest.raises(ValueError, match="the task 'films' is there twice"):
        check_harness_tasks(["films", "films"])
    with pytest.raises(ValueError, match="'tweets' are texts with labels"):
        check_harness_tasks([load_task("packaged", "tweets")])


def test_a_group_has_its_own_score_and_no_tasks_are_refused(few_tasks, tmp_path):
    model, tokenizer = save_tiny(tmp_path / "base")
    found = evaluate_with_harness(model, ["both", "films"], tokenizer, rows=2)
    assert [(one.task, one.metric, one.rows, one.split) for one in found] == [
        ("both", "acc", 4, None),
        ("films", "mcc", 2, "validation"),
        ("films", "acc", 2, "validation"),
    ]
    assert found[0].value == found[2].value
    with pytest.raises(ValueError, match="name at least one task"):
        evaluate_with_harness(model, [], tokenizer)


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'osrm_peft[harness]'")):
        check_harness_tasks(["films"])


def test_a_model_that_cannot_write_and_nan_are_refused(tmp_path, tiny):
    task = own(tmp_path / "data", ROWS, "accuracy")
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal language model"):
        evaluate_with_harness(make_adapter(tmp_path / "bert"), [task], tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        evaluate_with_harness(model, [task], tokenizer)


@pytest.fixture
def winner(tmp_path, monkeypatch, words):
    """A merge of two adapters where the guide has it, below the working directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", words=list(dict.fromkeys([*WORDS, *words])))
    for seed, name in enumerate(("questions", "tweets")):
        adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), seed).save_pretrained(tmp_path / name)
    out = tmp_path / "results/smollm2_text/selection/winner"
    adapters = {name: tmp_path / name for name in ("questions", "tweets")}
    merge_adapters(adapters, "task_arithmetic", scale=0.5).save_pretrained(out)
    merge_adapters(adapters, "emr").save_pretrained(tmp_path / "emr")
    return out


def test_the_commands_of_the_guide_score_a_merge_into_manifest_card_file_and_report(
    winner, call, few_tasks, monkeypatch
):
    block = next(text for text in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.S) if "--harness" in text)
    first, second = (shlex.split(line, comments=True)[1:] for line in block.splitlines())
    second[second.index("hellaswag")] = "films"
    call(*first[: first.index("--save")], "--rows", 12, "--save")
    ours = {"questions": "accuracy", "tweets": "accuracy"}
    call("evaluate", winner, "--suite", "packaged-text", "--rows", 12, "--max-length", 512, "--save")
    scores = read_manifest(winner)["scores"]
    by_us, by_harness = ([one for one in scores if bool(one.get("harness")) is yes] for yes in (False, True))
    assert {one["task"]: one["metric"] for one in by_us} == ours
    assert len({one["task"] for one in by_harness}) == 6 and all(one["harness"]["limit"] == 12 for one in by_harness)
    for one in by_us:
        assert one["value"] == next(other["value"] for other in by_harness if other["task"] == one["task"])
    card = (winner / "README.md").read_text()
    assert re.search(r"\| tweets \| acc \(lm-eval [\d.]+, 0-shot\) \| [\d.]+ \| validation \| 12 \|", card)
    assert "name: acc by lm-eval" in card
    found = json.loads(call(*second, "--json", "--quiet"))
    assert [(one["task"], one["metric"], one["rows"], one["harness"]["num_fewshot"]) for one in found] == [
        ("tweets", "acc", 200, 2), ("films", "mcc", 4, 2), ("films", "acc", 4, 2)
    ]  # fmt: skip
    file = json.loads(Path(second[-1]).read_text())
    assert list(file["scores"]) == ["tweets", "films"] and file["tasks"]["films"]["metric"] == "mcc (lm-eval)"
    of_two = read_manifest(winner) | {"scores": by_us + [one for one in by_harness if one["task"] in ours]}
    lines = of_manifest(of_two, "winner", winner)
    assert [line.metrics["tweets"] for line in lines] == ["accuracy", "acc (lm-eval)"]
    assert len(combine(lines)) == 2  # the same scores of the same rows, by two metrics
    write_report(["results"], "report.html")
    page = Path("report.html").read_text()
    assert "acc (lm-eval)" in page and "mcc (lm-eval)" in page and "accuracy" in page
    monkeypatch.setattr(cli_harness, "scores_of", None)  # before any work
    said = call("evaluate", winner, "--harness", "tweets", "--rows", 13, "--save", code=2)
    assert "has a score of 'tweets' by lm-eval with limit 12, this one has 13: --overwrite" in said


def test_an_emr_merge_is_scored_with_the_mask_of_each_task(winner, call, few_tasks):
    words = ["emr", "--rows", 20, "--max-length", 512, "--json"]
    found = json.loads(call("evaluate", *words, "--harness", "tweets", "--harness", "questions"))
    ours = json.loads(call("evaluate", *words, "--suite", "packaged-text"))
    assert [one["task"] for one in found] == ["tweets", "questions"]
    assert {one["task"]: one["value"] for one in found} == {one["task"]: one["score"] for one in ours}
    assert "is a model for each of its tasks (questions, tweets), and 'films' is none" in call(
        "evaluate", "emr", "--harness", "films", code=2
    )


def test_options_that_say_nothing_are_refused(tmp_path, call):
    make_adapter(tmp_path / "ad")
    assert "--shots and --chat-template are of lm-eval" in call("evaluate", tmp_path / "ad", "--shots", 1, code=2)
    said = call("evaluate", tmp_path / "ad", "-t", "tweets", "--harness", "tweets", code=2)
    assert "leave --task and --metric out" in said
    said = call("evaluate", tmp_path / "ad", "--harness", "tweets", "--rows", 0, code=2)
    assert "--rows 0 must be a whole number of at least 1" in said
    said = call("evaluate", tmp_path / "ad", "--harness", "tweets", "--base-model", "packaged", code=2)
    assert "is no causal language model" in said and "no harness" in said
