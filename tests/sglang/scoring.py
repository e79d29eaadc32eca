"""What transformers says of the tokens that a server sampled."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

EXACT = 2e-5
"""Two fp32 implementations of one model on one CPU differ by less, per token."""


@torch.inference_mode()
def full_logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Logprob of each token after the first, by one pass over the whole sequence."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.inference_mode()
def greedy_ids(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, one after the other."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def sampled(reply: dict[str, Any]) -> torch.Tensor:
    """The logprobs of a reply, checked against its ids."""
    entries = reply["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == reply["output_ids"]
    assert reply["meta_info"]["output_token_logprobs_length"] == len(entries)
    return torch.tensor([entry[0] for entry in entries])


def check_sampled(
    model: PreTrainedModel,
    prompt: list[int],
    reply: dict[str, Any],
    temperature: float = 1.0,
    span: tuple[int, int] | None = None,
) -> None:
    """The reply's logprobs (of a span of it) are the model's."""
    first, last = span or (0, len(reply["output_ids"]))
    expected = full_logprobs(model, prompt + reply["output_ids"], temperature)[len(prompt) - 1 :]
    torch.testing.assert_close(sampled(reply)[first:last], expected[first:last], atol=EXACT, rtol=0)
