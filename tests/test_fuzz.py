"""A sample of the generated datasets; `results/reliability.py` tries many more."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results import fuzz

SAMPLE = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@SAMPLE
@given(fuzz.cases())
def test_transitions_are_those_counted_by_hand(case):
    fuzz.check_valid(case)


@SAMPLE
@given(fuzz.cases(), fuzz.MALFORMED, st.integers(0, 2**32 - 1))
def test_what_is_broken_is_refused_in_one_line(case, how, seed):
    fuzz.check_malformed(case, how, seed)


@pytest.mark.parametrize("kind", ["npz", "hdf5", "minari"])
@pytest.mark.parametrize("how", ["a pickle", "cut short", "damaged metadata"])
def test_each_kind_of_file_is_refused(kind, how):
    """The sample above meets few of the pairs."""

    @settings(SAMPLE, max_examples=2)
    @given(fuzz.cases().filter(lambda case: case.kind == kind), st.integers(0, 99))
    def check(case, seed):
        fuzz.check_malformed(case, how, seed)

    check()
