"""The barriers of `hopper.ring` in Python: producer, consumers and copies go on in any order."""

from itertools import count


class Barrier:
    """So many arrivals and all bytes that are expected complete a phase; a copy is one byte here."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.bytes = self.phase = 0

    def arrive(self, expected=0):
        assert self.pending > 0, "more arrivals than the phase takes"
        self.pending -= 1
        self.bytes += expected
        self._complete()

    def receive(self):
        self.bytes -= 1
        self._complete()

    def _complete(self):
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def lets_pass(self, parity):
        """What is asked for by parity alone: whether the phase before this one had it."""
        return self.phase & 1 != parity


class Program:
    """One program over its tiles.

    With `gathered` rows three threads tell of their own copies, the weight is one; else both tiles are.
    """

    def __init__(self, tiles, steps, stages, gathered, rng, turns=True):
        self.tiles, self.steps, self.stages, self.rng, self.turns = tiles, steps, stages, rng, turns
        self.threads, self.copies = (3, 1) if gathered else (0, 2)
        self.full = [Barrier(1 + self.threads) for _ in range(stages)]
        self.empty = [Barrier(1) for _ in range(stages)]
        self.turn = [Barrier(1) for _ in range(2)]
        self.content, self.landed, self.readers = [None] * stages, [0] * stages, [0] * stages
        self.flying, self.done = [], []

    def producer(self):
        for step in range(self.tiles * self.steps):
            stage = step % self.stages
            while not self.empty[stage].lets_pass((step // self.stages) & 1 ^ 1):
                yield
            assert not self.readers[stage], "a stage is written while it is read"
            self.content[stage], self.landed[stage] = step, 0
            self.full[stage].arrive(expected=self.copies)
            self.flying += [(stage, self.full[stage].receive)] * self.copies
            self.flying += [(stage, self.full[stage].arrive)] * self.threads
            yield

    def consumer(self, which):
        for round_, tile in zip(count(), range(which, self.tiles, 2)):
            first = (round_ * 2 + which) * self.steps
            while self.turns and not self.turn[which].lets_pass((round_ & 1) ^ (which == 0)):
                yield
            for step in range(first, first + self.steps):
                stage = step % self.stages
                while not self.full[stage].lets_pass(step // self.stages & 1):
                    yield
                assert self.content[stage] == step, "another step's tiles are read"
                assert self.landed[stage] == self.copies + self.threads, (
                    "tiles are read before they have come"
                )
                self.readers[stage] += 1
                yield
                if step > first:
                    self._release(step - 1)
            self.turn[1 - which].arrive()
            yield
            self._release(first + self.steps - 1)
            for _ in range(self.rng.randrange(12)):  # the epilogue
                yield
            self.done.append(tile)

    def _release(self, step):
        stage = step % self.stages
        self.readers[stage] -= 1
        self.empty[stage].arrive()

    def run(self):
        """All tiles; fails on a race, and where nothing moves any more."""
        live, idle = [self.producer(), self.consumer(0), self.consumer(1)], 0
        while live:
            if self.flying and self.rng.random() < 0.4:
                stage, land = self.flying.pop(self.rng.randrange(len(self.flying)))
                self.landed[stage] += 1
                land()
                idle = 0
                continue
            before = [(b.phase, b.pending, b.bytes) for b in (*self.full, *self.empty, *self.turn)]
            task = self.rng.choice(live)
            if next(task, self) is self:
                live.remove(task)
            after = [(b.phase, b.pending, b.bytes) for b in (*self.full, *self.empty, *self.turn)]
            idle = idle + 1 if before == after else 0
            assert idle < 5000, "nothing moves"
        assert sorted(self.done) == list(range(self.tiles))
