"""A tokenizer of a few words, and texts of them, so that tests need no download."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

WORDS = ("red", "green", "blue", "big", "small", "old", "new", "one", "two", "three")
SPECIAL = {"pad": 3, "cls": 1, "sep": 2, "unk": 0}
"""The ids of the special tokens: padding is not 0, as in many tokenizers."""


def save_tokenizer(folder: Path, *, most: int = 512) -> Path:
    """Write a word-level tokenizer that puts [CLS] and [SEP] around a text; skip without it."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    names = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}
    vocabulary = names | {word: 4 + place for place, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": most,
        **{f"{name[1:-1].lower()}_token": name for name in names},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_texts(path: Path, classes: int = 12, count: int = 6) -> Path:
    """A CSV file of classes in groups of four; text i of a class has i + 1 words, of ten."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "intent", "domain"])
        for label in range(classes):
            for place in range(count):
                words = [WORDS[(label + step) % len(WORDS)] for step in range(place + 1)]
                row = [
                    " ".join([f"class{label}", *words]),
                    f"class {label:02}",
                    f"group {label // 4}",
                ]
                writer.writerow(row)
    return path
