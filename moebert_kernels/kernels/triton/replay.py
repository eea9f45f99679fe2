"""A call whose shapes come again: its launches are known, and only addresses are filled in.

What a pass allocates and launches follows from shapes, dtypes and options alone, and finding it out anew
takes several times as long as launching it. So the second time that a combination comes, the pass is recorded
and a `Plan` made of the record: the same launches, with addresses of the call at hand. A pass must do nothing
but allocate, view and launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack, to_dlpack
from triton.runtime import JITFunction

from moebert_kernels.addresses import addresses_of
from moebert_kernels.kernels.triton import configs, direct, launch
from moebert_kernels.kernels.triton.rows import sum_slots_kernel

Results = Sequence[Tensor | None]
Pass = Callable[[Sequence[Tensor | None], tuple[Any, ...]], Results]

# Beyond these the device takes longer than the host, and what a pass frees as it goes along may matter.
_MOST_TOKENS = 32768
_MOST_PLACES = 256  # of which a descriptor's tensor maps are kept
_INTERPRETED = not isinstance(sum_slots_kernel, JITFunction)


def repeated(
    pass_: Pass,
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...],
    plans: dict[Hashable, Any],
) -> Results:
    """`pass_(tensors, options)`: a function of a module, x_TD first, hashable options.

    `plans` are those of tensors of the same shapes, dtypes and device.
    """
    x_TD: Any = tensors[0]
    if _INTERPRETED or launch.is_recording():
        return pass_(tensors, options)
    if x_TD.is_cuda and x_TD.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x_TD.device):
            return repeated(pass_, tensors, options, plans)
    # Loads of single elements would take more registers than there are: no kernel is compiled for them.
    tensors, addresses = addresses_of(tensors, alignment=16)
    if not 0 < x_TD.shape[0] <= _MOST_TOKENS or direct.hooked():
        return pass_(tensors, options)
    key = (pass_, options, configs.arithmetic(x_TD.dtype))
    if key not in plans:
        plans[key] = None
        return pass_(tensors, options)
    plan = plans[key]
    if plan is None:
        plan = plans[key] = Plan(pass_, tensors, options)
    return plan.run(addresses) if plan.whole else pass_(tensors, options)


class Plan:
    """What a pass does, in terms of one list of values that its launches pick their arguments from.

    First come the addresses of arguments, results and the workspace, the stream, then `rest`.

    Attributes:
        forms: of the results, and of the workspace for all else that the pass allocates: tensors without
            memory, or None.
        rest: constants, and gaps.
        behind: places behind others: (which gap, which value, how far).
        maps: tensor maps: (which gap, of which value, how to make one, those made by address).
        steps: launches: (C function, what it picks).
        whole: whether these are all; not where only Triton can start one of them.
    """

    def __init__(self, pass_: Pass, tensors: Sequence[Tensor | None], options: tuple[Any, ...]):
        stand_ins = [None if t is None else _apart(t) for t in tensors]
        with launch.recorded() as launches, _OnlyAllocates():
            results = pass_(stand_ins, options)
        x_TD: Any = tensors[0]
        self.device = x_TD.get_device()
        self.rest: list[Any] = []
        self.behind: list[tuple[int, int, int]] = []
        self.maps: list[tuple[int, int, Callable[[int], Any], dict[int, Any]]] = []
        bases = [*stand_ins, *results]
        self._workspace, self._workspace_bytes = len(bases), 0
        self._constants: dict[int, int] = {}
        # A storage is one object as long as something refers to it, as `_owners` does.
        self._owners = {t.untyped_storage(): (i, 0) for i, t in enumerate(bases) if t is not None}
        if len(self._owners) < sum(t is not None for t in bases) or not all(map(_fills_its_memory, results)):
            raise AssertionError("a result of a pass shares memory")
        entries = [direct.entry(*each) for each in launches]
        self.whole = None not in entries
        self.steps = [self._step(each, entry) for each, entry in zip(launches, entries, strict=True) if entry]
        size = self._workspace_bytes
        self.forms = [*results, x_TD.new_empty(size, dtype=torch.uint8) if size else None]
        for form in self.forms:
            if form is not None:
                form.untyped_storage().resize_(0)
        del self._owners, self._constants  # the former holds on to the memory of arguments

    def run(self, values: list[Any]) -> Results:
        """The pass on the tensors at the addresses `values`, on their device, which must be current."""
        # The workspace, last, is freed on return, and safely: it goes to later work of the same stream.
        made = [None if form is None else torch.empty_like(form) for form in self.forms]
        values += [0 if t is None else t.data_ptr() for t in made]
        values.append(direct.current_stream(self.device))
        values += self.rest
        for gap, value, offset in self.behind:
            values[gap] = values[value] + offset
        for gap, value, make, known in self.maps:
            address = values[value]
            tensor_map = known.get(address)
            if tensor_map is None:
                if len(known) >= _MOST_PLACES:
                    known.clear()
                tensor_map = known[address] = make(address)
            values[gap] = tensor_map
        for function, pick in self.steps:
            function(*pick(values))
        return made[:-1]

    def _step(self, launched: launch.Launch, entry: direct.Entry) -> tuple[Callable[..., None], itemgetter]:
        picked = [self._constant(side) for side in (*launched.grid, 1, 1)[:3]]
        picked += [self._workspace + 1, *map(self._constant, entry.fixed)]
        hows = iter(entry.hows)
        for parameter in launched.kernel.params:
            value: Any = None if parameter.is_constexpr else launched.arguments[parameter.name]
            if hasattr(value, "block_shape"):  # a descriptor, Triton's or Gluon's
                gap = self._gap()
                make = partial(direct.tensor_map, value.shape, value.strides, next(hows))
                self.maps.append((gap, self._place(value.base), make, {}))
                picked += [gap, *map(self._constant, (*value.shape, *value.strides))]
            else:
                picked.append(self._place(value) if isinstance(value, Tensor) else self._constant(value))
        return entry.function, itemgetter(*picked)

    def _gap(self) -> int:
        self.rest.append(None)
        return self._workspace + 1 + len(self.rest)

    def _constant(self, value: Any) -> int:
        if id(value) not in self._constants:
            self._constants[id(value)] = gap = self._gap()
            self.rest[gap - self._workspace - 2] = value
        return self._constants[id(value)]

    def _place(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._owners:
            self._owners[storage] = self._workspace, self._workspace_bytes
            self._workspace_bytes += -(-storage.nbytes() // 256) * 256
        value, offset = self._owners[storage]
        offset += int(tensor.storage_offset()) * tensor.element_size()
        if offset == 0:
            return value
        gap = self._gap()
        self.behind.append((gap, value, offset))
        return gap


def _apart(tensor: Tensor) -> Tensor:
    """The same tensor with a storage of its own, which tells arguments apart that share memory."""
    again = from_dlpack(to_dlpack(tensor.detach()))
    return again.as_strided(tensor.shape, tensor.stride())  # the format has others where there is but one row


def _fills_its_memory(result: Tensor | None) -> bool:
    if result is None:
        return True
    return result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes


class _OnlyAllocates(TorchDispatchMode):
    """Refuses what computes outside of kernels: it would be done when a pass is recorded, and never again."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not ("empty" in func.name() or func.is_view):
            raise AssertionError(f"a pass does {func.name()} outside of its kernels")
        return func(*args, **(kwargs or {}))
