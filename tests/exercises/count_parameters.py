"""The solution, and wrong answers with the phrases that `check` must print for each."""


def from_formula(formula):
    """An answer that writes `formula(maxT, V, L, C)`."""

    def count_parameters(total, sizes):
        for i in range(sizes.shape[0]):
            total[i] = formula(sizes[i, 0], sizes[i, 1], sizes[i, 2], sizes[i, 3])

    count_parameters.__name__ = formula.__name__
    return count_parameters


def padded(V):
    return (V + 127) // 128 * 128


def right(maxT, V, L, C):
    return (padded(V) + maxT) * C + L * (4 * C + 12 * C * C + 9 * C) + 2 * C


def unpadded_vocabulary(maxT, V, L, C):
    return right(maxT, V, L, C) - (padded(V) - V) * C


def separate_output_matrix(maxT, V, L, C):
    return right(maxT, V, L, C) + padded(V) * C


def without_biases(maxT, V, L, C):
    return right(maxT, V, L, C) - L * 9 * C


def one_layer(maxT, V, L, C):
    return right(maxT, V, 1, C)


def without_the_last_norm(maxT, V, L, C):
    return right(maxT, V, L, C) - 2 * C


def without_positions(maxT, V, L, C):
    return right(maxT, V, L, C) - maxT * C


def padded_too_far(maxT, V, L, C):
    return right(maxT, V, L, C) + (V // 128 * 128 + 128 - padded(V)) * C


def nothing_written(total, sizes):
    for i in range(sizes.shape[0]):
        right(*sizes[i])


def one_too_many(total, sizes):
    for i in range(sizes.shape[0] + 1):
        total[i] = right(sizes[i, 0], sizes[i, 1], sizes[i, 2], sizes[i, 3])


solution = from_formula(right)

WRONG = (
    (from_formula(unpadded_vocabulary), ["n=1, V=1: total[0] is", "but should be"]),
    (from_formula(separate_output_matrix), ["n=1, V=1: total[0] is", "but should be"]),
    (from_formula(without_biases), ["n=1, V=1: total[0] is", "but should be"]),
    (from_formula(one_layer), ["total[0] is 161, but should be 236"]),
    (from_formula(without_the_last_norm), ["n=1, V=1: total[0] is", "but should be"]),
    (from_formula(without_positions), ["n=1, V=1: total[0] is", "but should be"]),
    (nothing_written, ["total[0] is -1, but should be"]),
    (one_too_many, ["sizes[1, 0], which is out of bounds", "so the index of axis 0 must be 0 to 0"]),
)
