"""A config as a file: JSON, written by every run and read by `--config`; YAML, written by hand."""

import dataclasses
import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import yaml

from albef_core.errors import InputError

Config = TypeVar("Config")


def write_config(config: object, path: Path) -> None:
    """Write a config dataclass as indented JSON, in the order of its fields."""
    text = json.dumps(config_values(config), indent=2)
    path.write_text(f"{text}\n", encoding="utf-8")


def read_config(path: Path, config_class: type[Config]) -> Config:
    """Read what `write_config` wrote; fields that the file leaves out keep their defaults.

    Raises:
        InputError: the file is absent or no JSON object, a key is unknown, a value is of the wrong
            type or impossible.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: {reason}. Give a run's config.json.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Give a run's config.json."
        ) from error
    return _structured(values, config_class, path)


def read_yaml(path: Path, config_class: type[Config]) -> Config:
    """Read a config from YAML; fields that the file leaves out keep their defaults.

    Raises:
        InputError: the file is absent or no YAML mapping, a key is unknown, a value is of the wrong
            type or impossible.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"{path}: {reason}. Check the path.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}).") from error
    return _structured(values, config_class, path)


def to_json(value: object) -> str:
    """Write a dataclass as one line of JSON."""
    return json.dumps(config_values(value))


def from_json(text: str, kind: type[Config]) -> Config:
    """Read what `to_json` wrote."""
    return _CONVERTER.structure(json.loads(text), kind)


def _structured(values: object, config_class: type[Config], path: Path) -> Config:
    _check_keys(values, config_class, where=str(path))
    try:
        return _CONVERTER.structure(values, config_class)
    except cattrs.BaseValidationError as error:
        raise InputError(f"{path}: {_complaint(error)}") from error


def config_values(config: object) -> Any:
    """Give a config dataclass as plain JSON has it: objects, lists, texts, numbers."""
    return _CONVERTER.unstructure(config)


def config_digest(config: object) -> str:
    """Return the SHA-256, in hex, of the config as canonical JSON: equal configs, equal digests."""
    text = json.dumps(config_values(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_keys(values: object, config_class: type, *, where: str) -> None:
    """Refuse unknown keys by name, with the most similar right one, at any depth."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, found {_shown(values)[:40]}.")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            matches = get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f" Did you mean {matches[0]}?" if matches else " Remove it."
            raise InputError(f"{where}: unknown key {key}.{hint}")
        kind = fields[key].type
        if nested := _config_class(kind):
            _check_keys(value, nested, where=f"{where}: {key}")
        elif get_origin(kind) is tuple and (nested := _config_class(get_args(kind)[0])):
            for number, one in enumerate(value if isinstance(value, list) else []):
                _check_keys(one, nested, where=f"{where}: {key}[{number}]")


def _config_class(kind: Any) -> type | None:
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _shown(value: object) -> str:
    return json.dumps(value, default=str)  # YAML has dates


def _complaint(error: cattrs.BaseValidationError) -> str:
    """Name the first wrong value and what is wrong with it."""
    first = cattrs.transform_error(error, format_exception=_sentence)[0]
    sentence, _, place = first.rpartition(" @ $")
    return f"{place.removeprefix('.')}: {sentence}" if place.strip(".") else sentence


def _sentence(error: BaseException, kind: Any) -> str:
    if isinstance(error, KeyError):
        return "the key is missing."
    if get_origin(kind) is Literal:
        return f"expected one of {', '.join(map(repr, get_args(kind)))}."
    return str(error)


def _converter() -> cattrs.Converter:
    """Read JSON strictly: cattrs by itself turns "no" into True, and 2.5 into 2."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(kind: type, *accepted: type) -> None:
        def read(value: Any, _: type) -> Any:
            if type(value) not in accepted:
                raise TypeError(f"expected {kind.__name__.lower()}, found {_shown(value)}.")
            return kind(value)

        converter.register_structure_hook(kind, read)

    exactly(bool, bool)
    exactly(int, int)
    exactly(float, float, int)
    exactly(str, str)
    exactly(Path, str)
    # 1 and 1.0 are the same rate, so they get the same text and digest.
    converter.register_unstructure_hook(float, float)
    return converter


_CONVERTER = _converter()
