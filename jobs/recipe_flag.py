"""The `--recipe` flag, as in `paper-2021,keep_sep=true`, and the words that describe a field."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from albef_core.config import RECIPES, Recipe, format_recipe
from albef_core.errors import InputError


def recipe_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Recipe] | None:
    """Make `--recipe` one flag: a primitive rule for tyro's registry."""
    if info.type is not Recipe:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME[,FIELD=VALUE...]",
        instance_from_str=lambda words: parse_recipe(words[0]),
        is_instance=lambda value: isinstance(value, Recipe),
        str_from_instance=lambda recipe: [format_recipe(recipe)],
    )


def parse_recipe(text: str) -> Recipe:
    """Read `paper-2021,keep_sep=true`: a recipe's name, then the fields that differ from it.

    Raises:
        InputError: no recipe or field has that name, or a value is none of the field's.
    """
    name, *changes = text.split(",")
    if name not in RECIPES:
        names = ", ".join(RECIPES)
        raise InputError(f"--recipe: {name!r} is none.{nearest(name, RECIPES)} There are: {names}.")
    fields = {field.name: _choices(field) for field in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    for change in changes:
        field, _, value = change.partition("=")
        field = field.strip().replace("-", "_")
        if field not in fields:
            raise InputError(f"--recipe: {field!r} is no field of it.{nearest(field, fields)}")
        word, choices = value.strip().lower(), fields[field]
        if word not in choices:
            allowed = " or ".join(f"`{choice}`" for choice in choices)
            raise InputError(f"--recipe: {field} is {allowed}, got {value!r}.")
        values[field] = choices[word]
    return dataclasses.replace(RECIPES[name](), **values)


def recipe_help() -> str:
    """Say what each field of a recipe mends, in the words under the fields themselves."""
    names = " or ".join(f"`{name}`" for name in RECIPES)
    docs = field_docs(Recipe)
    fields = []
    for field in dataclasses.fields(Recipe):
        choices = "" if field.type is bool else "=" + "|".join(_choices(field))
        fields.append(f"- {field.name}{choices}: {docs[field.name]}")
    head = f"Which flaws of the published code are mended: {names}, then fields that differ, as in"
    tail = "Fields, true or false where nothing else is said, true where mended:"
    return "\n".join([f"{head} `paper-2021,keep_sep=true`. {tail}", *fields])


def _choices(field: dataclasses.Field) -> dict[str, Any]:
    """Return what a field of the recipe may be, by the word for it."""
    if get_origin(field.type) is Literal:
        return {choice: choice for choice in get_args(field.type)}
    assert field.type is bool, f"{field.name}: a recipe's field is a bool or a Literal"
    return {"true": True, "false": False}


def field_docs(config_class: type) -> dict[str, str]:
    """Return the sentences under the fields of a config class, its parents' too, by field."""
    sentences: dict[str, str] = {}
    for parent in config_class.__bases__:
        if dataclasses.is_dataclass(parent):
            sentences |= field_docs(parent)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(doc))
            ):
                sentences[name] = " ".join(doc.split())
    return sentences


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that looks most like `word`: a sentence, or "" if none does."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]}?" if matches else ""
