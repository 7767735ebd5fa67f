"""PyTorch: its transformations, compilers, exporters and devices, on these losses as on its own."""

import datetime
import functools
import itertools
import os
import sys
import time

import mpmath
import numpy as np
import pytest
import torch
from capabilities import LOSSES, Sample, close
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import unilabel as ul

ELEMENTWISE = ("multilabel_logistic_loss", "binary_cross_entropy")


def logits(sample):
    return torch.tensor(sample.x, requires_grad=True)


def losses(sample, **options):
    """The loss of each example or element, as a function."""
    return functools.partial(sample, reduction="none", **options)


def total(sample, **options):
    return functools.partial(sample, reduction="sum", **options)


def check(got, right, ulp=16):
    """A plain float64 tensor on the CPU with these numbers."""
    assert type(got) is torch.Tensor
    assert got.dtype is torch.float64
    assert got.device.type == "cpu"
    close(got.detach(), right, ulp=ulp)


def jacobian(sample):
    """The derivative of the losses by the logits, in full: an example's loss has no part in another's."""
    rows, classes = sample.x.shape
    if sample.name in ELEMENTWISE:
        return np.diag(sample.gradient.ravel()).reshape(sample.x.shape * 2)
    full = np.zeros((rows, rows, classes))
    full[range(rows), range(rows)] = sample.gradient
    return full


def check_hessian(got, sample, ulp=16):
    """Of the sum of the losses: the diagonal, 0 where there is no mixed derivative, and 0 in sum where it moves all."""
    assert got.shape == sample.x.shape * 2
    check(torch.einsum("ijij->ij", got).contiguous(), sample.hessian, ulp)
    across = torch.einsum("iajb->ijab", got).detach().numpy()
    rows, classes = sample.x.shape
    assert (across[~np.eye(rows, dtype=bool)] == 0).all()
    if sample.name == "softmax_nll":
        np.testing.assert_allclose(across.sum(-1), 0, atol=1e-15)
    else:
        assert (across[:, :, ~np.eye(classes, dtype=bool)] == 0).all()


def identity(classes):
    """A model whose outputs are its inputs."""
    model = torch.nn.Linear(classes, classes, dtype=torch.float64)
    torch.nn.init.eye_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


# --- Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "backward")
def test_backward(sample):
    x = logits(sample)
    values = losses(sample)(x)
    values.backward(torch.tensor(sample.cotangent))
    check(values, sample.values)
    check(x.grad, sample.pulled_back)


def weights(sample):
    """Each weight that the loss takes, and its shape."""
    rows, classes = sample.x.shape
    if sample.name in ELEMENTWISE:
        return {"weight": (classes,), "pos_weight": (rows, classes)}
    return {"weight": (classes,), "sample_weight": (rows,)}


def float_inputs(sample):
    """A function of all that is a float (logits, targets, weights), and where it is differentiated."""
    names, drawn = weights(sample), np.random.default_rng(1)
    inputs = sample.x, 0.1 + 0.8 * sample.distributions, *(drawn.uniform(0.5, 2, shape) for shape in names.values())

    def function(x, targets, *given):
        return losses(sample)(x, targets, **dict(zip(names, given, strict=True)))

    return function, tuple(torch.tensor(array, requires_grad=True) for array in inputs)


@pytest.mark.capability("torch", "gradcheck, forward, reverse and batched")
def test_gradcheck(sample):
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    function, inputs = float_inputs(sample)
    assert gradcheck(losses(sample), inputs[:1], **modes)  # of the logits alone: the fast path
    assert gradcheck(function, inputs, **modes)


@pytest.mark.capability("torch", "gradgradcheck, forward over reverse and batched")
def test_gradgradcheck(sample):
    modes = {"check_fwd_over_rev": True, "check_batched_grad": True, "gen_non_contig_grad_outputs": True}
    function, inputs = float_inputs(sample)
    assert gradgradcheck(losses(sample), inputs[:1], **modes)
    assert gradgradcheck(function, inputs, **modes)


@pytest.mark.capability("torch", "autograd.grad with is_grads_batched")
def test_batched_cotangents(sample):
    x = logits(sample)
    values = losses(sample)(x)
    units = torch.eye(values.numel(), dtype=torch.float64).reshape(-1, *values.shape)
    (rows,) = grad(values, x, units, is_grads_batched=True)
    check(rows.reshape(*values.shape, *x.shape), jacobian(sample))


@pytest.mark.capability("torch", "double backward (create_graph)")
@pytest.mark.parametrize("is_grads_batched", [False, True])
def test_double_backward(sample, is_grads_batched):
    x, cotangent = logits(sample), torch.tensor(sample.cotangent, requires_grad=True)
    (pulled,) = grad(losses(sample)(x), x, cotangent, create_graph=True)
    check(pulled, sample.pulled_back)
    direction = np.random.default_rng(1).uniform(0.5, 2, sample.x.shape)
    (pushed,) = grad(pulled, cotangent, torch.tensor(direction))  # the other way: what the losses change by
    right = sample.gradient * direction
    np.testing.assert_allclose(pushed, right if sample.name in ELEMENTWISE else right.sum(-1), rtol=1e-14, atol=1e-15)

    (gradient,) = grad(total(sample)(x), x, create_graph=True)
    check(gradient, sample.gradient)
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    if is_grads_batched:
        (second,) = grad(gradient, x, units, is_grads_batched=True)
    else:
        second = torch.stack([grad(gradient, x, unit, retain_graph=True)[0] for unit in units])
    check_hessian(second.reshape(*x.shape, *x.shape), sample)


@pytest.mark.capability("torch", "backward twice (retain_graph)")
def test_backward_twice(sample):
    x = logits(sample)
    values = losses(sample)(x)
    cotangent = torch.tensor(sample.cotangent)
    values.backward(cotangent, retain_graph=True)
    values.backward(cotangent)
    check(x.grad, 2 * sample.pulled_back)
    with pytest.raises(RuntimeError, match="a second time"):
        values.backward(cotangent)


@pytest.mark.capability("torch", "func.vmap over autograd.grad")
def test_several_cotangents(sample):
    x = logits(sample)
    for values in (losses(sample)(x), total(sample)(x)):
        cotangents = torch.arange(1.0, 3.0, dtype=x.dtype).reshape(2, *[1] * values.ndim) * torch.ones_like(values)
        gradients = torch.func.vmap(lambda v: grad(values, x, v, retain_graph=True)[0])(cotangents)  # noqa: B023
        for factor, gradient in zip((1, 2), gradients, strict=True):
            check(gradient, factor * sample.gradient)


@pytest.mark.capability("torch", "tensor hooks")
@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks(sample, create_graph):
    """Each is called once, with the right gradient, and may change it."""
    leaf, seen = logits(sample), []
    x = leaf * 1
    values = losses(sample)(x)
    values.register_hook(lambda cotangent: seen.append(cotangent) or 2 * cotangent)
    x.register_hook(lambda gradient: seen.append(gradient) or -gradient)
    (result,) = grad(values, leaf, torch.tensor(sample.cotangent), create_graph=create_graph)
    assert len(seen) == 2
    check(seen[0], sample.cotangent)
    check(seen[1], 2 * sample.pulled_back)
    check(result, -2 * sample.pulled_back)


@pytest.mark.capability("torch", "anomaly mode")
def test_anomaly_mode(sample):
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        test_backward(sample)


@pytest.mark.capability("torch", "checkpoint")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(sample, use_reentrant):
    x = logits(sample)
    values = checkpoint(losses(sample), x, use_reentrant=use_reentrant)
    values.backward(torch.tensor(sample.cotangent))
    check(values, sample.values)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "saved-tensor hooks (save_on_cpu)")
def test_saved_tensor_hooks(sample):
    with torch.autograd.graph.save_on_cpu():
        test_backward(sample)
    packed, x = [], logits(sample)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda array: packed.append(array) or array.clone(), lambda x: x)
    with hooks:
        values = losses(sample)(x)
    values.backward(torch.tensor(sample.cotangent))
    assert any(array.shape == x.shape for array in packed)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "no_grad and inference_mode")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(sample, mode):
    x = logits(sample)
    with mode():
        values = losses(sample)(x)
        assert values.is_inference() == (mode is torch.inference_mode)
    assert not values.requires_grad
    check(values, sample.values)
    with torch.inference_mode():
        ours = torch.tensor(sample.x)
    check(losses(sample)(ours), sample.values)  # inference tensors outside of the mode


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.capability("torch", "func.grad, vjp, jvp")
def test_func_grad(sample):
    x, cotangent = torch.tensor(sample.x), torch.tensor(sample.cotangent)
    check(torch.func.grad(total(sample))(x), sample.gradient)
    values, pull = vjp(losses(sample), x)
    check(values, sample.values)
    check(pull(cotangent)[0], sample.pulled_back)
    for tangent in (torch.eye(*x.shape, dtype=x.dtype), torch.ones_like(x)):
        values, change = jvp(losses(sample), (x,), (tangent,))
        check(values, sample.values)
        right = jacobian(sample).reshape(*values.shape, -1) @ tangent.numpy().ravel()
        np.testing.assert_allclose(change, right, rtol=1e-14, atol=1e-15)


@pytest.mark.capability("torch", "func.vmap")
def test_vmap(sample):
    x, y = torch.tensor(sample.x), torch.tensor(sample.targets)
    check(vmap(losses(sample))(x, y), sample.values)
    check(vmap(losses(sample), in_dims=(1, 0))(x.T, y), sample.values)
    several = torch.stack([x, x.flip(0)]), torch.stack([y, y.flip(0)])
    check(vmap(vmap(losses(sample)))(*several), np.stack([sample.values, sample.values[::-1]]))
    check(vmap(torch.func.grad(total(sample)))(*several), np.stack([sample.gradient, sample.gradient[::-1]]))


@pytest.mark.capability("torch", "func.vmap over weights")
def test_vmap_over_weights(sample):
    x = torch.tensor(sample.x)
    many = np.array([[0.5, 1.0, 2.0], [3.0, 0.25, 1.5]])
    own = many[:, None] if sample.name in ELEMENTWISE else many[:, sample.targets]  # of each loss
    weights = torch.tensor(many)
    check(vmap(lambda weight: losses(sample)(x, weight=weight))(weights), sample.values * own)
    each = own if sample.name in ELEMENTWISE else own[..., None]  # of each row
    gradient = vmap(lambda weight: torch.func.grad(lambda x: total(sample)(x, weight=weight))(x))(weights)
    check(gradient, sample.gradient * each)


@pytest.mark.capability("torch", "func.jacrev, jacfwd")
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian(sample, transform):
    check(transform(losses(sample))(torch.tensor(sample.x)), jacobian(sample))


@pytest.mark.capability("torch", "func.hessian")
@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))])
def test_hessian(sample, transform):
    check_hessian(transform(total(sample))(torch.tensor(sample.x)), sample)


@pytest.mark.capability("torch", "gradients of each example: vmap(grad) of functional_call")
def test_gradients_of_each_example(sample):
    classes = sample.x.shape[1]
    model = identity(classes)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, targets):
        return total(sample)(functional_call(model, parameters, (x,)), targets)

    inputs = torch.tensor(sample.x), torch.tensor(sample.targets)
    each = vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *inputs)
    check(each["bias"], sample.gradient)
    check(each["weight"], sample.gradient[:, :, None] * sample.x[:, None])


def test_a_wrong_index_is_nan_where_the_clamp_counts_too():
    """By plain autodiff: the clamp has no derivative of its own."""
    probs, targets = torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.25, 0.75]]), torch.tensor([3, 2])
    gradient = torch.func.grad(lambda p: ul.cross_entropy(p, targets, reduction="sum"))(probs)
    np.testing.assert_array_equal(gradient, [[np.nan] * 3, [0, 0, -1 / np.float32(0.75)]])


# --- Second derivatives of a sure model -------------------------------------------------------------------------------

SURE = [[17.0, 0.0], [60.0, 0.0, -3.0], [2.0, 1.9, -40.0], [0.0, 0.0, 0.0]]


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
    return torch.stack([grad(slope, x, retain_graph=True)[0] for slope in gradient])


def by_compiled_double_backward(function, x):
    """With a backend that differentiates what it is given as if it were eager."""
    return by_double_backward(torch.compile(function, backend="eager", fullgraph=True), x)


def by_compiled_hessian(function, x):
    return torch.compile(hessian(function), backend="aot_eager", fullgraph=True)(x)


@pytest.mark.capability("torch", "second derivatives of a sure model", losses=("softmax_nll",))
@pytest.mark.parametrize(
    "method", [by_double_backward, by_compiled_double_backward, lambda f, x: hessian(f)(x), by_compiled_hessian]
)
def test_second_derivatives_keep_their_digits(method):
    for x in SURE[:1] if method is by_compiled_hessian else SURE:
        torch.compiler.reset()
        for y in range(len(x)):
            target = torch.tensor(y)
            second = method(lambda x: ul.softmax_nll(x, target), torch.tensor(x, dtype=torch.float64))  # noqa: B023
            check(second, right_hessian(x))


@pytest.mark.capability("torch", "second derivatives of a sure model", losses=("multilabel_logistic_loss",))
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
    for x in SURE:
        x, right = torch.tensor(x, dtype=torch.float64), right_hessian(x)
        check(transform(ul.softmax)(x), right)
        with mpmath.workprec(200):
            p = [mpmath.exp(number) for number in x.tolist()]
            p = [float(number / sum(p)) for number in p]
        np.testing.assert_allclose(transform(ul.log_softmax)(x), right / np.array(p)[:, None], rtol=1e-14, atol=0)


# --- Compilers and exporters ------------------------------------------------------------------------------------------

TWO = pytest.mark.parametrize("sample", ["multilabel_logistic_loss", "softmax_nll"], indirect=True)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch._dynamo.reset()


def check_compiled(function, sample, rows):
    x, y = torch.tensor(sample.x[:rows], requires_grad=True), torch.tensor(sample.targets[:rows])
    values = function(x, y)
    values.backward(torch.tensor(sample.cotangent[:rows]))
    check(values, sample.values[:rows])
    check(x.grad, sample.pulled_back[:rows])


@pytest.mark.capability("torch", "compile (inductor)")
@TWO
def test_compile(sample):
    check_compiled(torch.compile(losses(sample), fullgraph=True, dynamic=False), sample, 4)


@pytest.mark.capability("torch", "compile(dynamic=True) (inductor)")
@TWO
def test_compile_dynamic(sample):
    compiled = torch.compile(losses(sample), fullgraph=True, dynamic=True)
    check_compiled(compiled, sample, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        check_compiled(compiled, sample, 3)
        check_compiled(compiled, sample, 4)


@pytest.mark.capability("torch", "compile, mark_dynamic (aot_eager)")
def test_compile_marked_dynamic(sample):
    compiled = torch.compile(losses(sample), backend="aot_eager", fullgraph=True)

    def marked(x, y):
        for array in (x, y):
            torch._dynamo.mark_dynamic(array, 0)
        return compiled(x, y)

    check_compiled(marked, sample, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        check_compiled(marked, sample, 4)


@pytest.mark.capability("torch", "compile of a training step (inductor)")
@TWO
def test_compile_training_step(sample):
    model = identity(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    forward = torch.compile(lambda x, y: total(sample)(model(x), y), fullgraph=True)
    update = torch.compile(optimizer.step)
    loss = forward(torch.tensor(sample.x), torch.tensor(sample.targets))
    loss.backward()
    update()
    check(loss, sample.values.sum())
    np.testing.assert_allclose(model.bias.detach(), -0.125 * sample.gradient.sum(0), rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(
        model.weight.detach(), np.eye(3) - 0.125 * sample.gradient.T @ sample.x, rtol=1e-14, atol=1e-15
    )


@pytest.mark.capability("torch", "compile, of transformed losses (aot_eager)")
@pytest.mark.parametrize("recorded", [False, True])
def test_compile_transformed(sample, recorded):
    """A compiled loss has a backward pass of its own, which is not for what is differentiated on the way."""
    x, y, z = torch.tensor(sample.x), torch.tensor(sample.targets), torch.tensor(sample.distributions)
    x.requires_grad_(recorded)

    def compiled(function, *arguments):
        return torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)

    check(compiled(torch.func.grad(lambda x: total(sample)(x, y)), x), sample.gradient)
    if sample.name == "multilabel_logistic_loss":  # where the form that is not for autodiff has another derivative
        zero = torch.zeros_like(x, requires_grad=recorded)
        slopes = compiled(torch.func.grad(lambda x: total(sample)(x, y)), zero)
        check(slopes, 0.5 - sample.targets)
    check(compiled(torch.func.vmap(lambda x, y: losses(sample)(x, y)), x, y), sample.values)
    _, change = compiled(lambda x: torch.func.jvp(lambda x: total(sample)(x, y), (x,), (x.detach(),)), x)
    close(change.detach(), (sample.gradient * sample.x).sum(), ulp=64)
    z.requires_grad_()
    compiled(lambda x, z: total(sample)(x, z), x, z).backward()
    of_label = {
        "multilabel_logistic_loss": lambda x: -x,
        "softmax_nll": lambda x: np.log(np.exp(np.longdouble(x)).sum(axis=-1, keepdims=True)) - x,
        "binary_cross_entropy": lambda p: np.log(1 - p) - np.log(p),
        "cross_entropy": lambda p: -np.log(p),
        "nll": lambda x: -x,
    }
    check(z.grad, of_label[sample.name](sample.x), ulp=64)
    check(compiled(lambda x: losses(sample)(x, y), x.detach()), sample.values)
    value, gradient = compiled(lambda x: ul.value_and_grad(sample.loss)(x, y, reduction="sum"), x)
    check(value, sample.values.sum())
    check(gradient, sample.gradient)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, targets):
        return self.function(x, targets)


@pytest.mark.capability("torch", "export with a dynamic batch")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own copies of what it deprecates
def test_export(sample, strict):
    batch = torch.export.Dim("batch")
    inputs = torch.tensor(sample.x[:2]), torch.tensor(sample.targets[:2])
    shapes = {"x": {0: batch}, "targets": {0: batch}}
    program = torch.export.export(Module(losses(sample)), inputs, dynamic_shapes=shapes, strict=strict)
    check_compiled(program.module(), sample, 4)
    check_compiled(program.run_decompositions().module(), sample, 3)


@pytest.mark.capability("torch", "make_fx, symbolic too")
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(sample, mode):
    def both(x, y):
        x = x.detach().requires_grad_()
        values = losses(sample)(x, y)
        return values.detach(), grad(values.sum(), x)[0]

    rows = 4 if mode == "real" else 2
    traced = make_fx(both, tracing_mode=mode)(torch.tensor(sample.x[:rows]), torch.tensor(sample.targets[:rows]))
    values, gradient = traced(torch.tensor(sample.x), torch.tensor(sample.targets))
    check(values, sample.values)
    check(gradient, sample.gradient)


@pytest.mark.capability("torch", "make_fx, then autograd of the graph")
def test_gradient_of_a_graph(sample):
    """The graph of the loss alone: differentiated later, it must not have lost what the gradient needs."""
    traced = make_fx(losses(sample))(torch.tensor(sample.x), torch.tensor(sample.targets))
    check_compiled(traced, sample, 4)
    if sample.name == "softmax_nll":
        x, y = torch.tensor([[40.0, 0.0]], dtype=torch.float64, requires_grad=True), torch.tensor([0])
        traced = make_fx(total(sample))(x.detach(), y)
        check(grad(traced(x, y), x)[0], [[-np.exp(-40), np.exp(-40)]])


# --- Tensors without data, modes, subclasses --------------------------------------------------------------------------


@pytest.mark.capability("torch", "FakeTensorMode")
def test_fake_tensors(sample):
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.tensor(sample.x)).requires_grad_()
        for targets in (sample.targets, mode.from_tensor(torch.tensor(sample.targets))):
            values = losses(sample)(x, targets)
            (gradient,) = grad(values.sum(), x)
            for fake, right in ((values, sample.values), (gradient, sample.x)):
                assert type(fake) is FakeTensor
                assert (fake.shape, fake.dtype, fake.device.type) == (right.shape, torch.float64, "cpu")


@pytest.mark.capability("torch", "meta tensors")
def test_meta_tensors(sample):
    """It is an error there to read a value, or to compute with an array that was made on another device."""
    x = torch.tensor(sample.x, device="meta", requires_grad=True)
    assert total(sample)(x.to(torch.bfloat16)).dtype is torch.bfloat16
    for targets in (sample.targets, torch.tensor(sample.targets, device="meta")):
        values = losses(sample)(x, targets)
        (gradient,) = grad(values, x, torch.ones_like(values), create_graph=True)
        (second,) = grad(gradient.sum(), x)
        closed = ul.value_and_grad(sample.loss)(x, targets, reduction="none")
        for meta, right in zip(
            (values, gradient, second, *closed), (sample.values, *[sample.x] * 2, sample.values, sample.x), strict=True
        ):
            assert type(meta) is torch.Tensor
            assert (meta.shape, meta.dtype, meta.device.type) == (right.shape, torch.float64, "meta")


def in_steps(values):
    """Whether autograd has each operation, not the closed form: a mode or subclass may have its own idea of each."""
    return "_Loss" not in values.grad_fn.name()


def test_closed_form(sample):
    x = logits(sample)
    assert not in_steps(losses(sample)(x))
    with Counting(), torch.device("cpu"):  # neither changes what is computed
        assert not in_steps(losses(sample)(x))


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
        values = losses(sample)(x)
        before = mode.count
        values.backward(torch.tensor(sample.cotangent))
    assert mode.count > before > 2
    check(values, sample.values)
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "TorchFunctionMode")
def test_function_mode(sample):
    x = logits(sample)
    with Named() as mode:
        values = losses(sample)(x)
    assert torch.where in mode.called
    assert in_steps(values)
    check(values, sample.values)
    values.backward(torch.tensor(sample.cotangent))
    check(x.grad, sample.pulled_back)


@pytest.mark.capability("torch", "another default device")
def test_default_device(sample):
    """Does not count: results are where the logits are."""
    x, cotangent = logits(sample), torch.tensor(sample.cotangent)
    with torch.device("meta"):
        values = losses(sample)(x)
        (gradient,) = grad(values, x, cotangent)
    check(values, sample.values)
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
    values = losses(sample)(x)
    assert type(values) is type(torch.sin(x)) is Kind
    assert in_steps(values)
    (gradient,) = grad(values, x, torch.tensor(sample.cotangent))
    check(values.detach().as_subclass(torch.Tensor), sample.values)
    check(gradient.as_subclass(torch.Tensor), sample.pulled_back)


@pytest.mark.capability("torch", "subclass by __torch_dispatch__")
@pytest.mark.parametrize("which", ["logits", "targets"])
def test_wrapper_subclass(sample, which):
    leaf, targets = logits(sample), torch.tensor(sample.targets)
    x = Wrapped(leaf.detach()).requires_grad_() if which == "logits" else leaf
    values = losses(sample)(x, Wrapped(targets) if which == "targets" else targets)
    assert type(values) is Wrapped
    assert in_steps(values)
    (gradient,) = grad(values, x, Wrapped(torch.tensor(sample.cotangent)))
    check(values.detach().inner, sample.values)
    check(gradient.inner if type(gradient) is Wrapped else gradient, sample.pulled_back)


# --- Autocast ---------------------------------------------------------------------------------------------------------


def native(sample, x):
    """The losses that torch has itself."""
    y = torch.tensor(sample.targets)
    z = torch.tensor(sample.distributions).to(x.dtype)
    return {
        "multilabel_logistic_loss": lambda: F.binary_cross_entropy_with_logits(x, z, reduction="none"),
        "softmax_nll": lambda: F.cross_entropy(x, y, reduction="none"),
        "binary_cross_entropy": lambda: F.binary_cross_entropy(x, z, reduction="none"),
        "nll": lambda: F.nll_loss(x, y, reduction="none"),
    }.get(sample.name, lambda: torch.empty(0, dtype=torch.float32))()


@pytest.mark.capability("torch", "autocast to bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(sample, dtype):
    """float32 losses of half-precision logits, not rounded: as cross_entropy, nll_loss and both of BCE have it."""
    exact = torch.tensor(sample.x).to(dtype).double()  # what bfloat16 makes of the logits is right in float64
    right = losses(sample)(exact.requires_grad_())
    (slopes,) = grad(right, exact, torch.tensor(sample.cotangent))
    x = exact.detach().to(dtype).requires_grad_()
    assert losses(sample)(x).dtype is dtype  # outside
    with torch.autocast("cpu", dtype):
        values = losses(sample)(x)
        assert values.dtype is native(sample, x).dtype is torch.float32
        assert losses(sample)(exact).dtype is torch.float64
    values.backward(torch.tensor(sample.cotangent, dtype=torch.float32))
    assert x.grad.dtype is dtype
    name = str(dtype).removeprefix("torch.")
    close(values.detach(), right.detach(), "float32", ulp=4)
    close(x.grad.double(), slopes, name, ulp=1)


# --- Several processes ------------------------------------------------------------------------------------------------


def in_two_processes(function, folder):
    """Run function(rank) in each of two processes that reach each other; what fails there fails here."""
    started = torch.multiprocessing.spawn(joined, (function, str(folder / "store")), nprocs=2, join=False)
    try:
        deadline = time.monotonic() + 300
        while not started.join(timeout=5):
            assert time.monotonic() < deadline, "no answer in 300 seconds"
    finally:
        for process in started.processes:
            process.kill()


def joined(rank, function, store):
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    minute = datetime.timedelta(minutes=1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=minute)
    function(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # Gloo's threads may not be joined by now, and abort an interpreter that ends


def spread_over_processes(rank):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))

    def spread(array, place):
        return distribute_tensor(torch.tensor(array), mesh, [place])

    def whole(array, right):
        assert type(array) is DTensor
        check(array.detach().full_tensor(), right)

    samples = [Sample(name) for name in LOSSES]
    samples += [Sample(name, label_smoothing=0.1) for name in ("multilabel_logistic_loss", "softmax_nll")]
    for sample, axis in itertools.product(samples, (0, 1)):  # 3 classes, on 2 and 1
        x = spread(sample.x, Shard(axis)).requires_grad_()
        by_row = sample.name not in ELEMENTWISE
        place = Replicate() if by_row and axis == 1 else Shard(axis)
        cotangent = spread(sample.cotangent, place)
        for targets in (spread(sample.targets, place), spread(sample.distributions, Shard(axis)), sample.targets):
            with CommDebugMode() as sent:
                values = losses(sample)(x, targets)
                (gradient,) = grad(values, x, cotangent)
            assert values.placements == (place,)
            assert gradient.placements == (Shard(axis),)
            whole(values, sample.values)
            whole(gradient, sample.pulled_back)
            # Numbers of a row at most, maxima and sums: no logits.
            assert {str(kind) for kind in sent.get_comm_counts()} <= {"c10d_functional.all_reduce"}
            assert (sent.get_total_counts() > 0) == (by_row and axis == 1)
            whole(losses(sample)(x.detach(), targets), sample.values)
        loss = total(sample)(x, sample.targets)
        loss.backward()
        whole(loss, sample.values.sum())
        whole(x.grad, sample.gradient)


@pytest.mark.capability("torch", "DTensor, sharded by examples or classes", losses=LOSSES)
def test_dtensor(tmp_path):
    in_two_processes(spread_over_processes, tmp_path)


def each_its_examples(rank):
    for sample in map(Sample, LOSSES):
        model = torch.nn.parallel.DistributedDataParallel(identity(3))
        mine = slice(2 * rank, 2 * rank + 2)
        x, targets = torch.tensor(sample.x[mine]), torch.tensor(sample.targets[mine])
        sample.loss(model(x), targets, reduction="batchmean").backward()
        check(model.module.bias.grad, sample.gradient.mean(0), ulp=64)
        right = np.einsum("nc,nk->ck", sample.gradient, sample.x) / 4
        np.testing.assert_allclose(model.module.weight.grad, right, rtol=1e-13, atol=1e-15)


@pytest.mark.capability("torch", "DistributedDataParallel", losses=LOSSES)
def test_ddp(tmp_path):
    in_two_processes(each_its_examples, tmp_path)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def on_cuda(sample):
    x, targets, cotangent = (
        torch.tensor(array, device="cuda") for array in (sample.x, sample.targets, sample.cotangent)
    )
    return x.requires_grad_(), targets, cotangent


def check_on_cuda(got, right):
    assert (type(got), got.dtype, got.device.type) == (torch.Tensor, torch.float64, "cuda")
    close(got.detach().cpu(), right)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it does not see all
@pytest.mark.capability("torch", "CUDA, with no hidden synchronisation")
def test_cuda(sample):
    x, targets, cotangent = on_cuda(sample)
    weight = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = losses(sample)(x, targets, weight=weight)
        (gradient,) = grad(values, x, cotangent)
        closed = ul.value_and_grad(sample.loss)(x, targets, reduction="none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, right in ((values, sample.values), (gradient, sample.pulled_back)):
        check_on_cuda(got, right)
    for got, right in zip(closed, (sample.values, sample.gradient), strict=True):
        check_on_cuda(got, right)


@pytest.mark.cuda
@pytest.mark.capability("torch", "CUDA graphs")
def test_cuda_graph(sample):
    x, targets, cotangent = on_cuda(sample)
    right = x.detach().clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks: once outside of the graph first
        grad(losses(sample)(x, targets), x, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        x.fill_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = losses(sample)(x, targets)
        (gradient,) = grad(values, x, cotangent)
    with torch.no_grad():
        x.copy_(right)
    graph.replay()
    check_on_cuda(values, sample.values)
    check_on_cuda(gradient, sample.pulled_back)
