"""Generating text with a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import typer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ultramem.configuration.field_types import check_range, check_types
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.device import autocast
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.files.json_files import read_json
from ultramem.files.whole_files import check_output, read_bytes, write_json
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import SAMPLES_NAME
from ultramem.runs.tokenizer import find_tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. An invalid value raises `ConfigError` on construction.

    Attributes:
        temperature: sampling temperature; 0 is greedy.
        top_k: sample from the k most probable tokens; None for all.
        top_p: sample from the smallest set of tokens with this total probability, in (0, 1]; None for all.
        seed: seed for the random numbers.
        max_new_tokens: maximum number of tokens to generate; fewer if the document ends.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        _check_sampling(self.temperature, self.top_k, self.top_p)
        check_range(self, "temperature", most=100)
        check_range(self, "seed", least=0)
        check_range(self, "max_new_tokens", least=1)


@dataclass(frozen=True)
class Sample:
    """A generated text, including its prompt, and how it was made."""

    prompt: str
    text: str
    config: SamplingConfig


class TextGenerator:
    """A model in evaluation mode with the tokenizer of its training data, and its run directory.

    Special tokens written out in a prompt are ordinary text, as in training. For every token all `context_length`
    tokens before it are computed again, as OLMo-core has a KV cache only with FlashAttention. The transformers host is
    faster.
    """

    def __init__(self, model: MemoryTransformer, tokenizer: ChosenTokenizer, context_length: int, run: Path) -> None:
        self.model, self.tokenizer, self.context_length, self.run = model, tokenizer, context_length, run
        tokenizer.tokenizer.encode_special_tokens = True

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], device: str = "auto") -> TextGenerator:
        """Load the model of a checkpoint and the tokenizer of its run.

        Args:
            path: run directory, for its latest complete checkpoint, or a checkpoint's own directory.
            device: `cpu`, `cuda`, or `auto` for CUDA if available.

        Raises:
            ConfigError: the device is invalid or not available.
            UltraMemError: the checkpoint or tokenizer is missing or damaged, or the tokenizer is not that of training.
        """
        checkpoint = find_checkpoint(path)
        tokenizer = find_tokenizer(checkpoint)
        return cls(checkpoint.load_model(device), tokenizer, checkpoint.config.data.sequence_length, checkpoint.run)

    def stream(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """Yield the continuation of a prompt, piece by piece, up to the end of the document or `max_new_tokens`.

        With an empty prompt the model starts a new document. A character of several tokens is yielded when it is
        complete, and left out if the text ends before. The same arguments give the same text.

        Raises UltraMemError if the model's output is not finite, UnicodeEncodeError if the prompt is not Unicode.
        """
        tokenizer, eos_token_id = self.tokenizer.tokenizer, self.tokenizer.eos_token_id
        prompt.encode()  # the tokenizer's own error does not say what is wrong
        tokens = self.tokenizer.encode([prompt])[0].ids or [eos_token_id]
        decoder = DecodeStream(ids=tokens)
        # Tokens are drawn on the CPU, so that they do not depend on the model's device.
        generator = torch.Generator().manual_seed(config.seed)
        for _ in range(config.max_new_tokens):
            logits = self.next_logits(tokens)
            token = int(sample(logits, config.temperature, config.top_k, config.top_p, generator))
            if token == eos_token_id:
                return
            tokens.append(token)
            if piece := decoder.step(tokenizer, token):
                yield piece

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (vocab_size,) of the next token, float32 on the CPU. Raises UltraMemError if they are not finite."""
        device = self.model.device
        context = torch.tensor([tokens[-self.context_length :]], device=device)
        with autocast(device):
            logits = self.model(context, logits_to_keep=1)
        logits = logits[0, -1, : self.tokenizer.vocab_size].float().cpu()  # the embedding may have more rows
        if not logits.isfinite().all():
            raise UltraMemError(
                "the model's output is not finite, as its training diverged; use an earlier checkpoint: RUN/stepN, and "
                "for training --from-checkpoint stepN"
            )
        return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample a token from each row of logits.

    The logits are divided by the temperature. Then the `top_k` most probable tokens are kept, and of these the
    nucleus: the smallest set of most probable tokens whose total probability is at least `top_p` (Holtzman et al.,
    arXiv:1904.09751).

    Args:
        logits: (..., vocabulary), floating point.
        temperature: sampling temperature; 0 takes the most probable token, whatever the other arguments.
        top_k: number of tokens to sample from; None for all.
        top_p: total probability of the tokens to sample from, in (0, 1]; None for all.
        generator: random number generator on the device of the logits; None for PyTorch's default.

    Returns (...), int64, token ids. Raises ConfigError if a value is invalid.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    # With a largest logit of 0 the smallest temperature does not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, tokens = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[..., top_k:] = 0
    if top_p is not None:
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p] = 0
    rows = probabilities.view(-1, probabilities.shape[-1])
    drawn = torch.multinomial(rows, 1, generator=generator).view(*tokens.shape[:-1], 1)
    return tokens.gather(-1, drawn).squeeze(-1)


def read_prompt(path: Path) -> str:
    """Read a text file. Raises UltraMemError if it cannot be read, or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else "not UTF-8 text"
        raise UltraMemError(f"{path} cannot be read ({reason}); give a text file with --prompt-file") from error


def show_samples(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    device: str = "auto",
    save: bool = False,
) -> None:
    """Continue prompts with a checkpoint, as `print_samples` does; without any, the model starts a new document.

    `path` and `device` are those of `TextGenerator.from_checkpoint`. With `save` the samples are appended to the run's
    `samples.json`. Errors are those of `TextGenerator` and `save_samples`.
    """
    if save:
        samples_file = find_checkpoint(path).run / SAMPLES_NAME
        check_output(samples_file)
        _read_samples(samples_file)
    generator = TextGenerator.from_checkpoint(path, device)
    samples = print_samples(generator, prompts or [""], config, num_samples)
    if save:
        typer.echo(f"added to {save_samples(generator.run, samples)}")


def print_samples(
    generator: TextGenerator, prompts: Sequence[str], config: SamplingConfig, num_samples: int = 1
) -> list[Sample]:
    """Continue each prompt `num_samples` times and print the texts as they are generated.

    The first sample of a prompt uses the seed of `config`, the others the seeds after it.
    """
    samples: list[Sample] = []
    for prompt, number in ((prompt, number) for prompt in prompts for number in range(num_samples)):
        settings, text = replace(config, seed=config.seed + number), ""
        if len(prompts) * num_samples > 1:
            typer.secho(f"--- sample {len(samples) + 1}, seed {settings.seed}", bold=True)
        for piece in chain([prompt], generator.stream(prompt, settings)):
            typer.echo(piece, nl=False)
            text += piece
        typer.echo()
        samples.append(Sample(prompt, text, settings))
    return samples


def save_samples(run: Path, samples: Sequence[Sample]) -> Path:
    """Append to the run's `samples.json`, which `ultramem report` shows, and return its path.

    Raises UltraMemError if the existing file is not a list, or the file cannot be written.
    """
    path = run / SAMPLES_NAME
    added = [{"prompt": s.prompt, "text": s.text, **asdict(s.config)} for s in samples]
    write_json(path, _read_samples(path) + added)
    return path


def _read_samples(path: Path) -> list[Any]:
    """The samples in a file; none if it does not exist."""
    if not path.is_file():
        return []
    samples = read_json(path, "fix or remove it")
    if not isinstance(samples, list):
        raise UltraMemError(f"{path} is not a list of samples; remove it")
    return samples


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature={temperature}: must be 0 (always the most probable token) or above")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: must be at least 1; leave it out to choose among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: must be above 0 and at most 1; leave it out to choose among all tokens")
