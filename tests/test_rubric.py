"""The study on rubrics: its task by hand, its plan and its report. Its runs with the tiny model, by
train.py and by the script for a GPU."""

import json
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "study"))

import matched
import on_gpu
import rubric
import rubric_report
import rubric_task

from config import TrainConfig, parse
from infra.ranks import InputError
from local.hf import HFEngine
from rewards import Example
from tasks import load_prompts, load_task
from tasks.healthbench import Item

COMPLAINT = "Hi, I am Anna. The lamp that I ordered on Monday arrived broken."
ALL = (
    "Dear Anna, we are sorry that the lamp you ordered on Monday arrived broken; please call us, "
    "thanks, and we will help and send you a replacement today."
)
TINY = "--engine hf --prompts 2 --group 2 --max-tokens 8 --eval-prompts 4".split()


def items(*criteria: str) -> Example:
    chosen = [Item(criterion, rubric_task.POINTS.get(criterion, 4), ()) for criterion in criteria]
    return Example([{"role": "user", "content": COMPLAINT}], COMPLAINT, tuple(chosen))


# The task


def test_criteria_by_hand():
    def met(response):
        verdicts = rubric_task.verdicts(response, COMPLAINT)
        return {criterion for criterion, value in verdicts.items() if value}

    assert met(ALL) == {criterion for criterion, points in rubric_task.POINTS.items() if points > 0}
    assert met("") == {"short", "two sentences"}
    assert met("Hello! What? It has 3 parts") == {
        "short",
        "two sentences",
        "greeting",
        "question",
        "number",
    }
    assert met("word " * 31) == {"two sentences"}
    assert met("Word. " * 41) == {"long", "finished"}
    assert met("Unfortunately we cannot.") == {
        "short",
        "two sentences",
        "finished",
        "we",
        "refusal",
    }
    assert "thanks" not in met("A thankless lampshade.")  # whole words count
    # A word tells each fault.
    assert {*rubric_task.FAULT_WORDS} == {*rubric_task.reply.FAULTS}


def test_every_prompt_draws_its_criteria():
    plain, exclusive = [rubric_task.Rubric(variant, 0) for variant in ("plain", "exclusive")]
    train, held_out = plain.prompts(40, 40)
    assert not {str(e.messages) for e in train} & {str(e.messages) for e in held_out}
    numbers = [len(example.criteria) for example in train + held_out]
    assert min(numbers) == 7 and max(numbers) == 17 and len(rubric_task.POINTS) == 20
    for example, other in zip(train, exclusive.prompts(40, 0)[0], strict=True):
        names = [item.text for item in example.criteria]
        assert names[:3] == ["short", "two sentences", "finished"] and len({*names}) == len(names)
        # The variant has the same prompts, and one criterion is replaced.
        assert other.messages == example.messages and other.criteria[:-1] == example.criteria[:-1]
        assert other.criteria[-1].text == "long"


def test_score_and_constraints_by_hand():
    task = rubric_task.Rubric("plain", 0)
    example = items("short", "two sentences", "finished", "sorry", "number")
    assert [c.name for c in task.channels(example)] == [
        "short",
        "two sentences",
        "finished",
        "sorry",
        "no number",
    ]
    replies = ["Sorry!", "Call 911", ""]
    rewards = task.start(example, replies)()
    np.testing.assert_array_equal(rewards, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 0, 1]])
    scores, _ = task.result(example, replies[0], rewards[0])
    assert scores["score"] == 1 and scores["kept"] == 1 and scores["joint"] == 1
    scores, _ = task.result(example, replies[1], rewards[1])
    assert scores["score"] == pytest.approx((10 + 5 - 5) / (10 + 5 + 8 + 8))
    assert scores["kept"] == 0 and scores["no number"] == 0


def test_two_criteria_exclude_each_other():
    example = items("short", "two sentences", "finished", "long")
    replies = [f"{'word ' * length}." for length in range(1, 60)]
    rewards = rubric_task.Rubric("exclusive", 0).start(example, replies)()
    short, long = rewards[:, 0], rewards[:, 3]
    assert (short + long).max() == 1 and short.sum() == 29 and long.sum() == 20


def test_a_noisy_judge_errs_in_three_of_ten_verdicts_on_one_criterion():
    example = items("short", "two sentences", "finished", "number")
    replies = [f"Item {i}." for i in range(2000)]
    noisy = rubric_task.Rubric("noisy", 7)
    wrong = (
        noisy.start(example, replies)() != rubric_task.Rubric("plain", 7).start(example, replies)()
    )
    assert 0.27 < wrong[:, 0].mean() < 0.33 and not wrong[:, 1:].any()
    again = rubric_task.Rubric("noisy", 7).start(example, replies[::-1])()[::-1]
    np.testing.assert_array_equal(again, noisy.start(example, replies)())
    other = rubric_task.Rubric("noisy", 8).start(example, replies)()
    assert 0.3 < (other != again)[:, 0].mean() < 0.54  # independent of the first: .42
    # What is reported is true.
    reply = replies[int(wrong[:, 0].argmax())]
    rewards = noisy.start(example, [reply])()[0]
    scores, _ = noisy.result(example, reply, rewards)
    assert rewards[0] == 0 and scores["short"] == 1 and scores["kept"] == 1


def test_the_file_is_a_task():
    config = TrainConfig(task=str(ROOT / "study/rubric_task.py"), data="noisy", seed=3)
    task = load_task(config)
    train, held_out = load_prompts(task, config.task, 8, 4)
    task.try_out(train[0])
    assert (task.variant, task.seed, len(train), len(held_out)) == ("noisy", 3, 8, 4)
    with pytest.raises(InputError, match="--data other: choose one of plain, exclusive, noisy"):
        load_task(config.model_copy(update={"data": "other"}))


# The plan and the report


def outcome(run: rubric.Run, scores: list[float]) -> dict:
    evaluations = []
    for i, score in enumerate(scores):
        values = {"short": [0.8, 0.1], "no number": [i / 10, 0.1], "joint": [0.0, 0.0]}
        values |= {"score": [score, 0.02], "kept": [0.9 - score, 0.1]}
        evaluations.append({"step": 6 * i, **values})
    train = {"no_signal": [0.0] * 6 + [0.25, 0.75] * 3}
    line = {"name": run.name, **run._asdict(), "minutes": 6.0, "cpu": "a"}
    return {**line, "eval": evaluations, "train": train}


TUNED = 4 * 6  # methods, rates
OTHERS = 5 * (5 + 2 + 2) + 2 * 5 + 5 * 5  # at one rate, at a higher one, each at its own


def test_the_plan_tries_rates_first():
    first = [*rubric.plan({})][:TUNED]
    assert {run.seed for run in first} == {matched.TUNING} and len({*first}) == len(first)
    done = {run.name: outcome(run, [0.9, 0.5 if run.lr == "2e-5" else 0.1]) for run in first}
    runs = [run for run in rubric.plan(done) if run.seed != matched.TUNING]
    assert len({*runs}) == len(runs) == OTHERS
    at_one_rate, others = runs[:45], runs[45:]
    assert {run.lr for run in at_one_rate} == {"4e-5"}
    assert [run.method for run in at_one_rate[:5]] == [*rubric.METHODS]
    assert [(run.method, run.lr) for run in others[:7]] == [
        ("gdpo", "8e-5"),
        ("rvpo", "8e-5"),
        *[(method, "2e-5") for method in rubric.METHODS],  # 0.5:2 takes rvpo's
    ]
    assert {run.variant for run in others} == {"plain"}
    for run in runs:  # train.py refuses a beta that is not used
        config = parse(TrainConfig, "", run.options())
        assert (config.steps, config.data, config.seed) == (30, run.variant, run.seed)


def lines_of(*runs: tuple[str, int, list[float]]) -> dict[str, dict]:
    done = {}
    for method, seed, scores in runs:
        run = rubric.Run("plain", method, "1e-5", seed)
        done[run.name] = outcome(run, scores)
    for by_rate in rubric.tuning().values():
        for lr, run in by_rate.items():
            done[run.name] = outcome(run, [0.0, 0.2 if lr == "1e-5" else 0.1])
    return done


def test_the_report_by_hand():
    one_seed = ("gdpo", 0, [0.4, 0.8, 0.5]), ("rvpo", 0, [0.4, 0.5, 0.6])
    report = rubric_report.report(lines_of(*one_seed))
    assert "Too few runs for a test" in report
    report = rubric_report.report(
        lines_of(*one_seed, ("gdpo", 1, [0.4, 0.6, 0.3]), ("rvpo", 1, [0.4, 0.5, 0.6]))
    )
    assert "| gdpo | 0.200 | 0.100 | 0.100 | 0.100 | 0.100 | 0.100 |" in report
    assert (
        "| gdpo | 1e-5 | 2 | 0.400 ± 0.000 | 0.700 ± 0.141 | 0.400 ± 0.141 | 0.500 ± 0.000 | "
        "0.200 ± 0.141 | 0.500 ± 0.141 | no number 0.20 | 0.000 ± 0.000 | 0.500 ± 0.000 |" in report
    )
    assert "| rvpo | 2 | 0.200 ± 0.141 | 0.500, 0.500 | -0.200 ± 0.141 | 0.500, 0.500 |" in report
    assert "With 2 seeds p is at least 0.500: too few for a difference to be significant." in report
    assert "| rvpo | 0.40 0.50 0.00 | 0.50 0.40 0.10 | 0.60 0.30 0.20 |" in report
    assert "28 runs, 2.8 hours" in report
    run = rubric.Run("plain", "gdpo", "1e-5", 0)
    assert rubric_report.neglected(outcome(run, [0.4])) == 1  # at first no reply lacks a number
    assert rubric_report.neglected(outcome(run, [0.4, 0.5])) == 0


def test_methods_are_compared_at_several_rates():
    done = {}
    for run in rubric.plan({}):
        done[run.name] = outcome(run, [0.4, 0.6 if run.method == "gdpo" else 0.5])
    report = rubric_report.report(done)
    for at, lr in (("All at 4e-5", "4e-5"), ("Both at 8e-5", "8e-5")):
        assert f"| gdpo | {lr} | 5 | 0.400 ± 0.000 | 0.600" in report
        table, *_ = report.split(f"{at}:\n")[1].split("score, kept")
        assert "| rvpo | 5 | -0.100 ± 0.000 | 0.062, " in table
    assert "its own" not in report  # no seed but the tuning seed has run at these
    assert "| hardmin | 4e-5 | 2 |" in report  # of the harder variants


def test_the_figure(tmp_path):
    done = {run.name: outcome(run, [0.4, 0.5]) for run in rubric.plan({})}
    rubric_report.figure(done, tmp_path / "rubric.png")
    assert (tmp_path / "rubric.png").stat().st_size > 10_000


# Runs


@pytest.fixture
def study(tiny, monkeypatch, tmp_path):
    """The study in two steps of the tiny model, in a folder of its own."""
    options = rubric.Run.options

    def with_tiny(run):
        short = [*TINY, "--model", str(tiny), "--steps", "2", "--eval-every", "1"]
        return [*options(run)[:-4], *short]

    monkeypatch.setattr(rubric.Run, "options", with_tiny)
    monkeypatch.setattr(matched, "RUNS", tmp_path / "runs")
    (tmp_path / "study").symlink_to(ROOT / "study")
    monkeypatch.chdir(tmp_path)
    return rubric.STUDY._replace(file=tmp_path / "rubric.jsonl")


RUN = rubric.Run("noisy", "rvpo", "1e-3", 0)


def test_a_run_is_kept_and_repeated_to_the_digit(study, capsys):
    line = matched.execute(study, RUN)
    assert [evaluation["step"] for evaluation in line["eval"]] == [0, 1, 2]
    assert {"short", "score", "kept"} <= line["eval"][-1].keys()
    assert len(line["train"]["short"]) == len(line["credit"]["finished"]) == 2
    matched.finish(study, line)
    assert study.read() == {RUN.name: json.loads(json.dumps(line))}
    capsys.readouterr()
    matched.again(study, RUN.name)
    assert capsys.readouterr().out.count("the same\n") == 5
    with pytest.raises(SystemExit, match="no such run"):
        matched.again(study, "other")


def test_its_runs_are_in_bfloat16(study):
    gaps = []
    for program in (study.program, "train.py"):
        matched.execute(study._replace(program=program), RUN, program.replace("/", "-"))
        lines = matched.read_lines(matched.RUNS / program.replace("/", "-") / "metrics.jsonl")
        gaps.append(min(line["sampler_gap"] for line in lines if "sampler_gap" in line))
    rounded, exact = gaps
    assert exact < 1e-5 < 1e-4 < rounded < 0.1


def test_a_shared_model_gives_the_numbers_of_train_py(study):
    measured = "eval", "train", "credit", "options"
    line = matched.execute(study._replace(program="train.py"), RUN)
    session = on_gpu.Session(RUN.options())
    batch_engine = session.engine
    session.engine = HFEngine(batch_engine.model, batch_engine.decoding)
    for _ in range(2):  # the second run begins with the same weights
        shared = session.train(study, RUN, end=time.time() + 600)
        assert {key: shared[key] for key in measured} == {key: line[key] for key in measured}
    assert shared.keys() == line.keys()
    assert session.train(study, RUN, end=0.0) is None  # it was broken off


def test_a_batch_is_sampled_at_once(study):
    engine = on_gpu.Session(RUN.options()).engine
    prompts, group, seeds = [[5, 6, 7, 8, 9], [10, 11]], 3, [1, 2]
    first, second = [[*engine.generate(prompts, group, seeds)] for _ in range(2)]
    assert first == second
    assert [i for i, _ in first] == [0, 1]
    for i, responses in first:
        assert len(responses) == group
        for response in responses:  # the padding is not seen
            ids = [prompts[i] + response.tokens]
            logits = engine.model(on_gpu.torch.tensor(ids)).logits[0].log_softmax(-1)
            at = range(len(prompts[i]) - 1, len(ids[0]) - 1)
            expected = [
                logits[t, token].item() for t, token in zip(at, response.tokens, strict=True)
            ]
            np.testing.assert_allclose(response.logp, expected, atol=1e-4)


def test_the_work_is_shared_and_stops(study, monkeypatch):
    ended = []

    def train(study, run):
        ended.append(run.name)
        return outcome(run, [0.4, 0.5, 0.6]) if len(ended) < 30 else None

    monkeypatch.setattr(matched, "TAKEN", set())
    matched.work([study], train, 2, end=time.time() + 600)
    everything = TUNED + OTHERS
    assert len({*ended}) == len(ended) == everything  # broken off ones are not begun again
    assert len(study.read()) == 29
    matched.work([study], train, 2, end=0.0)
    assert len(ended) == everything
