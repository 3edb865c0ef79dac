"""Block inputs that wait in host memory between forward and backward, copied while the device computes.

On CUDA all copies run on one side stream, into pinned memory and back; the inputs of the block before are already on
their way while a block runs again. On the CPU the same path moves through plain copies.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class HostStore:
    """Where the inputs of checkpointed blocks wait. One per model; all calls come in the order of the blocks.

    Attributes:
        bytes: what waits in host memory now.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._last: weakref.ref[_Waiting] | None = None
        self._stream: torch.cuda.Stream | None = None

    def put(self, tensor: Tensor) -> Parked:
        """Begin the copy to the host; a tensor that several blocks read is copied once."""
        waiting = self._known.get(tensor)
        if waiting is None or waiting.spent:
            waiting = _Waiting(self, tensor, self._last)
            self._known[tensor] = waiting
            self._last = weakref.ref(waiting)
        waiting.readers += 1
        return Parked(tensor, waiting)

    def stream_of(self, device: torch.device) -> torch.cuda.Stream | None:
        """The side stream that all copies share, or None on the CPU."""
        if device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class Parked:
    """One block's claim to one of its inputs: `take` gives the tensor itself in forward, and its copy after that."""

    def __init__(self, tensor: Tensor, waiting: _Waiting) -> None:
        self._tensor: Tensor | None = tensor
        self._waiting: _Waiting | None = waiting

    def take(self) -> Tensor:
        """The tensor on the device; the first call is the forward's, the second the backward's.

        Raises:
            RuntimeError: the block is run a third time (a second backward through the same graph).
        """
        if self._tensor is not None:
            tensor, self._tensor = self._tensor, None
            return tensor
        if self._waiting is None:
            raise RuntimeError("an offloaded block input is read a second time: backward runs once through a graph")
        waiting, self._waiting = self._waiting, None
        return waiting.read()


class _Waiting:
    """A copy in host memory, and again on the device from shortly before its first reader's backward to its last."""

    def __init__(self, store: HostStore, tensor: Tensor, before: weakref.ref[_Waiting] | None) -> None:
        self.readers = 0
        self._before = before
        self._device = tensor.device
        self._requires_grad = tensor.requires_grad
        self._stream = store.stream_of(tensor.device)
        self._fetched: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        source = tensor.detach()
        with self._on_side_stream():
            self._host: Tensor | None = torch.empty(
                source.shape, dtype=source.dtype, device="cpu", pin_memory=self._stream is not None
            )
            self._host.copy_(source, non_blocking=True)
        if self._stream is not None:
            # The allocator gives this memory to nobody else before the side stream has read it.
            source.record_stream(self._stream)
        size = self._host.nbytes
        store.bytes += size
        self._forget = weakref.finalize(self, _subtract, weakref.ref(store), size)

    @property
    def spent(self) -> bool:
        """Whether every reader has read."""
        return self._host is None

    def fetch(self) -> None:
        """Begin the copy to the device, if it has not begun."""
        if self._fetched is not None or self._host is None:
            return
        # Made on the current stream, so the allocator may reuse it in that stream's order once it is dropped.
        self._fetched = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        with self._on_side_stream():
            self._fetched.copy_(self._host, non_blocking=True)
            if self._stream is not None:
                self._ready = self._stream.record_event()

    def read(self) -> Tensor:
        """The copy on the device, for one reader; begins the copy of what was put before this."""
        self.fetch()
        assert self._fetched is not None, "more readers than were counted"
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
        tensor = self._fetched.detach().requires_grad_(self._requires_grad)
        self.readers -= 1
        if self.readers == 0:
            self._fetched = self._host = None
            self._forget()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        return tensor

    def _on_side_stream(self) -> AbstractContextManager[None]:
        """Copies wait for what the current stream has been given so far; the current stream goes on."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)  # type: ignore[no-any-return,no-untyped-call]


def _subtract(store: weakref.ref[HostStore], size: int) -> None:
    holder = store()
    if holder is not None:
        holder.bytes -= size
