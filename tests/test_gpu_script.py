"""benchmarks/gpu.py and inference.py where there is no GPU: from a folder of any name with few packages, with a kernel
that fails, and what they are to do, in which order."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from limbeck.benchmarks import gpu, gpu_cases, gpu_measures, gpu_peers, gpu_sweep, guarded, inference
from limbeck.benchmarks.guarded import Case
from limbeck.kernels import scan_sizes
from limbeck.models import provenance

ROOT = Path(__file__).parents[1]
# Refuses what is none of Python's, of torch's own dependencies or of the three other packages, the package itself too.
BARE = """
import runpy, sys
ALLOWED = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "triton", "numpy", "safetensors", "checkout"}
ALLOWED |= {"filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec"}
class OnlyFew:
    finders = [*sys.meta_path]
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first in ALLOWED or (first == "limbeck" and path) or first.startswith("_sysconfigdata"):
            found = (finder.find_spec(name, path, target) for finder in self.finders)
            return next(filter(None, found), None)
sys.meta_path[:] = [OnlyFew()]
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
"""
BY_NAME = BARE + 'runpy.run_path(script, run_name="__main__")\n'
ITS_CHECK = """
import dataclasses, math
from pathlib import Path
found = runpy.run_path(script, run_name="inference")
import limbeck, torch
from limbeck.benchmarks import guarded
plan = dataclasses.replace(found["full_plan"](), device=torch.device("cpu"), dtype=torch.float32)
runner, budget = guarded.in_this_process(found["working"](plan)), guarded.Budget(math.inf, {})
cases = lambda rows: found["cases_of"](plan, ["check"], False, rows)
code = guarded.run_benchmark(Path(sys.argv[1]), {}, cases, runner, budget, found["describe"], found["fails"])
sys.exit(code if Path(limbeck.__file__).parent == Path(script).parents[1] else "not this checkout")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's code in a folder that is not called as it is, without .git."""
    place = tmp_path_factory.mktemp("copied") / "lim beck-main"
    for folder in ("benchmarks", "kernels", "models", "prune", "distill"):
        unused = shutil.ignore_patterns("__pycache__", "zoo", "zoo-moe")
        shutil.copytree(ROOT / folder, place / folder, ignore=unused)
    shutil.copy(ROOT / "__init__.py", place)
    return place


def script_run(code: str, checkout: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(checkout / "benchmarks" / name), *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["LIMBECK_COMMIT"] = "0123abc"
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout.parent)


def test_a_fault_costs_a_row_where_few_packages_are(checkout: Path) -> None:
    pytest.importorskip("triton")
    kernel, path = checkout / "kernels" / "activation_triton.py", checkout.parent / "out" / "gpu.json"
    whole = kernel.read_text()
    kernel.write_text(whole.replace("    mask = at < size\n", "    mask = at < nothing\n", 1))  # of relu2's forward
    arguments = ("--interpret", "--json", str(path), "--only", "relu2", "decode_attention")
    try:
        done = script_run(BY_NAME, checkout, "gpu.py", *arguments)
    finally:
        kernel.write_text(whole)
    assert done.returncode == 3 and done.stderr.count("FAILS") == 1, done.stdout + done.stderr
    content = json.loads(path.read_text())
    machine, relu2, decode = content["rows"]
    assert machine["commit"] == "0123abc" and content["ended"] == "finished"
    assert relu2["op"] == "relu2" and "nothing" in relu2["error"]
    assert decode["right"] and decode["repeats"]


@pytest.mark.slow
def test_inference_runs_where_few_packages_are(checkout: Path) -> None:
    path = checkout.parent / "inference.json"
    done = script_run(BARE + ITS_CHECK, checkout, "inference.py", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["kind"] for row in json.loads(path.read_text())["rows"]] == ["machine", "check"]


def test_an_interpreter_that_numpy_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which the scripts set
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.5.0")
    for script in (gpu, inference):
        assert script.main(["--interpret"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "numpy 2.5.0" in err and "triton >= 3.7" in err
    for versions in (("3.7.0", "2.5.0"), ("3.6.0", "2.4.6"), ("3.10.0+git1", "2.10.0")):
        monkeypatch.setattr(triton, "__version__", versions[0])
        monkeypatch.setattr(numpy, "__version__", versions[1])
        assert guarded.interpreter_refusal() == ""


def planned(short: bool, known: dict[str, Any]) -> list[Case]:
    """The cases of a run on a card, of which no case is run; packages alone are there that are `known`."""
    rows: list[Case] = []
    cases = []
    for case in gpu.plan(gpu_cases.operators(), short, [Path("wheels/einops-1-py3-none-any.whl")], "into", rows):
        cases.append(case)
        row = case | {"case": guarded.name_of(case), "seconds": 1.0}
        if case["kind"] == "machine":
            row |= known
        elif case["kind"] == "peer" and case["package"] != "mamba_ssm":
            row["error"] = "ModuleNotFoundError"
        rows.append(row)
    return cases


def test_a_run_on_a_card_goes_by_worth() -> None:
    cases = planned(False, {"scan_sizes": "default", "sizes_of": 90})
    kinds = list(dict.fromkeys(case["kind"] for case in cases))
    assert kinds == ["machine", "rates", "check", "wheel", "peer", "sweep", "adopt", "first", "time"]
    names = [guarded.name_of(case) for case in cases]
    assert len(set(names)) == len(names), "a name says which case it is"
    times = [case for case in cases if case["kind"] == "time"]
    assert [case["way"] for case in times[:2]] == ["limbeck", "mamba_ssm"] and times[0]["op"] == "ssd_scan"
    ours = [case for case in times if case["way"] == "limbeck"]
    shapes = list(dict.fromkeys((case["batch"], case["tokens"]) for case in ours))
    assert shapes == list(gpu.SHAPES) and {case["op"] for case in ours} == set(gpu_cases.operators())
    assert not [case for case in times if case["way"] in gpu_peers.PACKAGES and case["way"] != "mamba_ssm"]
    assert times[-1]["way"] not in ("limbeck", *gpu_peers.PACKAGES)  # what compiles for long comes last
    short = planned(True, {"scan_sizes": "measured", "sizes_of": 90})
    assert not {"sweep", "adopt"} & {case["kind"] for case in short} and len(short) < len(cases) / 2
    assert {(case["batch"], case["tokens"]) for case in short if case["kind"] == "time"} == {(1, 8192)}


def test_budgets_fit_nine_minutes_and_three() -> None:
    assert guarded.SECONDS <= 530 and guarded.SHORT_SECONDS <= 170 and gpu.SHARES["sweep"] * guarded.SECONDS > 120


def test_what_a_row_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of row is a line; peers, candidates and a shape that is too large fail nothing."""
    floor = gpu.floors({"bytes": [1e9, 2e9], "operations": [0.0]}, {"bandwidth": 1e12, "matmul": 1e15})
    assert floor == {"forward": 1.0, "backward": 2.0} and gpu.floors({"bytes": [1e9]}, {}) == {}
    time: Case = {"kind": "time", "way": "limbeck", "forward": 2.0, "backward": 4.0, "extra": 2.0**21, "floor": floor}
    assert (
        gpu.describe(time) == "forward 2.000 ms (floor 1.000, 50%), backward 4.000 ms (floor 2.000, 50%), extra 2 MiB"
    )
    check: Case = {"kind": "check", "value": 1e-3, "gradient": "nan", "right": False, "repeats": True}
    assert gpu.describe(check) == "values 1.0e-03, gradients nan, WRONG, repeats"
    sweep = {"kind": "sweep", "value": 0.0, "gradient": 0.0, "right": True, "ms": {"1 x 8192": 0.5}}
    assert gpu.describe(sweep) == "values 0.0e+00, gradients 0.0e+00, right, 0.500 ms at 1 x 8192"
    assert gpu.describe({"kind": "first", "first_call": 2.0, "repeats": False}) == "first call 2.0 s, DOES NOT REPEAT"
    assert gpu.describe({"case": "rates", "kind": "rates", "bandwidth": 4e12, "seconds": 1.0}) == "bandwidth 4e+12"
    full = {"error": "OutOfMemoryError: CUDA out of memory"}
    assert [gpu.fails(time | more) for more in ({}, full, {"error": "x"}, {"error": "x", "way": "fla"})] == [0, 0, 1, 0]
    assert gpu.fails(check) and gpu.fails(check | full) and gpu.fails({"kind": "first", "repeats": False})
    assert not gpu.fails({"kind": "sweep", "right": False}) and gpu.fails({"kind": "adopt", "right": False})


def test_kernels_are_measured_where_the_model_has_its_tensors() -> None:
    """x, B and C in the rows that the convolution gives, dt, z and the convolution's input in those of in_proj."""
    ops = gpu_cases.operators()
    for tiny, conv, projected in ((False, gpu_cases.CONV, gpu_cases.PROJECTED), (True, 128, 196)):
        leaves = gpu_measures.drawn_leaves(ops["ssd_scan"], 1, 3, torch.bfloat16, tiny)
        assert all(leaves[name].stride(1) == conv for name in "xBC") and leaves["dt"].stride(1) == projected
        assert len({leaves[name].untyped_storage().data_ptr() for name in "xBC"}) == 1
        assert leaves["A"].dtype == torch.float32 and leaves["x"].dtype == torch.bfloat16 and leaves["dt"].requires_grad
    for name, tensor in (("gated_rms_norm", "z"), ("causal_conv1d", "x")):
        leaves = gpu_measures.drawn_leaves(ops[name], 1, 3, torch.bfloat16, False)
        assert leaves[tensor].stride(1) == gpu_cases.PROJECTED
    update = gpu_measures.drawn_leaves(ops["state_update"], 2, 1, torch.bfloat16, False)
    assert update["state"].dtype == torch.float32 and update["dt"].stride(0) == gpu_cases.PROJECTED
    again = gpu_measures.drawn_leaves(ops["state_update"], 2, 1, torch.bfloat16, False)
    assert all(torch.equal(update[name], again[name]) for name in update) and gpu_cases.DRAWN["dtype"] == torch.float32


def test_no_nan_is_right() -> None:
    assert math.isnan(gpu_measures.worst([1e-9, math.nan])) and gpu_measures.worst([]) == 0
    assert not gpu_measures.right(torch.float32, math.nan, 0.0) and not gpu_measures.right(torch.float32, 0.0, math.nan)
    assert gpu_measures.right(torch.bfloat16, 5e-3, 1e-2) and not gpu_measures.right(torch.float32, 5e-4, 0.0)


def test_a_wheel_is_installed_beside_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks for a package that is nowhere; one that is none is an error, which is a row."""
    file, into = tmp_path / "limbeck_peer_of_tests-1.5-py3-none-any.whl", tmp_path / "into"
    info = "limbeck_peer_of_tests-1.5.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("limbeck_peer_of_tests.py", "SAID = 7\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: limbeck-peer-of-tests\nVersion: 1.5\nRequires-Dist: x\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    case = {"kind": "wheel", "file": str(file), "into": str(into)}
    assert gpu_measures.wheel_case(case) == {"installed": "1.5"}
    assert gpu_measures.wheel_case(case) == {"installed": "1.5, which was there"}
    assert (into / "limbeck_peer_of_tests.py").exists()
    other = tmp_path / "limbeck_other_of_tests-1-py3-none-any.whl"
    other.write_text("no archive")
    row = guarded.guarded(gpu_measures.wheel_case, case | {"file": str(other)})
    assert row["error"].startswith("RuntimeError")


def test_the_commit_of_a_folder_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", no_git)
    assert provenance.commit.__wrapped__() == os.environ.get("LIMBECK_COMMIT", "unknown")
    monkeypatch.setenv("LIMBECK_COMMIT", "0123abc")
    assert provenance.commit.__wrapped__() == "0123abc"


def test_a_worker_takes_products_as_they_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers that turn TF32 on for all of torch would make a right float32 kernel look wrong."""
    for name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "before")
    environment = gpu.worker_environment("cache", "peers")
    assert environment["PYTHONPATH"] == f"before{os.pathsep}peers" and environment["TRITON_CACHE_DIR"] == "cache/triton"
    assert not [name for name in environment if "TF32" in name or name == "TRITON_INTERPRET"]


def test_the_sweep_is_of_the_9b_s_widths() -> None:
    assert gpu_sweep.FULL.shape() == (2, gpu_cases.HEAD_DIM, gpu_cases.STATE)
    assert scan_sizes.shape_name(*gpu_sweep.FULL.shape()) == "16 bits, head_dim 80, state 128"
