"""Stop strings: found in the text of the last few tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Looks for stop strings in sampled tokens.

    Args:
        tokenizer: Decodes; None where the model has none (then no request has stop strings).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def window(stop: Sequence[str]) -> int:
        """How many of the last tokens a new match can lie in.

        A token holds a byte or more; the few beyond the longest string's bytes let a character
        that starts before it decode whole.
        """
        return max(len(s.encode()) for s in stop) + 4

    def find(self, stop: Sequence[str], token_ids: Sequence[int]) -> str | None:
        """The first of `stop` that the tokens spell, special tokens included; None if none."""
        if self._tokenizer is None:
            return None
        text = decode(self._tokenizer, token_ids, skip_special_tokens=False)
        return next((s for s in stop if s in text), None)


def decode(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool = True,
) -> str:
    """The text of token ids."""
    text = tokenizer.decode(
        list(token_ids),
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )
    if not isinstance(text, str):
        raise TypeError(f"the tokenizer decoded to {type(text).__name__}")
    return text


def trim(text: str, matched: str | int | None) -> str:
    """Cut a text at the string that stopped it."""
    if isinstance(matched, str):
        return text.partition(matched)[0]
    return text
