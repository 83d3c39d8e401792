"""A long run of random requests and cancels against `jaxllm serve` with the bundled model; then it must be as before.

    python tests/soak/soak.py --minutes 20 --out build/soak.json

In: minutes. Out: JSON of what was asked, what came, and the server's memory and books over time; exit code 1 when
memory grew, a page is missing, anything was compiled, or an answer was a 5xx. Every now and then three canaries sing:
each must say what it said at the beginning.
"""

import argparse
import asyncio
import collections
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.served import ADMIN, Served, resident_bytes

WORDS = (
    "def",
    "return",
    "class",
    "import",
    "for",
    "while",
    "list",
    "value",
    "json",
    "name",
    "city",
    "data",
    "open",
    "\n",
)
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}}, "required": ["ok"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CANARIES = ["def add(a, b):", "class Queue:\n    def push(self, item):", "import json\n\n\ndef load(path):\n"]
MIB = 2**20


def text(rng, most=240):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, most)))


def completion(rng):
    body = {"prompt": text(rng), "max_tokens": rng.randrange(1, 80), "temperature": rng.choice([0, 0.7, 1.3])}
    body |= rng.choice([{}, {}, {"n": 2}, {"logprobs": 5}, {"echo": True, "logprobs": 1}, {"stop": ["\n", "x"]}])
    body |= rng.choice([{}, {}, {"seed": 7}, {"presence_penalty": 1.5}, {"logit_bias": {"300": 5}}, {"min_p": 0.1}])
    body |= rng.choice([{}, {}, {"guided_regex": "[a-f]{1,9}"}, {"cache_salt": "mine"}, {"ignore_eos": True}])
    return "/v1/completions", body


def chat(rng):
    turns = rng.randrange(1, 4)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text(rng, 40)} for i in range(2 * turns - 1)]
    body = {"messages": messages, "max_tokens": rng.randrange(1, 80)}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": False}}
    body |= rng.choice([{}, {}, {"response_format": form}, {"tools": [TOOL]}, {"logprobs": True, "top_logprobs": 3}])
    return "/v1/chat/completions", body


def other(rng):
    said = [{"role": "user", "content": text(rng)}]
    flat, form = {"type": "function", **TOOL["function"]}, {"format": {"type": "json_schema", "schema": SCHEMA}}
    tool = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
    return rng.choice(
        [
            ("/v1/embeddings", {"input": [text(rng), text(rng)]}),
            ("/v1/responses", {"input": text(rng), "max_output_tokens": 20}),
            ("/v1/responses", {"input": said, "max_output_tokens": 60, "tools": [flat], "stream": rng.random() < 0.5}),
            ("/v1/messages", {"messages": said, "max_tokens": 20}),
            ("/v1/messages", {"messages": said, "max_tokens": 60, "tools": [tool], "stream": rng.random() < 0.5}),
            ("/v1/messages", {"messages": said, "max_tokens": 60, "output_config": form}),
            ("/generate", {"text": text(rng), "sampling_params": {"max_new_tokens": 20}}),
            ("/tokenize", {"prompt": text(rng)}),
        ]
    )


def bad(rng):
    return rng.choice(
        [
            ("/v1/completions", {"prompt": text(rng), "temperature": 9}),
            ("/v1/completions", {"prompt": [10**9]}),
            ("/v1/completions", {"prompt": "x", "guided_regex": "(" * rng.randrange(1, 9)}),
            ("/v1/chat/completions", {"messages": []}),
            ("/v1/completions", {"prompt": text(rng), "max_tokens": 10**6}),
        ]
    )


class Soak:
    def __init__(self, server, minutes, seed):
        self.server, self.minutes, self.rng = server, minutes, random.Random(seed)
        self.counts, self.wrong, self.samples = collections.Counter(), [], []
        self.began = time.monotonic()

    @property
    def over(self):
        return time.monotonic() - self.began > self.minutes * 60

    async def ask(self, http, rng):
        path, body = rng.choices([completion, chat, other, bad], [50, 30, 15, 5])[0](rng)
        streamed = path.startswith("/v1/c") and rng.random() < 0.7
        if streamed:
            body["stream"] = True
        cancels = rng.random() < 0.3
        try:
            if cancels and not streamed:
                await asyncio.wait_for(http.post(path, json=body), rng.random() * 0.2)
                self.counts["finished before its cancel"] += 1
                return
            async with http.stream("POST", path, json=body) as answer:
                self.counts[answer.status_code] += 1
                if answer.status_code >= 500:
                    self.wrong.append(f"{answer.status_code} {path} {(await answer.aread())[:200]!r}")
                left = rng.randrange(1, 30) if cancels else 10**9
                async for line in answer.aiter_lines():
                    left -= 1
                    if '"error":{' in line and answer.status_code == 200:
                        self.wrong.append(line[:200])
                    if not left:
                        self.counts["cancelled in mid-stream"] += 1
                        break
        except TimeoutError:
            self.counts["cancelled while waiting"] += 1

    async def worker(self, seed):
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, trust_env=False) as http:
            while not self.over:
                await self.ask(http, rng)

    async def canaries(self, http):
        async def sing(prompt):
            body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            return (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]

        return await asyncio.gather(*map(sing, CANARIES))

    async def books(self, http):
        answer = await http.get("/server_info", headers={"authorization": f"Bearer {ADMIN}"})
        stats = answer.json()["engine"]["stats"]
        pages = stats["free_pages"] + stats["cached_pages"] + stats["held_pages"]
        if pages != stats["total_pages"]:
            self.wrong.append(f"{pages} of {stats['total_pages']} pages are accounted for")
        return answer.json()

    async def watch(self):
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, trust_env=False) as http:
            alone = await self.canaries(http)
            workers = [asyncio.create_task(self.worker(self.rng.random())) for _ in range(12)]
            while not self.over:
                await asyncio.sleep(min(15, self.minutes * 6))
                await self.sample(http)
                if await self.canaries(http) != alone:
                    self.wrong.append("a canary said something else")
            await asyncio.gather(*workers)
            await asyncio.sleep(2)
            await self.sample(http)
            return await self.books(http)

    async def sample(self, http):
        info = await self.books(http)
        stats = info["engine"]["stats"]
        self.samples.append(
            {
                "s": round(time.monotonic() - self.began, 1),
                "front_mib": round(resident_bytes(self.server.pid) / MIB, 2),
                "engine_mib": round(resident_bytes(self.server.engine_pid()) / MIB, 2),
                "descriptors": len(list(Path(f"/proc/{self.server.pid}/fd").iterdir())),
                "compiles_after_ready": stats.get("compiles_after_ready"),
                "preemptions": stats["preemptions"],
                "cached_pages": stats["cached_pages"],
                "slots": info["in_flight"]["slots"],
            }
        )


def slope_mib_per_h(samples, name):
    """Of the straight line through the second half of the samples."""
    later = samples[len(samples) // 2 :]
    xs, ys = [one["s"] / 3600 for one in later], [one[name] for one in later]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mx) ** 2 for x in xs)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / spread if spread else 0.0


def growth_mib(samples, name):
    """From the middle of the run to its last quarter, each the median of its neighbours."""

    def median(part):
        return sorted(one[name] for one in part)[len(part) // 2]

    quarter = max(1, len(samples) // 4)
    return median(samples[-quarter:]) - median(samples[len(samples) // 2 - quarter // 2 :][:quarter])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-growth-mib", type=float, default=4.0, help="from the middle of the run to its end")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    pages = ("--num-gpu-blocks-override", "64")  # so few that they run out now and then
    with Served("--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--max-model-len", "1024", *pages) as server:
        soak = Soak(server, given.minutes, given.seed)
        last = asyncio.run(soak.watch())
        stats = last["engine"]["stats"]
        if stats["held_pages"] or last["in_flight"]["slots"] or stats["running"] or stats["waiting"]:
            soak.wrong.append(f"something is left: {last['in_flight']} {stats}")
        ended = server.stop()
    growth = {name: round(growth_mib(soak.samples, name), 2) for name in ("front_mib", "engine_mib")}
    if max(growth.values()) > given.max_growth_mib and given.minutes >= 5:
        soak.wrong.append(f"memory grew: {growth}")
    if stats.get("compiles_after_ready"):
        soak.wrong.append(f"{stats['compiles_after_ready']} compilations after ready")
    if ended:
        soak.wrong.append(f"the server ended with code {ended}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "command": f"python tests/soak/soak.py --minutes {given.minutes:g} --seed {given.seed}",
        "commit": commit.stdout.strip(),
        "minutes": round((time.monotonic() - soak.began) / 60, 2),
        "answers": {str(key): count for key, count in sorted(soak.counts.items(), key=str)},
        "requests": sum(soak.counts.values()),
        "growth_mib_middle_to_end": growth,
        "slope_mib_per_h": {n: round(slope_mib_per_h(soak.samples, n), 2) for n in ("front_mib", "engine_mib")},
        "compiles_after_ready": stats.get("compiles_after_ready"),
        "preemptions": stats["preemptions"],
        "pages": {name: stats[f"{name}_pages"] for name in ("free", "cached", "held", "total")},
        "wrong": soak.wrong[:50],
        "samples": soak.samples,
    }
    shown = json.dumps(result, indent=1)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(shown + "\n")
    print(json.dumps({**result, "samples": [soak.samples[0], soak.samples[-1]]}, indent=1))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
