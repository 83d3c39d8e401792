"""Whether a model fits is said before it is loaded, with the sum and the setting to change."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxllm.config import load, resolve
from jaxllm.engine.memory import GIB, DoesNotFitError, estimate_workspace_bytes, kept_bytes, plan_memory
from jaxllm.graph.kv_cache import KVCacheSpec
from jaxllm.graph.models.config import ModelConfig

LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14_336,
    context_length=131_072,
    eos_token_ids=(1,),
    bos_token_id=0,
)
SPEC = KVCacheSpec(32, 8, 128, 16, 0, jnp.dtype(jnp.bfloat16))
WEIGHTS = 16 * GIB


@dataclasses.dataclass
class Card:
    """A device as far as memory goes."""

    bytes_limit: int
    platform: str = "gpu"

    def memory_stats(self):
        return {"bytes_limit": self.bytes_limit}


def config(**settings):
    return resolve(load(environ={}, model="none", max_model_len=16_384, **settings), 131_072, "gpu")


def plan(card, workspace=None, **settings):
    made = config(**settings)
    needed = estimate_workspace_bytes(made, LLAMA_8B) if workspace is None else workspace
    return plan_memory(made, LLAMA_8B, SPEC, WEIGHTS, needed, card)


def test_pages_take_what_weights_and_workspace_leave_of_the_allowed_share():
    made = plan(Card(140 * GIB), gpu_memory_utilization=0.9)
    assert made.limit_bytes == int(140 * GIB * 0.9)
    room = made.limit_bytes - made.weights_bytes - made.workspace_bytes
    grain = 256  # of numbers of 16 binary digits, the first 8 stay
    assert 2**15 <= made.num_pages < 2**16
    assert made.num_pages % grain == 0
    assert made.cache_bytes <= room < made.cache_bytes + grain * made.page_bytes
    nearly = plan(Card(140 * GIB - 2**20), gpu_memory_utilization=0.9)
    assert nearly.num_pages == made.num_pages  # as many for which executables were made before
    assert made.page_bytes == 2 * 32 * 8 * 128 * 16 * 2


def test_more_workspace_means_fewer_pages():
    small, large = plan(Card(80 * GIB), workspace=GIB), plan(Card(80 * GIB), workspace=2 * GIB)
    assert small.num_pages - large.num_pages == GIB // small.page_bytes


def test_pages_that_can_never_be_used_are_not_made():
    assert plan(Card(2000 * GIB), max_num_seqs=4).num_pages == 4 * 16_384 // 16


def test_what_does_not_fit_is_refused_with_the_sum_and_the_setting():
    with pytest.raises(DoesNotFitError) as refusal:
        plan(Card(16 * GIB))
    message = str(refusal.value)
    assert "16.00 GiB" in message
    assert "lower cache.num_pages, scheduler.max_num_seqs or scheduler.token_budget" in message
    with pytest.raises(DoesNotFitError, match="memory_fraction"):
        plan(Card(40 * GIB), num_pages=20_000)


def test_the_table_shows_what_the_executables_asked_for():
    made = dataclasses.replace(plan(Card(140 * GIB)), measured_bytes=3 * GIB)
    assert "(the executables need 3.00)" in str(made)


def test_the_logits_every_bucket_keeps_the_rows_state_and_room_for_small_arrays_are_counted():
    made = config(max_num_seqs=64, decode_buckets=[16, 64], page_size=16)
    rows = 65 * (128_256 * 2 + 16_384 // 16 * 4)
    assert kept_bytes(made, LLAMA_8B) == 80 * 128_256 * 4 + rows + 6 * (2**21 - 2**8)
