"""The bits of what an engine says, whatever the schedule: for tests of deterministic mode."""

import numpy as np


def logprobs_of(engine, requests, order=None):
    """Each request's tokens and the bits of their log-probabilities; `order`: in which they are added, one a step."""
    made = [engine.make_request(ids, params) for ids, params in requests]
    sequences, found = {}, {}
    waiting = list(order if order is not None else range(len(made)))
    while waiting or engine.has_work:
        if waiting and (order is not None or not sequences):
            for place in waiting if order is None else waiting[:1]:
                sequences[engine.add(made[place])[0]] = place
            waiting = [] if order is None else waiting[1:]
        for output in engine.step():
            if output.logprobs is not None:
                found.setdefault(sequences[output.sequence], []).append(
                    (output.token_id, np.float32(output.logprobs.logprob).tobytes())
                )
    return [found[place] for place in range(len(made))]
