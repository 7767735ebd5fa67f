"""ONNX's own node tests of its two losses, SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss, on every backend."""

import collections
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as onnx_cases

# Importing a file of cases adds them to the list of all. (`collect_testcases` imports those of every operator.)
from onnx.backend.test.case.node import negativeloglikelihoodloss, softmax_cross_entropy_loss  # noqa: F401

import unilabel as ul

LOSSES: dict[str, Any] = {"SoftmaxCrossEntropyLoss": ul.softmax_nll, "NegativeLogLikelihoodLoss": ul.nll}
CASES = [  # a case of more nodes is one of these again, written in simpler operators
    case
    for case in onnx_cases._NodeTestCases
    if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in LOSSES
]


def test_all_are_here():
    counts = collections.Counter(case.model.graph.node[0].op_type for case in CASES)
    assert counts == {"SoftmaxCrossEntropyLoss": 34, "NegativeLogLikelihoodLoss": 18}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_of_onnx(framework, case):
    def close(actual, expected):
        # ONNX asks for 1e-3. Its figures are float32's too: the log of p, and sums of up to 6480 examples.
        np.testing.assert_allclose(framework.numpy(actual), expected, rtol=16 * 2.0**-23, atol=0, strict=True)

    (node,) = case.model.graph.node
    ((inputs, outputs),) = case.data_sets
    x, targets, weight = (*map(framework.backend.asarray, inputs), None)[:3]
    options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    options["reduction"] = options["reduction"].decode()
    close(LOSSES[node.op_type](x, targets, weight=weight, axis=1, **options), outputs[0])
    for log_prob in outputs[1:]:
        close(ul.log_softmax(x, axis=1), log_prob)
