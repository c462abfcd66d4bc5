"""Text from a checkpoint, token by token."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import typer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ultramem.configuration.field_types import check_types
from ultramem.data.tokenizers import ChosenTokenizer
from ultramem.device import autocast
from ultramem.errors import ConfigError, UltraMemError, system_reason
from ultramem.evaluation.sampling import check_sampling, sample
from ultramem.files.json_files import write_json
from ultramem.hosts.olmo_core.model import MemoryTransformer
from ultramem.runs.checkpoints import find_checkpoint
from ultramem.runs.layout import SAMPLES_NAME
from ultramem.runs.tokenizer import find_tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How a text is continued. An invalid value raises `ConfigError` on construction.

    Attributes:
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: tokens to choose among, the most probable; None for all.
        top_p: probability of the tokens to choose among, the most probable, in (0, 1]; None for all.
        seed: of the random numbers.
        max_new_tokens: where to stop, if the document does not end before.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be at least 0")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True)
class Sample:
    """A text, its prompt included, and how it was made."""

    prompt: str
    text: str
    config: SamplingConfig


class TextGenerator:
    """A model with the tokenizer of its training data.

    Every token is computed anew from the `context_length` tokens before it, since OLMo-core keeps keys and values
    only with FlashAttention. That will do for a look at what a run has learnt; the transformers host is the fast way.

    Args:
        model: in evaluation mode.
        tokenizer: special tokens written out in a prompt are ordinary text, as they were in training.
        context_length: most tokens that the model reads, such as the sequence length of its training.
        run: the run directory.
    """

    def __init__(self, model: MemoryTransformer, tokenizer: ChosenTokenizer, context_length: int, run: Path) -> None:
        self.model = model
        self.run = run
        self.tokenizer = tokenizer
        self.tokenizer.tokenizer.encode_special_tokens = True
        self.context_length = context_length

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], device: str = "auto") -> TextGenerator:
        """The model of a checkpoint with the tokenizer of its run.

        Args:
            path: a run directory for its latest complete checkpoint, or a checkpoint's own directory.
            device: `cpu`, `cuda`, or `auto` for CUDA where there is a device.

        Raises:
            ConfigError: there is no such device.
            UltraMemError: the checkpoint or the tokenizer is missing, damaged or another than in training.
        """
        checkpoint = find_checkpoint(path)
        tokenizer = find_tokenizer(checkpoint)
        return cls(checkpoint.load_model(device), tokenizer, checkpoint.config.data.sequence_length, checkpoint.run)

    def stream(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """The continuation of a prompt, piece by piece, to the end of the document or of `max_new_tokens`.

        A character of several tokens comes when it is complete, and not at all if it is cut off. The same arguments
        give the same text.

        Args:
            prompt: beginning of the text; if it is empty, that of a document.
            config: how to choose the tokens.

        Raises:
            UltraMemError: the model's output is not finite.
        """
        tokenizer, eos_token_id = self.tokenizer.tokenizer, self.tokenizer.eos_token_id
        tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [eos_token_id]
        decoder = DecodeStream(ids=tokens)
        # The CPU draws the tokens, so that they do not depend on the device of the model.
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
        """Logits (vocab_size,) of the token that follows, float32 on the CPU.

        Raises:
            UltraMemError: they are not finite.
        """
        device = self.model.device
        context = torch.tensor([tokens[-self.context_length :]], device=device)
        with autocast(device):
            logits = self.model(context, logits_to_keep=1)
        logits = logits[0, -1, : self.tokenizer.vocab_size].float().cpu()  # the embedding may have more rows
        if not logits.isfinite().all():
            raise UltraMemError("the model's output is not finite: its training diverged; use an earlier checkpoint")
        return logits


def read_prompt(path: Path) -> str:
    """The whole text of a file.

    Raises:
        UltraMemError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else "not UTF-8 text"
        raise UltraMemError(f"{path} cannot be read ({reason}); name a text file with --prompt-file") from error


def show_samples(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    num_samples: int = 1,
    device: str = "auto",
    save: bool = False,
) -> None:
    """Continue prompts with a checkpoint and print the texts as they grow.

    Args:
        path: a run directory for its latest complete checkpoint, or a checkpoint's own directory.
        prompts: beginnings of texts; without any, of a document.
        config: how to choose the tokens.
        num_samples: of each prompt; see `print_samples`.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is a device.
        save: whether to add them to the run's `samples.json`.

    Raises:
        ConfigError, UltraMemError: as in `TextGenerator` and `save_samples`.
    """
    generator = TextGenerator.from_checkpoint(path, device)
    samples = print_samples(generator, prompts or [""], config, num_samples)
    if save:
        typer.echo(f"added to {save_samples(generator.run, samples)}")


def print_samples(
    generator: TextGenerator, prompts: Sequence[str], config: SamplingConfig, num_samples: int = 1
) -> list[Sample]:
    """Continue each prompt `num_samples` times and print the texts as they grow.

    The first sample of a prompt has the seed of `config`, the others the seeds after it.
    """
    samples: list[Sample] = []
    for prompt in prompts:
        for number in range(num_samples):
            settings = replace(config, seed=config.seed + number)
            if len(prompts) * num_samples > 1:
                typer.secho(f"--- sample {len(samples) + 1}, seed {settings.seed}", bold=True)
            typer.echo(prompt, nl=False)
            text = prompt
            for piece in generator.stream(prompt, settings):
                typer.echo(piece, nl=False)
                text += piece
            typer.echo()
            samples.append(Sample(prompt, text, settings))
    return samples


def save_samples(run: Path, samples: Sequence[Sample]) -> Path:
    """Append to the run's `samples.json`, which `ultramem report` shows, and return its path.

    Raises:
        UltraMemError: the file is there and is not a list, or it cannot be written.
    """
    path = run / SAMPLES_NAME
    earlier = []
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UltraMemError(f"{path} cannot be understood ({error}); mend or remove it") from error
        if not isinstance(earlier, list):
            raise UltraMemError(f"{path} is not a list of samples; remove it")
    write_json(path, earlier + [{"prompt": s.prompt, "text": s.text, **asdict(s.config)} for s in samples])
    return path
