"""Exports in the libraries that train and measure them: `make test-clients`, each skipped with a reason where a package
is missing. PEFT and TRL do a step on an exported hybrid and an exported Qwen3, and what they save is a model here, as
PEFT merges it; the newest transformers, in an environment of its own (LIMBECK_TRANSFORMERS names its Python), gives
the same logits as this one's and as ours. (lm-evaluation-harness: tests/test_harness.py.)"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.export import relative_rms
from limbeck.models.named import SHIPPED, model_folder
from limbeck.models.tokenizer import load_tokenizer
from limbeck.tests.client_helpers import client_python, prompts_of
from limbeck.tests.gguf_helpers import gguf_config, write_tokenizer
from limbeck.tests.helpers import limbeck, random_model

# What these libraries warn of is theirs.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
TARGETS = {
    "zoo": ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped hybrid and a random Qwen3, as `limbeck export` gives them."""
    root = tmp_path_factory.mktemp("exports")
    size = write_tokenizer(root / "words", "gpt-2")
    model = random_model(gguf_config("qwen3", size, max_position_embeddings=512), 5, torch.float32)
    save_model(model, root / "random", tokenizer_from=root / "words")
    for name, source in {"zoo": SHIPPED["zoo"], "qwen3": root / "random"}.items():
        code, _, err = limbeck("export", f"model={source}", f"output={root / name}", "dtype=float32")
        assert code == 0, err
    return {name: root / name for name in TARGETS}


def opened(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ids_of(folder: Path) -> torch.Tensor:
    return torch.tensor([[number for prompt in prompts_of(folder)[:3] for number in prompt][:64]])


@pytest.mark.parametrize("rslora", (False, True), ids=("plain", "rslora"))
@pytest.mark.parametrize("name", TARGETS)
def test_peft_trains_an_adapter_that_is_a_model(
    name: str, rslora: bool, exports: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    ids = ids_of(exports[name])
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=TARGETS[name], rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 5}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(opened(exports[name]), settings)
    before = step(model, ids)
    assert before > model(input_ids=ids, labels=ids).loss.item()
    model.save_pretrained(tmp_path / "adapter")
    ours = load_model(model_folder(str(tmp_path / "adapter")))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    theirs = load_model(tmp_path / "merged").state_dict()
    plain = load_model(exports[name]).state_dict()
    changed = 0
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-7)
        changed += not torch.equal(tensor, plain[key])
    assert changed >= len(TARGETS[name])
    with torch.no_grad():
        assert relative_rms(merged(ids).logits[0], ours(ids)[0]) < 1e-4


def step(model: Any, ids: torch.Tensor) -> float:
    """The loss before a step on it."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return float(loss.item())


@pytest.mark.parametrize("name", TARGETS)
def test_trl_trains_what_is_read_again(name: str, exports: dict[str, Path], tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    folder = exports[name]
    texts = [load_tokenizer(folder).decode(prompt, skip_special_tokens=True) for prompt in prompts_of(folder)[:4]]
    how = trl.SFTConfig(
        output_dir=str(tmp_path / "work"), max_steps=1, per_device_train_batch_size=4, max_length=64, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", learning_rate=1e-3, gradient_checkpointing=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=opened(folder), args=how, train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    ours, ids = load_model(tmp_path / "trained"), ids_of(folder)
    plain = load_model(folder).state_dict()
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in ours.state_dict().items())
    with torch.no_grad():
        assert relative_rms(trainer.model.eval()(ids).logits[0], ours(ids)[0]) < 1e-4
    assert load_tokenizer(tmp_path / "trained").vocab_size == load_tokenizer(folder).vocab_size


def test_the_newest_transformers_agrees(exports: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    python, script = (
        client_python("LIMBECK_TRANSFORMERS", "newest", "transformers"),
        Path(__file__).with_name("transformers_logits.py"),
    )
    request = {str(folder): ids_of(folder)[0].tolist() for folder in exports.values()}
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [python, script, tmp_path / "request.json", tmp_path / "answer.json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert tuple(map(int, answer["version"].split(".")[:2])) >= tuple(map(int, transformers.__version__.split(".")[:2]))
    for folder in exports.values():
        ids, newest = ids_of(folder), torch.tensor(answer["logits"][str(folder)])
        with torch.no_grad():
            assert relative_rms(load_model(folder)(ids)[0], newest) < 1e-5
            assert relative_rms(opened(folder)(ids).logits[0], newest) < 1e-5
