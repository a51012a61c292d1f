"""What stands out and what does not."""

import math
import random

from roadwork.training.spikes import ENOUGH, Spikes


def noisy(count: int, level: float = 1.0) -> list[float]:
    draw = random.Random(0)
    return [level + draw.gauss(0, 0.05) for _ in range(count)]


def test_a_jump_stands_out_each_time_and_noise_and_a_falling_loss_do_not():
    spikes = Spikes(10.0)
    assert [spikes.usual(loss) for loss in noisy(300)] == [None] * 300
    for _ in range(100):  # a spike must not become usual
        median = spikes.usual(3.0)
        assert median is not None and 0.9 < median < 1.1
    assert all(spikes.usual(1.0 - step / 1000) is None for step in range(800))


def test_nothing_is_usual_at_first_and_what_is_not_finite_is_not_judged():
    spikes = Spikes(10.0)
    assert [spikes.usual(loss) for loss in [1.0, 100.0, *noisy(ENOUGH)]][:2] == [None, None]
    assert spikes.usual(math.nan) is None and spikes.usual(math.inf) is None
    assert spikes.usual(1e6) is not None


def test_zero_switches_it_off():
    spikes = Spikes(0.0)
    assert [spikes.usual(loss) for loss in [*noisy(50), 1e9]] == [None] * 51
