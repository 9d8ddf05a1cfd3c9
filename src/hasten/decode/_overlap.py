"""A draft (`_ahead.py`) in a process of its own, which works while the target does.

Small models are bound by Python's interpreter, which one process holds once: threads would take turns. So a fresh
interpreter is started (no fork: torch's threads do not survive one, and the person's script is not run again), gets the
draft once, and then per call the prompt and per round what became of the candidates. Tokens come back as a message; the
distributions they were drawn from lie in memory that both processes map. The process ends with its model's undo, with
the model, and with the interpreter; an interpreter that is killed takes it along, as its end of the line closes.
"""

import contextlib
import io
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import HastenError
from hasten.decode._ahead import Ahead, Heard, Order

PATIENCE = 300.0
"""Seconds after which a process that is alive and does not answer is given up."""


class Unsendable(HastenError):
    """A draft, or a request, that can't be handed to another process."""


class Worker:
    """The process with the draft; also the draft of the call that has it open, with `Ahead`'s verbs."""

    def __init__(self, draft: nn.Module) -> None:
        from multiprocessing.connection import Connection

        weights, mark = _pickled(draft), mark_of(draft)
        ours, theirs = socket.socketpair()
        self.memory, self.map, self.floats = _memory(), torch.empty(0), 0
        line = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            f"sys.path[:] = {[str(place) for place in sys.path]!r}; from hasten.decode._overlap import serve; "
            f"serve({theirs.fileno()}, {self.memory}, {os.getpid()})"
        )
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", line],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self.memory),
            env=os.environ | one,
        )
        theirs.close()
        self.line = Connection(ours.detach())
        self.stop = weakref.finalize(self, _end, self.process, self.line, self.memory, os.getpid())
        self.session = self.round = self.passes = 0
        self.busy = False
        try:
            self._receive()
            self._load(weights, mark)
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return self.stop.alive

    def refresh(self, draft: nn.Module) -> None:
        """Sends the draft again if its weights changed."""
        mark = mark_of(draft)
        if mark != self.mark:
            self._load(_pickled(draft), mark)

    def _load(self, weights: bytes, mark: Any) -> None:
        self.mark = None
        self._ask("load", 0, weights)
        self.mark = mark

    def open(self, order: Order) -> None:
        """Begins a call.

        Raises:
            Unsendable: its logits processors can't be pickled, or not be found in another process.
        """
        try:
            packed = pickle.dumps(order)
        except Exception as problem:
            raise Unsendable(f"its logits processors can't be sent to another process ({problem})") from None
        floats = 2 * order.most * len(order.ids) * order.words if order.sampled else 0
        if floats > self.floats:
            self.map, self.floats = _mapped(self.memory, floats), floats
        self.session, self.round, self.passes = self.session + 1, 0, 0
        self.sampled, self.count, self.width, self.words = order.sampled, 0, len(order.ids), order.words
        self._ask("open", self.session, packed, floats)
        self.busy = True

    def order(self, heard: Heard | None, going: list[int] | None, count: int) -> None:
        self.round, self.count = self.round + 1, count
        self.width = self.width if going is None else len(going)
        self._send(("drafts", self.session, self.round, heard, going, count))

    def collect(self) -> tuple[list[list[int]], Tensor | None]:
        made, self.passes = self._answer_to("drafts", self.session, self.round)
        return made, self._half(self.round).transpose(0, 1) if self.sampled else None

    def close(self) -> None:
        self.busy = False
        if self.alive:
            with contextlib.suppress(HastenError):  # the next call starts another
                self._send(("close", self.session))

    def _half(self, turn: int) -> Tensor:
        """q of a round, [count, B, V]: two rounds' lie side by side, as one is judged while the next is drafted."""
        return _part(self.map, turn, self.count, self.width, self.words)

    def _ask(self, kind: str, session: int, packed: bytes, *more: Any) -> None:
        self._send((kind, session, packed, *more))
        (problem,) = self._answer_to(kind, session)
        if problem:
            raise Unsendable(problem)

    def _send(self, message: tuple[Any, ...]) -> None:
        self._guarded(self.line.send_bytes, pickle.dumps(message))

    def _answer_to(self, *question: Any) -> Any:
        """The reply to a question; those that come before it are of calls that were broken off."""
        size = len(question)
        reply = self._receive()
        while reply[:size] != question:
            reply = self._receive()
        return reply[size:]

    def _receive(self) -> Any:
        if not self._guarded(self.line.poll, PATIENCE):
            self.stop()
            raise HastenError(
                f"the drafting process has not answered for {PATIENCE:.0f} seconds and was ended: generate again, or "
                "set overlap=false"
            )
        reply = pickle.loads(self._guarded(self.line.recv_bytes))
        if reply[0] == "failed":
            self.stop()
            raise HastenError(f"the draft failed in its process: {reply[1]}")
        return reply

    def _guarded(self, act: Any, *given: Any) -> Any:
        """One act on the line; whatever breaks it off ends the process, as half a message would be left behind."""
        try:
            return act(*given)
        except (EOFError, OSError):
            self.stop()
            raise HastenError(
                f"the drafting process has ended (exit code {self.process.returncode}), perhaps for want of memory: "
                "generate again, which starts another, or set overlap=false"
            ) from None
        except BaseException:
            self.stop()
            raise


def _end(process: Any, line: Any, memory: int, owner: int) -> None:
    """Ends a process and waits for it; a forked copy of the interpreter leaves it alone."""
    line.close()
    os.close(memory)
    if os.getpid() == owner:
        process.kill()
        process.wait()


_workers: "weakref.WeakKeyDictionary[nn.Module, Worker | str]" = weakref.WeakKeyDictionary()


def worker_of(drafter: Any) -> Worker | str:
    """The process of this model's drafter, started if there is none; or why there can't be one.

    Args:
        drafter: the model's own (`_loop.Drafter`): two models never share a process, even where they share a draft.

    Raises:
        HastenError: the process could not start.
    """
    found = _workers.get(drafter)
    if isinstance(found, str):
        return found
    if found is not None and found.busy and found.alive:
        return "its drafting process serves another call at this moment"
    made: Worker | str | None = _hindrance(drafter.model)
    if made is None:
        try:
            made = found if found is not None and found.alive else Worker(drafter.model)
            made.refresh(drafter.model)
        except Unsendable as problem:
            release(drafter)
            made = str(problem)
    _workers[drafter] = made
    return made


def release(drafter: Any) -> None:
    """Ends the process of this drafter, if there is one."""
    found = _workers.pop(drafter, None)
    if isinstance(found, Worker):
        found.stop()


def cores() -> float:
    """Cores that this process may use: its affinity and the container's quota."""
    found = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return found
    return found if quota == "max" else min(found, int(quota) / int(period))


def mark_of(draft: nn.Module) -> list[tuple[int, int]]:
    """What changes when a weight does."""
    tensors = [*draft.parameters(), *draft.buffers()]
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]


def _hindrance(draft: nn.Module) -> str | None:
    kind = next(draft.parameters()).device.type
    if os.name != "posix":
        return "a process beside this one needs a POSIX system"
    if kind != "cpu":
        return f"the models are on {kind}, which two processes would take turns on"
    if cores() < 2:
        return "there is one core only"
    return None


def _pickled(draft: nn.Module) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(draft, file)
    except Exception as problem:
        raise Unsendable(f"the draft can't be sent to another process ({problem})") from None
    return file.getvalue()


def _memory() -> int:
    """A file without a name, for both processes to map; it is gone with the last of them."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("hasten")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(memory: int, floats: int) -> Tensor:
    import mmap

    if os.fstat(memory).st_size < 4 * floats:
        os.ftruncate(memory, 4 * floats)
    return torch.frombuffer(mmap.mmap(memory, 4 * floats), dtype=torch.float32)


def _part(memory: Tensor, turn: int, count: int, rows: int, words: int) -> Tensor:
    half, size = len(memory) // 2, count * rows * words
    start = turn % 2 * half
    return memory[start : start + size].view(count, rows, words)


def serve(end: int, memory: int, parent: int) -> None:
    """The process: answers until the line closes."""
    from multiprocessing.connection import Connection

    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    line = Connection(end)
    line.send_bytes(pickle.dumps(("ready",)))
    try:
        with torch.inference_mode():
            _answer(line, memory)
    except (EOFError, OSError):
        os._exit(0)
    except BaseException as problem:
        traceback.print_exc()
        line.send_bytes(pickle.dumps(("failed", f"{type(problem).__name__}: {problem}")))


def _answer(line: Any, memory: int) -> None:
    model: Any = None
    ahead: Ahead | None = None
    floats = torch.empty(0)
    rows = words = 0
    while True:
        kind, session, *given = pickle.loads(line.recv_bytes())
        problem = ""
        if kind == "load":
            try:
                model = torch.load(io.BytesIO(given[0]), weights_only=False)
            except Exception as failure:
                problem = f"the draft can't be rebuilt in another process ({failure})"
            reply: tuple[Any, ...] = (problem,)
        elif kind == "open":
            try:
                order = pickle.loads(given[0])
            except Exception as failure:
                problem = f"its logits processors can't be sent to another process ({failure})"
            else:
                floats = _mapped(memory, given[1]) if given[1] > len(floats) else floats
                ahead, rows, words = Ahead(model, order), len(order.ids), order.words
            reply = (problem,)
        elif kind == "drafts" and ahead is not None:
            turn, heard, going, count = given
            rows = rows if going is None else len(going)
            out = _part(floats, turn, count, rows, words) if ahead.scores.sampled else None
            ahead.order(heard, going, count, out)
            reply = (turn, ahead.made, ahead.passes)
        else:
            ahead = None
            continue
        line.send_bytes(pickle.dumps((kind, session, *reply)))


def _leave_with(parent: int) -> None:
    """Ends this process with the interpreter that started it, should a fork of that one keep the line open."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
