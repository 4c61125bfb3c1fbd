"""The studies on a language model on one GPU, at once: a loaded model shared by many runs.

    python study/on_gpu.py rubric text --minutes 8 --processes 8

Runs what is missing in OUT/rubric.jsonl, then in OUT/text.jsonl, and writes each run's line as it
ends. After so many minutes every run that is under way is broken off, without a line. A GPU's
numbers are other ones than a CPU's: for a report copy the whole file over the study's own. vLLM
is not needed. Without a GPU it runs on the CPU.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: --help must not wait for it
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "studies", nargs="+", choices=("rubric", "text"), help="the first one first"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after as many")
    parser.add_argument(
        "--processes", type=int, default=1, help="that share the GPU, each with its own model"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder (default %(default)s)"
    )
    OPTIONS = parser.parse_args()
sys.path.insert(0, str(Path(__file__).parent.parent))  # a script sees its own folder only

import functools
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import matched
import rubric
import text
import torch

import train
from config import TrainConfig, parse
from infra import pretrained
from infra.log import RunLog
from infra.prompts import encode
from infra.ranks import InputError, join, run_program
from infra.run_directory import versions
from infra.state import NoCheckpoints
from local.hf import HFEngine
from local.machine import cores, processor
from rollout import Response, Sampler
from tasks import load_prompts, load_task
from update import make_optimizer

STUDIES = {"rubric": rubric.STUDY, "text": text.STUDY}


def main(options: argparse.Namespace) -> None:
    if options.processes < 1 or not options.minutes > 0:
        raise InputError("--processes must be at least 1, and --minutes above 0")
    end = time.time() + 60 * options.minutes
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out} cannot be made: {error}") from error
    studies = []
    for name in options.studies:
        study = STUDIES[name]
        studies.append(study._replace(file=options.out / study.file.name))
    pretrained.resolve("smollm2")  # it is converted once, and not by each process
    threads = max(1, cores() // options.processes)
    with ProcessPoolExecutor(
        options.processes, get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:

        def train_one(study: matched.Study, run) -> dict | None:
            return pool.submit(train_in_session, study, run, end).result()

        matched.work(studies, train_one, options.processes, end)


def train_in_session(study: matched.Study, run, end: float) -> dict | None:
    """What a process of the pool does with a run."""
    return session().train(study, run, end)


@functools.cache
def session() -> "Session":
    """A process of the pool has one."""
    return Session(rubric.Run("plain", "gdpo", "1e-5", 0).options())


class Session:
    """A model that is loaded once, and trained anew by each run."""

    def __init__(self, options: list[str]):
        """options: of any of the runs."""
        config = parse(TrainConfig, "", [*options, "--engine", "hf"])
        device = join()
        self.machine = processor()
        if device.type == "cuda":
            self.machine = torch.cuda.get_device_name()
        self.known = pretrained.describe(config.model, config.max_tokens, trained=True)
        self.learner, engine = train.load(config, device, self.known, self.known.room)
        self.engine = BatchEngine(engine.model, engine.decoding)
        self.weights = [weight.detach().clone() for weight in self.learner.policy.parameters()]

    def train(self, study: matched.Study, run, end: float) -> dict | None:
        """Returns the run's line, or None if it was broken off at the time `end`."""
        config = parse(TrainConfig, "", [*run.options(), "--engine", "hf"])
        task = load_task(config)
        n_train = config.steps * config.prompts
        prompts, held_out = load_prompts(task, config.task, n_train, config.eval_prompts)
        tokenize = functools.partial(encode, self.known.tokenizer, limit=self.known.room)
        sampler = Sampler(self.engine, task, config.seed)
        self.begin_anew(config.lr)
        with tempfile.TemporaryDirectory() as folder:
            log = QuietLog(Path(folder))
            log.begin({}, {"versions": versions()})
            evaluate_at = functools.partial(train.evaluate, sampler, tokenize(held_out), log)
            checkpoints = UntilEnd(end)
            try:
                train.fit(
                    config, self.learner, sampler, tokenize(prompts), log, evaluate_at, checkpoints
                )
            except TimeIsUp:
                return None
            line = matched.kept(study, run, Path(folder))
            return line | {"program": "study/on_gpu.py", "cpu": self.machine}

    @torch.no_grad()
    def begin_anew(self, lr: float) -> None:
        """With the weights that were loaded, and a new optimizer."""
        policy = self.learner.policy
        for weight, loaded in zip(policy.parameters(), self.weights, strict=True):
            weight.copy_(loaded)
            weight.grad = None
        self.learner = self.learner._replace(optimizer=make_optimizer(policy, lr))


class TimeIsUp(Exception):
    """Raised between two steps of a run."""


class UntilEnd(NoCheckpoints):
    """Saves nothing, and breaks the run off after the time `end`."""

    def __init__(self, end: float):
        super().__init__()
        self.end = end

    def save_if_due(self) -> float:
        if time.time() > self.end:
            raise TimeIsUp
        return 0.0


class QuietLog(RunLog):
    def say(self, line: str) -> None:
        """Says nothing: many runs would talk at a time."""


class BatchEngine(HFEngine):
    """Samples all prompts of a batch at once. The first seed is that of the whole batch."""

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], group: int, seeds: list[int]
    ) -> Iterator[tuple[int, list[Response]]]:
        longest = max(len(prompt) for prompt in prompts)
        padding, *_ = self.decoding.stops
        ids = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids = ids.repeat_interleave(group, 0)  # (P * G, longest)
        mask = mask.repeat_interleave(group, 0)
        seed, *_ = seeds
        responses = self._sample(ids, mask, seed)
        for i in range(len(prompts)):
            yield i, responses[i * group : (i + 1) * group]


if __name__ == "__main__":
    run_program(main, OPTIONS)
