"""The `limbeck` command: finds the subcommand, composes its options, runs it, and turns errors into exit codes.

Heavy imports wait until a command runs: `limbeck --help` reads nothing but this file.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import CheckFailed, InputError, Stopped
from .facts import note_command
from .failures import explained_failure, lenient_streams

COMMANDS = {
    "compress": "the whole chain below, resumable: score, prune, distil, evaluate, export, memory-fit, report",
    "score": "importance of layers and widths of a model on data",
    "search": "the sizes that fit a card, ranked by memory, importance or loss; the best ones distilled briefly",
    "prune": "a smaller checkpoint from a model, its scores and a target size",
    "distill": "recover a student's accuracy from its teacher's logits",
    "cache-teacher": "a teacher's top-k tokens, kept for distill with teacher_cache=",
    "merge": "the weighted mean of two checkpoints of one config",
    "evaluate": "the gap between a teacher and its students: gap.json, gap.html",
    "export": "a checkpoint in a given dtype and shard size, read back and compared",
    "memory-fit": "does the model fit the card at this context? exit code 0 yes, 3 no",
    "train-fit": "does its distillation fit the GPUs? (memory-fit mode=train)",
    "generate": "text from a prompt, answers to a file of prompts, a chat at the terminal",
    "bench": "time to first token and tokens a second, beside the roofline; two models side by side",
    "experiment": "an ablation re-run: variants times seeds of the chain, a table and a plot (limbeck experiment=NAME)",
    "pretrain": "cross-entropy on text, from nothing or from a checkpoint (how the shipped model was made)",
}
EXAMPLES = {
    "compress": "recipe=tiny output=first",
    "score": "model=zoo data=stdlib output=scores",
    "search": "model=nemotron-nano-12b-v2 output=sizes 'space.hidden_size=[4160,4480]' budget.context=65536",
    "prune": "model=zoo scores=scores output=pruned target.layers=11 target.mamba_num_heads=12",
    "distill": "teacher=zoo student=pruned data=stdlib output=distilled distill.train.steps=100",
    "cache-teacher": "teacher=zoo data=stdlib output=answers cache.k=64 distill.train.steps=100",
    "merge": "model=distilled other=tuned weight=0.5 output=merged",
    "evaluate": "teacher=zoo +student.pruned=pruned +student.distilled=distilled data=stdlib output=gap",
    "export": "model=distilled output=exported dtype=bfloat16",
    "memory-fit": "model=nemotron-nano-9b-v2 hardware=a10g fit.context=131072",
    "train-fit": "recipe=nemotron-nano-9b-v2 hardware=h100 processes=8 distill.train.activation_checkpointing=true"
    " distill.train.context_parallel=4",
    "generate": "prompt='def mean(values):' max_new_tokens=64",
    "bench": "model=nemotron-nano-9b-v2 against=qwen3-8b batch=fit measure=false",
    "experiment": "experiment=loss output=loss",
    "pretrain": "recipe=zoo output=zoo",
}
EPILOGUE = """
Options are KEY=VALUE; `limbeck COMMAND --help` lists a command's. A recipe=NAME (or FILE.yaml) sets many at once, --cfg
job prints them all, and with --multirun KEY=A,B every combination of such values is a job of its own. --quiet prints
errors and answers alone; what a command says of its progress is in OUTPUT/log.txt as well.
model=, teacher= and student= take a checkpoint folder, hf:OWNER/NAME[@REVISION] (of the hub, safetensors only), `zoo`
or `zoo-moe` (small trained models that ship), or a named config; data= takes a folder, a file, a mixture's .yaml or its
name in conf/data/, hf:OWNER/NAME[:CONFIG][:SPLIT], or `stdlib` (the running Python's own sources).

Completion of options by the shell: eval "$(limbeck --completion bash)", also zsh and fish.

First run:   limbeck compress recipe=tiny output=first
Exit codes:  0 done, 1 a defect of ours, 2 wrong input, 3 a check said no
"""
# What a disk says when it is full, over quota, at a limit, read-only, broken or another's.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `limbeck ARGUMENTS` and returns the exit code."""
    lenient_streams()
    try:
        code = dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except InputError as error:
        return finish(2, str(error))
    except CheckFailed as error:
        return finish(3, str(error))
    except Stopped as error:
        return finish(128 + error.signal, str(error))
    except OSError as error:
        from ...models.tensors import refusal

        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if error.errno in NO_PATH:
            return finish(2, f"{str(error.filename)[:200]} is no path here: {error.strerror}; give another")
        if error.errno not in DISK:
            raise
        return finish(2, refusal(error))
    except KeyboardInterrupt:
        return finish(130, "interrupted; where work can be resumed, the same command does so")
    except (MemoryError, RuntimeError) as error:
        failure = explained_failure(error)
        if failure is None:
            raise
        return finish(*failure)


def dispatch(words: list[str]) -> int:
    """The overview, a command's help, or the command. Raises what a command raises."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        from ... import __version__

        print(f"limbeck {__version__}")
        return 0
    if words[0].partition("=")[0] == "--completion":
        from .completion import completion

        _, equals, shell = words[0].partition("=")
        print(completion(shell if equals else "".join(words[1:2]), COMMANDS))
        return 0
    if words[0].startswith("experiment="):
        words.insert(0, "experiment")
    note_command(words)
    command, overrides = by_mode(words[0], words[1:])
    if command not in COMMANDS:
        from ...models.errors import guess

        raise InputError(f"{command!r} is no command; known: {', '.join(COMMANDS)}" + guess(command, list(COMMANDS)))
    if any(word in ("-h", "--help") for word in overrides):
        from .help import describe

        print(describe(command, COMMANDS[command], EXAMPLES[command]))
        return 0
    if "--quiet" in overrides:
        from .show import console

        console.quiet = True
        try:
            return run_command(command, [word for word in overrides if word != "--quiet"])
        finally:
            console.quiet = False
    return run_command(command, overrides)


def by_mode(command: str, overrides: list[str]) -> tuple[str, list[str]]:
    """`memory-fit mode=train` is the command train-fit, whose teacher is what compress calls the model."""
    if command == "memory-fit" and "mode=train" in overrides:
        command, overrides = "train-fit", [word for word in overrides if word != "mode=train"]
    if command == "train-fit":
        overrides = ["model=" + word.partition("=")[2] if word.startswith("teacher=") else word for word in overrides]
    return command, overrides


def run_command(command: str, words: Sequence[str]) -> int:
    """Composes the options of a command and runs it, or a sweep of it, or prints them (`--cfg job`)."""
    from ...models.threads import Neighbours, set_wait_policy
    from .outside import CommandLine

    neighbours, line = Neighbours(), CommandLine.parse([with_escapes(word) for word in words])
    if line.sweeps:
        from .sweep import sweep

        sweep(command, line.overrides, line.folders)
        return 0
    gc.disable()  # what is imported stays: to look through it for garbage again and again is a fifth of the start
    try:
        from .compose import compose_config

        content = compose_config(command, line.overrides, line.folders, complete=not line.shows_config)
        if line.shows_config:
            import yaml

            print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), end="")
            return 0
        from .show import console

        if set_wait_policy(neighbours.processors()) and not console.quiet:
            print("note: other processes are busy: threads wait passively (OMP_WAIT_POLICY=PASSIVE)", file=sys.stderr)
        work = prepared(command, content, line.overrides, line.folders)
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()
    work()
    return 0


def with_escapes(word: str) -> str:
    """`stop=["\\n"]` with its texts as YAML has them: Hydra's grammar knows no newline. Raises InputError."""
    key, _, value = word.partition("=")
    if key.lstrip("+") != "stop" or "\\" not in value or "\n" in value:
        return word
    from ...models.foreign import parse_yaml
    from .outside import quoted

    choices = parse_yaml(f"[{value}]", f'{word} (expected texts, such as stop=[END,"\\n"])')
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in choices):
        return word
    return f"{key}={','.join('[' + ','.join(map(quoted, texts)) + ']' for texts in choices)}"


def prepared(
    command: str, content: Mapping[str, Any], words: Sequence[str] = (), folders: Sequence[Path] = ()
) -> Callable[[], None]:
    """What runs a command with its composed options, to which some commands add the words and folders that they are
    composed of. Raises InputError where they are not right."""
    from ...models.matmul import multiplying  # imports torch
    from ...models.processes import set_up
    from .compose import build
    from .resolve import say_format
    from .show import console

    set_up()
    module = importlib.import_module(f"..{command.replace('-', '_')}", __package__)
    line = {"words": list(words), "folders": list(map(str, folders))}
    known = module.Options.__dataclass_fields__
    options = build(module.Options, {**content, **{name: given for name, given in line.items() if name in known}})
    say_format.cache_clear()

    def work() -> None:
        with multiplying(options, None if console.quiet else sys.stderr):
            module.run(options)

    return work


def finish(code: int, message: str) -> int:
    sys.stdout.flush()
    if message:  # of many processes one says what is wrong
        print(f"limbeck: {' '.join(message.split())}", file=sys.stderr)
    return code


def overview() -> str:
    rows = "\n".join(f"  {name:14}{text}" for name, text in COMMANDS.items())
    return f"limbeck COMMAND [recipe=NAME] [KEY=VALUE ...]\n\nCommands\n{rows}\n{EPILOGUE.rstrip()}"


if __name__ == "__main__":
    sys.exit(main())
