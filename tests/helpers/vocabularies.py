"""Tiny tokenizers of every kind we meet, trained on the spot and written as Hugging Face directories."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The end, the very end!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3\n",
    "Größe, naïve café, señor, œuvre; Привет мир; 你好世界; こんにちは; 🙂🙃 👩‍👩‍👧",
    '{"name": "Ada", "born": 1815, "tags": ["math", "code"]}',
    "hello hello world world user assistant system",
] * 3

CHATML = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _write(directory: Path, rust: tokenizers.Tokenizer, config: dict, edit=None) -> Path:
    spec = json.loads(rust.to_str())
    if edit:
        edit(spec)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(directory: Path) -> Path:
    """As GPT-2, Llama 3 and Qwen: every byte is a letter of the alphabet; special tokens lie above the vocabulary."""
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    rust.add_special_tokens(CHATML_SPECIAL)
    rust.add_tokens(["<tool_call>", "</tool_call>"])
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "chat_template": CHATML}
    return _write(directory, rust, config)


def _pieces(prepend: bool) -> tokenizers.Tokenizer:
    rust = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    rust.normalizer = normalizers.Sequence(steps if prepend else steps[1:])
    special = ["<unk>", "<s>", "</s>", *BYTES]
    plain = [text for text in CORPUS if text.isascii()]  # other letters fall back to bytes
    rust.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
    return rust


def _bytes_are_not_special(spec: dict) -> None:
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]


INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(directory: Path) -> Path:
    """As Llama 2 and Mistral: a space mark before words, bytes for the rest, the first space dropped in decoding."""
    rust = _pieces(prepend=True)
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INST}
    return _write(directory, rust, config, _bytes_are_not_special)


def sentencepiece_unstripped(directory: Path) -> Path:
    """As Gemma: the same without the dropped space."""
    rust = _pieces(prepend=False)
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _write(directory, rust, {"bos_token": "<s>", "eos_token": "</s>"}, _bytes_are_not_special)


def metaspace(directory: Path) -> Path:
    """The older SentencePiece-like form, which has no decoder that says what a byte is."""
    rust = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    return _write(directory, rust, {"eos_token": "</s>"})


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece_unstripped": sentencepiece_unstripped,
    "metaspace": metaspace,
}
