"""Series and DataFrames of pandas as targets, weights and masks: by position, NA as NaN."""

import numpy as np
import pandas as pd
import pytest
from shared import LOGITS, TARGETS, pattern

import unilabel as ul

FRAME = pd.DataFrame(TARGETS, index=[7, 3], columns=["a", "b", "c"])
NA = pd.DataFrame([[pd.NA] * 3, TARGETS[1]], columns=["a", "b", "c"], dtype="Int64")  # the first example has no labels

OF_FRAME = {
    "integers": FRAME,
    "bool": FRAME.astype(bool),
    "float32": FRAME.astype("float32"),
    "Int64": FRAME.astype("Int64"),
    "boolean": FRAME.astype("boolean"),
    "columns of several dtypes": FRAME.astype({"a": bool, "b": float, "c": "Int8"}),
}
OF_SERIES = {
    "integers": pd.Series([2, 0], index=[7, 3]),
    "Int32": pd.Series([2, 0], dtype="Int32"),
    "codes of categories": pd.Series(["cat", "ant"], dtype=pd.CategoricalDtype(["ant", "bee", "cat"])).cat.codes,
    "an index": pd.Index([2, 0]),
    "an array of pandas": pd.array([2, 0]),
}


@pytest.mark.parametrize("targets", OF_FRAME.values(), ids=OF_FRAME)
def test_labels_in_a_frame(framework, targets):
    x = framework.array(LOGITS)
    expected = framework.numpy(ul.multilabel_logistic_loss(x, TARGETS))
    assert framework.numpy(ul.multilabel_logistic_loss(x, targets)) == expected
    assert framework.numpy(ul.value_and_grad(ul.multilabel_logistic_loss)(x, targets)[0]) == expected


@pytest.mark.parametrize("targets", OF_SERIES.values(), ids=OF_SERIES)
def test_class_indices_in_a_series(framework, targets):
    x = framework.array(LOGITS)
    assert framework.numpy(ul.softmax_nll(x, targets)) == framework.numpy(ul.softmax_nll(x, [2, 0]))


def test_weights_and_masks(framework):
    x = framework.array(LOGITS)
    lists = {"weight": [0.5, 1, 2], "where": [[True, False, True], [True, True, False]]}
    of_pandas = {"weight": pd.Series([0.5, 1, 2], index=list("cba")), "where": pd.DataFrame(lists["where"])}
    for loss, targets in ((ul.multilabel_logistic_loss, TARGETS), (ul.softmax_nll, [2, 0])):
        assert framework.numpy(loss(x, targets, **of_pandas)) == framework.numpy(loss(x, targets, **lists))
    weights = pd.Series([1, 3], dtype="Float32")
    expected = framework.numpy(ul.softmax_nll(x, [2, 0], sample_weight=[1, 3]))
    assert framework.numpy(ul.softmax_nll(x, [2, 0], sample_weight=weights)) == expected


def test_a_missing_value_is_nan(framework):
    x = framework.array(LOGITS)
    losses = framework.numpy(ul.multilabel_logistic_loss(x, NA, reduction="none"))
    assert np.isnan(losses).tolist() == [[True] * 3, [False] * 3]
    expected = framework.numpy(ul.multilabel_logistic_loss(x, TARGETS, where=[[False], [True]]))
    assert framework.numpy(ul.multilabel_logistic_loss(x, NA, where=NA.notna())) == expected


@pytest.mark.parametrize(
    ("targets", "options", "text"),
    [
        (pd.Series([2, None], dtype="Int64"), {}, "Received: float64 of shape (2,) (convert .*: .astype(int))"),
        (pd.Series(["cat", "ant"]), {}, "targets: dtype int8, .*Received: object"),
        (pd.Series(["cat", "ant"], dtype="category"), {}, "targets: dtype int8, .*Received: object"),
        (
            [2, 0],
            {"where": pd.Series([True, None, True], dtype="boolean")},
            "where: dtype bool. Received: float64 with missing values (fillna)",
        ),
        ([2, 0], {"weight": pd.Timestamp(0)}, "weight: an array. Received: a Timestamp"),
    ],
)
def test_what_is_no_number(framework, targets, options, text):
    with pytest.raises(TypeError, match=pattern(text)):
        ul.softmax_nll(framework.array(LOGITS), targets, **options)


def test_a_frame_as_logits():
    with pytest.raises(TypeError, match=pattern("Expected an array of numpy, .*Received: DataFrame.")):
        ul.softmax_nll(pd.DataFrame(LOGITS), [2, 0])


def test_layers():
    import torch

    import unilabel.layers.keras
    import unilabel.layers.torch

    x, y = np.array(LOGITS), OF_SERIES["Int32"]
    weight = pd.Series([0.5, 1, 2])
    for layer, logits in ((unilabel.layers.torch, torch.tensor(x)), (unilabel.layers.keras, x)):
        for name, targets, plain in (("SoftmaxNLL", y, [2, 0]), ("MultilabelLogisticLoss", FRAME, TARGETS)):
            loss = getattr(layer, name)
            order = (lambda z, x: (x, z)) if layer is unilabel.layers.torch else (lambda z, x: (z, x))
            plain = torch.tensor(plain) if layer is unilabel.layers.torch else np.array(plain)
            expected = loss(weight=[0.5, 1, 2])(*order(plain, logits))
            assert float(loss(weight=weight)(*order(targets, logits))) == float(expected)
