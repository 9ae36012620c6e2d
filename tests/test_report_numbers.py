"""Digits: as many as the standard error leaves meaning."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.report.rendering import byte_unit, fixed, significant, with_error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.34567, 0.0671, "12.346 ± 0.067"),
        (12.34567, 0.0996, "12.35 ± 0.10"),  # the error gains a digit by rounding
        (12.34567, 0.096, "12.346 ± 0.096"),  # two digits of it, not one rounded up
        (12.34567, 1.26, "12.3 ± 1.3"),
        (123456.7, 2345.0, "123500 ± 2300"),
        (1234567.0, 23456.0, "1.235e6 ± 23000"),
        (0.0, 0.0012, "0.0000 ± 0.0012"),
        (12.34567, math.nan, "12.35"),
        (12.34567, 0.0, "12.35"),
        (math.inf, math.nan, "∞"),
        (math.nan, 1.0, "-"),
    ],
)
def test_value_and_standard_error(value, error, text):
    assert with_error(value, error) == text


def test_sign():
    assert with_error(1.5, 0.25, sign="+") == "+1.50 ± 0.25"
    assert with_error(-1.5, 0.25, sign="+") == "-1.50 ± 0.25"
    assert significant(1.5, 2, sign="+") == "+1.5"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 3, "0"),
        (12345, 2, "12000"),
        (0.030112, 3, "0.0301"),
        (0.00099996, 3, "0.00100"),
        (0.0000301, 3, "3.01e-5"),
        (1234567, 3, "1.23e6"),
        (-2.5, 2, "-2.5"),
        (-math.inf, 3, "-∞"),
    ],
)
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


def test_fixed_places():
    assert [fixed(value, 2) for value in (1.005, math.inf, math.nan)] == ["1.00", "∞", "-"]


def test_a_column_has_one_unit():
    assert byte_unit([5, 3_000_000, math.nan]) == ("MB", 10**6)
    assert byte_unit([]) == ("B", 1)


@given(st.floats(-1e5, 1e5, allow_nan=False), st.floats(1e-6, 1e4, allow_nan=False))
def test_shown_value_is_within_a_tenth_of_the_error(value, error):
    shown, shown_error = map(float, with_error(value, error).split(" ± "))
    assert abs(shown - value) <= 0.051 * error
    assert abs(shown_error - error) <= 0.051 * error
