"""A pretended CUDA device on a CPU: what mixes devices fails as on a GPU, and what a GPU would wait for is counted.

`PretendTensor` wraps a CPU tensor and says `cuda:0`. Everything is computed on the wrapped tensor, so results are the
CPU's; speed, memory and CUDA's own kernels are not pretended.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.utils._pytree as pytree
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from rlhf_ppo.kernels import fused_linear_logprobs, linear_layers
from rlhf_ppo.samplers import static_step

DEVICE = torch.device("cuda", 0)
GIB = 2**30
PRODUCT_ROOTS = ("/rlhf_ppo/", "/reward_model/", "/recipes/")
FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand, torch.randn, torch.randint,
    torch.tensor, torch.as_tensor, torch.randperm, torch.linspace, torch.eye, torch.empty_strided, torch.logspace,
    torch.asarray, torch.tril_indices, torch.triu_indices,
}  # fmt: skip
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
LIKES = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full,
}  # fmt: skip
SCALARS = {
    torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
}  # fmt: skip
# Operations whose result has a size that depends on the data, or that return a Python value: the host waits.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "is_nonzero", "equal", "allclose",
}  # fmt: skip
MAY_MIX = {"copy_", "_to_copy", "set_", "_has_compatible_shallow_copy_type", "_pin_memory"}
INDEXING = {"index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"}
NO_ZERO_DIM = {"cat", "stack", "gather", "scatter", "index_select", "mm", "addmm", "bmm"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "resize_", "detach"}


@dataclass
class Counts:
    """What the pretended device saw."""

    syncs: Counter[str] = field(default_factory=Counter)
    """Waits of the host for the device, by "kind at place"."""
    uploads: Counter[str] = field(default_factory=Counter)
    """Copies from the host to the device."""
    products: Counter[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=Counter)
    """Matrix products: operation, dtype of its operands, dtype of its result."""
    kernels: int = 0
    """Operations on the device that are not views."""

    def reset(self) -> None:
        """Start counting anew."""
        self.syncs.clear(), self.uploads.clear(), self.products.clear()
        self.kernels = 0


COUNTS = Counts()


class DeviceMixError(RuntimeError):
    """Tensors of two devices met."""


def place() -> str:
    """The innermost line of the product; of a library, where there is none."""
    frame, library = sys._getframe(2), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if any(root in name for root in PRODUCT_ROOTS) and "site-packages" not in name:
            return f"{name.split('/')[-2]}/{name.split('/')[-1]}:{frame.f_lineno}"
        if library == "?" and "pretend_cuda" not in name and "/torch/" not in name:
            library = f"{name.split('/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return library


def synchronized(kind: str) -> None:
    COUNTS.syncs[f"{kind} at {place()}"] += 1


def _no_numpy(*_: object, **__: object) -> None:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host.")


class PretendTensor(torch.Tensor):
    """A CPU tensor that says it is on `cuda:0`."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=inner.device, requires_grad=False,
        )  # fmt: skip
        out._inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    numpy = __array__ = _no_numpy

    def __repr__(self) -> str:
        return f"PretendTensor({self._inner!r})"

    def get_device(self) -> int:
        return 0

    def _wait(self, kind: str):
        synchronized(kind)
        return self._inner.detach()

    def tolist(self):
        return self._wait("tolist").tolist()

    def item(self):
        return self._wait("item").item()

    def __bool__(self):
        return bool(self._wait("bool"))

    def __int__(self):
        return int(self._wait("int"))

    def __float__(self):
        return float(self._wait("float"))

    def __index__(self):
        return self._wait("index").__index__()

    def __format__(self, spec: str) -> str:
        return format(self._wait("format"), spec)

    def untyped_storage(self):
        return self._inner.untyped_storage()

    def data_ptr(self) -> int:
        return self._inner.data_ptr()

    def pin_memory(self, *_: object):
        return self

    def to(self, *args, **kwargs):
        return _to(self, torch.Tensor.to, args, kwargs)

    def cpu(self, *args, **kwargs):
        return _to(self, torch.Tensor.cpu, args, kwargs)

    def cuda(self, *args, **kwargs):
        return _to(self, torch.Tensor.cuda, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _check_devices(name: str, args, ours: list, others: list) -> None:
    """Raise where CUDA would: numbers of no dimension and CPU indices of a CUDA tensor may mix, others not."""
    if not (ours and others) or name in MAY_MIX:
        return
    large = [tensor for tensor in others if tensor.dim() > 0]
    if name in INDEXING and type(args[0]) is PretendTensor:
        if large:
            COUNTS.uploads[f"{name} with CPU indices at {place()}"] += 1
    elif name in INDEXING or large or name in NO_ZERO_DIM:
        raise DeviceMixError(f"Expected all tensors to be on the same device ({name}) at {place()}")


def _count(func, name: str, args, kwargs, ours: list) -> None:
    if name == "copy_":
        to, source = type(args[0]) is PretendTensor, type(args[1]) is PretendTensor
        if to and not source:
            COUNTS.uploads[f"copy_ at {place()}"] += 1
        elif source and not to:
            synchronized("copy_ to the CPU")
    if not ours:
        return
    if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        synchronized(name)
    elif name in INDEXING:
        masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        if masks and (name == "index" or args[2].numel() > 1 or len(args[1]) > 1):
            synchronized("boolean index")
    if name not in NO_KERNEL and not func.is_view:
        COUNTS.kernels += 1


def _dispatch(func, args, kwargs):
    name = func._schema.name.split("::")[-1]
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if type(tensor) is PretendTensor]
    others = [tensor for tensor in tensors if type(tensor) is not PretendTensor]
    _check_devices(name, args, ours, others)
    _count(func, name, args, kwargs, ours)
    inner = [leaf._inner if type(leaf) is PretendTensor else leaf for leaf in flat]
    inner_args, inner_kwargs = pytree.tree_unflatten(inner, spec)
    on_device = type(args[0]) is PretendTensor if name == "copy_" else bool(ours)
    if kwargs.get("device") is not None:
        on_device |= torch.device(kwargs["device"]).type == "cuda"
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    if kwargs.get("out_dtype") is not None or name in ("mm", "addmm", "bmm", "baddbmm"):
        out = _product(func, name, inner_args, inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)
    if ours and name in PRODUCTS:
        COUNTS.products[name, ours[-1].dtype, out.dtype] += 1
    known = {id(i): leaf for i, leaf in zip(inner, flat, strict=True) if type(leaf) is PretendTensor}
    plain = {id(tensor): tensor for tensor in others}

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor) or id(leaf) in plain or not on_device:
            return leaf
        return known[id(leaf)] if id(leaf) in known else PretendTensor(leaf)

    return pytree.tree_map(wrap, out)


def _product(func, name: str, args, kwargs):
    """A product; where `out_dtype` is asked for, which only CUDA has: of exact operands, rounded once."""
    dtypes = [arg for arg in args if isinstance(arg, torch.dtype)] or [kwargs.pop("out_dtype", None)]
    if dtypes[0] is None:
        return func(*args, **kwargs)
    operands = [arg.to(dtypes[0]) for arg in args if isinstance(arg, torch.Tensor)]
    return getattr(torch, name)(*operands, **kwargs)


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return PretendTensor(x.detach().clone(memory_format=torch.preserve_format))

    @staticmethod
    def backward(ctx, grad):
        return grad._inner if type(grad) is PretendTensor else grad


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x._inner.detach().clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx, grad):
        return grad if type(grad) is PretendTensor else PretendTensor(grad)


def _is_cuda(device: object) -> bool:
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _target(func, args, kwargs):
    """The device that a conversion names (None: the tensor's own), and its other arguments."""
    device, rest = kwargs.pop("device", None), list(args)
    kwargs.pop("non_blocking", None)
    if func in (torch.Tensor.cpu, torch.Tensor.cuda):
        return ("cpu" if func is torch.Tensor.cpu else "cuda"), [], {}
    if rest and isinstance(rest[0], torch.Tensor):
        device, rest = rest[0].device, [rest[0].dtype, *rest[1:]]
    elif rest and not isinstance(rest[0], torch.dtype | bool):
        device, rest = rest[0], rest[1:]
    rest = [value for value in rest if isinstance(value, torch.dtype)]
    return device, rest, {name: value for name, value in kwargs.items() if value is not None}


def _to(x, func, args, kwargs):
    device, rest, kwargs = _target(func, args, dict(kwargs))
    if device is not None and not isinstance(device, int) and torch.device(device).type == "meta":
        return torch.Tensor.to(x, *rest, device=device, **kwargs)
    ours = type(x) is PretendTensor
    to_cuda = ours if device is None else _is_cuda(device)
    tracked = torch.is_grad_enabled() and x.requires_grad
    if ours and not to_cuda:
        synchronized("to the CPU")
        out = _Download.apply(x) if tracked else x._inner.detach().clone(memory_format=torch.preserve_format)
        return out.to(*rest, **kwargs) if rest or kwargs else out
    if ours:
        return super(PretendTensor, x).to(*rest, **kwargs) if rest or kwargs else x
    moved = torch.Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
    if not to_cuda:
        return moved
    COUNTS.uploads[f"to the device at {place()}"] += 1
    if torch.is_grad_enabled() and moved.requires_grad:
        return _Upload.apply(moved)
    return PretendTensor(moved.detach().clone(memory_format=torch.preserve_format))


def _host_values(x):
    """Nested lists with numbers in place of tensors of the device: each is a wait."""
    if isinstance(x, PretendTensor):
        return x.tolist()
    return [_host_values(item) for item in x] if isinstance(x, list | tuple) else x


class _Functions(TorchFunctionMode):
    """Sends what names the device to the pretended one, before torch would look for a real one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.backward:
            renamed = {("grad_tensors" if key == "gradient" else key): value for key, value in kwargs.items()}
            with self:
                return torch.autograd.backward(first, *args[1:], **renamed)
        if func in FACTORIES:
            return self._factory(func, args, kwargs)
        if func in LIKES and kwargs.get("device") is not None:
            return self._like(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return first
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return _to(first, func, args[1:], kwargs)
        if func is torch.Tensor.new_tensor and type(first) is PretendTensor:
            COUNTS.uploads[f"new_tensor at {place()}"] += 1
            return PretendTensor(torch.Tensor.new_tensor(first._inner, *args[1:], **kwargs))
        if name == "pad_sequence" and func is not torch.nn.utils.rnn.pad_sequence:
            return self._pad_sequence(func, args, kwargs)
        math_only = not torch.backends.cuda.flash_sdp_enabled() and kwargs.get("is_causal")
        if name == "scaled_dot_product_attention" and type(first) is PretendTensor and math_only:
            mask = torch.ones(first.shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
            kwargs |= {"attn_mask": PretendTensor(mask), "is_causal": False}
        if name == "__set__" and "data" in str(getattr(func, "__self__", "")) and self._set_data(*args):
            return None
        if type(first) is PretendTensor:
            handled, result = self._on_tensor(func, name, first, args)
            if handled:
                return result
        self._check_generator(kwargs.get("generator"), any(type(arg) is PretendTensor for arg in args))
        return func(*args, **kwargs)

    @staticmethod
    def _check_generator(generator: torch.Generator | None, on_device: bool) -> None:
        if generator is not None and on_device and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    def _factory(self, func, args, kwargs):
        device = kwargs.get("device")
        if func in FROM_DATA and not isinstance(args[0], torch.Tensor) and not _is_cuda(device):
            args = (_host_values(args[0]), *args[1:])
        if not _is_cuda(device):
            return func(*args, **kwargs)
        self._check_generator(kwargs.get("generator"), True)
        if func in FROM_DATA:
            COUNTS.uploads[f"{func.__name__} at {place()}"] += 1
            if isinstance(args[0], PretendTensor):
                return func(*args, **{**kwargs, "device": None})
        out = func(*args, **{**kwargs, "device": "cpu"})
        COUNTS.kernels += 1
        return PretendTensor(out.detach()).requires_grad_(out.requires_grad)

    @staticmethod
    def _like(func, args, kwargs):
        to_cuda, ours = _is_cuda(kwargs["device"]), type(args[0]) is PretendTensor
        if ours != to_cuda:
            kwargs.pop("device")
            if ours:
                return func(args[0]._inner, *args[1:], **kwargs)
            return PretendTensor(func(*args, **kwargs).detach())
        if to_cuda:
            kwargs.pop("device")
        return func(*args, **kwargs)

    @staticmethod
    def _pad_sequence(func, args, kwargs):
        rows = args[0]
        kinds = {type(row) is PretendTensor for row in rows}
        if kinds == {False}:
            return func(*args, **kwargs)
        if len(kinds) > 1:
            raise DeviceMixError(f"Expected all tensors to be on the same device (pad_sequence) at {place()}")
        given = dict(zip(("batch_first", "padding_value", "padding_side"), args[1:], strict=False)) | kwargs
        value, side = given.get("padding_value", 0.0), given.get("padding_side", "right")
        width, padded = max(len(row) for row in rows), []
        for row in rows:
            gap = width - len(row)
            ends = [0, 0] * (row.dim() - 1) + ([gap, 0] if side == "left" else [0, gap])
            padded.append(torch.nn.functional.pad(row, ends, value=value))
        out = torch.stack(padded)
        return out if given.get("batch_first", False) else out.transpose(0, 1)

    @staticmethod
    def _set_data(target, value) -> bool:
        """`target.data = value`, over a change of device."""
        ours = [type(tensor) is PretendTensor or type(tensor.detach()) is PretendTensor for tensor in (target, value)]
        if all(ours) and target.shape == value.shape:
            target._inner = value._inner
            return bool(target.dtype == value.dtype)  # torch sets another dtype of the wrapper
        if ours[0] == ours[1]:
            return False
        new = value.detach()
        if isinstance(target, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=target.requires_grad)
        torch.utils.swap_tensors(target, new)
        return True

    @staticmethod
    def _on_tensor(func, name: str, x, args):
        if func is torch.Tensor.tolist:
            return True, x.tolist()
        if func is torch.Tensor.numpy or name == "__array__":
            _no_numpy()
        if func in SCALARS:
            return True, func(x._wait(name.strip("_")))
        if func is torch.Tensor.__format__:
            return True, x.__format__(*args[1:])
        if func in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr):
            return True, func(x._inner)
        if func is torch.Tensor.__deepcopy__:
            memo = args[1]
            if id(x) not in memo:
                copied = PretendTensor(x._inner.detach().clone())
                if getattr(x, "_is_param", False):
                    copied._is_param = True
                memo[id(x)] = copied.requires_grad_(x.requires_grad)
            return True, memo[id(x)]
        return False, None


def _driver(capability: tuple[int, int], free: int) -> dict[str, object]:
    """Functions of `torch.cuda` that would ask the driver."""
    nothing, state = (lambda *_, **__: None), torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name="pretended", total_memory=80 * GIB, major=capability[0], minor=capability[1], multi_processor_count=132
    )
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_initialized": lambda: True, "_lazy_init": nothing, "set_device": nothing, "synchronize": nothing,
        "empty_cache": nothing, "ipc_collect": nothing, "manual_seed": nothing, "manual_seed_all": nothing,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "get_device_capability": lambda _=None: capability, "get_device_name": lambda _=None: "pretended",
        "get_device_properties": lambda _=None: properties, "mem_get_info": lambda _=None: (free, 80 * GIB),
        "get_rng_state": lambda _=None: state, "get_rng_state_all": lambda: [state],
        "set_rng_state": nothing, "set_rng_state_all": nothing, "reset_peak_memory_stats": nothing,
        "max_memory_allocated": lambda _=None: 1, "memory_allocated": lambda _=None: 1,
        "memory_reserved": lambda _=None: 1, "device_of": contextlib.nullcontext,
    }  # fmt: skip


@contextlib.contextmanager
def pretend_cuda(*, capability: tuple[int, int] = (9, 0), free: int = 70 * GIB) -> Iterator[Counts]:
    """Context manager: while active, torch has one CUDA device, on which every wait of the host is counted.

    Args:
        capability: Of the card; below (8, 0) it has no bfloat16.
        free: Bytes of memory that the driver says are free.
    """
    autocast, fork_rng = torch.amp.autocast_mode.autocast, torch.random.fork_rng
    before, enabled, dtype = autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        before(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    def fork_without_devices(devices=None, enabled=True, **_):
        return fork_rng(devices=[], enabled=enabled)

    swap = torch.__future__.get_swap_module_params_on_conversion()
    COUNTS.reset()
    with contextlib.ExitStack() as stack:
        for name, function in _driver(capability, free).items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(patch.object(autocast, "__init__", init))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda _="cuda": enabled("cpu")))
        stack.enter_context(patch.object(torch, "get_autocast_dtype", lambda _="cuda": dtype("cpu")))
        stack.enter_context(patch.object(torch.random, "fork_rng", fork_without_devices))
        # torch 2.15 asks the driver before a step whether the stream is captured.
        check = patch.object(Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, create=True)
        stack.enter_context(check)
        stack.enter_context(_product_patches())
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        stack.enter_context(_Functions())
        yield COUNTS


def recorded(function):
    """A step as a CUDA graph: made again at each replay, into the first one's tensors; the host launches it at once."""
    kept = [function(), *function.__self__.head_inputs]

    def replay() -> None:
        kernels, waits = COUNTS.kernels, sum(COUNTS.syncs.values())
        for old, new in zip(kept, [function(), *function.__self__.head_inputs], strict=True):
            old.copy_(new)
        assert sum(COUNTS.syncs.values()) == waits, "a graph cannot wait"
        COUNTS.kernels = kernels + 1

    return replay, kept[0]


@contextlib.contextmanager
def _product_patches() -> Iterator[None]:
    """Where the wrapper would show: for C++ it is a CPU tensor, and in the backward pass no mode is active."""
    common_factor = fused_linear_logprobs._common_factor

    def on_device(received, foreseen, differs):
        pairs = zip(received, foreseen, strict=True)
        wrapped = (PretendTensor(g) if type(f) is PretendTensor and type(g) is not type(f) else g for g, f in pairs)
        return common_factor(tuple(wrapped), foreseen, differs)

    group, apply = clip_grad._group_tensors_by_device_and_dtype, BackwardCFunction.apply

    def group_on_device(tensors):
        return {(tensors[0][0].device, key[1]): value for key, value in group(tensors).items()}

    def apply_in_mode(self, *args):
        with _Functions():
            return apply(self, *args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(clip_grad, "_group_tensors_by_device_and_dtype", group_on_device)
        patches.setattr(BackwardCFunction, "apply", apply_in_mode)
        patches.setattr(linear_layers, "FakeTensor", PretendTensor)
        patches.setattr(static_step, "capture", recorded)
        patches.setattr(fused_linear_logprobs, "_common_factor", on_device)
        yield
