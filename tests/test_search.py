"""The search over sizes: exact grids against brute force, ranks, losses, and the published three first."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.axes import HIDDEN, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost import parameters, trace
from limbeck.models.cost.hardware import GIB, Hardware
from limbeck.models.cost.inference import memory
from limbeck.models.errors import CheckFailed, InputError
from limbeck.models.hybrid import HybridLM
from limbeck.prune.candidates import pareto
from limbeck.prune.choose import select
from limbeck.prune.patterns import Rules
from limbeck.prune.ranges import Range, values_of
from limbeck.prune.repair import Repair, repair_model
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import (
    Budget,
    Candidate,
    Requests,
    Space,
    find_candidates,
    find_depths,
    ranked,
    with_importance,
)
from limbeck.prune.slice import slice_config
from limbeck.prune.sliced_loss import sliced_loss
from limbeck.prune.target import Target
from limbeck.prune.width_metrics import RandomScores
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import dense_config, limbeck, random_config, random_model, tiny_config
from limbeck.tests.search_helpers import NOWHERE, TINY_SPACE, batches_of, candidates_of

A10G = Hardware("a10g", 22.49, 22.06, 600, 70)


LARGE, SMALL = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")


PUBLISHED = Space(
    patterns=(SMALL.pattern,),
    hidden_size=(4480, 4800, 5120),
    intermediate_ratio=(3, 3.5, 4),
    mamba_num_heads=(112, 120, 128),
)


THREE = [(4800, 14400, 120), (4480, 17920, 112), (4480, 15680, 128)]


def sizes(candidate: Candidate) -> tuple[int, int, int]:
    config = candidate.config
    return config.hidden_size, config.intermediate_size, config.mamba_num_heads


def found_by_memory(overhead: float) -> list[Candidate]:
    depths = find_depths(LARGE, PUBLISHED, Rules({"attention": 4}), None)
    budget = Budget(A10G.budget(0.05, 1.3, overhead), 131072)
    found = find_candidates(LARGE, PUBLISHED, depths, budget, A10G)
    assert (found.combinations, found.aligned) == (27, 27)
    return list(ranked(found.candidates, "memory"))


def brute_force(config: HybridConfig, space: Space, order: tuple[int, ...], budget: Budget) -> dict[str, HybridConfig]:
    """Every size that select and slice would make of the space's values, checked one by one; small spaces only."""
    found = {}
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "mamba_num_heads", "mamba_head_dim")
    scores = RandomScores(0).scores(config)
    choices = [space.layers or (None,), *(space.widths.get(name) or (None,) for name in widths)]
    for values in itertools.product(*choices):
        numbers = [None if value is None else int(value) for value in values]
        target = Target(**dict(zip(("layers", *widths), numbers, strict=True)))
        try:
            smaller = slice_config(config, select(config, scores, order, target))
        except InputError:
            continue
        used = {"hidden_size": smaller.hidden_size, "intermediate_size": smaller.intermediate_size}
        used = {name: size for name, size in used.items() if name == "hidden_size" or "-" in smaller.pattern}
        if "M" in smaller.pattern:
            used["d_inner"] = smaller.d_inner
        if any(size % space.align and size != getattr(config, name) for name, size in used.items()):
            continue
        if memory(smaller, budget.context, budget.batch, chunk=None).total <= budget.bytes:
            found[repr(smaller)] = smaller
    return found


@pytest.mark.parametrize("overhead", (0.5, 0.6, 0.7, 0.8))
def test_the_published_three_come_first(overhead: float) -> None:
    """arXiv 2508.14444: candidates 3, 1 and 2 of its table, in the order of their bytes."""
    found = found_by_memory(overhead)
    assert [sizes(candidate) for candidate in found[:3]] == THREE
    assert [round(candidate.memory.total / GIB, 2) for candidate in found[:4]] == [18.83, 18.74, 18.69, 18.35]
    assert found[2].config == SMALL and found[2].parameters == 8_888_227_328


@pytest.mark.parametrize("overhead", (0.45, 0.85))
def test_another_overhead_gives_others(overhead: float) -> None:
    assert [sizes(candidate) for candidate in found_by_memory(overhead)[:3]] != THREE


def test_recipe_of_the_published_grid(tmp_path: Path) -> None:
    """The recipe as a user runs it; the first three exist as models without weights."""
    code, out, err = limbeck("search", "recipe=nemotron-nano-a10g-search", f"output={tmp_path / 'out'}")
    assert code == 0, err
    content = json.loads((tmp_path / "out" / "candidates.json").read_text())
    assert [candidate["name"] for candidate in content["candidates"][:3]] == [
        "L56-H4800-F14400-A40-M120x80", "L56-H4480-F17920-A40-M112x80", "L56-H4480-F15680-A40-M128x80"
    ]  # fmt: skip
    assert "1. L56-H4800" in out and "18.83 GiB" in out and content["patterns"]["56"] == 42_708_396
    for candidate in content["candidates"][:3]:
        assert candidate["pattern"] == "".join(LARGE.pattern[layer] for layer in candidate["layers"])
        target = {name: value for name, value in candidate["target"].items() if name != "keep_layers"}
        config = LARGE.replace(pattern=candidate["pattern"], **target)
        weights = HybridLM(config, device="meta").state_dict().values()
        assert sum(weight.numel() for weight in weights) == candidate["parameters"]
    plot = (tmp_path / "out" / "plots" / "search.svg").read_text()
    assert "Estimated tokens/s" in plot and "L56-H4800-F14400-A40-M120x80" in plot
    assert (tmp_path / "out" / "plots" / "search.png").stat().st_size > 1000


@pytest.mark.slow
def test_seventeen_thousand_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By formulas: the table of axes is read once a size, and no layer is run."""
    tables: list[str] = []
    read = parameters.tensor_table
    monkeypatch.setattr(parameters, "tensor_table", lambda config: tables.append(config.pattern) or read(config))
    monkeypatch.setattr(trace, "running", None)
    space = Space(
        patterns=(SMALL.pattern,),
        hidden_size=Range(4480, 5120, 64),
        intermediate_size=Range(13440, 20480, 128),
        num_attention_heads=(32, 40),
        mamba_num_heads=Range(112, 128, 8),
        mamba_head_dim=Range(64, 80, 4),
        align=8,
    )
    depths = find_depths(LARGE, space, Rules(), None)
    found = find_candidates(LARGE, space, depths, Budget(A10G.budget(0.05, 0, 0.5), 131072), A10G, Requests(8192, 1024))
    assert found.combinations == 11 * 56 * 2 * 3 * 5 == 18_480 and len(found.candidates) > 10_000
    assert len(tables) <= found.combinations and max(map(len, tables)) == 3  # a layer of each kind
    assert len({candidate.name for candidate in found.candidates}) == len(found.candidates)


@pytest.mark.parametrize("seed", range(25))
def test_candidates_are_those_of_brute_force(seed: int) -> None:
    """And each is valid, within the budget, and has the table's parameters and `cost.memory`'s bytes."""
    config, draw = random_config(seed), random.Random(seed)
    order = tuple(draw.sample(range(config.num_layers), config.num_layers))

    def some(width: int) -> tuple[float, ...]:
        return tuple(sorted({draw.randint(1, width) for _ in range(2)} | {width}))

    space = Space(
        layers=some(config.num_layers),
        hidden_size=some(config.hidden_size),
        intermediate_size=some(config.intermediate_size),
        num_attention_heads=some(config.num_attention_heads),
        mamba_num_heads=some(config.mamba_num_heads),
        mamba_head_dim=some(config.mamba_head_dim),
        align=draw.choice((1, 2, 4)),
    )
    budget = Budget(memory(config, 64, 2, chunk=None).total * draw.choice((0.7, 0.9, 1.0)), 64, 2)
    depths = find_depths(config, space, Rules(), LayerScores(order))
    try:
        found = find_candidates(config, space, depths, budget, A10G, Requests(16, 16)).candidates
    except InputError as error:
        assert "fits" in str(error)
        found = ()
    # A width that no layer has any more is no width: brute force names it and is refused, hence by letters.
    wanted: dict[str, HybridConfig] = {}
    for keep in itertools.product((True, False), repeat=3):
        names = (("intermediate_size",), ("num_attention_heads",), ("mamba_num_heads", "mamba_head_dim"))
        gone = {name: None for kept, group in zip(keep, names, strict=True) if not kept for name in group}
        part = brute_force(config, Space(**(space.options() | gone)), order, budget)
        letters = {letter for kept, letter in zip(keep, "-*M", strict=True) if kept}
        wanted |= {key: made for key, made in part.items() if set(made.pattern) == letters}
    assert {repr(candidate.config) for candidate in found} == wanted.keys()
    widths = RandomScores(seed).scores(config)
    for candidate in found:
        report = memory(candidate.config, 64, 2, chunk=None)
        assert candidate.memory == report and report.total <= budget.bytes
        assert candidate.parameters == sum(tensor.numel for tensor in tensor_table(candidate.config).values())
        assert slice_config(config, candidate.selection(config, widths)) == candidate.config
        assert select(config, widths, order, candidate.target) == candidate.selection(config, widths)
        assert candidate.throughput is not None and candidate.throughput.tokens_per_second > 0


def test_ratios_ranges_and_alignment() -> None:
    config = tiny_config()
    space = Space(hidden_size=Range(16, 32, 8), intermediate_ratio=(1, 1.5, 1.75), align=8)
    found = find_candidates(config, space, find_depths(config, space, Rules(), None), Budget(1e9, 64), NOWHERE)
    pairs = {(candidate.config.hidden_size, candidate.config.intermediate_size) for candidate in found.candidates}
    # 16 x 1.75 = 28 and 24 x 1.5 = 36, x 1.75 = 42 are not multiples of 8; 32 x 1.75 = 56 is more than the source's 48.
    assert (
        pairs == {(16, 16), (16, 24), (24, 24), (32, 32), (32, 48)} and found.combinations == 9 and found.aligned == 5
    )
    assert all(candidate.throughput is None for candidate in found.candidates)
    whole = next(candidate for candidate in found.candidates if candidate.config == config)
    assert whole.target == Target() and whole.words() == []


def test_a_range_has_the_numbers_that_are_written() -> None:
    assert values_of("x", Range(1, 3, 0.1)) == [number / 10 for number in range(10, 31)]
    for wrong in ((1, 1e308, 1e-10), (1, 1e12, 1), (1, 1e308, 1e-300)):
        with pytest.raises(InputError, match="100,000 values at most"):
            Range(*wrong)


def test_importance_is_the_share_that_stays() -> None:
    config = tiny_config()
    widths = RandomScores(0).scores(config)
    found = with_importance(config, widths, candidates_of(config, TINY_SPACE, (3, 4)))
    by_config = {(candidate.depth.label, repr(candidate.config)): candidate for candidate in found}
    assert by_config["6", repr(config)].importance == 1
    assert all(0 < (candidate.importance or 0) <= 1 for candidate in found)
    for candidate in found:  # more of one axis keeps more
        for name, wider in (("hidden_size", 32), ("intermediate_size", 48), ("mamba_num_heads", 8)):
            if getattr(candidate.config, name) < wider and (
                name != "intermediate_size" or "-" in candidate.config.pattern
            ):
                other = by_config[candidate.depth.label, repr(candidate.config.replace(**{name: wider}))]
                assert (other.importance or 0) > (candidate.importance or 0)


def test_importance_by_hand() -> None:
    """Two MLP layers of which one goes: FFN keeps half of its best share, hidden counts the norms that stay."""
    config = tiny_config(pattern="--", hidden_size=4, intermediate_size=4)
    widths = RandomScores(0).scores(config)
    widths[HIDDEN][:] = torch.tensor([[9.0, 9, 9, 9], [1, 2, 3, 4], [0, 0, 0, 10]], dtype=torch.float64)
    for axis in widths:
        if axis.kind == "ffn":
            widths[axis][:] = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
    space = Space(layers=(1,), hidden_size=(2,), intermediate_size=(2,), align=1)
    (found,) = with_importance(config, widths, candidates_of(config, space, (0,)))
    ffn = 2 * 2 * 4 * 4  # up and down of both layers
    hidden = ffn + 3 * 4 + 2 * config.vocab_size * 4  # and the norms, embedding and head
    assert found.importance == pytest.approx((hidden * (3 + 14) / 20 + ffn * (7 / 10 + 0) / 2) / (hidden + ffn))
    widths[HIDDEN][:] = 0
    (found,) = with_importance(config, widths, candidates_of(config, space, (0,)))
    assert found.importance == pytest.approx((hidden * 2 / 4 + ffn * (7 / 10 + 0) / 2) / (hidden + ffn))


def test_ranks_are_monotone() -> None:
    config = tiny_config()
    found = with_importance(config, RandomScores(0).scores(config), candidates_of(config, TINY_SPACE, (3, 4)))
    for rank, value in (("memory", lambda c: c.memory.total), ("importance", lambda c: c.importance)):
        values = [value(candidate) for candidate in ranked(reversed(found), rank)]
        assert values == sorted(values, reverse=True) and len(values) == len(found)
        assert ranked(reversed(found), rank) == ranked(found, rank)
    losses: list[Any] = [3.0, None, 1.0, 2.0, None, 1.0]
    some = [dataclasses.replace(c, loss=loss) for c, loss in zip(found, losses, strict=False)]
    order = ranked(some, "loss")
    assert [candidate.loss for candidate in order[:4]] == [1.0, 1.0, 2.0, 3.0]
    assert (order[0].importance or 0) >= (order[1].importance or 0)
    assert (order[4].importance or 0) >= (order[5].importance or 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(draw.randint(0, 30))]

    def beaten(point: tuple[int, int]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    front = [points[index] for index in pareto(points)]
    assert front == sorted({point for point in points if not beaten(point)})


def test_the_loss_is_that_of_the_cut_model() -> None:
    """All kept: the model's own loss, from its logits; micro-batches and padding do not count."""
    config = tiny_config()
    model = random_model(config)
    batches = batches_of(config)
    whole = select(config, RandomScores(0).scores(config), (), Target())
    total = tokens = 0.0
    for batch in batches:
        logits = model(batch.input_ids, seq_idx=batch.seq_idx).flatten(0, 1)
        labels = batch.labels.flatten()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels >= 0).sum())
    assert sliced_loss(model, whole, batches) == pytest.approx(total / tokens, rel=1e-9)
    cut = select(config, RandomScores(0).scores(config), (), Target(hidden_size=16))
    assert sliced_loss(model, cut, batches) != sliced_loss(model, cut, batches, Repair(norms="none"))


def test_the_loss_is_that_of_the_repaired_model() -> None:
    config = tiny_config()
    model, batches = random_model(config), batches_of(config)
    cut = select(config, RandomScores(0).scores(config), (), Target(hidden_size=16))
    repair = Repair(rotate=True, least_squares=True)
    repaired = repair_model(model, cut, batches, repair)
    everything = select(repaired.config, RandomScores(0).scores(repaired.config), (), Target())
    expected = sliced_loss(repaired, everything, batches)
    assert sliced_loss(model, cut, batches, repair, batches) == pytest.approx(expected, rel=1e-9)
    assert expected != sliced_loss(model, cut, batches)


def test_only_what_a_folder_can_hold_is_a_candidate() -> None:
    """llama: whole blocks, and a hidden size that its heads divide, as transformers wants it."""
    config = dense_config(0, "llama").replace(pattern="*-*-*-", hidden_size=48, num_attention_heads=3,
                                              num_key_value_heads=3, head_dim=8)  # fmt: skip
    with pytest.raises(InputError, match="whole blocks"):
        find_depths(config, Space(patterns=("*-*",)), Rules(), None)
    with pytest.raises(InputError, match="at most 3"):  # blocks count as layers
        find_depths(config, Space(layers=(5,)), Rules(), LayerScores((0,), (0.0,)))
    found = candidates_of(config, Space(patterns=("*-*-",), hidden_size=(32, 40, 48)))
    assert [candidate.config.hidden_size for candidate in found] == [48]


def test_a_loss_that_is_none_is_said() -> None:
    config = tiny_config()
    model, batches = random_model(config), batches_of(config)
    whole = select(config, RandomScores(0).scores(config), (), Target())
    with torch.no_grad():
        model.norm_f.weight.fill_(torch.inf)
    with pytest.raises(CheckFailed, match="loss"):
        sliced_loss(model, whole, batches)
    for batch in batches:
        batch.labels.fill_(-100)
    with pytest.raises(InputError, match="counted"):
        sliced_loss(random_model(config), whole, batches)
