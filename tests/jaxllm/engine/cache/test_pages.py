import pytest

from jaxllm.engine.cache.pages import OutOfPages, PagePool


def states(pool):
    pool.check()
    return pool.num_free, pool.num_cached, pool.num_held


def test_allocated_pages_are_distinct_and_come_back():
    pool = PagePool(8, 4)
    pages = pool.allocate(3) + pool.allocate(5)
    assert sorted(pages) == list(range(8))
    assert states(pool) == (0, 0, 8)
    pool.free(pages)
    assert states(pool) == (8, 0, 0)


def test_asking_for_more_than_is_free_names_the_numbers_and_takes_nothing():
    pool = PagePool(4, 4)
    pool.allocate(1)
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 of 4 free"):
        pool.allocate(4)
    assert states(pool) == (3, 0, 1)


def test_a_shared_page_is_free_only_when_its_last_holder_leaves():
    pool = PagePool(2, 4)
    pages = pool.allocate(1)
    pool.share(pages)
    pool.free(pages)
    assert states(pool) == (1, 0, 1)
    pool.free(pages)
    assert states(pool) == (2, 0, 0)


def test_a_kept_page_becomes_cached_and_can_be_held_again():
    pool = PagePool(2, 4)
    (page,) = pool.allocate(1)
    pool.keep(page)
    pool.free([page])
    assert states(pool) == (1, 1, 0)
    pool.share([page])
    assert states(pool) == (1, 0, 1)
    assert pool.holders(page) == 1


def test_dropping_a_cached_page_frees_it_and_dropping_a_held_one_does_not():
    pool = PagePool(2, 4)
    cached, held = pool.allocate(2)
    pool.keep(cached)
    pool.keep(held)
    pool.free([cached])
    pool.drop(cached)
    pool.drop(held)
    assert states(pool) == (1, 0, 1)
    pool.free([held])
    assert states(pool) == (2, 0, 0)


def test_cached_pages_are_listed_least_recently_released_first():
    pool = PagePool(3, 4)
    a, b, c = pool.allocate(3)
    for page in (a, b, c):
        pool.keep(page)
    pool.free([b, a, c])
    pool.share([b])
    pool.free([b])
    assert list(pool.cached()) == [a, c, b]


def test_freeing_once_too_often_is_an_error():
    pool = PagePool(2, 4)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(ValueError, match="freed more often"):
        pool.free(pages)


@pytest.mark.parametrize("misuse", ["share", "keep", "drop"])
def test_a_free_page_can_be_neither_shared_nor_kept_nor_dropped(misuse):
    pool = PagePool(2, 4)
    with pytest.raises(ValueError, match="page 0"):
        pool.share([0]) if misuse == "share" else getattr(pool, misuse)(0)
    assert states(pool) == (2, 0, 0)


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(num_pages, page_size):
    with pytest.raises(ValueError, match=">= 1"):
        PagePool(num_pages, page_size)


def test_check_notices_a_page_that_is_lost():
    pool = PagePool(2, 4)
    pool._free.pop()
    with pytest.raises(AssertionError, match="is in 0 states"):
        pool.check()
