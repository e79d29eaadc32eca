"""A tokenizer of characters, with the chat template of a small chat model or none."""

from __future__ import annotations


class CharTokenizer:
    """One token per character; `chat_template` as in Hugging Face's, by truth value."""

    def __init__(self, chat=True):
        self.chat_template = "{{ messages }}" if chat else None
        self.num_encoded = 0

    def encode(self, text, **kwargs):
        self.num_encoded += 1
        return [ord(character) for character in text]

    def decode(self, token_ids, **kwargs):
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self, conversation, *, tokenize=True, return_dict=True, add_generation_prompt=False
    ):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in conversation)
        text += "<assistant>" if add_generation_prompt else ""
        if not tokenize:
            return text
        ids = self.encode(text)
        return {"input_ids": ids} if return_dict else ids
