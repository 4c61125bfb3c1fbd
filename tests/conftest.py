import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def tiny() -> Path:
    import model

    return model.resolve("tiny")


@pytest.fixture(scope="session")
def tiny_policy(tiny):
    import model

    return model.load(tiny, torch.device("cpu"))
