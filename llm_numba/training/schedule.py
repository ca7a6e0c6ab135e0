"""The learning rate of every step."""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")
WSD_DECAY = 0.2  # the part of a run over which wsd decays


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int, final_fraction: float) -> float:
    """The learning rate of update `step` (from 0) of a run of `steps` updates.

    step < warmup:  peak * (step + 1) / warmup, whatever the schedule
    afterwards:     peak * (f + (1 - f) * r) with f = final_fraction; r falls from 1 to 0 while p, the part of the decay
                    that is done, rises from 0 to 1

        cosine      r = (1 + cos(pi p)) / 2     p = (step - warmup) / (steps - warmup)
        linear      r = 1 - p                   the same p
        wsd         r = 1 - sqrt(p)             p counts over the last 20% of the run; before it r = 1 (stable)
        constant    r = 1

    p is 1 at step = steps and beyond: the last update, steps - 1, is one small step before it, as in llm.c, so that
    final_fraction 0 wastes no update.
    Source: llm.c, llmc/schedulers.h; Loshchilov and Hutter 2016, arXiv:1608.03983 (cosine); Hu et al. 2024,
    arXiv:2404.06395 (wsd); Haegele et al. 2024, arXiv:2405.18392 (1 - sqrt)
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, (1 - WSD_DECAY) * steps) if schedule == "wsd" else warmup
    p = max(0.0, (step - start) / (steps - start)) if step < steps else 1.0
    r = {"cosine": (1 + math.cos(math.pi * p)) / 2, "linear": 1 - p, "wsd": 1 - math.sqrt(p), "constant": 1.0}[schedule]
    return peak * (final_fraction + (1 - final_fraction) * r)
