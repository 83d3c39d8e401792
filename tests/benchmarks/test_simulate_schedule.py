"""The virtual clock: measured runs are found again, and time is neither lost nor counted twice."""

import random

import pytest

from benchmarks import simulate_schedule
from benchmarks.simulate_schedule import COMPARED, NOW, configured, offline_lengths, simulate
from jaxllm.engine.buckets import Padding

BEFORE = {  # the ladders of the run with 9,106 tokens a second
    "decode_buckets": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "token_buckets": [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192],
}


def test_the_measured_workload_is_found_again():
    found = simulate(offline_lengths(), configured(**BEFORE), COMPARED, padding=Padding())
    assert found.output_tokens == 133_966
    assert found.rate == pytest.approx(9106, rel=0.05)
    parts = sum(ms for name, ms in found.spent_ms.items() if name.startswith("parts/"))
    steps = sum(ms for name, ms in found.spent_ms.items() if name.startswith("steps/"))
    assert parts == pytest.approx(steps)
    assert parts + found.idle_ms == pytest.approx(1e3 * found.seconds)


def test_another_measured_run_has_the_same_number_of_steps():
    """async_engine_h200/lead-3.txt: 144,160 tokens in 1,039 steps and 15.66 s."""
    source = random.Random(0)
    prompts, outs = ([source.randint(100, 1024) for _ in range(256)] for _ in range(2))
    config = configured(decode_buckets=[1, 32, 256], token_buckets=[1024, 8192])
    found = simulate(list(zip(prompts, outs, strict=True)), config, COMPARED, padding=Padding())
    assert (found.output_tokens, found.steps) == (144_160, 1039)
    assert found.seconds == pytest.approx(15.66, rel=0.05)


def test_measured_decode_steps_and_prefills_are_found_again():
    for batch, measured in ((1, 4.43), (32, 5.95), (256, 17.9)):
        config = configured()
        long, short = (simulate([(1024, out)] * batch, config, NOW, temperature=0.0).seconds for out in (192, 64))
        assert 1e3 * (long - short) / 128 == pytest.approx(measured, rel=0.02)
    for tokens, measured in ((1024, 23.9), (8192, 208.6)):
        config = configured(max_model_len=16_384)
        found = simulate([(tokens, 1)], config, NOW, temperature=0.0)
        assert 1e3 * found.seconds == pytest.approx(measured, rel=0.05)


def test_a_closed_loop_never_has_more_than_its_concurrency_and_serves_everybody():
    lengths = [(40 + place, 5 + place % 3) for place in range(12)]
    found = simulate(lengths, configured(), NOW, concurrency=4)
    assert found.output_tokens == sum(out for _, out in lengths)
    assert len(found.ttft_ms) == 12
    assert max(int(name.split()[1]) for name in found.shapes if name.startswith("decode")) <= 4


def test_requests_that_come_by_themselves_wait_for_a_step_and_not_for_each_other():
    found = simulate([(100, 10)] * 40, configured(), NOW, rate=2.0)
    assert found.output_tokens == 400
    assert found.seconds > 15  # 40 of them at two a second
    assert max(found.ttft_ms) < 40


def test_a_prompt_comes_to_the_engine_when_a_thread_of_the_front_has_read_it():
    first, last = [], []
    for threads in (1, 4):
        found = simulate([(100, 2)] * 4, configured(), NOW, concurrency=4, front_ms=50.0, front_threads=threads)
        first.append(min(found.ttft_ms))
        last.append(max(found.ttft_ms))
    assert 50 < first[1] == last[1] < first[0] + 20 < 200 < last[0]


def test_filling_padded_sizes_makes_a_prompt_between_two_of_them_faster_alone_and_in_company():
    lengths = [(1100, 40)] * 6
    for concurrency in (1, 3):
        ways = [simulate(lengths, configured(), NOW, concurrency=concurrency, padding=way) for way in (Padding(), None)]
        assert ways[1].seconds < 0.95 * ways[0].seconds
        assert max(ways[1].ttft_ms) < max(ways[0].ttft_ms)


def test_the_command_prints_where_the_time_went(capsys, monkeypatch):
    monkeypatch.setattr(simulate_schedule, "offline_lengths", lambda: [(30, 4), (50, 3)])
    simulate_schedule.main(["--set", "max_num_seqs=4", "--attention", "4.1"])
    text = capsys.readouterr().out
    assert "7 tokens" in text
    assert "mixed 128" in text
    assert "products of padding" in text
    simulate_schedule.main(["--serve", "2", "--input", "8", "--output", "3"])
    assert capsys.readouterr().out.startswith("concurrency 2: ")
    simulate_schedule.main(["--rate", "50", "--waves", "1", "--input", "8", "--output", "3", "--ratio", "0.5"])
    assert capsys.readouterr().out.startswith("50 requests a second: ")
