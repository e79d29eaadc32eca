"""The two functions that AReaL's GSM8K guide has its readers write: the dataset and the reward."""

from typing import Any

from lightning_grpo.rewards.answers import final_number


def process_gsm8k_rl_dataset(sample: dict[str, Any]) -> dict[str, Any]:
    """One row of GSM8K as chat messages; `question` goes, `answer` stays for the reward."""
    messages = [{"role": "user", "content": sample["question"]}]
    return {"messages": messages, "answer": sample["answer"]}


def gsm8k_reward_fn(
    prompt: str,
    completions: str,
    prompt_ids: list[int],
    completion_ids: list[int],
    answer: str,
    **kwargs: Any,
) -> int:
    """1 if the number after `####` is the answer's, else 0; AReaL's signature, as it is."""
    return int(final_number(completions) == final_number(answer))
