"""Runs the threads of a block in Numba's CUDA simulator one at a time, each until it waits for others.

Numba's own way lets the operating system switch between them, and polls. Here the order is always the same, a deadlock
is an error as soon as no thread can run, and a switch costs one lock.
"""

import threading
from collections import deque

import numpy as np
from numba.cuda.simulator import kernel as numba_simulator


def locked():
    """A lock that one thread acquires to wait until another one releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Thread(numba_simulator.BlockThread):
    """A CUDA thread. It runs while it has the turn; waits_for says in words what it waits for otherwise."""

    def __init__(self, function, block, block_index, thread_index):
        super().__init__(function, block, block_index, thread_index, False)
        self.block, self.turn, self.waits_for = block, locked(), ""

    def run(self):
        self.turn.acquire()
        if not self.block.failed:
            super().run()
        self.block.leave(self)

    def syncthreads(self):
        self.block.at_syncthreads.append(self)
        if not self.block.pass_syncthreads():
            self.block.wait(self, "syncthreads")


class Block(numba_simulator.BlockManager):
    """The threads of a block: ready to run, alive, at syncthreads. failed: the first error of any of them.

    after_syncthreads: what else to do when all threads were at syncthreads
    """

    def run(self, block_index, *arguments):
        def call():
            self._f(*arguments)

        indices = np.ndindex(*self._block_dim)
        threads = [Thread(call, self, block_index, index) for index in indices]
        self.ready, self.alive, self.at_syncthreads = deque(threads), set(threads), []
        self.failed, self.finished = None, locked()
        self.after_syncthreads = lambda: None
        for thread in threads:
            thread.start()
        self.pass_turn()
        self.finished.acquire()
        if self.failed:
            raise self.failed

    def pass_turn(self):
        """Let another thread run."""
        if not self.ready and self.alive:
            reasons = sorted({thread.waits_for for thread in self.alive})
            self.fail(RuntimeError(f"deadlock: all threads of the block wait for {', '.join(reasons)}"))
        (self.ready.popleft().turn if self.ready else self.finished).release()

    def wait(self, thread, reason):
        """The running thread waits until `wake`."""
        if not self.failed:
            thread.waits_for = reason
            self.pass_turn()
            thread.turn.acquire()
        if self.failed:
            raise RuntimeError("another thread of the block failed")

    def wake(self, threads):
        """Make waiting threads ready, and empty the list."""
        for thread in threads:
            if thread.waits_for:  # else `fail` has woken it
                thread.waits_for = ""
                self.ready.append(thread)
        threads.clear()

    def pass_syncthreads(self) -> bool:
        """Let the threads at syncthreads continue if all are there; whether they were."""
        everyone = len(self.at_syncthreads) == len(self.alive)
        if everyone:
            self.at_syncthreads.pop()  # it is running
            self.after_syncthreads()
            self.wake(self.at_syncthreads)
        return everyone

    def fail(self, error):
        """Keep the first error, and let the waiting threads end."""
        self.failed = self.failed or error
        self.wake([thread for thread in self.alive if thread.waits_for])

    def leave(self, thread):
        """A thread has ended."""
        self.alive.discard(thread)
        if thread.exception:
            error, traceback = thread.exception
            self.fail(error.with_traceback(traceback))
        if not self.failed and self.at_syncthreads and len(self.at_syncthreads) == len(self.alive):
            self.after_syncthreads()
            self.wake(self.at_syncthreads)
        self.pass_turn()


def install():
    """Make the simulator run its blocks this way."""
    numba_simulator.BlockManager = Block
