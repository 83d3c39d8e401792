import pytest
from helpers.requests import request

from jaxllm.core import Sequence
from jaxllm.engine.cache.hashed import NoPrefixCache, PrefixCache
from jaxllm.engine.cache.pages import PagePool
from jaxllm.engine.cache.radix import RadixCache

SIZE = 4


@pytest.fixture
def pool():
    return PagePool(16, SIZE)


@pytest.fixture(params=[PrefixCache, RadixCache], ids=["hashed", "radix"])
def cache(pool, request):
    return request.param(pool)


def admit(cache, pool, tokens, salt=""):
    """A sequence that has matched what it can and computed the rest."""
    sequence = Sequence(request(prompt=tokens, salt=salt))
    found = cache.match(sequence)
    cache.acquire(sequence, found)
    sequence.pages = found + pool.allocate(pool.pages_for(len(sequence.tokens)) - len(found))
    sequence.num_computed = len(sequence.tokens)
    cache.insert(sequence)
    cache.check()
    pool.check()
    return sequence, len(found)


def leave(cache, pool, sequence):
    pool.free(reversed(sequence.pages))
    sequence.pages = []
    cache.release(sequence)
    cache.check()
    pool.check()


def hits(cache, tokens, salt=""):
    sequence = Sequence(request(prompt=tokens, salt=salt))
    found = cache.match(sequence)
    cache.release(sequence)
    return len(found)


def test_full_pages_of_an_equal_prefix_are_found(cache, pool):
    first, _ = admit(cache, pool, range(10))
    second, found = admit(cache, pool, [*range(8), 99, 98])
    assert found == 2
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]


def test_a_match_leaves_at_least_one_token_to_compute(cache, pool):
    admit(cache, pool, range(8))
    assert hits(cache, range(8)) == 1
    assert hits(cache, range(9)) == 2


def test_a_page_is_found_only_after_the_same_beginning(cache, pool):
    admit(cache, pool, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert hits(cache, [9, 9, 9, 9, 2, 2, 2, 2, 3]) == 0
    assert hits(cache, [2, 2, 2, 2, 3]) == 0


def test_salts_do_not_see_each_other(cache, pool):
    admit(cache, pool, range(9), salt="tenant 1")
    assert hits(cache, range(9), salt="tenant 2") == 0
    assert hits(cache, range(9)) == 0
    assert hits(cache, range(9), salt="tenant 1") == 2


def test_a_salt_may_be_any_text_python_can_hold(cache, pool):
    admit(cache, pool, range(9), salt="\ud800")
    assert hits(cache, range(9), salt="\ud800") == 2
    assert hits(cache, range(9), salt="\ud801") == 0


def test_pages_outlive_their_sequence(cache, pool):
    sequence, _ = admit(cache, pool, range(10))
    leave(cache, pool, sequence)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (14, 2, 0)
    assert hits(cache, range(10)) == 2


def test_eviction_takes_the_least_recently_released_page(cache, pool):
    old, _ = admit(cache, pool, range(100, 105))
    new, _ = admit(cache, pool, range(200, 205))
    leave(cache, pool, old)
    leave(cache, pool, new)
    again, _ = admit(cache, pool, range(100, 105))  # used again: now the younger one
    leave(cache, pool, again)
    assert cache.evict(1) == 1
    assert hits(cache, range(100, 105)) == 1
    assert hits(cache, range(200, 205)) == 0


def test_eviction_takes_continuations_before_their_prefix(cache, pool):
    sequence, _ = admit(cache, pool, range(13))
    leave(cache, pool, sequence)
    cache.evict(1)
    assert hits(cache, range(13)) == 2
    cache.evict(1)
    assert hits(cache, range(13)) == 1


def test_eviction_never_takes_a_held_page(cache, pool):
    admit(cache, pool, range(9))
    assert cache.evict(5) == 0
    assert hits(cache, range(9)) == 2


def test_of_two_pages_with_the_same_contents_one_is_known(cache, pool):
    one, two = Sequence(request(prompt=range(5))), Sequence(request(prompt=range(5)))
    for sequence in (one, two):  # both start before either has computed anything
        assert cache.match(sequence) == []
        cache.acquire(sequence, [])
        sequence.pages = pool.allocate(2)
    for sequence in (one, two):
        sequence.num_computed = 5
        cache.insert(sequence)
    leave(cache, pool, two)
    assert pool.num_cached == 0
    leave(cache, pool, one)
    assert pool.num_cached == 1
    assert hits(cache, range(5)) == 1


def test_pages_are_inserted_as_they_fill(cache, pool):
    sequence = Sequence(request(prompt=range(9)))
    cache.acquire(sequence, [])
    sequence.pages = pool.allocate(3)
    found = []
    for sequence.num_computed in range(1, 10):
        cache.insert(sequence)
        found.append(hits(cache, range(9)))
    assert found == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_generated_tokens_are_found_by_a_prompt_that_repeats_them(cache, pool):
    sequence, _ = admit(cache, pool, range(6))
    sequence.tokens += [50, 51, 52]
    sequence.num_computed = 8
    cache.insert(sequence)
    assert hits(cache, [*range(6), 50, 51, 7]) == 2


def test_a_failed_sequence_takes_its_own_pages_out_and_leaves_those_it_found(cache, pool):
    good, _ = admit(cache, pool, range(5))
    bad, found = admit(cache, pool, range(13))
    assert found == 1
    cache.discard(bad)
    leave(cache, pool, bad)
    assert hits(cache, range(13)) == 1
    leave(cache, pool, good)
    assert pool.num_cached == 1


def test_pages_computed_again_after_an_eviction_are_inserted_again(cache, pool):
    sequence, _ = admit(cache, pool, range(10))
    pool.free(reversed(sequence.pages))
    cache.evict(2)
    assert cache.match(sequence) == []
    cache.acquire(sequence, [])
    sequence.pages = pool.allocate(3)
    cache.insert(sequence)
    assert hits(cache, range(10)) == 2


def test_tokens_found_and_not_found_are_counted_once_a_sequence(cache, pool):
    admit(cache, pool, range(10))
    admit(cache, pool, range(10))
    assert (cache.stats.hit_tokens, cache.stats.miss_tokens) == (8, 12)
    resumed = Sequence(request(prompt=range(10)), num_preempted=1)
    cache.acquire(resumed, cache.match(resumed))
    assert (cache.stats.hit_tokens, cache.stats.miss_tokens) == (8, 12)


@pytest.mark.parametrize("cache", [PrefixCache], indirect=True, ids=["hashed"])
def test_each_full_page_is_hashed_once(cache, pool, monkeypatch):
    sequence, _ = admit(cache, pool, range(5))
    packed = []
    real = cache._pack
    monkeypatch.setattr(cache, "_pack", lambda *ids: packed.append(ids) or real(*ids))
    for token in range(5, 13):
        sequence.tokens.append(token)
        sequence.num_computed += 1
        if sequence.num_computed % SIZE == 0:
            sequence.pages += pool.allocate(1)
        cache.insert(sequence)
        cache.match(sequence)
    assert packed == [(4, 5, 6, 7), (8, 9, 10, 11)]


def test_without_a_cache_nothing_is_found_and_nothing_kept(pool):
    cache = NoPrefixCache()
    sequence, _ = admit(cache, pool, range(9))
    leave(cache, pool, sequence)
    assert hits(cache, range(9)) == 0
    assert pool.num_free == 16
    assert not cache.enabled


def test_what_hangs_below_an_evicted_page_goes_with_it(pool):
    cache = RadixCache(pool)
    first, _ = admit(cache, pool, range(9))
    # Computed side by side: its second page hangs below the first one's pages, and is held by it alone.
    second = Sequence(request(prompt=range(13)))
    cache.acquire(second, [])
    second.pages = pool.allocate(4)
    second.num_computed = 13
    cache.insert(second)
    leave(cache, pool, first)
    assert pool.num_cached == 2
    assert cache.evict(1) >= 1  # the page released longest ago, and what only it leads to
    cache.check()
    pool.check()
    assert hits(cache, range(13)) <= 1
    leave(cache, pool, second)
    cache.evict(16)
    assert pool.num_free == pool.num_pages


@pytest.mark.parametrize("kind", [PrefixCache, RadixCache])
def test_what_a_running_sequence_holds_is_pinned(pool, kind):
    cache = kind(pool)
    admit(cache, pool, range(9))
    gone, _ = admit(cache, pool, [50, *range(8)])
    leave(cache, pool, gone)
    assert cache.evict(16) == 2
    assert hits(cache, range(9)) == 2
