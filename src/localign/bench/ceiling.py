"""The measured ceiling of a device's speed: products of large matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from localign.bench.timing import timed
from localign.engine.hardware.cpu import fast_float32_matmul

_SIDES = {"cpu": 2048, "cuda": 8192}
_WARMUP_PRODUCTS = 2


class Ceiling:
    """Times products of square matrices. Call it between measurements, so that it sees the same load of the machine.

    On a CPU each call takes the faster of torch's own product and the product that training uses.

    Args:
        device: The device.
        dtype: Type of the matrices: float32 or bfloat16.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.side = _SIDES.get(device.type, 2048)
        # CPU time does not depend on other load, but it adds up over threads, so it is used for one thread only.
        self.by_cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
        self._pair = [torch.randn(self.side, self.side, device=device).to(dtype) for _ in range(2)]
        self.seconds: list[float] = []
        for _ in range(_WARMUP_PRODUCTS):
            self()
        self.seconds.clear()

    def __call__(self) -> None:
        """Time one more product."""
        a, b = self._pair
        with torch.no_grad():
            self.seconds.append(min(self._time(lambda: a @ b), self._time_fast_matmul(lambda: a @ b)))

    @property
    def flops(self) -> float:
        """Floating-point operations per second of the fastest product."""
        return 2 * self.side**3 / min(self.seconds)

    def _time_fast_matmul(self, product: Callable[[], Tensor]) -> float:
        with fast_float32_matmul(self.device):
            return self._time(product)

    def _time(self, product: Callable[[], Tensor]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        _, timing = timed(product, self.device)
        return timing.cpu if self.by_cpu_time else timing.wall
