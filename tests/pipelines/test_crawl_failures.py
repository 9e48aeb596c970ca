import pytest

from albef_core.errors import InputError
from pipelines.crawl_failures import FAILURES, check_retry, find_failure, is_retried
from pipelines.crawl_store import FAILED, REFUSED


@pytest.mark.parametrize(
    ("name", "is_transient"),
    [
        ("http 404", False),
        ("http 410", False),
        ("http 403", False),
        ("http 408", True),
        ("http 429", True),
        ("http 500", True),
        ("http 501", False),
        ("http 503", True),
        ("dns", True),
        ("corrupt", False),
    ],
)
def test_what_may_pass_is_known(name: str, is_transient: bool) -> None:
    assert find_failure(name).is_transient is is_transient
    assert is_retried(name, ("transient",)) is is_transient
    assert is_retried(name, ("all",))
    assert is_retried(name, ("tls", name))
    assert not is_retried(name, ("tls",))


def test_every_class_has_a_sentence_and_a_state() -> None:
    assert all(failure.meaning for failure in FAILURES.values())
    assert {failure.state for failure in FAILURES.values()} == {FAILED, REFUSED}


@pytest.mark.parametrize("name", ["http", "http 4", "http abc", "DNS", ""])
def test_a_class_that_there_is_not_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError, match=r"no such class\. There are: transient, all, .*dns"):
        check_retry((name,))
