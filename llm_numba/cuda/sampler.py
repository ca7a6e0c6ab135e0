"""The choice of the next token when a model generates text.

One block does it, without sorting. The tokens lie side by side, the most likely first, each as long as its weight,
e**(logit / temperature):

    | token 7           | token 2      | token 9  | token 4 | token 0 | ...
    0                                       ^ place

`locate` finds the token at a place by searching for its weight: all heavier tokens together end before the place, all
tokens at least as heavy end after it. It is called for the last token that may be drawn, by number (top_k) or by share
of the whole (top_p), and for the token at a random place.
"""

import functools
import math

import numpy as np
from numba import cuda

from llm_numba.cuda.jit import block_max, block_scan, block_sum, blocks_for, device, exp2, float32, int32, kernel, sized
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous
from llm_numba.cuda.vectors import load_vector, store_vector, vector_size

THREADS = sized(512, 4)
ZERO, HALF, ONE, TWO, THREE, FOUR = (float32(x) for x in (0, 0.5, 1, 2, 3, 4))
EIGHT = float32(8)
BELOW_ONE = float32(1 - 2.0**-24)
LIGHTEST = float32(2.0**-100)  # the most likely token weighs 1; none lighter than this is drawn
STEPS, ULP = 12, float32(2.0**-23)  # a float32's fraction has 23 bits
INFINITY, LOG2E = float32(np.inf), float32(math.log2(math.e))


@functools.cache
def sample_kernel(size: int):
    """The kernel for logits in vectors of this size."""
    row = THREADS * size  # tokens that the block loads at once

    @device
    def totals(weights, first, second, third, counted, shared):
        """The sums of the weights that are at least `first`, `second` and `third`, or their numbers if `counted`."""
        x = cuda.local.array(size, float32)
        a, b, c = ZERO, ZERO, ZERO
        for v in range(cuda.threadIdx.x * size, weights.shape[1], row):
            load_vector(x, 0, weights, 0, v, size)
            for i in range(size):
                length = ONE if counted else x[i]
                a += length if x[i] >= first else ZERO
                b += length if x[i] >= second else ZERO
                c += length if x[i] >= third else ZERO
        return block_sum(a, shared), block_sum(b, shared), block_sum(c, shared)

    @device
    def find(values, V, value, rank, shared, found):
        """The token with this rank, from 0, among those of this value, of the first V."""
        x = cuda.local.array(size, float32)
        earlier = int32(0)
        for start in range(0, V, row):
            mine, v = int32(0), start + cuda.threadIdx.x * size
            if v < V:
                load_vector(x, 0, values, values.shape[0] - 1, v, size)
                for i in range(size):
                    mine += int32(v + i < V and x[i] == value)
            before, of_row = block_scan(mine, shared)
            missing = rank - earlier - before
            if 0 <= missing and missing < mine:
                for i in range(size):
                    if v + i < V and x[i] == value:
                        if missing == 0:
                            found[0] = v + i
                        missing -= 1
            earlier += of_row
            if earlier > rank:
                break
        cuda.syncthreads()
        return found[0]

    @device
    def locate(weights, place, counted, shared, ranks, found):
        """(token at `place`, its weight). If `counted`, every token is as long as 1."""
        # the exponent: the largest power of two for which the tokens that weigh at least as much reach the place
        weight, a, b, c = TWO, ZERO, ZERO, ZERO
        while weight > LIGHTEST and c <= place:
            weight /= EIGHT
            a, b, c = totals(weights, FOUR * weight, TWO * weight, weight, counted, shared)
        weight *= FOUR if a > place else TWO if b > place else ONE
        # the fraction, two bits at a time
        step, ulp = weight / FOUR, weight * ULP
        for _ in range(STEPS):
            a, b, c = totals(weights, weight + step, weight + TWO * step, weight + THREE * step, counted, shared)
            weight += step * (THREE if c > place else TWO if b > place else ONE if a > place else ZERO)
            step /= FOUR
        heavier, _, _ = totals(weights, weight + ulp, INFINITY, INFINITY, counted, shared)
        a, b, _ = totals(weights, weight, weight + ulp, INFINITY, True, shared)
        rank = max(ZERO, min((place - heavier) / (ONE if counted else weight), a - b - ONE))
        return find(weights, weights.shape[1], weight, int32(rank), ranks, found), weight

    @device
    def cut(weights, place, counted, shared, ranks, found):
        """Clear the weights of the tokens behind the one at `place`."""
        last, lightest = locate(weights, place, counted, shared, ranks, found)
        for v in range(cuda.threadIdx.x * size, weights.shape[1], row):
            for i in range(v, v + size):
                if weights[0, i] < lightest or (weights[0, i] == lightest and i > last):
                    weights[0, i] = ZERO

    @kernel(launch_bounds=(THREADS, 1))
    def sample_token_kernel(token, position, logits, uniforms, choice, weights, V):
        """token (1, 1) and position (1,) <- logits (T, Vp), uniforms (at least position + T,), choice (3,); weights
        (1, V rounded up to a multiple of row): scratch.

        Grid: one block; block: THREADS; a thread owns every THREADS-th vector of tokens. Moves: a row of logits; the
        weights stay in cache
        """
        shared = cuda.shared.array(THREADS, float32)
        ranks = cuda.shared.array(THREADS, int32)
        found = cuda.shared.array(1, int32)
        x = cuda.local.array(size, float32)
        first, last = cuda.threadIdx.x * size, logits.shape[0] - 1
        let_next_start()
        wait_for_previous()

        end = position[0] + logits.shape[0]  # read before the barrier, written after it
        finite, top = True, -INFINITY
        for v in range(first, V, row):
            load_vector(x, 0, logits, last, v, size)
            for i in range(size):
                if v + i < V:
                    finite &= abs(x[i]) < INFINITY
                    top = max(top, x[i])
        finite, top = cuda.syncthreads_and(int32(finite)), block_max(top, shared)

        temperature, top_k, top_p = float32(choice[0]), float32(choice[1]), float32(choice[2])
        share = min(float32(uniforms[end - 1]), BELOW_ONE)
        if not finite:
            drawn = int32(-1)
        elif temperature == ZERO:
            drawn = find(logits, V, top, int32(0), ranks, found)
        else:
            for v in range(first, weights.shape[1], row):
                if v < V:
                    load_vector(x, 0, logits, last, v, size)
                for i in range(size):
                    x[i] = exp2((x[i] - top) / temperature * LOG2E) if v + i < V else ZERO
                store_vector(weights, 0, v, x, 0, size)
            if top_k > ZERO:
                cut(weights, min(top_k, float32(V)) - HALF, True, shared, ranks, found)
            if top_p < ONE:
                whole, _, _ = totals(weights, LIGHTEST, INFINITY, INFINITY, False, shared)
                cut(weights, BELOW_ONE * top_p * whole, False, shared, ranks, found)
            whole, _, _ = totals(weights, LIGHTEST, INFINITY, INFINITY, False, shared)
            drawn, _ = locate(weights, share * whole, False, shared, ranks, found)
        if cuda.threadIdx.x == 0:
            token[0, 0] = drawn
            position[0] = end

    return sample_token_kernel


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
    size = vector_size(logits.shape[2])
    weights = scratch[: weights_of(vocab_size, size)].reshape(1, -1)
    overlapping(sample_kernel(size), 1, THREADS)(token, position, logits[0], uniforms, choice, weights, vocab_size)


def sample_token_scratch(token, position, logits, uniforms, choice, vocab_size):
    """Floats of scratch that `sample_token` needs."""
    return weights_of(vocab_size, vector_size(logits.shape[2]))


def weights_of(V: int, size: int) -> int:
    """How many weights there are, those that fill the last row included."""
    return blocks_for(V, THREADS * size) * THREADS * size
