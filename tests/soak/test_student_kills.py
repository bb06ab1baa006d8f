"""`student train` killed thirty times and more at random moments, saves included: the same weights, the same log."""

import numpy as np
import pytest
from student_kills import Trainings


@pytest.mark.timeout(3600)
def test_thirty_kills_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    trainings = Trainings(tmp_path)
    while trainings.kills < 30 or trainings.in_saves < 5:
        trainings.kill_in_random_moments(tmp_path / "run", rng)
    print(f"{trainings.kills} kills, {trainings.in_saves} of them inside a save")
