"""What a worker does with one point, on whatever machine: claim it, train it, say in one line what came of
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from replicate.engine.base import Options, Report
from replicate.spec import Study, UserError, load_study
from replicate.store import Store, StoreError

if TYPE_CHECKING:
    import xarray as xr


_studies: dict[str, Study] = {}  # by path, as last read in this process


def _study(spec: str, point_id: str) -> Study:
    """The study, read once per process. An id is a hash of content: whoever knows it has the right point.

    So a sweep goes on undisturbed while its spec is edited, and a worker that outlives it reads the next
    spec.
    """
    if spec not in _studies or point_id not in _studies[spec].by_id:
        _studies[spec] = load_study(spec)
    return _studies[spec]


def prepare(options: Options) -> str:
    """Threads and device of this process; UserError where the device is not there."""
    import torch

    if torch.get_num_threads() != options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if options.device == "cuda":
        raise UserError("--device cuda: torch finds no CUDA device here; allowed auto, cpu")
    return "cpu"


def run_task(
    spec: str,
    point_id: str,
    options: Options,
    stop: Callable[[], bool],
    train: Callable[..., xr.Dataset | None] | None = None,
) -> Report:
    """Run one point of the spec file; never raises what a point, its folder or its spec can cause.

    `train`: what to do instead of `run_point` once the point is claimed.
    """
    warnings: list[str] = []
    try:
        device = prepare(options)
        study = _study(spec, point_id)
    except Exception as error:  # every point would fail alike: end the sweep
        return Report(
            "fatal", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        )
    point = study.by_id.get(point_id)
    if point is None:
        return Report("failed", f"{spec}: has no point {point_id} any more (edited while it ran?)")
    if stop():
        return Report("stopped")
    store = Store.of(study, options.artifacts, warn=warnings.append)
    try:
        from replicate.run import run_point, summarise

        claim = store.claim(point_id)
        if claim is None:
            return Report("busy")
        with claim:
            if store.point_path(point_id).exists():  # finished by another sweep a moment ago
                return Report("skipped")
            cache = options.artifacts / ".molecules"
            data = (train or run_point)(
                point, store, device=device, checkpoint=study.checkpoint, cache=cache, stop=stop
            )
        if data is None:
            return Report("stopped", warnings=tuple(warnings))
        return Report("done", summarise(point, data), seconds_of(data), tuple(warnings))
    except StoreError as error:  # the disk's failure, not the point's: the next sweep tries it again
        return Report("failed", str(error), warnings=tuple(warnings))
    # Whatever a point raises is its result; the sweep goes on with the next one.
    except Exception as error:
        store.write_error(point, error)
        return Report("failed", f"{type(error).__name__}: {error}", warnings=tuple(warnings))


def seconds_of(data: xr.Dataset) -> float:
    """Time that a stored point took: training, over all its parts, and evaluation."""
    return float(data["wall_seconds"]) + float(data["evaluation_seconds"])
