"""Templates as released models have them, in our words, and conversations drawn for them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import tokenizers
from limbeck.models.named import SHIPPED

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|end|>", "<SPECIAL_10>", "<SPECIAL_11>")

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Headers, a date, bos in the template, alternation enforced.
LLAMA = """{{- bos_token }}{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set ns = namespace(first=true) %}{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}
{%- set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|head|>system<|head|>\\n\\nYear: ' + strftime_now('%Y') + '\\n' + system + '<|end|>' }}
{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) and m.role != 'tool' %}
{{- raise_exception('Roles must alternate user/assistant') }}{% endif %}
{{- '<|head|>' + m.role + '<|head|>\\n\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|end|>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|head|>\\n\\n' }}{% endif %}"""
# /think and /no_think in the system message, enable_thinking, thoughts cut from what is past.
NEMOTRON = """{%- set ns = namespace(think=true) %}{%- if enable_thinking is defined %}
{%- set ns.think = enable_thinking %}
{%- endif %}{%- for m in messages %}{%- if m.role in ['system', 'user'] %}
{%- if '/no_think' in m.content %}{% set ns.think = false %}{% elif '/think' in m.content %}
{%- set ns.think = true %}{% endif %}
{%- endif %}{% endfor %}{{- bos_token }}{%- if messages[0].role != 'system' %}{{ '<SPECIAL_10>System\\n\\n' }}
{%- endif %}
{%- for m in messages %}{%- if m.role == 'system' %}
{{- '<SPECIAL_10>System\\n' + m.content.replace('/no_think', '').replace('/think', '').strip() + '\\n' }}
{%- elif m.role == 'user' %}
{{- '<SPECIAL_11>User\\n' + m.content.replace('/no_think', '').replace('/think', '').strip() + '\\n' }}
{%- elif m.role == 'tool' %}{{ '<SPECIAL_11>User\\n<TOOL_RESPONSE>' + m.content + '</TOOL_RESPONSE>\\n' }}
{%- else %}{{ '<SPECIAL_11>Assistant\\n' }}{% generation %}{%- set content = m.content %}
{%- if loop.last and m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content.strip() + '\\n</think>\\n\\n' }}
{%- elif not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- content.strip() + '</s>' }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\\n' }}
{%- if ns.think %}{{ '<think>\\n' }}{% else %}{{ '<think></think>' }}{% endif %}{% endif %}"""
# Tools listed before everything, calls written out with tojson, reasoning of the last turns alone (Qwen3's way).
TOOLS = """{%- if tools %}{{ '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools\\n' }}{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seek=true) %}{%- for m in messages[::-1] %}
{%- if ns.seek and m.role == 'user' %}{% set ns.seek = false %}{% set ns.last = messages|length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}{%- for m in messages %}{%- if m.role == 'user' %}
{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{%- set content = m.content if m.content is string else '' %}{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}
{%- generation %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}{%- for call in m.tool_calls or [] %}{%- if call.function %}{% set call = call.function %}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
MACROS = """{% macro turn(m, last) -%}[{{ m.role | upper }}{% if m.name %}:{{ m.name }}{% endif %}]
{%- for line in m.content.split('\\n') %}{% if line == 'stop' %}{% break %}{% endif %}{{ line }}
{%- if not loop.last %}|{% endif %}
{%- endfor %}{%- endmacro %}{%- for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}
{%- if m.role == 'assistant' %}{{ '<|head|>' }}{% generation %}{{ turn(m, loop.last) }}{{ eos_token }}
{%- endgeneration %}
{%- else %}{{ turn(m, loop.last) }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>' }}
{%- endif %}"""
# No special token but eos, options of tojson, whatever is none.
PLAIN = """{%- if documents is not none or tools is not none %}{{ 'with: ' }}{{ (tools or []) | tojson(indent=1) }}
{%- endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}{{ 'Answer: ' }}{% generation %}{{ m.content }}
{{- eos_token }}{% endgeneration %}
{%- else %}{{ m.role | title }}: {{ {'says': m.content, 'é': 1} | tojson(
separators=(',', ':'), sort_keys=True, ensure_ascii=true) }}{% endif %}
{{- '\\n' }}{% endfor %}{%- if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"""
# bos in every rendering, the system message within the first user's (Mistral's and Gemma's way).
FOLDED = """{{ bos_token }}{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}
{%- set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}{%- for m in rest %}
{%- if m.role == 'assistant' %}
{%- generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- else %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"""
REASONS = """{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}
{%- generation %}
{%- if m['reasoning_content'] is string and m['reasoning_content'] %}
{{- '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}
{{- m['content'] }}{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}
{{- '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '<think>' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML, "llama": LLAMA, "nemotron": NEMOTRON, "tools": TOOLS, "macros": MACROS, "plain": PLAIN,
    "folded": FOLDED, "reasons": REASONS,
}  # fmt: skip


def unmarked(template: str) -> str:
    """Without {% generation %} blocks, and with the white space that they took."""
    taken = {"{%-": "{{- '' }}", "{%": "{{ '' }}"}
    return re.sub(r"(\{%-?) (end)?generation %\}", lambda match: taken[match.group(1)], template)


def chat_folder(folder: Path, template: str | None, **settings: Any) -> Path:
    """The shipped tokenizer with the special tokens of chats, and a template."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer.from_file(str(SHIPPED["zoo"] / "tokenizer.json"))
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"} | settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


WORDS = (
    "hello",
    "def f(x):\n    return x",
    "naïve é 数字",
    "a < b > c",
    "stop",
    "",
    "  spaces  ",
    "line\n\nline",
    "<think",
    '"quoted"\\',
)


def drawn_text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 4)))


def drawn_row(seed: int, tools: bool = False) -> dict[str, Any]:
    """A row with `messages`: a system message or none, exchanges, thoughts in their field or in the content, calls."""
    draw = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.5:
        word = draw.choice(("", " /think", "/no_think"))
        messages.append({"role": "system", "content": "Be brief." + word})
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": drawn_text(draw)})
        answer: dict[str, Any] = {"role": "assistant", "content": drawn_text(draw) or "yes"}
        thinks = draw.random()
        if thinks < 0.3:
            answer["reasoning_content"] = drawn_text(draw)
        elif thinks < 0.5:
            answer["content"] = f"<think>\n{drawn_text(draw)}\n</think>\n\n{answer['content']}"
        elif thinks < 0.6:
            answer["reasoning_content"] = None
        messages.append(answer)
        if tools and draw.random() < 0.4:
            call = {"name": "look", "arguments": {"place": drawn_text(draw), "n": draw.random()}}
            answer["tool_calls"] = [{"type": "function", "function": call}]
            answer["content"] = draw.choice(("", answer["content"]))
            messages.append({"role": "tool", "content": drawn_text(draw)})
            messages.append({"role": "assistant", "content": drawn_text(draw) or "done"})
    row: dict[str, Any] = {"messages": messages}
    if tools and draw.random() < 0.6:
        row["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {"é": [1, 2.5, None]}}}]
    return row
