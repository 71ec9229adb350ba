"""What holds for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: a second thread costs more than it computes, and other processes need the core."""
    torch.set_num_threads(1)
