"""qjax.models.fingerprint: of quantized leaves all that they are; of others their arrays (`test_sweep.py` has whole models)."""

import dataclasses

import jax.numpy as jnp

from qjax.activations import parse_activation
from qjax.formats import parse_format
from qjax.kernels.layout import prepare
from qjax.linear import Linear, LowRank
from qjax.maps import Divide, Scale
from qjax.models.fingerprint import model_fingerprint
from qjax.models.model import Model
from qjax.rounding.nearest import rtn
from tests.conftest import tiny_config


def test_the_fingerprint_is_of_what_leaves_are_besides_their_arrays():
    def fingerprint(leaf):
        return model_fingerprint(Model(tiny_config(), {"kernel": leaf}, None, "x"))

    weight = jnp.ones((8, 4))
    q, scale, low = rtn(weight, parse_format("int8-channel-sym-max"))[0], jnp.ones(8), (jnp.ones((8, 2)), jnp.ones((2, 4)))
    others = [
        q,
        dataclasses.replace(q, format=parse_format("int8-channel-sym")),
        prepare(q),
        Linear(q),
        Linear(q, activation="int8-token"),
        Linear(q, activation="int4-token"),
        Linear(q, (Scale(scale),)),
        Linear(q, (Divide(scale),)),
        Linear(q, adapter=LowRank(*low)),
        Linear(q, adapter=LowRank(*low, scaling=2.0)),
    ]
    assert len(set(map(fingerprint, others))) == len(others)
    assert fingerprint(Linear(q, activation="int8-token")) == fingerprint(Linear(q, activation=parse_activation("int8-token")))
    assert fingerprint(weight) == "e9ae39070942a4fa"  # rows of models in floating point have such
