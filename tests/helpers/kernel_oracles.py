"""The ops in float64 numpy, one row, head and query at a time: slow, plain, sharing no code with what they judge."""

import numpy as np


def attention(*arrays, **options):
    return attention_and_log_sums(*arrays, **options)[0]


def attention_and_log_sums(q, k_pages, v_pages, table, lengths, starts, *, scale, window, soft_cap, sinks=None):
    """f64[T, N, H], and the logarithms of the denominators, f64[T, N]; -1e30 where nothing is seen."""
    T, N, H = q.shape
    K, page_size = k_pages.shape[1:3]
    out, lse = np.zeros((T, N, H)), np.full((T, N), -1e30)
    for r, length in enumerate(lengths):
        count = starts[r + 1] - starts[r]
        keys = np.arange(length)
        pages, slots = table[r, keys // page_size], keys % page_size
        k = k_pages[pages, :, slots].astype(np.float64)  # [length, K, H]
        v = v_pages[pages, :, slots].astype(np.float64)
        for i in range(count):
            position = length - count + i
            low = 0 if window is None else max(0, position - window + 1)
            for n in range(N):
                scores = k[low : position + 1, n // (N // K)] @ q[starts[r] + i, n].astype(np.float64) * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                sink = 0.0 if sinks is None else np.exp(np.float64(sinks[n]) - scores.max())
                weights = np.exp(scores - scores.max())
                out[starts[r] + i, n] = weights @ v[low : position + 1, n // (N // K)] / (weights.sum() + sink)
                lse[starts[r] + i, n] = scores.max() + np.log(weights.sum() + sink)
    return out, lse


def threefry(key, x0, x1):
    """Threefry-2x32-20 as Salmon et al. (2011) define it; words as u64 arrays below 2^32."""
    mask, rotations = np.uint64(0xFFFFFFFF), (13, 15, 26, 6, 17, 29, 16, 24)
    words = [np.uint64(key[0]), np.uint64(key[1])]
    words.append(words[0] ^ words[1] ^ np.uint64(0x1BD11BDA))
    a = (np.asarray(x0, np.uint64) + words[0]) & mask
    b = (np.asarray(x1, np.uint64) + words[1]) & mask
    for i in range(20):
        a = (a + b) & mask
        r = np.uint64(rotations[i % 8])
        b = ((b << r) | (b >> (np.uint64(32) - r))) & mask ^ a
        if i % 4 == 3:
            s = i // 4 + 1
            a = (a + words[s % 3]) & mask
            b = (b + words[(s + 1) % 3] + np.uint64(s)) & mask
    return a, b


def threefry_bits(key, V):
    words = threefry(key, np.zeros((V + 1) // 2), np.arange((V + 1) // 2))
    return np.stack(words, axis=1).ravel()[:V]


def kept(logits, temperature, top_k, top_p, min_p):
    """Which tokens of one row survive, by sorting."""
    x = logits.astype(np.float64)
    weights = np.exp((x - x.max()) / temperature)
    keep = (weights >= min_p) & np.isfinite(x)
    best = np.argsort(-np.where(keep, x, -np.inf), kind="stable")
    if 0 < top_k < keep.sum():
        keep &= x >= x[best[top_k - 1]]
    if top_p < 1:
        mass = np.cumsum(np.where(keep, weights, 0.0)[best])
        last = min(np.searchsorted(mass, top_p * mass[-1]), len(best) - 1)
        keep &= x >= x[best[last]]
    return keep


def sample(logits, keys, temperature, top_k, top_p, min_p, slack=1e-5):
    """Tokens, and whether each is beyond doubt: as clear when the thresholds move by `slack`, and won by a margin."""
    tokens, certain = [], []
    for row in range(len(logits)):
        if temperature[row] == 0:
            tokens.append(int(np.argmax(logits[row])))
            certain.append(True)
            continue
        T, x = np.float64(temperature[row]), logits[row].astype(np.float64)
        u = np.minimum((threefry_bits(keys[row], logits.shape[1]) + 0.5) / 2**32, 1 - 2.0**-24)
        noisy = (x - x.max()) / T - np.log(-np.log1p(-u))
        winners = []
        for factor in (1.0, 1 - slack, 1 + slack):
            p, m = (min(1.0, np.float64(value) * factor) for value in (top_p[row], min_p[row]))
            p = 1.0 if top_p[row] == 1 else p
            m = 1.0 if min_p[row] == 1 else m
            score = np.where(kept(logits[row], T, top_k[row], p, m), noisy, -np.inf)
            winners.append(int(np.argmax(score)))
            margin = score.max() - np.partition(score, -2)[-2] if len(score) > 1 else np.inf
            if not margin > 1e-3:
                winners.append(-1)
        tokens.append(winners[0])
        certain.append(len(set(winners)) == 1)
    return np.array(tokens), np.array(certain)
