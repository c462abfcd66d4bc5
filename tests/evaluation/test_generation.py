"""Generated text against a loop over the whole model, what ends it, and sampling against distributions by hand."""

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
    sample,
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
        run.model.lm_head.norm.weight.fill_(3e38)
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
    for made in samples:
        assert made.text == made.prompt + "".join(generator.stream(made.prompt, made.config))
        assert f"seed {made.config.seed}\n{made.text}\n" in printed


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


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
LOGITS = PROBABILITIES.log()
DRAWS = 40_000


def frequencies(logits: torch.Tensor, **options: float | None) -> torch.Tensor:
    drawn = sample(logits.expand(DRAWS, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(drawn, minlength=logits.numel()) / DRAWS


def assert_distributed(found: torch.Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected) / sum(expected)
    assert torch.equal(found > 0, wanted > 0)
    assert (found - wanted).abs().max() < 5 * (0.25 / DRAWS) ** 0.5  # five standard deviations


def test_without_limits_tokens_have_the_probabilities_of_the_softmax() -> None:
    assert_distributed(frequencies(LOGITS + 3), PROBABILITIES.tolist())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    assert_distributed(
        frequencies(LOGITS, temperature=temperature), [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    )


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.94, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_nucleus_is_the_smallest_set_of_that_probability(top_p: float, kept: list[int]) -> None:
    expected = [p if token in kept else 0.0 for token, p in enumerate(PROBABILITIES.tolist())]
    assert_distributed(frequencies(LOGITS, top_p=top_p), expected)


def test_nucleus_that_is_met_exactly_takes_no_further_token() -> None:
    quarters = torch.tensor([0.25, 0.5, 0.25]).log()
    assert_distributed(frequencies(quarters, top_p=0.5), [0.0, 1.0, 0.0])


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k(top_k: int, kept: list[int]) -> None:
    expected = [p if token in kept else 0.0 for token, p in enumerate(PROBABILITIES.tolist())]
    assert_distributed(frequencies(LOGITS, top_k=top_k), expected)


def test_top_k_takes_exactly_k_of_equal_tokens() -> None:
    assert (frequencies(torch.zeros(10), top_k=3) > 0).sum() == 3


def test_top_p_is_a_share_of_what_top_k_and_temperature_leave() -> None:
    # Squared and cut to three: 0.16, 0.0625, 0.04 of 0.2625. The first two have 0.848 of it.
    assert_distributed(frequencies(LOGITS, temperature=0.5, top_k=3, top_p=0.8), [0.0, 0.16, 0.0, 0.0625, 0.0])


def test_temperature_0_is_greedy() -> None:
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, 0), logits.argmax(-1))


def test_a_tiny_temperature_is_greedy_too() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4 + 1], [float("-inf"), 0.0, -1.0]])
    assert sample(logits, 1e-300).tolist() == [2, 1]


def test_same_seed_same_tokens() -> None:
    logits = torch.zeros(100, 1000)
    first, again, other = (sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0: must be above 0"),
        ({"top_p": 1.1}, r"top_p=1.1: .* at most 1"),
    ],
)
def test_arguments_that_cannot_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(LOGITS, **options)
