"""PyTorch on one device as a machine to validate the cost model on (`export.validate`): the model itself, eager, float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from device.config import ModelConfig
from device.tensors import tensor_table
from export.distill.model import RMSNorm, TickModel
from export.validate import CHAIN, LARGEST_READ, PRODUCT_COUNT, PRODUCT_WIDTH, timed_ms


def has_gpu() -> bool:
    """Whether PyTorch can use an NVIDIA GPU here."""
    return torch.cuda.is_available()


class TorchMachine:
    """`device` is "cuda", or "cpu" for a test."""

    overlaps = True

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.name = torch.cuda.get_device_name() if device == "cuda" else "PyTorch on the CPU"

    def read_gb_s(self, size: int) -> float:
        values = torch.ones(min(size, LARGEST_READ) // 4, device=self._device)
        return values.nbytes / self._timed_ms(values.sum) / 1e6

    def product_gflops(self, rows: int) -> float:
        weight = torch.randn(PRODUCT_WIDTH, PRODUCT_WIDTH, device=self._device) * PRODUCT_WIDTH**-0.5
        start = torch.randn(rows, PRODUCT_WIDTH, device=self._device)

        def run() -> torch.Tensor:
            x = start
            for _ in range(PRODUCT_COUNT):
                x = F.linear(x, weight)
            return x

        return PRODUCT_COUNT * 2 * rows * PRODUCT_WIDTH**2 / self._timed_ms(run) / 1e6

    def chain_ms(self, rows: int, width: int) -> float:
        norm, start = RMSNorm(width).to(self._device), torch.randn(rows, width, device=self._device)

        def run() -> torch.Tensor:
            x = start
            for _ in range(CHAIN):
                left, right = F.gelu(norm(x)).chunk(2, dim=-1)
                x = torch.cat([right, left], dim=-1) * 0.9 + 0.1
            return x

        return self._timed_ms(run)

    def tick_ms(self, c: ModelConfig) -> float:
        with self._device:  # what a step makes for itself must lie there too
            model = TickModel(c).eval()
            rows = [row for row in tensor_table(c) if row.enters]
            inputs = {row.name: torch.zeros(row.shape, dtype=getattr(torch, row.dtype)) for row in rows}
            for name in ("perceive_valid", "present_valid"):
                inputs[name].fill_(1.0)
            return self._timed_ms(lambda: model.step(inputs))

    @torch.no_grad()
    def _timed_ms(self, run: Callable[[], object]) -> float:
        def finished() -> None:
            run()
            if self._device.type == "cuda":
                torch.cuda.synchronize()

        return timed_ms(finished)
