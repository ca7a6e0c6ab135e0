"""The solution of the exercise, and wrong answers with what `check` has to say of each."""


def solution(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(free, (i + 1) * launch)
        end[i] = start[i] + seconds[i]
        free = end[i]


def all_at_once(start, end, seconds, launch):
    for i in range(seconds.shape[0]):
        start[i] = (i + 1) * launch
        end[i] = start[i] + seconds[i]


def no_asking(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = free
        end[i] = start[i] + seconds[i]
        free = end[i]


def asked_for_at_once(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(free, i * launch)
        end[i] = start[i] + seconds[i]
        free = end[i]


def python_waits(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = free + launch
        end[i] = start[i] + seconds[i]
        free = end[i]


def the_card_never_waits(start, end, seconds, launch):
    free = launch
    for i in range(seconds.shape[0]):
        start[i] = free
        end[i] = start[i] + seconds[i]
        free = end[i]


def after_the_start_before(start, end, seconds, launch):
    before = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(before, (i + 1) * launch)
        end[i] = start[i] + seconds[i]
        before = start[i]


def before_the_first(start, end, seconds, launch):
    for i in range(seconds.shape[0]):
        start[i] = max(end[i - 1], (i + 1) * launch)
        end[i] = start[i] + seconds[i]


def no_end(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(free, (i + 1) * launch)
        free = start[i] + seconds[i]


WRONG = (
    (all_at_once, ["start[", "but should be"]),
    (no_asking, ["n=1: start[0] is 0, but should be 0.75"]),
    (asked_for_at_once, ["n=1: start[0] is 0, but should be 0.75"]),
    (python_waits, ["start[", "but should be"]),
    (the_card_never_waits, ["start[", "but should be"]),
    (after_the_start_before, ["start[", "but should be"]),
    (before_the_first, ["reads end[-1], which is out of bounds", "the index must be 0 to 0"]),
    (no_end, ["n=1: nothing is ever written to end[0]"]),
)
