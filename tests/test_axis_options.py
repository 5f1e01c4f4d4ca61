"""A row of the table of axes is an option of targets and search spaces, with no further list; widths for a count."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from limbeck.models.axes import AXES, AxisRow
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.kinds import KINDS
from limbeck.prune.search import Space
from limbeck.prune.target import FINE, Target, alignment, goal_of, widths_for, with_widths
from limbeck.scripts.run.compose import build, compose_config
from limbeck.scripts.run.resolve import model_config
from limbeck.tests.helpers import limbeck, tiny_config

PRUNE = ("model=zoo", "scores=x", "output=y")
SEARCH = ("model=zoo", "output=y")


def test_every_row_names_a_field_that_its_kinds_need() -> None:
    fields = {field.name for field in dataclasses.fields(HybridConfig)}
    needed = {name for kind in KINDS.values() for name in kind.widths()} | {"hidden_size"}
    assert {row.width for row in AXES.values()} == needed <= fields
    assert {row.groups for row in AXES.values() if row.groups} <= fields
    assert {row.within for row in AXES.values() if row.within} <= AXES.keys()
    assert len({row.title for row in AXES.values()}) == len({row.width for row in AXES.values()}) == len(AXES)


@pytest.mark.parametrize(
    "row", [*AXES.values(), AxisRow("odd", "odd_width", "odd channels")], ids=lambda row: row.width
)
def test_every_row_is_an_option(row: AxisRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXES, row.name, row)
    target = compose_config("prune", [*PRUNE, f"target.{row.width}=8"])["target"]
    assert build(Target, target).widths == {row.width: 8}
    space = compose_config("search", [*SEARCH, f"space.{row.width}=[8,16]"])["space"]
    assert build(Space, space).widths == {row.width: (8, 16)}
    space = compose_config("search", [*SEARCH, f"space.{row.width}={{min:8,max:16,step:8}}"])["space"]
    assert build(Space, space).widths.keys() == {row.width}
    for command in ("prune", "search", "compress"):
        assert f"{row.width}: null" in (said := limbeck(command, "--help")[1]) and f"# {row.title}" in said, command


def test_a_width_that_no_axis_has_is_refused() -> None:
    code, _, err = limbeck("prune", *PRUNE, "target.odd_width=8")
    assert code == 2 and "target.odd_width" in err and err.count("\n") == 1


def test_a_sweep_knows_them(tmp_path: Path) -> None:
    """Hydra composes for a sweep by itself."""
    code, _, err = limbeck(
        "prune",
        "--multirun",
        "model=zoo",
        f"scores={tmp_path}",
        f"output={tmp_path / 'out'}",
        "target.ssm_state_size=8,16",
    )
    assert code == 2 and "scores.safetensors does not exist" in err, err


@pytest.mark.parametrize("share", (0.93, 0.75, 0.6, 0.41))
@pytest.mark.parametrize("name", ("zoo", "nemotron-nano-12b-v2", "nemotron-h-4b", "qwen3-8b", "smollm2-135m"))
def test_a_number_of_parameters_is_met(name: str, share: float) -> None:
    """Within 0.1%, never above, in whole tiles where they come so near, and else in multiples of 8 if these do."""
    config = model_config(name)
    found = config.replace(**with_widths(config, config.pattern, Target(parameters=share)).widths)
    goal = goal_of(config, share)
    assert 0 <= 1 - count_parameters(found) / goal <= 1e-3
    assert found.hidden_size % FINE == 0
    if found.intermediate_size % FINE:  # no multiple of 8 at this hidden size comes as near
        coarse = found.replace(intermediate_size=found.intermediate_size // FINE * FINE)
        assert 1 - count_parameters(coarse) / goal > 1e-3


@pytest.mark.parametrize("share", (0.93, 0.75, 0.5, 0.31))
@pytest.mark.parametrize("name", ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b", "zoo-moe-small"))
def test_a_number_of_parameters_is_met_with_experts(name: str, share: float) -> None:
    config = model_config(name)
    found = config.replace(**with_widths(config, config.pattern, Target(parameters=share)).widths)
    found.to_hf()
    assert 0 <= 1 - count_parameters(found) / goal_of(config, share) <= 1e-3
    assert found.hidden_size % FINE == 0 and found.moe_intermediate_size == config.moe_intermediate_size


def test_the_published_cut_of_a_mixture_follows_from_its_number_of_parameters() -> None:
    """NVIDIA's 22.28B of Nemotron-3-Nano: hidden 2304, 104 experts, shared 3072."""
    config = model_config("nemotron-3-nano-30b-a3b")
    published = {"hidden_size": 2304, "n_routed_experts": 104, "moe_shared_expert_intermediate_size": 3072}
    assert with_widths(config, config.pattern, Target(parameters=22_276_865_600)).widths == published
    for name, size in published.items():
        found = with_widths(config, config.pattern, Target(parameters=22_276_865_600, **{name: size}))  # type: ignore[arg-type]
        assert found.widths == published, name
    fixed = {name: getattr(config, name) for name in published}
    with pytest.raises(InputError, match="leave one of them out"):
        with_widths(config, config.pattern, Target(parameters=0.9, **fixed))
    with pytest.raises(InputError, match="no widths leave as few"):
        with_widths(config, config.pattern, Target(parameters=1000))


def test_only_one_width_is_free() -> None:
    config = tiny_config(hidden_size=2048, intermediate_size=4096, vocab_size=1000)
    for hidden, inner in ((1536, None), (None, 4000)):
        goal = 0.6 * count_parameters(config)
        found = widths_for(config, goal, hidden, inner, {})
        assert found[0] == (hidden or found[0]) and found[1] == (inner or found[1])
        count = count_parameters(config.replace(hidden_size=found[0], intermediate_size=found[1]))
        more = {"intermediate_size": found[1] + 8} if inner is None else {"hidden_size": found[0] + 8}
        assert (
            count
            <= goal
            < count_parameters(config.replace(**{"hidden_size": found[0], "intermediate_size": found[1]} | more))
        )
    assert alignment(config) == 64
