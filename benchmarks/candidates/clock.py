"""What every candidate notes while it trains, in whichever environment it runs: torch is all that is needed.

Time is read after each step of the optimiser, by a hook that torch offers to everybody; no candidate is changed for it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils import fetch


class Clock:
    """Reads time after each optimiser step of this process, and how long checkpoints took.

    Attributes:
        steps: per step, seconds since the epoch and processor time of this process.
        checkpoints: seconds in the functions that `watch` wrapped.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.checkpoints, self.inside, self.trained = 0.0, False, 0
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        self.steps.append((time.time(), time.process_time()))
        self.trained = sum(parameter.numel() for group in optimiser.param_groups for parameter in group["params"])

    def watch(self, owner: Any, name: str) -> None:
        """Count the time in `owner.name` as time in checkpoints; calls within calls count once."""
        function: Callable = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.checkpoints += time.perf_counter() - start

        setattr(owner, name, timed)

    def only_data(self, batches: int, notes: str, advance: Callable[[Any, int], Any] = lambda where, _: where) -> None:
        """Instead of training, load batches in this process, note the processor time of each, keep the crops, and leave.

        Args:
            batches: number of batches; one more warms up.
            notes: where to write; the crops lie beside it in crops.npz, "SIDE": float16 (N, 3, SIDE, SIDE).
            advance: index of the first batch, k -> index of the k-th, where the same index gives the same crops.
        """
        load = fetch._MapDatasetFetcher.fetch

        def timed(fetcher: Any, where: Any) -> None:
            seconds, crops = [], {}
            for k in range(batches + 1):
                start = time.process_time()
                batch = load(fetcher, advance(where, k))
                seconds.append(time.process_time() - start)
                for leaf in tree_leaves(batch):
                    if isinstance(leaf, torch.Tensor) and leaf.ndim == 4:
                        crops.setdefault(str(leaf.shape[-1]), []).append(leaf.half().numpy())
            np.savez(Path(notes).with_name("crops.npz"), **{side: np.concatenate(parts) for side, parts in crops.items()})
            self.write(notes, data_seconds=seconds[1:])
            os._exit(0)  # no step, no clearing up

        fetch._MapDatasetFetcher.fetch = timed

    def write(self, path: str, **facts: Any) -> None:
        """Everything as JSON, with the greatest resident memory of this process, in MiB."""
        noted = {"steps": self.steps, "checkpoints": self.checkpoints, "peak_mib": peak_memory(), "trained": self.trained, **facts}
        Path(path).write_text(json.dumps({**noted, "torch": torch.__version__, "threads": torch.get_num_threads()}))


def peak_memory() -> float:
    """Greatest resident memory of this process so far, MiB."""
    if sys.platform == "linux":  # ru_maxrss would begin at that of the process which started this one
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def started() -> tuple[Clock, dict[str, Any]]:
    """A clock, and the settings that the benchmark gives as JSON on the command line."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    return Clock(), settings
