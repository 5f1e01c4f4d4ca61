"""`limbeck compress` by several processes: the same folders as by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limbeck.distill.teacher import read_keys, shards
from limbeck.models import processes
from limbeck.models.errors import InputError
from limbeck.scripts.run.show import read_json
from limbeck.tests.helpers import compress_command, limbeck
from limbeck.tests.processes_helpers import launch, run_workers
from safetensors.torch import load_file

MAIN = ("-m", "limbeck.scripts.run.main")


def take_turns(folder: str) -> None:
    """What `in_first` does, seen from each process."""
    place = Path(folder)

    def alone() -> None:
        assert processes.count() == 1 and processes.rank() == 0 and not processes.active()
        (place / "alone").write_text("done")

    processes.in_first(alone)
    assert processes.count() == 2 and (place / "alone").is_file()

    def wrong() -> None:
        raise InputError("what was wrong")

    with pytest.raises(InputError) as caught:
        processes.in_first(wrong)
    assert str(caught.value) == ("" if processes.rank() else "what was wrong")
    assert processes.gather(processes.rank()) == [0, 1]


@pytest.mark.slow
def test_the_first_works_while_the_others_wait(tmp_path: Path) -> None:
    run_workers(take_turns, tmp_path)


@pytest.mark.slow
def test_two_processes_compress_as_one(workshop: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = limbeck(*compress_command(workshop, one))
    assert code == 0, err
    done = launch([*MAIN, *compress_command(workshop, two), "device=cpu"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("export: a folder for others") == 1
    expected, found = (load_file(out / "exported" / "model.safetensors") for out in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.02, atol=1e-3)
    gaps = [read_json(out / "gap" / "gap.json")["models"]["distilled"]["kl"]["value"] for out in (one, two)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-3)
    assert (two / "report" / "report.html").is_file()
    again = launch([*MAIN, *compress_command(workshop, two), "device=cpu"])
    assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.slow
def test_rows_that_do_not_divide_are_refused_at_once(workshop: Path, tmp_path: Path) -> None:
    done = launch([*MAIN, *compress_command(workshop, tmp_path / "out"), "distill.batch=3", "device=cpu"])
    lines = [line for line in done.stderr.splitlines() if line.startswith("limbeck:")]
    assert done.returncode and len(lines) == 1 and "distill.batch is 3" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_cache_as_one(workshop: Path, tmp_path: Path) -> None:
    """Each its share of the rows, and what distill reads from both is the same."""
    places = [f"teacher={workshop / 'model'}", f"data={workshop / 'text'}", "device=cpu", "cache.k=8"]
    rows = ["distill.seq_len=32", "distill.batch=2", "distill.train.steps=4", "distill.evaluate_tokens=64"]
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = limbeck("cache-teacher", *places, *rows, f"output={one}")
    assert code == 0, err
    done = launch([*MAIN, "cache-teacher", *places, *rows, f"output={two}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bytes a token") == 1 and len(shards(two)) == 2 * len(shards(one)) == 2
    facts = [read_json(folder / "cache.json") for folder in (one, two)]
    assert facts[0]["rows"] == facts[1]["rows"] and facts[0]["tokens"] == facts[1]["tokens"]
    keys = [sorted(key for path in shards(folder) for key in read_keys(path)) for folder in (one, two)]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_students_that_cannot_be_split_are_refused_before_work(workshop: Path, tmp_path: Path) -> None:
    """And shard=false, which the refusal asks for, is an option of the command."""
    words = [*compress_command(workshop, tmp_path / "out"), "device=cpu", "distill.train.quantize=w8a8"]
    done = launch([*MAIN, *words])
    assert done.returncode != 0 and "give shard=false" in done.stderr and not (tmp_path / "out").exists()
    done = launch([*MAIN, *words, "shard=false"])
    assert done.returncode == 0, done.stderr[-3000:]
