"""A small chain on conversations: the shipped model learns to answer, is pruned, and learns from itself what that lost.

    python -m limbeck.benchmarks.chat FOLDER [--teacher-steps 240] [--steps 240] [--parameters 0.75]

Conversations are made of the standard library: a question is a function's first line of documentation and its name, the
answer its code, and the thought before half of the answers its arguments. The loss is on the assistant's tokens alone.
Prints the loss on held-out answers and thoughts of the shipped model, of the teacher after it learnt to answer, and of
students: by plain selection, repaired, and that one distilled; how much of what the first two lost is recovered; and
answers with reasoning on and off.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import shutil
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck import api
from limbeck.distill.gap.measure import GapReport
from limbeck.distill.losses import cross_entropy_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.parallel import prepare
from limbeck.distill.text import resolve
from limbeck.distill.text.documents import stdlib_files
from limbeck.distill.text.reading import TextData
from limbeck.distill.trainer import train
from limbeck.models.generate.chat import ChatTemplate
from limbeck.models.generate.engine import Engine, Request
from limbeck.models.generate.sampling import Sampling
from limbeck.models.hybrid import HybridLM
from limbeck.models.named import SHIPPED
from limbeck.models.provenance import provenance

TEMPLATE = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '# Answer:\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>\\n' }}{% endif %}{% generation %}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>\\n' }}{% endif %}
{{- m.content + eos_token }}{% endgeneration %}{% else %}{{ '# Question: ' + m.content + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '# Answer:\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>\\n' }}{% endif %}{% endif %}"""
LONGEST = 400  # characters of an answer
QUESTION = "Write the function clamp. Returns the value, between low and high."


def conversations() -> Iterator[dict[str, Any]]:
    """A row for each short function of the standard library that says what it does."""
    for document in stdlib_files():
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (said := ast.get_docstring(node)) or len(node.body) < 2:
                continue
            lines = document.text.splitlines()
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            code = textwrap.dedent("\n".join(head + lines[node.body[1].lineno - 1 : node.end_lineno]))
            if not 40 < len(code) < LONGEST:
                continue
            names = [argument.arg for argument in node.args.args]
            answer: dict[str, Any] = {"role": "assistant", "content": code}
            answer["reasoning_content"] = f"It takes {', '.join(names) or 'nothing'}."
            question = f"Write the function {node.name}. {said.splitlines()[0]}"
            yield {"messages": [{"role": "user", "content": question}, answer]}


def start_folder(folder: Path) -> Path:
    """The shipped model with a chat template."""
    shutil.copytree(SHIPPED["zoo"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def learn_answers(model: HybridLM, data: TextData, steps: int, size: dict[str, Any], folder: Path) -> None:
    """Cross-entropy on the answers of the training split."""
    assert model.tokenizer is not None
    text = resolve.text_in_tokens(data, "train", model.tokenizer.folder)
    options = TrainOptions(steps, 2e-3, optimizer="muon", warmup_steps=10, save_every=steps)
    model.requires_grad_(True).train()
    prepared = prepare(model, torch.float32)
    train(
        prepared, cross_entropy_loss, lambda start: text.train_batches(**size, seed=0, start=start), options, folder,
        on_step=lambda record: say_step("teacher", record),
    )  # fmt: skip
    model.eval()


def say_step(what: str, record: dict[str, Any]) -> None:
    if record["step"] % 20 == 0:
        print(f"{what}: step {record['step']}, loss {record.get('loss', float('nan')):.3f}", flush=True)


def losses(report: GapReport, named: str) -> str:
    parts = report.models[named].by_part
    return ", ".join(f"{part} {group.cross_entropy.value:.3f}" for part, group in parts.items())


def recovered(report: GapReport, before: str) -> float:
    """The share of the held-out loss above the teacher's that distillation took away."""
    loss = {name: model.cross_entropy.value for name, model in report.models.items()}
    return (loss[before] - loss["distilled"]) / (loss[before] - loss["teacher"])


def answers(model: HybridLM, folder: Path) -> dict[str, str]:
    """The model's answer with reasoning on and off."""
    tokenizer, template = model.tokenizer, ChatTemplate(folder)
    assert tokenizer is not None
    switches = {"on": True, "off": False}
    prompts = [template.render([{"role": "user", "content": QUESTION}], thinks) for thinks in switches.values()]
    stop = (tokenizer.eos_token_id,)
    requests = [Request(tokenizer.encode(prompt), 60, Sampling(0.0), stop_tokens=stop) for prompt in prompts]
    engine = Engine(model, max_length=256, slots=2, tokenizer=tokenizer, prepare=False)
    return {name: each.text for name, each in zip(switches, engine.complete(requests), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher-steps", type=int, default=240)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rate", type=float, default=4e-4, help="of distilling: the repaired student is near already")
    parser.add_argument("--parameters", type=float, default=0.75)
    parser.add_argument("--seq-len", type=int, default=192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    begun, path, home = time.perf_counter(), given.folder / "conversations.jsonl", given.folder
    data: dict[str, Any] = {"path": str(path), "reasoning_share": 0.5}
    own: dict[str, Any] = {"batch": given.batch, "seq_len": given.seq_len}
    held_out: dict[str, Any] = {"tokens": given.tokens, **own, "resamples": 200, "worst": 0}
    if not (home / "teacher").exists():  # else what an earlier run has taught
        home.mkdir(parents=True)
        rows = list(conversations())
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} conversations")
        model = api.load(start_folder(home / "start"))
        size = {"batch_size": given.batch, "seq_len": given.seq_len}
        learn_answers(model, TextData(**data), given.teacher_steps, size, home / "training")
        api.export(model, home / "teacher")
    teacher = api.load(home / "teacher")
    scores = api.score(teacher, data, **own, tokens=8192, depth_tokens=2048)
    plain = api.prune(teacher, scores, parameters=given.parameters, repair=False)
    pruned = api.prune(teacher, scores, parameters=given.parameters, data=data, tokens=16384, **own)
    api.export(pruned, home / "pruned")
    student = api.load(home / "pruned")
    done = api.distill(
        teacher, student, data, steps=given.steps, learning_rate=given.rate, optimizer="muon", **own
    )  # fmt: skip
    api.export(student, home / "distilled")
    students = {"plain": plain, "pruned": pruned, "distilled": student}
    report = api.evaluate(teacher, {"shipped": home / "start", **students}, data, **held_out).report
    print(f"held-out loss on the assistant's tokens, nats a token ({report.documents} conversations):")
    for name in ("shipped", "teacher", *students):
        print(f"  {name}: {losses(report, name)}; in all {report.models[name].cross_entropy.value:.3f}")
    print(
        f"distilling: {done.steps} steps, {done.tokens:,} tokens, loss {done.records[0]['loss']:.3f} -> {done.loss:.3f}"
    )
    for name in ("plain", "pruned"):
        print(f"recovered of what {name} lost: {recovered(report, name):.2f}")
    for name in ("teacher", "distilled"):
        for switch, text in answers(api.load(home / name), home / name).items():
            print(f"{name}, reasoning {switch}: {text!r}")
    print(f"{time.perf_counter() - begun:.0f} s; {provenance()}")


if __name__ == "__main__":
    main()
