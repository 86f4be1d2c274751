"""A step of fixed shapes as one CUDA graph.

A step on a small sector is hundreds of short kernels, and a GPU waits for the host to ask for each of them.
A graph is recorded once and asked for with one call. What changes from step to step are *dials*: tensors of
one number that the recorded kernels read. Shapes may not change, and nothing may be waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dial = int | float | Tensor

EAGER_STEPS = 3  # before recording: libraries make their handles and workspaces, Adam its moments


def is_on(dial: Dial) -> bool:
    """Whether a dial is anything but zero; a tensor may be, and is not asked."""
    return isinstance(dial, Tensor) or dial != 0


class StepGraph:
    """Calls `step(drawn, entropy, rate)` as it is for some steps, then records it once and replays it.

    `step` takes Python numbers or dials and returns a tensor on `device`, which every replay overwrites.
    `generator`: the random stream that it draws from; replays move it on as calls would.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device, generator: torch.Generator) -> None:
        self._step, self._generator = step, generator
        self._stream = torch.cuda.Stream(device)
        self._drawn = torch.zeros((), dtype=torch.float64, device=device)
        self._entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._rate = torch.zeros((), dtype=torch.float32, device=device)  # fused Adam reads a float
        self._eager = EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._numbers: Tensor | None = None

    def __call__(self, drawn: int, entropy: float, rate: float) -> Tensor:
        """The tensor that `step` returns."""
        if self._eager:
            self._eager -= 1
            return self._aside(drawn, entropy, rate)
        for dial, value in ((self._drawn, drawn), (self._entropy, entropy), (self._rate, rate)):
            dial.fill_(value)
        if self._graph is None:
            self._record()
        assert self._graph is not None
        assert self._numbers is not None
        self._graph.replay()
        return self._numbers

    def _aside(self, drawn: int, entropy: float, rate: float) -> Tensor:
        """On the stream that the graph will be recorded on."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            numbers = self._step(drawn, entropy, rate)
        current.wait_stream(self._stream)
        return numbers

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, stream=self._stream):
            self._numbers = self._step(self._drawn, self._entropy, self._rate)
        self._graph = graph
