"""Small models, tokenizers and data files for recipes."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "big", "small", "red", "blue", "and", "then"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder with a BERT of 6 layers and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(vocabulary)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(num_hidden_layers=6, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A text file, a sentence a line, of different lengths."""
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    draw = torch.Generator().manual_seed(0)
    lines = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(torch.randint(3, 9, (1,), generator=draw)),), generator=draw))
        for _ in range(300)
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def write(tmp_path):
    """Writes a recipe, as text or as data, and gives its path."""

    def writes(recipe, name="recipe.yaml"):
        file = tmp_path / name
        file.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe, indent=1), encoding="utf-8")
        return file

    return writes
