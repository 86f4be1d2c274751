"""Specs: ids that mean content, layers that override by name, and every problem of a file at once."""
# ruff: noqa: E501  (a table of malformed specs, one a line)

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY_SPEC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicate import flops
from replicate.spec import MoleculeSpec, Point, UserError, load_study, molecule_by_name, molecule_from_file

WriteSpec = Callable[..., Path]
SPECS = Path(__file__).parent.parent / "specs"


def problems(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_study(path)
    return caught.value.problems


# -- ids ---------------------------------------------------------------------------------------------


def test_id_is_the_committed_one(write_spec: WriteSpec) -> None:
    """A changed id orphans every stored point: change this value only together with `SCHEMA`."""
    assert [p.id for p in load_study(write_spec()).points] == ["5c63af11aa88"]


def test_scale_of_initial_weights_is_in_the_id_unless_it_changes_nothing(write_spec: WriteSpec) -> None:
    (point,) = load_study(write_spec()).points
    for section in ("phase", "ansatz"):
        old = {"phase": "width = 4\n\n", "ansatz": "xs = { width = 4 }"}[section]
        new = {"phase": "width = 4\ninit_scale = {}\n\n", "ansatz": "xs = {{ width = 4, init_scale = {} }}"}[
            section
        ]
        (same,) = load_study(write_spec((old, new.format("1.0")))).points
        (other,) = load_study(write_spec((old, new.format("2.0")))).points
        assert same.id == point.id != other.id


def test_id_ignores_comments_order_labels_and_study(write_spec: WriteSpec) -> None:
    (before,) = load_study(write_spec()).points
    for changes, add in (
        ([("[phase]\n", "[phase] # a remark\n")], "\n# another\n"),
        ([('study = "tiny"', 'study = "other"')], ""),
        ([('sizes = ["xs"]', 'sizes = ["small"]'), ("xs = { width = 4 }", "small = { width = 4 }")], ""),
        ([('molecules = ["H2"]', 'molecules = ["dihydrogen"]'), ("[molecule.H2]", "[molecule.dihydrogen]")], ""),
        ([("[phase]\nwidth = 4\n", "[phase]\ndepth = 1\nwidth = 4\n")], ""),  # a default written out
        ([("learning_rate = 1e-2", "learning_rate = 0.010")], ""),
        ([("[molecule.H2]\n", '[molecule.H2]\nsource = "a book"\nreference = { fci = -1.0 }\n')], ""),
        ([('ansatze = ["made"]', 'ansatze = ["net"]'), ("[ansatz.made.sizes]", '[ansatz.net]\nkind = "made"\n[ansatz.net.sizes]')], ""),
    ):  # fmt: skip
        (after,) = load_study(write_spec(*changes, add=add)).points
        assert after.id == before.id, changes


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_id_ignores_the_order_of_tables_and_keys(tmp_path: Path, shuffle: random.Random) -> None:
    head, *tables = TINY_SPEC.split("\n\n")
    shuffle.shuffle(tables)
    lines = head.splitlines()
    shuffle.shuffle(lines)
    path = tmp_path / "shuffled.toml"
    path.write_text("\n\n".join(["\n".join(lines), *tables]), encoding="utf-8")
    assert [p.id for p in load_study(path).points] == ["5c63af11aa88"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("learning_rate = 1e-2", "learning_rate = 1.1e-2"),
        ("steps = [3]", "steps = [4]"),
        ("seeds = [0]", "seeds = [1]"),
        ("[phase]\nwidth = 4", "[phase]\nwidth = 5"),
        ("xs = { width = 4 }", "xs = { width = 5 }"),
        ("xs = { width = 4 }", 'xs = { width = 4, degrees = "random" }'),
        ("0.0, 0.0, 1.5", "0.0, 0.0, 1.4"),
        ("[molecule.H2]\n", '[molecule.H2]\nunit = "bohr"\n'),
        ("[molecule.H2]\n", '[molecule.H2]\nbasis = "6-31g"\n'),
        ("[molecule.H2]\n", "[molecule.H2]\nmultiplicity = 3\n"),
        ("seeds = [0]\n", 'seeds = [0]\nlocal_energy = "sampled"\n'),
        ("seeds = [0]\n", 'seeds = [0]\norder = "energy"\n'),
        ("seeds = [0]\n", 'seeds = [0]\nprecision = "float64"\n'),
        ("seeds = [0]\n", "seeds = [0]\nhamiltonian_threshold = 1e-7\n"),
        ("[phase]\n", "[sampling]\nbatch_max = 100\n\n[phase]\n"),
        ("[phase]\n", "[evaluation]\nexact_limit = 0\n\n[phase]\n"),
    ],
)
def test_id_changes_with_what_changes_a_result(write_spec: WriteSpec, old: str, new: str) -> None:
    (before,) = load_study(write_spec()).points
    (after,) = load_study(write_spec((old, new))).points
    assert after.id != before.id


def test_a_changed_number_touches_only_its_points(write_spec: WriteSpec) -> None:
    axes = [('ansatze = ["made"]', 'ansatze = ["made", "transformer"]'), ('["xs"]', '["xs", "s"]')]
    before = load_study(write_spec(*axes)).points
    after = load_study(write_spec(*axes, ("s = { d = 8,", "s = { d = 16,"))).points
    changed = [b.labels() for b, a in zip(before, after, strict=True) if a.id != b.id]
    assert [(c["ansatze"], c["sizes"]) for c in changed] == [("transformer", "s")]


def test_retnet_chunk_is_a_choice_of_speed_not_of_result(write_spec: WriteSpec) -> None:
    retnet = ('ansatze = ["made"]', 'ansatze = ["retnet"]')
    (before,) = load_study(write_spec(retnet)).points
    (after,) = load_study(write_spec(retnet, ("[ansatz.retnet.sizes]", "[ansatz.retnet]\nchunk = 2\n[ansatz.retnet.sizes]"))).points  # fmt: skip
    assert (after.ansatz.params["chunk"], after.id) == (2, before.id)


# -- layers and variants -----------------------------------------------------------------------------


def test_the_more_specific_layer_wins_and_a_variant_wins_over_all(write_spec: WriteSpec) -> None:
    path = write_spec(
        ('sizes = ["xs"]', 'sizes = ["xs", "s"]'),
        (
            "[ansatz.made.sizes]",
            "[ansatz.made]\nlearning_rate = 3e-3\nphase = { depth = 3 }\n[ansatz.made.sizes]",
        ),
        ("s = { width = 8 }", "s = { width = 8, learning_rate = 4e-3, phase = { width = 6 } }"),
        add='\n[phase.sizes]\nxs = { width = 5 }\n[variants.v]\nphase.width = 7\n"train.learning_rate" = 0.5\n',
    )
    resolved = {
        (p.size, p.variant): (p.phase.width, p.phase.depth, p.train.learning_rate)
        for p in load_study(path).points
    }
    assert resolved == {
        ("xs", "base"): (5, 3, 3e-3),
        ("s", "base"): (6, 3, 4e-3),
        ("xs", "v"): (7, 3, 0.5),
        ("s", "v"): (7, 3, 0.5),
    }


def test_a_variant_changes_any_section_for_the_cells_it_asks_for(write_spec: WriteSpec) -> None:
    path = write_spec(
        ("steps = [3]", "steps = [3, 6]"),
        add="""
[variants.base]
only = [{ steps = [3] }, { seeds = [0], steps = [6] }]
[variants.sampled]
local_energy = "sampled"
order = "energy"
sampling = { batch_max = 7, n_min = 1e2 }
evaluation.exact_limit = 2
ansatz.made.depth = 3
ansatz.made.sizes.xs.width = 9
only = { steps = [6] }
""",
    )
    study = load_study(path)
    (point,) = [p for p in study.points if p.variant == "sampled"]
    assert study.axes["variants"] == ("base", "sampled")
    assert (point.local_energy, point.order, point.sampling.batch_max, point.sampling.n_min) == (
        "sampled",
        "energy",
        7,
        100,
    )
    assert (point.evaluation.exact_limit, point.ansatz.params["depth"], point.ansatz.params["width"]) == (
        2,
        3,
        9,
    )
    assert point.steps == 6
    assert len(study.points) == 3


def test_hold_outs_by_label_and_by_cell(write_spec: WriteSpec) -> None:
    path = write_spec(
        ('sizes = ["xs"]', 'sizes = ["xs", "s"]'),
        ("steps = [3]", "steps = [3, 6, 9]"),
        add='\n[holdout]\nsteps = [9]\ncells = [{ sizes = ["s"], steps = [6] }]\n',
    )
    study = load_study(path)
    held = {(p.size, p.steps) for p in study.points if study.is_holdout(p)}
    assert held == {("xs", 9), ("s", 9), ("s", 6)}


def test_index_is_the_cell_of_the_labels(write_spec: WriteSpec) -> None:
    study = load_study(
        write_spec(('sizes = ["xs"]', 'sizes = ["xs", "s"]'), ("seeds = [0]", "seeds = [5, 2]"))
    )
    labels = [
        (study.axes["sizes"][study.index(p)[2]], study.axes["seeds"][study.index(p)[5]]) for p in study.points
    ]
    assert labels == [(p.size, p.seed) for p in study.points]
    assert study.by_id[study.points[1].id] is study.points[1]


# -- molecules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "electrons", "space"),
    [
        ("H2O", 14, (5, 5), 441),
        ("N2", 20, (7, 7), 14_400),
        ("O2", 20, (9, 7), 1_200),
        ("H2S", 22, (9, 9), 3_025),
        ("PH3", 24, (9, 9), 48_400),
        ("LiCl", 28, (10, 10), 1_002_001),
        ("Li2O", 30, (7, 7), 41_409_225),
        ("LiH", 12, (2, 2), 225),
    ],
)
def test_sectors_of_the_molecule_table(name: str, n: int, electrons: tuple[int, int], space: int) -> None:
    molecule = molecule_by_name(name, SPECS / "molecules.toml", {})
    assert (molecule.n_spin_orbitals, (molecule.n_alpha, molecule.n_beta), molecule.search_space) == (
        n,
        electrons,
        space,
    )


def test_xyz_and_the_same_atoms_are_one_molecule(tmp_path: Path, write_spec: WriteSpec) -> None:
    (tmp_path / "h2.xyz").write_text("2\nhydrogen\nH 0 0 0\n1 0.0 0.0 1.5\n", encoding="utf-8")
    (direct,) = load_study(write_spec()).points
    atoms = 'atoms = [["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]]'
    (from_file,) = load_study(write_spec((atoms, 'xyz = "h2.xyz"'))).points
    assert from_file.id == direct.id
    assert molecule_from_file(str(tmp_path / "h2.xyz")).atoms == from_file.molecule.atoms


FCIDUMP = "&FCI NORB=  4,NELEC= 4,MS2=2,\n ORBSYM=1,1,1,1,\n ISYM=1,\n&END\n 0.5 1 1 1 1\n -1.0 1 1 0 0\n"


def test_fcidump_says_electrons_and_is_known_by_its_content(tmp_path: Path, write_spec: WriteSpec) -> None:
    atoms = 'atoms = [["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]]'
    ids = []
    for name, text in (("a", FCIDUMP), ("b", FCIDUMP), ("c", FCIDUMP.replace("0.5", "0.6"))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (point,) = load_study(write_spec((atoms, f'fcidump = "{name}"'))).points
        molecule = point.molecule
        assert (molecule.n_spin_orbitals, molecule.n_alpha, molecule.n_beta, molecule.search_space) == (
            8,
            3,
            1,
            16,
        )
        ids.append(point.id)
    assert ids[0] == ids[1] != ids[2]


WATER = "3\nwater\nO 0 0 0\nH 0.2774 0.8929 0.2544\nH 0.6068 -0.2383 -0.7169\n"


@pytest.mark.parametrize(
    "text",
    [
        WATER.replace("\n", "\r\n"),
        "\ufeff" + WATER,
        WATER.replace(" ", "\t"),
        WATER + "\n\n",
        WATER.replace("O 0 0 0\n", "O 0 0 0\n\n"),
        WATER.replace("O 0 0 0", "8 0.0 -0.0 0e0 -0.66 extra columns"),
        WATER.replace("H ", "h ").replace("water", ""),
    ],
    ids=["crlf", "byte order mark", "tabs", "blank end", "blank line", "number and columns", "lower case"],
)
def test_xyz_as_other_programs_write_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "plain.xyz").write_text(WATER, encoding="utf-8")
    (tmp_path / "other.xyz").write_bytes(text.encode())
    plain, other = (molecule_from_file(str(tmp_path / name)) for name in ("plain.xyz", "other.xyz"))
    assert other.identity() == plain.identity()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the number of atoms"),
        ("2 atoms\n\nH 0 0 0\nH 0 0 1\n", "line 1: expected the number of atoms"),
        ("0\n\n", "line 1: says 0 atoms, 0 follow"),
        ("2\nH 0 0 0\nH 0 0 1\n", "line 1: says 2 atoms, 1 follow"),
        (WATER + WATER, "line 1: says 3 atoms, 8 follow"),
        ("1\n\nGhost-H 0 0 0\n", "line 3: unknown element 'Ghost-H'; allowed H to Kr"),
        ("1\n\nI 0 0 0\n", "line 3: unknown element 'I'; allowed H to Kr"),
        ("1\n\nHe 0 0\n", "line 3: expected `symbol x y z`"),
        ("1\n\nHe 0 0 nan\n", "line 3: a coordinate is not finite"),
        ("2\n\nH 0 0 0\nH 0 0 0.02\n", "atoms: atoms 1 and 2 are 0.038 bohr apart"),
        ("1\n\nH 0 0 0\n", "multiplicity: 1 is impossible with 1 electrons in 1 orbitals; allowed 2"),
    ],
)
def test_xyz_that_cannot_be_used(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.xyz").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        molecule_from_file("bad.xyz")
    (line,) = caught.value.problems
    assert line.startswith(f"bad.xyz: {message}")


def test_an_fcidump_is_not_given_what_it_says_itself(tmp_path: Path) -> None:
    path = tmp_path / "FCIDUMP"
    path.write_text(FCIDUMP, encoding="utf-8")
    assert molecule_from_file(str(path), multiplicity=3).multiplicity == 3
    for changes, message in (
        ({"charge": 1}, "--charge: an FCIDUMP .* has its charge in it"),
        ({"basis": "6-31g"}, "--basis: an FCIDUMP .* has its basis in it"),
        ({"multiplicity": 1}, "multiplicity: 1 given, but FCIDUMP has 3"),
    ):
        with pytest.raises(UserError, match=message):
            molecule_from_file(str(path), **changes)  # type: ignore[arg-type]


def test_molecule_with_a_changed_charge_forgets_what_was_known(tmp_path: Path) -> None:
    cation = molecule_by_name("H2O", SPECS / "molecules.toml", {"charge": 1, "multiplicity": 2})
    assert (cation.n_alpha, cation.n_beta) == (5, 4)
    assert (cation.reference.fci, cation.unique_flips) == (None, None)


# -- committed specs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "laptop", "cpu", "study", "wide"])
def test_committed_spec_is_sound(name: str) -> None:
    study = load_study(SPECS / f"{name}.toml")
    assert study.name == name
    for point in study.points:
        assert point.molecule.unique_flips, f"{point.molecule.name}: planning needs M"
        assert point.train.warmup_fraction < 0.1


@pytest.mark.parametrize("name", ["cpu", "study", "wide"])
def test_grid_is_wide_enough_for_the_law(name: str) -> None:
    """FIT section 6: >= 6 N over >= 2 decades x >= 4 T over >= 1.8 decades per molecule and ansatz, >= 2 seeds."""
    study = load_study(SPECS / f"{name}.toml")
    steps = study.axes["steps"]
    assert len(steps) >= 4
    assert math.log10(max(steps) / min(steps)) >= 1.8
    for molecule in study.axes["molecules"]:
        for ansatz in study.axes["ansatze"]:
            mine = [
                p
                for p in study.points
                if (p.molecule.name, p.ansatz.name, p.variant) == (molecule, ansatz, "base")
            ]
            if name == "cpu" and molecule == "N2":
                continue  # a hold-out molecule: scored, never fitted
            n = mine[0].molecule.n_spin_orbitals
            assert n is not None
            sizes = {
                flops.modulus_parameters(p.ansatz.kind, p.ansatz.params, n)
                + flops.phase_parameters(p.phase.width, p.phase.depth, n)
                for p in mine
            }
            assert len(sizes) >= 6
            assert math.log10(max(sizes) / min(sizes)) >= 2
            assert len({p.seed for p in mine}) >= 2


def test_laptop_spec_is_enough_to_fit() -> None:
    study = load_study(SPECS / "laptop.toml")
    assert len(study.axes["molecules"]) >= 3
    assert set(study.axes["ansatze"]) == {"made", "transformer", "retnet"}
    assert len(study.axes["sizes"]) >= 4
    assert len(study.axes["steps"]) >= 3
    assert any(study.is_holdout(p) for p in study.points)


@pytest.mark.parametrize("name", ["study", "cpu"])
def test_phase_ratios_differ_tenfold(name: str) -> None:
    study = load_study(SPECS / f"{name}.toml")
    by_variant: dict[str, dict[tuple[str, str], int]] = {}
    for p in study.points:
        count = flops.phase_parameters(p.phase.width, p.phase.depth, p.molecule.n_spin_orbitals or 0)
        by_variant.setdefault(p.variant, {})[p.molecule.name, p.size] = count
    for variant, factor in (("phase-tenth", 0.1), ("phase-tenfold", 10.0)):
        ratios = [count / by_variant["base"][cell] for cell, count in by_variant[variant].items()]
        assert all(0.7 * factor < ratio < 1.4 * factor for ratio in ratios), ratios


# -- speed and weight --------------------------------------------------------------------------------


def test_planning_5000_points_takes_two_seconds(write_spec: WriteSpec, tmp_path: Path) -> None:
    from replicate.plan import plan_record
    from replicate.store import Store

    path = write_spec(("seeds = [0]", f"seeds = {list(range(5000))}"))
    began = time.process_time()
    study = load_study(path)
    record = plan_record(study, Store(tmp_path / "none"))
    assert record["n_points"] == 5000
    assert time.process_time() - began <= 2.0


def test_time_of_a_step_that_reuses_nothing_is_planned_from_the_estimate() -> None:
    from replicate.plan import FLOP_PER_SECOND, estimate

    point = next(p for p in load_study(SPECS / "questions" / "cost.toml").points if p.local_energy == "paper")
    known = estimate(point)
    assert known.flops is not None
    assert known.seconds is not None
    assert known.flops / FLOP_PER_SECOND < known.seconds < known.flops / FLOP_PER_SECOND + point.steps


def test_planning_loads_nothing_heavy(write_spec: WriteSpec) -> None:
    code = (
        "import sys; from replicate.cli import main; main(['plan', sys.argv[1], '--json']);"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_spec())], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stderr.replace("'", '"')))
    assert not loaded & {"torch", "pyscf", "openfermion", "xarray", "matplotlib", "scipy"}
    assert json.loads(done.stdout)["points"][0]["n_total"] == 4 * 4 + 4 + 2 * 4 * 4 + 2 * 4 + (
        2 * 4 + 4 + 20 + 16 + 4
    )


# -- malformed specs ---------------------------------------------------------------------------------

ATOMS = '[["H", 0.0, 0.0, 0.0], ["H", 0.0, 0.0, 1.5]]'

# (changes to the tiny spec, text at its end, the line that must be printed after "tiny.toml: ")
MALFORMED: dict[str, tuple[list[tuple[str, str]], str, str]] = {
    "unknown top-level key": ([("seeds = [0]", "sedes = [0]")], "", 'sedes: unknown key, did you mean "seeds"?'),
    "unknown hyper-parameter": ([("xs = { width = 4 }", "xs = { widht = 4, width = 4 }")], "", 'ansatz.made.sizes.xs.widht: unknown key, did you mean "width"?; allowed width, depth, degrees'),
    "unknown training key": ([("learning_rate", "learning_rat")], "", 'train.learning_rat: unknown key, did you mean "learning_rate"?'),
    "missing hyper-parameter": ([("xs = { width = 4 }", "xs = { depth = 1 }")], "", "ansatz.made.sizes.xs.width: missing"),
    "missing study name": ([('study = "tiny"\n', "")], "", "study: missing"),
    "missing train section": ([("[train]\nsteps = [3]\nlearning_rate = 1e-2\n", "")], "", "train: missing"),
    "missing steps": ([("steps = [3]\n", "")], "", "train.steps: missing"),
    "steps not a list": ([("steps = [3]", "steps = 3")], "", "train.steps: expected a list with an entry, got 3"),
    "steps of zero": ([("steps = [3]", "steps = [0]")], "", "train.steps: must be whole numbers >= 1, got 0"),
    "steps fractional": ([("steps = [3]", "steps = [2.5]")], "", "train.steps: must be whole numbers >= 1, got 2.5"),
    "wrong type": ([("xs = { width = 4 }", 'xs = { width = "4" }')], "", "ansatz.made.sizes.xs.width: expected a whole number, got '4'"),
    "boolean for a number": ([("learning_rate = 1e-2", "learning_rate = true")], "", "train.learning_rate: expected a number, got true"),
    "nan": ([("learning_rate = 1e-2", "learning_rate = nan")], "", "train.learning_rate: expected a finite number, got nan"),
    "infinite": ([("learning_rate = 1e-2", "learning_rate = inf")], "", "train.learning_rate: expected a finite number, got inf"),
    "negative width": ([("[phase]\nwidth = 4", "[phase]\nwidth = -4")], "", "phase.width: must be greater than or equal to 1, got -4"),
    "negative seed": ([("seeds = [0]", "seeds = [-1]")], "", "seeds.0: must be greater than or equal to 0, got -1"),
    "unknown choice": ([("seeds = [0]", 'seeds = [0]\nlocal_energy = "exakt"')], "", "local_energy: 'exakt' is not allowed, did you mean \"exact\"?; allowed exact, paper, sampled"),
    "passes per sample over a whole sector": ([], '\n[sampling]\nregime = "whole"\n[variants.paper]\nlocal_energy = "paper"\n', "variants.paper.local_energy: 'paper' makes its passes sample by sample, sampling.regime = 'whole' one over the sector"),
    "unknown schedule": ([("learning_rate = 1e-2", 'schedule = "cosin"')], "", "train.schedule: 'cosin' is not allowed, did you mean \"cosine\"?"),
    "unknown molecule": ([('molecules = ["H2"]', 'molecules = ["H3"]')], '\n[molecule.H3O]\natoms = [["H", 0, 0, 0]]\n', "molecules: unknown molecule 'H3', did you mean"),
    "unknown ansatz": ([('ansatze = ["made"]', 'ansatze = ["mode"]')], "", "ansatze: 'mode' has no table [ansatz.mode], did you mean \"made\"?"),
    "unknown kind": ([("[ansatz.made.sizes]", '[ansatz.made]\nkind = "maid"\n[ansatz.made.sizes]')], "", "ansatz.made.kind: unknown kind 'maid', did you mean \"made\"?"),
    "unknown size": ([('sizes = ["xs"]', 'sizes = ["xxs"]')], "", "ansatz.made.sizes.xxs: missing; sizes of this ansatz, did you mean \"xs\"?"),
    "empty axis": ([('molecules = ["H2"]', "molecules = []")], "", "molecules: expected an entry"),
    "label twice": ([("seeds = [0]", "seeds = [0, 0]")], "", "seeds: 0 is listed twice"),
    "duplicate point": ([('sizes = ["xs"]', 'sizes = ["xs", "s"]'), ("s = { width = 8 }", "s = { width = 4 }")], "", "duplicate point"),
    "variant that changes nothing": ([], "\n[variants.v]\nphase.width = 4\n", "duplicate point"),
    "impossible spin": ([("[molecule.H2]\n", "[molecule.H2]\nmultiplicity = 2\n")], "", "molecule.H2.multiplicity: 2 is impossible with 2 electrons in 2 orbitals; allowed 1, 3"),
    "no electrons": ([("[molecule.H2]\n", "[molecule.H2]\ncharge = 2\n")], "", "molecule.H2.charge: 2 leaves 0 electrons"),
    "too many electrons": ([("[molecule.H2]\n", "[molecule.H2]\ncharge = -3\n")], "", "molecule.H2.charge: 5 electrons do not fit"),
    "unknown element": ([('["H", 0.0, 0.0, 0.0]', '["Xx", 0.0, 0.0, 0.0]')], "", "molecule.H2.atoms: unknown element 'Xx'"),
    "atoms at one place": ([("0.0, 0.0, 1.5", "0.0, 0.0, 0.0")], "", "molecule.H2.atoms: atoms 1 and 2 are 0 bohr apart, at least 0.1 is needed"),
    "coordinates in another unit": ([("0.0, 0.0, 1.5", "0.0, 0.0, 0.04")], "", "molecule.H2.atoms: atoms 1 and 2 are 0.076 bohr apart, at least 0.1 is needed; is `unit` right?"),
    "coordinate missing": ([('["H", 0.0, 0.0, 0.0]', '["H", 0.0, 0.0]')], "", "molecule.H2.atoms"),
    "spin-orbitals that disagree": ([("[molecule.H2]\n", "[molecule.H2]\nspin_orbitals = 6\n")], "", "molecule.H2.spin_orbitals: 6 given, but sto-3g has 4"),
    "too many spin-orbitals": ([(ATOMS, str([["C", 2.0 * i, 0.0, 0.0] for i in range(7)]).replace("'", '"'))], "", "molecule.H2.spin_orbitals: 70 spin-orbitals; supported are at most 62"),
    "no geometry": ([(f"atoms = {ATOMS}\n", "")], "", "molecule.H2: no geometry; give one of atoms, xyz, fcidump"),
    "two geometries": ([(f"atoms = {ATOMS}\n", f'atoms = {ATOMS}\nxyz = "good.xyz"\n')], "", "molecule.H2: atoms and xyz are both given"),
    "missing xyz": ([(f"atoms = {ATOMS}", 'xyz = "none.xyz"')], "", "molecule.H2.xyz: none.xyz: no such file"),
    "unreadable xyz": ([(f"atoms = {ATOMS}", 'xyz = "bad.xyz"')], "", "molecule.H2.xyz: bad.xyz: line 4: expected `symbol x y z`"),
    "short xyz": ([(f"atoms = {ATOMS}", 'xyz = "short.xyz"')], "", "molecule.H2.xyz: short.xyz: line 1: says 2 atoms, 1 follow"),
    "unreadable FCIDUMP": ([(f"atoms = {ATOMS}", 'fcidump = "bad.xyz"')], "", "molecule.H2.fcidump: bad.xyz: not an FCIDUMP"),
    "unrestricted FCIDUMP": ([(f"atoms = {ATOMS}", 'fcidump = "uhf"')], "", "molecule.H2.fcidump: uhf: unrestricted (UHF) integrals"),
    "FCIDUMP of another spin": ([(f"atoms = {ATOMS}", 'fcidump = "good"\nmultiplicity = 1')], "", "molecule.H2.multiplicity: 1 given, but good has 3"),
    "binary file": ([(f"atoms = {ATOMS}", 'xyz = "binary.xyz"')], "", "molecule.H2.xyz: binary.xyz: not a text file"),
    "heads that do not divide": ([('ansatze = ["made"]', 'ansatze = ["transformer"]'), ("d = 4, heads = 2", "d = 4, heads = 3")], "", "ansatz.transformer.sizes.xs.heads: 3 does not divide d = 4"),
    "odd head of RetNet": ([('ansatze = ["made"]', 'ansatze = ["retnet"]'), ("d = 4, heads = 2", "d = 6, heads = 2")], "", "ansatz.retnet.sizes.xs.heads: d / heads must be an even whole number"),
    "sample counts crossed": ([], "\n[sampling]\nn_min = 1e6\nn_max = 1e4\n", "sampling.n_min: 1000000 exceeds n_max = 10000"),
    "fractional count": ([], "\n[sampling]\nn_min = 10.5\n", "sampling.n_min: expected a whole number, got 10.5"),
    "hold-out not in the study": ([], '\n[holdout]\nmolecules = ["LiH"]\n', "holdout.molecules: 'LiH' is not in the study"),
    "hold-out cell not in the study": ([], "\n[holdout]\ncells = [{ steps = [7] }]\n", "holdout.cells[0].steps: 7 is not in the study; allowed 3"),
    "hold-out on no axis": ([], "\n[holdout]\ncells = [{ step = [3] }]\n", 'holdout.cells[0].step: unknown key, did you mean "steps"?'),
    "everything held out": ([], "\n[holdout]\nsteps = [3]\n", "holdout: every point is held out"),
    "unknown key of a variant": ([], "\n[variants.v]\nlocal_enrgy = 1\n", 'variants.v.local_enrgy: unknown key, did you mean "local_energy"?'),
    "steps in a variant": ([], "\n[variants.v]\ntrain.steps = [9]\n", "variants.v.train.steps: steps is an axis"),
    "variant of an unknown ansatz": ([], "\n[variants.v.ansatz.mad]\ndepth = 2\n", 'variants.v.ansatz.mad: unknown ansatz, did you mean "made"?'),
    "variant of an unknown size": ([], "\n[variants.v.ansatz.made.sizes]\nxl = { width = 2 }\n", "variants.v.ansatz.made.sizes.xl: unknown size; allowed xs"),
    "cells of a variant not in the study": ([], '\n[variants.v]\nphase.width = 9\nonly = { molecules = ["LiH"] }\n', "variants.v.only.molecules: 'LiH' is not in the study"),
    "wrong type in a variant": ([], "\n[variants.v]\nphase = 3\n", "variants.v.phase: expected a table, got 3"),
    "bad value in a variant": ([], '\n[variants.v]\nprecision = "float16"\n', "variants.v.precision: 'float16' is not allowed"),
    "section that is no table": ([("seeds = [0]", "seeds = [0]\nsampling = 3")], "", "sampling: expected a table, got 3"),
    "size that is no table": ([("xs = { width = 4 }", "xs = 4")], "", "ansatz.made.sizes.xs: expected a table, got 4"),
    "study name that is no folder": ([('study = "tiny"', 'study = "../tiny"')], "", "study: '../tiny' is not a folder name"),
    "table given twice": ([], "\n[phase]\nwidth = 3\n", "not valid TOML: "),
    "FCIDUMP that is cut off": ([(f"atoms = {ATOMS}", 'fcidump = "cut"')], "", "molecule.H2.fcidump: cut: no one-electron integral (p q 0 0) in the file"),
    "FCIDUMP with a broken line": ([(f"atoms = {ATOMS}", 'fcidump = "broken"')], "", "molecule.H2.fcidump: broken: line 6: expected a value and four orbital indices, got '-1.0 1'"),
    "FCIDUMP beyond 62": ([(f"atoms = {ATOMS}", 'fcidump = "large"')], "", "molecule.H2.spin_orbitals: 64 spin-orbitals; supported are at most 62"),
    "no file name": ([(f"atoms = {ATOMS}", 'xyz = ""')], "", "molecule.H2.xyz: empty; expected the name of a file"),
    "no basis": ([("[molecule.H2]\n", '[molecule.H2]\nbasis = ""\n')], "", "molecule.H2.basis: expected a name, got ''"),
    "molecule that is no table": ([(f"[molecule.H2]\natoms = {ATOMS}\n", ""), ("seeds = [0]", "seeds = [0]\nmolecule.H2 = 3")], "", "molecule.H2: expected a table, got 3"),
    "axis inside a section": ([("seeds = [0]\n", ""), ("learning_rate", "seeds = [0]\nlearning_rate")], "", "train.seeds: unknown key"),
    "steps inside a size": ([("xs = { width = 4 }", "xs = { width = 4, train = { steps = [9] } }")], "", "ansatz.made.sizes.xs.train.steps: unknown key"),
    "a string for a list": ([('sizes = ["xs"]', 'sizes = "xs"')], "", "sizes: expected a list, got 'xs'"),
    "a number for a label": ([('sizes = ["xs"]', "sizes = [4]")], "", "sizes.0: expected a string, got 4"),
    "an empty size": ([('sizes = ["xs"]', 'sizes = [""]')], "", "sizes: '' is not a label; allowed at most 100 letters, digits and _ . + -"),
    "an empty ansatz": ([('ansatze = ["made"]', 'ansatze = [""]')], "", "ansatze: '' is not a label"),
    "an empty molecule": ([('molecules = ["H2"]', 'molecules = [""]')], "", "molecules: '' is not a label"),
    "unicode label": ([('molecules = ["H2"]', 'molecules = ["H\u2082"]'), ("[molecule.H2]", '[molecule."H\u2082"]')], "", "molecules: 'H\u2082' is not a label"),
    "absolute study": ([('study = "tiny"', 'study = "/tmp/tiny"')], "", "study: '/tmp/tiny' is not a folder name"),
    "study beyond a file name": ([('study = "tiny"', f'study = "{"x" * 300}"')], "", "study: 'xxx"),
    "fraction for a seed": ([("seeds = [0]", "seeds = [0.5]")], "", "seeds.0: expected a whole number, got 0.5"),
    "seed beyond 64 bits": ([("seeds = [0]", "seeds = [9223372036854775808]")], "", "seeds.0: must be less than 9223372036854775808"),
    "steps without end": ([("steps = [3]", "steps = [1000000000000]")], "", "train.steps: 1000000000000 exceeds 1e+09; a number of every step is kept"),
    "width without end": ([("xs = { width = 4 }", "xs = { width = 1000000000 }")], "", "ansatz.made.sizes.xs.width: must be less than or equal to 1000000"),
    "threshold that drops the physics": ([("seeds = [0]", "seeds = [0]\nhamiltonian_threshold = 1.0")], "", "hamiltonian_threshold: must be less than or equal to 0.01, got 1.0"),
    "no batch": ([], "\n[sampling]\nbatch_max = 0\n", "sampling.batch_max: must be greater than or equal to 1, got 0"),
    "infinite count": ([], "\n[sampling]\nn_max = inf\n", "sampling.n_max: expected a whole number, got inf"),
    "no heads": ([('ansatze = ["made"]', 'ansatze = ["transformer"]'), ("d = 4, heads = 2", "d = 4, heads = 0")], "", "ansatz.transformer.sizes.xs.heads: must be greater than or equal to 1, got 0"),
    "size missing for one ansatz": ([('ansatze = ["made"]', 'ansatze = ["made", "retnet"]'), ('sizes = ["xs"]', 'sizes = ["q"]'), ("s = { width = 8 }", "q = { width = 9 }")], "", "ansatz.retnet.sizes.q: missing; sizes of this ansatz; allowed xs, s"),
    "phase of an unknown size": ([("[phase]\nwidth = 4", "[phase]\nwidth = 4\nsizes = { xl = { width = 5 } }")], "", "phase.sizes.xl: unknown size"),
    "variant of a phase of an unknown size": ([], "\n[variants.v.phase.sizes]\nxl = { width = 5 }\n", "variants.v.phase.sizes.xl: unknown size; allowed xs"),
    "variant on an unknown axis": ([], '\n[variants.v]\nphase.width = 9\nonly = { molecule = ["H2"] }\n', 'variants.v.only.molecule: unknown key, did you mean "molecules"?'),
    "variant with an axis": ([], "\n[variants.v]\nseeds = [4]\n", "variants.v.seeds: unknown key"),
    "variant of no cell": ([], "\n[variants.v]\nphase.width = 9\nonly = []\n", "variants.v.only: expected an entry, got []"),
    "variant of other variants' cells": ([], '\n[variants.v]\nphase.width = 9\nonly = { variants = ["base"] }\n', "variants.v.only: chooses no cell of the study"),
    "two variants alike": ([], "\n[variants.v]\nphase.width = 9\n[variants.w]\nphase.width = 9\n", "duplicate point"),
    "hold-out of a string": ([], '\n[holdout]\nmolecules = "H2"\n', "holdout.molecules: expected a list, got 'H2'"),
    "broken TOML": ([("seeds = [0]", "seeds = [0")], "", "not valid TOML: "),
    "warm-up and cool-down overlap": ([("learning_rate = 1e-2", 'schedule = "cooldown"\nwarmup_fraction = 0.9')], "", "train.warmup_fraction: warm-up and cool-down together exceed the run"),
}  # fmt: skip


def write_malformed(name: str, folder: Path, write_spec: WriteSpec) -> Path:
    """A malformed spec and the damaged files that some of them point to."""
    (folder / "good.xyz").write_text("1\n\nH 0 0 0\n", encoding="utf-8")
    (folder / "bad.xyz").write_text("2\n\nH 0 0 0\nH 0 zero 0\n", encoding="utf-8")
    (folder / "short.xyz").write_text("2\n\nH 0 0 0\n", encoding="utf-8")
    (folder / "good").write_text(FCIDUMP, encoding="utf-8")
    (folder / "uhf").write_text(FCIDUMP.replace("ISYM=1,", "ISYM=1, IUHF=1,"), encoding="utf-8")
    (folder / "cut").write_text(FCIDUMP.replace("-1.0 1 1 0 0", ""), encoding="utf-8")
    (folder / "broken").write_text(FCIDUMP.replace("-1.0 1 1 0 0", "-1.0 1"), encoding="utf-8")
    (folder / "large").write_text(FCIDUMP.replace("NORB=  4", "NORB= 32"), encoding="utf-8")
    (folder / "binary.xyz").write_bytes(bytes(range(128, 256)))
    changes, add, _ = MALFORMED[name]
    return write_spec(*changes, add=add)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_spec_gets_one_clear_line(name: str, tmp_path: Path, write_spec: WriteSpec) -> None:
    path = write_malformed(name, tmp_path, write_spec)
    lines = problems(path)
    expected = f"{path}: {MALFORMED[name][2]}"
    assert [line for line in lines if line.startswith(expected)], lines
    # Nothing is reported that a user would not recognise: one line per mistake, and no mistake twice.
    assert len(lines) == len(set(lines)) <= 2, lines


@pytest.mark.parametrize("where", ["none.toml", ".", "none/none.toml"])
def test_missing_spec(tmp_path: Path, where: str) -> None:
    (line,) = problems(tmp_path / where)
    assert line.startswith(str(tmp_path))
    assert "no such file" in line or "is a folder" in line


def test_all_problems_of_a_file_at_once(write_spec: WriteSpec) -> None:
    path = write_spec(
        ('ansatze = ["made"]', 'ansatze = ["made", "retnet"]'),
        ("seeds = [0]", "sedes = [0]"),
        ("learning_rate = 1e-2", "learning_rate = -1"),
        ("xs = { width = 4 }", "xs = { widht = 4 }"),
        ("[molecule.H2]\n", "[molecule.H2]\nmultiplicity = 2\n"),
        add='\n[holdout]\nsizes = ["l"]\n[variants.v]\nphase.width = 0\n',
    )
    keys = {line.removeprefix(f"{path}: ").split(":")[0] for line in problems(path)}
    assert keys == {
        "sedes",
        "train.learning_rate",
        "ansatz.made.sizes.xs.widht",
        "ansatz.made.sizes.xs.width",
        "molecule.H2.multiplicity",
        "holdout.sizes",
        "variants.v.phase.width",
    }


def test_problem_in_the_shared_molecule_table_names_that_file(tmp_path: Path, write_spec: WriteSpec) -> None:
    (tmp_path / "molecules.toml").write_text(
        "[He2]\natoms = [['He', 0, 0, 0]]\nchrage = 1\n", encoding="utf-8"
    )
    lines = problems(write_spec(('molecules = ["H2"]', 'molecules = ["He2"]')))
    assert len(lines) == 1
    assert lines[0].startswith(
        f'{tmp_path / "molecules.toml"}: He2.chrage: unknown key, did you mean "charge"?'
    )


def test_point_made_by_hand_has_the_id_of_the_spec(write_spec: WriteSpec) -> None:
    (loaded,) = load_study(write_spec()).points
    table = tomllib.loads(TINY_SPEC)
    by_hand = Point(
        molecule=MoleculeSpec(name="anything", atoms=table["molecule"]["H2"]["atoms"]),
        ansatz={"kind": "made", "params": {"width": 4}},  # type: ignore[arg-type]
        phase={"width": 4},  # type: ignore[arg-type]
        train={"learning_rate": 0.01},  # type: ignore[arg-type]
        steps=3,
    )
    assert by_hand.id == loaded.id
    assert by_hand.model_copy(update={"steps": 4}).id != loaded.id


def test_spec_of_the_readme_is_a_study(tmp_path: Path) -> None:
    text = (SPECS.parent / "README.md").read_text(encoding="utf-8")
    (block,) = [part.split("```")[0] for part in text.split("```toml\n")[1:] if part.startswith("study = ")]
    path = tmp_path / "mine.toml"
    path.write_text(block, encoding="utf-8")  # no molecules.toml beside it: the package's own
    study = load_study(path)
    assert len(study.points) == 2 * 2 * 2 * 2 * 2 + 2 * 2 * 2
    rates = {(p.ansatz.name, p.size): p.train.learning_rate for p in study.points}
    assert rates["made", "s"] == 3e-3
    assert rates["made", "m"] == rates["transformer", "s"] == 1e-3
    assert {p.size for p in study.points if study.is_holdout(p)} == {"m"}
