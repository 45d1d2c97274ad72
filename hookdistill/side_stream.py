"""Work that a device does beside what it is told meanwhile on the current stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def has_streams(device: torch.device) -> bool:
    """Whether work on the device is queued on streams."""
    return device.type == "cuda"


class SideStream:
    """A second stream of a CUDA device, for work that begins after what is queued now and that is waited for later.

        side = SideStream(device)
        with side.fork():
            theirs = teacher(batch)  # queued on the side stream
        ours = student(batch)        # runs meanwhile
        side.join()                  # from here on ``theirs`` may be read

    Tensors made on the side stream need no ``record_stream``: their memory can be given out again only to work of that stream,
    which begins with the next `fork`, and so after all that has been queued on the current stream until then, whatever has read
    them included. Tensors of the current stream that are read on the side are safe from `join` on in the same way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: Any = torch.get_device_module(device)
        self._stream = self._streams.Stream(device=device)

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Queue on the side stream what is queued inside; after an exception it is waited for at once."""
        self._stream.wait_stream(self._streams.current_stream(self.device))
        try:
            with self._streams.stream(self._stream):
                yield
        except BaseException:
            self.join()
            raise

    def join(self) -> None:
        """Let the current stream wait for the side stream; the host does not wait."""
        self._streams.current_stream(self.device).wait_stream(self._stream)
