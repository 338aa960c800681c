"""A command as a score: it gets a model's folder and the task's rows, and prints a number."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from osrm_peft.io.places import new_file
from osrm_peft.tasks.task import Task


class CommandScore:
    """score(model, task) by a command of the user's.

    `{model}` in the command becomes a folder with the whole merged model and its tokenizer, `{task}` the task's name,
    `{rows}` a file of JSON lines with `sentence1`, `sentence2` and `label`; each is quoted for the shell. The last line
    that the command prints is the score, higher is better.

    Attributes:
        command: for the shell.
        tokenizer: goes into the model's folder.
        identity: by which cached scores are told from those of another command.

    Raises:
        ValueError: the command names no `{model}`.
    """

    def __init__(self, command: str, tokenizer: Any) -> None:
        if "{model}" not in command:
            raise ValueError(f"the score {command!r} needs {{model}}, which becomes the merged model's folder")
        self.command, self.tokenizer, self.identity = command, tokenizer, command

    def __call__(self, model: PreTrainedModel, task: Task) -> float:
        """The number that the command prints.

        Raises:
            ValueError: the command fails, or its last line is no number; shows the end of what it printed.
        """
        with TemporaryDirectory(prefix="osrm_peft_score_") as folder:
            place, rows = Path(folder, "model"), Path(folder, "rows.jsonl")
            model.save_pretrained(place)
            self.tokenizer.save_pretrained(place)
            with new_file(rows) as partial:
                partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in task.validation))
            values = {"model": str(place), "task": task.name, "rows": str(rows)}
            text = re.sub(r"\{(model|task|rows)\}", lambda found: shlex.quote(values[found[1]]), self.command)
            ran = subprocess.run(
                text, shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
            )
        lines = ran.stdout.strip().splitlines()
        try:
            if ran.returncode == 0:
                return float(lines[-1])
        except (ValueError, IndexError):
            pass
        said = " ".join((ran.stdout + ran.stderr).split())[-300:]
        raise ValueError(
            f"the score of {task.name!r} ({text[:200]}) ended with exit code {ran.returncode} and printed {said!r}: "
            "its last line must be a number"
        )
