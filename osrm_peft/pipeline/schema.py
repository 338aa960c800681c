"""The JSON Schema of recipes, by which editors complete keys and underline mistakes."""

import dataclasses
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from peft import LoraConfig
from transformers import TrainingArguments

from osrm_peft.io.yaml import hints
from osrm_peft.merging.methods.registry import METHODS
from osrm_peft.osrm.config import OSRMLoraConfig
from osrm_peft.pipeline.run import PushFields, SelectFields
from osrm_peft.tasks.files import TaskData
from osrm_peft.tasks.task import METRICS, ROW_METRICS
from osrm_peft.training.recipe import Recipe

NESTED: dict[str, type] = {
    "lora": LoraConfig, "osrm": OSRMLoraConfig, "training": TrainingArguments, "select": SelectFields,
    "push": PushFields,
}  # fmt: skip
_SIMPLE: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null", dict: "object", list: "array",
}  # fmt: skip


def recipe_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of the recipes that these versions of PEFT and transformers take."""
    properties = {name: schema_of(hint) for name, hint in hints(Recipe).items()}
    for name, cls in NESTED.items():
        nullable = name in ("osrm", "push")
        properties[name] = _fields(cls, free=("lora_alpha", "init_lora_weights"))
        if nullable:
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    inits = {"type": "object", "additionalProperties": properties["osrm"]}
    properties["inits"] = {"anyOf": [inits, {"type": "null"}]}
    task = _fields(TaskData) | {"required": ["train"]}
    task["properties"]["metric"] = {"enum": [*METRICS, *ROW_METRICS, None]}
    names = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    properties["tasks"] = {"anyOf": [names, {"type": "object", "additionalProperties": task}, {"type": "null"}]}
    candidate = {"type": "object", "properties": {"method": {"enum": sorted(METHODS)}}, "required": ["method"]}
    properties["select"]["properties"]["candidates"] = {
        "anyOf": [{"type": "array", "items": candidate}, {"type": "string"}, {"type": "null"}]
    }
    documented = _described(Recipe)
    for name, schema in properties.items():
        if name in documented:
            schema["description"] = documented[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of osrm_peft",
        "type": "object",
        "properties": properties,
        "required": ["model"],
        "additionalProperties": False,
    }


def schema_of(hint: Any) -> dict[str, Any]:
    """The schema of the values that `io.yaml.fits` takes for a type."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(one) for one in of]}
    if origin is Literal:
        return {"enum": list(of)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(of[1])}
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(of[0]) if of and of[0] is not Ellipsis else {}}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"type": "string"}
    if dataclasses.is_dataclass(hint):
        return {"type": "object"}
    return {"type": _SIMPLE[hint]} if hint in _SIMPLE else {}


def _fields(cls: type, free: tuple[str, ...] = ()) -> dict[str, Any]:
    properties = {name: {} if name in free else schema_of(hint) for name, hint in hints(cls).items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _described(cls: type) -> dict[str, str]:
    """{field: what the docstring says of it}."""
    found: dict[str, str] = {}
    lines = (cls.__doc__ or "").partition("Attributes:")[2].splitlines()
    names: list[str] = []
    for line in lines:
        head, separator, text = line.strip().partition(": ")
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and separator:
            names = [name.strip() for name in head.split(",")]
            found |= dict.fromkeys(names, text)
        elif line.strip() and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
