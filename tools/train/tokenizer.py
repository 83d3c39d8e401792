"""The bundled models' tokenizer: byte-level BPE of 8192 tokens, made so that copying is easy to learn.

In: training text. Out: a directory with tokenizer.json, tokenizer_config.json, chat_template.jinja.

A word is split into the same pieces wherever it stands: merges are first learnt on words without the space before
them, and only then is the space glued to the most common first pieces (by merges of the last ranks). A name
inside quotes and the same name after a space so differ in their first token alone. Digits are single tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.train import corpus
from tools.train.tasks import mixture
from tools.train.tasks.sample import END_OF_TEXT, IM_END, IM_START, render
from tools.train.tasks.words import Words

VOCAB_SIZE = 8192
CONTEXT_LENGTH = 2048
_SPACED_WORDS = 1800  # merges of the last ranks: a space and the first piece of a word
_TAIL = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERN = r" ?\p{L}+" + _TAIL
_LEARN_PATTERN = r" (?=\p{L})|\p{L}+" + _TAIL
_CONTROL = (END_OF_TEXT, IM_START, IM_END)
_MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_RESERVED = tuple(f"<|reserved_{i}|>" for i in range(7))

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string %}{{- content }}
    {%- elif content is not none and content is defined %}
        {%- for part in content %}
            {%- if part.type != 'text' %}{{- raise_exception('only text content is supported') }}{%- endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro -%}
{%- set system = text_of(messages[0].content) if messages and messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if system %}{{- system + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = text_of(message.content) %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{- '<|im_start|>system\\n' + content + '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function if call.function else call %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{\\"name\\": \\"' + function.name + '\\", \\"arguments\\": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- raise_exception('unknown role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def train(texts: Iterable[str], spaced: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn merges on `texts`, then count the first pieces of spaced words on `spaced` and glue spaces to them."""
    special = len(_CONTROL) + len(_MARKUP) + len(_RESERVED)
    spaced_words = min(_SPACED_WORDS, vocab_size // 4)
    learner = _tokenizer(models.BPE(), _LEARN_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - special - spaced_words,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    for piece in _first_pieces(learner, spaced):
        if len(vocab) >= vocab_size - special:
            break
        if f"Ġ{piece}" not in vocab:
            vocab[f"Ġ{piece}"] = len(vocab)
            merges.append(("Ġ", piece))
    tokenizer = _tokenizer(models.BPE(vocab=vocab, merges=merges), _PATTERN)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _MARKUP])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _RESERVED])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """The three files that make a Hugging Face tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token not in _MARKUP,
        }
        for token in (*_CONTROL, *_MARKUP, *_RESERVED)
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def load(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def training_texts(source: Path | None, *, megabytes: float) -> tuple[list[str], list[str]]:
    """Code and rendered chat, about equal parts, the same for the same standard library."""
    read = corpus.load(source)
    words = Words.build(read)
    files = list(read.files.items())
    random.Random(0).shuffle(files)
    code = list(_until([text for path, text in files if not path.startswith("test/")], megabytes * 4e5))
    code += _until([text for path, text in files if path.startswith("test/")], megabytes * 1e5)
    chat = (render(s.messages) for s in mixture.samples(words, stream="tokenizer", shard=0, count=10**9))
    chats = list(_until(chat, megabytes * 5e5))
    return code, chats


def _until(texts: Iterable[str], characters: float) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if seen >= characters:
            return


def _tokenizer(model: models.BPE, pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _first_pieces(learner: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The first pieces of words that follow a space, the most frequent first."""
    words: Counter[str] = Counter()
    splitter = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    for text in texts:
        for piece, _ in splitter.pre_tokenize_str(text):
            if len(piece) > 1 and piece[0] == " " and piece[1].isalpha():
                words[piece[1:]] += 1
    first: Counter[str] = Counter()
    for word, count in words.items():
        first[learner.encode(word).tokens[0]] += count
    return [piece for piece, _ in sorted(first.items(), key=lambda pair: (-pair[1], pair[0]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+", help="where to write the tokenizer's files")
    parser.add_argument("--stdlib", type=Path, help="a directory or .tar.gz of Python source")
    parser.add_argument("--megabytes", type=float, default=24.0)
    arguments = parser.parse_args()
    code, chats = training_texts(arguments.stdlib, megabytes=arguments.megabytes)
    tokenizer = train([*code, *chats], [*code[::2], *chats[::2]])
    for directory in arguments.directories:
        save(tokenizer, directory)
    print(f"tokenizers {tokenizers.__version__}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
