"""lm-evaluation-harness runs a directory with memory on a task of its own, with local data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ultramem.hosts.transformers import UltraMemForCausalLM

pytest.importorskip("lm_eval")

WORDS = ["<eos>", "<pad>", "<unk>", *(f"w{number}" for number in range(3, 61))]
QUESTIONS = [
    {"question": "w3 w4 w5", "choices": ["w6", "w7 w8"], "answer": 0},
    {"question": "w9 w10", "choices": ["w11 w12 w13", "w14"], "answer": 1},
    {"question": "w30 w31 w32 w33", "choices": ["w34", "w35"], "answer": 1},
]


def test_multiple_choice(make_model: Callable[..., UltraMemForCausalLM], tmp_path: Path) -> None:
    model = make_model()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    directory, tasks = tmp_path / "model", tmp_path / "tasks"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tasks.mkdir()
    data = tasks / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    task = {
        "task": "words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tasks / "words.yaml").write_text(yaml.safe_dump(task))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "words",
        "--model_args", f"pretrained={directory},trust_remote_code=True,dtype=float32", "--include_path", str(tasks),
        "--output_path", str(tmp_path / "result"), "--log_samples", "--batch_size", "2",
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    (samples,) = (tmp_path / "result").rglob("samples_words_*.jsonl")
    lines = {line["doc_id"]: line for line in map(json.loads, samples.read_text().splitlines())}
    correct = 0
    for number, question in enumerate(QUESTIONS):
        scores = []
        prompt = tokenizer(question["question"]).input_ids
        for choice in question["choices"]:
            answer = tokenizer(choice).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores.append(sum(float(logits[0, place, token]) for place, token in zip(places, answer, strict=True)))
        found = [float(response[0][0]) for response in lines[number]["resps"]]
        assert found == pytest.approx(scores, rel=1e-4)
        correct += scores.index(max(scores)) == question["answer"]
    (summary,) = (tmp_path / "result").rglob("results_*.json")
    assert json.loads(summary.read_text())["results"]["words"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))
