"""One worker thread that decodes the requests that wait: those of equal choices together, each answered as soon as its row is done.

A model belongs to one thread; everything else runs in the event loop. Entry points: `Batcher`, `Ticket`.
"""

import asyncio
import logging
import threading
import traceback
from collections import Counter, deque

from hildalib.engine import Answer, Choices, Engine
from hildalib.serving.guard import Refused

LOG = logging.getLogger("hildalib.serving")


class Ticket:
    """A request in the queue or in a batch. mail: its `Step`s, if asked for, and its `Answer`, or the exception of what went wrong, last."""

    def __init__(self, ids: list[int], choices: Choices, stops: tuple[str, ...], steps: bool):
        self.ids, self.choices, self.stops, self.steps = ids, choices, stops, steps
        self.gone, self.loop, self.mail = False, asyncio.get_running_loop(), asyncio.Queue()

    def put(self, event) -> None:
        """Called by the worker. A loop that has ended wants no mail."""
        try:
            self.loop.call_soon_threadsafe(self.mail.put_nowait, event)
        except RuntimeError:
            self.gone = True


class Batcher:
    """Queue and worker of one engine. limit: requests that may wait; most: rows of a batch."""

    def __init__(self, engine: Engine, limit: int, most: int):
        self.engine, self.limit, self.most = engine, limit, most if engine.batches else 1
        self.waiting: deque[Ticket] = deque()
        self.ready, self.stopped, self.running, self.counts = threading.Condition(), False, 0, Counter()
        self.worker = threading.Thread(target=self._work, name="hilda-decoder", daemon=True)
        self.worker.start()

    def submit(self, ids: list[int], choices: Choices, stops: tuple[str, ...] = (), steps: bool = False) -> Ticket:
        """Queues a prompt that the engine's `check` has passed; Refused (429) where the queue is full."""
        ticket = Ticket(ids, choices, stops, steps)
        with self.ready:
            if self.stopped:
                raise Refused(503, "the server is shutting down", "shutting_down")
            if len(self.waiting) >= self.limit:
                self.counts["refused"] += 1
                raise Refused(429, f"{self.limit} requests are waiting already; try again in a moment", "queue_full")
            self.waiting.append(ticket)
            self.ready.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for the answer: the ticket leaves the queue, or its row the batch before the next forward. Harmless where it is answered."""
        ticket.gone = True
        with self.ready:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self.counts["cancelled"] += 1

    def stop(self) -> None:
        """Ends the worker after the forward it is in; who still waits is told."""
        with self.ready:
            self.stopped = True
            left, self.waiting = list(self.waiting), deque()
            self.ready.notify()
        for ticket in left:
            ticket.put(Refused(503, "the server is shutting down", "shutting_down"))
        self.worker.join(timeout=10)

    def _take(self) -> list[Ticket]:
        """The ticket that has waited longest and, in their order, those that can share its batch; [] when stopped."""
        with self.ready:
            self.ready.wait_for(lambda: self.waiting or self.stopped)
            if self.stopped:
                return []
            first = self.waiting[0]
            shared = first.choices.together()
            alike = [ticket for ticket in self.waiting if ticket is first or shared and ticket.choices.together() == shared][:self.most]
            self.waiting = deque(ticket for ticket in self.waiting if ticket not in alike)
            self.running = len(alike)
            return alike

    def _work(self) -> None:
        while batch := self._take():
            self._decode(batch)
            self.running = 0

    def _decode(self, batch: list[Ticket]) -> None:
        answered, failed = set(), None
        self.counts["batches"] += 1
        self.counts["rows"] += len(batch)
        try:
            stream = self.engine.stream([ticket.ids for ticket in batch], batch[0].choices, [ticket.stops for ticket in batch],
                                        steps=any(ticket.steps for ticket in batch), gone=lambda row: batch[row].gone or self.stopped)
            for row, event in stream:
                if isinstance(event, Answer):
                    answered.add(row)
                    self.counts["answers"] += 1
                if isinstance(event, Answer) or batch[row].steps:
                    batch[row].put(event)
        except Exception as error:  # what breaks the decoder must not end the server
            LOG.error("a batch of %d failed:\n%s", len(batch), traceback.format_exc())  # as text: a record would keep the frames
            failed = error.with_traceback(None)  # whose frames hold the batch's cache: the others need its room
        left = [ticket for row, ticket in enumerate(batch) if row not in answered]
        if failed:
            for ticket in left:
                if len(batch) > 1 and not ticket.steps:  # one bad request, or too many for the memory, should not take the others along
                    self._decode([ticket])
                else:
                    ticket.put(failed)
            return
        for ticket in left:
            self.counts["cancelled"] += 1
            ticket.put(Refused(503, "the server is shutting down", "shutting_down"))  # one that is gone reads no mail
