"""How OpenMP's threads wait for each other, decided before torch is imported, since it asks once.

After each product threads spin for a while in wait for the next. Beside a busy process the spinning takes the processor
from the thread that all others wait for; alone it saves waking them. So they wait passively where others compute.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"
CHOSEN = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever set one of these has decided
BUSY = 0.5  # processors that others keep busy
TIMES = Path("/proc/stat")


def busy_seconds(times: Path = TIMES) -> float | None:
    """Seconds that all processors have computed since the machine began; None where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, times.read_text().split("\n", 1)[0].split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """What other processes compute, from the moment that it is made."""

    def __init__(self) -> None:
        self.start = self.now()

    def now(self) -> tuple[float | None, float, float]:
        return busy_seconds(), time.process_time(), time.monotonic()

    def processors(self) -> float:
        """How many processors others have kept busy meanwhile, on average; 0 where it is not known."""
        (busy, own, begun), (busy_now, own_now, now) = self.start, self.now()
        if busy is None or busy_now is None or now <= begun:
            return 0.0
        return max(0.0, busy_now - busy - (own_now - own)) / (now - begun)


def set_wait_policy(busy: float, environment: MutableMapping[str, str] = os.environ) -> bool:
    """Has threads wait passively where others keep so many processors `busy`; whether it did. It leaves alone what is
    chosen already, one thread, one of several processes of a run (the others are no neighbours), and a torch that is
    there."""
    chosen = any(name in environment for name in CHOSEN) or "torch" in sys.modules
    alone = environment.get("OMP_NUM_THREADS", str(os.cpu_count())) == "1" or "LOCAL_RANK" in environment
    if busy < BUSY or chosen or alone:
        return False
    environment[POLICY] = "PASSIVE"
    return True
