"""Safetensors files, written piece by piece: memory holds a piece and not a file.

The bytes are those of `safetensors.torch.save_file`: an 8-byte length, a JSON header padded to 8 bytes, and the
tensors, wider dtypes first, then by name (format: github.com/huggingface/safetensors).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import io
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from .errors import DiskError
from .folder import stream_sum

# By descending width, and within one as the format's own writer has it.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Item = TypeVar("Item")
Form = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


class TensorFile:
    """A safetensors file of known contents that is filled in any order, rows after rows of each tensor.

    It has its name only once every byte is there and synced; before that it is `NAME.partial`. Raises DiskError
    where the disk does not take it.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        order = sorted(forms, key=lambda name: (list(NAMES).index(forms[name][0]), name))
        self.begin, self.size, begin = {}, {}, 0
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name in order:
            dtype, shape = forms[name]
            end = begin + math.prod(shape) * dtype.itemsize
            content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self.begin[name], self.size[name], begin = begin, end - begin, end
        self.left = dict(self.size)
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        self.offset = 8 + len(header)
        with saying_where(path):
            self.file = self.partial.open("wb")
            self.file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, rows: Tensor, row: int | None = None) -> None:
        """Rows of a tensor, from number `row` on, or the next ones; each is given once."""
        size = rows.numel() * rows.element_size()
        begin = self.size[name] - self.left[name] if row is None else row * (size // max(len(rows), 1))
        self.left[name] -= size
        assert self.left[name] >= 0, name
        with saying_where(self.path):
            self.file.seek(self.offset + self.begin[name] + begin)
            self.file.write(as_bytes(rows))

    @property
    def complete(self) -> bool:
        return not any(self.left.values())

    def finish(self) -> None:
        """Syncs the file and gives it its name."""
        assert self.complete, [name for name, left in self.left.items() if left]
        with saying_where(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.partial, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def discard(self) -> None:
        """Removes what is not finished."""
        with contextlib.suppress(OSError):  # what was buffered finds no place either
            self.file.close()
        self.partial.unlink(missing_ok=True)


class Finishing:
    """Finishes files while the next one is filled, one at a time: more would leave all of them to the disk's cache.
    With `sums`, reads each back meanwhile for its checksum, which goes there by its name. Errors come out of `add` or
    of the end, which waits for the last."""

    def __init__(self, sums: dict[str, str] | None = None) -> None:
        self.sums, self.pool = sums, concurrent.futures.ThreadPoolExecutor(2)
        self.begun: list[concurrent.futures.Future[None]] = []

    def add(self, file: TensorFile) -> None:
        self.wait()
        if self.sums is not None:
            with saying_where(file.path):
                file.file.flush()
            self.begun.append(self.pool.submit(self.sum, file.path.name, file.partial.open("rb", buffering=0)))
        self.begun.append(self.pool.submit(file.finish))

    def sum(self, name: str, stream: io.RawIOBase) -> None:
        with stream:
            found = stream_sum(stream)
        assert self.sums is not None
        self.sums[name] = found

    def wait(self) -> None:
        begun, self.begun = self.begun, []
        for future in begun:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.pool.shutdown()


class Silence(Exception):
    """A thread that is to make something gives no sign."""


PATIENCE = 10.0  # seconds for the item that a thread is at when nobody wants more


class Places(queue.Queue[Any]):
    """A queue whose entries take `size(entry)` of its places, one at least; where a place is free any is let in."""

    def __init__(self, places: int, size: Callable[[Any], int]) -> None:
        self.size, self.taken = size, 0
        super().__init__(places)

    def _qsize(self) -> int:
        return self.taken

    def _put(self, item: Any) -> None:
        self.taken += max(self.size(item), 1)
        super()._put(item)

    def _get(self) -> Any:
        item = super()._get()
        self.taken -= max(self.size(item), 1)
        return item


def ahead(
    items: Iterable[Item], most: int = 1, timeout: float | None = None, size: Callable[[Item], int] = lambda item: 1
) -> Generator[Item, None, None]:
    """The same items; a thread of its own makes the next ones, `most` in advance. An item counts as `size` of them, so
    that none is put after a large one before that is taken. The thread's errors come out here; with a `timeout` in
    seconds Silence does where it brings nothing. It is waited for at the end, unless it is silent: one that is left
    within torch when the interpreter goes takes the process down with it."""
    line = Places(most, lambda entry: size(entry[0]) if isinstance(entry, tuple) else 1)
    left = threading.Event()

    def put(entry: tuple[Item] | BaseException | None) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                return line.put(entry, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    patience = None if timeout is None else min(timeout, PATIENCE)
    try:
        while True:
            try:
                entry = line.get(timeout=None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            except queue.Empty:
                patience = 0.0
                raise Silence from None
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        left.set()
        thread.join(patience)


@contextlib.contextmanager
def saying_where(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into DiskError: which file, why, and what helps."""
    try:
        yield
    except OSError as error:
        raise DiskError(refusal(error, path)) from None


def refusal(error: OSError, path: Path | None = None) -> str:
    """A line on what the system refused, where, and what helps."""
    place, forbidden = path or error.filename or "the output", error.errno in (errno.EACCES, errno.EPERM)
    done = "read or written" if forbidden and path is None else "written"
    helps = "change its permissions" if forbidden else "free some space"
    return f"{place} cannot be {done}: {error.strerror or error}; {helps}, and run the same command again"


def as_bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of tensors, whole or not at all. Raises DiskError where the disk does not take it."""
    with TensorFile(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether all are finite numbers; one pass without a copy, which `torch.isfinite` is not."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def take(tensor: Tensor, dimension: int, index: Sequence[int] | Tensor) -> Tensor:
    """`index_select`; on the CPU, where that is slow for 16-bit numbers, by numpy."""
    index = torch.as_tensor(index)
    if tensor.device.type != "cpu" or tensor.element_size() != 2 or dimension == 0 or tensor.requires_grad:
        return tensor.index_select(dimension, index.to(tensor.device))
    taken = tensor.view(torch.int16).numpy().take(index.numpy(), axis=dimension, mode="clip")
    return torch.from_numpy(taken).view(tensor.dtype)
