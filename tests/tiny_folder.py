"""A tiny random Llama with its tokenizer in a folder, as a user would have a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer


def save_tiny_folder(folder: Path, **options: Any) -> Path:
    """Writes the model; its context is 128 tokens unless ``options`` say otherwise."""
    tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
