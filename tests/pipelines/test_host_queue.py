import random

import pytest

from pipelines.host_queue import MAX_UNANSWERED, Attempt, HostLimits, HostQueue
from pipelines.ledger import Wanted

A, B = "http://a", "http://b"


def limits(**changes: float) -> HostLimits:
    values = {
        "connections": 2,
        "interval_s": 0.0,
        "retries": 2,
        "backoff_s": 1.0,
        "max_wait_s": 60.0,
    }
    return HostLimits(**(values | changes))  # type: ignore[arg-type]


def queue(rows: dict[str, int], **changes: float) -> HostQueue:
    made = HostQueue(limits(**changes), random.Random(0))
    for origin, number in rows.items():
        for position in range(number):
            made.add(Wanted(position, f"{origin}/{position}", b"", 0, None), origin, 0.0)
    return made


def take(waiting: HostQueue, now: float) -> list[Attempt]:
    taken = []
    while attempt := waiting.next(now):
        taken.append(attempt)
    return taken


def fail(waiting: HostQueue, attempt: Attempt, failure: str, now: float, **told: float) -> bool:
    waiting.release(attempt, now)
    return waiting.failed(attempt, failure, now=now, **told)  # type: ignore[arg-type]


def test_a_host_has_no_more_connections_than_allowed_and_others_need_not_wait() -> None:
    waiting = queue({A: 5, B: 1})

    first = take(waiting, 0.0)
    waiting.release(first[0], 0.0)
    waiting.ended(first[0], 0.0)

    assert sorted(attempt.host.name for attempt in first) == [A, A, B]
    assert [attempt.host.name for attempt in take(waiting, 0.0)] == [A]


def test_requests_to_a_host_keep_their_distance() -> None:
    waiting = queue({A: 3}, interval_s=0.5)

    assert len(take(waiting, 0.0)) == 1
    assert waiting.wait_s(0.1) == pytest.approx(0.4)
    assert len(take(waiting, 0.4)) == 0
    assert len(take(waiting, 0.5)) == 1


def test_a_passing_failure_is_tried_again_after_longer_and_longer_waits() -> None:
    waiting, now, waits = queue({A: 1}), 0.0, []

    while fail(waiting, take(waiting, now)[0], "http 503", now):
        wait = waiting.wait_s(now)
        assert wait is not None
        waits.append(wait)
        assert not take(waiting, now + wait - 0.01)
        now += wait

    assert [1 <= waits[0] <= 1.5, 2 <= waits[1] <= 3, len(waits)] == [True, True, 2]
    assert waiting.num_rows == 0


@pytest.mark.parametrize("failure", ["http 404", "http 410", "robots", "not an image", "too large"])
def test_a_lasting_failure_is_not_tried_again(failure: str) -> None:
    waiting = queue({A: 1})

    assert not fail(waiting, take(waiting, 0.0)[0], failure, 0.0)


def test_too_many_requests_hold_up_the_host_without_a_word_on_how_long() -> None:
    waiting = queue({A: 4}, connections=1)

    fail(waiting, take(waiting, 0.0)[0], "http 429", 0.0)

    assert not take(waiting, 0.9)
    assert len(take(waiting, 1.5)) == 1


def test_retry_after_holds_up_the_whole_host_and_no_other() -> None:
    waiting = queue({A: 4, B: 1}, connections=1)
    first = {attempt.host.name: attempt for attempt in take(waiting, 0.0)}

    assert fail(waiting, first[A], "http 429", 0.0, wait_s=10.0)
    waiting.release(first[B], 0.0)
    waiting.ended(first[B], 0.0)

    assert not take(waiting, 9.9)
    assert len(take(waiting, 10.0)) == 1


def test_a_host_that_asks_for_too_long_a_wait_is_left_for_this_run() -> None:
    waiting = queue({A: 3}, connections=1)

    is_again = fail(waiting, take(waiting, 0.0)[0], "http 429", 0.0, wait_s=3600.0)

    assert not is_again
    assert [failure for _row, failure in waiting.given_up()] == ["http 429"] * 2
    assert waiting.num_rows == 0


def test_an_unreachable_host_is_probed_by_one_row_and_given_up_with_all_of_its_rows() -> None:
    waiting, now, probes, ended = queue({A: 100}), 0.0, [], 0

    for _round in range(5):
        taken = take(waiting, now)
        probes.append(len(taken))
        for attempt in taken:
            ended += not fail(waiting, attempt, "dns", now)
        now += 10.0

    given_up = list(waiting.given_up())
    assert probes == [2, 1, 1, 0, 0]
    assert ended + len(given_up) == 100
    assert {failure for _row, failure in given_up} == {"dns"}
    assert waiting.num_rows == 0


def test_a_host_that_comes_back_is_fetched_from_as_before() -> None:
    waiting = queue({A: 6})
    for attempt in take(waiting, 0.0):
        fail(waiting, attempt, "connect", 0.0)

    probe = take(waiting, 5.0)
    waiting.release(probe[0], 5.0)
    waiting.ended(probe[0], 5.0)

    assert len(probe) == 1
    assert len(take(waiting, 5.0)) == 2


def test_many_first_tries_without_an_answer_mean_a_dead_host() -> None:
    waiting = queue({A: 500}, connections=1)

    for _ in range(MAX_UNANSWERED):
        fail(waiting, take(waiting, 0.0)[0], "timeout first byte", 0.0)

    assert not take(waiting, 0.0)
    assert len(list(waiting.given_up())) == 500 - MAX_UNANSWERED


def test_an_answer_in_between_means_a_host_that_lives() -> None:
    waiting = queue({A: 500}, connections=1)

    for number in range(200):
        failure = "http 404" if number % 20 == 19 else "timeout first byte"
        fail(waiting, take(waiting, 0.0)[0], failure, 0.0)

    assert len(take(waiting, 0.0)) == 1


def test_a_failure_behind_a_redirect_is_not_the_host_s() -> None:
    waiting = queue({A: 50}, connections=1)

    for _ in range(10):
        attempt = take(waiting, 0.0)[0]
        waiting.release(attempt, 0.0)
        waiting.failed(attempt, "dns", now=0.0, is_elsewhere=True)

    assert len(take(waiting, 0.0)) == 1


def test_rows_that_come_after_a_host_was_given_up_end_with_it() -> None:
    waiting = queue({A: 1}, connections=1)
    fail(waiting, take(waiting, 0.0)[0], "http 429", 0.0, wait_s=3600.0)

    waiting.add(Wanted(7, f"{A}/7", b"", 0, None), A, 1.0)

    assert [(a.row.position, a.tries, failure) for a, failure in waiting.given_up()] == [
        (7, 0, "http 429")
    ]
