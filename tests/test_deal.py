"""Every response is dealt out exactly once, in micro-batches that fit and that give each rank as much to do."""

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

PAIR = 3e-5  # work of a (query, key) pair of Qwen2.5-7B: 2 x 3584 operations against those of 233 million weights
BOTH_ONE_ONE_NONE = torch.tensor(
    [[1.0, 1], [1, 0], [0, 1], [0, 0]]
).double()  # rewards of four rollouts in two channels
GROUPS = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(0, 200), min_size=1, max_size=8)),
    max_size=12,
)


def make(lengths: list[tuple[int, list[int]]]) -> list[Group]:
    """Of prompts and responses of these lengths; a response's text says which one it is."""
    return [
        Group(
            Prompt([g] * prompt, None),
            [],
            [Response([0] * n, [], [], "", f"{g} {i}") for i, n in enumerate(responses)],
            torch.zeros(len(responses), 0),
            torch.zeros(len(responses)),
        )
        for g, (prompt, responses) in enumerate(lengths)
    ]


def skewed(prompts: int, group: int, seed: int) -> list[tuple[int, list[int]]]:
    """Most responses are short and a few reach the limit, all of a hard prompt's more often."""
    rng = np.random.default_rng(seed)
    hard = 1 + rng.pareto(1.5, prompts)
    return [
        (
            int(rng.integers(50, 800)),
            np.minimum(4096, 100 * hard[p] * (1 + rng.pareto(1.5, group))).astype(int).tolist(),
        )
        for p in range(prompts)
    ]


def work(group: Group) -> float:
    """What a rank does for it, in units of a token's work beside attention: dealt out are tokens alone."""
    prompt, lengths = (
        len(group.prompt.ids),
        [max(0, len(response.tokens) - 1) for response in group.responses],
    )
    return update.computed(group) + PAIR * (
        prompt**2 / 2 + sum(n * (prompt + n / 2) for n in lengths)
    )


def done(dealt) -> list[float]:
    return [sum(work(part) for batch in batches for part in batch) for batches in dealt]


def names(dealt) -> list:
    """Which prompt and responses stand where."""
    return [
        [
            [
                (part.prompt.ids[0], [int(r.text.split()[1]) for r in part.responses])
                for part in batch
            ]
            for batch in batches
        ]
        for batches in dealt
    ]


def check(dealt, groups, ranks: int, budget: int):
    assert len(dealt) == ranks and len({len(batches) for batches in dealt}) == 1
    everywhere = [batch for batches in dealt for batch in batches]
    assert sorted(
        r.text for batch in everywhere for part in batch for r in part.responses
    ) == sorted(r.text for group in groups for r in group.responses)
    for batch in everywhere:
        assert (
            sum(update.computed(part) for part in batch) <= budget
            or sum(len(part.responses) for part in batch) == 1
        )


@pytest.mark.parametrize("agg", ["rvpo", "gdpo", "grpo"])
def test_an_advantage_does_not_depend_on_the_length_of_a_response(agg):
    """Each token has its rollout's."""
    seen = []
    for lengths in ((1, 1, 1, 1), (2, 90, 40, 7)):
        responses = [Response([0] * n, [-1.0] * n, [1] * n, "", "") for n in lengths]
        group = Group(
            Prompt([0] * 10, None), [Channel("a"), Channel("b")], responses, BOTH_ONE_ONE_NONE
        )
        train.set_advantages([group], agg, 1.0)
        *_, advantages = update.pack([group], torch.device("cpu"))
        assert all(len(of_one.unique()) == 1 for of_one in advantages.split(lengths))
        seen.append([of_one[0].item() for of_one in advantages.split(lengths)])
    assert seen[0] == seen[1] and seen[0] == sorted(seen[0], reverse=True)


def test_z_scores_summed_over_tokens_would():
    """As in an implementation of RVPO elsewhere (docs/choices.md): a response that fails both rewards beats longer ones
    that fail one."""
    z = rvpo.zscore(BOTH_ONE_ONE_NONE)
    assert rvpo.soft_min(z, 1.0).argmin() == 3
    assert rvpo.soft_min(z * torch.tensor([[2.0], [90], [40], [7]]), 1.0).argsort(
        descending=True
    ).tolist() == [0, 3, 2, 1]


def test_computed_by_hand():
    (group,) = make([(10, [3, 1, 0, 5])])
    assert update.computed(group) == 10 + 2 + 0 + 0 + 4


@given(GROUPS, st.integers(1, 9), st.integers(1, 2000))
def test_each_response_once_within_the_budget_and_equally_many_micro_batches(
    lengths, ranks, budget
):
    groups = make(lengths)
    dealt = update.deal(groups, ranks, budget)
    check(dealt, groups, ranks, budget)
    assert names(dealt) == names(
        update.deal(groups, ranks, budget)
    )  # each rank makes the plan for itself


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "expected"),
    [
        ([], 3, 100, [[[]], [[]], [[]]]),
        ([(10, [3, 4, 50, 0, 2])], 1, 1000, [[[(0, [0, 1, 2, 3, 4])]]]),
        ([(10, [3, 4, 50, 0, 2])], 1, 15, [[[(0, [2])], [(0, [0, 1])], [(0, [3, 4])]]]),
        ([(4, [5, 5]), (4, [5, 5])], 2, 100, [[[(0, [0, 1])]], [[(1, [0, 1])]]]),
        ([(4, [3])], 3, 100, [[[(0, [0])]], [[]], [[]]]),  # two ranks are idle
        (
            [(4, [3]), (9, [3]), (7, [3])],
            1,
            100,
            [[[(1, [0]), (2, [0]), (0, [0])]]],
        ),  # the largest first
    ],
)
def test_plans_by_hand(lengths, ranks, budget, expected):
    assert names(update.deal(make(lengths), ranks, budget)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_prompts_are_computed_once_where_that_is_fair(seed):
    """128 prompts of 8 on 8 ranks: no prompt is computed twice, and no rank waits for long."""
    rng = np.random.default_rng(seed)
    groups = make(
        [(int(rng.integers(100, 900)), rng.integers(20, 400, 8).tolist()) for _ in range(128)]
    )
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    assert sum(done(dealt)) == pytest.approx(sum(work(group) for group in groups), rel=1e-12)
    assert max(done(dealt)) <= 1.05 * min(done(dealt))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("prompts", "group"), [(128, 8), (512, 4)])
def test_skewed_lengths_are_dealt_out_within_a_twelfth(prompts, group, seed):
    groups = make(skewed(prompts, group, seed))
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    shares = done(dealt)
    extra = sum(shares) / sum(work(own) for own in groups) - 1
    print(
        f"ranks {max(shares) / min(shares) - 1:.1%} apart, {extra:.1%} more work than each prompt once"
    )
    assert max(shares) <= 1.08 * min(shares)
    naive = [sum(work(own) for own in groups[rank::8]) for rank in range(8)]
    assert max(shares) < max(naive)


def test_few_prompts_on_many_ranks_are_parted():
    """Four prompts on eight ranks: better computed twice than not at all on half of the ranks."""
    groups = make([(50, [400] * 8)] * 4)
    dealt = update.deal(groups, 8, 16384)
    check(dealt, groups, 8, 16384)
    assert max(done(dealt)) <= 1.05 * min(done(dealt))
