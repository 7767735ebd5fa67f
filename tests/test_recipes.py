"""The snippets of docs/recipes.md, as they stand there, beside the framework's own loss or the formula in float64.

Those that need packages that the extra `test` does not have are marked `trainers`, and fail without them.
"""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import lightgbm
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_breast_cancer, load_wine
from torch.nn import functional as F

import unilabel as ul

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
CODE = {
    title: re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    for title, _, body in (text.partition("\n") for text in re.split(r"^##? ", PAGE, flags=re.MULTILINE)[1:])
}
CHECKS = {}
TRAINERS = (pytest.mark.trainers, pytest.mark.filterwarnings("default"))  # which warn about each other


def recipe(title, trainers=False):
    """A check of the names that a snippet leaves behind."""

    def register(check):
        CHECKS[title] = check, TRAINERS if trainers else ()
        return check

    return register


def run(title):
    names = {"__name__": "recipe"}
    for code in (*CODE["Recipes"], *CODE[title]):
        exec(compile(code, f"docs/recipes.md, {title}", "exec"), names)
    return SimpleNamespace(**names)


def agree(ours, theirs, wrt):
    """Values, and gradients by autodiff."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for x in wrt:
        gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


@recipe("Gradient accumulation")
def _(r):
    (expected,) = torch.autograd.grad(F.cross_entropy(r.logits, r.tokens), r.logits)
    torch.testing.assert_close(r.logits.grad, expected)


@recipe("Hugging Face Trainer: `compute_loss_func`, `num_items_in_batch`")
def _(r):
    x, y = torch.randn(2, 4, 5, requires_grad=True), torch.tensor([[0, 1, -100, 4], [2, -100, 3, 1]])
    total = F.cross_entropy(x[:, :-1].mT, y[:, 1:], reduction="sum")
    agree(r.compute_loss({"logits": x}, y, num_items_in_batch=7), total / 7, [x])
    agree(r.compute_loss({"logits": x}, y), total / 4, [x])


@recipe("Mixed precision: a sum in float32")
def _(r):
    expected = -log_softmax(r.half.double().numpy(), axis=1)[np.arange(100_000), r.y.numpy()].sum()
    assert ul.softmax_nll(r.half, r.y, reduction="sum").isinf()
    assert r.loss.dtype == r.without_copy.dtype == torch.float32
    assert float(r.loss) == pytest.approx(expected, rel=1e-6)
    assert float(r.without_copy) == pytest.approx(expected, rel=1e-5)


@recipe("Missing labels as NaN")
def _(r):
    keep = ~r.targets.isnan()
    assert int(keep.sum()) == 16
    agree(r.loss, F.binary_cross_entropy_with_logits(r.logits[keep], r.labels[keep]), [r.logits])


@recipe("pandas DataFrames and Series")
def _(r):
    keep = torch.ones(6, 3, dtype=torch.bool)
    keep[2, 1] = False
    z = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1.0]])
    agree(r.multilabel, F.binary_cross_entropy_with_logits(r.logits[keep], z[keep]), [r.logits])
    y = torch.tensor([0, 2, 1, -1, 0, 2])
    agree(r.softmax, F.cross_entropy(r.logits, y, ignore_index=-1), [r.logits])


@recipe("A weight for each example")
def _(r):
    losses = F.binary_cross_entropy_with_logits(r.logits, r.labels, reduction="none")
    agree(r.multilabel, (losses.sum(1) * r.w).mean(), [r.logits])
    losses = F.cross_entropy(r.logits, r.classes, reduction="none")
    agree(r.softmax, (losses * r.w).sum() / r.w.sum(), [r.logits])


@recipe("Binary classification: one logit")
def _(r):
    agree(r.loss, F.binary_cross_entropy_with_logits(r.logits[:, 0], r.labels[:, 0]), [r.logits])
    agree(ul.multilabel_logistic_loss(r.logits[:, :1], r.labels[:, :1]), r.loss, [r.logits])


@recipe("Semantic segmentation: NCHW logits, 255 as void")
def _(r):
    agree(r.loss, F.cross_entropy(r.images, r.masks.long(), ignore_index=255), [r.images])


@recipe("Knowledge distillation: soft targets with a temperature")
def _(r):
    q = F.softmax(r.teacher / r.T, 1)
    divergence = F.kl_div(F.log_softmax(r.logits / r.T, 1), q, reduction="batchmean")
    entropy = -(q * q.log()).sum(1).mean()
    theirs = 0.5 * r.T**2 * (divergence + entropy) + 0.5 * F.cross_entropy(r.logits, r.classes)
    agree(r.loss, theirs, [r.logits])


@recipe("Several heads, −1 as unlabelled")
def _(r):
    agree(r.loss, F.cross_entropy(r.logits, r.colours, ignore_index=-1), [r.logits])
    assert not torch.autograd.grad(r.loss, r.shape)[0].any()
    assert F.cross_entropy(r.shape, r.shapes, ignore_index=-1).isnan()


@recipe("Label smoothing on a schedule")
def _(r):
    for loss, smoothing in zip(r.losses, (0.1, 0.05, 0.0), strict=True):
        agree(loss, F.cross_entropy(r.logits, r.classes, label_smoothing=smoothing), [r.logits])
    smoothing = torch.tensor(0.05)
    agree(ul.softmax_nll(r.logits, r.classes, label_smoothing=smoothing), r.losses[1], [r.logits])


@recipe("Targets first: Keras and scikit-learn")
def _(r):
    expected = r.cross_val_score(r.LogisticRegression(), r.X, r.y, scoring="neg_log_loss")
    np.testing.assert_allclose(r.scores, expected, rtol=1e-12)


class Data:
    """What boosting libraries hand to an objective: labels as float32; XGBoost has an empty array for no weights."""

    def __init__(self, labels, weight):
        self.labels, self.weight = np.asarray(labels, np.float32), weight

    def get_label(self):
        return self.labels

    def get_weight(self):
        return self.weight


@recipe("XGBoost custom objective")
def _(r):
    scores, y = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    for weight in (np.array([]), np.array([1.0, 2, 0.5, 1, 3], np.float32)):
        p, w = softmax(scores.astype(float), axis=1), weight[:, None] if weight.size else 1.0
        gradient, hessian = r.objective(scores, Data(y, weight))
        np.testing.assert_allclose(gradient, w * (p - np.eye(3)[y]), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(hessian, w * 2 * p * (1 - p), rtol=1e-5)


@recipe("LightGBM custom objective")
def _(r):
    x, y = load_wine(return_X_y=True)
    settings = {"num_class": 3, "verbose": -1, "deterministic": True, "num_threads": 1, "boost_from_average": False}
    scores = []
    for objective in (r.objective, "multiclass"):
        data = lightgbm.Dataset(x, y, params={"verbose": -1})
        booster = lightgbm.train(settings | {"objective": objective}, data, num_boost_round=5)
        scores.append(booster.predict(x, raw_score=True))
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


@recipe("CatBoost custom objective")
def _(r):
    scores, y = np.random.default_rng(0).normal(size=5), np.array([0, 1, 1, 0, 1.0])
    p = 1 / (1 + np.exp(-scores))
    for weights in (None, np.array([1.0, 2, 0.5, 1, 3])):
        w = 1.0 if weights is None else weights
        expected = np.stack([w * (y - p), -w * p * (1 - p)], 1)
        np.testing.assert_allclose(r.Objective().calc_ders_range(scores, y, weights), expected, rtol=1e-13)


def fitted(model, loss, x, y, steps, rate):
    """By plain gradient descent."""
    for _ in range(steps):
        model.zero_grad()
        loss(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return model


def same_parameters(a, b, atol=1e-6):
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


@recipe("PyTorch Lightning: `training_step`", trainers=True)
def _(r):
    x, model = torch.randn(6, 4), r.Model()
    weight = torch.tensor([1.0, 2, 4])

    def theirs(logits, targets):
        return 3 * F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)

    expected = fitted(copy.deepcopy(model.linear), theirs, x, r.labels, steps=3, rate=0.1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, r.labels), batch_size=6)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    r.lightning.Trainer(max_epochs=3, accelerator="cpu", **quiet).fit(model, data)
    same_parameters(model.linear, expected)


@recipe("skorch", trainers=True)
def _(r):
    x = torch.randn(6, 4)
    bce, ce = torch.nn.BCEWithLogitsLoss(), torch.nn.CrossEntropyLoss()
    for net, y, loss, activation in (
        (r.one_label, r.classes, ce, torch.nn.Softmax(1)),
        (r.many_labels, r.labels, lambda logits, y: 3 * bce(logits, y), torch.nn.Sigmoid()),
    ):
        expected = fitted(copy.deepcopy(net.module), loss, x, y, steps=2, rate=0.01)
        net.fit(x.numpy(), y.numpy())
        same_parameters(net.module_, expected)
        np.testing.assert_allclose(net.predict_proba(x.numpy()), activation(expected(x)).detach().numpy(), rtol=1e-4)


@recipe("fastai", trainers=True)
def _(r):
    logits = r.learner.model(r.features).detach()
    probabilities, targets = r.learner.get_preds()
    torch.testing.assert_close(probabilities, logits.softmax(1))
    assert targets.tolist() == r.classes.tolist()
    *_, losses = r.learner.get_preds(with_loss=True)
    torch.testing.assert_close(losses, F.cross_entropy(logits, r.classes, reduction="none"))
    theirs = copy.deepcopy(r.learner)
    theirs.loss_func = torch.nn.CrossEntropyLoss()
    for learner in (r.learner, theirs):
        with learner.no_bar(), learner.no_logging():
            learner.fit(2, lr=0.1)
    same_parameters(r.learner.model, theirs.model)


@recipe("timm: Mixup, CutMix", trainers=True)
def _(r):
    from timm.loss import SoftTargetCrossEntropy

    agree(r.loss, SoftTargetCrossEntropy()(r.logits, r.targets), [r.logits])


@recipe("ONNX export with probabilities", trainers=True)
def _(r):
    from onnx.reference import ReferenceEvaluator

    graph = ReferenceEvaluator(r.program.model_proto)
    (probabilities,) = graph.run(None, {graph.input_names[0]: r.features.numpy()})
    expected = r.predictor.linear(r.features).softmax(1).detach()
    np.testing.assert_allclose(probabilities, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("title", [pytest.param(title, marks=marks) for title, (_, marks) in CHECKS.items()])
def test_recipe(title):
    CHECKS[title][0](run(title))


def test_each_recipe_is_checked():
    assert list(CODE) == ["Recipes", *CHECKS]
    assert all(len(code) == 1 for code in CODE.values())


# --- Short real runs --------------------------------------------------------------------------------------------------


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_xgboost():
    import xgboost

    x, y = load_wine(return_X_y=True)
    objective = run("XGBoost custom objective").objective
    for weight in (None, np.random.default_rng(0).uniform(0.5, 2, len(y))):
        data = xgboost.DMatrix(x, y, weight=weight)
        settings = {"num_class": 3, "base_score": 0.0, "nthread": 1}
        ours = xgboost.train(settings, data, num_boost_round=5, obj=objective).predict(data, output_margin=True)
        own = settings | {"objective": "multi:softprob"}
        theirs = xgboost.train(own, data, num_boost_round=5).predict(data, output_margin=True)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_xgboost_binary():
    """Its own Hessian is not doubled; the estimator calls with the targets first."""
    import xgboost

    x, y = load_breast_cancer(return_X_y=True)

    def objective(targets, scores):
        return ul.grad_and_hess(ul.multilabel_logistic_loss)(scores, targets)

    settings = {"n_estimators": 5, "n_jobs": 1, "base_score": 0.5}
    ours = xgboost.XGBClassifier(objective=objective, **settings).fit(x, y)
    theirs = xgboost.XGBClassifier(objective="binary:logistic", **settings).fit(x, y)
    scores = [model.predict(x, output_margin=True) for model in (ours, theirs)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_catboost():
    import catboost

    x, y = load_breast_cancer(return_X_y=True)
    same_steps = {"boosting_type": "Plain", "bootstrap_type": "No", "random_strength": 0, "boost_from_average": False}
    newton = {"leaf_estimation_method": "Newton", "leaf_estimation_iterations": 1}
    settings = same_steps | newton | {"iterations": 5, "depth": 3, "thread_count": 1, "learning_rate": 0.1}
    quiet = {"verbose": False, "allow_writing_files": False, "eval_metric": "Logloss"}
    for weight in (None, np.random.default_rng(0).uniform(0.5, 2, len(y))):
        scores = []
        for objective in (run("CatBoost custom objective").Objective(), "Logloss"):
            model = catboost.CatBoostClassifier(loss_function=objective, **settings, **quiet)
            scores.append(model.fit(x, y, sample_weight=weight).predict(x, prediction_type="RawFormulaVal"))
        np.testing.assert_allclose(*scores, rtol=1e-10)


def losses_of_jax():
    """Ours and Optax', for both kinds of labels."""
    import jax
    import jax.numpy as jnp
    import optax

    y = jnp.array([0, 1, 2, 0, 1, 2])
    z = jax.nn.one_hot(y, 3)
    yield (
        lambda x: ul.softmax_nll(x, y),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, y).mean(),
    )
    yield (
        lambda x: ul.multilabel_logistic_loss(x, z),
        lambda x: optax.sigmoid_binary_cross_entropy(x, z).sum(-1).mean(),
    )


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_flax():
    import jax
    import optax
    from flax import nnx

    @nnx.jit(static_argnums=2)
    def step(model, optimizer, loss):
        optimizer.update(model, nnx.grad(lambda model: loss(model(x)))(model))

    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for losses in losses_of_jax():
        models = []
        for loss in losses:
            models.append(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
            optimizer = nnx.Optimizer(models[-1], optax.adam(0.1), wrt=nnx.Param)
            for _ in range(5):
                step(models[-1], optimizer, loss)
        ours, theirs = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))) for model in models)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_equinox():
    import equinox
    import jax

    @equinox.filter_jit
    def step(model, loss):
        gradient = equinox.filter_grad(lambda model: loss(jax.vmap(model)(x)))(model)
        return equinox.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))

    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for losses in losses_of_jax():
        models = []
        for loss in losses:
            model = equinox.nn.Linear(4, 3, key=jax.random.key(0))
            for _ in range(5):
                model = step(model, loss)
            models.append(model)
        for a, b in zip(*map(jax.tree.leaves, models), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.trainers
@pytest.mark.filterwarnings("default")
def test_trainer(tmp_path):
    import transformers

    torch.manual_seed(0)
    tokens = torch.randint(11, (8, 6))
    labels = tokens.clone()
    labels[:3, 2:5] = -100
    rows = [{"input_ids": a, "labels": b} for a, b in zip(tokens, labels, strict=True)]
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
    }
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 100}
    trained = []
    for loss in (run("Hugging Face Trainer: `compute_loss_func`, `num_items_in_batch`").compute_loss, None):
        transformers.set_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(str(tmp_path), seed=0, **options, **quiet)
        transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss).train()
        trained.append(model)
    same_parameters(*trained, atol=1e-5)
