"""Makes the quickstart's data, tokenizer and base model from nothing, on one CPU core.

    python examples/quickstart/make_base.py --out build/quickstart

Two phases of supervised training: clean solutions until the model can do the arithmetic, then
mixed ones (see `problems.mixed_demonstration`) until it mostly does not bother. Everything follows
from `--seed`; one thread, so that the same machine gives the same weights again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import Problem, mixed_demonstration, problems
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

VOCABULARY_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS = 512, 384, 2
MAX_NEW_TOKENS = 56
NUM_TRAIN, NUM_TEST = 4000, 1000
END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
IGNORED = -100
# Qwen2's own split: one digit a token, words with their leading space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Recipe:
    """How the base is trained; the defaults made the model that ships.

    With `experts` it is a mixture of so many, of which each token passes two: as wide for a token
    as the model that ships. With `recurrent` it is a Qwen3.5 whose first layers, so many, are
    linear attention.
    """

    seed: int = 0
    experts: int = 0
    recurrent: int = 0
    clean_steps: int = 1000
    mixed_steps: int = 150
    batch_size: int = 64
    learning_rate: float = 3e-3
    mixed_learning_rate: float = 1e-3


def write_data(folder: Path, seed: int) -> None:
    """Writes `train.jsonl` and `test.jsonl` and prints the md5 of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", NUM_TRAIN, False), ("test", NUM_TEST, True)):
        seen: dict[str, Problem] = {}
        for problem in problems(seed, held_out=held_out):
            seen.setdefault(problem.question, problem)
            if len(seen) == count:
                break
        rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in seen.values()]
        text = "\n".join(rows) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        print(f"{name}.jsonl: {len(rows)} rows, md5 {digest}")


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCABULARY_SIZE` tokens with a ChatML template."""
    rng = random.Random(f"tokenizer-{seed}")
    texts = [
        f"user\n{p.question}\nassistant\n{mixed_demonstration(p, rng)}"
        for p in itertools.islice(problems(seed + 1, held_out=False), 4000)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=512
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(
    tokenizer: PreTrainedTokenizerFast, experts: int = 0, recurrent: int = 0
) -> PreTrainedModel:
    """A freshly initialized Qwen3 of 0.46 million parameters, a mixture of experts or a hybrid."""
    kind, more = Qwen3ForCausalLM, {}
    if experts:
        kind = Qwen3MoeForCausalLM
        more = {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
        more |= {"moe_intermediate_size": INTERMEDIATE_SIZE // 2}
    elif recurrent:
        kind = Qwen3_5ForCausalLM
        kinds = ["linear_attention"] * recurrent + ["full_attention"] * (NUM_LAYERS - recurrent)
        more = {"layer_types": kinds, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        more |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    config = kind.config_class(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        num_hidden_layers=NUM_LAYERS,
        intermediate_size=INTERMEDIATE_SIZE,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **more,
    )
    config.architectures = [kind.__name__]
    return kind(config)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The question under the chat template, ready to be continued."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, mixed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input ids, labels) `[batch, longest]`; only the solution is learnt."""
    rng = random.Random(f"demonstrations-{recipe.seed}-{mixed}")
    stream = problems(recipe.seed + (3 if mixed else 2), held_out=False)
    while True:
        rows: list[tuple[list[int], int]] = []
        for problem in itertools.islice(stream, recipe.batch_size):
            solution = mixed_demonstration(problem, rng) if mixed else problem.answer
            prompt = prompt_ids(tokenizer, problem.question)
            rows.append((prompt + tokenizer.encode(solution + END), len(prompt)))
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (ids, start) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, start : len(ids)] = torch.tensor(ids[start:])
        yield input_ids, labels


def train(
    model: PreTrainedModel,
    stream: Iterator[tuple[Tensor, Tensor]],
    num_steps: int,
    learning_rate: float,
    label: str,
) -> None:
    """AdamW with a short warm-up and a cosine to 2% of the learning rate."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    warmup = max(1, num_steps // 20)
    model.train()
    for step, (input_ids, labels) in enumerate(itertools.islice(stream, num_steps), start=1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(step / warmup, 0.02 + 0.98 * cosine)
        # Right padding needs no mask: under causal attention nothing looks ahead.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps:
            print(f"{label} step {step}: loss {loss.item():.4f}", flush=True)


def is_right(completion: str, answer: str) -> bool:
    """GSM8K's rule: what follows the last mark is the expected number."""
    _, mark, rest = completion.rpartition("####")
    return bool(mark) and rest.strip() == answer.rpartition("####")[2].strip()


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, str]],
    *,
    sampled: bool,
) -> tuple[float, float]:
    """(share right, mean tokens of a completion) over the rows."""
    torch.manual_seed(0)
    model.eval()
    how = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
    right, length = 0, 0
    for chunk in _chunks(rows, 125):
        prompts = [{"input_ids": prompt_ids(tokenizer, row["question"])} for row in chunk]
        padded = tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        out = model.generate(
            **padded,
            max_new_tokens=MAX_NEW_TOKENS,
            **how,
        )[:, padded["input_ids"].shape[1] :]
        length += int((out != tokenizer.pad_token_id).sum())
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        right += sum(is_right(t, r["answer"]) for t, r in zip(texts, chunk, strict=True))
    return right / len(rows), length / len(rows)


def _chunks(rows: list[dict[str, str]], size: int) -> Iterator[list[dict[str, str]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def make_base(out: Path, recipe: Recipe) -> None:
    """Writes `out/data` and `out/model`, and prints the accuracy after each phase."""
    write_data(out / "data", recipe.seed)
    test = [json.loads(line) for line in (out / "data/test.jsonl").read_text().splitlines()]
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(recipe.seed)
    print(f"tokenizer: {len(tokenizer)} tokens")
    model = make_model(tokenizer, recipe.experts, recipe.recurrent)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for label, steps, rate in (
        ("clean", recipe.clean_steps, recipe.learning_rate),
        ("mixed", recipe.mixed_steps, recipe.mixed_learning_rate),
    ):
        start = time.process_time()
        train(model, batches(tokenizer, recipe, mixed=label == "mixed"), steps, rate, label)
        seconds = time.process_time() - start
        for sampled in (True, False):
            share, length = accuracy(model, tokenizer, test, sampled=sampled)
            how = "sampled T=1" if sampled else "greedy"
            print(f"after {label} ({seconds:.0f} CPU-s): {how} {share:.3f}, {length:.1f} tokens")
    save(model, tokenizer, out / "model")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder that transformers and SGLang load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    digest = hashlib.md5((folder / "model.safetensors").read_bytes(), usedforsecurity=False)
    print(f"{folder}: model.safetensors md5 {digest.hexdigest()}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    make_base(arguments.pop("out"), Recipe(**arguments))


if __name__ == "__main__":
    main()
