"""How far it is from a command line to the first tensor operation with weights, counted in project files.

Definitions. A *project file* is a Python file of the package limbeck (below the folder of `limbeck/__init__.py`),
without its tests and hidden folders (a virtual environment may lie in there). The *first tensor operation with weights*
is the first product or look-up that reaches torch's dispatcher (`PRODUCTS`: embedding, linear, mm, addmm, bmm, ...);
of a command that does none at all, as `prune` without repair, it is the first operation with an argument that is a
floating-point tensor of more than one element in memory (prune: the scores, as they are read). Tensors on `meta` count
nowhere: filling an empty model's weights there computes nothing.

*On the stack*: the distinct project files that have a frame on the Python stack at that moment.
*Entered before*: the project files of which at least one function was called until then in the main thread. What runs
because a module is being imported (its body, class bodies, decorators) does not count, nor what other threads call.

A fresh process counts, so that nothing is imported or cached in memory beforehand; caches on the disk
(LIMBECK_CACHE) change the count by what fills them, so that a text ought to be in them already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

PRODUCTS = (
    "embedding", "linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "dot", "addmv", "convolution",
)  # fmt: skip
APART = ("tests", "build")


class Reached(BaseException):
    """The operation that was looked for: the rest of the command need not run."""


def hops(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Project files on the stack (outermost first) at the first tensor operation with weights of `limbeck ARGV`, and
    those entered before it (in order), both relative to the package's folder."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), str(found), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"limbeck {' '.join(argv)}: exit code {done.returncode}: {done.stderr[-2000:]}")
        content = json.loads(found.read_text(encoding="utf-8"))
    return content["stack"], content["entered"]


def measure(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Runs a command in this process; its exit code, and what `hops` gives with the operation's name."""
    import torch
    from limbeck import __file__ as package
    from limbeck.scripts.run.main import main
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    root = Path(package).resolve().parent
    names: dict[str, str | None] = {}
    entered: dict[str, None] = {}
    first: dict[str, Any] = {}
    product: dict[str, Any] = {}

    def project_file(frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        if file not in names:
            place = Path(os.path.realpath(file))
            inside = place.is_relative_to(root) and place.suffix == ".py"
            parts = place.relative_to(root).parts if inside else (".",)
            names[file] = None if parts[0].startswith(".") or parts[0] in APART else "/".join(parts)
        return names[file]

    def on_call(frame: FrameType, event: str, _: Any) -> None:
        name = project_file(frame)
        if name is not None and name not in entered and not is_import(frame):
            entered[name] = None

    def is_import(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "<module>" and project_file(frame) is not None:
                return True
            frame = frame.f_back
        return False

    def now(operation: str) -> dict[str, Any]:
        stack: dict[str, None] = {}
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = project_file(frame)
            if name is not None:
                stack.pop(name, None)
                stack[name] = None
            frame = frame.f_back
        return {"operation": operation, "stack": list(stack)[::-1], "entered": list(entered)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not product:
                operation = func.name().partition("::")[2].partition(".")[0]
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                numbers = [t for t in tensors if t.is_floating_point() and t.numel() > 1 and t.device.type != "meta"]
                if numbers and operation in PRODUCTS:
                    product.update(now(operation))
                    raise Reached
                if numbers and not first:
                    first.update(now(operation))
            return func(*args, **(kwargs or {}))

    code = 0
    sys.settrace(on_call)
    try:
        with Watch():
            code = main(list(argv))
    except Reached:
        pass
    finally:
        sys.settrace(None)
    return code, product or first


if __name__ == "__main__":
    sys.path = [
        entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)
    ]  # tests/ is no place of ours
    exit_code, content = measure(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(content), encoding="utf-8")
    sys.exit(exit_code)
