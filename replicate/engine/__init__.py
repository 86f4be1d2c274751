"""Engines: two strings in (spec, point id), a point file out.

base.py    the protocol, and what goes in and out
task.py    what a worker does with one point, wherever it is
eta.py     when a sweep will be done, from measured speeds
log.py     progress for people
sweep.py   queue, outcome, signals: the same for every engine
local.py   processes on this machine; always there
dask.py    a Dask cluster (extra `dask`)
slurm.py   Slurm job arrays through submitit (extra `slurm`)
ranks.py   one point at a time on processes that torchrun has started
"""

from __future__ import annotations
