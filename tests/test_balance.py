"""Every response is dealt out exactly once, in micro-batches that fit and that give each rank as much to do."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import balance
import memory

PAIR = balance.attention_cost(memory.qwen("7B"))
GROUPS = st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(0, 200), min_size=1, max_size=8)), max_size=12)


def skewed(prompts: int, group: int, seed: int) -> list[balance.Group]:
    """Most responses are short and a few reach the limit, all of a hard prompt's more often."""
    rng = np.random.default_rng(seed)
    hard = 1 + rng.pareto(1.5, prompts)
    return [(int(rng.integers(50, 800)), np.minimum(4096, 100 * hard[p] * (1 + rng.pareto(1.5, group))).astype(int).tolist())
            for p in range(prompts)]


def done(dealt, groups) -> list[float]:
    return [balance.work(batches, groups, PAIR) for batches in dealt]


def tokens(batch: balance.MicroBatch, groups: list[balance.Group]) -> int:
    return sum(balance.size((groups[g][0], [groups[g][1][i] for i in some]), PAIR)[0] for g, some in batch)


def check(dealt, groups, ranks: int, budget: int):
    assert len(dealt) == ranks and len({len(batches) for batches in dealt}) == 1
    everywhere = [batch for batches in dealt for batch in batches]
    assert sorted((g, i) for batch in everywhere for g, some in batch for i in some) == [
        (g, i) for g, (_, responses) in enumerate(groups) for i in range(len(responses))]
    assert all(tokens(batch, groups) <= budget or sum(len(some) for _, some in batch) == 1 for batch in everywhere)


def test_attention_cost_by_hand():
    # A token's products: queries and output 8 x 8, keys and values 8 x 4, three of the MLP 8 x 16; 2 operations each.
    # A pair: 2 x 8 for its score, as many for its share of the values.
    config = SimpleNamespace(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16)
    assert balance.attention_cost(config) == 32 / (2 * (2 * 64 + 2 * 32 + 3 * 128))
    wide = SimpleNamespace(**vars(config), head_dim=16)
    assert balance.attention_cost(wide) == 4 * 32 / (2 * (2 * 8 * 32 + 2 * 8 * 16 + 3 * 128))


def test_size_by_hand():
    # Computed of the responses: 2, 0, 0 and 4 tokens. Pairs: 10 x 10 / 2 and, of a response, its own and the prompt's.
    assert balance.size((10, [3, 1, 0, 5]), 0.5) == (16, 16 + 0.5 * (50 + 2 * (10 + 1) + 4 * (10 + 2)))
    assert balance.work([[(0, [1])], [(1, [0]), (0, [0, 1])]], [(10, [1, 3]), (4, [1])], 0.5) == (
        12 + 0.5 * (50 + 22) + 4 + 0.5 * 8 + 12 + 0.5 * (50 + 22))


@given(GROUPS, st.integers(1, 9), st.integers(1, 2000))
def test_each_response_once_within_the_budget_and_equally_many_micro_batches(groups, ranks, budget):
    dealt = balance.plan(groups, ranks, budget, PAIR)
    check(dealt, groups, ranks, budget)
    assert dealt == balance.plan(groups, ranks, budget, PAIR)  # each rank makes the plan for itself


def test_plans_by_hand():
    assert balance.plan([], 3, 100, 0.0) == [[], [], []]
    assert balance.plan([(10, [3, 4, 50, 0, 2])], 1, 1000, 0.0) == [[[(0, [0, 1, 2, 3, 4])]]]
    assert balance.plan([(10, [3, 4, 50, 0, 2])], 1, 15, 0.0) == [[[(0, [2])], [(0, [0, 1])], [(0, [3, 4])]]]
    assert balance.plan([(4, [5, 5]), (4, [5, 5])], 2, 100, 0.0) == [[[(0, [0, 1])]], [[(1, [0, 1])]]]
    assert balance.plan([(4, [3])], 3, 100, 0.0) == [[[(0, [0])]], [[]], [[]]]  # two ranks are idle


@pytest.mark.parametrize("seed", range(3))
def test_prompts_are_computed_once_where_that_is_fair(seed):
    """128 prompts of 8 on 8 ranks: no prompt is computed twice, and no rank waits for long."""
    rng = np.random.default_rng(seed)
    groups = [(int(rng.integers(100, 900)), rng.integers(20, 400, 8).tolist()) for _ in range(128)]
    dealt = balance.plan(groups, 8, 16384, PAIR)
    check(dealt, groups, 8, 16384)
    assert sum(done(dealt, groups)) == pytest.approx(sum(balance.size(group, PAIR)[1] for group in groups), rel=1e-12)
    assert max(done(dealt, groups)) <= 1.05 * min(done(dealt, groups))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("prompts", "group"), [(128, 8), (512, 4)])
def test_skewed_lengths_are_dealt_out_within_a_tenth(prompts, group, seed):
    groups = skewed(prompts, group, seed)
    dealt = balance.plan(groups, 8, 16384, PAIR)
    check(dealt, groups, 8, 16384)
    shares = done(dealt, groups)
    extra = sum(shares) / sum(balance.size(own, PAIR)[1] for own in groups) - 1
    print(f"ranks {max(shares) / min(shares) - 1:.1%} apart, {extra:.1%} more work than each prompt once")
    assert max(shares) <= 1.1 * min(shares)
    naive = [sum(balance.size(own, PAIR)[1] for own in groups[rank::8]) for rank in range(8)]
    assert max(shares) < max(naive)


def test_few_prompts_on_many_ranks_are_parted():
    """Four prompts on eight ranks: better computed twice than not at all on half of the ranks."""
    groups = [(50, [400] * 8)] * 4
    dealt = balance.plan(groups, 8, 16384, PAIR)
    check(dealt, groups, 8, 16384)
    assert max(done(dealt, groups)) <= 1.05 * min(done(dealt, groups))
