"""Which settings a sweep tries: axes as text, points on them, and a point put into a config."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, product
from typing import Any, Literal, TypeVar

from scipy.stats import qmc

from albef_core.config import format_recipe
from albef_core.errors import InputError
from pipelines.config import TrainConfig
from pipelines.sweep_config import SweepConfig

Config = TypeVar("Config", bound=TrainConfig)
Point = dict[str, Any]
"""A value for each axis, by its dotted name."""
ALPHA, RATE = "objective.alpha", "optim.lr"
RATE_FACTOR = 4
"""The default range of the learning rate reaches this far below and above the preset's."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field that is varied, over a range or a list of values."""

    name: str
    """Dotted name of the config's field."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    """A range is spread evenly over the logarithm."""
    is_whole: bool = False
    """The field is a count."""
    choices: tuple[Any, ...] = ()
    """The values of a list; a range has none."""

    def at(self, share: float) -> Any:
        """Give the value at a share, 0 to 1, of the way from one end to the other."""
        if self.choices:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.is_log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.is_whole else float(f"{value:.4g}")


def axes_of(config: SweepConfig) -> list[Axis]:
    """Read `--axes`; where there are none, alpha and the learning rate.

    Raises:
        InputError: an axis names no field, or has no usable range.
    """
    if config.axes:
        axes = [read_axis(text, config) for text in config.axes]
        if len({axis.name for axis in axes}) < len(axes):
            raise InputError(f"--axes {' '.join(config.axes)}: a field is named twice. Leave one.")
        return axes
    rate = config.optim.lr
    low = max(rate / RATE_FACTOR, config.optim.min_lr)
    return [
        Axis(name=ALPHA, low=0.0, high=1.0),
        Axis(name=RATE, low=low, high=rate * RATE_FACTOR, is_log=True),
    ]


def read_axis(text: str, config: TrainConfig) -> Axis:
    """Read an axis such as `optim.lr=1e-4:1e-2:log` or `batch_size=16,32`.

    Raises:
        InputError: the field is unknown, or the range cannot be read.
    """
    name, _, span = text.partition("=")
    now = value_of(config, name)
    if ":" not in span:
        return Axis(name=name, choices=tuple(_like(now, part, text) for part in span.split(",")))
    low, high, *scale = span.split(":")
    if scale not in ([], ["log"]) or type(now) not in (int, float):
        raise InputError(
            f"--axes {text}: a range is LOW:HIGH or LOW:HIGH:log, of a number; anything else is a"
            " list A,B,C."
        )
    axis = Axis(
        name=name,
        low=float(_like(1.0, low, text)),
        high=float(_like(1.0, high, text)),
        is_log=scale == ["log"],
        is_whole=type(now) is int,
    )
    if not axis.low < axis.high or (axis.is_log and axis.low <= 0):
        raise InputError(f"--axes {text}: the lower end comes first, and a log scale has no 0.")
    return axis


def value_of(config: Any, name: str) -> Any:
    """Give the value of the field with a dotted name.

    Raises:
        InputError: there is no such field; the nearest one is named.
    """
    values = _leaves(config)
    if name not in values:
        same_end = [known for known in values if known.split(".")[-1] == name.split(".")[-1]]
        near = same_end or get_close_matches(name, values, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"--axes {name}: is no field of the config.{hint}")
    return values[name]


def with_point(config: Config, point: Mapping[str, Any]) -> Config:
    """Put a point into a config.

    Raises:
        InputError: the config does not allow one of its values.
    """
    for name, value in point.items():
        config = _with_value(config, name.split("."), value)
    return config


def points_of(
    axes: Sequence[Axis],
    default: Point,
    *,
    num: int,
    search: Literal["random", "grid"],
    seed: int,
) -> list[Point]:
    """Choose the settings to try, the default first: a function of the arguments alone.

    `random` is Halton's sequence, scrambled by the seed, which leaves no large holes; a `grid` has
    as many values an axis as `num` has room for, and every value of a list.

    Raises:
        InputError: the grid does not fit.
    """
    if search == "grid":
        return [default, *_grid(axes, num - 1)]
    shares = qmc.Halton(d=len(axes), rng=seed).random(num - 1)
    return [default, *({a.name: a.at(s) for a, s in zip(axes, row, strict=True)} for row in shares)]


def _grid(axes: Sequence[Axis], num: int) -> list[Point]:
    listed = math.prod(len(axis.choices) for axis in axes if axis.choices)
    ranges = sum(not axis.choices for axis in axes)
    ticks = int((num / listed) ** (1 / ranges) + 1e-9) if ranges else 1
    if listed > num or ticks < (2 if ranges else 1):
        least = 1 + listed * 2**ranges
        raise InputError(
            f"--search grid: {len(axes)} axes do not fit into --trials {num + 1}, of which one is"
            f" the preset's own. Take at least {least}."
        )
    values = [
        axis.choices or tuple(axis.at(tick / (ticks - 1)) for tick in range(ticks)) for axis in axes
    ]
    names = [axis.name for axis in axes]
    return [dict(zip(names, row, strict=True)) for row in islice(product(*values), num)]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= _leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def _with_value(config: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    inner = _with_value(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


def _like(now: Any, part: str, text: str) -> Any:
    """Read a value of the kind that the field has now."""
    kind = type(now)
    try:
        if kind is bool:
            return {"true": True, "false": False}[part.lower()]
        if kind in (int, float):
            return kind(json.loads(part))
    except (KeyError, ValueError):
        raise InputError(f"--axes {text}: {part!r} is no {kind.__name__}. Correct it.") from None
    return part


def flags_of(config: TrainConfig, preset: TrainConfig) -> list[str]:
    """Write the flags that make a config of a preset, as the command line takes them."""
    flags: list[str] = []
    before = _leaves(preset)
    recipe = config.recipe
    for name, value in _leaves(config).items():
        is_same = name in before and before[name] == value
        if is_same or name.startswith("recipe.") or value is None:
            continue
        flag = "--" + name.split(".")[-1].replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)] if value else []
        else:
            flags += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return flags if recipe == preset.recipe else [*flags, "--recipe", format_recipe(recipe)]
