"""Peak memory of a training step's loss stage, and the table of it in docs/megatron.md."""

from importlib import metadata

import megatron_docs
import megatron_peaks
import pytest
import test_megatron_exactness as exactness
from megatron_peaks import WAYS

from bench.megatron_cpu import run_ranks

VERSION = metadata.version("megatron-core").partition("+")[0]
VECTORS = 0.01  # of the logits' size: all tensors with one number per row, and the hidden states


@pytest.fixture(scope="module")
def peaks():
    return run_ranks(1, megatron_peaks.measure)[0]


def test_in_place_nothing_of_the_logits_size_is_beside_the_logits(peaks):
    for way in ("(b) with `inplace_backward`", "(c) with `inplace_backward`"):
        assert 1 <= peaks[way] <= 1 + VECTORS
    for way in ("(b) `in_place=True`", "(c) `fused_cross_entropy`"):
        assert 2 <= peaks[way] <= 2 + VECTORS, "the logits and their gradient"


def test_the_head_takes_what_it_scores(peaks):
    (way,) = (name for name in WAYS if "ResponseOnlyHead" in name)
    assert megatron_peaks.SCORED * 0.97 <= peaks[way] <= megatron_peaks.SCORED + VECTORS


def test_what_the_others_take(peaks):
    """(a): the transpose copy, and before 0.15 the fp32 copy, each with a gradient."""
    wanted = 5 if VERSION == "0.14.0" else 2
    assert peaks["(a) `make_forward_step`"] == pytest.approx(wanted, abs=VECTORS)
    assert peaks["Megatron's own cross-entropy"] >= 3
    assert peaks["reference loss on the logits"] >= 6


def rows_of(name):
    """{first cell: other cells} of a table in the docs, and its header."""
    _, text, _ = megatron_docs.between(megatron_docs.PAGE.read_text(), name)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return {first: rest for first, *rest in cells[2:]}, cells[0][1:]


def test_the_docs_tell_these_peaks(peaks):
    rows, versions = rows_of("peaks")
    assert list(rows) == list(WAYS)
    assert VERSION in versions, "make megatron-docs measures it"
    for way, told in rows.items():
        here = dict(zip(versions, told, strict=True))[VERSION]
        assert float(here) == pytest.approx(peaks[way], abs=0.02), way


def test_the_matrix_of_the_docs_is_that_of_the_tests():
    """Every layout, every case in some column, and no figure beyond its bound."""
    rows, families = rows_of("matrix")
    assert list(rows) == list(exactness.LAYOUTS)
    assert families == list(megatron_docs.FAMILIES)
    shown = [case for cases in megatron_docs.FAMILIES.values() for case in cases]
    assert sorted(shown) == sorted(exactness.CASES)
    for layout, errors in rows.items():
        for family, error in zip(families, errors, strict=True):
            cases = megatron_docs.FAMILIES[family]
            bound = max(exactness.BOUNDS[exactness.CASES[case].dtype] for case in cases)
            assert float(error) <= bound, f"{layout}, {family}"
