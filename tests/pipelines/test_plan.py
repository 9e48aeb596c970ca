"""The numbers of a plan against others: the FLOPs that torch counts, the days reported."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from albef_core.batch import PairBatch
from albef_core.errors import InputError
from albef_core.feature_queue import Queues
from albef_core.masking import NOT_SCORED
from albef_core.model import ALBEF
from albef_core.pretraining import pretraining_step
from albef_core.teacher import Teacher
from pipelines.config import PlanConfig
from pipelines.manifest import read_manifest
from pipelines.plan import PEAK_TFLOPS, TABLE, gflop_per_pair, make_plan, throughputs
from pipelines.presets import PLAN, PRETRAIN, tiny
from tests.conftest import SmallCorpus

NUM_PAIRS, NUM_TOKENS = 8, 20


def plan_of(preset: str, **changes: Any) -> PlanConfig:
    return dataclasses.replace(PLAN[preset](), **changes)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_flops_are_those_that_torch_counts_in_a_step(micro_batch_size: int | None) -> None:
    preset = tiny()
    config = dataclasses.replace(
        preset,
        batch_size=NUM_PAIRS,
        micro_batch_size=micro_batch_size,
        model=dataclasses.replace(preset.model, vocab_size=500),
        text=dataclasses.replace(preset.text, max_tokens=NUM_TOKENS),
    )
    student = ALBEF(config.model)
    teacher = Teacher(config.model, student).eval()
    words = torch.randint(200, 500, (NUM_PAIRS, NUM_TOKENS))
    is_scored = torch.arange(NUM_TOKENS).expand_as(words) < config.objective.mask_share * NUM_TOKENS
    batch = PairBatch(
        images=torch.randn(NUM_PAIRS, 3, config.model.image_size, config.model.image_size),
        token_ids=words,
        attention_mask=torch.ones_like(words, dtype=torch.bool),
        masked_ids=words,
        mlm_labels=words.masked_fill(~is_scored, NOT_SCORED),
        image_ids=torch.arange(NUM_PAIRS),
    )
    queues = Queues(config.model, config.objective, config.recipe)

    with FlopCounterMode(display=False) as counter:
        step = pretraining_step(
            student, teacher, queues, batch,
            alpha=0.4, recipe=config.recipe, micro_batch_size=micro_batch_size,
        )  # fmt: skip
        step.loss.backward()

    counted = counter.get_total_flops() / NUM_PAIRS / 1e9
    assert gflop_per_pair(config) == pytest.approx(counted, rel=0.03)


def test_the_paper_s_first_setting_on_its_own_gpus() -> None:
    plan = make_plan(plan_of("paper-4m", images=4_000_000, on="A100", price=2.0))

    (cost,) = plan.costs
    assert plan.num_steps == 30 * (4_000_000 // 512)
    assert plan.num_pairs == plan.num_steps * 512
    assert cost.throughput.label == "reported"
    # The days that the authors name, on eight.
    assert (round(cost.days[0]), round(cost.days[1])) == (2, 4)
    assert cost.device_hours[1] == pytest.approx(plan.num_pairs / 43 / 3600)
    assert cost.price[0] == pytest.approx(2 * cost.device_hours[0])
    assert cost.feed_cpus == math.ceil(1.2 * 8 * 111 / 205)
    # Student, teacher and AdamW: 4 times 210 million weights of 4 bytes, and the queues.
    assert plan.checkpoint_bytes == pytest.approx(4 * 4 * 210e6 + 2 * 65536 * 256 * 4, rel=0.03)
    assert plan.num_checkpoints == 4


def test_a_gpu_without_a_row_is_estimated_by_its_peak() -> None:
    config = plan_of("paper-4m", images=4_000_000, on="H100")

    (rate,) = (cost.throughput for cost in make_plan(config).costs)

    assert rate.label == "estimated"
    assert rate.pairs_per_s[0] == pytest.approx(0.07 * 989e3 / gflop_per_pair(config))
    assert "7% to 15% of 989 TFLOP/s in bf16" in rate.source


def test_another_model_than_a_row_s_is_estimated_by_flops() -> None:
    rows = json.loads(TABLE.read_text())["steps"]
    larger = dataclasses.replace(PLAN["paper-4m"]().model, image_size=384)
    config = plan_of("paper-4m", images=1000, on="A100", model=larger)

    (rate,) = throughputs(config, rows)

    assert rate.label == "estimated"
    assert "from paper-4m, reported" in rate.source
    ratio = gflop_per_pair(PLAN["paper-4m"]()) / gflop_per_pair(config)
    assert rate.pairs_per_s == pytest.approx((43 * ratio, 111 * ratio))
    assert ratio < 0.6


def test_no_number_is_called_measured_that_this_project_did_not_measure() -> None:
    table = json.loads(TABLE.read_text())
    for row in table["steps"] + table["feed"]:
        assert row["label"] in {"measured", "reported"}
        assert row["pairs_per_s"][0] <= row["pairs_per_s"][1]
        assert row["hardware"]
        assert row["date"].startswith("20")
        is_own = "python -m benchmarks." in row["source"]
        assert is_own == (row["label"] == "measured")


def test_without_a_gpu_named_all_are_planned_once() -> None:
    plan = make_plan(plan_of("tiny", images=4000))

    names = [cost.throughput.on for cost in plan.costs]
    assert len(names) == len(set(names))
    assert set(names) == {"cpu", "V100", *PEAK_TFLOPS}
    labels = {cost.throughput.on: cost.throughput.label for cost in plan.costs}
    assert labels["cpu"] == "measured"
    assert labels["A100"] == "estimated"


def test_a_corpus_tells_its_pictures_and_bytes(small_corpus: SmallCorpus) -> None:
    plan = make_plan(plan_of("tiny", corpus=small_corpus.folder, on="cpu"))

    manifest = read_manifest(small_corpus.folder)
    assert (plan.num_images, plan.is_corpus_there) == (203, True)
    assert plan.num_steps == 10 * (203 // 32)
    assert plan.corpus_bytes == sum(shard.bytes for shard in manifest.shards)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(InputError, match=r"--corpus DIR, or --images N"):
        make_plan(plan_of("tiny"))
    with pytest.raises(InputError, match=r"--on h10.*Did you mean H100"):
        make_plan(plan_of("tiny", images=4000, on="h10"))


@pytest.mark.parametrize("name", PRETRAIN)
def test_what_is_planned_is_the_preset(name: str) -> None:
    planned = vars(PLAN[name]())

    assert {key: planned[key] for key in vars(PRETRAIN[name]()) if key != "corpus"} == {
        key: value for key, value in vars(PRETRAIN[name]()).items() if key != "corpus"
    }
