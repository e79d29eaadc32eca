"""From the body of `/generate` to the completions that it asks for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_grpo.engine.checks import (
    check_names,
    check_prompt,
    check_sampling,
    check_size,
    is_single,
    new_rid,
    per_item,
    refuse_unsupported,
)
from lightning_grpo.engine.errors import BadRequestError
from lightning_grpo.engine.protocol import GenerateBody, Generation, SamplingBody, shorten
from lightning_grpo.engine.sampling import as_int64, sample_seed

DETERMINISTIC_SEED = 42
"""The seed of requests without one in deterministic mode, as SGLang's deterministic inference."""

_GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Intake:
    """Checks requests against a model.

    Attributes:
        vocab_size: Token ids are below this.
        context_length: Prompt and completion together fit in this.
        end_ids: Tokens that end a completion unless `ignore_eos`.
        tokenizer: For prompts given as text and for stop strings; None if the model has none.
        deterministic: Whether requests without a seed get a fixed one.
        longest_token: Characters of the longest token: a text longer than as many of them as fit
            in the context is refused before it is tokenized.
    """

    vocab_size: int
    context_length: int
    end_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None
    deterministic: bool = False
    longest_token: int = 256

    def generations(self, body: GenerateBody) -> tuple[list[Generation], bool]:
        """The completions of a request, in the order of the reply, and whether it is a list.

        Raises:
            BadRequestError: Naming the field, the rule and the value.
        """
        refuse_unsupported(body)
        check_size(self._num_prompts(body), body.sampling_params)
        check_names(body)
        prompts = self._prompts(body)
        count = len(prompts)
        params = [
            per_item(body.sampling_params, SamplingBody(), i, count, "sampling_params")
            for i in range(count)
        ]
        sizes = {p.n or 1 for p in params}
        if len(sizes) > 1:
            raise BadRequestError(
                f"`sampling_params.n` must be the same for all prompts, "
                f"got {shorten(sorted(sizes))}"
            )
        num_samples = sizes.pop()
        generations: list[Generation] = []
        for index, prompt in enumerate(prompts):
            check_sampling(params[index], self.vocab_size)
            generations += self._samples(body, index, count, prompt, params[index])
        rids = {g.rid for g in generations}
        if len(rids) != len(generations):
            raise BadRequestError(f"`rid` must name each prompt once, got {shorten(body.rid)}")
        return generations, not (is_single(body) and num_samples == 1)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        Raises:
            BadRequestError: The model has no tokenizer, or the text can't fit in its context.
        """
        if self.tokenizer is None:
            raise BadRequestError("a text needs a tokenizer and the model has none")
        self.check_length(len(text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def check_length(self, num_characters: int) -> None:
        """Refuse a text that is too long for the context whatever its tokens are.

        Raises:
            BadRequestError: It is.
        """
        if num_characters > self.context_length * self.longest_token:
            raise BadRequestError(
                f"the text must fit in the context of {self.context_length} tokens, got one of "
                f"{num_characters} characters"
            )

    @staticmethod
    def _num_prompts(body: GenerateBody) -> int:
        if (body.text is None) == (body.input_ids is None):
            raise BadRequestError("exactly one of `text` and `input_ids` must be given")
        return 1 if is_single(body) else len(body.text or body.input_ids or ())

    def _prompts(self, body: GenerateBody) -> list[tuple[int, ...]]:
        single = is_single(body)
        if body.input_ids is not None:
            if not body.input_ids:
                raise BadRequestError("`input_ids` must not be empty")
            if single:
                return [self._checked(body.input_ids, "input_ids")]
            return [
                self._checked(ids if isinstance(ids, list) else [[]], f"input_ids[{i}]")
                for i, ids in enumerate(body.input_ids)
            ]
        texts = [body.text] if isinstance(body.text, str) else body.text or []
        if not texts:
            raise BadRequestError("`text` must not be empty")
        return [
            self._checked(self.tokenize(text, add_special_tokens=True), "text") for text in texts
        ]

    def _checked(self, ids: Sequence[Any], name: str) -> tuple[int, ...]:
        return check_prompt(ids, self.vocab_size, self.context_length, name)

    def _samples(
        self,
        body: GenerateBody,
        index: int,
        count: int,
        prompt: tuple[int, ...],
        params: SamplingBody,
    ) -> list[Generation]:
        budget = self._budget(prompt, params)
        rid = self._rid(body, index, count)
        seed = params.sampling_seed
        if seed is None:
            seed = DETERMINISTIC_SEED if self.deterministic else secrets.randbits(63)
        return_logprob = per_item(body.return_logprob, False, index, count, "return_logprob")
        start = per_item(body.logprob_start_len, -1, index, count, "logprob_start_len")
        if not -1 <= start < len(prompt):
            raise BadRequestError(
                f"`logprob_start_len` must be in [-1, {len(prompt)}) (the prompt), got "
                f"{shorten(start)}"
            )
        shared: dict[str, Any] = self._shared(params) | {
            "input_ids": prompt,
            "max_new_tokens": budget,
            "return_logprob": return_logprob,
            "logprob_start": start if return_logprob and start >= 0 else None,
            "extra_key": per_item(body.extra_key, None, index, count, "extra_key"),
        }
        num_samples = params.n or 1
        return [
            Generation(
                rid=rid if num_samples == 1 else f"{rid}_{sample}",
                seed=sample_seed(as_int64(seed), sample),
                sample_index=sample,
                **shared,
            )
            for sample in range(num_samples)
        ]

    def _shared(self, params: SamplingBody) -> dict[str, Any]:
        stop = params.stop or ()
        if stop and self.tokenizer is None:
            raise BadRequestError("`sampling_params.stop` needs a tokenizer and the model has none")
        temperature = 1.0 if params.temperature is None else params.temperature
        frozen = temperature < _GREEDY_BELOW
        top_k = self.vocab_size if params.top_k in (None, -1) else params.top_k
        ends = set() if params.ignore_eos else self.end_ids | set(params.stop_token_ids or ())
        return {
            "temperature": 1.0 if frozen else temperature,
            "greedy": frozen or top_k == 1,
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "top_k": top_k,
            "min_p": params.min_p or 0.0,
            "min_new_tokens": params.min_new_tokens or 0,
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "stop_ids": tuple(sorted(ends)),
            "skip_special_tokens": params.skip_special_tokens is not False,
            "spaces_between_special_tokens": params.spaces_between_special_tokens is not False,
            "no_stop_trim": bool(params.no_stop_trim),
        }

    def _budget(self, prompt: tuple[int, ...], params: SamplingBody) -> int:
        room = self.context_length - len(prompt)
        budget = room if params.max_new_tokens is None else params.max_new_tokens
        if room < 0 or budget > room:
            raise BadRequestError(
                f"the prompt and `sampling_params.max_new_tokens` must fit in the context of "
                f"{self.context_length} tokens, got {len(prompt)} + {shorten(budget)}"
            )
        return budget

    @staticmethod
    def _rid(body: GenerateBody, index: int, count: int) -> str:
        if isinstance(body.rid, str) and count > 1:
            return f"{body.rid}_{index}"
        return per_item(body.rid, None, index, count, "rid") or new_rid()
