"""Modeling: LoRA on a frozen model inside a `with` block: per sample through hooks, or one adapter in the weights."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle

from .lora import LoraWeights
from .targets import LoraTargets


@contextmanager
def inject_lora(
    vlm: nn.Module,
    targets: LoraTargets,
    weights: LoraWeights,
    queries_per_adapter: int | Sequence[int] = 1,
) -> Iterator[None]:
    """Run `vlm` with an adapter of its own for each row of the batch, inside a `with` block.

    Forward hooks add `scaling * lora_B^T (lora_A x)` to the target modules' outputs; no weight is copied or changed,
    gradients flow into `weights`. It acts only in the thread that entered it, so several threads can share one base.
    Blocks inside each other add up, the static part of each included.

    `torch.compile` sees through it: the adapters are inputs of the graph, so others of the same shapes need no new
    one, and a graph without adapters is not taken for one with them. Opened under `torch.no_grad()`, adapters lie
    where the last ones lay, and CUDA graphs need no copy of them. Autocast, if any, goes around the block, not into
    it. While several threads have adapters on, compiled code leaves the graph at every hook.

    Args:
        vlm: the frozen base.
        targets: the modules to adapt, resolved on `vlm`.
        weights: the adapters.
        queries_per_adapter: how many consecutive rows of the batch each adapter answers; one number for all, or one
            each. A single adapter answers every row. Rows multiplied by generation (beams, several sequences a
            prompt) follow their prompt.

    Raises:
        ValueError: the adapters do not fit the targets, or, inside the block, the batch does not fit the adapters.
        RuntimeError: an adapter is merged into these weights: answers would be of both.
    """
    _check_fit(targets, weights)
    modules = {name: [vlm.get_submodule(path) for path in paths] for name, paths in targets.paths.items()}
    if any(id(module.weight) in _merged for several in modules.values() for module in several):
        raise RuntimeError(_MERGED)
    counts = (
        [queries_per_adapter] * len(weights) if isinstance(queries_per_adapter, int) else list(queries_per_adapter)
    )
    if len(counts) != len(weights) or min(counts, default=1) < 1:
        raise ValueError(
            f"queries_per_adapter {counts} must hold a positive number for each of {len(weights)} adapters."
        )
    injection = _Injection(modules, weights, counts)
    try:
        _open.add(injection)
        with _seen_by_compiled_code(injection):
            yield
    finally:
        _open.remove(injection)
        injection.give_back()


@contextmanager
def merge_lora(vlm: nn.Module, targets: LoraTargets, weights: LoraWeights) -> Iterator[None]:
    """Add an adapter to the base's own weights inside a `with` block; afterwards they are bit for bit what they were.

    Nothing is left on the path of a token, and compiled code and CUDA graphs of the base stay valid, for the weights
    stay where they are. Sums are made in float32 and rounded once. All threads see it. It takes memory for a copy of
    the changed weights.

    Args:
        vlm: the base.
        targets: the modules to adapt, resolved on `vlm`.
        weights: a batch of one.

    Raises:
        ValueError: not one adapter, or it does not fit the targets; or the base is quantised, its weights not numbers
            one can add to.
        RuntimeError: an adapter is on these weights already, merged or, in any thread, injected. Two would count the
            static part twice, and two threads that leave in the order they came would give back each other's weights.
    """
    _check_fit(targets, weights)
    if len(weights) != 1:
        raise ValueError(f"expected one adapter to merge, got {len(weights)}: weights hold one at a time.")
    modules = [vlm.get_submodule(path) for paths in targets.paths.values() for path in paths]
    changed = {id(module.weight) for module in modules}
    with _merging:
        if changed & _merged:
            raise RuntimeError(_MERGED)
        if any(id(module) in injection.deltas for injection in _open.injections for module in modules):
            raise RuntimeError(
                "adapters are injected into this base (inject_lora, or a call of generate in another thread), whose "
                "answers would be of both: leave that block first, or give every worker a base of its own."
            )
        _merged.update(changed)
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, paths in targets.paths.items():
                for path, lora_A, lora_B in zip(paths, weights.lora_A[name][0], weights.lora_B[name][0], strict=True):
                    weight: Tensor = vlm.get_submodule(path).weight  # type: ignore[assignment]
                    if not _holds_numbers(weight):
                        raise ValueError(f"{path} is quantised ({weight.dtype}): use inject_lora or PEFT on it.")
                    exact = torch.promote_types(weight.dtype, torch.float32)
                    a, b = lora_A.to(weight.device, exact), lora_B.to(weight.device, exact)
                    originals.append((weight, weight.clone()))
                    weight.copy_(torch.addmm(weight.to(exact), b.T, a, alpha=weights.scaling))
        yield
    finally:
        try:
            with torch.no_grad():
                for weight, original in reversed(originals):  # one that two modules share was changed twice
                    weight.copy_(original)
        finally:
            with _merging:
                _merged.difference_update(changed)


def is_merged(weight: Tensor) -> bool:
    """Whether an open block of [`merge_lora`], in any thread, has changed this weight."""
    return id(weight) in _merged


def is_injected(module: nn.Module) -> bool:
    """Whether an open block of [`inject_lora`] adapts this module in this thread."""
    thread = threading.get_ident()
    return any(id(module) in other.deltas and other.thread == thread for other in _open.injections)


_MERGED = (
    "an adapter is merged into this base already: leave its block first, merge compose_adapters([...]) of both, or "
    "give every worker a base of its own."
)
_merging = threading.RLock()  # garbage collection may close an abandoned block inside it
_merged: set[int] = set()  # the ids of weights that an open block has changed


class _Delta:
    """The update of one Linear module: `scaling * lora_B^T (lora_A x)` for every row.

    Args:
        lora_A: `[groups, rank, d_in]`, what the module computes in.
        lora_B: `[groups, rank, d_out]`, the scaling multiplied in.
        rows: the batch, or a divisor of it; of each group the same number of consecutive rows.
        borrowed: whether other adapters will lie in their memory.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, rows: int, borrowed: bool) -> None:
        self.lora_A, self.lora_B, self.rows, self.borrowed = lora_A, lora_B, rows, borrowed

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """The module's output, updated for its input `x` `[rows, tokens, d_in]`."""
        if x.dim() != 3:
            raise ValueError(f"expected [rows, tokens, features] at an adapted module, got {tuple(x.shape)}.")
        if x.shape[0] % self.rows:
            raise ValueError(f"a batch of {x.shape[0]} rows does not fit adapters made for {self.rows} rows.")
        lora_A, lora_B = self.lora_A, self.lora_B
        if self.borrowed and torch.is_grad_enabled() and x.requires_grad:
            lora_A, lora_B = lora_A.clone(), lora_B.clone()  # autograd keeps them, and others come to lie there
        groups = lora_A.shape[0]
        if x.shape[0] != groups:  # consecutive rows of one adapter become one longer row: no copy of the adapters
            x = x.reshape(groups, -1, x.shape[2])
        if torch.compiler.is_compiling() and x.shape[1] == 1:
            # of a single token, sums: a compiler fuses them with what is around, and a product of one row idles
            exact = torch.promote_types(lora_A.dtype, torch.float32)
            inner = (x.to(exact) * lora_A.to(exact)).sum(2)
            update = (inner[:, :, None] * lora_B.to(exact)).sum(1)
            return output + update[:, None].to(output.dtype)
        lora_A = lora_A.transpose(1, 2)
        if x.dtype == lora_A.dtype == output.dtype:
            if output.shape[0] == groups:
                return torch.baddbmm(output, torch.bmm(x, lora_A), lora_B)
            grouped = output.reshape(groups, -1, output.shape[2])
            return torch.baddbmm(grouped, torch.bmm(x, lora_A), lora_B).view(output.shape)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(lora_A.dtype)
        # a quantised module's output may not have its weight's dtype
        return output + torch.bmm(torch.bmm(x, lora_A), lora_B).view(output.shape).to(output.dtype)


class _Injection:
    """Adapters on a base, as its modules need them, and the thread they act in."""

    def __init__(self, modules: dict[str, list[nn.Module]], weights: LoraWeights, counts: list[int]) -> None:
        self.thread = threading.get_ident()
        self.modules = [module for several in modules.values() for module in several]
        self.deltas: dict[int, _Delta] = {}  # by the module's id: torch.compile can look that up
        self.borrowed: list[_Memory] = []
        self.closed = False
        try:
            self._lay_out(modules, weights, counts)
        except BaseException:
            self.give_back()
            raise

    def _lay_out(self, modules: dict[str, list[nn.Module]], weights: LoraWeights, counts: list[int]) -> None:
        # rows of an adapter are told apart only as far as they must be
        unit = math.gcd(*counts)
        repeats = [count // unit for count in counts]
        rows = 1 if len(counts) == 1 else sum(counts)
        for name, several in modules.items():
            lora_A, lora_B = weights.lora_A[name], weights.lora_B[name]
            lora_B = lora_B if weights.scaling == 1 else lora_B * weights.scaling
            places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
            for position, module in enumerate(several):
                weight: Tensor = module.weight  # type: ignore[assignment]
                # a quantised weight's dtype is storage, not what the module computes in
                dtype = weight.dtype if _holds_numbers(weight) else lora_B.dtype
                places.setdefault((weight.device, dtype), []).append(position)
            for place, positions in places.items():
                first, before = several[positions[0]], len(self.borrowed)
                a = self._laid_out(first, "A", _chosen(lora_A, positions, repeats), place)
                b = self._laid_out(first, "B", _chosen(lora_B, positions, repeats), place)
                borrowed = len(self.borrowed) > before
                for position, one, other in zip(positions, a, b, strict=True):
                    self.deltas[id(several[position])] = _Delta(one, other, rows, borrowed)

    def _laid_out(
        self, module: nn.Module, role: str, layers: Tensor, place: tuple[torch.device, torch.dtype]
    ) -> Sequence[Tensor]:
        """Each layer's `[groups, m, n]` in one piece of memory and in `place`, of a `[layers, groups, m, n]`.

        The cast happens once, not at every token. Without gradients adapters lie where the last ones of this size lay:
        there CUDA graphs find them without a copy at every token.
        """
        if not _is_plain(layers):
            layers = layers.to(*place).contiguous()
            # strides of one adapter are meaningless, but graphs are made for them; and the gradient of unbind is made
            # in one piece, not added up layer by layer
            return layers.flatten(0, 1).unflatten(0, (len(layers), -1)).unbind()
        memory = _kept.borrow(module, role, tuple(layers.shape), place)
        self.borrowed.append(memory)
        memory.whole.copy_(layers)
        return memory.layers

    def give_back(self) -> None:
        """Let the next adapters have the memory of these."""
        for memory in self.borrowed:
            memory.free = True


def _chosen(stacked: Tensor, positions: list[int], repeats: list[int]) -> Tensor:
    """`[layers, groups, rank, width]` of a `[batch, layers, rank, width]`: some layers, a group so many times."""
    layers = stacked.transpose(0, 1)
    if len(positions) < len(layers):
        layers = layers[positions]
    if len(set(repeats)) > 1:
        layers = layers.repeat_interleave(torch.tensor(repeats, device=layers.device), 1, output_size=sum(repeats))
    return layers


def _is_plain(tensor: Tensor) -> bool:
    """Whether nobody watches what is done with a tensor: no gradient, no transform (torch.func), no tracing."""
    return (
        not torch.is_grad_enabled()
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and _get_current_dispatch_mode() is None
    )


class _Memory:
    """A place for the adapters of one module name, whose address compiled code may keep.

    Attributes:
        whole: `[layers, groups, m, n]`.
        layers: its layers, always the same tensors.
        free: whether no open block uses it.
        used: when it was last borrowed, as a count.
    """

    def __init__(self, shape: tuple[int, ...], place: tuple[torch.device, torch.dtype]) -> None:
        with torch.inference_mode(False):  # whose tensors could not be written again outside it
            self.whole = torch.empty(shape, device=place[0], dtype=place[1])
        self.layers = self.whole.unbind()
        self.free, self.used = False, 0
        for layer in self.layers:
            # what torch._dynamo.mark_static_address(layer, guard=False) does, without importing Dynamo
            layer._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


class _Kept:
    """Memory of adapters that have been on a base, for the next ones to lie in.

    For each module name so many sizes (torch makes as many graphs of a function) and so many bytes are kept, lora_A
    and lora_B apart; what was used longest ago goes first.
    """

    SIZES, BYTES = 8, 2**29

    def __init__(self) -> None:
        self._memories: WeakKeyDictionary[nn.Module, list[tuple[Any, _Memory]]] = WeakKeyDictionary()
        self._lock, self._count = threading.Lock(), itertools.count(1)

    def borrow(
        self, module: nn.Module, role: str, shape: tuple[int, ...], place: tuple[torch.device, torch.dtype]
    ) -> _Memory:
        """Memory for the adapters of `module` and its like, which nobody else uses until it is free."""
        # work on one stream is done in order: what comes next does not overwrite what is still read
        stream = torch.cuda.current_stream(place[0]).cuda_stream if place[0].type == "cuda" else None
        key = (role, shape, place, stream)
        with self._lock:
            found = self._memories.setdefault(module, [])
            # the first, always: whatever blocks were open at once, the next one alone has the place it had
            memory = next((memory for other, memory in found if memory.free and other == key), None)
            if memory is not None:
                memory.free, memory.used = False, next(self._count)
                return memory
        memory = _Memory(shape, place)
        with self._lock:
            memory.used = next(self._count)
            found.append((key, memory))
            self._drop(found, role)
        return memory

    def _drop(self, found: list[tuple[Any, _Memory]], role: str) -> None:
        """Let go of what is too much, but not of what is in use."""
        mine = sorted((item for item in found if item[0][0] == role), key=lambda item: item[1].used)
        left = sum(memory.whole.nbytes for _, memory in mine)
        for number, item in enumerate(mine):
            if len(mine) - number <= self.SIZES and left <= self.BYTES:
                break
            if item[1].free:
                left -= item[1].whole.nbytes
                found.remove(item)


_kept = _Kept()


class _Open:
    """All injections that are open, and their hooks: one on each module, however many injections adapt it.

    `torch.compile` follows what the hooks read from here, and so notices what changes.
    """

    def __init__(self) -> None:
        self.injections: tuple[_Injection, ...] = ()
        self.several_threads = False
        self._hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
        self._lock = threading.RLock()  # garbage collection may close an abandoned block inside it

    def add(self, injection: _Injection) -> None:
        with self._lock:
            self._set((*self.injections, injection))
            for module in injection.modules:
                if module not in self._hooks:
                    self._hooks[module] = module.register_forward_hook(_make_hook(id(module)))

    def remove(self, injection: _Injection) -> None:
        with self._lock:
            injection.closed = True
            self._set(self.injections)
            for module in injection.modules:
                if not any(id(module) in other.deltas for other in self.injections) and module in self._hooks:
                    self._hooks.pop(module).remove()

    def _set(self, injections: tuple[_Injection, ...]) -> None:
        self.injections = injections
        while any(injection.closed for injection in self.injections):  # some perhaps since this began
            self.injections = tuple(injection for injection in self.injections if not injection.closed)
        self.several_threads = len({injection.thread for injection in injections}) > 1


_open = _Open()


def _make_hook(key: int) -> Callable[..., Tensor]:
    def add_lora(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for injection in _open.injections:
            delta = injection.deltas.get(key)
            if delta is not None and _acts_here(injection):
                output = delta.add(output, args[0])
        return output

    return add_lora


def _acts_here(injection: _Injection) -> bool:
    if torch.compiler.is_compiling() and not _open.several_threads:
        return _are_of_this_thread()
    return threading.get_ident() == injection.thread


@torch.compiler.assume_constant_result
def _are_of_this_thread() -> bool:
    """Whether the open injections, all of one thread, are of this one; asked once a graph, in the thread it is for."""
    return _open.injections[0].thread == threading.get_ident()


@contextmanager
def _seen_by_compiled_code(injection: _Injection) -> Iterator[None]:
    """Keep compiled code with adapters and without them apart.

    Dynamo does not look whether hooks were added to a module that had none, nor which thread it runs in: a graph of
    the base compiled before would go on answering without adapters, and one with them would answer in other threads.
    What it does compare before it runs a graph is the thread's autocast state. So the autocast cache is switched, off
    as a rule: it is for weights that are trained and used twice in a forward pass, which the base's are not.
    """
    if any(other is not injection and other.thread == injection.thread for other in _open.injections):
        yield  # inside another block, which has switched it
        return
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not enabled)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _holds_numbers(weight: Tensor) -> bool:
    """Whether a weight is stored as the numbers it stands for: quantised ones are integers, or floats of a byte."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def _check_fit(targets: LoraTargets, weights: LoraWeights) -> None:
    expected = {
        name: (len(paths), targets.in_features[name], targets.out_features[name])
        for name, paths in targets.paths.items()
    }
    given = {name: (a.shape[1], a.shape[3], weights.lora_B[name].shape[3]) for name, a in weights.lora_A.items()}
    if expected != given:
        raise ValueError(
            f"the adapters do not fit this model: expected (layers, d_in, d_out) {expected}, got {given}. "
            "Was the adapter made for another base?"
        )
