"""A BERT that fits in a test, with a tokenizer, and text for it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "big", "small", "red", "blue", "and", "then"]


def save_tiny_bert(folder: Path) -> Path:
    """A folder with a BERT of 6 layers and a tokenizer of whole words."""
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


def lines(count: int) -> list[str]:
    """Lines of three to eight words."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=draw))
        found.append(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw)))
    return found
