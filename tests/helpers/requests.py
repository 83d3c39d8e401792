"""Short ways to write requests in tests of the host half."""

from jaxllm.core import Request, SamplingParams


def request(id="a", prompt=(1, 2, 3), *, eos=(), bad_words=(), priority=0, salt="", **params) -> Request:
    """A greedy request of 4 tokens unless told; `prompt` is token ids, or how many (distinct per id)."""
    if isinstance(prompt, int):
        start = sum(ord(c) * 31**i for i, c in enumerate(id)) * 1000
        prompt = range(start, start + prompt)
    return Request(
        id=id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**{"temperature": 0, "max_tokens": 4, **params}),
        eos_token_ids=tuple(eos),
        bad_word_ids=tuple(bad_words),
        priority=priority,
        cache_salt=salt,
    )
