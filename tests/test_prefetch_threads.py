"""The thread that makes batches ahead starts no OpenMP threads of its own: with more of them than processors all of a
process's would sleep between operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
import torch
from limbeck.distill.text.prefetch import feed

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    return torch.randn(2**20).mul_(2.0)

def batches():
    while True:
        yield compute(), torch.get_num_threads()

compute()
before = threads()
source = feed(batches(), 0, 60.0)
inside = [next(source)[1] for _ in range(4)]
during, own = threads(), torch.get_num_threads()
source.close()
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(1) as pool:
    later = pool.submit(torch.get_num_threads).result()
print(during - before, inside, own, later)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_batches_are_made_without_threads_of_their_own() -> None:
    run = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[0] == "1 [1, 1, 1, 1] 2 2"
