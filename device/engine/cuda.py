"""pycuda and cuda.bindings: the GPU's context, one stream, memory on both sides, and a graph of what a tick enqueues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from device.config import ModelConfig
from device.engine.interface import Buffers, EngineFailure, NoAccelerator, OutOfDeviceMemory, rings, vocoder_states
from device.tensors import Tensor, tensor_table

ALIGNMENT = 256  # bytes; NvInferRuntime.h: what setTensorAddress asks of a pointer
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: this stream never waits for the default one


class Gpu:
    """The first GPU's primary context, current on this thread until `close`, with the one stream that everything runs on.

    Raises NoAccelerator where there is no GPU or no pycuda. Belongs to the thread that made it.
    """

    def __init__(self) -> None:
        try:
            from pycuda import driver
        except ImportError as error:
            raise NoAccelerator(f"pycuda cannot be imported ({error}); install the extra: pip install 'copresence[jetson]'") from error
        self.driver = driver
        try:
            driver.init()
            device = driver.Device(0)
            self.name = str(device.name())
            self.sm = ".".join(str(part) for part in device.compute_capability())
            # The primary context is the one TensorRT's own runtime calls use; other libraries in this process keep theirs.
            self._context = device.retain_primary_context()
        except driver.Error as error:
            raise NoAccelerator(f"no GPU can be used ({error}); check it with nvidia-smi, or run without --engine") from error
        self._context.push()
        with contextlib.ExitStack() as undo:
            undo.callback(self._hand_back)
            with self.typed_errors("making a stream"):
                self.stream = driver.Stream(flags=NON_BLOCKING)
                waits = driver.event_flags.BLOCKING_SYNC  # sleeps instead of burning a core
                self._start, self._stop = driver.Event(waits), driver.Event(waits)
            undo.pop_all()

    @contextlib.contextmanager
    def typed_errors(self, doing: str) -> Iterator[None]:
        """pycuda's errors as ours."""
        try:
            yield
        except self.driver.MemoryError as error:
            raise OutOfDeviceMemory(
                f"the GPU's memory is used up while {doing} ({error}); stop other programs on the GPU or take a smaller model"
            ) from error
        except self.driver.Error as error:
            raise EngineFailure(f"the GPU failed while {doing} ({error}); start again, and look at dmesg if it stays") from error

    def timed(self, work: Callable[[], None]) -> float:
        """Enqueue `work`, wait for it, and return the milliseconds that it took on the GPU."""
        self._start.record(self.stream)
        work()
        self._stop.record(self.stream)
        self._stop.synchronize()
        return float(self._stop.time_since(self._start))

    def close(self) -> None:
        """Hand the context back as it was found; everything made in it must have been freed."""
        self._start = self._stop = self.stream = None
        self._hand_back()

    def _hand_back(self) -> None:
        self.driver.Context.pop()
        self._context.detach()


class Block:
    """One allocation on the GPU for several tensors, each aligned as TensorRT asks; zeroed."""

    def __init__(self, gpu: Gpu, rows: Sequence[Tensor]) -> None:
        self._gpu, end = gpu, 0
        self.offsets: dict[str, int] = {}
        for row in rows:
            self.offsets[row.name] = end
            end += -(-_bytes(row) // ALIGNMENT) * ALIGNMENT
        self.size = end
        with gpu.typed_errors(f"allocating {end} bytes"):
            self._allocation = gpu.driver.mem_alloc(end)
        self.base = int(self._allocation)
        self.clear()

    def address(self, name: str) -> int:
        return self.base + self.offsets[name]

    def clear(self) -> None:
        self._gpu.driver.memset_d8_async(self.base, 0, self.size, self._gpu.stream)

    def close(self) -> None:
        self._allocation.free()


class Mirror:
    """Small tensors that cross over in every tick: one pinned block on the host, one block on the GPU, equal in layout."""

    def __init__(self, gpu: Gpu, rows: Sequence[Tensor]) -> None:
        self._gpu, self.block = gpu, Block(gpu, rows)
        try:
            with gpu.typed_errors(f"pinning {self.block.size} bytes"):
                self._host = gpu.driver.pagelocked_empty(self.block.size, np.uint8)
        except BaseException:
            self.block.close()
            raise
        self._host[...] = 0
        self.arrays = {}
        for row in rows:
            start = self.block.offsets[row.name]
            self.arrays[row.name] = self._host[start : start + _bytes(row)].view(row.dtype).reshape(row.shape)

    def upload(self) -> None:
        self._gpu.driver.memcpy_htod_async(self.block.base, self._host, self._gpu.stream)

    def download(self) -> None:
        self._gpu.driver.memcpy_dtoh_async(self._host, self.block.base, self._gpu.stream)

    def close(self) -> None:
        """The pinned block goes with the last array that views it."""
        self.block.close()
        self.arrays.clear()
        del self._host


class DeviceMemory:
    """The rings and the vocoder's state on the GPU; all that a tick moves is enqueued on the stream, nothing is waited for."""

    def __init__(self, gpu: Gpu, config: ModelConfig, state: Block, update: Block) -> None:
        self._gpu, self._state, self._update = gpu, state, update
        self._slots = []  # (copy, bytes of a slot, window)
        for ring in rings(config):
            slot_bytes = ring.slot * 4
            copy = gpu.driver.Memcpy2D()
            copy.set_src_device(update.address(f"new_{ring.name}"))
            copy.src_pitch = copy.width_in_bytes = slot_bytes
            copy.set_dst_device(state.address(ring.name))
            copy.dst_pitch = ring.window * slot_bytes
            copy.height = ring.heads
            self._slots.append((copy, slot_bytes, ring.window))
        sizes = {row.name: _bytes(row) for row in tensor_table(config)}
        self._vocoder = [(state.address(name), update.address(f"new_{name}"), sizes[name]) for name in vocoder_states(config)]

    def clear(self) -> None:
        with self._gpu.typed_errors("clearing the memory"):
            self._state.clear()

    def absorb(self, tick: int) -> None:
        driver, stream = self._gpu.driver, self._gpu.stream
        with self._gpu.typed_errors("writing the rings"):
            for copy, slot_bytes, window in self._slots:
                copy.dst_x_in_bytes = tick % window * slot_bytes
                copy(stream)
            for state, new, size in self._vocoder:
                driver.memcpy_dtod_async(state, new, size, stream)

    def break_voice(self) -> None:
        with self._gpu.typed_errors("clearing the vocoder"):
            for state, _, size in self._vocoder:
                self._gpu.driver.memset_d8_async(state, 0, size, self._gpu.stream)

    def copy_updates(self, into: Buffers) -> None:
        with self._gpu.typed_errors("reading the updates"):
            self._gpu.stream.synchronize()
            for name, array in into.items():
                self._gpu.driver.memcpy_dtoh(array, self._update.address(name))

    def restore(self, state: Buffers) -> None:
        with self._gpu.typed_errors("restoring the memory"):
            self._gpu.stream.synchronize()  # these copies are not the stream's
            for name, array in state.items():
                self._gpu.driver.memcpy_htod(self._state.address(name), array)


class Graph:
    """What `work` enqueues, captured once and launched as one; where cuda.bindings is missing `launch` is `work` itself."""

    def __init__(self, gpu: Gpu, work: Callable[[], None]) -> None:
        self._executable: Any = None
        try:
            from cuda.bindings import driver as graphs
        except ImportError:
            self.launch = work
            return
        self._graphs, self._stream = graphs, graphs.CUstream(gpu.stream.handle)
        mode = graphs.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._checked(graphs.cuStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            graph = self._checked(graphs.cuStreamEndCapture(self._stream))
        self._executable = self._checked(graphs.cuGraphInstantiate(graph, 0))
        self._checked(graphs.cuGraphDestroy(graph))
        self.launch = self._launch

    @property
    def captured(self) -> bool:
        return self._executable is not None

    def _launch(self) -> None:
        self._checked(self._graphs.cuGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        if self._executable is not None:
            self._checked(self._graphs.cuGraphExecDestroy(self._executable))

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        """cuda.bindings answers (status, value …); raises EngineFailure."""
        if answer[0] != self._graphs.CUresult.CUDA_SUCCESS:
            raise EngineFailure(f"the GPU failed on a graph ({answer[0]!r}); start again, or uninstall cuda-bindings to run without graphs")
        return answer[1] if len(answer) > 1 else None


def _bytes(row: Tensor) -> int:
    return int(np.prod(row.shape)) * np.dtype(row.dtype).itemsize
