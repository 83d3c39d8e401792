"""An OpenAI server without a model, for the web page: answers are written down here, metrics move like a real server's.

What it says depends on the last user message: "long" streams until it is stopped, "fail" ends in an error event,
"refuse" is a 400, "think" reasons first, "code" is Markdown; tools, JSON schemas and tool results are honoured.
"""

import asyncio
import contextlib
import json
import math
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from serve.ui.assets import ui_routes

CODE = """Merging walks both lists once:

```python
def merge(a: list[int], b: list[int]) -> list[int]:
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] <= b[j]:
            out.append(a[i]); i += 1
        else:
            out.append(b[j]); j += 1
    return out + a[i:] + b[j:]
```

- **Time** is `O(n + m)`, each element is looked at once.
- *Stable*: equal elements of `a` come first.
  - so it can serve a merge sort

| case | result |
|---|---|
| `[]`, `[1]` | `[1]` |
| `[2]`, `[1, 3]` | `[1, 2, 3]` |

See [the notes](https://example.com/notes). <script>alert(1)</script> stays text."""


THOUGHTS = "The question is short, so the answer can be short too."


def error(status, message, param=None):
    body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}
    return JSONResponse(body, status)


class FakeOpenAI:
    def __init__(self, delay_s=0.01):
        self.delay_s = delay_s
        self.requests = []
        self.open_streams = 0
        self.answers = 0
        self.ready = True
        self.began = time.monotonic()

    def app(self):
        return Starlette(
            routes=[
                Route("/v1/models", lambda r: JSONResponse({"object": "list", "data": [{"id": "first-light"}]})),
                Route("/ready", lambda r: PlainTextResponse("ok" if self.ready else "no", 200 if self.ready else 503)),
                Route("/metrics", lambda r: PlainTextResponse(self.metrics())),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                *ui_routes(),
            ]
        )

    async def chat(self, request):
        body = await request.json()
        self.requests.append(body)
        said = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
        if "refuse" in said:
            return error(400, "temperature = 3: must be a number in [0, 2]", "temperature")
        return StreamingResponse(self.stream(body, said), media_type="text/event-stream")

    async def stream(self, body, said):
        self.open_streams += 1
        try:
            async for event in self.events(body, said):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.open_streams -= 1

    async def events(self, body, said):
        self.answers += 1
        deltas, finish, count = self.deltas(body, said), "stop", 0
        yield self.chunk({"role": "assistant", "content": ""})
        async for delta in deltas:
            if delta is None:
                yield {"error": {"message": "engine_error: a step of the engine failed", "type": "server_error"}}
                return
            count += 1
            finish = "tool_calls" if "tool_calls" in delta else finish
            yield self.chunk(delta)
        yield self.chunk({}, finish)
        usage = {"prompt_tokens": 9, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 4}}
        yield {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage}

    @staticmethod
    def chunk(delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}

    async def deltas(self, body, said):
        last = body["messages"][-1]
        if body.get("tools") and body.get("tool_choice") != "none" and last["role"] != "tool":
            name = body["tools"][0]["function"]["name"]
            function = {"name": name, "arguments": ""}
            yield {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}
            for piece in ('{"city": ', '"Oslo"', "}"):
                yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
            return
        if "think" in said:
            for word in THOUGHTS.split(" "):
                await asyncio.sleep(self.delay_s)
                yield {"reasoning_content": word + " "}
        for word in self.text(body, said, last).split(" "):
            await asyncio.sleep(self.delay_s)
            yield {"content": word + " "}
        while "long" in said:
            await asyncio.sleep(self.delay_s)
            yield {"content": "and on "}
        if "fail" in said:
            yield None

    def text(self, body, said, last):
        if last["role"] == "tool":
            return f"The tool says {last['content']}."
        if (body.get("response_format") or {}).get("type") in ("json_object", "json_schema"):
            return '{"name": "Ada Lovelace", "year": 1815}'
        return CODE if "code" in said or "Python" in said else f"Answer {self.answers} to: {said}"

    def metrics(self):
        """Smooth, never the same twice, and consistent: what a server under a wave of load would say."""
        t = time.monotonic() - self.began
        wave = 1 - math.cos(t / 3)
        written = 900 * t - 2600 * math.sin(t / 3)
        requests = int(9 * t)
        running, waiting = int(4 + 24 * wave), max(0, int(14 * wave - 14))
        lines = [
            f"jaxllm_engine_generated_tokens_total {written + 1000}",
            f"jaxllm_engine_prompt_tokens_total {2.1 * written + 3000}",
            f"jaxllm_engine_running {running}",
            f"jaxllm_engine_waiting {waiting}",
            f"jaxllm_engine_held_pages {int(40 + 400 * wave)}",
            f"jaxllm_engine_cached_pages {int(100 + 20 * wave)}",
            "jaxllm_engine_total_pages 1024",
            f"jaxllm_engine_prefix_query_tokens_total {4 * written + 10}",
            f"jaxllm_engine_prefix_hit_tokens_total {2.5 * written}",
            f"jaxllm_engine_preemptions_total {int(t / 20)}",
        ]
        for name, scale in (("time_to_first_token", 0.1), ("time_per_output_token", 0.01)):
            for upper, share in ((0.5, 0.2), (1, 0.55), (2.5, 0.9), (5, 0.985), (10, 1.0)):
                lines.append(f'jaxllm_{name}_seconds_bucket{{le="{upper * scale}"}} {int(requests * share)}')
            lines.append(f'jaxllm_{name}_seconds_bucket{{le="+Inf"}} {requests}')
        return "# HELP x y\n" + "\n".join(lines) + "\n"


@contextlib.contextmanager
def serving(fake):
    """The fake on a free port of this machine, in a thread; gives its address."""
    # log_config: uvicorn's own would close all handlers there are, and absl's closes pytest's capture with itself.
    config = uvicorn.Config(
        fake.app(), host="127.0.0.1", port=0, log_level="error", log_config=None, ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(5)
