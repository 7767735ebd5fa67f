"""PyTorch's transformations, compilers and devices, on the losses on the last linear layer's inputs.

Right is what they make of the loss of all logits, in float64.
"""

import copy
import functools
import itertools
import sys
import weakref

import numpy as np
import pytest
import torch
from capabilities import samples
from crossed import LINEAR, OF_LINEAR
from functorch.compile import make_boxed_func
from test_in_torch import in_processes
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, grad
from torch.distributed.tensor import DTensor
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import unilabel as ul
from unilabel.layers.torch import LinearSoftmaxNLL

FORMULAS = sys.modules["unilabel.formulas.linear"]
pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch._dynamo.reset()


@pytest.fixture
def sample(sample):
    """Five examples, in blocks of two, as there are two features; with operands that are tensors."""
    return sample.of(rows=5).beside(torch.tensor)


def close(got, right, **options):
    torch.testing.assert_close(got, right, **{"rtol": 1e-12, "atol": 1e-13} | options)


def inputs_of(sample, leaves=True):
    return tuple(torch.tensor(array, requires_grad=leaves) for array in sample.inputs)


def both(sample, **more):
    """The loss, and the same of all logits, as functions of features, weight and bias."""
    linear = functools.partial(sample, **more)
    return linear, lambda *inputs: sample.materialised(torch.nn.functional.linear(*inputs), **more)


def totals(sample):
    """Both, with the losses times their cotangent summed."""
    cotangent = torch.tensor(sample.cotangent)

    def total(function):
        return lambda *inputs: (function(*inputs) * cotangent).sum()

    return tuple(map(total, both(sample)))


def value_and_gradients(function, inputs, cotangent):
    value = function(*inputs)
    return value, *grad(value, inputs, cotangent)


def check(function, sample):
    """Value and gradients of what was made of the loss as a function of its inputs."""
    inputs, cotangent = inputs_of(sample), torch.tensor(sample.cotangent)
    right = value_and_gradients(both(sample)[1], inputs, cotangent)
    close(value_and_gradients(function, inputs, cotangent), right)


# --- Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "backward", **OF_LINEAR, pairs=True)
def test_backward(sample):
    check(both(sample)[0], sample)


@pytest.mark.capability("torch", "value_and_grad", **OF_LINEAR)
def test_closed_form(sample):
    value, *found = sample.closed(*inputs_of(sample, leaves=False))
    right, *gradients = value_and_gradients(both(sample)[1], inputs_of(sample), torch.ones(value.shape).double())
    close(value, right.detach())
    close(found, gradients)


@pytest.mark.capability("torch", "frozen features, frozen layer", **OF_LINEAR)
@pytest.mark.parametrize("frozen", [(0,), (1, 2)])
def test_frozen(sample, frozen):
    inputs = [array.requires_grad_(i not in frozen) for i, array in enumerate(inputs_of(sample, leaves=False))]
    wanted, cotangent = [array for array in inputs if array.requires_grad], torch.tensor(sample.cotangent)
    close(*(grad(function(*inputs), wanted, cotangent) for function in both(sample)))


@pytest.mark.capability("torch", "derivative by targets, weights and smoothing", **OF_LINEAR)
def test_other_gradients(sample):
    """With the layer's own."""
    given = {name: array for name, array in sample.arrays.items() if array.is_floating_point()}
    targets = torch.tensor(sample.targets)
    if targets.is_floating_point():
        given["targets"] = targets
    given = {name: array.clone().requires_grad_() for name, array in given.items()}
    inputs = inputs_of(sample)
    arrays, cotangent = [*inputs, *given.values()], torch.tensor(sample.cotangent)
    close(*(grad(function(*inputs), arrays, cotangent) for function in both(sample, **given)))


@pytest.mark.capability("torch", "autograd.grad with is_grads_batched", **OF_LINEAR)
def test_batched_cotangents(sample):
    inputs, found = inputs_of(sample), []
    for function in both(sample):
        value = function(*inputs)
        units = torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)
        found.append(grad(value, inputs, units, is_grads_batched=True))
    close(*found)


@pytest.mark.capability("torch", "double backward (create_graph), and once more", **OF_LINEAR)
def test_double_backward(sample):
    inputs, found = inputs_of(sample), []
    for function in totals(sample):
        results = [grad(function(*inputs), inputs, create_graph=True)]
        for _ in range(2):
            total = sum((array**2).sum() for array in results[-1])
            results.append(grad(total, inputs, create_graph=True))
        found.append(results)
    close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.capability("torch", "backward twice (retain_graph)", **OF_LINEAR)
def test_backward_twice(sample):
    inputs, cotangent = inputs_of(sample), torch.tensor(sample.cotangent)
    value = both(sample)[0](*inputs)
    first = grad(value, inputs, cotangent, retain_graph=True)
    close(grad(value, inputs, cotangent), first)
    close(first, grad(both(sample)[1](*inputs), inputs, cotangent))


@pytest.mark.capability("torch", "checkpoint, saved-tensor hooks (save_on_cpu)", **OF_LINEAR)
@pytest.mark.parametrize("way", ["checkpoint", "reentrant checkpoint", "save_on_cpu"])
def test_saved_tensors(sample, way):
    """Which a checkpoint gives out once only."""
    linear, on_logits = totals(sample)

    def run(*inputs):
        if way == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return linear(*inputs)
        return checkpoint(linear, *inputs, use_reentrant=way != "checkpoint")

    inputs = inputs_of(sample)
    run(*inputs).backward()
    close([array.grad for array in inputs], list(grad(on_logits(*inputs), inputs)))
    if way != "reentrant checkpoint":
        again = (grad(function(*inputs), inputs, create_graph=True) for function in (run, on_logits))
        close(*(grad(sum((array**2).sum() for array in arrays), inputs) for arrays in again))


@pytest.mark.parametrize("loss", LINEAR)
def test_backward_reads_nothing_of_what_it_saved(loss):
    """Where it has the gradients."""
    rng, read = np.random.default_rng(0), []
    inputs = [torch.tensor(rng.normal(size=shape), requires_grad=True) for shape in ((5, 2), (4, 2), (4,))]
    targets = torch.zeros((5,) if loss == "linear_softmax_nll" else (5, 4), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(lambda array: array, lambda array: read.append(array) or array):
        value = getattr(ul, loss)(*inputs[:2], targets, linear_bias=inputs[2])
        gradients = grad(value, inputs, retain_graph=True)
        assert not read
        close(grad(value, inputs), gradients)
        assert len(read) == 4  # once each


@pytest.mark.capability("torch", "forward mode (dual numbers), reverse over it", **OF_LINEAR)
def test_dual_numbers(sample):
    inputs, found = inputs_of(sample), []
    for function in totals(sample):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(array, torch.cos(array.detach())) for array in inputs]
            change = forward_ad.unpack_dual(function(*duals)).tangent
            found.append((change, *grad(change, inputs)))
    close(*found)


@pytest.mark.capability("torch", "no_grad and inference_mode", **OF_LINEAR)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(sample, mode):
    inputs = inputs_of(sample)
    with mode():
        linear, on_logits = (function(*inputs) for function in both(sample))
    assert not linear.requires_grad
    close(linear, on_logits)


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "func.grad, vjp, jvp", **OF_LINEAR)
def test_func_grad(sample):
    inputs = inputs_of(sample, leaves=False)
    each, tangents = tuple(range(len(inputs))), tuple(map(torch.cos, inputs))
    close(*(torch.func.grad(function, each)(*inputs) for function in totals(sample)))
    pulled = [vjp(function, *inputs) for function in both(sample)]
    close(*((value, pull(torch.tensor(sample.cotangent))) for value, pull in pulled))
    close(*(jvp(function, inputs, tangents) for function in both(sample)))


@pytest.mark.capability("torch", "func.hessian, jacrev of jacrev, jvp of grad", **OF_LINEAR)
@pytest.mark.parametrize("transform", [hessian, lambda f, each: jacrev(jacrev(f, each), each), jacfwd])
def test_hessian(sample, transform):
    inputs = inputs_of(sample, leaves=False)
    each = tuple(range(len(inputs)))
    if transform is jacfwd:
        gradients = (torch.func.grad(function, each) for function in totals(sample))
        close(*(jvp(gradient, inputs, tuple(map(torch.cos, inputs)))[1] for gradient in gradients))
    else:
        close(*(transform(function, each)(*inputs) for function in totals(sample)))


@pytest.mark.capability("torch", "func.vmap, over grad too", **OF_LINEAR)
def test_vmap(sample):
    """Over several layers, and over layers and features."""
    inputs = inputs_of(sample, leaves=False)
    stacked = tuple(torch.stack([array, torch.cos(array)]) for array in inputs)
    each = tuple(range(len(inputs)))
    for first, axes in ((inputs[:1], (None, *[0] * len(inputs[1:]))), (stacked[:1], 0)):
        arrays = (*first, *stacked[1:])
        close(*(vmap(function, axes)(*arrays) for function in both(sample)))
        close(*(vmap(torch.func.grad(function, each), axes)(*arrays) for function in totals(sample)))


@pytest.mark.capability("torch", "gradients of each example: vmap(grad)", **OF_LINEAR)
def test_gradients_of_each_example(sample):
    features, *layer = inputs_of(sample, leaves=False)
    n = len(features)
    of_each = {name: array for name, array in sample.arrays.items() if array.ndim and len(array) == n}
    of_all = {name: array for name, array in sample.arrays.items() if name not in of_each}
    if of_all.get("where") is not None:
        of_all["where"] = of_all["where"][0]
    targets = torch.tensor(sample.targets)
    found = []
    for is_linear in (True, False):

        def loss(layer, features, targets, arrays):
            options = sample.options | of_all | arrays | {"reduction": "sum"}
            weight, *bias = layer
            if is_linear:  # noqa: B023
                return sample.loss(
                    features, weight, sample.as_targets(targets), linear_bias=bias[0] if bias else None, **options
                )
            return getattr(ul, sample.name)(
                torch.nn.functional.linear(features, *layer), sample.as_targets(targets), **options
            )

        found.append(vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(tuple(layer), features, targets, of_each))
    close(*found)


# --- Compilers and exporters ------------------------------------------------------------------------------------------


def of_arrays(sample):
    """The call as a function of all its arrays, and these."""

    def function(inputs, targets, arrays):
        bias = {"linear_bias": inputs[2]} if len(inputs) == 3 else {}
        return sample.loss(*inputs[:2], sample.as_targets(targets), **arrays, **sample.options, **bias)

    return function, (inputs_of(sample), torch.tensor(sample.targets), sample.arrays)


def check_lengths(compiled, *calls):
    """One program for calls of several lengths."""
    for i, sample in enumerate(calls):
        inputs, *others = of_arrays(sample)[1]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            cotangent = torch.tensor(sample.cotangent)
            found = value_and_gradients(lambda *inputs: compiled(inputs, *others), inputs, cotangent)  # noqa: B023
        close(found, value_and_gradients(both(sample)[1], inputs, cotangent))


def longer(sample):
    return sample.of(rows=11, classes=6).beside(torch.tensor)


@pytest.mark.full
@pytest.mark.parametrize("sample", LINEAR, indirect=True)
def test_compile(sample):
    check_lengths(torch.compile(of_arrays(sample)[0], fullgraph=True, dynamic=False), sample)


def looking_for_operator(seen):
    """A backend of torch.compile that notes of each program whether the loss is one operator in it."""

    def look(graph, inputs):
        seen.append(any("unilabel" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    def aot_and_look(graph, inputs):  # by its name the loss knows that it goes to AOTAutograd
        return aot_autograd(fw_compiler=look)(graph, inputs)

    return aot_and_look


@pytest.mark.capability("torch", "compile, few logits, which are there at once (aot_eager)", **OF_LINEAR)
def test_compile_few_logits(sample):
    """The compiler sees all of a loss whose lengths are known, and one operator once they are open."""
    seen = []
    compiled = torch.compile(of_arrays(sample)[0], backend=looking_for_operator(seen), fullgraph=True)
    check_lengths(compiled, sample)
    assert seen
    assert not any(seen)
    seen.clear()
    inputs, *others = of_arrays(longer(sample))[1]
    cotangent = torch.tensor(longer(sample).cotangent)
    found = value_and_gradients(lambda *inputs: compiled(inputs, *others), inputs, cotangent)
    close(found, value_and_gradients(both(longer(sample))[1], inputs, cotangent))
    assert any(seen)


@pytest.mark.parametrize(("n", "few"), [(2047, True), (2048, False)])
def test_compile_number_of_few_logits(n, few):
    """From 2²¹ logits on the compiler may not have them in memory."""
    rng = torch.Generator().manual_seed(20261127)
    inputs = [torch.randn(shape, generator=rng).requires_grad_() for shape in ((n, 2), (1024, 2))]
    targets, seen = torch.randint(1024, (n,), generator=rng), []
    compiled = torch.compile(ul.linear_softmax_nll, backend=looking_for_operator(seen), fullgraph=True, dynamic=False)
    close(
        value_and_gradients(lambda *inputs: compiled(*inputs, targets), inputs, torch.tensor(1.0)),
        value_and_gradients(lambda *inputs: ul.linear_softmax_nll(*inputs, targets), inputs, torch.tensor(1.0)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert seen
    assert any(seen) is not few


@pytest.mark.parametrize("loss", [ul.linear_softmax_nll, ul.linear_multilabel_logistic_loss])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_few_logits_as_in_eager_mode(loss, reduction):
    """Autocast around the whole program, infinite cotangents, second derivatives, value_and_grad."""
    rng = torch.Generator().manual_seed(20261127)
    inputs = [torch.randn(shape, generator=rng).requires_grad_() for shape in ((5, 3), (4, 3), (4,))]
    targets = torch.tensor([0, 3, 1, 1, 2]) if loss is ul.linear_softmax_nll else torch.eye(5, 4)

    def function(*inputs):
        return loss(*inputs[:2], targets, linear_bias=inputs[2], reduction=reduction)

    def in_full(*inputs):
        with torch.autocast("cpu", enabled=False):
            return function(*inputs)

    def form(*inputs):
        return ul.value_and_grad(loss)(*inputs[:2], targets, linear_bias=inputs[2], reduction=reduction)

    def second(function):
        gradients = grad(function(*inputs).sum(), inputs, create_graph=True)
        return grad(sum((array**2).sum() for array in gradients), inputs)

    near = {"rtol": 1e-5, "atol": 1e-6}
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    for run, factor in itertools.product((function, in_full), (1.0, torch.inf)):
        with torch.autocast("cpu", torch.bfloat16):
            values = [run(*inputs), compiled(run)(*inputs)]
        close(*values, **near)
        found = [grad(value, inputs, torch.full_like(value, factor)) for value in values]
        close(*found, equal_nan=True, **near)
    close(compiled(form)(*inputs), form(*inputs), **near)
    close(second(torch.compile(function, backend="eager", fullgraph=True)), second(function), **near)


@pytest.mark.capability("torch", "compile(dynamic=True), any length (inductor)", **OF_LINEAR)
def test_compile_dynamic(sample):
    check_lengths(torch.compile(of_arrays(sample)[0], fullgraph=True, dynamic=True), sample, longer(sample))


@pytest.mark.capability("torch", "compile(dynamic=True), any length (aot_eager, eager)", **OF_LINEAR)
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compile_any_length(sample, backend):
    compiled = torch.compile(of_arrays(sample)[0], backend=backend, fullgraph=True, dynamic=True)
    check_lengths(compiled, sample, longer(sample))


@pytest.mark.capability("torch", "compile of value_and_grad (aot_eager)", **OF_LINEAR)
def test_compile_closed_form(sample):
    def form(inputs, targets, arrays):
        bias = {"linear_bias": inputs[2]} if len(inputs) == 3 else {}
        value, found = ul.value_and_grad(sample.loss)(
            *inputs[:2], sample.as_targets(targets), **arrays, **sample.options, **bias
        )
        return value, *found[: len(inputs)]

    given = of_arrays(sample)[1]
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=True)
    close(compiled(*given), form(*given))


@pytest.mark.capability("torch", "compile, of transformed losses (aot_eager)", **OF_LINEAR)
def test_compile_transformed(sample):
    inputs = inputs_of(sample, leaves=False)
    each, tangents = tuple(range(len(inputs))), tuple(map(torch.cos, inputs))

    def transformed(function):
        def run(*inputs):
            several = vmap(function, (0, *[None] * (len(inputs) - 1)))(inputs[0][None], *inputs[1:])
            return torch.func.grad(function, each)(*inputs), jvp(function, inputs, tangents), several

        return run

    linear, on_logits = totals(sample)
    compiled = torch.compile(transformed(linear), backend="aot_eager", fullgraph=True)
    close(compiled(*inputs), transformed(on_logits)(*inputs))


def test_a_compiled_loss_comes_in_blocks_of_any_number(monkeypatch):
    """Of two examples each; the compiler does not see them."""
    block, seen = FORMULAS.block, []
    monkeypatch.setattr(FORMULAS, "block", lambda *call: seen.append(1) or block(*call))
    loss = torch.compile(ul.linear_softmax_nll, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (6, 20):
        seen.clear()
        features, weight = torch.ones(n, 2, requires_grad=True), torch.ones(7, 2, requires_grad=True)
        loss(features, weight, torch.ones(n, dtype=torch.int64)).backward()
        assert len(seen) == n / 2
    assert features.grad is not None


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs, targets, arrays):
        return self.function(inputs, targets, arrays)


@pytest.mark.capability("torch", "export, any number of examples", **OF_LINEAR)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own copies of what it deprecates
def test_export(sample, strict):
    function, given = of_arrays(sample)
    longer = sample.of(rows=11).beside(torch.tensor)
    n = torch.export.Dim("n")

    def spec(array, other):
        return {0: n} if array.ndim and len(array) != len(other) else None

    shapes = torch.utils._pytree.tree_map(spec, given, of_arrays(longer)[1])
    program = torch.export.export(Module(function), given, dynamic_shapes=shapes, strict=strict).module()
    for one in (sample, longer):
        others = of_arrays(one)[1][1:]
        check(lambda *inputs: program(inputs, *others), one)  # noqa: B023


@pytest.mark.capability("torch", "export of known lengths", **OF_LINEAR)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_export_known_lengths(sample):
    function, (inputs, *others) = of_arrays(sample)
    program = torch.export.export(Module(function), (inputs, *others)).module()
    check(lambda *inputs: program(inputs, *others), sample)


@pytest.mark.capability("torch", "make_fx", **OF_LINEAR)
def test_make_fx(sample):
    inputs, cotangent = inputs_of(sample, leaves=False), torch.tensor(sample.cotangent)

    def run(*inputs):
        return value_and_gradients(both(sample)[0], [array.detach().requires_grad_() for array in inputs], cotangent)

    right = value_and_gradients(both(sample)[1], inputs_of(sample), cotangent)
    close(make_fx(run)(*inputs)(*inputs), tuple(array.detach() for array in right))


def test_make_fx_of_gradients_of_each_example():
    """Of symbolic lengths, which have no hash, in ordinary tensors, as `vmap` makes them."""
    rng = torch.Generator().manual_seed(20261127)
    features, weight = torch.randn(5, 3, generator=rng), torch.randn(4, 3, generator=rng)
    y = torch.tensor([0, 3, 1, 1, 2])

    def of_each(weight, features, y):
        linear = grad_of_each(lambda weight, x, y: ul.linear_softmax_nll(x, weight, y))(weight, features, y)
        return linear, grad_of_each(lambda weight, x, y: ul.softmax_nll(weight @ x, y))(weight, features, y)

    def grad_of_each(function):
        return vmap(torch.func.grad(function), (None, 0, 0))

    close(*make_fx(of_each, tracing_mode="symbolic")(weight, features, y)(weight, features, y), rtol=1e-5, atol=1e-6)


# --- Modes and subclasses ---------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Adds up the bytes of all arrays that were made and are still there: their largest sum."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for array in tree_leaves(result):
            storage = array.untyped_storage() if isinstance(array, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key):
        self.now -= self.sizes.pop(key)


class Named(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


@pytest.mark.capability("torch", "TorchDispatchMode, TorchFunctionMode", **OF_LINEAR)
@pytest.mark.parametrize("mode", [Peak, Named])
def test_modes(sample, mode):
    with mode():
        check(both(sample)[0], sample)


def doubly(function, inputs):
    gradients = grad(function(*inputs), inputs, create_graph=True)
    return grad(sum((array**2).sum() for array in gradients), inputs)


MANY = 16  # blocks
WAYS = {
    "backward": lambda function, inputs: grad(function(*inputs), inputs),
    "double backward": doubly,
    "func.grad": lambda function, inputs: torch.func.grad(function, (0, 1))(*inputs),
    "func.jvp": lambda function, inputs: jvp(function, inputs, inputs),
    "jvp of func.grad": lambda function, inputs: jvp(torch.func.grad(function, (0, 1)), inputs, inputs),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", [ul.linear_softmax_nll, ul.linear_multilabel_logistic_loss])
@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.full)])
def test_logits_are_never_there_at_once(way, loss, reduction):
    if reduction == "none" and loss is ul.linear_multilabel_logistic_loss:
        pytest.skip("its losses are as many as the logits")
    n, length, classes = 2 * MANY, 2, 256
    features, weight = (torch.ones(shape, dtype=torch.float64) for shape in ((n, length), (classes, length)))
    targets = torch.zeros((n,) if loss is ul.linear_softmax_nll else (n, classes), dtype=torch.int8)

    def total(features, weight):
        return loss(features, weight, targets, reduction=reduction).sum()

    inputs = features.requires_grad_(), weight.requires_grad_()
    if "func" in way:
        inputs = tuple(array.detach() for array in inputs)
    WAYS[way](total, inputs)  # what is made once
    with Peak() as mode:
        WAYS[way](total, inputs)
    blocks = mode.peak / (n * classes * 8 / MANY)
    assert blocks < 32, blocks  # the logits are 16, and an expression of all of them keeps nine arrays of that size


# --- Autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "autocast to bfloat16, as F.linear", **OF_LINEAR)
def test_autocast(sample):
    """Inputs are rounded as F.linear has them, the logits are not; gradients come in each input's dtype."""
    cotangent = torch.tensor(sample.cotangent, dtype=torch.float32)
    features, *layer = (torch.tensor(array, dtype=torch.float32) for array in sample.inputs)
    inputs = [features.bfloat16(), *layer]
    rounded = [array.bfloat16().float() for array in inputs]
    found = []
    for function, some in zip(both(sample), (inputs, rounded), strict=True):
        leaves = [array.clone().requires_grad_() for array in some]
        with torch.autocast("cpu", torch.bfloat16, enabled=(function is both and False) or some is inputs):
            value = function(*leaves)
        assert value.dtype is torch.float32
        gradients = grad(value, leaves, cotangent)
        if some is inputs:
            assert [array.dtype for array in gradients] == [array.dtype for array in inputs]
        found.append((value, [array.float() for array in gradients]))
    (value, gradients), (right, expected) = found
    close(value, right, rtol=2e-6, atol=1e-6)
    close(gradients, expected, rtol=2.0**-7, atol=1e-5)


def test_features_of_numpy():
    with pytest.raises(TypeError, match=r"beside the features\. Received: numpy features with a torch array\.$"):
        ul.linear_softmax_nll(np.ones((4, 3)), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64))


# --- Several processes ------------------------------------------------------------------------------------------------

DTENSOR = "DTensor: classes sharded, examples sharded, or both"


class Sent(TorchDispatchMode):
    """The kinds of collectives, and the numbers of elements that they took; and of the largest array here."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):  # that comes back with what it sends
            return NotImplemented
        if "c10d" in function.namespace and isinstance(args[0], torch.Tensor) and "wait" not in str(function):
            self.calls.append((str(function), args[0].numel()))
        made = function(*args, **kwargs or {})
        self.largest = max(self.largest, made.numel() if type(made) is torch.Tensor else 0)  # a fake one is of all
        return made

    def only_adds_up(self, features):
        """Whether nothing but a process' own part of the features went anywhere without being added up."""
        whole = [numbers for kind, numbers in self.calls if "reduce" not in kind and "_wrap_tensor" not in kind]
        return set(whole) <= {features.to_local().numel()}


def spread_over_processes(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def spread(array, place):
        return distribute_tensor(torch.as_tensor(array), mesh, [place])

    FORMULAS.BLOCK = 160  # blocks of ten examples where the classes are sharded
    whole, by_row = Replicate(), Shard(0)
    every = (whole, by_row), (by_row, by_row), (by_row, whole), (Shard(1), by_row)
    for sample, twice in zip(samples("torch", DTENSOR, **OF_LINEAR), itertools.cycle(every), strict=False):
        for places in every:
            one = sample.of(rows=50, classes=40)
            plain = one.beside(torch.tensor)
            inputs, cotangent = inputs_of(plain), torch.tensor(one.cotangent)
            right = value_and_gradients(both(plain)[1], inputs, cotangent)
            given = [
                spread(a, place).requires_grad_() for a, place in zip(one.inputs, (*places, places[1]), strict=False)
            ]
            spread_cotangent = spread(one.cotangent, whole)
            with Sent() as sent:
                value = both(one)[0](*given)
                aligned = spread_cotangent.redistribute(placements=value.placements) if value.ndim else spread_cotangent
                gradients = grad(value, given, aligned)
            assert sent.only_adds_up(given[0]), sent.calls
            if places[1] == by_row:  # what has a number for each example, or the features
                assert all(numbers <= 50 * 3 for _, numbers in sent.calls), sent.calls
            else:  # the gradient of a weight that all have, as DistributedDataParallel sends it
                assert all(numbers <= max(40 * 3, 50) for _, numbers in sent.calls), sent.calls
            assert [array.placements for array in gradients] == [array.placements for array in given]
            for array, expected in zip((value, *gradients), right, strict=True):
                assert type(array) is DTensor
                close(array.full_tensor(), expected)
            if places != twice:  # second derivatives take seconds
                continue
            totals = [function(*some).sum() for function, some in zip(both(one), (given, inputs), strict=True)]
            pairs = zip(totals, (given, inputs), strict=True)
            firsts = [grad(total, some, create_graph=True) for total, some in pairs]
            pairs = zip(firsts, (given, inputs), strict=True)
            seconds = [grad(sum((a**2).sum() for a in first), some) for first, some in pairs]
            for array, expected in zip(*seconds, strict=True):
                close(array.full_tensor(), expected)
    # Sharded along an axis that becomes one with another, and by the cotangent alone: blocks would be gathered.
    for place, of_weights in ((Shard(1), whole), (whole, by_row)):
        traffic = []
        for block in (1, 1 << 23):
            FORMULAS.BLOCK = block
            features, weight = spread(np.ones((4, 6, 3)), place), spread(np.eye(7, 3), whole).requires_grad_()
            with Sent() as sent:
                losses = ul.linear_softmax_nll(features, weight, np.zeros((4, 6), int), reduction="none")
                (losses * spread(np.ones((4, 6)), of_weights)).sum().backward()
            traffic.append(sent.calls)
        assert traffic[0] == traffic[1]
    features, weight = spread(np.ones((4, 2)), whole), spread(np.ones((6, 2)), Shard(1))
    with pytest.raises(ValueError, match=r"linear_weight: placements Shard\(0\), by classes, or Replicate"):
        ul.linear_softmax_nll(features, weight, np.zeros(4, int))
    with pytest.raises(TypeError, match=r"linear_weight: a plain array. Received: a DTensor beside a plain tensor"):
        ul.linear_softmax_nll(features.full_tensor(), weight, np.zeros(4, int))


@pytest.mark.capability("torch", DTENSOR, **OF_LINEAR, looped=True)
def test_dtensor(tmp_path):
    in_processes(spread_over_processes, tmp_path)


def spread_over_a_grid(rank):
    """Examples over one axis of the mesh, classes over the other; or both axes for the same."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    rng, whole, by_row = np.random.default_rng(0), Replicate(), Shard(0)
    n, classes, FORMULAS.BLOCK = 24, 60, 60  # eight examples where each process has a quarter of the classes
    arrays = rng.normal(size=(n, 2)), rng.normal(size=(classes, 2)), rng.normal(size=classes)
    losses = {
        ul.linear_softmax_nll: rng.integers(0, classes, n),
        ul.linear_multilabel_logistic_loss: rng.random((n, classes)),
    }
    for of_features, of_layer in (
        ((by_row, whole), (whole, by_row)),
        ((whole, by_row), (by_row, whole)),
        ((by_row, by_row), (whole, whole)),
        ((whole, whole), (by_row, by_row)),
        ((by_row, Shard(1)), (whole, by_row)),
    ):
        places = of_features, of_layer, of_layer
        for loss, targets in losses.items():
            for reduction in ("mean", "none"):
                plain = [torch.tensor(array, requires_grad=True) for array in arrays]
                spread = [
                    distribute_tensor(torch.tensor(array), mesh, place).requires_grad_()
                    for array, place in zip(arrays, places, strict=True)
                ]
                found = []
                for features, weight, bias in (plain, spread):
                    with Sent() as sent:
                        value = loss(features, weight, targets, linear_bias=bias, reduction=reduction)
                        found.append((value, *grad((value**2).sum(), (features, weight, bias))))
                # A number for each example, the features, or the gradient of a process' own part of the weight.
                bound = 2 * classes if of_layer == (whole, whole) else max(3 * n, classes)
                assert all(numbers <= bound for _, numbers in sent.calls), sent.calls
                assert sent.only_adds_up(spread[0]), sent.calls
                if (of_features, loss, reduction) == ((whole, whole), ul.linear_softmax_nll, "mean"):
                    assert sent.largest == 8 * classes / 4  # a block's logits: all are three times as many
                right, got = found
                close([array.full_tensor() for array in got], list(right))
                assert [array.placements for array in got[1:]] == [array.placements for array in spread]


@pytest.mark.full
def test_dtensor_on_two_axes(tmp_path):
    in_processes(spread_over_a_grid, tmp_path, 4)


DDP, FSDP = "DistributedDataParallel", "fully_shard: weights in parts"
ADDS = {"reduction": "batchmean"}


class Head(torch.nn.Module):
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.bias = None if bias is None else torch.nn.Parameter(torch.tensor(bias))

    def forward(self, function, features):
        return function(features, self.weight, linear_bias=self.bias)


def each_its_examples(row, parallel):
    """Of means over the examples those of all processes together are what one process would have."""
    rank, FORMULAS.BLOCK = torch.distributed.get_rank(), 1
    for sample in samples("torch", row, **OF_LINEAR, fixed=ADDS):
        sample = sample.of(rows=8)
        right = grad(both(sample.beside(torch.tensor))[1](*(inputs := inputs_of(sample))), inputs)
        mine = slice(4 * rank, 4 * rank + 4)
        arrays = {name: array[mine] if array.shape[:1] == (8,) else array for name, array in sample.arrays.items()}
        call = functools.partial(
            sample.loss, targets=sample.as_targets(torch.tensor(sample.targets[mine])), **arrays, **sample.options
        )
        model = parallel(Head(*sample.inputs[1:]))
        model(call, torch.tensor(sample.inputs[0][mine])).backward()
        found = [parameter.grad for parameter in model.parameters()]
        close([a.full_tensor() if hasattr(a, "full_tensor") else a for a in found], list(right[1:]))


def replicated(rank):
    each_its_examples(DDP, torch.nn.parallel.DistributedDataParallel)


def in_parts(rank):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, parallelize_module

    each_its_examples(FSDP, fully_shard)

    # The layer, by either way of docs/transforms.md.
    rng = torch.Generator().manual_seed(20261127)
    head = LinearSoftmaxNLL(3, 7)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    features, targets = torch.randn(4, 3, generator=rng), torch.tensor([0, 6, 2, 3])
    right = value_and_gradients(lambda *_: head(features, targets), list(head.parameters()), torch.tensor(1.0))
    logits = head.logits(features)

    gathered, classes = copy.deepcopy(head), copy.deepcopy(head)
    fully_shard(gathered)
    register_fsdp_forward_method(gathered, "logits")
    mesh, layouts = init_device_mesh("cpu", (2,)), (Replicate(), None)
    parallelize_module(classes, mesh, {"linear": ColwiseParallel()})
    parallelize_module(classes, mesh, PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts))
    for model in (gathered, classes):
        value = model(features, targets)
        value.backward()
        found = [value, *(parameter.grad for parameter in model.parameters())]
        assert found[1].placements == (Shard(0),)
        close([a.full_tensor() if hasattr(a, "full_tensor") else a for a in found], list(right), rtol=1e-5, atol=1e-6)
    close(gathered.logits(features), logits)
    assert classes.logits(features).shape == (4, 4 if rank == 0 else 3)


@pytest.mark.capability("torch", DDP, **OF_LINEAR, looped=True, fixed=ADDS)
def test_ddp(tmp_path):
    in_processes(replicated, tmp_path)


@pytest.mark.capability("torch", FSDP, **OF_LINEAR, looped=True, fixed=ADDS)
def test_fsdp(tmp_path):
    in_processes(in_parts, tmp_path)
