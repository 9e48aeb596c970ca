"""What a sweep found, to look at: figures, a page that holds them all, a table for the terminal."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from pipelines.report import BLUE, GRAY, GREEN, ORANGE, PALE, VERMILION
from pipelines.sweep_result import Confirmed, SweepResult, TrialResult, format_point
from pipelines.sweep_space import Axis, Point
from pipelines.tracking import Tracker

PAGE = "sweep.html"
COLORS = {"finished": BLUE, "stopped": ORANGE, "failed": VERMILION, "died": VERMILION}
SURFACE_TICKS = 60
MIN_TRIALS_FOR_SURFACE = 4
RECALL = "mean recall (%)"


def log_report(tracker: Tracker, result: SweepResult, folder: Path) -> None:
    """Store every figure and the page with the sweep's run; the page also lies in its folder."""
    figures = {
        "learning-curves": curves_figure(result),
        "parallel-coordinates": coordinates_figure(result),
        "cost": cost_figure(result),
    }
    if (surface := surface_figure(result)) is not None:
        figures["surface"] = surface
    for name, figure in figures.items():
        tracker.log_figure(figure, f"sweep/{name}.png")
    (folder / PAGE).write_text(page(result, figures), encoding="utf-8")
    tracker.log_artifact(folder / PAGE, PAGE)


def page(result: SweepResult, figures: dict[str, Figure]) -> str:
    """Write one HTML file that needs no other."""
    header = "".join(f"<th>{escape(name)}</th>" for name in _columns(result))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _row(result, trial)) + "</tr>"
        for trial in _by_value(result.trials)
    )
    again = "".join(f"<li>{escape(line)}</li>" for line in confirmed_lines(result))
    pictures = "".join(
        f'<h2>{name.replace("-", " ")}</h2><img alt="{name}" src="data:image/png;base64,{_png(f)}">'
        for name, f in figures.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>Sweep {escape(result.name)}</title>"
        "<style>body{font:15px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;"
        "text-align:right}img{max-width:100%}code{background:#eee}</style>"
        f"<h1>Sweep {escape(result.name)}</h1><p>{escape(answer(result))}</p>"
        f"<p><code>{escape(result.command)}</code></p>"
        f"<h2>trained again with fresh seeds</h2><ul>{again or '<li>none</li>'}</ul>"
        f"<h2>trials</h2><table><tr>{header}</tr>{body}</table>{pictures}</html>\n"
    )


def sweep_table(result: SweepResult) -> Table:
    """Show the trials, the best first."""
    table = Table(*_columns(result), title=f"Sweep {result.name}: {len(result.trials)} trials")
    for trial in _by_value(result.trials):
        table.add_row(*_row(result, trial))
    return table


def answer(result: SweepResult) -> str:
    """Say in a sentence what to use, and how sure that is."""
    setting = _format(result.best)
    if result.is_proven:
        return f"Use {setting}: better than the preset's own setting, proven on fresh seeds."
    if not result.confirmed:
        return f"Nothing was trained again, so nothing is proven: the preset's own is {setting}."
    return f"No setting is proven better than the preset's own: keep {setting}."


def confirmed_lines(result: SweepResult) -> list[str]:
    """Say of each setting that was trained again what it reached, and what it gains."""
    return [_confirmed_line(one) for one in result.confirmed]


def _confirmed_line(one: Confirmed) -> str:
    values = ", ".join(f"{100 * value:.1f}" for value in one.values) or "no seed came to its end"
    if one.gain is None:
        return f"{_format(one.point)}: {values} % (the preset's own)"
    gain = one.gain
    return (
        f"{_format(one.point)}: {values} %; {100 * gain.value:+.1f} points"
        f" (95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    )


def curves_figure(result: SweepResult) -> Figure:
    """Draw mean recall against pairs seen, with the points where trials were stopped."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for trial in result.trials:
        if not trial.measured:
            continue
        pairs, values = np.array(trial.measured).T
        axes.plot(
            pairs, 100 * values, color=COLORS[trial.status], lw=2.5 if trial.is_default else 1
        )
        mark = "x" if trial.status != "finished" else "o"
        axes.plot(pairs[-1], 100 * values[-1], mark, color=COLORS[trial.status])
        if trial.is_default:
            axes.annotate("preset", (pairs[-1], 100 * values[-1]), xytext=(4, 4),
                          textcoords="offset points", color=GRAY)  # fmt: skip
    for mark in result.milestones[:-1]:
        axes.axvline(mark, color=PALE, zorder=0)
    counts = {status: sum(t.status == status for t in result.trials) for status in COLORS}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    axes.set(xlabel="pairs seen", ylabel=RECALL, title=f"Trials: {told}")
    return figure


def coordinates_figure(result: SweepResult) -> Figure:
    """Draw each trial as a line over its values; bright ones did well."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [axis.name.split(".")[-1] for axis in result.axes]
    shown = [trial for trial in result.trials if trial.value is not None]
    best = max((trial.value or 0.0 for trial in shown), default=1.0) or 1.0
    for trial in sorted(shown, key=lambda trial: trial.value or 0.0):
        shares = [_share(axis, trial.point[axis.name]) for axis in result.axes]
        quality = (trial.value or 0.0) / best
        axes.plot([*shares, quality], color=BLUE, alpha=0.15 + 0.85 * quality**2, lw=1.5)
    axes.set_xticks(range(len(names) + 1), [*names, "mean recall"])
    axes.set_yticks([])
    for place, axis in enumerate(result.axes):
        low, high = (axis.choices[0], axis.choices[-1]) if axis.choices else (axis.low, axis.high)
        for height, value in ((0, low), (1, high)):
            axes.annotate(f"{value}", (place, height), color=GRAY, ha="center")
    axes.annotate(f"{100 * best:.1f} %", (len(names), 1), color=GRAY, ha="center")
    axes.set_title("Settings of all trials; the best ones are dark")
    return figure


def surface_figure(result: SweepResult) -> Figure | None:
    """Draw mean recall over the first two ranges, and how unsure that is; None: too few trials.

    Of trials that were stopped nothing is known at the end, so they are only marked. Between the
    others a Gaussian process is fitted, with a length for each axis and a noise of its own.
    """
    ranges = [axis for axis in result.axes if not axis.choices][:2]
    whole = [t for t in result.trials if t.status == "finished" and t.value is not None]
    if len(ranges) < 2 or len(whole) < MIN_TRIALS_FOR_SURFACE:
        return None
    places = np.array([[_share(axis, t.point[axis.name]) for axis in ranges] for t in whole])
    values = 100 * np.array([t.value for t in whole])
    spread = max(float(values.std()), 0.1)
    lengths = RBF(np.array([0.4, 0.4]), (0.15, 2.0))  # pyright: ignore[reportArgumentType]  # scikit-learn takes one for each axis
    kernel = ConstantKernel(1.0, "fixed") * lengths + WhiteKernel(0.05, (1e-3, 0.5))
    process = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0)
    process.fit(places, (values - values.mean()) / spread)
    ticks = np.linspace(0, 1, SURFACE_TICKS)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    mean, deviation = map(np.asarray, process.predict(grid, return_std=True))
    shape = (SURFACE_TICKS, SURFACE_TICKS)
    maps = (
        (RECALL, values.mean() + spread * mean.reshape(shape), "viridis"),
        ("95 % interval, +- points", 1.96 * spread * deviation.reshape(shape), "magma"),
    )
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (label, surface, colors) in zip(figure.subplots(1, 2), maps, strict=True):
        drawn = axes.imshow(
            surface, origin="lower", extent=(0, 1, 0, 1), cmap=colors, aspect="auto"
        )
        figure.colorbar(drawn, ax=axes, label=label)
        for trial in result.trials:
            place = [_share(axis, trial.point[axis.name]) for axis in ranges]
            mark = "o" if trial.status == "finished" else "x"
            axes.plot(*place, mark, color="white", markeredgecolor="black" if mark == "o" else None)
        for axis, set_ticks in zip(ranges, (axes.set_xticks, axes.set_yticks), strict=True):
            at = (0, 0.25, 0.5, 0.75, 1)
            set_ticks(at, [f"{axis.at(share):.3g}" for share in at])
        axes.set(xlabel=ranges[0].name, ylabel=ranges[1].name)
    best = max(whole, key=lambda trial: trial.value or 0.0)
    figure.suptitle(f"Best trial: {_format(best.point)} (o: trained to the end, x: stopped)")
    return figure


def cost_figure(result: SweepResult) -> Figure:
    """Draw what each trial cost in pairs seen, beside what all to their end would have."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trials = _by_value(result.trials)
    axes.barh(
        range(len(trials)), [t.pairs for t in trials], color=[COLORS[t.status] for t in trials]
    )
    axes.set_yticks(range(len(trials)), [_format(t.point) for t in trials], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(result.milestones[-1], color=GREEN)
    spent, full = sum(t.pairs for t in trials), len(trials) * result.milestones[-1]
    share = spent / full if full else 0.0
    axes.set(
        xlabel="pairs seen",
        title=f"The search saw {spent:,} pairs: {share:.0%} of all trials to their end",
    )
    return figure


def _share(axis: Axis, value: object) -> float:
    if axis.choices:
        at = axis.choices.index(value) if value in axis.choices else 0
        return at / max(1, len(axis.choices) - 1)
    number = float(value)  # pyright: ignore[reportArgumentType]  # a range is of numbers
    if axis.is_log:
        return float(np.log(number / axis.low) / np.log(axis.high / axis.low))
    return (number - axis.low) / (axis.high - axis.low)


def _columns(result: SweepResult) -> list[str]:
    return [*(axis.name.split(".")[-1] for axis in result.axes), RECALL, "pairs", "status"]


def _row(result: SweepResult, trial: TrialResult) -> list[str]:
    values = [trial.point.get(axis.name) for axis in result.axes]
    cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
    recall = "-" if trial.value is None else f"{100 * trial.value:.1f}"
    note = " (preset)" if trial.is_default else ""
    reason = f": {trial.reason}" if trial.reason else ""
    return [*cells, recall, f"{trial.pairs:,}", f"{trial.status}{note}{reason}"]


def _by_value(trials: Sequence[TrialResult]) -> list[TrialResult]:
    return sorted(trials, key=lambda trial: (-trial.pairs, -(trial.value or 0.0)))


def _format(point: Point) -> str:
    return format_point({name: value for name, value in point.items() if name != "seed"})


def _png(figure: Figure) -> str:
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110)
        return base64.b64encode(file.getvalue()).decode("ascii")
