"""The tokenizer of a run."""

from __future__ import annotations

from ultramem.data.token_files import load_manifest
from ultramem.data.tokenizers import ChosenTokenizer, end_of_text_tokens, load_model_tokenizer
from ultramem.errors import UltraMemError
from ultramem.runs.checkpoints import Checkpoint
from ultramem.runs.layout import SUMMARY_NAME, TOKENIZER_NAME
from ultramem.runs.summary import EOS_TOKEN_ID, read_summary


def find_tokenizer(checkpoint: Checkpoint) -> ChosenTokenizer:
    """The tokenizer in the run directory; its end-of-text token is that of the training data.

    Raises:
        UltraMemError: the tokenizer is missing or damaged, has more tokens than the model, or neither the run nor its
            data nor the tokenizer says which token ends a text.
    """
    path, eos_id = checkpoint.run / TOKENIZER_NAME, _eos_token_id(checkpoint)
    if not path.is_file():
        raise UltraMemError(f"{path} is missing; copy the {TOKENIZER_NAME} that the training data was made with there")
    if eos_id is None and len(candidates := end_of_text_tokens(path)) != 1:
        found = f"it could be {' or '.join(candidates)}" if candidates else "its vocabulary has none of the usual ones"
        raise UltraMemError(
            f"{path} does not say which token ends a text ({found}), and the training data is no longer at "
            f'{checkpoint.config.data.directory}; put it back, or add "{EOS_TOKEN_ID}" to {SUMMARY_NAME}'
        )
    return load_model_tokenizer(path, eos_id, checkpoint.config.model.vocab_size)


def _eos_token_id(checkpoint: Checkpoint) -> int | None:
    """As the run recorded it at its start; of a run of version 0.1 as its data says, if that is still there."""
    data = checkpoint.config.data
    for known in (read_summary(checkpoint.run).get(EOS_TOKEN_ID), data.eos_token_id):
        if isinstance(known, int):
            return known
    if data.directory is None or not data.directory.is_dir():
        return None
    return load_manifest(data.directory).eos_token_id
