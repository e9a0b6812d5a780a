"""A double of cuda.bindings.driver: a captured stream keeps its work, and a launch enqueues it again."""

from __future__ import annotations

import enum
from collections.abc import Callable

from pycuda import driver as _pycuda


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUstream:
    def __init__(self, init_value: int) -> None:
        self._stream = _pycuda._streams[init_value]


_Work = list[Callable[[], None]]


def cuStreamBeginCapture(hStream: CUstream, mode: CUstreamCaptureMode) -> tuple[CUresult]:
    hStream._stream._captured = []
    return (CUresult.CUDA_SUCCESS,)


def cuStreamEndCapture(hStream: CUstream) -> tuple[CUresult, _Work | None]:
    work, hStream._stream._captured = hStream._stream._captured, None
    return (CUresult.CUDA_SUCCESS, work)


def cuGraphInstantiate(hGraph: _Work, flags: int) -> tuple[CUresult, _Work]:
    return (CUresult.CUDA_SUCCESS, list(hGraph))


def cuGraphDestroy(hGraph: _Work) -> tuple[CUresult]:
    hGraph.clear()
    return (CUresult.CUDA_SUCCESS,)


def cuGraphLaunch(hGraphExec: _Work, hStream: CUstream) -> tuple[CUresult]:
    if not hGraphExec:
        return (CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,)
    for work in hGraphExec:
        hStream._stream._put(work)
    return (CUresult.CUDA_SUCCESS,)


def cuGraphExecDestroy(hGraphExec: _Work) -> tuple[CUresult]:
    hGraphExec.clear()
    return (CUresult.CUDA_SUCCESS,)
