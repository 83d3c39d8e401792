"""A small byte-level tokenizer.json made on the spot: 256 bytes, some merges, special tokens and plain added ones."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 421  # not a multiple of 32, and some ids without a token
EOS, OTHER_EOS = 1, 2
SPECIAL = ("<s>", "</s>", "<|im_end|>", "[TOOL_CALLS]")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CORPUS = ['{"name": "value", "arguments": {"city": "Paris", "n": 12}}', "the quick brown fox jumps"] * 20


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken(text, special=False) for text in ADDED])
    return made


def tokenizer_json() -> str:
    return tokenizer().to_str()


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=False)
