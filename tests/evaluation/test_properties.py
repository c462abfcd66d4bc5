"""A run whose small files have any content is evaluated, or the file is named in one line."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import allowed, damaged, json_files, numbers, values
from ultramem.data.tokenizers import load_tokenizer
from ultramem.evaluation import SamplingConfig, evaluate
from ultramem.evaluation.generation import Sample, TextGenerator, save_samples
from ultramem.evaluation.tasks import TaskEvaluation
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.results import TaskResult
from ultramem.runs.tokenizer import find_tokenizer

SUMMARY = {"system": "dense", "eos_token_id": 0, "train_tokens": 448}
EVALUATION = {"checkpoint": "step7", "split": "heldout", "tokens": 3, "loss": 2.5, "complete": True}
RESULT = {"name": "piqa", "metric": "accuracy", "value": 0.5, "standard_error": 0.1, "questions": 5, "chance": 0.5}
TASKS = {"checkpoint": "step7", "context_length": 16, "max_questions": None, "results": [RESULT | {"cut": 0.0}]}
SAMPLES = [{"prompt": "a", "text": "ab", "temperature": 0.8, "seed": 1}]


@pytest.fixture(autouse=True)
def restored(shared_run: Any) -> Any:
    before = {path: path.read_bytes() for path in shared_run.path.iterdir() if path.is_file()}
    yield
    for path in shared_run.path.iterdir():
        if path.is_file():
            path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


@given(content=json_files(SUMMARY))
def test_any_summary(shared_run: Any, content: bytes) -> None:
    (shared_run.path / "summary.json").write_bytes(content)
    with allowed():
        assert find_tokenizer(find_checkpoint(shared_run.path)).eos_token_id in range(258)


@given(data=st.data())
def test_any_configuration(shared_run: Any, data: st.DataObject) -> None:
    path = shared_run.path / "config.yaml"
    before = path.read_text()
    path.write_bytes(data.draw(damaged(before)))
    try:
        with allowed():
            find_checkpoint(shared_run.path)
    finally:
        path.write_text(before)


@settings(max_examples=settings().max_examples // 5)
@given(content=json_files(EVALUATION))
def test_any_earlier_evaluation(shared_run: Any, content: bytes) -> None:
    (shared_run.path / "evaluation.json").write_bytes(content)
    with allowed():
        evaluate(shared_run.path, max_tokens=16, unigram=False, device="cpu").save()


@given(content=json_files(TASKS))
def test_any_earlier_tasks(shared_run: Any, content: bytes) -> None:
    path = shared_run.path / "tasks.json"
    path.write_bytes(content)
    new = [TaskResult("sciq", "accuracy", 0.25, 0.1, 5, 0.25)]
    with allowed():
        TaskEvaluation("step7", new, 16, 1.0, shared_run.path).save()
        assert "sciq" in [result["name"] for result in json.loads(path.read_text())["results"]]


@given(content=json_files(SAMPLES))
def test_any_earlier_samples(shared_run: Any, content: bytes) -> None:
    path = shared_run.path / "samples.json"
    path.write_bytes(content)
    with allowed():
        save_samples(shared_run.path, [Sample("c", "cd", SamplingConfig())])
        assert json.loads(path.read_text())[-1]["text"] == "cd"


@given(name=st.sampled_from(["temperature", "top_k", "top_p", "seed", "max_new_tokens"]), value=values | numbers)
def test_any_sampling(shared_run: Any, untrained_model: Any, name: str, value: Any) -> None:
    tokenizer = load_tokenizer(str(shared_run.path / "tokenizer.json"))
    with allowed():
        config = SamplingConfig(**{name: value})
        list(islice(TextGenerator(untrained_model, tokenizer, 16, shared_run.path).stream("a", config), 1))


@settings(max_examples=settings().max_examples // 2)
@given(name=st.sampled_from(["max_tokens", "batch_size", "sequence_length"]), value=st.integers() | st.just(10**5000))
def test_any_size_of_an_evaluation(shared_run: Any, name: str, value: int) -> None:
    with allowed():
        evaluate(shared_run.path, unigram=False, device="cpu", **{name: value})
