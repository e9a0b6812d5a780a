"""What the engine does to a real GPU through pycuda and cuda.bindings, without TensorRT; skipped where there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from ticks import FULL, SMALL

from device.config import ModelConfig
from device.engine import HostMemory, NoAccelerator, OutOfDeviceMemory, allocate
from device.engine.cuda import Block, DeviceMemory, Gpu, Graph, Mirror
from device.tensors import Tensor, tensor_table

pytestmark = pytest.mark.gpu

# A ring whose slots are 4 · 20 · 10 bytes: no multiple of what cuMemAllocPitch would choose.
ODD = dataclasses.replace(SMALL, trunk=dataclasses.replace(SMALL.trunk, width=20))


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    try:
        made = Gpu()
    except NoAccelerator as error:
        pytest.skip(str(error))
    yield made
    made.close()


def rows(config: ModelConfig, role: str) -> list[Tensor]:
    return [row for row in tensor_table(config) if row.role == role]


def read(gpu: Gpu, block: Block, row: Tensor) -> np.ndarray:
    """A tensor of a block, copied without the code under test."""
    values = np.empty(row.shape, row.dtype)
    gpu.driver.memcpy_dtoh(values, block.address(row.name))
    return values


def test_what_goes_up_comes_down(gpu: Gpu) -> None:
    given = rows(FULL, "input")
    mirror = Mirror(gpu, given)
    rng = np.random.default_rng(0)
    wanted = {row.name: rng.integers(0, 100, row.shape).astype(row.dtype) for row in given}
    for name, array in mirror.arrays.items():
        array[...] = wanted[name]
    assert gpu.timed(mirror.upload) > 0
    for row in given:
        assert np.array_equal(read(gpu, mirror.block, row), wanted[row.name]), row.name
        mirror.arrays[row.name][...] = 0
    gpu.timed(mirror.download)
    assert all(np.array_equal(array, wanted[name]) for name, array in mirror.arrays.items())
    mirror.close()


@pytest.mark.parametrize("config", [FULL, SMALL, ODD])
def test_rings_on_the_gpu_hold_what_rings_on_the_host_hold(gpu: Gpu, config: ModelConfig) -> None:
    inputs, outputs = allocate(config)
    host = HostMemory(config, inputs, outputs)
    state, update = Block(gpu, rows(config, "state")), Block(gpu, rows(config, "update"))
    device = DeviceMemory(gpu, config, state, update)
    host.clear()
    device.clear()
    rng = np.random.default_rng(0)
    for tick in (0, 1, 2, 3, 4, 7, 8, 70, 10_000_000):
        for row in rows(config, "update"):
            outputs[row.name][...] = rng.standard_normal(row.shape)
            gpu.stream.synchronize()
            gpu.driver.memcpy_htod(update.address(row.name), outputs[row.name])
        host.absorb(tick)
        device.absorb(tick)
        if tick == 7:
            host.break_voice()
            device.break_voice()
        gpu.stream.synchronize()
        for row in rows(config, "state"):
            assert np.array_equal(read(gpu, state, row), inputs[row.name]), (tick, row.name)
    update.close()
    state.close()


def test_a_graph_does_the_same_at_every_launch(gpu: Gpu) -> None:
    pytest.importorskip("cuda.bindings")
    row = Tensor("values", "input", "float32", (1000,), "1", "")
    mirror, other = Mirror(gpu, [row]), Block(gpu, [row])

    def work() -> None:
        mirror.upload()
        gpu.driver.memcpy_dtod_async(other.base, mirror.block.base, other.size, gpu.stream)

    with gpu.typed_errors("capturing"):
        graph = Graph(gpu, work)
    assert graph.captured
    for value in (1.0, 2.0, 3.0):
        mirror.arrays["values"][...] = value
        gpu.timed(graph.launch)
        assert (read(gpu, other, row) == value).all()
    graph.close()
    other.close()
    mirror.close()


def test_more_than_there_is_ends_in_our_error(gpu: Gpu) -> None:
    _, total = gpu.driver.mem_get_info()
    with pytest.raises(OutOfDeviceMemory, match="smaller model"):
        Block(gpu, [Tensor("huge", "state", "uint8", (total * 2,), "1", "")])


def test_the_context_is_handed_back() -> None:
    for _ in range(3):
        try:
            gpu = Gpu()
        except NoAccelerator as error:
            pytest.skip(str(error))
        block = Block(gpu, rows(SMALL, "state"))
        gpu.stream.synchronize()
        block.close()
        driver = gpu.driver
        gpu.close()
        assert driver.Context.get_current() is None
