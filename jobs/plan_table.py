"""A plan of cost and time as two tables: what the run holds, what it takes on each device."""

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pipelines.config import PlanConfig
from pipelines.plan import Range, make_plan

COLORS = {"measured": "green", "reported": "yellow", "estimated": "red"}


def print_plan(config: PlanConfig) -> None:
    """Print them, and below who says each rate."""
    plan = make_plan(config)
    run = Table("plan", Column("nothing was trained", overflow="fold"), title="Pre-training")
    batch = f"of {config.batch_size:,} pairs, workers: {config.workers}"
    run.add_row("pictures", f"{plan.num_images:,}")
    run.add_row("steps", f"{plan.num_steps:,} {batch}; {plan.num_pairs:,} pairs in all")
    run.add_row("work", f"{plan.gflop_per_pair:,.3g} GFLOP a pair, counted")
    corpus = "in its shards" if plan.is_corpus_there else "at 30 kB a picture, estimated"
    run.add_row("corpus", f"{plan.corpus_bytes / 1e9:,.3g} GB {corpus}")
    size, number = plan.checkpoint_bytes / 1e9, plan.num_checkpoints
    run.add_row("checkpoints", f"{number} x {size:,.3g} GB = {number * size:,.3g} GB at most")
    costs = Table(
        *("on", "pairs/s each", "", "GPU or core hours", "days", "feed CPUs"),
        *(["price"] if config.price else []),
        title=f"{config.workers} at once, were they as fast together as one by one",
    )
    sources = [f"feed, {plan.feed.label}, a CPU {_range(plan.feed.pairs_per_s)} pairs/s"]
    sources[0] += f": {plan.feed.source}"
    for cost in plan.costs:
        rate = cost.throughput
        costs.add_row(
            *(rate.on, _range(rate.pairs_per_s), f"[{COLORS[rate.label]}]{rate.label}[/]"),
            *(_range(cost.device_hours), _range(cost.days), f"{cost.feed_cpus:,}"),
            *([_range(cost.price)] if config.price else []),
        )
        sources.append(f"{rate.on}, {rate.label}: {rate.source}")
    Console().print(run, costs, *map(escape, sources), sep="\n")


def _range(values: Range) -> str:
    low, high = (f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values)
    return low if low == high else f"{low} to {high}"
