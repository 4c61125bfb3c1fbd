"""Options that other recipes use: what each changes, and that nothing changes without it."""

import math
import sys
import types
from unittest import mock

import pytest
import torch
import updates

import policy as policies
import rvpo
import update
from config import GROUPS, EvalConfig, TrainConfig, parse, parse_clip
from infra.ranks import InputError
from update import Loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig])
def test_every_option_is_in_one_group_of_the_help(kind):
    """One that is in none could not be given."""
    grouped = [name for names in GROUPS.values() for name in names if name in kind.model_fields]
    assert sorted(grouped) == sorted(kind.model_fields)


def loss_of(tiny_policy, loss: Loss, groups) -> dict:
    """Metrics of an update that changes nothing (lr 0) with the loss of these options."""
    optimizer = torch.optim.SGD(tiny_policy.parameters(), lr=0.0)
    learner = update.Learner(tiny_policy, None, optimizer, CPU, loss)
    return update.update(learner, groups, 1, 0.0, 1.0, 100_000)


def test_clip_higher_lets_a_rising_probability_rise_further():
    """Ratio 1.27: clipped by 0.2:0.2, and by DAPO's 0.2:0.28 not, so that it has a gradient."""
    old = torch.tensor([-2.0])
    logp = (old + math.log(1.27)).requires_grad_()
    one = torch.ones(1)
    for high, gradient in ((0.2, 0.0), (0.28, -1.27)):
        loss, stats = rvpo.policy_loss(logp, old, old, one, one, 1, 0.2, high)
        (found,) = torch.autograd.grad(loss, logp)
        assert found.item() == pytest.approx(gradient)
        assert stats["clip_fraction"] == (gradient == 0.0)


def test_the_clip_reaches_the_loss(tiny_policy):
    with mock.patch.object(rvpo, "policy_loss", wraps=rvpo.policy_loss) as policy_loss:
        loss_of(tiny_policy, Loss(clip=(0.1, 0.3)), updates.batch_of(1, 2))
    *_, low, high = policy_loss.call_args.args
    assert (low, high) == (0.1, 0.3)


@pytest.mark.parametrize(
    "text", ["0.2", "0:0.2", "1.1:2", "0.2:0", "a:b", "0.2:0.2:0.2", "0.2:inf"]
)
def test_a_clip_that_is_none(text):
    with pytest.raises(InputError, match=r"--clip .*LOW:HIGH"):
        parse(TrainConfig, "", ["--clip", text])
    assert parse_clip("0.2:0.28") == (0.2, 0.28)


def test_truncated_responses_are_masked_and_not_counted(tiny_policy):
    groups = updates.batch_of(2, 3)
    whole = loss_of(tiny_policy, Loss(), groups)
    for group in groups:
        group.responses[1] = group.responses[1]._replace(finish="length")
    assert loss_of(tiny_policy, Loss(), groups) == whole  # only with the option
    masked = loss_of(tiny_policy, Loss(mask_truncated=True), groups)

    without = [group.part([0, 2]) for group in groups]
    for group, kept in zip(groups, without, strict=True):
        kept.advantages = group.advantages[[0, 2]]
    expected = loss_of(tiny_policy, Loss(), without)
    assert masked["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert masked["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert masked["loss"] != pytest.approx(whole["loss"], rel=1e-2)
    assert sum(groups[0].responses[1].mask) > 0  # the logged group stays as it was


def test_a_gap_is_corrected_by_token_or_by_response():
    """Two responses: gaps of log 2 on each of two tokens, and of log 1.5 on one, then masked."""
    gap = torch.tensor([math.log(2.0), math.log(2.0), math.log(1.5), 0.0])
    response = torch.tensor([0, 0, 1, 1])
    assert rvpo.importance(gap, 2.0).tolist() == pytest.approx([2, 2, 1.5, 1])
    # The first response is 4 times as likely by the trainer: above 3, so it is left out.
    by_response = rvpo.importance(gap, 3.0, response).tolist()
    assert by_response == pytest.approx([0, 0, 1.5, 1.5])


def test_one_bad_response_is_left_out_by_sequence_and_kept_by_token(tiny_policy):
    """What matters after a faulty push: the engine's log-probs of one response are far off."""
    (group,) = updates.batch_of(1, 2)
    row = policies.pack([(group.prompt.ids, [r.tokens for r in group.responses])], CPU)
    with torch.no_grad():
        exact = tiny_policy(row, 1.0).split([len(r.tokens) for r in group.responses])
    for i, logp in enumerate(exact):
        bad = 2.0 if i == 0 else 0.0  # nats a token
        group.responses[i] = group.responses[i]._replace(logp=(logp - bad).tolist())
    tokens = [sum(response.mask) for response in group.responses]
    by_token = loss_of(tiny_policy, Loss(), [group])
    by_sequence = loss_of(tiny_policy, Loss(correction="sequence"), [group])
    assert by_token["is_weight"] == pytest.approx((2 * tokens[0] + tokens[1]) / sum(tokens))
    assert by_sequence["is_weight"] == pytest.approx(tokens[1] / sum(tokens), rel=1e-3)
    assert by_token["sampler_gap"] == by_sequence["sampler_gap"]


def test_compiled_layers_give_the_same_log_probs(monkeypatch, tiny, tiny_policy):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    looping = torch.compiler.disable(policies._attend_on_cpu)  # it loops over sequences
    monkeypatch.setattr(policies, "_attend_on_cpu", looping)
    compiler = torch.nn.Module.compile

    def without_code(layer, **options):
        """This backend needs no C++ compiler. The options are those of use_kernels."""
        compiler(layer, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    policy = policies.load(tiny, CPU)
    policy.use_kernels("compile")
    row = policies.pack([([5, 6, 7], [[8, 9], [10, 11, 12]])], CPU)
    torch.testing.assert_close(policy(row, 1.0), tiny_policy(row, 1.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_ligers_kernels_are_put_into_the_layers_alone(monkeypatch, tiny):
    """The package needs a GPU. A stand-in notes what it is asked for."""
    asked = []
    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in._apply_liger_kernel_to_instance = lambda **options: asked.append(options)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    policy = policies.load(tiny, CPU)
    policy.use_kernels("liger")
    assert asked == [
        {"model": policy.lm, "cross_entropy": False, "fused_linear_cross_entropy": False}
    ]


def test_flash_attention_3_is_activated_if_asked_for(monkeypatch, tiny_policy):
    asked = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append)
    tiny_policy.use_kernels("eager")
    assert asked == []
    tiny_policy.use_kernels("eager", flash_attention_3=True)
    assert asked == ["FA3"]


@pytest.mark.parametrize("line", [["--kernels", "liger"], ["--flash-attention-3"]])
def test_packages_that_are_not_installed(line):
    with pytest.raises(InputError, match="needs a GPU and"):
        parse(TrainConfig, "", line)
