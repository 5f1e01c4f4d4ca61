"""The plan of a training step that two processes share by FSDP2, beside what one of them allocates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from limbeck.tests.processes_helpers import launch

WORKER = """
import json, sys, torch
from pathlib import Path
from torch import distributed
from limbeck.benchmarks.train_memory import on_cpu, peaks_of, planned, model_of
from limbeck.distill.parallel import prepare, shard
from limbeck.models import processes
from limbeck.models.cost.training import train_memory
from limbeck.tests.helpers import wide

distributed.init_process_group("gloo")
config = wide(pattern="M-*M-M-*M-M-", hidden_size=128, intermediate_size=512, vocab_size=1500)
said = []
for dtype in (torch.float32, torch.bfloat16):
    for setting in ({"micro_batch": 2, "seq_len": 64, "batch": 4}, {"seq_len": 64, "batch": 4, "checkpointing": True}):
        training = on_cpu(**setting, dtype=dtype, teacher_dtype=dtype, processes=2)
        learner, oracle = model_of(config), model_of(config).to(dtype).requires_grad_(False)
        shard(learner, dtype)
        shard(oracle)
        found, plan = peaks_of(prepare(learner), oracle, training), planned(train_memory(config, config, training))
        said.append([plan.forward, found.forward, plan.rest, found.rest])
if distributed.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(said))
processes.leave()
"""


@pytest.mark.slow
def test_plan_of_two_processes(tmp_path: Path) -> None:
    """Within 10%, in float32 and with bfloat16 in use, in one micro-batch and in several with checkpointing."""
    (tmp_path / "worker.py").write_text(WORKER)
    done = launch([str(tmp_path / "worker.py"), str(tmp_path / "said")])
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads((tmp_path / "said").read_text())
    assert len(said) == 4
    for plan_forward, forward, plan_rest, rest in said:
        assert plan_forward == pytest.approx(forward, rel=0.1) and plan_rest == pytest.approx(rest, rel=0.1)
