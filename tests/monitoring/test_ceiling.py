"""The yardstick of utilisation."""

import torch

from roadwork.monitoring.ceiling import CPU_SIZE, matmul_ceiling


def test_a_cpu_reaches_something_and_torchs_generator_is_left_alone():
    """The order of a run's dropout must not depend on a measurement."""
    before = torch.random.get_rng_state()
    found = matmul_ceiling("cpu")
    assert found.operations_per_s > 1e7 and found.size == CPU_SIZE and found.dtype in ("bfloat16", "float32")
    assert torch.equal(torch.random.get_rng_state(), before)
