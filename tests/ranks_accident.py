"""`python -m replicate` with an accident on the last rank at its third step.

torchrun --nproc-per-node K tests/ranks_accident.py raise|kill run SPEC ...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from replicate import trainer
from replicate.cli import main

kind, last = sys.argv[1], int(os.environ["WORLD_SIZE"]) - 1
advance = trainer.Training.advance


def accident(run: Any) -> Any:
    if run.group.rank == last and run.step == 2:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("an accident")
    return advance(run)


trainer.Training.advance = accident  # type: ignore[method-assign]
sys.exit(main(sys.argv[2:]))
