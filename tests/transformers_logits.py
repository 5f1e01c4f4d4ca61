"""Logits of folders by the transformers of an environment: `python transformers_logits.py REQUEST.json ANSWER.json`.

It knows nothing of limbeck: the request names folders with token ids, the answer has transformers' version and logits
[T, V] of each in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    import torch
    import transformers

    request, found = json.loads(Path(sys.argv[1]).read_text()), {}
    with torch.no_grad():
        for folder, ids in request.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            found[folder] = model(torch.tensor([ids])).logits[0].tolist()
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "logits": found}))
