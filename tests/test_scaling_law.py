from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_tables import ADDITIVE, grid_table

from replicate.scaling import law as module
from replicate.scaling.law import LAWS, VARIABLES, Factor, Law, Term, make_design, parse_law
from replicate.spec import UserError


def test_parser_reads_terms_signs_and_floor() -> None:
    law = parse_law("E + A/N^alpha + B*D**-beta", ("N", "D"))
    assert law.terms == (
        Term("E"),
        Term("A", (Factor("N", "alpha", -1),)),
        Term("B", (Factor("D", "beta", -1),)),
    )
    assert law.parameters == ("E", "A", "B", "alpha", "beta")
    assert law.floor == "E"


def test_parser_reads_products_numbers_and_an_outer_power() -> None:
    law = parse_law("(A1*N^-b + A2*D^(-1)*N^0.5)^g", ("N", "D"))
    assert law.power == "g"
    assert law.terms[1].factors == (Factor("D", 1.0, -1), Factor("N", 0.5, 1))
    assert law.parameters == ("A1", "A2", "b", "g")
    assert law.floor is None


@pytest.mark.parametrize("name", LAWS)
def test_named_laws_survive_their_own_text(name: str) -> None:
    assert parse_law(LAWS[name].formula, VARIABLES, name) == LAWS[name]


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from("NMPD"), st.sampled_from([-1, 1])), max_size=3, unique_by=lambda f: f[0]
        ),
        min_size=1,
        max_size=5,
    )
)  # fmt: skip
def test_parse_inverts_formula(shapes: list[list[tuple[str, int]]]) -> None:
    terms = tuple(
        Term(f"c{i}", tuple(Factor(v, f"e{i}{j}", s) for j, (v, s) in enumerate(factors)))
        for i, factors in enumerate(shapes)
    )
    if sum(not t.factors for t in terms) > 1:
        return
    law = Law("csv", terms)
    assert parse_law(law.formula, "NMPD") == law


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("A0 - A1*N^-a1", "no minus"),
        ("A0 + A1*X^-a1", "no column"),
        ("A0 + N^-a1", "no amplitude"),
        ("A*B*N^-a", "one amplitude"),
        ("A + A*N^-a", "amplitude of its own"),
        ("A + B", "same variables"),
        ("A*N^-a + B*N^-a", "same variables"),
        ("A*N^-A", "both"),
        ("A*N^", "expected an exponent"),
        ("(A*N^-a", "missing"),
        ("A*N^-a)", "unexpected"),
        ("A*N^-D", "expected an exponent"),
        ("A*exp(N)", "one amplitude"),
        ("__import__('os')", "cannot read"),
        ("A + $", "cannot read"),
        ("", "expected a name"),
        ("3*N^-a", "expected a name"),
    ],
)
def test_parser_refuses(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        parse_law(text, ("N", "D"))


def test_the_parser_never_evaluates_text() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not called & {"eval", "exec", "compile"}


def test_law_call_broadcasts_draws_against_points() -> None:
    draws = {
        "A0": np.array([[0.1], [0.0]]),
        "A1": np.array([[2.0], [0.0]]),
        "a1": np.array([[0.5], [np.nan]]),
    }
    draws |= {"A2": np.array([[3.0], [3.0]]), "a2": np.array([[1.0], [1.0]])}
    value = ADDITIVE(draws, {"N": np.array([4.0, 16.0]), "D": np.array([10.0, 100.0])})
    assert value == pytest.approx(np.array([[0.1 + 1.0 + 0.3, 0.1 + 0.5 + 0.03], [0.3, 0.03]]))


def test_raw_amplitudes_undo_the_centring() -> None:
    table = grid_table(0, sigma=0.0)
    design = table.design()
    theta = np.array([[table.truth["a1"], table.truth["a2"]]])
    shift = np.exp(-theta[0] @ design.centre)
    raw = [table.truth[k] for k in ("A0", "A1", "A2")]
    c = np.array([[raw[0], *(raw[1:] * np.exp(-theta[0] * design.centre))]]) / design.median
    assert shift < 1
    assert design.raw(c, theta, np.ones(1))[0] == pytest.approx(raw, rel=1e-12)


def test_intercepts_sum_to_zero_and_have_their_molecules() -> None:
    table = grid_table(0)
    group = np.array(["b", "a", "c"])[np.arange(240) % 3]
    design = table.design(group=group)
    beta = np.array([0.3, -0.7])
    by_point = beta @ design.contrasts()
    by_group = dict(zip(design.group_names, design.intercepts(beta), strict=True))
    assert sum(by_group.values()) == pytest.approx(0)
    assert by_point == pytest.approx([by_group[g] for g in group])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"N": np.full(240, 5.0)}, "N: constant"),
        ({"N": -np.ones(240)}, "N: 240 of 240 values are not positive"),
        ({"D": np.full(240, np.nan)}, "D: 240 of 240"),
        ({"D": np.full(240, 3.0)}, "D: constant"),
    ],
)  # fmt: skip
def test_design_refuses_bad_columns(change: dict[str, np.ndarray], word: str) -> None:
    table = grid_table(0)
    with pytest.raises(UserError, match=word):
        make_design(ADDITIVE, table.variables | change, table.value)


def test_design_refuses_too_few_runs_with_the_numbers() -> None:
    table = grid_table(0)
    some = np.array([3, 24, 55, 96, 137, 218])
    few = {k: v[some] for k, v in table.variables.items()}
    with pytest.raises(UserError, match="6 runs for 5 parameters, at least 7"):
        make_design(ADDITIVE, few, table.value[some])
    with pytest.raises(UserError, match="4 runs for 5 parameters"):
        make_design(ADDITIVE, table.variables, table.value, cluster=np.arange(240) % 4)


def test_design_refuses_two_levels_only_where_more_are_needed() -> None:
    table = grid_table(0)
    two = {"D": np.where(np.arange(240) % 2, 10.0, 1000.0)}
    broken = parse_law("A1*D^-a1 + A2*D^-a2", ("D",))
    with pytest.raises(UserError, match="2 distinct values of D, at least 3"):
        make_design(broken, two, table.value)
