"""Every mix of parallelisms on eight simulated devices: as one device, or refused with a reason; the table is a page.

Each mesh serves a small model with fewer kv heads than devices: a dense one with biases, or, where there is `ep`, one
with routed and shared experts; then the same with quantised weights. `docs/parallelism.md` is written here from what
was seen; a test fails where the committed page says something else.
"""

import contextlib
import functools
import gc
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.byte_tokenizer import EOS, tokenizer_json

from jaxllm.config import load
from jaxllm.core import SamplingParams
from jaxllm.engine.decoding import grammars
from jaxllm.engine.startup import start
from jaxllm.graph.models.config import ModelConfig
from jaxllm.graph.models.decoder import abstract
from jaxllm.graph.weights.names import to_checkpoint
from sharding.axes import MeshError

PAGE = Path(__file__).parent.parent.parent / "docs" / "parallelism.md"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "eos_token_id": EOS,
    "bos_token_id": 0,
}
EXPERTS = MODEL | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
}
SHAPE = dict(
    cache_dir="",
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=32,
    decode_buckets=[4],
    token_buckets=[32],
    page_size=8,
    num_pages=128,
    threads=2,
)
NAMES = {"tp": (1, 2, 4, 8), "pp": (1, 2), "dp": (1, 2), "ep": (1, 2), "cp": (1, 2)}


def meshes():
    """All mixes of at most eight devices; where there is tp also with sp, where there is ep with attention data."""
    for sizes in itertools.product(*NAMES.values()):
        if int(np.prod(sizes)) <= 8:
            mesh = dict(zip(NAMES, sizes))
            yield mesh
            if mesh["tp"] > 1:
                yield mesh | {"sp": True}
            if mesh["ep"] > 1 and mesh["pp"] == mesh["cp"] == 1:
                yield mesh | {"attention_data": True}


def label(mesh):
    sizes = " ".join(f"{name}{mesh[name]}" for name in NAMES if mesh[name] > 1) or "one device"
    return sizes + " sp" * mesh.get("sp", False) + " attention data" * mesh.get("attention_data", False)


MESHES = {label(mesh): mesh for mesh in meshes()}
# Each parallelism, each pair, and the deepest mixes: the rest of the table is run by `make test-mesh`.
EVERY_TIME = (
    "tp8 sp",
    "tp2 pp2 dp2 sp",
    "pp2 dp2 cp2",
    "tp2 pp2 cp2 sp",
    "tp4 cp2",
    "tp2 dp2 ep2 sp",
)

# With int4 the head is int8: one start shows both. Where groups of inputs would be torn, int8 alone.
QUANTISED = {"int4": {"quantization": "int4", "quantization_group": 32}, "int8": {"quantization": "int8"}}


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
WORDS = {"type": "object", "properties": {"name": {"enum": ["Ada", "Alan"]}}, "required": ["name"]}


def checkpoint(folder, raw):
    """A model directory with random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    config = ModelConfig.from_hf(raw)
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        name = path[-1].key
        spread = {"embed": 1.0, "head": 0.1}.get(name, 0.1 if "norm" in name or "bias" in name else 0.2)
        return (rng.normal(0, spread, shape.shape) + ("norm" in name)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, abstract(config, jnp.float32)[1])
    safetensors.numpy.save_file(to_checkpoint(params, config), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Dense or not -> the model's directory."""
    root = tmp_path_factory.mktemp("models")
    return {True: checkpoint(root / "dense", MODEL), False: checkpoint(root / "experts", EXPERTS)}


def prompt(length, salt=0):
    return np.random.default_rng(1000 * salt + length).integers(2, 256, length).tolist()


def serve(engine, requests):
    """[(prompt, params)] -> their sequences, finished; no page stays held."""
    sequences = [engine.add(engine.make_request(ids, params))[0] for ids, params in requests]
    while engine.has_work:
        engine.step()
        engine.check()
    return sequences


def log_probabilities(engine, ids):
    """Of every prompt token and its alternatives, and of the tokens that follow."""
    params = GREEDY.replace(max_tokens=3, logprobs=5, prompt_logprobs=5)
    engine.add(engine.make_request(ids, params))
    found = []
    while engine.has_work:
        for output in engine.step():
            found += [*output.prompt_logprobs, *([output.logprobs] if output.logprobs else [])]
    return np.array([[p.logprob, *(value for _, value in p.top)] for p in found])


def observe(engine):
    """What one device and every mesh must agree on."""
    shared = prompt(24, salt=9)
    short = [(prompt(n), GREEDY) for n in (3, 8, 9, 17, 5)]
    first, second = (serve(engine, [(shared + prompt(4, salt), GREEDY)])[0] for salt in (1, 2))
    spec = grammars.json_schema(WORDS)
    seeded = SamplingParams(max_tokens=40, seed=5, grammar=spec)
    return {
        "greedy": [s.output_token_ids for s in serve(engine, short)],
        "prefix cache": ([first.output_token_ids, second.output_token_ids], second.num_cached),
        "chunked prefill": serve(engine, [(prompt(75, salt=3), GREEDY)])[0].output_token_ids,  # of 32 tokens a step
        "structured": serve(engine, [(prompt(6), seeded)])[0].output_token_ids,
        "log-probabilities": log_probabilities(engine, prompt(40, salt=4)),
    }


def observe_quantised(engine):
    """Of quantised weights: the same schedule and pages lie above them."""
    short = [(prompt(n), GREEDY) for n in (3, 9, 17)]
    found = {"greedy": [s.output_token_ids for s in serve(engine, short)]}
    return found | {"log-probabilities": log_probabilities(engine, prompt(40, salt=4))}


@pytest.fixture(autouse=True)
def compiled_code_is_given_back():
    """Executables on a CPU are maps of memory, of which a process may have 65,530: XLA crashes at the 46th mesh."""
    yield
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def started(directory, **settings):
    engine = start(load(model=str(directory), **SHAPE, **settings))[0]
    yield engine
    engine.grammars.close()
    engine.grammars.trial.close()


@pytest.fixture(scope="module")
def alone(directories):
    """Dense or not -> what one device says, looked at when it is first asked for."""

    @functools.cache
    def seen(dense, scheme=None):
        if scheme is not None:
            with started(directories[dense], **QUANTISED[scheme]) as engine:
                return observe_quantised(engine)
        with started(directories[dense]) as engine:
            found = observe(engine)
        assert len({token for tokens in found["greedy"] for token in tokens}) > 20, "the model says one thing only"
        assert found["prefix cache"][1] == 24
        return found

    return seen


def compare_numbers(alone, seen):
    """Column -> None, or what differs."""
    error = np.abs(seen["log-probabilities"] - alone["log-probabilities"]).max()
    return {
        "greedy": None if seen["greedy"] == alone["greedy"] else "other tokens",
        "log-probabilities": None if error < 1e-5 else f"differ by {error:.1e}",
    }


def compare(alone, seen, caches):
    found = compare_numbers(alone, seen)
    cached = alone["prefix cache"][1] if caches == 1 else None  # the second request may go to another cache
    same = seen["prefix cache"][0] == alone["prefix cache"][0] and cached in (None, seen["prefix cache"][1])
    found["prefix cache"] = None if same else "other tokens or no hit"
    for name in ("chunked prefill", "structured"):
        found[name] = None if seen[name] == alone[name] else "other tokens"
    return found


class Results(dict):
    """Mesh -> column -> cell. Each goes to the page as it comes, where that has none yet: a long run may be cut."""

    def __init__(self):
        super().__init__()
        self.known = rows_of(PAGE.read_text().split(MARK)[1])

    def note(self, name, cells):
        self.setdefault(name, {}).update(cells)
        told = {mesh for mesh in MESHES if mesh in self or mesh in self.known}
        PAGE.write_text(page({mesh: self.get(mesh, {}) | self.known.get(mesh, {}) for mesh in MESHES if mesh in told}))


@pytest.fixture(scope="module")
def results():
    return Results()


def run(name, directories, alone, results):
    mesh = MESHES[name]
    dense = mesh["ep"] == 1
    try:
        with started(directories[dense], **mesh) as engine:
            seen = observe(engine)
    except MeshError as reason:
        results.note(name, dict.fromkeys(COLUMNS, refusal(reason)))
        return
    caches = mesh["dp"] * mesh["pp"] * (mesh["ep"] if "attention_data" in mesh else 1)  # a pipeline has a lane a stage
    found = compare(alone(dense), seen, caches)
    results.note(name, {column: wrong or "same" for column, wrong in found.items()})
    assert not any(found.values()), found


def run_quantised(name, directories, alone, results):
    mesh, refused = MESHES[name], ""
    dense = mesh["ep"] == 1
    for scheme, settings in QUANTISED.items():
        try:
            with started(directories[dense], **mesh, **settings) as engine:
                seen = observe_quantised(engine)
        except MeshError as reason:
            refused += f"; {scheme} {refusal(reason)}"
            continue
        found = compare_numbers(alone(dense, scheme), seen)
        wrong = "; ".join(f"{column}: {what}" for column, what in found.items() if what)
        results.note(name, {"quantised": f"{wrong or 'same'} ({scheme}{refused})"})
        assert not wrong
        return
    results.note(name, {"quantised": refused[2:]})


@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_mesh_gives_what_one_device_gives_or_says_why_not(name, directories, alone, results):
    run(name, directories, alone, results)


@pytest.mark.mesh
@pytest.mark.parametrize("name", [name for name in MESHES if name not in EVERY_TIME])
def test_every_other_mesh_too(name, directories, alone, results):
    run(name, directories, alone, results)


@pytest.mark.mesh
@pytest.mark.parametrize("name", MESHES)
def test_quantised_weights_on_a_mesh_give_what_they_give_on_one_device(name, directories, alone, results):
    run_quantised(name, directories, alone, results)


def test_the_page_says_what_was_seen(results):
    """A cell that the page did not know has been filled; one that it knew must say what was seen."""
    known = {
        name: {column: results.known.get(name, {}).get(column, cell) for column, cell in cells.items()}
        for name, cells in results.items()
    }
    assert known == results


COLUMNS = ("greedy", "log-probabilities", "prefix cache", "chunked prefill", "structured", "quantised")


def refusal(reason):
    """Up to the arithmetic: what to do about it follows."""
    return "refused: " + str(reason).split(", and ")[0].replace("|", "/").removeprefix("a quantised weight whose ")


def rows_of(table):
    """Mesh -> column -> cell, of those that say something."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    head, *rows = lines or [[]]
    return {name: {column: cell for column, cell in zip(head[1:], cells) if cell} for name, *cells in rows}


def page(rows):
    head = PAGE.read_text().split(MARK)[0]
    table = [f"| mesh | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    table += [f"| {name} | {' | '.join(cells.get(column, '') for column in COLUMNS)} |" for name, cells in rows.items()]
    return head + MARK + "\n\n" + "\n".join(table) + "\n"


MARK = "<!-- The table below is written by tests/sharding/test_matrix.py: make test-mesh -->"
