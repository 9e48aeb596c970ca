import json
import math

from pipelines.flight_recorder import FlightRecorder


def note(recorder, step, *, loss=math.nan):
    recorder.note(
        step,
        loss=loss,
        grad_norm=math.inf,
        image_ids=[f"image-{step}", "cat"],
        captions=["a circle", "a cat"],
    )


def test_a_skipped_batch_is_recorded_with_its_pairs_in_plain_json():
    recorder = FlightRecorder(None)
    recorder.clear(6)
    note(recorder, 7)
    body = json.loads(json.dumps(recorder.artifact(), allow_nan=False))
    assert body == {
        "num_skipped": 1,
        "skipped": [
            {
                "step": 7,
                "loss": "nan",
                "grad_norm": "inf",
                "image_ids": ["image-7", "cat"],
                "captions": ["a circle", "a cat"],
            }
        ],
    }


def test_a_finite_loss_stays_a_number_when_only_the_gradient_is_bad():
    recorder = FlightRecorder(None)
    note(recorder, 0, loss=2.5)
    assert recorder.skipped[0]["loss"] == 2.5


def test_a_finite_step_ends_the_row_and_keeps_the_records():
    recorder = FlightRecorder(None)
    for step in (0, 1, 3):
        note(recorder, step)
        recorder.clear(2)
    note(recorder, 4)
    assert recorder.in_a_row == 2
    assert [record["step"] for record in recorder.skipped] == [0, 1, 3, 4]


def test_a_replayed_step_has_one_record(tmp_path):
    recorder = FlightRecorder(tmp_path)
    for step in (3, 4, 3, 4):
        note(recorder, step)
    assert [record["step"] for record in recorder.skipped] == [3, 4]
    assert recorder.in_a_row == 2


def test_a_resumed_training_counts_on_where_the_killed_one_was(tmp_path):
    killed = FlightRecorder(tmp_path / "skipped")
    for step in (1, 10, 11, 12):
        note(killed, step)
    resumed = FlightRecorder(tmp_path / "skipped")
    assert resumed.artifact() == killed.artifact()
    note(resumed, 12)  # repeated from the checkpoint after step 11
    assert resumed.in_a_row == 3
    note(resumed, 13)
    assert resumed.in_a_row == 4


def test_a_step_that_is_finite_when_repeated_loses_its_record(tmp_path):
    note(FlightRecorder(tmp_path), 5)
    resumed = FlightRecorder(tmp_path)
    resumed.clear(5)
    assert resumed.skipped == FlightRecorder(tmp_path).skipped == []
