"""Configuration: sources and their order, names, ranges, and what automatic values become."""

import itertools
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm import config as cfg
from jaxllm.config import ConfigError, EngineConfig, load, resolve, show


def load_clean(*args, **kwargs):
    return load(*args, environ=kwargs.pop("environ", {}), **kwargs)


def write(tmp_path, text):
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return path


def test_nothing_given_is_the_bundled_model_with_automatic_sizes():
    config = load_clean()
    assert config == EngineConfig()
    assert config.model.path == cfg.BUNDLED_MODEL
    assert config.scheduler.max_num_seqs == cfg.AUTO


def test_toml_tables_and_flat_names_mean_the_same(tmp_path):
    tables = write(tmp_path, 'seed = 3\n[model]\npath = "m"\n[cache]\npage_size = 32\n[scheduler]\ntoken_budget = 64\n')
    assert load_clean(tables) == load_clean(model="m", seed=3, block_size=32, max_num_batched_tokens=64)


def test_a_flat_model_path_works_in_toml_too(tmp_path):
    assert load_clean(write(tmp_path, 'model = "m"\n')).model.path == "m"


@pytest.mark.parametrize(
    ("vllm", "value", "section", "ours"),
    [
        ("max_num_seqs", 4, "scheduler", "max_num_seqs"),
        ("max_num_batched_tokens", 64, "scheduler", "token_budget"),
        ("scheduling_policy", "priority", "scheduler", "policy"),
        ("max_model_len", 99, "model", "max_model_len"),
        ("dtype", "bfloat16", "model", "dtype"),
        ("load_format", "dummy", "model", "load_format"),
        ("gpu_memory_utilization", 0.5, "cache", "memory_fraction"),
        ("enable_prefix_caching", False, "cache", "prefix_cache"),
        ("block_size", 8, "cache", "page_size"),
        ("num_gpu_blocks_override", 7, "cache", "num_pages"),
    ],
)
def test_vllm_names_are_understood(vllm, value, section, ours):
    assert getattr(getattr(load_clean(**{vllm: value}), section), ours) == value


def test_dtype_answers_to_its_short_names():
    assert load_clean(dtype="bf16").model.dtype == "bfloat16"
    assert load_clean(dtype="half").model.dtype == "float16"


def test_overrides_beat_environment_beats_file_beats_default(tmp_path):
    path = write(tmp_path, 'model = "file"\nlog_level = "error"\nseed = 5\n')
    environ = {"JAXLLM_MODEL": "env", "JAXLLM_LOG": "debug"}
    config = load_clean(path, environ=environ, model="flag")
    assert (config.model.path, config.log_level, config.seed) == ("flag", "debug", 5)
    assert load_clean(path, environ=environ).model.path == "env"


def test_none_means_not_given(tmp_path):
    path = write(tmp_path, "seed = 5\n[cache]\npage_size = 8\n")
    config = load_clean(path, seed=None, page_size=None, cache={"num_pages": None}, max_model_len=None)
    assert (config.seed, config.cache.page_size) == (5, 8)


def test_a_section_may_be_given_whole():
    scheduler = cfg.SchedulerConfig(max_num_seqs=3)
    assert load_clean(scheduler=scheduler).scheduler == scheduler
    assert load_clean(scheduler={"max_num_seqs": 3}).scheduler == scheduler


def test_an_unknown_name_is_refused_with_the_nearest_and_all_allowed_names():
    with pytest.raises(ConfigError, match=r"'max_num_seq' \(did you mean 'max_num_seqs'\?\); allowed: .*token_budget"):
        load_clean(max_num_seq=4)


def test_an_unknown_name_in_a_table_names_table_and_file(tmp_path):
    path = write(tmp_path, "[cache]\npage_sise = 8\n")
    with pytest.raises(ConfigError, match=r"'page_sise' in \[cache\] in .*serve.toml \(did you mean 'page_size'\?\)"):
        load_clean(path)


def test_a_setting_in_the_wrong_table_is_unknown_there(tmp_path):
    with pytest.raises(ConfigError, match=r"'max_num_seqs' in \[cache\]"):
        load_clean(write(tmp_path, "[cache]\nmax_num_seqs = 8\n"))


def test_two_names_of_one_setting_must_agree():
    assert load_clean(page_size=8, block_size=8).cache.page_size == 8
    with pytest.raises(ConfigError, match="page_size and block_size are the same setting"):
        load_clean(page_size=8, block_size=16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("page_size", 24, "cache.page_size = 24: must be a power of two in [1, 256], or 0 for automatic"),
        ("page_size", 512, "[1, 256]"),
        ("page_size", True, "cache.page_size = True"),
        ("page_size", False, "cache.page_size = False"),
        ("num_pages", 0, "cache.num_pages = 0: must be an integer in [1, 2147483647]"),
        ("memory_fraction", 0, "cache.memory_fraction = 0: must be a number in (0, 1]"),
        ("memory_fraction", 1.5, "(0, 1]"),
        ("memory_fraction", float("nan"), "(0, 1]"),
        ("memory_fraction", "0.5", "(0, 1]"),
        ("packed_weights", "yes", "model.packed_weights = 'yes': must be true or false"),
        ("prefix_cache", 1, "cache.prefix_cache = 1: must be true or false"),
        ("cpu_cache_bytes", 10, "cache.cpu_cache_bytes = 10: must be an integer in [1024,"),
        ("max_num_seqs", -1, "scheduler.max_num_seqs = -1: must be an integer in [1, 4096], or 0 for automatic"),
        ("max_num_seqs", 2.0, "scheduler.max_num_seqs = 2.0"),
        ("token_budget", 2**21, "scheduler.token_budget = 2097152"),
        ("max_prefill_chunk", 0, "scheduler.max_prefill_chunk = 0"),
        ("policy", "lifo", "scheduler.policy = 'lifo': must be one of fcfs, priority"),
        ("max_model_len", 1, "model.max_model_len = 1: must be an integer in [2,"),
        ("dtype", "int8", "model.dtype = 'int8': must be one of auto, bfloat16, float32, float16"),
        ("dtype", ["auto"], "model.dtype = ['auto']"),
        ("load_format", "pt", "model.load_format = 'pt': must be one of auto, dummy"),
        ("model", 7, "model.path = 7: must be a text"),
        ("model", "a\0b", "must be a text without NUL"),
        ("seed", 2**64, "seed = 18446744073709551616"),
        ("threads", 1000, "compile.threads = 1000"),
        ("decode_buckets", [4, 2], "compile.decode_buckets = [4, 2]: must be a list of increasing integers >= 1"),
        ("token_buckets", [0, 2], "compile.token_buckets"),
        ("token_buckets", 8, "compile.token_buckets = 8"),
        ("log_level", "loud", "log_level = 'loud': must be one of debug"),
        ("cache", 5, "cache = 5: must be a table"),
    ],
)
def test_a_value_out_of_range_names_setting_value_and_range(name, value, message):
    with pytest.raises(ConfigError) as caught:
        load_clean(**{name: value})
    assert message in str(caught.value)


def test_a_dataclass_built_by_hand_is_checked_as_well():
    with pytest.raises(ConfigError, match=r"scheduler.max_num_seqs = 0\.5"):
        cfg.SchedulerConfig(max_num_seqs=0.5)


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml': No such file"):
        load_clean(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_clean(write(tmp_path, "seed = = 3"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_clean(tmp_path / "bytes.toml")


def test_resolve_fills_by_platform():
    cpu, gpu = (resolve(load_clean(), 2048, platform) for platform in ("cpu", "gpu"))
    assert (cpu.cache.page_size, cpu.scheduler.max_num_seqs, cpu.scheduler.token_budget) == (16, 16, 512)
    assert (gpu.cache.page_size, gpu.scheduler.max_num_seqs, gpu.scheduler.token_budget) == (64, 256, 8192)
    assert (cpu.model.max_model_len, cpu.model.dtype, gpu.model.dtype) == (2048, "float32", "bfloat16")
    assert cpu.compile.decode_buckets == (1, 4, 16)
    assert cpu.compile.token_buckets == (32, 128, 512)
    assert gpu.compile.decode_buckets == (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
    assert gpu.compile.token_buckets == (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def test_resolve_keeps_what_was_given_and_is_idempotent():
    config = load_clean(page_size=8, max_num_seqs=3, token_budget=20, dtype="float16", max_model_len=100)
    resolved = resolve(config, 128, "gpu")
    assert resolved.compile.decode_buckets == (1, 2, 3)
    assert resolved.compile.token_buckets == (20,)
    assert (resolved.cache.page_size, resolved.model.dtype, resolved.model.max_model_len) == (8, "float16", 100)
    assert resolve(resolved, 128, "gpu") == resolved


def test_a_given_ladder_is_closed_at_the_top_and_refused_above_it():
    assert resolve(load_clean(decode_buckets=[2], max_num_seqs=6), 64, "cpu").compile.decode_buckets == (2, 6)
    with pytest.raises(ConfigError, match=r"compile.decode_buckets = \[2, 8\]: the largest bucket must be at most 6"):
        resolve(load_clean(decode_buckets=[2, 8], max_num_seqs=6), 64, "cpu")


def test_one_given_size_moves_the_other_and_two_must_fit_together():
    assert resolve(load_clean(token_budget=8), 64, "cpu").scheduler.max_num_seqs == 8
    assert resolve(load_clean(max_num_seqs=1024), 64, "cpu").scheduler.token_budget == 1024
    with pytest.raises(ConfigError, match=r"token_budget = 4: must be at least scheduler.max_num_seqs \(8\)"):
        resolve(load_clean(token_budget=4, max_num_seqs=8), 64, "cpu")


def test_a_length_beyond_the_models_context_is_refused():
    with pytest.raises(ConfigError, match="max_model_len = 4096: the model's context is 2048"):
        resolve(load_clean(max_model_len=4096), 2048, "cpu")


def test_an_unknown_platform_is_refused():
    with pytest.raises(ConfigError, match="'tpu': must be one of cpu, gpu"):
        resolve(load_clean(), 2048, "tpu")


@given(largest=st.integers(1, 100_000), smallest=st.integers(1, 64), growth=st.integers(2, 4))
def test_a_ladder_increases_and_ends_at_its_largest(largest, smallest, growth):
    ladder = cfg.bucket_ladder(largest, smallest, growth)
    assert ladder[-1] == largest
    assert all(a < b <= a * growth for a, b in itertools.pairwise(ladder))


@given(largest=st.integers(1, 5000), apart=st.sampled_from([8, 32]))
def test_a_ladder_of_rows_pads_by_no_more_than_it_says(largest, apart):
    ladder = cfg.bucket_ladder(largest, 1, 2, apart)
    assert ladder[-1] == largest
    assert all(a < b <= min(2 * a, a + max(apart, a // 4)) for a, b in itertools.pairwise(ladder))


@given(path=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), seed=st.integers(-5, 5))
def test_show_is_toml_that_loads_back_equal(path, seed, tmp_path_factory):
    config = resolve(load_clean(model=path, seed=seed, num_pages=seed + 6), 512, "cpu")
    file = tmp_path_factory.mktemp("config") / "shown.toml"
    file.write_text(show(config), newline="")
    assert load_clean(file) == config


def test_show_says_what_stays_automatic():
    text = show(resolve(load_clean(), 512, "cpu"))
    assert "# num_pages is automatic" in text
    assert tomllib.loads(text)["scheduler"]["max_num_seqs"] == 16


def test_a_model_directory_is_found_by_path_or_refused(tmp_path):
    assert cfg.model_directory(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"model = '.*/nowhere': no such directory.*nothing is downloaded"):
        cfg.model_directory(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give the directory"):
        cfg.model_directory(str(tmp_path / "file"))


def test_a_bundled_name_points_into_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(cfg.importlib.resources, "files", lambda package: tmp_path)
    (tmp_path / "models" / cfg.BUNDLED_MODEL).mkdir(parents=True)
    assert cfg.model_directory(cfg.BUNDLED_MODEL) == tmp_path / "models" / cfg.BUNDLED_MODEL


def test_importing_the_config_imports_no_jax():
    script = "import sys, jaxllm.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_at_most_five_environment_variables():
    assert len({*cfg.ENVIRONMENT, cfg.API_KEY_VARIABLE}) <= 5


def test_the_engine_leaves_the_front_its_table_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("max_num_seqs = 3\n[server]\nport = 9000\n")
    assert cfg.load(recipe, environ={}).scheduler.max_num_seqs == 3
    assert cfg.load_table(recipe, "server") == {"port": 9000}
    assert cfg.load_table(None, "server") == {}
    recipe.write_text("server = 5\n")
    with pytest.raises(ConfigError, match="server = 5: must be a table"):
        cfg.load_table(recipe, "server")


def test_the_api_key_comes_from_the_environment_and_is_in_no_config():
    assert cfg.environment_api_key({"JAXLLM_API_KEY": "secret"}) == "secret"
    assert cfg.environment_api_key({}) is None
    assert "secret" not in cfg.show(cfg.load(environ={"JAXLLM_API_KEY": "secret"}))
