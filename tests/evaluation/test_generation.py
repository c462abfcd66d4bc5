"""Generated text against a loop over the whole model, and what ends it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from ultramem.errors import ConfigError, UltraMemError
from ultramem.evaluation import (
    Sample,
    SamplingConfig,
    TextGenerator,
    print_samples,
    read_prompt,
    save_samples,
)

GREEDY = SamplingConfig(temperature=0, max_new_tokens=40)


def ids(run: Any, text: str) -> list[int]:
    return Tokenizer.from_file(str(run.data / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def prefer(run: Any, tokens: list[int]) -> TextGenerator:
    """A generator whose model writes `tokens` one after the other, again and again, whatever the prompt."""
    generator = TextGenerator.from_checkpoint(run.path)
    written = itertools.cycle(tokens)

    def model(context: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        logits = torch.zeros(1, logits_to_keep, 384)
        logits[..., next(written)] = 50
        logits[..., 258:] = 100  # rows of the embedding that no token has
        return logits

    model.device = torch.device("cpu")
    generator.model = model
    return generator


def test_greedy_text_is_that_of_the_whole_model(run: Any) -> None:
    tokens = ids(run, "import")
    with torch.no_grad():
        for _ in range(40):  # longer than the context of 16
            logits = run.model(torch.tensor([tokens[-16:]]))[0, -1, :258]
            tokens.append(int(logits.argmax()))
    assert 0 not in tokens
    expected = Tokenizer.from_file(str(run.data / "tokenizer.json")).decode(tokens).rstrip("\ufffd")
    text = "import" + "".join(TextGenerator.from_checkpoint(run.path).stream("import", GREEDY))
    assert text == expected


def test_same_seed_same_text(run: Any) -> None:
    generator = TextGenerator.from_checkpoint(run.path)
    first, again, other = (
        "".join(generator.stream("import", SamplingConfig(temperature=1.5, seed=seed, max_new_tokens=20)))
        for seed in (5, 5, 6)
    )
    assert first == again != other


def test_the_random_state_of_the_program_is_left_alone(run: Any) -> None:
    state = torch.get_rng_state()
    list(TextGenerator.from_checkpoint(run.path).stream("a", SamplingConfig(max_new_tokens=3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_text_stops_at_the_end_of_the_document(run: Any) -> None:
    generator = prefer(run, [*ids(run, "ok"), 0])
    assert "".join(generator.stream("", GREEDY)) == "ok"


def test_text_stops_after_max_new_tokens(run: Any) -> None:
    generator = prefer(run, ids(run, "ok"))
    assert "".join(generator.stream("", SamplingConfig(temperature=0, max_new_tokens=5))) == "okoko"


def test_characters_come_whole(run: Any) -> None:
    text = "é日本𝄞x"
    generator = prefer(run, ids(run, text))
    assert list(generator.stream("", SamplingConfig(temperature=0, max_new_tokens=13))) == list(text)
    generator = prefer(run, ids(run, text))
    assert list(generator.stream("", SamplingConfig(temperature=0, max_new_tokens=11))) == list(text[:3])


def test_bytes_that_are_no_text(run: Any) -> None:
    invalid = ids(run, "é")[1]
    assert "".join(prefer(run, [invalid, *ids(run, "ab")]).stream("", GREEDY)).startswith("\ufffdab\ufffdab")


def test_without_a_prompt_a_document_begins(run: Any) -> None:
    generator = TextGenerator.from_checkpoint(run.path)
    contexts = []
    generator.next_logits = lambda tokens: contexts.append(list(tokens)) or torch.zeros(258)
    list(generator.stream("", SamplingConfig(temperature=0, max_new_tokens=1)))
    list(generator.stream("<|endoftext|>", SamplingConfig(temperature=0, max_new_tokens=1)))
    assert contexts == [[0], ids(run, "<|endof") + ids(run, "text|>")]  # spelled out it is no special token


def test_a_model_that_diverged(run: Any) -> None:
    with torch.no_grad():
        run.model.lm_head.norm.weight.fill_(float("nan"))
    run.save_checkpoint(8)
    with pytest.raises(UltraMemError, match=r"the model's output is not finite.*use an earlier checkpoint"):
        list(TextGenerator.from_checkpoint(run.path).stream("a", GREEDY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ],
)
def test_values_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**options)


def test_samples_have_seeds_of_their_own(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    generator = TextGenerator.from_checkpoint(run.path)
    config = SamplingConfig(seed=3, max_new_tokens=4)
    samples = print_samples(generator, ["a", "b"], config, num_samples=2)
    assert [(sample.prompt, sample.config.seed) for sample in samples] == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    printed = capsys.readouterr().out
    for sample in samples:
        assert sample.text == sample.prompt + "".join(generator.stream(sample.prompt, sample.config))
        assert f"seed {sample.config.seed}\n{sample.text}\n" in printed


def test_saved_samples_are_added_to_the_others(run: Any) -> None:
    first = Sample("a", "añ", SamplingConfig(temperature=0.5, top_k=7, seed=1, max_new_tokens=9))
    save_samples(run.path, [first])
    path = save_samples(run.path, [Sample("", "x", SamplingConfig(top_p=0.9))])
    assert path == run.path / "samples.json"
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"prompt": "a", "text": "añ", "temperature": 0.5, "top_k": 7, "top_p": None, "seed": 1, "max_new_tokens": 9},
        {"prompt": "", "text": "x", "temperature": 0.8, "top_k": None, "top_p": 0.9, "seed": 0, "max_new_tokens": 128},
    ]


@pytest.mark.parametrize(("content", "message"), [("[", "is damaged"), ("{}", "is not a list of samples")])
def test_a_damaged_samples_file_is_kept(run: Any, content: str, message: str) -> None:
    path = run.path / "samples.json"
    path.write_text(content)
    with pytest.raises(UltraMemError, match=f"samples.json {message}"):
        save_samples(run.path, [Sample("a", "b", GREEDY)])
    assert path.read_text() == content


def test_prompts_from_files(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("über\n".encode())
    assert read_prompt(path) == "über\n"
    path.write_bytes(b"\xff")
    with pytest.raises(UltraMemError, match=r"prompt.txt cannot be read \(not UTF-8 text\)"):
        read_prompt(path)
    with pytest.raises(UltraMemError, match=r"missing cannot be read \(No such file or directory\)"):
        read_prompt(tmp_path / "missing")
