"""What vLLM answers, as a program of its own: `python vllm_answers.py REQUEST.json ANSWER.json`, in vLLM's environment.

It knows nothing of limbeck: the request names folders with prompts, texts that vLLM makes tokens of or token ids; the
answer has the prompt's tokens, greedy ones after it, and the log-probability of every token of each prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(
    folder: str, prompts: list[str] | list[list[int]], tokens: int, length: int, dtype: str
) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype=dtype, max_model_len=length, enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=4, skip_tokenizer_init=False,
    )  # fmt: skip
    how = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=0)
    requests = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    given = llm.generate(requests, how, use_tqdm=False)
    return [
        {
            "prompt": list(each.prompt_token_ids),
            "tokens": list(each.outputs[0].token_ids),
            "logprobs": [
                place[number].logprob
                for place, number in zip(each.prompt_logprobs[1:], each.prompt_token_ids[1:], strict=True)
            ],
        }
        for each in given
    ]


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    found = {
        folder: answers(folder, prompts, request["tokens"], request["length"], request["dtype"])
        for folder, prompts in request["folders"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps(found))
