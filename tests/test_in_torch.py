"""PyTorch: its transformations, compilers, exporters and devices, on these losses as on its own."""

import pytest
import torch
from capabilities import close


@pytest.mark.capability("torch", "backward")
def test_backward(sample):
    x = torch.tensor(sample.x, requires_grad=True)
    values = sample(x, reduction="none")
    values.backward(torch.tensor(sample.cotangent))
    close(values.detach(), sample.values)
    close(x.grad, sample.pulled_back)
