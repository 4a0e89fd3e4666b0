"""What a device does at most: how fast it multiplies large matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localign.bench.timing import timed
from localign.engine.hardware.cpu import fast_float32_matmul

_SIDES = {"cpu": 2048, "cuda": 8192}
_WARM = 2


class Ceiling:
    """Times products of square matrices; to be called now and then, so that it meets what the measurement met.

    On a CPU it takes the faster of torch's own products and those that training computes with.

    Args:
        device: Where.
        dtype: Of the matrices: float32 or bfloat16.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.side = _SIDES.get(device.type, 2048)
        # One thread's own time, whatever else the machine does; several threads' times add up.
        self.by_processor_time = device.type == "cpu" and torch.get_num_threads() == 1
        self._pair = [torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2)]
        self.seconds: list[float] = []
        for _ in range(_WARM):
            self()
        self.seconds.clear()

    def __call__(self) -> None:
        """Measure once more."""
        a, b = self._pair
        with torch.no_grad():
            self.seconds.append(min(self._time(lambda: a @ b), self._trained(lambda: a @ b)))

    @property
    def flops(self) -> float:
        """Operations per second of the fastest product."""
        return 2 * self.side**3 / min(self.seconds)

    def _trained(self, product: Callable[[], Tensor]) -> float:
        with fast_float32_matmul(self.device):
            return self._time(product)

    def _time(self, product: Callable[[], Tensor]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        _, timing = timed(product, self.device)
        return timing.cpu if self.by_processor_time else timing.wall
