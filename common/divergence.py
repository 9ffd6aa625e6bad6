"""When a seed's training has no future, and what may help."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def largest_q(config: Any, reward: np.ndarray) -> float:
    """|Q| beyond which a critic has diverged: a hundred times what rewards can give."""
    reward = config.reward_scale * np.asarray(reward, np.float64)
    largest = np.abs(reward + config.reward_shift).max(initial=0.0)
    return max(1e4, 100 * float(largest) / max(1 - config.discount, 1e-4))


REMEDIES = {  # by the first letters of a metric's name, the first causes first
    "omega": "--omega-cap 10, or a larger --mu",
    "q": "a smaller --critic-learning-rate or --discount, --critic-layer-norm True, "
    "--normalize-obs True",
    "v": "a smaller --value-learning-rate or --discount, --normalize-obs True",
    "critic": "a smaller --critic-learning-rate, --discount or --reward-scale",
    "": "a smaller --actor-learning-rate",
}


def find(values: Mapping[str, float], largest_q: float) -> tuple[str, str] | None:
    """The first metric not finite, or Q or V too large, and a remedy."""
    for start, remedy in REMEDIES.items():
        for name, value in values.items():
            too_large = name in ("q", "q_data", "v") and abs(value) > largest_q
            if name.startswith(start) and (too_large or not np.isfinite(value)):
                return name, remedy
    return None
