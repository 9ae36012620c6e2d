"""qjax.models.config: its text, of which fingerprints are made."""

import dataclasses

from qjax.models.config import DecoderConfig, LayerKind

from .conftest import FAMILY_CHANGES, tiny_config


def test_models_measured_before_a_field_existed_keep_their_fingerprint():
    """A field that stands at its default is not in the text, unless it was from the beginning."""
    assert repr(tiny_config(bos_id=1)) == (
        "DecoderConfig(family='llama', vocabulary_size=257, hidden_size=32, mlp_size=48, layers=2, heads=4, kv_heads=2, "
        "head_dim=8, context=32, norm='rms', norm_epsilon=1e-05, activation='silu', gated=True, positions='rope', "
        "rope_theta=10000.0, rope_scaling=None, qkv_bias=False, attention_output_bias=False, mlp_bias=False, "
        "sliding_window=None, tied=False, bos_id=1, eos_id=None)"
    )


def test_different_configurations_differ_in_text():
    for changes in FAMILY_CHANGES.values():
        config = tiny_config(**changes)
        assert eval(repr(config), {"DecoderConfig": DecoderConfig, "LayerKind": LayerKind}) == config
        plain = DecoderConfig(*dataclasses.astuple(config)[:9])
        for field in dataclasses.fields(config)[9:]:
            value = getattr(config, field.name)
            assert (repr(dataclasses.replace(plain, **{field.name: value})) == repr(plain)) == (value == field.default)
