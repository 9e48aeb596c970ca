"""Acts in the real registry: numbers that no two processes share, and who may go on."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from pipelines import history as module
from pipelines.history import History, Intent, Outcome


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield MlflowClient(uri, registry_uri=uri)


@pytest.fixture
def history(client, request):
    return History(client, request.node.name[:60])


def intent(**changes: object) -> Intent:
    wanted = Intent(act="promote", candidate="2", candidate_sha256="ab", why="it is time", gate="g")
    return replace(wanted, **changes)


def ended_process() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    name = f"{process.pid} 1"
    process.wait()
    return name


def test_acts_are_numbered_and_come_back_as_they_were_written(history):
    first, _ = history.begin(intent())
    first = history.close(first, Outcome(result="refused", why="size"))
    second, left = history.begin(intent(act="rollback"))
    assert (first.number, second.number, left) == (1, 2, [])
    assert history.acts() == [first, second]
    assert all((first.intent.who, first.intent.host, first.intent.git_commit))
    history.end(second)


def test_a_second_act_is_refused_while_the_first_is_under_way(history):
    first, _ = history.begin(intent())
    second, left = history.begin(intent())
    assert second.outcome.result == "refused"
    assert second.outcome.why.startswith(f"promote {first.number} by ")
    assert left == []
    assert history.is_open(first)
    history.close(first, Outcome(result="done", why=""))
    third, left = history.begin(intent())
    assert (third.outcome, left) == (None, [])
    history.end(third)


def test_what_an_act_that_raised_left_open_is_handed_to_the_next(history):
    first, _ = history.begin(intent())
    history.end(first)
    second, left = history.begin(intent())
    assert second.outcome is None
    assert left == [first]
    history.end(second)


def test_an_ended_process_is_left_behind_and_a_living_one_is_not(history):
    history.begin(intent(process=ended_process()))
    dead_too = intent(process=f"{os.getpid()} 1")  # its number has been given to us
    assert history.begin(dead_too)[0].outcome is None
    parent, _ = history.begin(intent(process=module._name_process(os.getppid())))
    assert parent.outcome is None
    assert [act.number for act in history.begin(intent())[1]] == []
    assert history.acts()[-1].outcome.why.startswith("promote 3 by")


def test_another_host_s_act_is_given_up_after_a_day(history):
    yesterday = time.time() - 25 * 3600
    old, _ = history.begin(intent(host="elsewhere", started=yesterday))
    now, left = history.begin(intent(host="elsewhere"))
    assert (now.outcome, [act.number for act in left]) == (None, [old.number])
    assert history.begin(intent())[0].outcome.result == "refused"


WRITER = """
import sys
from mlflow import MlflowClient
from pipelines.history import History, Intent
uri = sys.argv[1]
history = History(MlflowClient(uri, registry_uri=uri), "shared")
print("ready", flush=True)
sys.stdin.readline()
for turn in range(8):
    wanted = Intent(act="promote", candidate=sys.argv[2], candidate_sha256="", why="", gate="")
    act, _ = history.begin(wanted)
    print(act.number, "refused" if act.outcome else "open", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow  # starts two processes that import MLflow
def test_two_processes_at_once_get_numbers_of_their_own_and_one_of_them_goes_on(client):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    command = [sys.executable, "-W", "ignore", "-c", WRITER, uri]
    writers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("1", "2")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.stdout.readline().split() for _ in range(8) for writer in writers]
    for writer in writers:  # only now may they end: an act of an ended process is not under way
        writer.communicate()
    states = {int(number): state for number, state in said}
    assert [states[number] for number in range(1, 17)] == ["open", *["refused"] * 15]
