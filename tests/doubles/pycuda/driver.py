"""A double of pycuda.driver: strict about what a GPU is strict about, and as lazy as a stream.

Device memory is host memory at addresses of its own; nothing enqueued happens before somebody waits for it; copies must lie within
allocations, asynchronous ones need pinned memory; nothing works without a context. Names with an underscore are for the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

_device_bytes_left = 1 << 30  # what mem_alloc and TensorRT may still take
_pinned_bytes_left = 1 << 30
_blocks: dict[int, np.ndarray] = {}  # device memory by address
_pinned: list[np.ndarray] = []
_streams: dict[int, Stream] = {}
_context: Context | None = None
_retained = 0
_allocations = 0  # how often anything was allocated


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


class event_flags:
    BLOCKING_SYNC = 1


def init() -> None:
    pass


class Device:
    def __init__(self, ordinal: int) -> None:
        if ordinal != 0:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")

    def name(self) -> str:
        return "double"

    def compute_capability(self) -> tuple[int, int]:
        return (8, 7)

    def retain_primary_context(self) -> Context:
        global _retained
        _retained += 1
        return Context()


class Context:
    def push(self) -> None:
        global _context
        _context = self

    @staticmethod
    def pop() -> None:
        global _context
        _need_context()
        _context = None

    def detach(self) -> None:
        global _retained
        _retained -= 1


def _need_context() -> None:
    if _context is None:
        raise LogicError("invalid device context")


class Stream:
    def __init__(self, flags: int = 0) -> None:
        _need_context()
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None
        self.handle = id(self)
        _streams[self.handle] = self

    def _put(self, work: Callable[[], None]) -> None:
        _need_context()
        (self._queue if self._captured is None else self._captured).append(work)

    def synchronize(self) -> None:
        _need_context()
        if self._captured is not None:
            raise LogicError("operation not permitted when stream is capturing")
        while self._queue:
            self._queue.pop(0)()


class Event:
    def __init__(self, flags: int = 0) -> None:
        _need_context()
        self._at_s: float | None = None

    def record(self, stream: Stream) -> Event:
        self._at_s, self._stream = None, stream
        stream._put(self._stamp)
        return self

    def _stamp(self) -> None:
        self._at_s = time.perf_counter()

    def synchronize(self) -> Event:
        self._stream.synchronize()
        return self

    def time_since(self, event: Event) -> float:
        if self._at_s is None or event._at_s is None:
            raise LogicError("device not ready")
        return (self._at_s - event._at_s) * 1000


class DeviceAllocation:
    def __init__(self, address: int) -> None:
        self._address = address

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        _need_context()
        del _blocks[self._address]


def _aligned(size: int) -> np.ndarray:
    raw = np.full(size + 256, 0xA5, np.uint8)  # fresh memory holds rubbish
    start = -raw.ctypes.data % 256
    return raw[start : start + size]


def mem_alloc(size: int) -> DeviceAllocation:
    global _device_bytes_left, _allocations
    _need_context()
    if size > _device_bytes_left:
        raise MemoryError("cuMemAlloc failed: out of memory")
    _device_bytes_left -= size
    _allocations += 1
    block = _aligned(size)
    _blocks[block.ctypes.data] = block
    return DeviceAllocation(block.ctypes.data)


def pagelocked_empty(shape: int, dtype: type) -> np.ndarray:
    global _allocations
    _need_context()
    if shape * np.dtype(dtype).itemsize > _pinned_bytes_left:
        raise MemoryError("cuMemHostAlloc failed: out of memory")
    _allocations += 1
    array = _aligned(shape * np.dtype(dtype).itemsize).view(dtype)
    _pinned.append(array)
    return array


def _device(address: int, size: int) -> np.ndarray:
    """The bytes at an address of the GPU."""
    for base, block in _blocks.items():
        if base <= address and address + size <= base + block.size:
            return block[address - base : address - base + size]
    raise LogicError(f"invalid device address {address:#x}")


def _host(array: np.ndarray) -> np.ndarray:
    if not any(np.shares_memory(array, pinned) for pinned in _pinned):
        raise LogicError("an asynchronous copy of memory that is not pinned")
    return array.reshape(-1).view(np.uint8)


def memcpy_htod_async(dest: int, src: np.ndarray, stream: Stream) -> None:
    to, source = _device(dest, src.nbytes), _host(src)
    stream._put(lambda: np.copyto(to, source))


def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Stream) -> None:
    to, source = _host(dest), _device(src, dest.nbytes)
    stream._put(lambda: np.copyto(to, source))


def memcpy_dtod_async(dest: int, src: int, size: int, stream: Stream) -> None:
    to, source = _device(dest, size), _device(src, size)
    stream._put(lambda: np.copyto(to, source))


def memcpy_htod(dest: int, src: np.ndarray) -> None:
    """At once: streams that do not wait for the default one may have work left."""
    _need_context()
    np.copyto(_device(dest, src.nbytes), np.ascontiguousarray(src).reshape(-1).view(np.uint8))


def memcpy_dtoh(dest: np.ndarray, src: int) -> None:
    _need_context()
    if not dest.flags.c_contiguous:
        raise LogicError("a copy to memory that is not contiguous")
    np.copyto(dest.reshape(-1).view(np.uint8), _device(src, dest.nbytes))


def memset_d8_async(dest: int, data: int, size: int, stream: Stream) -> None:
    to = _device(dest, size)
    stream._put(lambda: to.fill(data))


class Memcpy2D:
    def __init__(self) -> None:
        self.dst_x_in_bytes = 0

    def set_src_device(self, address: int) -> None:
        self._src = address

    def set_dst_device(self, address: int) -> None:
        self._dst = address

    def __call__(self, stream: Stream) -> None:
        if self.dst_x_in_bytes + self.width_in_bytes > self.dst_pitch or self.width_in_bytes > self.src_pitch:
            raise LogicError("cuMemcpy2DAsync failed: invalid argument")
        pairs = []
        for row in range(self.height):
            to = _device(self._dst + row * self.dst_pitch + self.dst_x_in_bytes, self.width_in_bytes)
            pairs.append((to, _device(self._src + row * self.src_pitch, self.width_in_bytes)))

        def work() -> None:
            for to, source in pairs:
                np.copyto(to, source)

        stream._put(work)
