"""From extents to runs: pure functions against a model that looks at every byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, strategies as st

from cowhand.copy.engine import plan
from cowhand.copy.engine.plan import DATA, SKIP, ZERO, Policy, Run
from cowhand.core import extents
from cowhand.core.extents import ExtentBatch

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.sampled_from((DATA, ZERO, SKIP))), min_size=1, max_size=20)


def rows(parts: list[tuple[int, int]]) -> list[Run]:
    """Return adjoining runs of the given (length, kind)."""
    out, position = [], 0
    for length, kind in parts:
        out.append(Run(position, length, kind))
        position += length
    return out


def kinds(runs: list[Run]) -> list[int]:
    """Return the kind of every byte; the runs have to adjoin."""
    out: list[int] = []
    for run in runs:
        assert run.start == len(out)
        assert run.length > 0
        out += [run.kind] * run.length
    return out


@given(parts=LENGTHS, unit=st.sampled_from((1, 2, 4, 8, 16)))
def test_data_takes_whole_units_and_nothing_else_changes(parts: list[tuple[int, int]], unit: int) -> None:
    given_rows = rows(parts)
    wanted = kinds(given_rows)
    for begin in range(0, len(wanted), unit):
        if DATA in wanted[begin : begin + unit]:
            wanted[begin : begin + unit] = [DATA] * len(wanted[begin : begin + unit])
    result = list(plan.joined(plan.rounded(given_rows, unit, len(wanted))))
    assert kinds(result) == wanted
    assert all(one.kind != two.kind for one, two in pairwise(result))
    assert sum(plan.totals(result)) == len(wanted)


def batch(*parts: tuple[int, int]) -> ExtentBatch:
    out = ExtentBatch()
    position = 0
    for length, flags in parts:
        out.add(position, length, flags)
        position += length
    return out


LAYERED = batch(
    (10, extents.DATA | extents.ALLOCATED),
    (10, extents.ZERO | extents.ALLOCATED),
    (10, 0),
    (10, extents.ZERO),
)


def test_without_a_backing_file_everything_that_is_not_known_to_be_zero_is_read() -> None:
    assert [(run.length, run.kind) for run in plan.rows_of([LAYERED], 0, Policy())] == [
        (10, DATA), (10, ZERO), (10, DATA), (10, ZERO),
    ]  # fmt: skip


def test_what_the_backing_file_says_already_is_left_to_it() -> None:
    policy = Policy(skip_unallocated=True, skip_zero_from=35)
    assert list(plan.rows_of([LAYERED], 0, policy)) == [
        Run(0, 10, DATA), Run(10, 10, ZERO), Run(20, 10, SKIP), Run(30, 5, ZERO), Run(35, 5, SKIP),
    ]  # fmt: skip


def test_zeroes_are_data_where_a_full_target_is_wanted() -> None:
    policy = Policy(zeroes_are_data=True)
    assert {run.kind for run in plan.rows_of([LAYERED], 100, policy)} == {DATA}
    assert next(plan.rows_of([LAYERED], 100, policy)).start == 100
