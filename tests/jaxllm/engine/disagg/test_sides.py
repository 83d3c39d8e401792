"""One config as two sides, under the names that users of vLLM and SGLang know."""

import dataclasses

import pytest

from jaxllm.config import ConfigError, load, resolve, show
from jaxllm.engine.disagg.sides import decode_side, prefill_side


def config(**settings):
    return load(environ={}, **settings)


@pytest.mark.parametrize(
    ("name", "value", "role"),
    [
        ("role", "both", "both"),
        ("disaggregation_mode", "prefill", "prefill"),
        ("disaggregation_mode", "null", "none"),
        ("kv_role", "kv_producer", "prefill"),
        ("kv_role", "kv_consumer", "decode"),
        ("kv_role", "kv_both", "both"),
    ],
)
def test_a_role_answers_to_the_names_that_people_know(name, value, role):
    assert config(**{name: value}).disaggregation.role == role


def test_workers_are_a_list_or_one_text_and_each_is_named_once():
    several = config(prefill_workers="a:1, b:2,a:1").disaggregation.workers
    assert several == config(workers=["a:1", "b:2"]).disaggregation.workers == ("a:1", "b:2")


def test_the_table_is_printed_and_read_back(tmp_path):
    given = config(role="decode", workers=["a:1"], prefill_tensor=2, wait_s=5, prefill_num_pages=9)
    path = tmp_path / "shown.toml"
    path.write_text(show(given))
    assert "[disaggregation]" in path.read_text()
    assert load(path, environ={}) == given


def test_the_prefill_side_is_the_decode_side_but_for_what_is_said():
    given = config(role="both", tensor=2, max_num_seqs=64, token_budget=512, num_pages=70, page_size=16)
    first, second = prefill_side(given), decode_side(given)
    assert first.disaggregation.role == second.disaggregation.role == "none"
    assert second.mesh == first.mesh == given.mesh
    assert (second.scheduler, second.cache) == (given.scheduler, given.cache)
    decodes_nothing = dataclasses.replace(given.scheduler, decode_steps=1)
    assert (first.scheduler, first.cache) == (decodes_nothing, given.cache)
    assert first.compile.decode_buckets == (64,)
    other = config(
        role="both", tensor=2, prefill_tensor=1, prefill_max_num_seqs=4, prefill_token_budget=4096, prefill_num_pages=9
    )
    first = prefill_side(other)
    assert (first.mesh.tensor, first.scheduler.max_num_seqs, first.scheduler.token_budget) == (1, 4, 4096)
    assert (first.cache.num_pages, decode_side(other).cache.num_pages) == (9, None)
    assert resolve(first, 8192, "gpu").compile.token_buckets[-1] == 4096


def test_sizes_that_do_not_fit_together_are_refused():
    with pytest.raises(ConfigError, match="prefill_token_budget = 8: must be at least the prefill side's sequences"):
        prefill_side(config(role="both", max_num_seqs=16, prefill_token_budget=8))
    for mesh in ({"data": 2}, {"pipe": 2}, {"seq": 2}):
        with pytest.raises(ConfigError, match=f"mesh.{next(iter(mesh))} = 2 with disaggregation.role = 'both'"):
            decode_side(config(role="both", mesh=mesh))
