import threading
import time

from pipelines.outbox import Outbox


def test_calls_are_made_in_order():
    made = []
    outbox = Outbox("test")
    for number in range(50):
        outbox.put(lambda number=number: made.append(number))
    assert outbox.wait(5)
    assert made == list(range(50))
    assert outbox.close(5) == 0


def test_a_call_that_fails_is_made_again_and_holds_its_place(caplog):
    made, is_down = [], threading.Event()
    is_down.set()

    def send(number):
        if is_down.is_set():
            raise ConnectionError("down")
        made.append(number)

    outbox = Outbox("test", first_pause_s=0.01, longest_pause_s=0.02)
    outbox.put(lambda: send(1))
    outbox.put(lambda: send(2))
    assert not outbox.wait(5)  # gives up as soon as it knows of the outage
    time.sleep(0.2)
    assert made == []
    is_down.clear()
    assert outbox.close(5) == 0
    assert made == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "test does not answer; the run goes on and sends later (down)",
        "test answers again",
    ]


def test_a_hopeless_call_is_dropped_and_logged(caplog):
    made = []

    def refuse():
        raise ValueError("bad name")

    outbox = Outbox("test", is_hopeless=lambda error: isinstance(error, ValueError))
    outbox.put(refuse)
    outbox.put(lambda: made.append(1))
    assert outbox.close(5) == 0
    assert made == [1]
    assert "test refuses what it was sent: bad name" in caplog.text


def test_closing_counts_what_was_never_sent():
    def fail():
        raise ConnectionError("down")

    outbox = Outbox("test", first_pause_s=0.01)
    outbox.put(fail)
    outbox.put(fail)
    assert outbox.close(0.1) == 2


def test_beyond_its_limit_the_oldest_call_is_lost():
    made, has_begun, may_go = [], threading.Event(), threading.Event()
    outbox = Outbox("test", max_waiting=2)
    outbox.put(lambda: (has_begun.set(), may_go.wait()))
    assert has_begun.wait(5)
    for number in range(4):
        outbox.put(lambda number=number: made.append(number))
    may_go.set()
    assert outbox.close(5) == 0
    assert made == [2, 3]
