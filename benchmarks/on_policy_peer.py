"""TRL's trainer of on-policy distillation (GKD) on models and prompts in a folder; benchmarks/on_policy.py runs it.

    PYTHON benchmarks/on_policy_peer.py FOLDER

in an environment of its own, with TRL, transformers and torch; nothing of limbeck is imported. FOLDER has `student/`,
`teacher/` and prompts.json. Prints seconds a step, bytes and tokens of a continuation as JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def status(field: str) -> int:
    """Bytes that the system states for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def collated(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left as `generate` wants them."""
    longest = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row["ids"])) + row["ids"] for row in rows])
    mask = torch.tensor([[0] * (longest - len(row["ids"])) + [1] * len(row["ids"]) for row in rows])
    # The trainer replaces the last three by what is generated.
    return {"prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask, "labels": ids}


def main() -> None:
    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    root = Path(sys.argv[1])
    given = json.loads((root / "prompts.json").read_text())
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what it is now
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    student.generation_config.eos_token_id = given["ends"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "student")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    seconds, lengths = [], []

    class Timed(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            seconds.append(time.perf_counter())
            loss = super().training_step(model, inputs, *rest)
            lengths.append(float((inputs["labels"] >= 0).sum() / len(inputs["labels"])))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        how = GKDConfig(
            output_dir=folder, per_device_train_batch_size=given["batch"], max_new_tokens=given["new_tokens"],
            lmbda=1.0, beta=1.0, temperature=1.0, learning_rate=1e-4, lr_scheduler_type="cosine", adam_beta2=0.95,
            num_train_epochs=1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        rows = datasets.Dataset.from_list([{"ids": ids} for ids in given["prompts"]])
        Timed(
            model=student, teacher_model=teacher, args=how, train_dataset=rows, processing_class=tokenizer,
            data_collator=lambda batch: collated(batch, pad),
        ).train()  # fmt: skip
    seconds.append(time.perf_counter())
    steps = [later - earlier for earlier, later in itertools.pairwise(seconds)][1:]
    answer = {"seconds": statistics.median(steps), "bytes": status("VmHWM") - before,
              "length": statistics.fmean(lengths)}  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
