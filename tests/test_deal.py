"""Responses are dealt out exactly once, in micro-batches that fit, and ranks get equal work."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rvpo
import train
import update
from infra.prompts import Prompt
from rewards import Channel
from rollout import Group, Response

# The work of a (query, key) pair in units of a token's: in Qwen2.5-7B 2 x 3584 operations, against
# those of 233 million weights.
PAIR = 3e-5
BOTH_ONE_ONE_NONE = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double()
# Tokens of a prompt, and of each of its responses; of several prompts.
PROMPT = st.integers(1, 300)
RESPONSES = st.lists(st.integers(0, 200), min_size=1, max_size=8)
LENGTHS = st.lists(st.tuples(PROMPT, RESPONSES), max_size=12)


def make(lengths: list[tuple[int, list[int]]]) -> list[Group]:
    """Groups with prompts and responses of these lengths; a response's text says which it is."""
    groups = []
    for g, (of_prompt, of_responses) in enumerate(lengths):
        responses = []
        for i, n in enumerate(of_responses):
            responses.append(Response([0] * n, [], [], "", f"{g} {i}"))
        n_responses = len(responses)
        group = Group(
            prompt=Prompt([g] * of_prompt, None),
            channels=[],
            responses=responses,
            rewards=torch.zeros(n_responses, 0),
            advantages=torch.zeros(n_responses),
        )
        groups.append(group)
    return groups


def skewed(prompts: int, group: int, seed: int) -> list[tuple[int, list[int]]]:
    """Most responses are short and a few reach the limit, all of a hard prompt's more often."""
    rng = np.random.default_rng(seed)
    hard = 1 + rng.pareto(1.5, prompts)
    lengths = []
    for p in range(prompts):
        prompt = int(rng.integers(50, 800))
        responses = np.minimum(4096, 100 * hard[p] * (1 + rng.pareto(1.5, group)))
        lengths.append((prompt, responses.astype(int).tolist()))
    return lengths


def work(group: Group) -> float:
    """What a rank does for it, in units of a token's work outside attention."""
    prompt = len(group.prompt.ids)
    pairs = prompt**2 / 2
    for response in group.responses:
        n = max(0, len(response.tokens) - 1)
        pairs += n * (prompt + n / 2)
    return update.computed(group) + PAIR * pairs


def done(dealt) -> list[float]:
    """The work of each rank."""
    shares = []
    for batches in dealt:
        parts = itertools.chain(*batches)
        shares.append(sum(map(work, parts)))
    return shares


def name(part: Group) -> tuple[int, list[int]]:
    """Which prompt it has, and which of its responses."""
    responses = [int(response.text.split()[1]) for response in part.responses]
    return part.prompt.ids[0], responses


def names(dealt) -> list:
    """Of each rank, of each of its micro-batches: which prompts and responses it has."""
    plan = []
    for batches in dealt:
        plan.append([list(map(name, batch)) for batch in batches])
    return plan


def texts(groups: list[Group]) -> list[str]:
    found = []
    for group in groups:
        found += [response.text for response in group.responses]
    return sorted(found)


def check(dealt, groups, ranks: int, budget: int):
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1
    everywhere = [*itertools.chain(*dealt)]
    parts = [*itertools.chain(*everywhere)]
    assert texts(parts) == texts(groups)
    for batch in everywhere:
        tokens = sum(map(update.computed, batch))
        responses = sum(len(part.responses) for part in batch)
        assert tokens <= budget or responses == 1


def token_advantages(agg: str, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Of responses with these lengths: the advantages of each one's tokens."""
    responses = [Response([0] * n, [-1.0] * n, [1] * n, "", "") for n in lengths]
    channels = [Channel("a"), Channel("b")]
    prompt = Prompt([0] * 10, None)
    group = Group(prompt, channels, responses, BOTH_ONE_ONE_NONE)
    train.set_advantages([group], agg, 1.0)
    batch = update.pack([group], torch.device("cpu"))
    return batch.advantages.split(lengths)


@pytest.mark.parametrize("agg", ["rvpo", "gdpo", "grpo"])
def test_an_advantage_does_not_depend_on_the_length_of_a_response(agg):
    """Each token has its rollout's."""
    seen = []
    for lengths in ((1, 1, 1, 1), (2, 90, 40, 7)):
        of_responses = token_advantages(agg, lengths)
        assert all(len(advantages.unique()) == 1 for advantages in of_responses)
        seen.append([advantages[0].item() for advantages in of_responses])
    first, second = seen
    assert first == second == sorted(first, reverse=True)


def test_z_scores_summed_over_tokens_would():
    """As in an implementation of RVPO elsewhere (docs/choices.md): a response that fails both
    rewards beats longer ones that fail one."""
    z = rvpo.zscore(BOTH_ONE_ONE_NONE)
    scores = rvpo.soft_min(z, 1.0)
    assert scores.argmin() == 3
    lengths = torch.tensor([[2.0], [90.0], [40.0], [7.0]])
    scores = rvpo.soft_min(z * lengths, 1.0)
    best_first = scores.argsort(descending=True)
    assert best_first.tolist() == [0, 3, 2, 1]


def test_computed_by_hand():
    (group,) = make([(10, [3, 1, 0, 5])])
    tokens = update.computed(group)
    assert tokens == 10 + 2 + 0 + 0 + 4


@given(LENGTHS, st.integers(1, 9), st.integers(1, 2000))
def test_each_response_once_within_the_budget_and_equally_many_micro_batches(
    lengths, ranks, budget
):
    groups = make(lengths)
    dealt = update.deal(groups, ranks, budget)
    check(dealt, groups, ranks, budget)
    # Each rank makes the plan for itself.
    again = update.deal(groups, ranks, budget)
    assert names(dealt) == names(again)


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "expected"),
    [
        ([], 3, 100, [[[]], [[]], [[]]]),
        ([(10, [3, 4, 50, 0, 2])], 1, 1000, [[[(0, [0, 1, 2, 3, 4])]]]),
        ([(10, [3, 4, 50, 0, 2])], 1, 15, [[[(0, [2])], [(0, [0, 1])], [(0, [3, 4])]]]),
        ([(4, [5, 5]), (4, [5, 5])], 2, 100, [[[(0, [0, 1])]], [[(1, [0, 1])]]]),
        ([(4, [3])], 3, 100, [[[(0, [0])]], [[]], [[]]]),  # two ranks are idle
        # The largest first:
        ([(4, [3]), (9, [3]), (7, [3])], 1, 100, [[[(1, [0]), (2, [0]), (0, [0])]]]),
    ],
)
def test_plans_by_hand(lengths, ranks, budget, expected):
    dealt = update.deal(make(lengths), ranks, budget)
    assert names(dealt) == expected


@pytest.mark.parametrize("seed", range(3))
def test_prompts_are_computed_once_where_that_is_fair(seed):
    """128 prompts of 8 on 8 ranks: no prompt is computed twice, and no rank waits for long."""
    rng = np.random.default_rng(seed)
    lengths = []
    for _ in range(128):
        prompt = int(rng.integers(100, 900))
        responses = rng.integers(20, 400, 8)
        lengths.append((prompt, responses.tolist()))
    groups = make(lengths)
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    shares = done(dealt)
    once = sum(map(work, groups))
    assert sum(shares) == pytest.approx(once, rel=1e-12)
    assert max(shares) <= 1.05 * min(shares)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("prompts", "group"), [(128, 8), (512, 4)])
def test_skewed_lengths_are_dealt_out_within_a_twelfth(prompts, group, seed):
    groups = make(skewed(prompts, group, seed))
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    shares = done(dealt)
    assert max(shares) <= 1.08 * min(shares)
    in_turn = []
    for rank in range(8):
        in_turn.append(sum(map(work, groups[rank::8])))
    assert max(shares) < max(in_turn)


def test_few_prompts_on_many_ranks_are_parted():
    """Four prompts on eight ranks: better computed twice than not at all on half of the ranks."""
    groups = make([(50, [400] * 8)] * 4)
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    shares = done(dealt)
    assert max(shares) <= 1.05 * min(shares)
