"""Champions in the real registry: proven, refused, moved, taken back, and after every crash."""

import os
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rich.console import Console

from albef_core.errors import InputError
from pipelines import promote as module
from pipelines import weighing
from pipelines.acts import Config, carry_out
from pipelines.config_file import write_config
from pipelines.evaluation_config import EvaluateConfig
from pipelines.history import Act, History
from pipelines.manifest import Manifest
from pipelines.model_store import log_model, verify
from pipelines.promote import check, promote, rollback
from pipelines.registry_config import (
    Check,
    CheckConfig,
    DiffConfig,
    Gate,
    HistoryConfig,
    PromoteConfig,
    RollbackConfig,
)
from pipelines.row_scores import example_rows, log_rows, subject_of
from pipelines.tracking import Tracker, open_run, tracking_uri
from tests.conftest import picture_row, write_corpus
from tests.pipelines.small_model import made_by_hand, save_small_model, words_of

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 60
SHARES = {"1": 0.3, "2": 0.8, "3": 0.3, "4": 0.1}
"""Mean recall of each version: the second is better than the first, the third equal, the fourth
worse."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture(scope="module")
def client(store):
    return MlflowClient(tracking_uri())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Manifest:
    rows = [picture_row(number) for number in range(NUM_IMAGES)]
    folder = tmp_path_factory.mktemp("data") / "held-out"
    return write_corpus(folder, rows, rows_per_shard=60, rows_per_group=16)


@pytest.fixture(scope="module")
def models(store, client, corpus, tmp_path_factory) -> list[dict]:
    """Four logged models with rows of an evaluation, as versions are made of."""
    made = []
    for number, share in SHARES.items():
        folder = tmp_path_factory.mktemp("trained") / "model"
        save_small_model(folder, words_of(corpus), seed=int(number))
        run = open_run("test", None, run_name=number, params={}, tags={})
        stored = log_model(run, folder, provenance=made_by_hand(corpus), register="template")
        config = EvaluateConfig(model=stored.uri, corpus=corpus.folder)
        subject = subject_of("retrieval", config, model=folder, corpus_id=corpus.content_id)
        hits = (np.arange(NUM_IMAGES) < share * NUM_IMAGES).astype(float)
        ids = [f"picture-{image:03d}" for image in range(NUM_IMAGES)]
        tracker = Tracker(run)
        log_rows(tracker, example_rows({"itm": hits}, ids, range(NUM_IMAGES)), subject)
        tracker.finish()
        version = client.get_model_version("template", stored.version)
        made.append({"source": version.source, "run_id": run.run_id, "tags": version.tags})
    return made


@dataclass
class Registry:
    """A registered model of four versions, and its gate."""

    client: MlflowClient
    name: str
    gate: Path

    def start(self, **aliases: str) -> None:
        for alias, version in aliases.items():
            self.client.set_registered_model_alias(self.name, alias, version)

    def promote(self, candidate: str, **more: str) -> Act:
        return promote(PromoteConfig(gate=self.gate, candidate=candidate, **more))

    def rollback(self) -> Act:
        return rollback(RollbackConfig(model=self.name))

    @property
    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model(self.name).aliases
        return {alias: str(version) for alias, version in found.items()}

    @property
    def acts(self) -> list[Act]:
        return History(self.client, self.name).acts()

    @property
    def results(self) -> list[str]:
        return [act.outcome.result if act.outcome else "open" for act in self.acts]


@pytest.fixture
def registry(client, corpus, models, request, tmp_path) -> Registry:
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    client.create_registered_model(name)
    for model in models:
        client.create_model_version(name, **model)
    gate = Gate(model=name, checks=(Check(task="retrieval", corpus=corpus.folder),))
    write_config(gate, tmp_path / "gate.yaml")  # JSON is YAML
    return Registry(client, name, tmp_path / "gate.yaml")


def test_a_first_champion_then_a_better_one_and_the_old_one_is_previous(registry):
    first = registry.promote("1")
    assert first.outcome.result == "done"
    assert "there is no champion yet" in first.decision.reasons[0].found
    assert registry.aliases == {"champion": "1"}

    better = registry.promote("2", why="twice as good")
    assert better.outcome.result == "done"
    assert registry.aliases == {"champion": "2", "previous": "1"}
    assert registry.acts == [first, better]
    assert better.intent.why == "twice as good"
    assert better.decision.reasons[0].found.startswith("80.0%, champion 30.0%: +50.00 points")
    assert (better.decision.champion, better.intent.candidate) == ("1", "2")
    hashes = {better.intent.candidate_sha256, better.decision.champion_sha256}
    assert len(hashes) == 2
    assert all(len(one) == 64 for one in hashes)


@pytest.mark.parametrize("candidate", ["3", "4"], ids=["equal", "worse"])
def test_what_is_not_better_is_refused_with_its_reasons_and_nothing_moves(candidate, registry):
    registry.promote("1")

    act = registry.promote(candidate)

    assert act.outcome.result == "refused"
    assert [reason.verdict for reason in act.decision.reasons] == ["fail"]
    assert act.outcome.why == "retrieval on held-out, itm"
    assert registry.aliases == {"champion": "1"}
    assert registry.results == ["done", "refused"]


def test_check_judges_as_promote_does_and_leaves_no_act(registry):
    registry.promote("1")
    better = check(CheckConfig(gate=registry.gate, candidate="2"))
    worse = check(CheckConfig(gate=registry.gate))  # the newest
    assert (better.in_favor, worse.in_favor) == (True, False)
    assert registry.aliases == {"champion": "1"}
    assert registry.results == ["done"]


def test_an_absolute_limit_holds_for_the_first_champion_too(registry, corpus):
    strict = Check(task="retrieval", corpus=corpus.folder, min_value=0.5)
    write_config(Gate(model=registry.name, checks=(strict,)), registry.gate)
    assert registry.promote("1").outcome.result == "refused"
    assert registry.promote("2").outcome.result == "done"


def test_a_candidate_that_has_seen_the_pictures_is_refused(registry, corpus):
    gate = Gate(
        model=registry.name,
        checks=(Check(task="retrieval", corpus=corpus.folder),),
        max_leak_share=0.01,
        max_size_mb=1.0,
        max_latency_ms=1e6,
    )
    write_config(gate, registry.gate)
    act = registry.promote("1")
    assert [(one.what, one.verdict) for one in act.decision.reasons[1:]] == [
        ("size, MB", "pass"),
        ("latency, ms", "pass"),
        ("leaks", "fail"),
    ]
    assert act.outcome.result == "refused"


@pytest.mark.parametrize("whose", ["candidate", "champion"])
def test_a_changed_byte_is_refused_and_named_and_told_to_the_history(whose, registry):
    registry.promote("1")
    version = "2" if whose == "candidate" else "1"
    weights = verify(f"models:/{registry.name}/{version}").folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=r"model\.safetensors has sha256 .*, recorded was"):
            registry.promote("2")
    finally:
        weights.write_bytes(whole)
    assert registry.aliases == {"champion": "1"}
    assert registry.results == ["done", "refused"]
    assert "model.safetensors has sha256" in registry.acts[-1].outcome.why
    assert registry.promote("2").outcome.result == "done"


def fail(patch: pytest.MonkeyPatch, owner: type, method: str, *, call: int, after: bool) -> None:
    """Let one call of a method fail, before or after it has done its work."""
    real, calls = getattr(owner, method), []

    def failing(self: object, *args: object, **kwargs: object) -> object:
        calls.append(args)
        is_due = len(calls) == call
        if is_due and not after:
            raise MlflowException("the server is gone")
        result = real(self, *args, **kwargs)
        if is_due:
            raise MlflowException("the answer is lost")
        return result

    patch.setattr(owner, method, failing)


ALIAS = "set_registered_model_alias"
CRASHES = [
    # Owner, method, which call, after its work; what becomes of the act, and the champion then.
    pytest.param(History, "decide", 1, False, "undone", "1", id="before the decision"),
    pytest.param(History, "decide", 1, True, "done", "2", id="after the decision"),
    pytest.param(History, "is_open", 1, True, "done", "2", id="before anything moves"),
    pytest.param(MlflowClient, ALIAS, 1, False, "done", "2", id="before previous moves"),
    pytest.param(MlflowClient, ALIAS, 1, True, "done", "2", id="after previous has moved"),
    pytest.param(MlflowClient, ALIAS, 2, False, "done", "2", id="before champion moves"),
    pytest.param(MlflowClient, ALIAS, 2, True, "done", "2", id="after champion has moved"),
    pytest.param(History, "close", 1, False, "done", "2", id="before the outcome"),
]


@pytest.mark.parametrize(("owner", "method", "call", "after", "result", "champion"), CRASHES)
def test_a_crash_at_any_step_is_settled_by_the_next_act(
    owner, method, call, after, result, champion, registry
):
    registry.start(champion="1", previous="4")
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, owner, method, call=call, after=after)
        with pytest.raises(MlflowException):
            registry.promote("2")
    assert registry.results == ["open"]
    assert registry.aliases["champion"] in ("1", "2")

    last = registry.promote("3")

    assert last.outcome.result == "refused"
    assert registry.results == [result, "refused"]
    settled = registry.acts[0].outcome
    assert (settled.settled_by, settled.why[:17]) == (2, "its process ended")
    assert last.decision.champion == champion
    previous = "1" if champion == "2" else "4"
    assert registry.aliases == {"champion": champion, "previous": previous}


def test_a_crash_while_it_weighs_is_closed_at_once_or_by_the_next_act(registry, monkeypatch):
    registry.promote("1")
    with monkeypatch.context() as patch:
        patch.setattr(module, "weigh", lambda *_args, **_more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.promote("2")
        assert registry.results == ["done", "undone"]
        fail(patch, History, "close", call=1, after=False)
        with pytest.raises(ZeroDivisionError):
            registry.promote("2")
    assert registry.results == ["done", "undone", "open"]
    assert registry.promote("2").outcome.result == "done"
    assert registry.results == ["done", "undone", "undone", "done"]


def crash_after_previous_moved(registry: Registry) -> None:
    registry.start(champion="1", previous="4")
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, MlflowClient, ALIAS, call=2, after=False)
        with pytest.raises(MlflowException):
            registry.promote("2")
    assert registry.aliases == {"champion": "1", "previous": "1"}


def test_what_was_moved_by_hand_after_a_crash_is_left_alone(registry):
    crash_after_previous_moved(registry)
    registry.client.set_registered_model_alias(registry.name, "champion", "3")

    registry.promote("4")

    assert registry.results == ["undone", "refused"]
    assert registry.acts[0].outcome.why == "champion is 3 now"
    assert registry.aliases == {"champion": "3", "previous": "4"}


def test_a_candidate_that_was_deleted_after_a_crash_is_not_completed(registry):
    crash_after_previous_moved(registry)
    registry.client.delete_model_version(registry.name, "2")

    registry.promote("3")

    assert registry.results == ["undone", "refused"]
    assert registry.acts[0].outcome.why == "version 2 is gone"
    assert registry.aliases == {"champion": "1", "previous": "4"}


def test_a_champion_that_is_moved_by_hand_meanwhile_is_left_alone(registry, monkeypatch):
    registry.start(champion="1")

    def weigh(*args, **more):
        registry.client.set_registered_model_alias(registry.name, "champion", "3")
        return weighing.weigh(*args, **more)

    monkeypatch.setattr(module, "weigh", weigh)
    act = registry.promote("2")
    assert (act.outcome.result, registry.aliases) == ("undone", {"champion": "3"})
    assert act.outcome.why == "champion was moved to 3 by hand meanwhile"


@pytest.mark.slow  # starts two processes that import everything
def test_of_two_promotions_at_once_exactly_one_wins_and_exit_codes_tell(registry, models):
    twin = registry.client.create_model_version(registry.name, **models[1])
    registry.promote("1")
    command = [sys.executable, "jobs/promote.py", "promote", "--gate", str(registry.gate)]
    jobs = [
        subprocess.Popen(
            [*command, "--candidate", str(version), "--why", "at once"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in (2, twin.version)
    ]
    said = [job.communicate()[0] for job in jobs]
    # The other one was refused, because this one was under way or because it is not better.
    assert sorted(job.returncode for job in jobs) == [0, 1], said
    winner = [job.returncode for job in jobs].index(0)
    won = (2, twin.version)[winner]
    assert f"Version {won} is the champion now, and version 1 is `previous`" in said[winner]
    assert "is refused: " in said[1 - winner]
    assert registry.aliases == {"champion": str(won), "previous": "1"}
    assert sorted(registry.results) == ["done", "done", "refused"]


def printed(config: Config) -> str:
    result = carry_out(config, on_progress=lambda *_: None)
    console = Console(file=StringIO(), width=220)
    console.print(*result.tables, *result.lines)
    return console.file.getvalue()


def test_a_check_shows_its_reasons_and_the_history_every_act_with_who_and_why(registry):
    registry.promote("1", why="the first [of all]")
    shown = printed(CheckConfig(gate=registry.gate, candidate="4"))
    assert "10.0%, champion 30.0%: -20.00 points" in shown
    assert "95% interval above +0.00 points" in shown
    assert "The gate would stay shut." in shown
    registry.promote("4")

    told = printed(HistoryConfig(model=registry.name))

    first, second = registry.acts
    for act in (first, second):
        for word in (act.intent.who, act.intent.host, act.intent.candidate_sha256[:12]):
            assert word in told
    assert "why: the first [of all]" in told
    assert "promote 4 after 1" in told
    assert "refused: retrieval on held-out, itm" in told
    assert str(registry.gate) in told
    with pytest.raises(InputError, match="nothing : not in the MLflow store"):
        printed(HistoryConfig(model="nothing"))


def test_two_versions_are_shown_side_by_side_where_they_differ(registry, corpus, tmp_path):
    save_small_model(tmp_path / "model", words_of(corpus), seed=9)
    made = made_by_hand(config={"optim": {"lr": 2e-3}}, metrics={"val/error": 0.25})
    run = open_run("test", None, run_name="other", params={}, tags={})
    log_model(run, tmp_path / "model", provenance=made, register=registry.name)

    shown = printed(
        DiffConfig(one=f"models:/{registry.name}/1", other=f"models:/{registry.name}/5")
    )

    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in shown.splitlines()]
    assert ["optim.lr", "0.0001", "0.002"] in rows
    assert ["val/error", "0.5", "0.25"] in rows
    assert ["pictures", str(NUM_IMAGES), "0"] in rows
    names = [row[0] for row in rows if row]
    assert "artifacts/model/model.safetensors" in names
    assert "code/albef_core/model.py" not in names
    with pytest.raises(InputError, match="models:/nothing/1: not to be had"):
        printed(DiffConfig(one="models:/nothing/1", other=f"models:/{registry.name}/5"))


@pytest.mark.slow  # serves a model in a process of its own
def test_a_rollback_proves_the_old_version_in_both_ways_and_exchanges_the_aliases(registry):
    registry.promote("1")
    registry.promote("2")

    act = registry.rollback()

    assert act.outcome.result == "done"
    assert [(reason.what, reason.found) for reason in act.decision.reasons] == [
        ("answers by albef_core", "all 2 as recorded"),
        ("answers by mlflow.pyfunc", "all 2 as recorded"),
    ]
    assert registry.aliases == {"champion": "1", "previous": "2"}
    assert [(one.intent.act, one.intent.candidate) for one in registry.acts] == [
        ("promote", "1"),
        ("promote", "2"),
        ("rollback", "1"),
    ]


def otherwise(_model: Path, rows: list[dict[str, str]]) -> list[dict]:
    return [{"similarity": 9.0, "match": 9.0} for _ in rows]


def test_a_rollback_to_what_answers_otherwise_or_was_changed_is_refused(registry, monkeypatch):
    with pytest.raises(InputError, match=r"has no version previous\. Aliases: none"):
        registry.rollback()
    registry.start(champion="2", previous="1")
    monkeypatch.setattr(weighing, "serve_afresh", otherwise)
    act = registry.rollback()
    assert act.outcome.result == "refused"
    assert "similarity of row 0 is 9.0, recorded was" in act.decision.reasons[1].found
    code = verify(f"models:/{registry.name}/1").mlflow_model / "served_model.py"
    whole = code.read_text()
    code.write_text(whole.replace("softmax", "softmin", 1))
    try:
        with pytest.raises(InputError, match=r"served_model\.py has"):
            registry.rollback()
    finally:
        code.write_text(whole)
    assert registry.aliases == {"champion": "2", "previous": "1"}
    assert registry.results == ["refused", "refused"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_crash_of_a_rollback_is_completed(call, registry, monkeypatch):
    registry.start(champion="2", previous="1")
    monkeypatch.setattr(module, "prove_answers", lambda _uri: [])
    with monkeypatch.context() as patch:
        fail(patch, MlflowClient, ALIAS, call=call, after=False)
        with pytest.raises(MlflowException):
            registry.rollback()
    registry.promote("4")
    assert registry.results == ["done", "refused"]
    assert registry.aliases == {"champion": "1", "previous": "2"}


def test_mistakes_are_one_line_each(registry, client, models):
    registry.promote("1")
    with pytest.raises(InputError, match="/1: is the champion already"):
        registry.promote("champion")
    with pytest.raises(InputError, match=r"has no version challenger\. Aliases: champion"):
        registry.promote("challenger")
    with pytest.raises(InputError, match=r" 99: not in the MLflow store"):
        registry.promote("99")
    other = client.create_model_version(registry.name, models[1]["source"])
    with pytest.raises(InputError, match=r"/5: has no card, so nothing of it can be proven"):
        registry.promote(str(other.version))
