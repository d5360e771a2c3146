"""Who runs a call: the registry of backends, the caller's preference, the choice and its reasons."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from flashlla.backends.base import Backend
from flashlla.backends.chunked import Chunked
from flashlla.backends.naive import Naive
from flashlla.backends.triton import Triton, TritonPCG
from flashlla.hints import with_hints
from flashlla.notices import FallbackWarning, warn_once
from flashlla.problem import Problem

ENVIRONMENT_VARIABLE = "FLASHLLA_BACKEND"
AUTO = "auto"

_backends: list[Backend] = []  # in the order that "auto" tries them
_numbered: list[Backend] = []  # in the order of registration, which never changes
_preference: ContextVar[str | None] = ContextVar("flashlla_backend", default=None)
# What each block that is open in this thread and task has replaced, the innermost last.
_outer: ContextVar[tuple[str | None, ...]] = ContextVar("flashlla_outer_backends", default=())
_lock = Lock()
P = ParamSpec("P")
T = TypeVar("T")


class UnsupportedError(RuntimeError):
    """No backend that was allowed to can run the call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and what each backend says.

    ``backend`` is the name of the choice, None where the call would be refused; ``reasons`` maps every backend's name
    to why it cannot take the call, or None where it can; ``asked`` is who asked for what. Prints as a short table.
    """

    backend: str | None
    reasons: dict[str, str | None]
    asked: str

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        if self.backend is not None:
            verdict = f"; runs on {self.backend}"
        else:
            verdict = " cannot run this call:" if self.asked.startswith("backend=") else "; none can run this call:"
        lines = [f"flashlla: {self.asked}{verdict}"]
        lines += [f"  {name:<{width}}  {reason or 'can'}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@with_hints()
def register_backend(backend: Backend, *, before: str | None = None, overwrite: bool = False) -> None:
    """Make a backend known under its ``name``.

    Args:
        backend: the object; see :class:`flashlla.Backend`.
        before: the name of a backend that "auto" shall try only after this one. Default None: tried last.
        overwrite: take the place of the backend that has the name, if there is one: of all calls from here on, and of
            the backward passes of earlier ones. Default False: a name that is taken is an error.

    Raises:
        TypeError: not a :class:`flashlla.Backend`.
        ValueError: the name is empty or taken, or ``before`` is not known.

    Example:
        >>> import flashlla
        >>> from flashlla.backends.chunked import Chunked
        >>> class Mine(Chunked):
        ...     name = "mine"
        >>> flashlla.register_backend(Mine())
        >>> "mine" in flashlla.available_backends()
        True
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: got {type(backend).__name__}, wanted a flashlla.Backend object")
    name = getattr(backend, "name", None)
    if not isinstance(name, str):
        raise TypeError(f"backend: {type(backend).__name__}.name is {name!r}, wanted a string")
    with _lock:
        names = [b.name for b in _backends]
        if not backend.name or backend.name == AUTO or (backend.name in names and not overwrite):
            raise ValueError(
                f"backend: got the name {backend.name!r}, wanted a new one (taken: {', '.join(names)}); overwrite=True "
                f"replaces a backend"
            )
        others = [name for name in names if name != backend.name]
        if before is not None:
            index = others.index(_known(before, "before", others))
        else:
            index = names.index(backend.name) if backend.name in names else len(names)
        kept = [b for b in _backends if b.name != backend.name]
        _backends[:] = [*kept[:index], backend, *kept[index:]]  # at once: others read without the lock
        _numbered.append(backend)


def _known(name: str, argument: str, allowed: list[str]) -> str:
    if name in allowed:
        return name
    close = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{argument}: got {name!r}{hint}, wanted one of {', '.join(allowed)}")


def check_name(name: str, argument: str) -> str:
    """``name``, if it is a backend's or "auto"."""
    return _known(name, argument, [AUTO, *(b.name for b in _backends)])


def backend_named(name: str) -> Backend:
    return next(b for b in _backends if b.name == name)


def number_of(backend: Backend) -> int:
    """A number for ``backend`` that later registrations do not change."""
    return next(i for i, b in enumerate(_numbered) if b is backend)


def backend_numbered(number: int) -> Backend:
    """The inverse of :func:`number_of`."""
    return _numbered[number]


def all_backends() -> tuple[Backend, ...]:
    """Every registered backend, in the order that "auto" tries them."""
    return tuple(_backends)


@with_hints()
def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, in the order that "auto" tries them.

    Example:
        >>> import flashlla
        >>> flashlla.available_backends()[-2:]
        ('chunked', 'naive')
    """
    return tuple(b.name for b in _backends if b.unavailable() is None)


@with_hints()
def get_backend() -> str:
    """The name in force here: that of :class:`set_backend`, else of FLASHLLA_BACKEND, else "auto".

    Raises:
        ValueError: FLASHLLA_BACKEND holds a name that is not known.

    Example:
        >>> import flashlla
        >>> with flashlla.set_backend("naive"):
        ...     flashlla.get_backend()
        'naive'
    """
    return _preferred()[0]


def _preferred() -> tuple[str, str]:
    """The preferred name, and who asked for it."""
    if (name := _preference.get()) is not None:
        return name, f"set_backend({name!r})"
    if name := os.environ.get(ENVIRONMENT_VARIABLE):
        return check_name(name, ENVIRONMENT_VARIABLE), f"{ENVIRONMENT_VARIABLE}={name}"
    return AUTO, "no backend asked for"


@with_hints()
class set_backend:
    """Prefer a backend from here on, within a ``with`` block, or in a function that it decorates.

    Works as ``torch.set_grad_enabled`` does: the call takes effect at once, a ``with`` block restores what was before,
    and a decorated function runs each time in a block of its own. It holds for the current thread and asyncio task, and
    not for threads started from there; the environment variable FLASHLLA_BACKEND holds for the process. A call that the
    preferred backend cannot run falls back to the next that can, with one warning a reason; ``backend=`` in a call
    demands instead, and raises. Backward passes run on the backend their forward pass ran on. (Under torch.compile on
    what the call demands, else on what is preferred on the thread that runs them: for CUDA tensors one of autograd's,
    which knows of FLASHLLA_BACKEND alone.)

    Args:
        name: a backend's name, or "auto" (triton, then chunked, then naive: the first that can).

    Raises:
        ValueError: the name is not known.

    Example:
        >>> import flashlla
        >>> flashlla.set_backend("auto")
        set_backend('auto')
        >>> with flashlla.set_backend("chunked"):
        ...     flashlla.get_backend()
        'chunked'
        >>> @flashlla.set_backend("naive")
        ... def reference():
        ...     return flashlla.get_backend()
        >>> reference(), flashlla.get_backend()
        ('naive', 'auto')
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name, "name")
        # What the call itself has replaced, until a block or a decorated function takes that upon itself.
        self._replaced: tuple[str | None] | None = (_preference.get(),)
        _preference.set(name)

    def _take_replaced(self) -> str | None:
        before, self._replaced = self._replaced or (_preference.get(),), None
        return before[0]

    def __enter__(self) -> set_backend:
        _outer.set((*_outer.get(), self._take_replaced()))
        _preference.set(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        *outer, before = _outer.get()
        _outer.set(tuple(outer))
        _preference.set(before)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function``, each call of it within a block of its own."""
        _preference.set(self._take_replaced())
        block = functools.partial(set_backend, self.name)
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def later(*arguments: P.args, **keywords: P.kwargs) -> Any:
                with block():
                    return await function(*arguments, **keywords)

            return cast("Callable[P, T]", later)
        if inspect.isgeneratorfunction(function):
            raise TypeError(
                f"set_backend: got the generator function {function.__name__}, which runs between blocks of its "
                f"caller; try a with block in its body"
            )

        @functools.wraps(function)
        def within(*arguments: P.args, **keywords: P.kwargs) -> T:
            with block():
                return function(*arguments, **keywords)

        return within

    def __repr__(self) -> str:
        return f"set_backend({self.name!r})"


def _reason(backend: Backend, problem: Problem) -> str | None:
    """All that keeps ``backend`` from running ``problem``: who mends the first learns of no second one then."""
    reasons = (backend.unavailable(), backend.unsupported(problem))
    return "; ".join(reason for reason in reasons if reason is not None) or None


def explain(problem: Problem, demand: str | None = None) -> Explanation:
    """Which backend would run ``problem``, and every backend's reason; nothing runs."""
    backends = all_backends()
    reasons = {b.name: _reason(b, problem) for b in backends}
    if demand is not None and demand != AUTO:
        name, asked = check_name(demand, "backend"), f"backend={demand!r}"
        return Explanation(name if reasons[name] is None else None, reasons, asked)
    name, asked = (AUTO, "backend='auto'") if demand == AUTO else _preferred()
    if reasons.get(name, "auto is not a backend") is None:
        return Explanation(name, reasons, asked)
    choice = next((b.name for b in backends if reasons[b.name] is None and not b.emulated()), None)
    return Explanation(choice, reasons, asked)


def standing(demand: str | None) -> tuple[str, int]:
    """What :func:`choose` goes by beside the problem: whom it is asked for, and how many were registered until now."""
    return get_backend() if demand is None else demand, len(_numbered)


def choose(problem: Problem, demand: str | None = None) -> Backend:
    """The backend that runs ``problem``: ``demand`` or nothing, else the preference or a fallback with a warning."""
    name = get_backend() if demand is None else demand
    # What nearly all calls come to, without every backend's reason.
    for b in all_backends():
        meant = b.name == name or (name == AUTO and not b.emulated())
        if meant and b.unavailable() is None and b.unsupported(problem) is None:
            return b
    explanation = explain(problem, demand)
    if explanation.backend is None:
        raise UnsupportedError(f"{explanation}\nTry another backend, or none, which takes the first that can.")
    preferred, asked = _preferred()
    why = f"{asked} cannot run this call: {explanation.reasons[preferred]}"
    warn_once(why, f"{why}. It ran on {explanation.backend!r} instead.", FallbackWarning)
    return backend_named(explanation.backend)


for _backend in (Triton(), TritonPCG(), Chunked(), Naive()):
    register_backend(_backend)
