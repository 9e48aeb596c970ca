from collections import Counter

import pytest

from pipelines.crawl_failures import find_failure
from pipelines.faults import FAULTS, PICTURE, deal


def test_a_share_of_the_rows_is_faulty_and_every_kind_comes() -> None:
    dealt = Counter(deal(2000, faulty=0.3))

    assert dealt[PICTURE] == pytest.approx(1400, abs=60)
    assert set(dealt) - {PICTURE} == {fault.name for fault in FAULTS.values() if fault.weight}


def test_kinds_come_as_often_as_they_weigh() -> None:
    total = sum(fault.weight for fault in FAULTS.values())

    dealt = Counter(deal(10 * total + 1, faulty=1.0))

    assert dealt.pop(PICTURE) == 1
    assert dealt == {name: 10 * fault.weight for name, fault in FAULTS.items() if fault.weight}


def test_a_seed_gives_the_same_rows_and_a_longer_list_begins_with_the_shorter_one() -> None:
    shorter, longer = list(deal(300, faulty=0.5, seed=3)), list(deal(900, faulty=0.5, seed=3))

    assert longer[:300] == shorter
    assert longer != list(deal(900, faulty=0.5, seed=4))


def test_kinds_can_be_left_out() -> None:
    assert not {"drip", "never"} & set(deal(500, faulty=1.0, without=("drip", "never")))


@pytest.mark.parametrize("fault", [f for f in FAULTS.values() if f.failure], ids=lambda f: f.name)
def test_every_class_is_one_of_the_crawler_with_its_state_and_retries(fault) -> None:
    known = find_failure(fault.failure)

    assert known.state == fault.state
    assert fault.is_retried in (None, known.is_transient)
