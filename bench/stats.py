"""Statistics of repeated timings. Pure functions of numbers; what is random is seeded, so the same figures give the same answer.

The block bootstrap is that of Carlstein (1986), "The use of subseries values for estimating the variance of a general statistic
from a stationary sequence", Annals of Statistics 14; for levels of repetition in benchmarks see Kalibera and Jones (2013),
"Rigorous benchmarking in reasonable time", ISMM.
"""

import functools
import math
import statistics

import numpy as np

SEED = 20130620


def median_interval(
    turns: list[list[float]], level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median over all samples, in their unit.

    Whole turns are resampled, because neighbouring samples are correlated. A single turn has its samples resampled: too narrow
    if they are correlated. Raises ValueError without samples.
    """
    blocks = [turn for turn in turns if turn]
    if not blocks:
        raise ValueError("an interval needs samples")
    blocks = blocks if len(blocks) > 1 else [[sample] for sample in blocks[0]]
    samples = np.concatenate([np.asarray(block, float) for block in blocks])
    order = np.argsort(samples, kind="stable")
    block_of = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])[order]
    samples, generator = samples[order], np.random.default_rng(SEED)
    medians = []
    for _ in range(resamples):
        times_drawn = np.bincount(generator.integers(len(blocks), size=len(blocks)), minlength=len(blocks))
        medians.append(_weighted_median(samples, times_drawn[block_of]))
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weighted_median(ordered: np.ndarray, weights: np.ndarray) -> float:
    """The median of the ordered values, each repeated `weights` times."""
    upto = np.cumsum(weights)
    lower, upper = np.searchsorted(upto, upto[-1] / 2, "left"), np.searchsorted(upto, upto[-1] / 2, "right")
    return (ordered[lower] + ordered[upper]) / 2


def centre(launches: list[list[float]]) -> tuple[float, float]:
    """Mean over launches of the median over turns, and its standard error.

    The error is the larger of what the spread between launches says (a run on a restless day says so itself) and the bootstrap
    over turns within launches.
    """
    medians = [statistics.median(turns) for turns in launches]
    between = statistics.stdev(medians) / math.sqrt(len(medians)) if len(medians) > 1 else 0.0
    within = math.sqrt(sum(_median_variance(turns) for turns in launches)) / len(launches)
    return statistics.fmean(medians), max(between, within)


def _median_variance(values: list[float]) -> float:
    """Bootstrap variance of the median."""
    return (
        float(np.var(np.median(np.asarray(values)[_draws(len(values))], axis=1))) if len(values) > 1 else 0.0
    )


@functools.lru_cache(maxsize=64)
def _draws(count: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(count, size=(200, count))


def root_mean_square(values: list[float]) -> float:
    """Standard deviation about zero: a bias of one side counts as noise."""
    return math.sqrt(statistics.fmean(value * value for value in values))


def t_quantile(tail: float, freedom: float) -> float:
    """What Student's t exceeds with probability `tail` (the normal, for infinite degrees of freedom)."""
    from scipy import special

    return -float(special.ndtri(tail) if math.isinf(freedom) else special.stdtrit(freedom, tail))
