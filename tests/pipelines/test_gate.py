"""What the gate lets through, from scores made by hand."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from albef_core.errors import InputError
from pipelines.config_file import read_yaml
from pipelines.gate import Reason, Scores, judge_limits, judge_scores
from pipelines.leaks import LeakReport
from pipelines.registry_config import Check, Gate
from pipelines.row_scores import example_rows

ROOT = Path(__file__).parents[2]
CHECK = Check(task="entailment", corpus=Path("held-out"))


def rows(scores: np.ndarray) -> pa.Table:
    ids = [f"picture-{number:03d}" for number in range(len(scores))]
    return example_rows({"accuracy": scores}, ids, range(len(scores)))


def judge(candidate: np.ndarray, champion: np.ndarray | None, **check: object) -> list[Reason]:
    one = Check(task="entailment", corpus=Path("held-out"), **check)
    gate = Gate(model="m", checks=(one,), num_resamples=500)
    other = None if champion is None else rows(champion)
    return judge_scores(gate, one, Scores(candidate=rows(candidate), champion=other))


def hits(share: float, num: int = 200) -> np.ndarray:
    return (np.arange(num) % 100 < 100 * share).astype(float)


@pytest.mark.parametrize(
    ("candidate", "champion", "limits", "verdict"),
    [
        (0.8, 0.5, {}, "pass"),
        (0.5, 0.5, {}, "fail"),
        (0.4, 0.6, {}, "fail"),
        (0.51, 0.5, {}, "unproven"),
        (0.8, 0.5, {"min_gain": 0.5}, "fail"),
        (0.5, 0.5, {"max_loss": 0.01}, "pass"),
        (0.48, 0.5, {"max_loss": 0.2}, "pass"),
        (0.3, 0.5, {"max_loss": 0.01}, "fail"),
    ],
)
def test_better_must_be_proven_and_so_must_not_much_worse(candidate, champion, limits, verdict):
    (reason,) = judge(hits(candidate), hits(champion), **limits)

    assert reason.verdict == verdict


def test_a_reason_has_both_scores_and_the_interval():
    (reason,) = judge(hits(0.8), hits(0.5))

    assert reason.what == "entailment on held-out, accuracy"
    assert re.match(
        r"80\.0%, champion 50\.0%: \+30\.00 points \(\+2\d\.\d\d to \+3\d\.\d\d, 200 pictures\)",
        reason.found,
    )
    assert reason.needed == "95% interval above +0.00 points"


def test_few_pictures_are_too_little_evidence_however_clear_they_are():
    (reason,) = judge(np.ones(29), np.zeros(29))

    assert reason.verdict == "unproven"
    assert reason.needed.endswith("of 30 pictures at least")
    assert judge(np.zeros(29), np.ones(29))[0].verdict == "fail"


def test_without_a_champion_only_the_absolute_limit_counts_and_that_is_said():
    low, free = judge(hits(0.4), None, min_value=0.5)
    assert (low.verdict, low.found, low.needed) == ("fail", "40.0%", "at least 50.0%")
    assert (free.verdict, free.found) == ("pass", "40.0%; there is no champion yet")


def test_the_order_of_rows_means_nothing_and_other_rows_are_refused():
    table = rows(hits(0.8))
    gate = Gate(model="m", checks=(CHECK,), num_resamples=500)
    turned = table.take(pa.array(range(len(table) - 1, -1, -1)))
    straight = judge_scores(gate, CHECK, Scores(candidate=table, champion=rows(hits(0.5))))
    assert judge_scores(gate, CHECK, Scores(candidate=turned, champion=rows(hits(0.5)))) == straight
    with pytest.raises(InputError, match=r"held-out: .* other rows of it \(200 and 199\)"):
        judge_scores(gate, CHECK, Scores(candidate=table, champion=rows(hits(0.5)[:-1])))


def test_rows_without_the_metric_are_left_out_and_a_metric_that_is_not_there_is_named():
    check = Check(task="grounding", corpus=Path("c"), metric="box_accuracy")
    gate = Gate(model="m", checks=(check,), num_resamples=100)
    ids = [f"{number}" for number in range(80)]
    boxes = np.where(np.arange(80) % 2, np.nan, 1.0)
    table = example_rows({"box_accuracy": boxes}, ids, range(80))
    (reason,) = judge_scores(gate, check, Scores(candidate=table, champion=None))
    assert reason.found.startswith("100.0%")
    without = example_rows({"pointing_game": boxes}, ids, range(80))
    with pytest.raises(InputError, match=r"no box_accuracy for grounding\. There are: pointing"):
        judge_scores(gate, check, Scores(candidate=without, champion=None))


def test_limits_of_size_time_and_leaks():
    leak = LeakReport(
        corpus_id="1",
        num_images=100,
        num_leaked=2,
        by_kind={"image_id": 0, "sha256": 2, "phash": 1},
        some_ids=("a", "b"),
    )
    gate = Gate(model="m", checks=(CHECK,), max_size_mb=10, max_latency_ms=5.0, max_leak_share=0.01)
    reasons = judge_limits(gate, size_mb=11, latency_ms=4.96, leaks=[leak, "it is gone"])
    assert [(reason.what, reason.verdict) for reason in reasons] == [
        ("size, MB", "fail"),
        ("latency, ms", "pass"),
        ("leaks", "fail"),
        ("leaks", "unproven"),
    ]
    assert reasons[2].found == (
        "2 of 100 learned from (0 by image_id, 2 by sha256, 1 by phash): a, b"
    )
    assert (
        judge_limits(Gate(model="m", checks=(CHECK,)), size_mb=1, latency_ms=None, leaks=[]) == []
    )


GOOD = "model: m\nchecks:\n  - {task: vqa, corpus: c, max_loss: 0.01}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GOOD + "max_latency: 3\n", "unknown key max_latency. Did you mean max_latency_ms?"),
        (
            GOOD.replace("max_loss", "max_los"),
            "checks[0]: unknown key max_los. Did you mean max_loss?",
        ),
        (GOOD.replace("vqa", "vqq"), "checks[0].task: expected one of 'retrieval',"),
        (
            GOOD.replace("0.01", "0.01, metric: itm"),
            "checks[0]: metric 'itm' is none of vqa. There are: accuracy.",
        ),
        (
            GOOD.replace("0.01", "0.01, min_gain: 0"),
            "checks[0]: min_gain 0.0 and max_loss 0.01 contradict each other. Give one of them.",
        ),
        (GOOD.replace("0.01", "1%"), 'checks[0].max_loss: expected float, found "1%".'),
        ("model: m\nchecks: []\n", "checks is empty: a gate without any lets everything through."),
        ("model: m\n", "checks: the key is missing."),
        ("- model\n", 'expected an object, found ["model"].'),
        ("model: 2026-01-01\nchecks: []\n", 'model: expected str, found "2026-01-01".'),
        ("model: [m\n", "not YAML (while parsing a flow sequence"),
    ],
)
def test_a_wrong_gate_file_is_one_line_that_names_the_place(text, sentence, tmp_path):
    (tmp_path / "gate.yaml").write_text(text)

    with pytest.raises(InputError, match=f"^{re.escape(f'{tmp_path}/gate.yaml: {sentence}')}"):
        read_yaml(tmp_path / "gate.yaml", Gate)


def test_the_gate_that_is_shipped_can_be_read():
    gate = read_yaml(ROOT / "gates" / "pretrain.yaml", Gate)

    assert gate.model == "albef-pretrain"
    assert [(one.column, one.least_gain) for one in gate.checks] == [("itm", 0.0), ("itc", -0.005)]
    assert gate.max_leak_share == 0.001
