import threading
import time

import pytest

from pipelines.watchdog import Watchdog, describe_stall

LIMIT_S = 0.15


@pytest.fixture
def told():
    return []


@pytest.fixture
def dog(told):
    dog = Watchdog(LIMIT_S, told.append, rank=1)
    yield dog
    dog.close()


def wait_in_the_dark(seconds):
    time.sleep(seconds)


def test_the_sentence_names_rank_part_step_and_both_times():
    sentence = describe_stall(1, (41, 100.0), (("data", 102.0),), 700.0)
    assert sentence == "rank 1: no step for 600 s: stuck in data since step 41 (598 s)"


def test_the_sentence_names_nested_parts_and_the_time_in_the_innermost():
    parts = (("step", 101.0), ("collective", 105.0))
    sentence = describe_stall(0, (None, 100.0), parts, 165.0)
    assert sentence == (
        "rank 0: no step for 65 s: stuck in step > collective since the start (60 s)"
    )


def test_the_sentence_says_when_no_part_was_named():
    sentence = describe_stall(0, (3, 100.0), (), 110.0)
    assert sentence == (
        "rank 0: no step for 10 s: stuck in none of the named parts since step 3 (10 s)"
    )


def test_a_part_that_never_ends_is_named_once_with_the_stack(dog, told, caplog):
    dog.beat(41)
    with dog.part("data"):
        wait_in_the_dark(4 * LIMIT_S)
    assert len(told) == 1
    assert "rank 1: " in told[0]
    assert "stuck in data since step 41" in told[0]
    (record,) = caplog.records
    assert told[0] in record.message
    assert "wait_in_the_dark" in record.message, "the stack is that of the thread that trains"


def test_the_limit_counts_from_the_start_when_no_step_ends(dog, told):
    with dog.part("collective"):
        time.sleep(3 * LIMIT_S)
    (sentence,) = told
    assert "stuck in collective since the start" in sentence


def test_steps_in_time_are_left_alone_however_long_they_take_together(dog, told):
    for step in range(12):
        with dog.part("data"):
            time.sleep(LIMIT_S / 5)
        dog.beat(step)
    assert told == []


def test_parts_alone_do_not_count_as_progress(dog, told):
    deadline = time.monotonic() + 3 * LIMIT_S
    while time.monotonic() < deadline:
        with dog.part("checkpoint"):
            time.sleep(LIMIT_S / 10)
    assert len(told) == 1


def test_every_stall_is_told_anew(dog, told):
    for step in (1, 2):
        dog.beat(step)
        time.sleep(3 * LIMIT_S)
    assert ["since step 1" in told[0], "since step 2" in told[1]] == [True, True]
    assert len(told) == 2


def test_a_part_is_over_when_its_block_raises(dog, told):
    def fail():
        with dog.part("step"), dog.part("collective"):
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    time.sleep(2 * LIMIT_S)
    (sentence,) = told
    assert "none of the named parts" in sentence


def test_a_closed_watchdog_is_silent_and_its_thread_ends(dog, told):
    dog.close()
    time.sleep(2 * LIMIT_S)
    assert told == []
    assert "watchdog 1" not in [thread.name for thread in threading.enumerate()]


def test_a_part_costs_microseconds(dog):
    started = time.perf_counter()
    for step in range(1000):
        with dog.part("step"):
            pass
        dog.beat(step)
    assert time.perf_counter() - started < 0.1  # 2 ms measured; a step takes tens at least
