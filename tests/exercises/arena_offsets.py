"""The solution, and wrong answers with the phrases that `check` must print for each."""

RUN = 64


def solution(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = end
        end += (sizes[i] + RUN - 1) // RUN * RUN
    total[0] = end


def without_padding(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = end
        end += sizes[i]
    total[0] = end


def a_run_too_many(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = end
        end += (sizes[i] // RUN + 1) * RUN
    total[0] = end


def rounded_down(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = end
        end += sizes[i] // RUN * RUN
    total[0] = end


def the_end_of_each(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        end += (sizes[i] + RUN - 1) // RUN * RUN
        offsets[i] = end
    total[0] = end


def unpadded_end(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = (end + RUN - 1) // RUN * RUN
        end = offsets[i] + sizes[i]
    total[0] = end


def from_the_one_before(offsets, total, sizes):
    for i in range(sizes.shape[0]):
        offsets[i] = offsets[i - 1] + (sizes[i - 1] + RUN - 1) // RUN * RUN
    total[0] = offsets[-1] + (sizes[-1] + RUN - 1) // RUN * RUN


def no_total(offsets, total, sizes):
    end = 0
    for i in range(sizes.shape[0]):
        offsets[i] = end
        end += (sizes[i] + RUN - 1) // RUN * RUN


WRONG = (
    (without_padding, ["n=3: offsets[2] is", "1 of 3 elements are wrong"]),
    (a_run_too_many, ["n=1: total[0] is", "but should be"]),
    (rounded_down, ["n=3: offsets[2] is", "1 of 3 elements are wrong"]),
    (the_end_of_each, ["n=1: offsets[0] is", "but should be 0", "it is the only element of offsets"]),
    (unpadded_end, ["n=3: total[0] is"]),
    (from_the_one_before, ["reads offsets[-1], which is out of bounds", "the index must be 0 to 0"]),
    (no_total, ["n=1: total[0] is -1, but should be"]),
)
