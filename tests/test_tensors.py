"""Files of weights written piece by piece: the bytes of safetensors' own writer, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import tensor_table
from limbeck.models.checkpoint import finished_shards, open_checkpoint, plan_shards, write_checkpoint
from limbeck.models.errors import DiskError
from limbeck.models.tensors import Silence, TensorFile, ahead, is_finite, save_tensors, take
from limbeck.tests.helpers import random_model, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def drawn_tensors(seed: int) -> dict[str, Tensor]:
    draw = random.Random(seed)
    found = {}
    for number in range(draw.randint(1, 9)):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(0, 3))]
        found[draw.choice("abc") + f".{number}"] = torch.randint(0, 2, shape).to(draw.choice(DTYPES))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_bytes_are_those_of_safetensors(seed: int, tmp_path: Path) -> None:
    tensors = drawn_tensors(seed)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    save_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pieces_in_any_order_of_tensors(tmp_path: Path) -> None:
    tensors = {"wide": torch.randn(7, 3), "narrow": torch.randn(4, 5).to(torch.bfloat16), "long": torch.randn(9)}
    draw = random.Random(0)
    pieces = {name: list(tensor.split(2)) for name, tensor in tensors.items()}
    file = TensorFile(tmp_path / "file", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    while pieces:
        assert not file.complete and not (tmp_path / "file").exists()
        name = draw.choice(sorted(pieces))
        file.write(name, pieces[name].pop(0))
        pieces = {name: left for name, left in pieces.items() if left}
    assert file.complete
    file.finish()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, space: int) -> None:
        self.file, self.space = file, space

    def write(self, content: Any) -> int:
        self.space -= memoryview(content).nbytes
        if self.space < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_leaves_finished_shards_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights = random_model(config, dtype=torch.float32).state_dict()
    shards = plan_shards(config, torch.float32, 20_000)
    assert len(shards) > 3
    real = Path.open

    def opened(path: Path, *arguments: Any) -> Any:
        return FullDisk(real(path, *arguments), 10**9 if "00001" in path.name or "00002" in path.name else 5000)

    def write() -> None:
        tensors = ((name, weights[name]) for name in tensor_table(config))
        write_checkpoint(tmp_path, config, tensors, dtypes=torch.float32, max_shard_bytes=20_000)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(DiskError, match=r"model-00003.* cannot be written: No space left.*same command again"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard.file for shard in shards[:2]]
    stored = finished_shards(tmp_path, config, shards).stored
    assert [name for ours in stored.values() for name in ours.places] == [n for s in shards[:2] for n in s.forms]
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write()
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in weights)


def test_too_little_space_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights = random_model(config, dtype=torch.float32).state_dict()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match=r"the weights take 0\.2 MB, the disk has 0\.0 MB left"):
        write_checkpoint(tmp_path, config, weights.items(), dtypes=torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_is_finite(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-1, 1, 300, dtype=dtype).reshape(3, 100)
    assert is_finite(tensor) and is_finite(tensor[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 137, 299):
            broken = tensor.flatten().clone()
            broken[place] = bad
            assert not is_finite(broken.reshape(3, 100))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_take_is_index_select(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 5, 4).to(dtype)
    for candidate in (tensor, tensor.transpose(0, 2), tensor[::2, 1:]):
        for dimension in range(3):
            index = torch.randperm(candidate.shape[dimension])[:2]
            assert torch.equal(take(candidate, dimension, index), candidate.index_select(dimension, index))


def test_no_thread_is_left() -> None:
    """A thread within torch when the interpreter goes would abort the process."""
    before = set(threading.enumerate())

    def endless() -> Iterator[int]:
        for number in itertools.count():
            time.sleep(0.05)
            yield number

    for timeout in (None, 5.0):
        with contextlib.closing(ahead(endless(), 2, timeout)) as source:
            assert [next(source), next(source)] == [0, 1]
        assert set(threading.enumerate()) <= before

    woken = threading.Event()

    def hung() -> Iterator[int]:
        woken.wait(60)
        yield 0

    with pytest.raises(Silence), contextlib.closing(ahead(hung(), 2, 0.1)) as source:
        next(source)
    (silent,) = set(threading.enumerate()) - before  # a silent one is not waited for
    woken.set()
    silent.join()


def test_no_item_is_put_after_a_large_one() -> None:
    """Of items of ten places in a line of four one waits, beside the one that is being made; of small ones four."""
    for size, most in ((10, 2), (1, 5)):
        made: list[int] = []

        def numbered(made: list[int] = made) -> Iterator[int]:
            for number in range(20):
                made.append(number)
                yield number

        with contextlib.closing(ahead(numbered(), 4, size=lambda item, size=size: size)) as source:
            assert next(source) == 0
            deadline = time.monotonic() + 5
            while len(made) < 1 + most and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert len(made) == 1 + most
            assert [*source] == list(range(1, 20))
