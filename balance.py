"""Dealing the update out: which prompts and responses each rank computes, in micro-batches of at most so many tokens.

Sharded ranks wait for one another at every layer of every micro-batch, so each gets as many of them, of the same work.
"""

import heapq
import math

Group = tuple[int, list[int]]  # a prompt's length, and those of its responses
MicroBatch = list[tuple[int, list[int]]]  # groups and some of their responses, by index, computed together


def attention_cost(config) -> float:
    """Work of one (query, key) pair over all layers, in units of a token's work beside attention. config: a
    transformers config."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    token = 2 * config.hidden_size * ((2 * heads + 2 * kv_heads) * head_dim + 3 * config.intermediate_size)
    return 4 * heads * head_dim / token


def size(group: Group, pair: float) -> tuple[int, float]:
    """Tokens of a prompt with its responses, and their work, attention included, in units of a token's. A response's
    last token predicts nothing and is not computed. pair: see attention_cost."""
    prompt, responses = group
    own = [max(0, length - 1) for length in responses]
    pairs = prompt**2 / 2 + sum(n * (prompt + n / 2) for n in own)
    return prompt + sum(own), prompt + sum(own) + pair * pairs


def work(batches: list[MicroBatch], groups: list[Group], pair: float) -> float:
    return sum(size((groups[g][0], [groups[g][1][i] for i in some]), pair)[1] for batch in batches for g, some in batch)


def _fill(groups: list[Group], members: list[int], cap: float, budget: int, pair: float) -> list[MicroBatch]:
    """The members' responses one after the other, a new micro-batch wherever the last has reached `cap` in work or
    `budget` in tokens. A prompt goes in front of its responses in every micro-batch that has some."""
    batches, tokens, done = [], math.inf, math.inf
    for g in members:
        prompt = size((groups[g][0], []), pair)
        for i, length in enumerate(groups[g][1]):
            alone = size((groups[g][0], [length]), pair)
            known = bool(batches) and batches[-1][-1][0] == g
            t, w = (a - p for a, p in zip(alone, prompt, strict=True)) if known else alone
            if tokens + t > budget or done + w > cap:
                batches.append([(g, [i])])
                tokens, done = alone
                continue
            if known:
                batches[-1][-1][1].append(i)
            else:
                batches[-1].append((g, [i]))
            tokens, done = tokens + t, done + w
    return batches


def _whole(groups: list[Group], bins: int, budget: int, pair: float) -> list[MicroBatch] | None:
    """Groups kept whole where the budget lets them: the largest first, to the micro-batch with the least work. None if
    they do not fit into `bins`."""
    pieces = [piece for g in range(len(groups)) for piece in _fill(groups, [g], math.inf, budget, pair)]
    sizes = [size((groups[g][0], [groups[g][1][i] for i in some]), pair) for [(g, some)] in pieces]
    heap = [(0.0, b, 0, []) for b in range(bins)]
    for i in sorted(range(len(pieces)), key=lambda i: -sizes[i][1]):
        done, b, tokens, batch = heap[0]
        if batch and tokens + sizes[i][0] > budget:
            return None
        heapq.heapreplace(heap, (done + sizes[i][1], b, tokens + sizes[i][0], batch + pieces[i]))
    return [batch for _, _, _, batch in heap]


def _parted(groups: list[Group], bins: int, budget: int, pair: float) -> list[MicroBatch] | None:
    """Cut anywhere between two responses into `bins` of the least possible largest work, found by bisection."""
    low, high, best = 0.0, 2 * sum(size(group, pair)[1] for group in groups), None
    for _ in range(30):
        cap = (low + high) / 2 if best else high
        batches = _fill(groups, list(range(len(groups))), cap, budget, pair)
        if len(batches) > bins and best is None:
            return None
        low, high, best = (cap, high, best) if len(batches) > bins else (low, cap, batches)
    return best + [[]] * (bins - len(best))


def plan(groups: list[Group], ranks: int, budget: int, pair: float) -> list[list[MicroBatch]]:
    """For each rank its micro-batches: equally many, some perhaps empty, of at most `budget` tokens unless a single
    response with its prompt has more. groups: P of them.

    A prompt's responses stay together, unless they are too many for the budget or the ranks would be more than 5%
    apart. Then prompts are computed more than once, if that leaves the busiest rank less to do.
    """
    if not groups:
        return [[] for _ in range(ranks)]
    # the fewest micro-batches: each costs a gathering of all the weights
    rounds = max(1, math.ceil(len(_fill(groups, list(range(len(groups))), math.inf, budget, pair)) / ranks))
    best, least = None, math.inf
    for cut in (_whole, _parted):
        batches = cut(groups, rounds * ranks, budget, pair)
        if batches is None:
            continue
        batches.sort(key=lambda batch: -work([batch], groups, pair))
        dealt = [[] for _ in range(ranks)]
        done = [0.0] * ranks
        for first in range(0, len(batches), ranks):  # a round: its largest to the rank that has the least
            order = sorted(range(ranks), key=lambda rank: done[rank])
            for rank, batch in zip(order, batches[first:first + ranks], strict=True):
                dealt[rank].append(batch)
                done[rank] += work([batch], groups, pair)
        if max(done) < least:
            best, least = dealt, max(done)
        if least <= 1.05 * sum(done) / ranks:
            break
    return best
