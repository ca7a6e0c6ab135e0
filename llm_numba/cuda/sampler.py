"""The choice of the next token when a model generates text.

One block does it, without sorting. Think of the tokens as lying side by side, the most likely first, each as long as
its weight, e**(logit / temperature). `locate` finds the token at a given place by a binary search for its weight: the
tokens heavier than it end before the place, those at least as heavy after it. Thus it finds the last of the most likely
tokens, by their number (top_k) or by their share of the weight (top_p), and the one at a random place.
"""

import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import block_max, block_sum, device, exp2, float32, int32, kernel, sized, to_float
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous

THREADS = sized(1024, 4)
ZERO, HALF, ONE = float32(0), float32(0.5), float32(1)
BELOW_ONE = float32(1 - 2.0**-24)
LIGHTEST = float32(2.0**-100)  # the most likely token weighs 1; none lighter than this is drawn
FRACTION_BITS = 23
INFINITY, LOG2E = float32(np.inf), float32(math.log2(math.e))


@device
def total(weights, lightest, counted, shared):
    """The sum of the weights that are at least `lightest`, or their number if `counted`."""
    found = ZERO
    for v in range(cuda.threadIdx.x, weights.shape[0], THREADS):
        weight = weights[v]
        if weight >= lightest:
            found += ONE if counted else weight
    return block_sum(found, shared)


@device
def find(weights, weight, rank):
    """The token with this rank, from 0, among those of this weight."""
    # the last row of THREADS tokens before which there are no more than `rank`
    first, mine, row, before = 0, False, 0, 0
    while first <= rank and row < weights.shape[0]:
        v = row + cuda.threadIdx.x
        mine = v < weights.shape[0] and weights[v] == weight
        before, first, row = first, first + cuda.syncthreads_count(int32(mine)), row + THREADS
    # in it, the last column before which there are no more
    column, step = 0, THREADS // 2
    while step > 0:
        if before + cuda.syncthreads_count(int32(mine and cuda.threadIdx.x < column + step)) <= rank:
            column += step
        step //= 2
    return int32(row - THREADS + column)


@device
def locate(weights, place, counted, shared):
    """(token at `place`, its weight). If `counted`, every token is as long as 1."""
    weight = ONE
    while weight > LIGHTEST and total(weights, weight, counted, shared) <= place:
        weight *= HALF
    step = weight * HALF
    for _ in range(FRACTION_BITS):
        if total(weights, weight + step, counted, shared) > place:
            weight += step
        step *= HALF
    heavier, same = ZERO, ZERO
    for v in range(cuda.threadIdx.x, weights.shape[0], THREADS):
        if weights[v] > weight:
            heavier += ONE if counted else weights[v]
        if weights[v] == weight:
            same += ONE
    heavier, same = block_sum(heavier, shared), block_sum(same, shared)
    rank = (place - heavier) / (ONE if counted else weight)
    return find(weights, weight, int32(max(ZERO, min(rank, same - ONE)))), weight


@device
def cut(weights, place, counted, shared):
    """Clear the weights of the tokens behind the one at `place`."""
    last, lightest = locate(weights, place, counted, shared)
    for v in range(cuda.threadIdx.x, weights.shape[0], THREADS):
        if weights[v] < lightest or (weights[v] == lightest and v > last):
            weights[v] = ZERO


@kernel(launch_bounds=(THREADS, 1))
def sample_token_kernel(token, position, logits, uniforms, choice, weights):
    """token (1, 1) and position (1,) <- logits (T, Vp), uniforms (at least position + T,), choice (3,); weights (V,):
    scratch.

    Grid: one block; block: THREADS; a thread owns every THREADS-th token. Moves: a row of logits; the weights stay in
    the L1 or L2 cache
    """
    shared = cuda.shared.array(THREADS, float32)
    thread, V, end = cuda.threadIdx.x, weights.shape[0], position[0] + logits.shape[0]
    let_next_start()
    wait_for_previous()

    row = logits[logits.shape[0] - 1]
    finite, top = True, -INFINITY
    for v in range(thread, V, THREADS):
        weights[v] = to_float(row[v])
        finite = finite and abs(weights[v]) < INFINITY
        top = max(top, weights[v])
    finite, top = cuda.syncthreads_and(int32(finite)), block_max(top, shared)

    temperature, top_k, top_p = float32(choice[0]), float32(choice[1]), float32(choice[2])
    share = min(float32(uniforms[end - 1]), BELOW_ONE)
    if temperature > ZERO:
        for v in range(thread, V, THREADS):
            weights[v] = exp2((weights[v] - top) / temperature * LOG2E)
        if top_k > ZERO:
            cut(weights, min(top_k, float32(V)) - HALF, True, shared)
        if top_p < ONE:
            cut(weights, BELOW_ONE * top_p * total(weights, LIGHTEST, False, shared), False, shared)
        drawn, _ = locate(weights, share * total(weights, LIGHTEST, False, shared), False, shared)
    else:
        drawn = find(weights, top, 0)
    if thread == 0:
        token[0, 0] = drawn if finite else -1
        position[0] = end


def sample_token(token, position, logits, uniforms, choice, vocab_size, scratch):
    """Draw a token from softmax(logits / temperature), cut to the top_k most likely tokens, and of these to the fewest
    whose probabilities reach top_p. The tokens lie side by side in [0, 1), the most likely first; the one at a random
    number is drawn. At temperature 0 it is the most likely one. Of equal tokens the first counts as more likely.

    token (1, 1) int32, position (1,) int32, the number of tokens before those of logits
        <- logits (1, T, Vp), uniforms (at least position + T,) float64 in [0, 1), choice (3,) float64: temperature,
        top_k (0: all), top_p
    With the last row of logits, and of it the first vocab_size (V) columns:
    Writes:   position += T; token = the one at uniforms[position - 1], or -1 if a logit is not finite
    Scratch:  sample_token_scratch
    Parallel: over the tokens of the vocabulary, in one block
    Source:   Holtzman et al. 2019, arXiv:1904.09751 (top_p)
    """
    launch = overlapping(sample_token_kernel, 1, THREADS)
    launch(token, position, logits[0], uniforms, choice, scratch[:vocab_size])


def sample_token_scratch(token, position, logits, uniforms, choice, vocab_size):
    """Floats of scratch that `sample_token` needs."""
    return vocab_size
