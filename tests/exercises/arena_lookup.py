"""The solution, and wrong answers with the phrases that `check` must print for each."""

from numba import njit


@njit
def solution(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[wte_at + tokens[b, t] * C + c] + memory[wpe_at + t * C + c]


@njit
def from_the_start_of_memory(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[tokens[b, t] * C + c] + memory[wpe_at + t * C + c]


@njit
def position_as_token(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[wte_at + t * C + c] + memory[wpe_at + t * C + c]


@njit
def sequence_as_position(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[wte_at + tokens[b, t] * C + c] + memory[wpe_at + b * C + c]


@njit
def column_major(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    Vp = (wpe_at - wte_at) // C
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[wte_at + c * Vp + tokens[b, t]] + memory[wpe_at + c * T + t]


@njit
def rows_one_element_apart(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                out[b, t, c] = memory[wte_at + tokens[b, t] + c] + memory[wpe_at + t + c]


@njit
def positions_continue_across_sequences(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                row = b * T + t
                out[b, t, c] = memory[wte_at + tokens[b, t] * C + c] + memory[wpe_at + row * C + c]


@njit
def only_the_first_sequence(out, tokens, memory, wte_at, wpe_at):
    _, T, C = out.shape
    for t in range(T):
        for c in range(C):
            out[0, t, c] = memory[wte_at + tokens[0, t] * C + c] + memory[wpe_at + t * C + c]


@njit
def adds_in_place(out, tokens, memory, wte_at, wpe_at):
    B, T, C = out.shape
    for b in range(B):
        for t in range(T):
            for c in range(C):
                memory[wte_at + tokens[b, t] * C + c] += memory[wpe_at + t * C + c]
                out[b, t, c] = memory[wte_at + tokens[b, t] * C + c]


WRONG = (
    (from_the_start_of_memory, ["B=1, T=1, C=1, Vp=1: out[0, 0, 0] is", "but should be"]),
    (position_as_token, ["B=3, T=2, C=4, Vp=9: out[0, 0, 0] is", "all elements of out are wrong"]),
    (sequence_as_position, ["B=3, T=2, C=4, Vp=9: ", "memory[49]", "out of bounds"]),
    (column_major, ["B=3, T=2, C=4, Vp=9: out[0, 0, 0] is", "23 of 24 elements are wrong"]),
    (rows_one_element_apart, ["B=3, T=2, C=4, Vp=9: out[0, 0, 0] is"]),
    (
        positions_continue_across_sequences,
        ["reads memory[49], which is out of bounds", "memory has shape (49,), so the index must be 0"],
    ),
    (only_the_first_sequence, ["out[1, 0, 0] is never written", "16 of 24 elements are wrong"]),
    (adds_in_place, ["it changes its input memory, at memory[5]"]),
)
