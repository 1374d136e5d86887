"""Times what is launched on a GPU: calls captured into a CUDA graph, replayed between two events.

Through the driver's own interface (libcuda), which is there wherever a GPU can be used. A graph, because Python takes
longer to launch a kernel than a short one takes to run.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

Launch = Callable[[int], None]
"""Launches work on the stream of this number."""


class Clock:
    """The driver's clock, on a stream of its own of the current device.

    Raises:
        OSError: there is no driver.
        RuntimeError: the driver refused something; its number is in the message.
    """

    L2_CACHE_SIZE = 38
    """CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", ctypes.c_uint(0))
        self.graphs: list[tuple[Any, Any]] = []
        self._stream = ctypes.c_void_p()
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} of the CUDA driver failed with CUresult {status}")

    def device_count(self) -> int:
        n = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(n))
        return n.value

    def l2_bytes(self) -> int:
        """Bytes of the second-level cache of device 0."""
        device, n = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDeviceGetAttribute", ctypes.byref(n), self.L2_CACHE_SIZE, device)
        return n.value

    def stream(self) -> int:
        """The stream; made at the first call, when a device is current."""
        if self._stream.value is None:
            self.call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(1))  # CU_STREAM_NON_BLOCKING
            for event in self._events:
                self.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        assert self._stream.value is not None
        return self._stream.value

    def record(self, launch: Launch) -> Callable[[], float]:
        """A function that runs what launch launched, and returns the seconds it took."""
        stream = ctypes.c_void_p(self.stream())
        graph, program = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamBeginCapture_v2", stream, ctypes.c_int(1))  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            launch(self.stream())
        finally:
            self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(program), graph, ctypes.c_ulonglong(0))
        self.graphs.append((graph, program))

        def seconds() -> float:
            first, last = self._events
            took = ctypes.c_float()
            self.call("cuEventRecord", first, stream)
            self.call("cuGraphLaunch", program, stream)
            self.call("cuEventRecord", last, stream)
            self.call("cuEventSynchronize", last)
            self.call("cuEventElapsedTime", ctypes.byref(took), first, last)
            return took.value / 1e3

        return seconds

    def forget(self) -> None:
        """Destroys the graphs recorded so far."""
        for graph, program in self.graphs:
            self.call("cuGraphExecDestroy", program)
            self.call("cuGraphDestroy", graph)
        self.graphs.clear()


class EmulatedClock(Clock):
    """The same for the emulated library, where a launch returns when all is done. Its times mean nothing."""

    def __init__(self) -> None:
        self.graphs = []

    def l2_bytes(self) -> int:
        return 1 << 15

    def stream(self) -> int:
        return 1

    def record(self, launch: Launch) -> Callable[[], float]:
        def seconds() -> float:
            start = time.perf_counter()
            launch(1)
            return time.perf_counter() - start

        return seconds
