"""Scores of a model that is read layer by layer, and on several processes: the same scores, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models import offload as source_of_layers
from limbeck.models.checkpoint import load_model, open_checkpoint, save_model
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.offload import StreamedLayers, free_memory, open_layers
from limbeck.prune.choose import select
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.scores import WidthScores, load_scores
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import ActivationScores, MagnitudeScores, TaylorScores
from limbeck.scripts.run.resolve import ZOO
from limbeck.tests.helpers import (
    assert_close,
    dense_config,
    lasting,
    limbeck,
    make_workshop,
    random_model,
    tiny_config,
)
from limbeck.tests.processes_helpers import launch
from limbeck.tests.pruning_helpers import draw_rows, split

CPU = torch.device("cpu")
CUT = Target(layers=9, hidden_size=192, intermediate_size=512, num_attention_heads=4, mamba_num_heads=8)


def same_widths(expected: WidthScores, found: WidthScores, ratio: float) -> None:
    assert expected.keys() == found.keys()
    for axis, value in expected.items():
        if ratio:
            assert_close(str(axis), value, found[axis], ratio)
        else:
            assert torch.equal(value, found[axis]), axis


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A hybrid, one with tied embeddings and q/k norm in blocks of two, and the shipped one."""
    root = tmp_path_factory.mktemp("models")
    tied = dense_config(1, "qwen3").replace(tie_word_embeddings=True, pattern="*-" * 4)
    for name, config in (("hybrid", tiny_config(pattern="M-M*-M*")), ("tied", tied)):
        save_model(random_model(config, dtype=torch.float32), root / name)
    return {"hybrid": root / "hybrid", "tied": root / "tied", "zoo": ZOO}


@pytest.mark.parametrize("name", ("hybrid", "tied", pytest.param("zoo", marks=pytest.mark.slow)))
def test_streamed_is_resident_bit_by_bit(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths and depth, whatever the bound and so the grouping of batches."""
    monkeypatch.setattr(source_of_layers, "HEAD_ROWS", 1000 if name == "zoo" else 40)
    streamed = open_layers(folders[name], torch.float32, CPU, offload="disk")
    assert isinstance(streamed, StreamedLayers)
    model, config = load_model(folders[name]), streamed.config
    small = name != "zoo"
    batches = split(draw_rows(config.vocab_size, 6 if small else 4, 24), range(6 if small else 4), 2)
    one = 2 * 24 * config.hidden_size * 4
    for metric in (ActivationScores(times_output=True), TaylorScores()):
        expected = score_widths(model, batches, metric)
        for bound in (1, 2 * one, 100 * one):
            same_widths(expected, score_widths(streamed, batches, metric, stream_bytes=bound), 0)
    remove = 4 if name == "tied" else 2
    for metric in ("mse", "kl", "perplexity", "block_influence") if small else ("mse", "kl"):
        options: dict[str, Any] = {"remove": remove, "metric": metric}
        whole = score_layers(model, batches, **options, table="all")
        assert len(whole.order) == remove
        for bound in (4 * one, 1000 * one) if small else (20 * one,):
            found = score_layers(streamed, batches, **options, stream_bytes=bound)
            assert (found.order, found.values, found.candidates[0]) == (whole.order, whole.values, whole.candidates[0])
    magnitude = MagnitudeScores().scores(config, open_checkpoint(folders[name]).tensor)
    same_widths(MagnitudeScores().scores(config, model.state_dict().__getitem__), magnitude, 0)


def test_a_walk_reads_each_layer_once_and_holds_two(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = open_layers(folders["hybrid"], torch.float32, CPU, offload="disk")
    assert isinstance(streamed, StreamedLayers)
    read: list[int] = []
    alive: list[Any] = []
    most = 0
    one_layer = streamed.read

    def counted(number: int) -> Any:
        nonlocal most
        assert threading.current_thread() is not threading.main_thread()
        read.append(number)
        alive.append(one_layer(number))
        most = max(most, sum(len(layer.model.layers) for layer in alive))
        return alive[-1]

    monkeypatch.setattr(streamed, "read", counted)
    batches = split(draw_rows(97, 4), range(4), 1)
    score_widths(streamed, batches)
    assert read == list(range(7)) and most == 2
    read.clear()
    steps: list[tuple[int, int]] = []
    found = score_layers(streamed, batches, remove=2, table="all", on_step=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] == (7 + 6) * 4 and len(steps) > 10
    left = [layer for layer in range(7) if layer != found.order[0]]
    assert read == [*range(7), *left]  # a pass a step, whatever the number of candidates
    assert sum(len(layer.model.layers) for layer in alive) == 0


def test_layers_are_dropped_when_a_walk_is_given_up(folders: dict[str, Path]) -> None:
    streamed = open_layers(folders["hybrid"], torch.float32, CPU, offload="disk")
    for layer in streamed.in_turn(range(7)):
        assert layer.number == 0 and layer.model.config.pattern == "M"
        break
    assert [layer.number for layer in streamed.in_turn((2, 5))] == [2, 5]
    assert list(streamed.in_turn(())) == []


def test_auto_takes_what_fits(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = count_parameters(open_checkpoint(folders["hybrid"]).config) * 4 + 1000
    options: dict[str, Any] = {"offload": "auto", "stream_bytes": 1000}
    for free, streamed in ((needed, False), (needed - 1, True), (None, False)):
        monkeypatch.setattr(source_of_layers, "free_memory", lambda _, free=free: free)
        assert open_layers(folders["hybrid"], torch.float32, CPU, **options).streamed is streamed
    monkeypatch.undo()
    free = free_memory(CPU)
    assert free is None or free > 2**20
    with pytest.raises(InputError, match="offload is 'ram'; known: auto, none, disk"):
        open_layers(folders["hybrid"], torch.float32, CPU, offload="ram")


def test_a_bound_that_holds_no_stream(folders: dict[str, Path]) -> None:
    model = load_model(folders["hybrid"])
    batches = [draw_rows(97, 2)]
    one = 2 * 21 * 32 * 4
    with pytest.raises(InputError, match=r"a batch of 42 tokens needs .* raise it") as caught:
        score_layers(model, batches, remove=1, stream_bytes=2 * one - 1)
    assert "\n" not in str(caught.value)
    tight = score_layers(model, batches, remove=1, stream_bytes=2 * one)
    wide = score_layers(model, batches, remove=1)
    assert tight.values == wide.values and tight.layer_evaluations > wide.layer_evaluations
    with pytest.raises(InputError, match=r"the bound is .* GiB"):
        score_layers(model, batches, remove=1, metric="block_influence", stream_bytes=one)


# --- samples and processes ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches_and_order_of_samples_on_the_shipped_model() -> None:
    """To 1e-5, and the very same units and layers."""
    model, batch = load_model(ZOO), draw_rows(4096, 8, 32)
    order = torch.randperm(8).tolist()
    widths = score_widths(model, split(batch, range(8), 8))
    depth = score_layers(model, split(batch, range(8), 8), remove=3)
    kept = select(model.config, widths, depth.order, CUT)
    for rows, size in ((range(8), 1), (order, 3)):
        found = score_widths(model, split(batch, rows, size))
        same_widths(widths, found, 1e-5)
        removed = score_layers(model, split(batch, rows, size), remove=3)
        assert removed.order == depth.order
        assert removed.values == pytest.approx(depth.values, rel=1e-5)
        assert removed.candidates[0] == pytest.approx(depth.candidates[0], rel=1e-5)
        assert select(model.config, found, removed.order, CUT) == kept


WORKER = """
import sys
from pathlib import Path
import torch
from torch import distributed
from limbeck.models import processes
from limbeck.models.checkpoint import load_model, open_checkpoint
from limbeck.models.offload import open_layers
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.prune.scores import LayerScores, Scores, save_scores
from limbeck.prune.width_metrics import TaylorScores
from limbeck.tests.pruning_helpers import draw_rows, split

folder, out = sys.argv[1:]
distributed.init_process_group("gloo")
rank = processes.rank()
assert processes.count() == 2
torch.manual_seed(0)
batch = draw_rows(97, 5, 24)
mine = split(batch, list(range(5))[rank::2], 1)
for name in ("none", "disk"):
    layers = open_layers(folder, torch.float32, torch.device("cpu"), offload=name)
    widths = score_widths(layers, mine)
    for metric in ("mse", "kl", "perplexity", "block_influence"):
        depth = score_layers(layers, mine, remove=3, metric=metric, min_layers={"mamba": 1, "attention": 1, "mlp": 1})
        if rank == 0:
            save_scores(f"{out}/{name}-{metric}", Scores(widths, depth))
    taylor = score_widths(layers, mine, TaylorScores())
    if rank == 0:
        save_scores(f"{out}/{name}-taylor", Scores(taylor, LayerScores()))
try:  # what goes wrong in one ends both, and one says why
    with processes.together():
        if rank == 1:
            open_checkpoint(out)
except ValueError as error:
    Path(f"{out}/rank{rank}").write_text(str(error))  # a file each: the lines of two processes may mix on one output
lonely = score_widths(layers, mine if rank == 0 else [])  # more processes than samples
if rank == 0:
    assert all(value.isfinite().all() for value in lonely.values())
processes.leave()
"""


def test_two_processes_score_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    done = launch([str(tmp_path / "worker.py"), str(folders["hybrid"]), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-2000:]
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert said[0].startswith(str(tmp_path)) and said[1] == "", said
    model = load_model(folders["hybrid"])
    torch.manual_seed(0)
    batches = split(draw_rows(97, 5, 24), range(5), 1)
    widths = score_widths(model, batches)
    taylor = [load_scores(tmp_path / f"{name}-taylor").widths for name in ("none", "disk")]
    same_widths(*taylor, 0)
    same_widths(score_widths(model, batches, TaylorScores()), taylor[0], 1e-5)
    target = Target(hidden_size=20, intermediate_size=30, num_attention_heads=2, mamba_num_heads=4, layers=4)
    for metric in ("mse", "kl", "perplexity", "block_influence"):
        least = {"mamba": 1, "attention": 1, "mlp": 1}
        depth = score_layers(model, batches, remove=3, metric=metric, min_layers=least)
        resident = load_scores(tmp_path / f"none-{metric}")
        streamed = load_scores(tmp_path / f"disk-{metric}")
        same_widths(resident.widths, streamed.widths, 0)
        same_widths(widths, resident.widths, 1e-5)
        assert resident.layers.order == streamed.layers.order == depth.order
        assert resident.layers.values == streamed.layers.values == pytest.approx(depth.values, rel=1e-5)
        assert resident.layers.candidates[0] == pytest.approx(depth.candidates[0], rel=1e-5)
        assert select(model.config, resident.widths, resident.layers.order, target) == select(
            model.config, widths, depth.order, target
        )


def score_words(work: Path, output: str, **options: Any) -> list[str]:
    options = {"importance.remove_layers": 2, "importance.tokens": 640, "importance.depth_tokens": 640} | options
    return [
        "score", f"model={work / 'model'}", f"data={work / 'text'}", f"output={work / output}", "seq_len=64", "batch=4",
        "device=cpu", *(f"{key}={value}" for key, value in options.items()),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path: Path) -> None:
    """The folder is made once, by the first, which alone speaks; streamed and on one process it says the same."""
    work = make_workshop(tmp_path)
    words = ["-m", "limbeck.scripts.run.main"]
    done = launch([*words, *score_words(work, "two")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("result: ") == 1 and "warn" not in done.stderr.lower().replace("warnings.warn", "")
    assert limbeck(*score_words(work, "one"))[0] == 0
    assert limbeck(*score_words(work, "disk", offload="disk"))[0] == 0
    one, two, disk = (load_scores(work / name) for name in ("one", "two", "disk"))
    same_widths(one.widths, disk.widths, 0)
    same_widths(one.widths, two.widths, 1e-5)
    assert (one.layers.order, one.layers.values) == (disk.layers.order, disk.layers.values)
    assert one.layers.order == two.layers.order and one.layers.values == pytest.approx(two.layers.values, rel=1e-5)
    first, second = (json.loads(lasting(work / name / "limbeck.json")) for name in ("one", "two"))
    sums = {"files", "sum"}  # of scores that two processes add up in another order
    assert {k: v for k, v in first.items() if k not in sums} == {k: v for k, v in second.items() if k not in sums}
    assert first["files"].keys() == second["files"].keys()
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")]
    # The same again is there already; with other options it is in the way, and one line says so.
    assert launch([*words, *score_words(work, "two")]).returncode == 0
    done = launch([*words, *score_words(work, "two", seed=3)])
    lines = [line for line in done.stderr.splitlines() if line.startswith("limbeck: ")]
    assert done.returncode != 0 and len(lines) == 1 and "seed was 0, now 3" in lines[0]


# --- memory ---------------------------------------------------------------------------------------------------------

PEAKS = """
import re, sys
import torch
from limbeck.models.offload import open_layers
from limbeck.prune.depth import score_layers
from limbeck.prune.importance import score_widths
from limbeck.tests.pruning_helpers import draw_rows, split

def megabytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

batches = split(draw_rows(2048, 2, 32), range(2), 1)
score_layers(open_layers(sys.argv[2], torch.float32, torch.device("cpu")), batches, remove=1)  # what torch itself takes
for offload in ("disk", "none"):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = megabytes("VmRSS")
    layers = open_layers(sys.argv[1], torch.float32, torch.device("cpu"), offload=offload)
    score_widths(layers, batches)
    score_layers(layers, batches, remove=1)
    print(offload, megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
def test_memory_is_two_layers_streams_and_a_piece_of_the_head(tmp_path: Path) -> None:
    """300 MB of float32 weights in 36 layers of 8.4 MB, stored in bfloat16."""
    config = tiny_config(pattern="-" * 36, hidden_size=512, intermediate_size=2048, vocab_size=2048)
    for folder, pattern in (("large", "-" * 36), ("small", "--")):
        model = random_model(config.replace(pattern=pattern), dtype=torch.float32)
        save_model(model, tmp_path / folder, dtype=torch.bfloat16)
    weights, layer = count_parameters(config) * 4 / 2**20, 2 * 512 * 2048 * 4 / 2**20
    streams = 37 * 2 * 32 * 512 * 4 / 2**20
    head, gram = 2048 * 512 * (4 + 8) / 2**20, 512 * 512 * 8 / 2**20
    (tmp_path / "peaks.py").write_text(PEAKS)
    words = [sys.executable, str(tmp_path / "peaks.py"), str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    assert weights > 280 and peaks["none"] > 0.9 * weights
    assert peaks["disk"] < 2 * layer * 1.5 + streams + head + gram + 16, peaks  # 1.5: the bfloat16 beside the float32
