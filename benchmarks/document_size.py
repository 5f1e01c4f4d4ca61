"""The most memory that score, distill and evaluate take of one long document.

    python -m limbeck.benchmarks.document_size [--megabytes 100] [--file txt|jsonl] [--wide] [--commands score,...]
        [--folder FOLDER]

The document is the running Python's sources one after another, as often as it takes, as a .txt file or as the one row
of a .jsonl file; `--wide` puts a character beyond the first 65,536 before it, for which Python holds every character of
it in four bytes. Each command is a process of its own with the shipped model, on few tokens, so that what it takes is
that of the document; resident memory is the most that the system has counted for the process (getrusage). The first
command tokenises the document, those after it read the tokens where it has put them. With a FOLDER these stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from limbeck.benchmarks.cells import print_table
from limbeck.distill.text.documents import stdlib_files
from limbeck.models.errors import gib
from limbeck.models.provenance import provenance

WIDE = "\N{GRINNING FACE}"
COMMANDS = {
    "score": ["model=zoo", "seq_len=128", "batch=2", "importance.tokens=512", "importance.depth_tokens=256"],
    "distill": [
        "teacher=zoo", "student=zoo", "distill.train.steps=2", "distill.seq_len=128", "distill.batch=2",
        "distill.evaluate_tokens=512", "wandb=off",
    ],
    "evaluate": [
        "teacher=zoo", "student.same=zoo", "seq_len=128", "batch=2", "tokens=1024", "details.prompts=2",
        "details.new_tokens=8", "details.resamples=50", "probes=[needle]", "details.probe_lengths=[256]",
        "details.probe_count=2",
    ],
}  # fmt: skip


def write_document(path: Path, size: int, wide: bool) -> None:
    """One document of `size` bytes and little more. A part has a number, so that the text does not repeat as it is."""
    parts, length, number = [WIDE if wide else ""], 0, 0
    while length < size:
        for document in stdlib_files():
            text = f"# part {number}\n{document.text}".encode("ascii", "ignore").decode()
            parts.append(text)
            length, number = length + len(text), number + 1
            if length >= size:
                break
    whole = "".join(parts)
    path.write_text(whole if path.suffix == ".txt" else json.dumps({"text": whole}) + "\n", encoding="utf-8")


def peak(command: str, data: Path, root: Path) -> int:
    """Bytes of resident memory, the most that a command has had."""
    words = [command, *COMMANDS[command], f"data={data}", f"output={root / command}", "device=cpu"]
    environment = os.environ | {"LIMBECK_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    with (root / f"{command}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "limbeck", *words], env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit((root / f"{command}.log").read_text())
    return usage.ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--file", choices=("txt", "jsonl"), default="jsonl")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        data = root / f"document.{options.file}"
        write_document(data, int(options.megabytes * 1e6), options.wide)
        rows = [[command, gib(peak(command, data, root))] for command in options.commands.split(",")]
        size = f"{data.stat().st_size / 1e6:,.1f} MB{', wide characters' if options.wide else ''}"
        print_table(f"One document in {data.name}, {size}", ["command", "most resident memory"], rows)
    print("\n" + "\n".join(f"- {key}: {value}" for key, value in provenance().items()))


if __name__ == "__main__":
    main()
