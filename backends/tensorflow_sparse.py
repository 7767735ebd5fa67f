"""TensorFlow: sparse tensors as targets, by the columns of their elements, in eager mode and in graphs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..sparse import Padded


def of_tensor(targets: Any) -> Padded:
    """A tf.SparseTensor. What is there twice is added."""
    with tf.name_scope("XLA_takes_unilabel.Positives"):  # XLA names what it cannot compile
        shape, values = tf.cast(targets.dense_shape, tf.int64), targets.values
        places = tf.reduce_sum(targets.indices * tf.math.cumprod(shape, exclusive=True, reverse=True), axis=1)
        order = tf.argsort(places)
        places, which = tf.unique(tf.gather(places, order))
        values = tf.gather(tf.cast(values, tf.int32) if values.dtype == tf.bool else values, order)
        values = tf.math.unsorted_segment_sum(values, which, tf.size(places))
        are_ones = tf.executing_eagerly() and bool(tf.reduce_all((values == 0) | (values == 1)))
        if are_ones:  # a 0 that is there is no label
            places = tf.boolean_mask(places, values != 0)

        rows = tf.RaggedTensor.from_value_rowids(places % shape[-1], places // shape[-1], tf.reduce_prod(shape[:-1]))
        columns = rows.to_tensor(-1)
        batch = tf.concat([shape[:-1], tf.shape(columns, tf.int64)[1:]], axis=0)
        if are_ones:
            return Padded(tf.reshape(columns, batch), None, tuple(targets.shape))
        ends = tf.where(rows.row_lengths() > 0, rows.row_limits(), 0)
        last = tf.stop_gradient(tf.gather(tf.concat([tf.zeros([1], values.dtype), values], axis=0), ends))
        values = tf.where(columns < 0, last[:, None], rows.with_values(values).to_tensor(0))
        return Padded(tf.reshape(columns, batch), tf.reshape(values, batch), tuple(targets.shape))
