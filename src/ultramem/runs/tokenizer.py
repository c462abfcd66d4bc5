"""The tokenizer of a run."""

from __future__ import annotations

from ultramem.data.token_files import load_manifest
from ultramem.data.tokenizers import ChosenTokenizer, end_of_text_tokens, load_model_tokenizer
from ultramem.errors import UltraMemError
from ultramem.runs.checkpoints import Checkpoint
from ultramem.runs.contents import file_content, recorded_contents
from ultramem.runs.layout import SUMMARY_NAME, TOKENIZER_NAME
from ultramem.runs.summary import EOS_TOKEN_ID, read_summary


def find_tokenizer(checkpoint: Checkpoint) -> ChosenTokenizer:
    """Load the tokenizer in the run directory, with the end-of-text token of the training data.

    Raises:
        UltraMemError: the tokenizer is missing, damaged or another than the run began with, or has more tokens than the
            model; or the end-of-text token is not known from the run, its data or the tokenizer.
    """
    path, eos_id = checkpoint.run / TOKENIZER_NAME, _eos_token_id(checkpoint)
    if not path.is_file():
        raise UltraMemError(f"{path} does not exist; copy the {TOKENIZER_NAME} of the training data there")
    recorded = recorded_contents(checkpoint.run)
    if recorded and recorded.tokenizer and not file_content(path).is_like(recorded.tokenizer):
        raise UltraMemError(f"{path} is not the one that the run began with; copy that of the training data there")
    if eos_id is None and len(candidates := end_of_text_tokens(path)) != 1:
        found = f"it could be {' or '.join(candidates)}" if candidates else "its vocabulary has no common one"
        raise UltraMemError(
            f"{path} does not define an end-of-text token ({found}), and the training data is no longer at "
            f'{checkpoint.config.data.directory}; restore the data, or add "{EOS_TOKEN_ID}" to {SUMMARY_NAME}'
        )
    return load_model_tokenizer(path, eos_id, checkpoint.config.model.vocab_size)


def _eos_token_id(checkpoint: Checkpoint) -> int | None:
    """As the run recorded it at its start. Version 0.1 did not, so for its runs as in the data, if it still exists."""
    data = checkpoint.config.data
    for known in (read_summary(checkpoint.run).get(EOS_TOKEN_ID), data.eos_token_id):
        if type(known) is int:  # not a bool
            return known
    if data.directory is None or not data.directory.is_dir():
        return None
    return load_manifest(data.directory).eos_token_id
