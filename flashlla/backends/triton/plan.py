"""Plans: what a call allocates and launches, written down once for all calls that are alike.

To allocate and slice tensors and to look at every argument of a launch takes the host longer than a short kernel takes
the device, and all of it but the addresses is the same in the next call. So passes are written in terms of `Buffer`, a
tensor that a call will have, and `Plan.run` fills in addresses. Who makes a plan sees layouts and no tensors: what it
depends on is in the arguments of the function that makes it, which is `planned`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from flashlla.backends.base import on
from flashlla.backends.triton import configs, runtime
from flashlla.backends.triton.runtime import Compiled, Kernel, cdiv

# Bytes; as allocators align, so do tensors that share memory.
APART = 512
# Plans kept of each kind. One takes tens of kilobytes: those of lengths that never come again shall not pile up.
PLANS = 512
_makers: list[Any] = []
M = TypeVar("M", bound=Callable[..., Any])


def planned(make: M) -> M:
    """``make``, which makes a plan and keeps it by its arguments."""
    _makers.append(functools.lru_cache(maxsize=PLANS)(make))
    return cast("M", _makers[-1])


def forget() -> None:
    """Every plan: the next call of its kind makes another."""
    for make in _makers:
        make.cache_clear()


class Layout(NamedTuple):
    """What a plan depends on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # at a multiple of 16 bytes


def layouts(tensors: Sequence[Tensor | None]) -> tuple[Layout | None, ...]:
    """Of each tensor; None where there is none."""
    # Not by a call of Layout, which is one in Python.
    make = functools.partial(tuple.__new__, Layout)
    return tuple([None if t is None else make((t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0)) for t in tensors])


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    strides, numbers = [1] * len(shape), 1
    for i in reversed(range(len(shape))):
        strides[i] = numbers
        numbers *= shape[i]
    return Layout(shape, tuple(strides), dtype, aligned=True)


@dataclass(eq=False)
class Buffer:
    """A tensor that a call will have."""

    layout: Layout
    memory: int  # which of the call's tensors it lies in
    offset: int | None = None  # bytes; None: it is that tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def stride(self) -> tuple[int, ...]:
        return self.layout.strides

    def steps(self) -> tuple[int, ...]:
        """The strides, 0 along dimensions of one, whatever they were: no kernel is compiled for that."""
        return tuple([0 if n == 1 else stride for n, stride in zip(self.shape, self.stride())])

    def data_ptr(self) -> int:
        """An address of no memory: all that Triton compiles for is whether it is aligned."""
        return 0 if self.layout.aligned else 1

    def tensor(self, memories: Sequence[Tensor | None]) -> Tensor:
        memory = memories[self.memory]
        assert memory is not None
        if self.offset is None:
            return memory
        return memory.view(self.dtype).as_strided(self.shape, self.stride(), self.offset // self.dtype.itemsize)


def of_buffers(kind: type[Any], *members: Any, **fields: Any) -> Any:
    """A record of tensors to be, of ``kind``."""
    return kind(*members, **fields)


def of_tensors(x: Any, memories: Sequence[Tensor | None]) -> Any:
    """``x`` with tensors for Buffers."""
    if isinstance(x, Buffer):
        return x.tensor(memories)
    if not _has_buffers(x):
        return x
    members = [of_tensors(member, memories) for member in x]
    return type(x)(*members) if hasattr(x, "_fields") else tuple(members)


def _has_buffers(x: Any) -> bool:
    return isinstance(x, Buffer) or (isinstance(x, tuple) and any(map(_has_buffers, x)))


@dataclass(eq=False)
class Memory:
    """One allocation: of an ``output``, or of ``size`` bytes that tensors share."""

    index: int
    fill: int | None  # None: nothing
    output: Layout | None = None
    size: int = 0

    def layout(self) -> Layout:
        return self.output or contiguous((self.size,), torch.uint8)


class Running(NamedTuple):
    """A call under way."""

    memories: list[Tensor | None]  # what the caller gave, then allocations; None: not given, or dropped
    values: list[Any]  # constants, addresses and records of both: launches pick their arguments from these
    stream: int | None  # None: launches go Triton's way


@dataclass(eq=False)
class Launch:
    """Of ``kernel``, for the pass ``name``. Arguments are Buffers, constants and records of both."""

    kernel: Kernel
    name: str
    grid: tuple[int, int, int]
    device: torch.device
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    seat: int  # of the arguments in `Running.values`
    compiled: Compiled | None = None

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Of what it compiles to."""
        return id(self.kernel), self.device, tuple(self.settings.items()), kinds(self.arguments)

    def compile(self) -> Future[Compiled | None]:
        """Begin to, on another thread, unless that was done before."""
        return runtime.compiling(self.key, self.kernel, self.device, self.arguments, self.settings)

    def run(self, call: Running) -> None:
        try:
            made = self.compiled
            if made is None:
                made = self.compiled = self.compile().result()
            if made is None:
                self.kernel[self.grid](*of_tensors(self.arguments, call.memories), **self.settings)
            elif call.stream is None:
                made.launch(self.grid, call.values[self.seat])
            else:  # not by a method of its own: every call in Python shows in a call's time
                made.run(*self.grid, call.stream, *made.head, *call.values[self.seat], *made.parameters)
        except Exception as error:
            runtime.compiled.pop(self.key, None)  # the next call tries again
            raise runtime.failed(self.kernel, self.name, self.device, self.arguments, self.settings) from error


def kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a kernel's arguments all that Triton compiles for: None or not, dtypes and whether pointers are aligned, and
    of integers whether they are 1, multiples of 16 and of 32 bits."""
    return tuple([
        (x == 1, x % 16 == 0, x.bit_length() < 32) if type(x) is int
        else type(x) if x is None or type(x) is float
        else kinds(x) if isinstance(x, tuple)
        else (x.dtype, x.layout.aligned)
        for x in arguments
    ])  # fmt: skip


def whole(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """``grid`` in all dimensions."""
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


@dataclass(eq=False)
class Tuned:
    """The fastest of ``launches``, found once for each ``key``."""

    key: tuple[Any, ...]
    launches: dict[configs.Config, Launch]

    def compile(self) -> None:
        found = runtime.tuned.get(self.key)
        for launch in self.launches.values() if found is None else [self.launches[found]]:
            launch.compile()

    def run(self, call: Running) -> None:
        if self.key not in runtime.tuned:
            runtime.tuned[self.key] = runtime.fastest(list(self.launches), lambda c: self.launches[c].run(call))
        self.launches[runtime.tuned[self.key]].run(call)


@dataclass(eq=False)
class Compute:
    """Of torch's own operators: ``function(*buffers)``, which writes to the first."""

    function: Callable[..., Any]
    buffers: tuple[Buffer | None, ...]

    def compile(self) -> None:
        """Nothing: torch has it."""

    def run(self, call: Running) -> None:
        self.function(*of_tensors(self.buffers, call.memories))


@dataclass(eq=False)
class Stage:
    """Allocations, then steps, then what nobody needs any more. In between what these steps are the first to take from
    `Running.values`: by its seat there an address, of which memory and with what offset, or what makes a record."""

    memories: list[Memory] = field(default_factory=list)
    allocations: list[tuple[Any, ...]] = field(default_factory=list)  # of these shape, strides, dtype and filling
    addresses: list[tuple[int, int, int]] = field(default_factory=list)
    records: list[tuple[int, Callable[[list[Any]], Any]]] = field(default_factory=list)
    steps: list[Launch | Tuned | Compute] = field(default_factory=list)
    dropped: list[Memory] = field(default_factory=list)


class Plan:
    """``given``: layouts of the tensors that `run` is called with."""

    def __init__(self, device: torch.device, given: Sequence[Layout | None]) -> None:
        self.device = device
        self.given = [None if layout is None else Buffer(layout, i) for i, layout in enumerate(given)]
        self.stages = [Stage()]
        self.values: list[Any] = []  # `Running.values` with no address in it
        self.outputs: list[Buffer] = []
        self.compiles = False  # whether `compile` was called
        self._allocated = len(given)
        self._seats: dict[int, int] = {}  # by id, since 1 is True

    def memory(self, fill: int | None = None, output: Layout | None = None) -> Memory:
        """An allocation at the beginning of this stage."""
        found = Memory(self._allocated, fill, output)
        self._allocated += 1
        self.stages[-1].memories.append(found)
        return found

    def scratch(self, memory: Memory, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """A contiguous tensor in ``memory``."""
        found = Buffer(contiguous(shape, dtype), memory.index, memory.size)
        memory.size += cdiv(math.prod(shape) * dtype.itemsize, APART) * APART
        return found

    def output(self, layout: Layout, fill: int | None = None) -> Buffer:
        """A tensor by itself, which `run` may return."""
        return Buffer(layout, self.memory(fill, layout).index)

    def launch(self, kernel: Kernel, name: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        seat = self._seat(arguments)
        self.stages[-1].steps.append(Launch(kernel, name, whole(grid), self.device, arguments, settings, seat))

    def launch_fastest(
        self, key: tuple[Any, ...], kernel: Kernel, name: str, grids: dict[configs.Config, tuple[int, ...]],
        *arguments: Any, **settings: Any,
    ) -> None:  # fmt: skip
        """With one of the configs; of several with that which `Tuned` finds."""
        seat = self._seat(arguments)
        launches = {
            c: Launch(kernel, name, whole(grid), self.device, arguments, {**settings, **c.options()}, seat)
            for c, grid in grids.items()
        }
        self.stages[-1].steps.append(Tuned(key, launches) if len(launches) > 1 else launches.popitem()[1])

    def compute(self, function: Callable[..., Any], *buffers: Buffer | None) -> None:
        self.stages[-1].steps.append(Compute(function, buffers))

    def drop(self, *memories: Memory) -> None:
        """Nothing from here on needs them: the next stage."""
        self.stages[-1].dropped += memories
        self.stages.append(Stage())

    def _seat(self, record: tuple[Any, ...]) -> int:
        """Of ``record``, the arguments of a launch or one of them, in `Running.values`."""
        values, seats, stage, members = self.values, self._seats, self.stages[-1], []
        for x in record:
            if (seat := seats.get(id(x))) is None:
                if isinstance(x, tuple):
                    seat = self._seat(x)
                else:
                    seat = seats[id(x)] = len(values)
                    values.append(x)
                    if type(x) is Buffer:
                        stage.addresses.append((seat, x.memory, x.offset or 0))
            members.append(seat)
        assert len(members) > 1  # of one, itemgetter gives no tuple
        seats[id(record)] = len(values)
        stage.records.append((len(values), operator.itemgetter(*members)))
        values.append(record)
        return seats[id(record)]

    def finished(self, outputs: Sequence[Buffer]) -> Plan:
        """This plan, once all of it is written down: `run` returns ``outputs``."""
        self.outputs = list(outputs)
        for stage in self.stages:
            for memory in stage.memories:
                shape, strides, dtype, _ = memory.layout()
                stage.allocations.append((tuple(shape), tuple(strides), dtype, memory.fill))
        return self

    def compile(self) -> None:
        """Begin to compile, side by side, what its calls launch; each launch waits for its own kernel."""
        self.compiles = True
        steps = [step for stage in self.stages for step in stage.steps]
        for step in sorted(steps, key=lambda step: runtime.turn(getattr(step, "kernel", None))):
            step.compile()

    def run(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """The outputs. Nothing here waits for the device."""
        if not self.compiles:
            self.compile()
        device, allocate = self.device, runtime.allocator(self.device)
        with on(device):
            memories: list[Any] = list(given)
            values = list(self.values)
            call = Running(memories, values, runtime.stream(device))
            addresses = [0 if t is None else t.data_ptr() for t in given]
            for stage in self.stages:
                for shape, strides, dtype, fill in stage.allocations:
                    t = allocate(shape, strides, dtype)
                    if fill is not None:
                        t.fill_(fill)
                    memories.append(t)
                    addresses.append(t.data_ptr())
                for seat, memory, offset in stage.addresses:
                    values[seat] = addresses[memory] + offset
                for seat, record in stage.records:
                    values[seat] = record(values)
                for step in stage.steps:
                    step.run(call)
                for allocation in stage.dropped:
                    memories[allocation.index] = None
            return [memories[output.memory] for output in self.outputs]
