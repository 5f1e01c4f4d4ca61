"""`limbeck --completion bash|zsh|fish`: a script by which the shell completes commands, options, and their values.

The script holds what conf/ has at the time, so that the shell starts no Python: for each command its options with what
is said of them, and for each option that picks from a few its choices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...models.errors import InputError, guess
from .compose import CONF, VERBATIM, groups, recipes
from .help import explanations

FLAGS = ("--help", "--quiet", "--cfg", "--multirun", "--config-dir")
TEXTS = ("prompt", "system", "also")  # of VERBATIM, which otherwise are folders and files
MODELS = ("model", "against", "teacher", "student", "base", "other", "init")


class Option(NamedTuple):
    """An option of a command, its choices where they are known, whether it takes a path, and what is said of it."""

    name: str
    choices: tuple[str, ...]
    is_path: bool
    text: str


def completion(shell: str, commands: Mapping[str, str]) -> str:
    """The script for a shell. Raises InputError for one that it does not know."""
    if shell not in SHELLS:
        known = ", ".join(SHELLS)
        raise InputError(
            f"--completion {shell!r} is no shell that is known; known: {known}{guess(shell, list(SHELLS))}"
        )
    return SHELLS[shell]({name: (text, list(options_of(name))) for name, text in commands.items()})


def options_of(command: str) -> Iterator[Option]:
    """The options that a command takes, in the order of its config, and its groups."""
    said = dict(explanations(command))
    picked = groups(command)
    named = {"data": ("stdlib", *names_in("data")), **dict.fromkeys(MODELS, (*shipped(), *names_in("model")))}
    parents = {name.rpartition(".")[0] for name in said}
    for name, text in said.items():
        if name in parents or name in picked or name.rpartition(".")[2] in ("recipe", "defaults"):
            continue
        paths = name in VERBATIM and name not in TEXTS
        yield Option(name, named.get(name, ()) if paths else values_in(command, name), paths, text)
    for group, choices in picked.items():
        yield Option(group, tuple(choices), False, said.get(group, ""))
    yield Option("recipe", tuple(recipes(command)), True, "options for a purpose, at once")


def shipped() -> list[str]:
    """The models that lie in the package (models.named.SHIPPED, without torch)."""
    return sorted(path.parent.name for path in (CONF.parent / "models").glob("*/config.json"))


def names_in(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def values_in(command: str, name: str) -> tuple[str, ...]:
    """true and false of a switch, the dtypes of a dtype; nothing of what may be anything."""
    leaf = name.rpartition(".")[2]
    if re.search(rf"^ *{leaf}: (?:true|false)\b", all_text(command), re.M):
        return ("true", "false")
    if leaf == "dtype" or leaf.endswith("_dtype"):
        return ("float32", "bfloat16", "float16")
    return ("auto", "cpu", "cuda") if leaf == "device" else ()


def all_text(command: str) -> str:
    """What conf/ has of a command and of all groups."""
    paths = [CONF / f"{command}.yaml", *(path for group in groups(command) for path in (CONF / group).glob("*.yaml"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*paths, CONF / "train" / "default.yaml"])


Told = Mapping[str, tuple[str, list[Option]]]  # by command what it is for, and its options


def quoted(text: str) -> str:
    """A text as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def in_fish(text: str) -> str:
    """A text as one word of fish, where a backslash counts within quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def for_bash(told: Told) -> str:
    rows = []
    for command, (_, options) in told.items():
        keys = " ".join([*(f"{option.name}=" for option in options), *FLAGS])
        rows.append(f"    {command}) keys={quoted(keys)} ;;")
    values = cases(told, lambda choices: quoted(" ".join(choices)))
    return BASH.format(commands=" ".join([*told, *TOP]), keys="\n".join(rows), values=values)


def cases(told: Told, written: Callable[[Sequence[str]], str]) -> str:
    """A line of a `case` for each option whose values are known or are paths; a shell writes choices as `written`."""
    return "\n".join(
        f"    {command}:{option.name}) values={written(option.choices)}{' paths=yes' if option.is_path else ''} ;;"
        for command, (_, options) in told.items()
        for option in options
        if option.choices or option.is_path
    )


def for_zsh(told: Told) -> str:
    def described(name: str, text: str) -> str:
        return quoted(name.replace(":", "\\:") + (":" + text.replace(":", "\\:") if text else ""))

    commands = " ".join([*(described(name, text) for name, (text, _) in told.items()), *map(quoted, TOP)])
    keys = [f"    {command}) keys=({' '.join(described(option.name, option.text) for option in options)}) ;;"
            for command, (_, options) in told.items()]  # fmt: skip
    values = cases(told, lambda choices: f"({' '.join(map(quoted, choices))})")
    flags = " ".join(map(quoted, FLAGS))
    return ZSH.format(commands=commands, keys="\n".join(keys), values=values, flags=flags)


def for_fish(told: Told) -> str:
    lines = ["complete -c limbeck -f"]
    first = "not __fish_seen_subcommand_from " + " ".join(told)
    lines += [f"complete -c limbeck -n {in_fish(first)} -a {in_fish(name)} -d {in_fish(text)}"
              for name, (text, _) in told.items()]  # fmt: skip
    lines += [f"complete -c limbeck -n {in_fish(first)} -l {name.removeprefix('--')}" for name in TOP]
    for command, (_, options) in told.items():
        within = f"complete -c limbeck -n {in_fish(f'__fish_seen_subcommand_from {command}')}"
        lines += [f"{within} -l {flag.removeprefix('--')}" for flag in FLAGS]
        for option in options:
            lines.append(f"{within} -a {in_fish(option.name + '=')} -d {in_fish(option.text)}")
            chosen = " ".join(f"{option.name}={choice}" for choice in option.choices)
            now = f"string match -q -- '{option.name}=*' (commandline -ct)"
            when = in_fish(f"__fish_seen_subcommand_from {command}; and {now}")
            if chosen:
                lines.append(f"complete -c limbeck -n {when} -a {in_fish(chosen)}")
            if option.is_path:
                lines.append(f"complete -c limbeck -n {when} -a {in_fish(FISH_PATHS.format(option.name))}")
    return "\n".join(lines)


TOP = ("--help", "--version", "--completion")
FISH_PATHS = "(__fish_complete_path (string replace '{0}=' '' -- (commandline -ct)) | string replace -r '^' '{0}=')"
SHELLS: dict[str, Callable[[Told], str]] = {"bash": for_bash, "zsh": for_zsh, "fish": for_fish}
BASH = """# limbeck --completion bash: put `eval "$(limbeck --completion bash)"` into ~/.bashrc
_limbeck() {{
  local line=${{COMP_LINE:0:COMP_POINT}} current word command="" keys="" values="" paths="" key value
  local -a words
  read -ra words <<<"$line"
  current=${{line##* }}
  if [[ ${{#words[@]}} -lt 2 || ( ${{#words[@]}} -eq 2 && -n $current ) ]]; then
    COMPREPLY=($(compgen -W '{commands}' -- "$current"))
    return
  fi
  command=${{words[1]}}
  if [[ $current != *=* ]]; then
    case "$command" in
{keys}
    --completion) keys='bash zsh fish' ;;
    esac
    COMPREPLY=($(compgen -W "$keys" -- "$current"))
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    return
  fi
  key=${{current%%=*}} value=${{current#*=}}
  case "$command:$key" in
{values}
  esac
  COMPREPLY=($(compgen -W "$values" -- "$value"))
  if [[ -n $paths ]]; then
    while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$value")
    compopt -o filenames 2>/dev/null
  fi
  # bash breaks words at = unless it is told not to; where it does not, the answer is the whole word
  [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${{COMPREPLY[@]/#/$key=}}")
}}
complete -F _limbeck limbeck"""
ZSH = """#compdef limbeck
# limbeck --completion zsh: put `eval "$(limbeck --completion zsh)"` into ~/.zshrc, after compinit
_limbeck() {{
  local -a commands keys values
  local key paths=""
  if (( CURRENT == 2 )); then
    commands=({commands})
    _describe 'command' commands
    return
  fi
  if [[ $words[2] == --completion ]]; then
    compadd bash zsh fish
    return
  fi
  if [[ $PREFIX != *=* ]]; then
    case $words[2] in
{keys}
    esac
    _describe 'option' keys -S =
    compadd -- {flags}
    return
  fi
  key=${{PREFIX%%=*}}
  compset -P '*='
  case $words[2]:$key in
{values}
  esac
  (( $#values )) && compadd -- $values
  [[ -n $paths ]] && _files
}}
compdef _limbeck limbeck"""
