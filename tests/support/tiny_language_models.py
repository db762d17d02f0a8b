"""Folders of language models with random weights, so that tests need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_tokenizer import WORDS, save_tokenizer


def save_language_models(folder: Path) -> None:
    """Save an encoder `model` with its tokenizer, and `causal` and `t5`; skip without them."""
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    words = {"vocab_size": 4 + len(WORDS), "pad_token_id": 3}
    bert = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        **words,
    )
    gpt2 = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, **words
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    save_tokenizer(folder / "model", most=64)
    transformers.BertModel(bert).save_pretrained(folder / "model")
    transformers.AutoModelForCausalLM.from_config(gpt2).save_pretrained(folder / "causal")
    save_tokenizer(folder / "t5")
    transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, **words).save_pretrained(
        folder / "t5"
    )
    transformers.utils.logging.enable_progress_bar()
