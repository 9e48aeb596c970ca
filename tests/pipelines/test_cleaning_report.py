import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cleaning_report import histogram


def test_ranges_double_every_second_time_and_end_where_the_values_do():
    counts = histogram(np.array([2, 3, 5, 5, 11, 13]))

    assert counts == {"2": 1, "3": 1, "4 to 5": 2, "6 to 7": 0, "8 to 11": 1, "12 to 15": 1}
    assert histogram(np.array([], dtype=np.int64)) == {}


@given(values=st.lists(st.integers(0, 2**28), min_size=1))
def test_every_value_is_counted_once(values):
    assert sum(histogram(np.array(values)).values()) == len(values)
