"""PyTorch: its transformations, compilers, exporters and devices, on these losses as on its own."""

import datetime
import functools
import os
import sys
import time

import mpmath
import numpy as np
import pytest
import torch
from capabilities import samples
from crossed import close
from functorch.compile import aot_function, nop
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import unilabel as ul

UNREDUCED = {"reduction": "none"}


@pytest.fixture
def sample(sample):
    """With operands that are tensors."""
    return sample.beside(torch.tensor)


def logits(sample):
    return torch.tensor(sample.x, requires_grad=True)


def check(got, right, ulp=16):
    """A plain float64 tensor on the CPU with these numbers."""
    assert type(got) is torch.Tensor
    assert got.dtype is torch.float64
    assert got.device.type == "cpu"
    close(got.detach(), right, ulp=ulp)


def called(sample, loss=None):
    """The call as a function of all its arrays, as compilers and exporters want it."""
    loss = loss or sample.loss
    return lambda x, targets, arrays: loss(x, sample.as_targets(targets), **arrays, **sample.options)


def arrays_of(sample):
    """What that function is called with."""
    return logits(sample), torch.tensor(sample.targets), sample.arrays


def check_called(function, sample):
    """Value and gradient of what was made of `called(sample)`."""
    x, targets, arrays = arrays_of(sample)
    value = function(x, targets, arrays)
    value.backward(torch.tensor(sample.cotangent))
    check(value, sample.value)
    check(x.grad, sample.pulled_back)


def other(sample, **lengths):
    """The same call with other lengths and numbers."""
    return sample.of(**lengths).beside(torch.tensor)


def identity(classes):
    """A model whose outputs are its inputs."""
    model = torch.nn.Linear(classes, classes, dtype=torch.float64)
    torch.nn.init.eye_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


# --- Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "backward", pairs=True)
def test_backward(sample):
    x = logits(sample)
    value = sample(x)
    value.backward(torch.tensor(sample.cotangent))
    check(value, sample.value)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "value_and_grad, grad_and_hess")
def test_closed_forms(sample):
    value, gradient = sample.closed(ul.value_and_grad)(torch.tensor(sample.x))
    check(value, sample.value)
    check(gradient, sample.gradient)
    if sample.row["reduction"] == "sum":
        gradient, diagonal = sample.closed(ul.grad_and_hess)(torch.tensor(sample.x))
        check(gradient, sample.gradient)
        check(diagonal, sample.hessian)


def float_inputs(sample):
    """A function of all that is a float (logits, targets, weights, smoothing), and where it is differentiated."""
    given = {name: array for name, array in sample.arrays.items() if array.is_floating_point()}
    soft = sample.row["targets"] in ("float", "distribution")
    inputs = [torch.tensor(sample.x), *([torch.tensor(sample.targets)] if soft else []), *given.values()]

    def function(x, *inputs):
        targets, inputs = (inputs[0], inputs[1:]) if soft else (sample.targets, inputs)
        return sample(x, targets, **dict(zip(given, inputs, strict=True)))

    return function, tuple(array.clone().requires_grad_() for array in inputs)


@pytest.mark.capability("torch", "gradcheck, forward, reverse and batched")
def test_gradcheck(sample):
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    function, inputs = float_inputs(sample)
    assert gradcheck(sample, inputs[:1], **modes)  # of the logits alone: the fast path
    assert gradcheck(function, inputs, **modes)


@pytest.mark.capability("torch", "gradgradcheck, forward over reverse and batched")
def test_gradgradcheck(sample):
    modes = {"check_fwd_over_rev": True, "check_batched_grad": True, "gen_non_contig_grad_outputs": True}
    function, inputs = float_inputs(sample)
    assert gradgradcheck(sample, inputs[:1], **modes)
    assert gradgradcheck(function, inputs, **modes)


@pytest.mark.capability("torch", "autograd.grad with is_grads_batched")
def test_batched_cotangents(sample):
    x = logits(sample)
    value = sample(x)
    units = torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)
    (rows,) = grad(value, x, units, is_grads_batched=True)
    check(rows.reshape(*value.shape, *x.shape), sample.jacobian)


@pytest.mark.capability("torch", "double backward (create_graph)")
@pytest.mark.parametrize("is_grads_batched", [False, True])
def test_double_backward(sample, is_grads_batched):
    x, cotangent = logits(sample), torch.tensor(sample.cotangent, requires_grad=True)
    (pulled,) = grad(sample(x), x, cotangent, create_graph=True)
    check(pulled, sample.pulled_back)
    direction = np.random.default_rng(1).uniform(0.5, 2, sample.x.shape)
    (pushed,) = grad(pulled, cotangent, torch.tensor(direction))  # the other way: what the losses change by
    right = sample.jacobian.reshape(-1, direction.size) @ direction.ravel()
    np.testing.assert_allclose(pushed.ravel(), right, rtol=1e-13, atol=1e-14)

    (gradient,) = grad(sample(x).sum(), x, create_graph=True)
    check(gradient, sample.gradient)
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    if is_grads_batched:
        (second,) = grad(gradient, x, units, is_grads_batched=True)
    else:
        second = torch.stack([grad(gradient, x, unit, retain_graph=True)[0] for unit in units])
    sample.check_hessian(second.reshape(*x.shape, *x.shape))


@pytest.mark.capability("torch", "backward twice (retain_graph)")
def test_backward_twice(sample):
    x = logits(sample)
    value = sample(x)
    cotangent = torch.tensor(sample.cotangent)
    value.backward(cotangent, retain_graph=True)
    value.backward(cotangent)
    check(x.grad, sample.pulled_back.scaled(2))
    if value.grad_fn.name() == "_LossBackward":
        with pytest.raises(RuntimeError, match="a second time"):
            value.backward(cotangent)


@pytest.mark.capability("torch", "func.vmap over autograd.grad")
def test_several_cotangents(sample):
    x = logits(sample)
    value = sample(x)
    cotangents = torch.arange(1.0, 3.0, dtype=x.dtype).reshape(2, *[1] * value.ndim) * torch.tensor(sample.cotangent)
    gradients = vmap(lambda cotangent: grad(value, x, cotangent, retain_graph=True)[0])(cotangents)
    for factor, gradient in zip((1, 2), gradients, strict=True):
        check(gradient, sample.pulled_back.scaled(factor))


@pytest.mark.capability("torch", "tensor hooks")
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks(sample, create_graph):
    """Each is called once, with the right gradient, and may change it."""
    leaf, seen = logits(sample), []
    x = leaf * 1
    value = sample(x)
    value.register_hook(lambda cotangent: seen.append(cotangent) or 2 * cotangent)
    x.register_hook(lambda gradient: seen.append(gradient) or -gradient)
    (result,) = grad(value, leaf, torch.tensor(sample.cotangent), create_graph=create_graph)
    assert len(seen) == 2
    check(seen[0], sample.cotangent)
    check(seen[1], sample.pulled_back.scaled(2))
    check(result, sample.pulled_back.scaled(-2))


@pytest.mark.capability("torch", "anomaly mode")
def test_anomaly_mode(sample):
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        test_backward(sample)


@pytest.mark.capability("torch", "checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(sample, use_reentrant):
    x = logits(sample)
    value = checkpoint(sample, x, use_reentrant=use_reentrant)
    value.backward(torch.tensor(sample.cotangent))
    check(value, sample.value)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "saved-tensor hooks (save_on_cpu)")
def test_saved_tensor_hooks(sample):
    with torch.autograd.graph.save_on_cpu():
        test_backward(sample)
    packed, x = [], logits(sample)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda array: packed.append(array) or array.clone(), lambda x: x)
    with hooks:
        value = sample(x)
    value.backward(torch.tensor(sample.cotangent))
    assert any(array.numel() == x.numel() for array in packed)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "no_grad and inference_mode")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(sample, mode):
    x = logits(sample)
    with mode():
        value = sample(x)
        assert value.is_inference() == (mode is torch.inference_mode)
    assert not value.requires_grad
    check(value, sample.value)
    with torch.inference_mode():
        ours = torch.tensor(sample.x)
    check(sample(ours), sample.value)  # inference tensors outside of the mode


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "func.grad, vjp, jvp")
def test_func_grad(sample):
    x, cotangent = torch.tensor(sample.x), torch.tensor(sample.cotangent)
    check(torch.func.grad(lambda x: sample(x).sum())(x), sample.gradient)
    value, pull = vjp(sample, x)
    check(value, sample.value)
    check(pull(cotangent)[0], sample.pulled_back)
    for tangent in (torch.ones_like(x), torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)):
        value, change = jvp(sample, (x,), (tangent,))
        check(value, sample.value)
        right = sample.jacobian.reshape(-1, x.numel()) @ tangent.numpy().ravel()
        np.testing.assert_allclose(change.ravel(), right, rtol=1e-13, atol=1e-14)


@pytest.mark.capability("torch", "func.vmap")
def test_vmap(sample):
    """Of two calls at once: over all arrays, and over logits alone, which need not have their own axis first."""
    two = [sample, other(sample)]
    x, y = (torch.stack([torch.tensor(getattr(one, name)) for one in two]) for name in ("x", "targets"))
    arrays = {name: torch.stack([one.arrays[name] for one in two]) for name in sample.arrays}
    right = np.stack([one.value for one in two])
    check(vmap(called(sample))(x, y, arrays), right)
    check(vmap(vmap(called(sample)))(x[None], y[None], {name: a[None] for name, a in arrays.items()})[0], right)
    gradient = vmap(torch.func.grad(lambda *inputs: called(sample)(*inputs).sum()))(x, y, arrays)
    for got, one in zip(gradient, two, strict=True):
        check(got, one.gradient)
    same = torch.stack([torch.tensor(sample.x)] * 2, -1)
    check(vmap(sample, in_dims=-1)(same), np.stack([sample.value] * 2))


@pytest.mark.capability("torch", "func.jacrev, jacfwd")
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian(sample, transform):
    check(transform(sample)(torch.tensor(sample.x)), sample.jacobian)


@pytest.mark.capability("torch", "func.hessian")
@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))])
def test_hessian(sample, transform):
    sample.check_hessian(transform(lambda x: sample(x).sum())(torch.tensor(sample.x)))


@pytest.mark.capability("torch", "gradients of each example: vmap(grad) of functional_call", fixed={"axis": "last"})
def test_gradients_of_each_example(sample):
    """Each example is a call of its own: its sum is what all together make of it."""
    model = identity(sample.x.shape[1])
    parameters = dict(model.named_parameters())
    options = sample.options | {"reduction": "sum"}
    of_each = {name: array for name, array in sample.arrays.items() if len(array.shape) and array.shape[0] == 4}
    of_all = {name: array for name, array in sample.arrays.items() if name not in of_each}

    def loss(parameters, x, targets, arrays):
        where = {"where": of_all["where"][0]} if "where" in of_all else {}
        return sample.loss(
            functional_call(model, parameters, (x,)), sample.as_targets(targets), **options, **arrays, **of_all | where
        )

    inputs = torch.tensor(sample.x), torch.tensor(sample.targets), of_each
    each = vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *inputs)
    right = sample.gradient_of_sum
    check(each["bias"], right)
    check(each["weight"], right[:, :, None] * sample.x[:, None], ulp=64)


def test_vmap_over_weights(sample):
    x = torch.tensor(sample.x)
    many = np.array([[0.5, 1.0, 2.0], [3.0, 0.25, 1.5]])
    own = many[:, sample.targets] if sample.per_example else many[:, None]  # of each loss
    weights = torch.tensor(many)
    check(vmap(lambda weight: sample(x, weight=weight))(weights), np.asarray(sample.value) * own)
    each = own[..., None] if sample.per_example else own  # of each row
    gradient = vmap(lambda weight: torch.func.grad(lambda x: sample(x, weight=weight).sum())(x))(weights)
    check(gradient, np.asarray(sample.gradient) * each)


def test_one_element():
    """Gradients of each example of a binary model, whose logits have no dimensions."""
    x, z = torch.tensor([-2.0, 0.0, 17.0], dtype=torch.float64), torch.tensor([0, 1, 1])
    for reduction in ("none", "sum", "mean", "batchmean"):
        loss = functools.partial(ul.multilabel_logistic_loss, reduction=reduction)
        right = torch.func.grad(lambda x: ul.multilabel_logistic_loss(x, z, reduction="sum"))(x)
        check(vmap(torch.func.grad(loss))(x, z), right.numpy())
        check(vmap(loss)(x, z), ul.multilabel_logistic_loss(x, z, reduction="none").numpy())


def test_a_wrong_index_is_nan_where_the_clamp_counts_too():
    """By plain autodiff: the clamp has no derivative of its own."""
    probs, targets = torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.25, 0.75]]), torch.tensor([3, 2])
    gradient = torch.func.grad(lambda p: ul.cross_entropy(p, targets, reduction="sum"))(probs)
    np.testing.assert_array_equal(gradient, [[np.nan] * 3, [0, 0, -1 / np.float32(0.75)]])


# --- Second derivatives of confident predictions ----------------------------------------------------------------------

CONFIDENT = [[17.0, 0.0], [60.0, 0.0, -3.0], [2.0, 1.9, -40.0], [0.0, 0.0, 0.0]]


def right_hessian(x):
    """Of a softmax: p_i (1 - p_i) on the diagonal, -p_i p_j beside it, in 200 bits."""
    with mpmath.workprec(200):
        e = [mpmath.exp(mpmath.mpf(number)) for number in x]
        p = [number / sum(e) for number in e]
        each = range(len(p))
        entries = [[p[i] * ((1 - p[i]) if i == j else -p[j]) for j in each] for i in each]
        return np.array([[float(number) for number in row] for row in entries])


def by_double_backward(function, x):
    x = x.clone().requires_grad_()
    (gradient,) = grad(function(x), x, create_graph=True)
    return torch.stack([grad(derivative, x, retain_graph=True)[0] for derivative in gradient])


def by_compiled_double_backward(function, x):
    """With a backend that differentiates what it is given as if it were eager."""
    return by_double_backward(torch.compile(function, backend="eager", fullgraph=True), x)


def by_compiled_hessian(function, x):
    return torch.compile(hessian(function), backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize(
    "method", [by_double_backward, by_compiled_double_backward, lambda f, x: hessian(f)(x), by_compiled_hessian]
)
def test_second_derivatives_keep_their_digits(method):
    for x in CONFIDENT[:1] if method is by_compiled_hessian else CONFIDENT:
        torch.compiler.reset()
        for y in range(len(x)):
            target = torch.tensor(y)
            second = method(lambda x: ul.softmax_nll(x, target), torch.tensor(x, dtype=torch.float64))  # noqa: B023
            check(second, right_hessian(x))


@pytest.mark.parametrize("method", [by_double_backward, lambda f, x: hessian(f)(x)])
def test_second_derivatives_of_sigmoids_keep_their_digits(method):
    x = [-60.0, -17.0, 0.0, 17.0, 60.0]
    right = np.diag([right_hessian([number, 0.0])[0, 0] for number in x])
    for z in (0, 1):
        targets = torch.full((5,), z)
        second = method(
            lambda x: ul.multilabel_logistic_loss(x, targets, reduction="sum"),  # noqa: B023
            torch.tensor(x, dtype=torch.float64),
        )
        check(second, right)


@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, lambda f: functools.partial(torch.autograd.functional.jacobian, f)]
)
def test_derivatives_of_activations_keep_their_digits(transform):
    for x in CONFIDENT:
        x, right = torch.tensor(x, dtype=torch.float64), right_hessian(x)
        check(transform(ul.softmax)(x), right)
        with mpmath.workprec(200):
            p = [mpmath.exp(number) for number in x.tolist()]
            p = [float(number / sum(p)) for number in p]
        np.testing.assert_allclose(transform(ul.log_softmax)(x), right / np.array(p)[:, None], rtol=1e-14, atol=0)


# --- Compilers and exporters ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch._dynamo.reset()


def check_lengths(function, *calls):
    """One program for calls of several lengths: what was made for the first, without making anything again."""
    check_called(function, calls[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for sample in calls[1:]:
            check_called(function, sample)


def open_axes(sample, longer):
    """For each array, its axes whose lengths differ between two calls."""

    def axes(a, b):
        return [axis for axis, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m]

    given = {name: axes(array, longer.arrays[name]) for name, array in sample.arrays.items()}
    return axes(sample.x, longer.x), axes(sample.targets, longer.targets), given


HEADLINE = ("multilabel_logistic_loss", "softmax_nll")  # where compiling takes seconds


@pytest.mark.capability("torch", "compile (inductor)", losses=HEADLINE)
def test_compile(sample):
    check_called(torch.compile(called(sample), fullgraph=True, dynamic=False), sample)


@pytest.mark.parametrize("sample", ["cross_entropy", "nll"], indirect=True)
def test_compile_a_wrong_index(sample):
    """Its example has a gradient of NaN, in every class: inductor takes 0 * x for 0."""
    targets = torch.tensor(sample.targets).index_fill(0, torch.tensor([0]), -1)
    x = logits(sample)
    gradient = grad(torch.compile(sample.loss, fullgraph=True)(x, targets), x)[0]
    assert gradient[0].isnan().all()
    assert gradient[1:].isfinite().all()


@pytest.mark.capability("torch", "compile(dynamic=True) (inductor), any length", losses=HEADLINE)
def test_compile_dynamic(sample):
    compiled = torch.compile(called(sample), fullgraph=True, dynamic=True)
    check_lengths(compiled, sample, other(sample, rows=3), other(sample, rows=7, classes=6))


@pytest.mark.capability("torch", "compile(dynamic=True), any length (aot_eager, eager)", brief=True)
@pytest.mark.parametrize(("backend", "fullgraph"), [("aot_eager", True), ("eager", False)])
def test_compile_any_length(sample, backend, fullgraph):
    compiled = torch.compile(called(sample), backend=backend, fullgraph=fullgraph, dynamic=True)
    check_lengths(compiled, sample, other(sample, rows=7, classes=6))


@pytest.mark.capability("torch", "compile, mark_dynamic (aot_eager)", brief=True)
def test_compile_marked_dynamic(sample):
    compiled = torch.compile(called(sample), backend="aot_eager", fullgraph=True)
    longer = other(sample, rows=7, classes=6)
    of_x, of_targets, of_arrays = open_axes(sample, longer)

    def marked(x, targets, arrays):
        marks = [(x, of_x), (targets, of_targets), *((arrays[name], of_arrays[name]) for name in arrays)]
        for array, axes in marks:
            torch._dynamo.mark_dynamic(array, axes)
        return compiled(x, targets, arrays)

    check_lengths(marked, sample, longer)


@pytest.mark.capability("torch", "compile of value_and_grad and grad_and_hess, any length (aot_eager)", brief=True)
def test_compile_closed_forms(sample):
    def both(x, targets, arrays):
        first = called(sample, ul.value_and_grad(sample.loss))(x, targets, arrays)
        return first, ul.grad_and_hess(sample.loss)(
            x, sample.as_targets(targets), **arrays, **sample.options | {"reduction": "sum"}
        )

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for one in (sample, other(sample, rows=7, classes=6)):
        (value, gradient), (gradient_of_sum, diagonal) = compiled(*arrays_of(one))
        check(value, one.value)
        check(gradient, one.gradient)
        check(gradient_of_sum, one.gradient_of_sum)
        assert diagonal.shape == gradient_of_sum.shape
        if one.row["reduction"] == "sum":
            check(diagonal, one.hessian)


@pytest.mark.capability("torch", "compile of a training step (inductor)", losses=HEADLINE)
def test_compile_training_step(sample):
    classes = sample.x.shape[-1]
    model = identity(classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    forward = torch.compile(lambda x, *inputs: called(sample)(model(x), *inputs).sum(), fullgraph=True)
    update = torch.compile(optimizer.step)
    loss = forward(torch.tensor(sample.x), torch.tensor(sample.targets), sample.arrays)
    loss.backward()
    update()
    check(loss, np.sum(sample.value))
    gradient, x = (array.reshape(-1, classes) for array in (np.asarray(sample.gradient), sample.x))
    np.testing.assert_allclose(model.bias.detach(), -0.125 * gradient.sum(0), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(model.weight.detach(), np.eye(classes) - 0.125 * gradient.T @ x, rtol=1e-14, atol=1e-15)


@pytest.mark.capability("torch", "compile, of transformed losses (aot_eager)", brief=True)
@pytest.mark.parametrize("recorded", [False, True])
def test_compile_transformed(sample, recorded):
    """A compiled loss has a backward pass of its own, which is not for what is differentiated on the way."""
    x, targets = torch.tensor(sample.x, requires_grad=recorded), torch.tensor(sample.targets)

    def loss(x):
        return sample(x, targets)

    def total(x):
        return loss(x).sum()

    # Where the form that is not for autodiff has another derivative.
    odd = torch.zeros_like(x) if sample.name == "multilabel_logistic_loss" else x

    def each(x, odd):
        return (
            torch.func.grad(total)(x),
            vmap(loss)(torch.stack([x, x])),
            jvp(total, (x,), (x.detach(),))[1],
            torch.func.grad(total)(odd),
        )

    gradient, values, change, at_odd = torch.compile(each, backend="aot_eager", fullgraph=True)(x, odd)
    check(gradient, sample.gradient)
    check(values, np.stack([sample.value] * 2))
    np.testing.assert_allclose(change.detach(), (np.asarray(sample.gradient) * sample.x).sum(), rtol=1e-13, atol=1e-14)
    closed = sample.closed(ul.value_and_grad)(odd.detach())[1].numpy()
    np.testing.assert_allclose(at_odd.detach(), closed, rtol=1e-13, atol=1e-14)
    check(torch.compile(loss, backend="aot_eager", fullgraph=True)(x.detach()), sample.value)


@pytest.mark.capability("torch", "compile, derivative by targets, weights and smoothing (aot_eager)", brief=True)
def test_compile_other_gradients(sample):
    function, inputs = float_inputs(sample)
    right = grad(function(*inputs), inputs, torch.tensor(sample.cotangent))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, exact in zip(grad(compiled(*inputs), inputs, torch.tensor(sample.cotangent)), right, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-13, atol=1e-14)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, targets, arrays):
        return self.function(x, targets, arrays)


def exported(sample, **options):
    """A program for any number of examples and classes."""
    batch, auto = torch.export.Dim("batch"), torch.export.Dim.AUTO
    of_x, of_targets, of_arrays = open_axes(sample, other(sample, rows=7, classes=6))

    def spec(axes):
        return {axis: auto if axis else batch for axis in axes}

    # Classes: AUTO, as their number is an axis of the logits, or a multiple of one, and that of a weight.
    arrays = {name: dict.fromkeys(axes, auto) for name, axes in of_arrays.items()}
    shapes = {"x": spec(of_x), "targets": spec(of_targets), "arrays": arrays}
    return torch.export.export(Module(called(sample)), arrays_of(sample), dynamic_shapes=shapes, **options)


@pytest.mark.capability("torch", "export, any length", brief=True)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own copies of what it deprecates
def test_export(sample, strict):
    program = exported(sample, strict=strict)
    for module in (program.module(), program.run_decompositions().module()):
        check_called(module, sample)
        check_called(module, other(sample, rows=7, classes=6))


@pytest.mark.capability("torch", "export with every length dynamic (Dim.DYNAMIC)", brief=True, fixed={"axis": "last"})
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_export_dynamic(sample):
    """Where nothing may be decided by a length, and none of them made a constant."""
    longer = other(sample, rows=7, classes=6)
    of_x, of_targets, of_arrays = open_axes(sample, longer)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"x": dict.fromkeys(of_x, dynamic), "targets": dict.fromkeys(of_targets, dynamic)}
    shapes["arrays"] = {name: dict.fromkeys(axes, dynamic) for name, axes in of_arrays.items()}
    program = torch.export.export(Module(called(sample)), arrays_of(sample), dynamic_shapes=shapes)
    check_called(program.module(), longer)


@pytest.mark.capability("torch", "AOTInductor, any length", losses=("softmax_nll",), brief=True)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_aot_inductor(sample, tmp_path):
    path = torch._inductor.aoti_compile_and_package(exported(sample), package_path=str(tmp_path / "loss.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for one in (sample, other(sample, rows=7, classes=6)):
        x, targets, arrays = arrays_of(one)
        check(run(x.detach(), targets, arrays), one.value)


def value_and_gradient(sample):
    """Both, from one function, as autograd makes them."""

    def both(x, targets, arrays):
        x = x.detach().requires_grad_()
        value = called(sample)(x, targets, arrays)
        return value.detach(), grad(value.sum(), x)[0]

    return both


@pytest.mark.capability("torch", "make_fx, symbolic too")
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(sample, mode):
    traced = make_fx(value_and_gradient(sample), tracing_mode=mode)(*arrays_of(sample))
    for one in (sample, other(sample, rows=7, classes=6)) if mode == "symbolic" else (sample,):
        value, gradient = traced(*arrays_of(one))
        check(value, one.value)
        check(gradient, one.gradient)


@pytest.mark.capability("torch", "make_fx, then autograd of the graph")
def test_gradient_of_a_graph(sample):
    """The graph of the loss alone: differentiated later, it must not have lost what the gradient needs."""
    x, targets, arrays = arrays_of(sample)
    check_called(make_fx(called(sample))(x.detach(), targets, arrays), sample)
    if sample.name == "softmax_nll":
        x, y = torch.tensor([[40.0, 0.0]], dtype=torch.float64, requires_grad=True), torch.tensor([0])
        traced = make_fx(lambda x, y: ul.softmax_nll(x, y))(x.detach(), y)
        check(grad(traced(x, y), x)[0], [[-np.exp(-40), np.exp(-40)]])


@pytest.mark.capability("torch", "aot_function(dynamic=True)", brief=True)
def test_aot_function(sample):
    function = aot_function(called(sample), fw_compiler=nop, dynamic=True)
    for one in (sample, other(sample, rows=7, classes=6)):
        check_called(function, one)


@pytest.mark.parametrize("sample", ["softmax_nll", "multilabel_logistic_loss"], indirect=True)
def test_smoothing_that_changes_under_compile(sample):
    """A schedule of it, as a Python number: the right loss for each."""
    x, y = torch.tensor(sample.x), torch.tensor(sample.targets)
    compiled = torch.compile(lambda x, y, s: sample(x, y, label_smoothing=s), backend="aot_eager", fullgraph=True)
    for smoothing in (0.1, 0.2, 0.0, 0.3):
        check(compiled(x, y, smoothing), sample(x, label_smoothing=smoothing).numpy())


# --- Tensors without data, modes, subclasses --------------------------------------------------------------------------


@pytest.mark.capability("torch", "FakeTensorMode, with symbolic lengths too")
@pytest.mark.parametrize("symbolic", [False, True])
def test_fake_tensors(sample, symbolic):
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    with mode:
        x, targets, arrays = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arrays_of(sample))
        for given in (targets, sample.targets) if not symbolic else (targets,):
            value = called(sample)(x, given, arrays)
            (gradient,) = grad(value.sum(), x)
            closed = sample.closed(ul.value_and_grad)(x, given, **arrays)
            for fake, right in zip((value, gradient, *closed), (sample.value, sample.x) * 2, strict=True):
                assert type(fake) is FakeTensor
                assert (fake.shape, fake.dtype, fake.device.type) == (right.shape, torch.float64, "cpu")


@pytest.mark.capability("torch", "meta tensors")
def test_meta_tensors(sample):
    """It is an error there to read a value, or to compute with an array that was made on another device."""
    x = torch.tensor(sample.x, device="meta", requires_grad=True)
    assert sample(x.to(torch.bfloat16)).dtype is torch.bfloat16
    sample = sample.beside(lambda array: array.to("meta"))
    for targets in (sample.targets, torch.tensor(sample.targets, device="meta")):
        value = sample(x, targets)
        (gradient,) = grad(value, x, torch.ones_like(value), create_graph=True)
        (second,) = grad(gradient.sum(), x)
        closed = sample.closed(ul.value_and_grad)(x, targets)
        for meta, right in zip(
            (value, gradient, second, *closed), (sample.value, *[sample.x] * 2, sample.value, sample.x), strict=True
        ):
            assert type(meta) is torch.Tensor
            assert (meta.shape, meta.dtype, meta.device.type) == (right.shape, torch.float64, "meta")


def in_steps(values):
    """Whether autograd has each operation, not the closed form: a mode or subclass may have its own idea of each."""
    return "_Loss" not in values.grad_fn.name()


def test_closed_form(sample):
    x = logits(sample)
    assert not in_steps(sample(x))
    with Counting(), torch.device("cpu"):  # neither changes what is computed
        assert not in_steps(sample(x))


class Counting(TorchDispatchMode):
    """Counts the operations that run, and changes none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


class Named(TorchFunctionMode):
    """Notes the functions that are called, and changes none."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(function)
        return function(*args, **kwargs or {})


@pytest.mark.capability("torch", "TorchDispatchMode")
def test_dispatch_mode(sample):
    with Counting() as mode:
        x = logits(sample)
        value = sample(x)
        before = mode.count
        value.backward(torch.tensor(sample.cotangent))
    assert mode.count > before > 2
    check(value, sample.value)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "TorchFunctionMode")
def test_function_mode(sample):
    x = logits(sample)
    with Named() as mode:
        value = sample(x)
    assert mode.called
    assert in_steps(value)
    check(value, sample.value)
    value.backward(torch.tensor(sample.cotangent))
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "another default device")
def test_default_device(sample):
    """Does not count: results are where the logits are."""
    x, cotangent = logits(sample), torch.tensor(sample.cotangent)
    with torch.device("meta"):
        value = sample(x)
        (gradient,) = grad(value, x, cotangent)
    check(value, sample.value)
    check(gradient, sample.pulled_back)


class Kind(torch.Tensor):
    """A subclass by __torch_function__: what comes of it is of its type."""


class Wrapped(torch.Tensor):
    """A subclass by __torch_dispatch__, with the numbers in a tensor within."""

    @staticmethod
    def __new__(cls, inner):
        kept = {"dtype": inner.dtype, "device": inner.device, "requires_grad": inner.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **kept)

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, function(*args, **kwargs))


@pytest.mark.capability("torch", "subclass by __torch_function__")
def test_function_subclass(sample):
    x = torch.tensor(sample.x).as_subclass(Kind).requires_grad_()
    value = sample(x)
    assert type(value) is type(torch.sin(x)) is Kind
    assert in_steps(value)
    (gradient,) = grad(value, x, torch.tensor(sample.cotangent))
    check(value.detach().as_subclass(torch.Tensor), sample.value)
    check(gradient.as_subclass(torch.Tensor), sample.pulled_back)


@pytest.mark.capability("torch", "subclass by __torch_dispatch__")
@pytest.mark.parametrize("which", ["logits", "targets", "all"])
def test_wrapper_subclass(sample, which):
    leaf, targets = logits(sample), torch.tensor(sample.targets)
    x = leaf if which == "targets" else Wrapped(leaf.detach()).requires_grad_()
    sample = sample.beside(Wrapped) if which == "all" else sample
    value = sample(x, targets if which == "logits" else Wrapped(targets))
    assert type(value) is Wrapped
    assert in_steps(value)
    (gradient,) = grad(value, x, Wrapped(torch.tensor(sample.cotangent)))
    check(value.detach().inner, sample.value)
    check(gradient.inner if type(gradient) is Wrapped else gradient, sample.pulled_back)


# --- Autocast ---------------------------------------------------------------------------------------------------------


def native(sample, x):
    """The losses that torch has itself, on its own kind of targets."""
    y, z = torch.zeros(len(x), dtype=torch.int64), torch.zeros_like(x)
    return {
        "multilabel_logistic_loss": lambda: F.binary_cross_entropy_with_logits(x, z, reduction="none"),
        "softmax_nll": lambda: F.cross_entropy(x, z, reduction="none"),
        "binary_cross_entropy": lambda: F.binary_cross_entropy(x, z, reduction="none"),
        "nll": lambda: F.nll_loss(x.flatten(1), y, reduction="none"),
    }.get(sample.name, lambda: torch.empty(0, dtype=torch.float32))()


@pytest.mark.capability("torch", "autocast to bfloat16, of value_and_grad and grad_and_hess too")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(sample, dtype):
    """float32 losses of half-precision logits, not rounded: as cross_entropy, nll_loss and both of BCE have it."""
    exact = torch.tensor(sample.x).to(dtype).double()  # what bfloat16 makes of the logits is right in float64
    right = sample(exact.requires_grad_())
    (gradient,) = grad(right, exact, torch.tensor(sample.cotangent))
    closed = sample.closed(ul.value_and_grad)(exact.detach())
    x = exact.detach().to(dtype).requires_grad_()
    assert sample(x).dtype is dtype  # outside
    with torch.autocast("cpu", dtype):
        value = sample(x)
        assert value.dtype is native(sample, x).dtype is torch.float32
        assert sample(exact).dtype is torch.float64
        forms = sample.closed(ul.value_and_grad)(x)
        of_sum = sample.closed(ul.grad_and_hess)(x, reduction="sum")
    value.backward(torch.tensor(sample.cotangent, dtype=torch.float32))
    assert x.grad.dtype is dtype
    terms = np.abs(sample.pulled_back.terms).max()
    close(value.detach(), right.detach().numpy(), "float32", ulp=8)
    np.testing.assert_allclose(x.grad.double(), gradient, rtol=2 * torch.finfo(dtype).eps, atol=terms * 1e-6)
    for got, exact in zip(forms, closed, strict=True):
        assert got.dtype is torch.float32
        np.testing.assert_allclose(got.double(), exact, rtol=1e-6, atol=terms * 1e-6)
    assert [array.dtype for array in of_sum] == [torch.float32] * 2


# --- Several processes ------------------------------------------------------------------------------------------------


def in_processes(function, folder, count=2):
    """Run function(rank) in each of some processes that reach each other; what fails there fails here."""
    started = torch.multiprocessing.spawn(joined, (function, str(folder / "store"), count), nprocs=count, join=False)
    try:
        deadline = time.monotonic() + 300
        while not started.join(timeout=5):
            assert time.monotonic() < deadline, "no answer in 300 seconds"
    finally:
        for process in started.processes:
            process.kill()


def joined(rank, function, store, count):
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    minute = datetime.timedelta(minutes=1)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": count}
    torch.distributed.init_process_group("gloo", **place, timeout=minute)
    function(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # Gloo's threads may not be joined by now, and abort an interpreter that ends


def spread_over_processes(rank):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))

    def spread(array, place):
        return distribute_tensor(torch.as_tensor(array), mesh, [place])

    def whole(array, right):
        assert type(array) is DTensor
        check(array.detach().full_tensor(), right)

    for sample in samples("torch", DTENSOR):
        class_axis = {"last": 1, "middle": 1, "two": 2}[sample.row["axis"]]
        for axis in (0, class_axis):  # classes on 2 and 1
            x = spread(sample.x, Shard(axis)).requires_grad_()
            indices = sample.row["targets"] in ("indices", "positives")
            place = Replicate() if indices and axis else Shard(axis)
            replicated = sample.beside(lambda array: spread(array, Replicate()))
            for call, targets in ((replicated, spread(sample.targets, place)), (sample, sample.targets)):
                cotangent = spread(sample.cotangent, Replicate())
                with CommDebugMode() as sent:
                    value = call(x, targets)
                    aligned = cotangent.redistribute(placements=value.placements) if value.ndim else cotangent
                    (gradient,) = grad(value, x, aligned)
                whole(value, sample.value)
                whole(gradient, sample.pulled_back)
                # Numbers of a row at most, maxima and sums: no logits. (Two class axes are made one by gathering.)
                if axis < 2:
                    assert {str(kind) for kind in sent.get_comm_counts()} <= {"c10d_functional.all_reduce"}
                    assert (
                        gradient.placements == (Shard(axis),) or sample.name == "nll"
                    )  # which need not see the logits
                whole(call(x.detach(), targets), sample.value)
                value, gradient = call.closed(ul.value_and_grad)(x.detach(), targets)
                whole(value, sample.value)
                whole(gradient, sample.gradient)
    for sample in samples("torch", DTENSOR)[:1]:
        x = spread(sample.x, Shard(0))
        whole(sample(x, validate=True), sample.value)
        with pytest.raises(ValueError, match=r"targets: values from 0 to 1. Received: 2.0 at \(3, 2\)"):
            sample(x, np.where(np.arange(12).reshape(4, 3) == 11, 2, 0), validate=True)
        with pytest.raises(TypeError, match=r"targets: a plain array. Received: a DTensor beside a plain tensor"):
            sample(torch.tensor(sample.x), spread(sample.targets, Shard(0)))


DTENSOR = "DTensor, sharded by examples or classes"


@pytest.mark.capability("torch", DTENSOR, looped=True)
def test_dtensor(tmp_path):
    in_processes(spread_over_processes, tmp_path)


DDP = "DistributedDataParallel"


def each_its_examples(rank):
    """Of means over the examples, or sums, those of all processes together are what one process would have."""
    for sample in samples("torch", DDP, fixed={"reduction": "batchmean", "axis": "last"}):
        classes = sample.x.shape[1]
        model = torch.nn.parallel.DistributedDataParallel(identity(classes))
        mine = slice(2 * rank, 2 * rank + 2)
        of_each = {name: array[mine] if array.shape[:1] == (4,) else array for name, array in sample.arrays.items()}
        x, targets = torch.tensor(sample.x[mine]), torch.tensor(sample.targets[mine])
        sample.loss(model(x), sample.as_targets(targets), **sample.options, **of_each).backward()
        right = np.asarray(sample.gradient)
        np.testing.assert_allclose(model.module.bias.grad, right.sum(0), rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(model.module.weight.grad, right.T @ sample.x, rtol=1e-13, atol=1e-15)


@pytest.mark.capability("torch", DDP, looped=True, fixed={"reduction": "batchmean", "axis": "last"})
def test_ddp(tmp_path):
    in_processes(each_its_examples, tmp_path)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def on_cuda(sample):
    x, targets, cotangent = (
        torch.tensor(array, device="cuda") for array in (sample.x, sample.targets, sample.cotangent)
    )
    return sample.beside(lambda array: array.to("cuda")), x.requires_grad_(), targets, cotangent


def check_on_cuda(got, right):
    assert (type(got), got.dtype, got.device.type) == (torch.Tensor, torch.float64, "cuda")
    close(got.detach().cpu(), right)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it does not see all
@pytest.mark.capability("torch", "CUDA, with no hidden synchronisation")
def test_cuda(sample):
    sample, x, targets, cotangent = on_cuda(sample)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = sample(x, targets)
        (gradient,) = grad(value, x, cotangent)
        closed = sample.closed(ul.value_and_grad)(x, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, right in ((value, sample.value), (gradient, sample.pulled_back)):
        check_on_cuda(got, right)
    for got, right in zip(closed, (sample.value, sample.gradient), strict=True):
        check_on_cuda(got, right)


@pytest.mark.cuda
@pytest.mark.capability("torch", "CUDA graphs")
def test_cuda_graph(sample):
    sample, x, targets, cotangent = on_cuda(sample)
    right = x.detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks: once outside of the graph first
        grad(sample(x, targets), x, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        x.fill_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = sample(x, targets)
        (gradient,) = grad(value, x, cotangent)
    with torch.no_grad():
        x.copy_(right)
    graph.replay()
    check_on_cuda(value, sample.value)
    check_on_cuda(gradient, sample.pulled_back)
