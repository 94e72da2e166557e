"""Text of the examples: Python's own documentation, in bytes, and a small language model."""

import inspect
import typing
from pydoc_data.topics import topics

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

tokenizer = ByT5Tokenizer()  # bytes: it needs no files
LENGTH = 64


def make_model():
    """A Llama of 107 thousand weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def texts(first, count):
    """So many pieces of the documentation of Python, as {"text": ...}."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [{"text": text[k * LENGTH : (k + 1) * LENGTH]} for k in range(first, first + count)]


def tokens(first, count):
    """The same as batches of the Trainer have them."""
    ids = [tokenizer(piece["text"])["input_ids"][:LENGTH] for piece in texts(first, count)]
    return [{"input_ids": i, "labels": i} for i in ids if len(i) == LENGTH]


def pretrained_model(steps=100):
    """The model after so many steps on the source of a module: there is something to fine-tune."""
    model, source = make_model(), inspect.getsource(typing).encode()
    data = torch.tensor(list(source)) + tokenizer.offset  # the tokens of bytes
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(data) - LENGTH, (16, 1)) + torch.arange(LENGTH)
        model(input_ids=data[at], labels=data[at]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
