"""The choice of the next token when a model generates text."""

import numpy as np


def sample_token(token, position, logits, uniforms, choice, vocab_size, scratch):
    """Draw a token from softmax(logits / temperature), cut to the top_k most likely tokens, and of these to the fewest
    whose probabilities reach top_p. The tokens lie side by side in [0, 1), the most likely first; the one at a random
    number is drawn. At temperature 0 it is the most likely one. Of equal tokens the first counts as more likely.

    token (1, 1) int32, position (1,) int32, the number of tokens before those of logits
        <- logits (1, T, Vp), uniforms (at least position + T,) float64 in [0, 1), choice (3,) float64: temperature,
        top_k (0: all), top_p
    With the last row of logits, and of it the first vocab_size (V) columns:
    Writes:   position += T; token = the one at uniforms[position - 1], or -1 if a logit is not finite
    Scratch:  none
    Parallel: no
    Source:   Holtzman et al. 2019, arXiv:1904.09751 (top_p)
    """
    position += logits.shape[1]
    x = logits[0, -1, :vocab_size].astype(np.float64)
    temperature, top_k, top_p = choice
    if not np.isfinite(x).all():
        token[...] = -1
        return
    if temperature == 0:
        token[...] = x.argmax()
        return
    order = np.argsort(-x, kind="stable")
    if top_k:
        order = order[: int(top_k)]
    p = np.exp((x[order] - x[order[0]]) / temperature)
    p /= p.sum()
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    ends = np.cumsum(p)
    token[...] = order[np.searchsorted(ends / ends[-1], uniforms[position[0] - 1], side="right")]


def sample_token_scratch(token, position, logits, uniforms, choice, vocab_size):
    """Floats of scratch that `sample_token` needs: none."""
    return 0
