"""TOML -> Study: one commented file per study, all of its problems at once.

A study is a base (sections `phase`, `sampling`, `train`, `evaluation` and the scalars) over six named axes:
molecules, ansatze, sizes, steps (`train.steps`), variants, seeds. A later, more specific layer wins:

    [phase] < [phase.sizes.<size>] < [ansatz.<name>.phase] < [ansatz.<name>.sizes.<size>.phase]

and a variant repeats these layers on top of the base, with only what it changes.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from replicate.spec.files import read_text
from replicate.spec.models import (
    PAPER_WHOLE,
    PAPER_WHOLE_PROBLEM,
    PARAMETERS,
    AnsatzSpec,
    CheckpointSpec,
    EvaluationSpec,
    HoldoutSpec,
    Model,
    MoleculeSpec,
    PhaseSpec,
    Point,
    SamplingSpec,
    Selector,
    StudyFile,
    Table,
    TrainSpec,
    UserError,
    VScoreSpec,
    registered_kinds,
)
from replicate.spec.problems import findings, show, suggest
from replicate.spec.table import build_molecule, read_table, shared_table

AXES = ("molecules", "ansatze", "sizes", "steps", "variants", "seeds")
SECTIONS: dict[str, type[Model]] = {
    "phase": PhaseSpec,
    "sampling": SamplingSpec,
    "train": TrainSpec,
    "evaluation": EvaluationSpec,
}
SCALARS = ("local_energy", "order", "precision", "hamiltonian_threshold", "memory_budget_mb")
_RESERVED = ("kind", "sizes", "phase", "train", "learning_rate")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_LABEL_RULE = "allowed at most 100 letters, digits and _ . + -"
_MOST_STEPS = 10**9


@dataclass(frozen=True)
class Study:
    """A validated study. `axes`: labels of every axis in spec order; `points`: all planned cells."""

    path: str
    text: str
    name: str
    title: str
    axes: dict[str, tuple[Any, ...]]
    molecules: dict[str, MoleculeSpec]
    points: tuple[Point, ...]
    holdout: HoldoutSpec
    holdout_cells: tuple[Selector, ...]
    v_score: VScoreSpec
    checkpoint: CheckpointSpec

    @cached_property
    def by_id(self) -> dict[str, Point]:
        return {point.id: point for point in self.points}

    def index(self, point: Point) -> tuple[int, ...]:
        """Position of a point in the grid of `axes`."""
        labels = point.labels()
        return tuple(self._position[axis][labels[axis]] for axis in AXES)

    @cached_property
    def _position(self) -> dict[str, dict[Any, int]]:
        return {axis: {label: i for i, label in enumerate(labels)} for axis, labels in self.axes.items()}

    def is_holdout(self, point: Point) -> bool:
        """Whether a fit must leave this point alone."""
        held = self.holdout
        return (
            point.molecule.name in held.molecules
            or point.size in held.sizes
            or point.steps in held.steps
            or any(cell.matches(point) for cell in self.holdout_cells)
        )


def load_study(path: str | Path) -> Study:
    """Read and check a spec; raises UserError with every problem of the file, one line each."""
    shown = str(path)
    text = read_text(Path(path), shown)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{shown}: not valid TOML: {error}") from None
    return _Loader(shown, text, raw).study()


class _Loader:
    """Collects problems while it resolves a raw spec; nothing is returned unless there are none."""

    def __init__(self, shown: str, text: str, raw: Table) -> None:
        self.shown, self.text = shown, text
        self.problems: dict[str, None] = {}  # an ordered set: cells share mistakes
        self.broken: set[str] = set()  # top-level keys whose value is replaced by something harmless
        self.file = self._top_level(raw)
        self.overlays: dict[str, Table] = {"base": {}}
        self.only: dict[str, tuple[Selector, ...]] = {}

    def add(self, key: str, problem: str) -> None:
        self.problems[f"{self.shown}: {key}: {problem}" if key else f"{self.shown}: {problem}"] = None

    def _top_level(self, raw: Table) -> StudyFile:
        """The file's top level; what is wrong is reported and made harmless, so that the rest is read."""
        harmless = {
            "study": "x", "molecules": ("",), "ansatze": ("",), "sizes": ("",), "ansatz": {}, "train": {}
        }  # fmt: skip
        try:
            return StudyFile(**raw)
        except ValidationError as error:
            for key, problem in findings(StudyFile, error):
                self.add(key, problem)
            self.broken = {str(detail["loc"][0]) for detail in error.errors()}
            kept = {key: value for key, value in raw.items() if key not in self.broken}
            return StudyFile(**{**harmless, **kept})

    # -- the road from file to points --------------------------------------------------------------

    def study(self) -> Study:
        file = self.file
        if not _LABEL.fullmatch(file.study):
            self.add("study", f"{show(file.study)} is not a folder name; {_LABEL_RULE}")
        self._variants()
        axes: dict[str, tuple[Any, ...]] = {
            "molecules": file.molecules,
            "ansatze": file.ansatze,
            "sizes": file.sizes,
            "steps": self._steps(),
            "variants": tuple(self.overlays),
            "seeds": file.seeds,
        }
        for axis, labels in axes.items():
            key = "train.steps" if axis == "steps" else axis
            for label in dict.fromkeys(x for x in labels if labels.count(x) > 1):
                self.add(key, f"{show(label)} is listed twice; every label once")
            for label in labels if axis not in self.broken else ():
                if isinstance(label, str) and not _LABEL.fullmatch(label):
                    self.add(key, f"{show(label)} is not a label; {_LABEL_RULE}")
        self._selectors(axes)
        cells = self._cells(axes, self.file.holdout.cells, "holdout.cells")
        self._holdout_labels(axes)
        molecules = self._molecules()
        resolved = {
            (variant, ansatz, size): self._resolve(variant, ansatz, size)
            for variant, ansatz, size in itertools.product(self.overlays, file.ansatze, file.sizes)
            if ansatz and size
        }
        self._unused_overlays()
        if self.problems:
            raise UserError(*self.problems)
        study = Study(
            path=self.shown,
            text=self.text,
            name=file.study,
            title=file.title,
            axes=axes,
            molecules=molecules,
            points=tuple(self._points(axes, molecules, resolved)),
            holdout=file.holdout,
            holdout_cells=cells,
            v_score=file.v_score,
            checkpoint=file.checkpoint,
        )
        self._check_points(study)
        if self.problems:
            raise UserError(*self.problems)
        return study

    def _steps(self) -> tuple[int, ...]:
        steps = self.file.train.get("steps")
        if "train.steps" in self.problems or not self.file.train:
            return (1,)
        if steps is None:
            self.add("train.steps", "missing; give the list of step counts T, for example [100, 400, 1600]")
        elif not isinstance(steps, list) or not steps:
            self.add("train.steps", f"expected a list with an entry, got {show(steps)}")
        else:
            wrong = [s for s in steps if not isinstance(s, int) or isinstance(s, bool) or s < 1]
            for value in wrong:
                self.add("train.steps", f"must be whole numbers >= 1, got {show(value)}")
            for value in (s for s in steps if s not in wrong and s > _MOST_STEPS):
                self.add("train.steps", f"{value} exceeds {_MOST_STEPS:.0e}; a number of every step is kept")
            if not wrong:
                return tuple(steps)
        return (1,)

    def _variants(self) -> None:
        for name, table in self.file.variants.items():
            key = f"variants.{name}"
            overlay = self._expand(dict(table), key)
            only = overlay.pop("only", None)
            if only is not None:
                self.only[name] = only  # replaced by selectors once the axes are known
            allowed = [*SECTIONS, "ansatz", *SCALARS, "only"]
            for unknown in [k for k in overlay if k not in allowed]:
                self.add(f"{key}.{unknown}", f"unknown key{suggest(unknown, allowed)}")
                del overlay[unknown]
            for section in (*SECTIONS, "ansatz"):
                if section in overlay and not isinstance(overlay[section], dict):
                    self.add(f"{key}.{section}", f"expected a table, got {show(overlay.pop(section))}")
            if "steps" in overlay.get("train", {}):
                self.add(f"{key}.train.steps", "steps is an axis; choose cells of a variant with `only`")
                del overlay["train"]["steps"]
            if name == "base" and overlay:
                self.add(key, "the base variant changes nothing; allowed only: only")
            self.overlays[name] = overlay if name != "base" else {}

    def _expand(self, table: Table, key: str) -> Table:
        """Quoted dotted keys ("train.learning_rate" = 1e-4) as the sub-tables that they mean."""
        expanded: Table = {}
        for name, value in table.items():
            *parents, leaf = name.split(".")
            here = expanded
            for parent in parents:
                here = here.setdefault(parent, {})
                if not isinstance(here, dict):
                    self.add(f"{key}.{name}", f"{parent} is not a table")
                    here = {}
            if isinstance(value, dict):
                value = self._expand(value, f"{key}.{name}")
                if isinstance(here.get(leaf), dict):
                    value = {**here[leaf], **value}
            here[leaf] = value
        return expanded

    def _cells(self, axes: Mapping[str, tuple[Any, ...]], raw: Any, key: str) -> tuple[Selector, ...]:
        """Selectors from a table or a list of tables of axis labels."""
        selectors = []
        for i, table in enumerate(raw if isinstance(raw, list | tuple) else [raw]):
            where = f"{key}[{i}]" if isinstance(raw, list | tuple) else key
            if not isinstance(table, dict) or not table:
                self.add(where, f"expected a table of axis labels, got {show(table)}")
                continue
            good = {}
            for axis, labels in table.items():
                if axis not in AXES:
                    self.add(f"{where}.{axis}", f"unknown key{suggest(axis, AXES)}")
                elif not isinstance(labels, list | tuple) or not labels:
                    self.add(f"{where}.{axis}", f"expected a list with an entry, got {show(labels)}")
                elif self._known(axes, axis, labels, f"{where}.{axis}"):
                    good[axis] = tuple(labels)
            selectors.append(Selector(**good))
        return tuple(selectors)

    def _known(self, axes: Mapping[str, tuple[Any, ...]], axis: str, labels: Any, key: str) -> bool:
        unknown = [label for label in labels if label not in axes[axis] or isinstance(label, bool)]
        for label in unknown:
            self.add(key, f"{show(label)} is not in the study{suggest(str(label), map(str, axes[axis]))}")
        return not unknown

    def _selectors(self, axes: Mapping[str, tuple[Any, ...]]) -> None:
        for name in self.only:
            raw: Any = self.only[name]
            if raw == []:
                self.add(f"variants.{name}.only", "expected an entry, got []; without cells nothing runs")
            self.only[name] = self._cells(axes, raw, f"variants.{name}.only")

    def _holdout_labels(self, axes: Mapping[str, tuple[Any, ...]]) -> None:
        for axis in ("molecules", "sizes", "steps"):
            self._known(axes, axis, getattr(self.file.holdout, axis), f"holdout.{axis}")

    # -- molecules ---------------------------------------------------------------------------------

    def _molecules(self) -> dict[str, MoleculeSpec]:
        """The molecules of the axis: the spec's own tables win over the shared ones."""
        folder = Path(self.shown).parent
        named = self.file.molecules_file
        shared_path = shared_table(folder) if named is None else folder / named
        shared: dict[str, Table] = {}
        if self.broken & {"molecule", "molecules"}:
            return {}
        if not all(name in self.file.molecule for name in filter(None, self.file.molecules)):
            try:
                shared = read_table(shared_path)
            except UserError as error:
                self.add("molecules_file", str(error))
        found = {}
        for name in filter(None, self.file.molecules):
            try:
                if name in self.file.molecule:
                    where = f"{self.shown}: molecule.{name}"
                    found[name] = build_molecule(name, self.file.molecule[name], folder, where)
                elif name in shared:
                    where = f"{shared_path}: {name}"
                    found[name] = build_molecule(name, shared[name], shared_path.parent, where)
                else:
                    known = {**self.file.molecule, **shared}
                    self.add("molecules", f"unknown molecule {show(name)}{suggest(name, known)}")
            except UserError as error:
                self.problems.update(dict.fromkeys(error.problems))
        return found

    # -- one (variant, ansatz, size) ---------------------------------------------------------------

    def _layers(self, variant: str, ansatz: str, size: str) -> Iterator[tuple[str, Table, Table, Table]]:
        """(key prefix, overlay root, ansatz table, size table) of the base and then of the variant."""
        base = {name: getattr(self.file, name) for name in (*SECTIONS, "ansatz", *SCALARS)}
        roots = [("", base)]
        if variant != "base":
            roots.append((f"variants.{variant}.", self.overlays[variant]))
        for prefix, root in roots:
            table = root.get("ansatz", {}).get(ansatz, {})
            if not isinstance(table, dict):
                self.add(f"{prefix}ansatz.{ansatz}", f"expected a table, got {show(table)}")
                table = {}
            sizes = table.get("sizes", {})
            if not isinstance(sizes, dict):
                self.add(f"{prefix}ansatz.{ansatz}.sizes", f"expected a table per size, got {show(sizes)}")
                sizes = {}
            for label, value in sizes.items():
                if not isinstance(value, dict):
                    self.add(f"{prefix}ansatz.{ansatz}.sizes.{label}", f"expected a table, got {show(value)}")
            cell = sizes.get(size, {})
            cell = cell if isinstance(cell, dict) else {}
            yield prefix, root, table, cell

    def _resolve(self, variant: str, ansatz: str, size: str) -> Table | None:
        """Everything of a point but molecule, seed and steps; None if the ansatz or size is not there."""
        file = self.file
        if ansatz not in file.ansatz:
            self.add(
                "ansatze", f"{show(ansatz)} has no table [ansatz.{ansatz}]{suggest(ansatz, file.ansatz)}"
            )
            return None
        sizes = file.ansatz[ansatz].get("sizes")
        if not isinstance(sizes, dict) or size not in sizes:
            have = sizes if isinstance(sizes, dict) else {}
            self.add(f"ansatz.{ansatz}.sizes.{size}", f"missing; sizes of this ansatz{suggest(size, have)}")
            return None
        layers = list(self._layers(variant, ansatz, size))
        kind = file.ansatz[ansatz].get("kind", ansatz)
        kinds = registered_kinds()
        if kind not in kinds:
            self.add(f"ansatz.{ansatz}.kind", f"unknown kind {show(kind)}{suggest(str(kind), kinds)}")
            return None
        values: Table = {}
        params, where = self._merge_params(layers, ansatz, size)
        if kind in PARAMETERS:
            checked = self._validate(PARAMETERS[kind], params, where, f"ansatz.{ansatz}.sizes.{size}")
            params = checked.model_dump() if checked is not None else {}
        values["ansatz"] = {"kind": kind, "name": ansatz, "params": params}
        for section, model in SECTIONS.items():
            merged, where = self._merge_section(layers, section, ansatz, size)
            values[section] = self._validate(model, merged, where, section)
        for scalar in SCALARS:
            for prefix, root, _, _ in layers:
                if scalar in root:
                    values[scalar] = root[scalar]
                    self._check_scalar(scalar, root[scalar], f"{prefix}{scalar}")
        if (values["local_energy"], getattr(values["sampling"], "regime", None)) == PAPER_WHOLE:
            said = [
                p for p, root, *_ in layers if "local_energy" in root or "regime" in root.get("sampling", {})
            ]
            self.add(f"{said[-1]}local_energy", PAPER_WHOLE_PROBLEM)
        return values

    def _merge_params(
        self, layers: list[tuple[str, Table, Table, Table]], ansatz: str, size: str
    ) -> tuple[Table, Table]:
        merged: Table = {}
        where: dict[str, str] = {}
        for prefix, _, table, cell in layers:
            here = f"{prefix}ansatz.{ansatz}"
            for path, values in ((here, table), (f"{here}.sizes.{size}", cell)):
                for key, value in values.items():
                    if key not in _RESERVED or (path != here and key in ("kind", "sizes")):
                        merged[key], where[key] = value, f"{path}.{key}"
        return merged, where

    def _merge_section(
        self, layers: list[tuple[str, Table, Table, Table]], section: str, ansatz: str, size: str
    ) -> tuple[Table, Table]:
        merged: Table = {}
        where: dict[str, str] = {}

        def take(table: Any, path: str) -> None:
            if not isinstance(table, dict):
                self.add(path, f"expected a table, got {show(table)}")
                return
            for key, value in table.items():
                if f"{path}.{key}" in (f"{prefix}phase.sizes", f"{prefix}train.steps"):
                    continue  # an axis, and the layer that follows
                merged[key], where[key] = value, f"{path}.{key}"

        for prefix, root, table, cell in layers:
            take(root.get(section, {}), f"{prefix}{section}")
            if section == "phase":
                by_size = root.get("phase", {}).get("sizes", {})
                if isinstance(by_size, dict):
                    take(by_size.get(size, {}), f"{prefix}phase.sizes.{size}")
                else:
                    self.add(f"{prefix}phase.sizes", f"expected a table per size, got {show(by_size)}")
            if section in ("phase", "train"):
                here = f"{prefix}ansatz.{ansatz}"
                for path, values in ((here, table), (f"{here}.sizes.{size}", cell)):
                    take(values.get(section, {}), f"{path}.{section}")
                    if section == "train" and "learning_rate" in values:
                        take({"learning_rate": values["learning_rate"]}, path)
        return merged, where

    def _validate(
        self, model: type[Model], merged: Table, where: Mapping[str, str], default: str
    ) -> Model | None:
        try:
            return model(**merged)
        except ValidationError as error:
            for key, problem in findings(model, error):
                first, *rest = key.split(".")
                path = ".".join([where.get(first, f"{default}.{first}" if first else default), *rest])
                self.add(path, problem)
            return None

    def _check_scalar(self, name: str, value: Any, key: str) -> None:
        try:
            Point(**{name: value})
        except ValidationError as error:
            for field, problem in findings(Point, error):
                if field == name:  # the other fields are missing here on purpose
                    self.add(key, problem)

    def _unused_overlays(self) -> None:
        """Ansatze and sizes that a layer names must exist, or its change would silently do nothing."""
        known = set(self.file.sizes)
        for table in self.file.ansatz.values():
            known |= set(table["sizes"]) if isinstance(table.get("sizes"), dict) else set()
        self._unknown_sizes(self.file.phase, "phase.sizes", sorted(known))
        for variant, overlay in self.overlays.items():
            self._unknown_sizes(overlay.get("phase", {}), f"variants.{variant}.phase.sizes", self.file.sizes)
            for ansatz, table in overlay.get("ansatz", {}).items():
                key = f"variants.{variant}.ansatz.{ansatz}"
                if ansatz not in self.file.ansatz:
                    self.add(key, f"unknown ansatz{suggest(ansatz, self.file.ansatz)}")
                    continue
                if isinstance(table, dict) and "kind" in table:
                    self.add(
                        f"{key}.kind", "a variant cannot change the kind; add another [ansatz.<name>] table"
                    )
                sizes = table.get("sizes", {}) if isinstance(table, dict) else {}
                for size in sizes if isinstance(sizes, dict) else ():
                    if size not in self.file.sizes:
                        self.add(f"{key}.sizes.{size}", f"unknown size{suggest(size, self.file.sizes)}")

    def _unknown_sizes(self, phase: Any, key: str, known: Iterable[str]) -> None:
        sizes = phase.get("sizes", {}) if isinstance(phase, dict) else {}
        for size in sizes if isinstance(sizes, dict) else ():
            if size not in known:
                self.add(f"{key}.{size}", f"unknown size{suggest(size, known)}")

    # -- points ------------------------------------------------------------------------------------

    def _points(
        self,
        axes: Mapping[str, tuple[Any, ...]],
        molecules: Mapping[str, MoleculeSpec],
        resolved: Mapping[tuple[str, str, str], Table | None],
    ) -> Iterator[Point]:
        parts = {
            key: {**values, "ansatz": AnsatzSpec(**values["ansatz"])}
            for key, values in resolved.items()
            if values
        }
        order = itertools.product(*(axes[axis] for axis in AXES))
        for molecule, ansatz, size, steps, variant, seed in order:
            point = Point(
                study=self.file.study,
                molecule=molecules[molecule],
                size=size,
                variant=variant,
                seed=seed,
                steps=steps,
                **parts[variant, ansatz, size],
            )
            if variant not in self.only or any(s.matches(point) for s in self.only[variant]):
                yield point

    def _check_points(self, study: Study) -> None:
        if not study.points:
            self.add("variants", "no cell is left to run; widen `only`")
        run = {point.variant for point in study.points}
        for variant in study.axes["variants"]:
            if variant not in run and study.points:
                self.add(f"variants.{variant}.only", "chooses no cell of the study; widen it")
        seen: dict[str, Point] = {}
        for point in study.points:
            first = seen.setdefault(point.id, point)
            if first is not point:
                a, b = first.labels(), point.labels()
                differ = ", ".join(
                    f"{axis} {a[axis]!r} and {b[axis]!r}" for axis in AXES if a[axis] != b[axis]
                )
                self.add("", f"duplicate point {point.id}: {differ} resolve to the same run; remove one")
        if study.points and all(study.is_holdout(point) for point in study.points):
            self.add("holdout", "every point is held out; leave something to fit")
