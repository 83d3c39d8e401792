"""An engine without a device for tests of the server: a byte tokenizer, the real scheduler, a runner that makes text.

Token i is byte i; above are the specials. The runner's tokens are a pure function of the history in the pages (see
fake_runner), made printable, so that a stream that was disturbed in any way shows it. No JAX.
"""

import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import tokenizers
from helpers.fake_runner import FakeRunner

from jaxllm.config import ConfigError, load, resolve
from jaxllm.core import SampledToken, TokenLogprobs
from jaxllm.engine.cache.hashed import PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.decoding.mask import TokenMask
from jaxllm.engine.decoding.structured import GrammarCompiler, TokenizerBridge
from jaxllm.engine.engine import Engine
from jaxllm.engine.faults import FaultyRunner, parse_faults
from jaxllm.engine.limits import Limits
from jaxllm.engine.policy import POLICIES
from jaxllm.engine.replicas import ReplicatedEngine
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.utilisation import StepMeter
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.dims import step_cost
from jaxllm.tokenizer import BYTE_OF_CHARACTER, Tokenizer

SPECIALS = {"<|bos|>": 256, "<|eos|>": 257, "<|turn|>": 258}
BOS, EOS = 256, 257
VOCAB = 259
TEMPLATE = (
    "<|bos|>{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
PRINTABLE, FIRST = 95, 32  # what the runner says


def byte_tokenizer() -> Tokenizer:
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for text, i in SPECIALS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(BYTE_OF_CHARACTER),
            "merges": [],
        },
    }
    rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return Tokenizer(
        rust,
        spec,
        special={"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
        templates={"default": TEMPLATE},
        eos_token_ids=(EOS,),
        bos_token_id=BOS,
    )


class OneScript(dict):
    """Every request is answered with this text."""

    def __init__(self, text):
        self.tokens = [*(byte - FIRST for byte in text.encode()), EOS - FIRST]

    def get(self, request_id, default):
        return self.tokens


@dataclass
class SpokenStep:
    rows: tuple
    masks: list
    results: list
    waits: bool
    ready = True


class SpeakingRunner:
    """FakeRunner with printable tokens, log-probabilities, hidden states and a pace."""

    def __init__(self, inner, step_s=0.0):
        self.inner, self.step_s = inner, step_s

    def launch(self, plan):
        masks = [TokenMask(row.sequence, VOCAB) if row.sample else None for row in plan.rows]
        waits = any(m and m.follows_tokens and r.sequence.num_pending > 1 for r, m in zip(plan.rows, masks))
        step = SpokenStep(plan.rows, masks, self.inner.launch(plan).results, waits)
        if not waits:
            self.choose(step)
        return step

    def choose(self, step):
        for i, (row, mask) in enumerate(zip(step.rows, step.masks)):
            if row.sample and not row.sequence.finished:
                step.results[i] = result = self._speak(row, mask, step.results[i])
                self.inner.last[row.sequence.row] = result.sampled.token_id

    def collect(self, step):
        if self.step_s:
            time.sleep(self.step_s)
        return step.results

    def _speak(self, row, mask, result):
        sampled, params = result.sampled, row.sequence.request.params
        if sampled.error:
            return result
        mask = mask.bits()
        token = FIRST + sampled.token_id
        if mask is not None:
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            token = int(allowed[sampled.token_id % len(allowed)])
        logprobs = None
        if params.logprobs is not None:
            top = tuple((FIRST + (token - FIRST + i) % PRINTABLE, -0.5 - i) for i in range(params.logprobs))
            logprobs = TokenLogprobs(token, -0.5, 1, top)
        return type(result)(SampledToken(token, logprobs), result.prompt_logprobs)

    def hidden_states(self, token_ids, start, pages):
        assert len(pages) * self.inner.page_size >= start + len(token_ids)
        rows = [hashlib.sha256(f"{start + i}/{token}".encode()).digest()[:16] for i, token in enumerate(token_ids)]
        return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 16).astype(np.float32) - 100


def build_engine(
    *,
    step_s=0.0,
    num_pages=128,
    page_size=8,
    max_num_seqs=8,
    token_budget=64,
    context=512,
    fault="",
    start_error="",
    start_s=0.0,
    replicas=1,
    says=None,
):
    """(Engine, facts), as the engine's process builds it; with `replicas`, several as one, faults in the first; `says`:
    what every answer is."""
    if replicas > 1:
        size = dict(step_s=step_s, num_pages=num_pages, page_size=page_size, max_num_seqs=max_num_seqs)
        size |= dict(token_budget=token_budget, context=context)
        first = build_engine(fault=fault, start_error=start_error, start_s=start_s, **size)
        others = [build_engine(**size)[0] for _ in range(replicas - 1)]
        return ReplicatedEngine((first[0], *others)), first[1]
    time.sleep(start_s)
    if start_error:
        raise ConfigError(start_error)
    settings = dict(
        model="none",
        load_format="dummy",
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=token_budget,
        num_pages=num_pages,
    )
    config = resolve(load(environ={}, **settings), context, "cpu")
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=1,
        d_model=16,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        d_ff=16,
        context_length=context,
        eos_token_ids=(EOS,),
        bos_token_id=BOS,
    )
    pool = PagePool(num_pages, page_size)
    limits = Limits(token_budget=token_budget, max_num_seqs=max_num_seqs, page_size=page_size, max_model_len=context)
    scheduler = Scheduler(limits, pool, PrefixCache(pool), POLICIES["fcfs"])
    runner = SpeakingRunner(FakeRunner(num_pages, page_size, max_num_seqs, PRINTABLE), step_s)
    if says is not None:
        runner.inner.scripts = OneScript(says)
    if fault:
        runner = FaultyRunner(runner, parse_faults(fault))
    grammars = GrammarCompiler(lambda: TokenizerBridge(json.dumps(byte_tokenizer().spec), VOCAB, (EOS,)))
    engine = Engine(config, model, scheduler, runner, byte_tokenizer(), grammars=grammars)
    engine.meter = StepMeter(step_cost(model, "none", 0, 2), scheduler.metrics)
    return engine, {"weights": "none"}
