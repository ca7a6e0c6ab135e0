"""The solution, and wrong answers with the phrases that `check` must print for each."""


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


def no_launch_time(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = free
        end[i] = start[i] + seconds[i]
        free = end[i]


def first_launch_is_free(start, end, seconds, launch):
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


def gpu_never_waits(start, end, seconds, launch):
    free = launch
    for i in range(seconds.shape[0]):
        start[i] = free
        end[i] = start[i] + seconds[i]
        free = end[i]


def waits_for_the_previous_start(start, end, seconds, launch):
    before = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(before, (i + 1) * launch)
        end[i] = start[i] + seconds[i]
        before = start[i]


def reads_before_the_first(start, end, seconds, launch):
    for i in range(seconds.shape[0]):
        start[i] = max(end[i - 1], (i + 1) * launch)
        end[i] = start[i] + seconds[i]


def end_not_written(start, end, seconds, launch):
    free = 0.0
    for i in range(seconds.shape[0]):
        start[i] = max(free, (i + 1) * launch)
        free = start[i] + seconds[i]


WRONG = (
    (all_at_once, ["start[", "but should be"]),
    (no_launch_time, ["n=1: start[0] is 0, but should be 0.75"]),
    (first_launch_is_free, ["n=1: start[0] is 0, but should be 0.75"]),
    (python_waits, ["start[", "but should be"]),
    (gpu_never_waits, ["start[", "but should be"]),
    (waits_for_the_previous_start, ["start[", "but should be"]),
    (reads_before_the_first, ["reads end[-1], which is out of bounds", "the index must be 0 to 0"]),
    (end_not_written, ["n=1: end[0] is never written"]),
)
