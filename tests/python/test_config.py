"""Config as a value, its grammar's round trip, and refusals that say what is allowed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thinwire
from thinwire import Config, ConfigError, dgc, error_feedback, onebit_adam

densities = st.floats(min_value=1e-6, max_value=1.0, exclude_min=False, allow_nan=False)
wires = st.sampled_from(["fp32", "bf16", "fp16"])
selectors = st.sampled_from(["sampled", "exact"])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    slots: dict[str, object] = {}
    if draw(st.booleans()):
        index = draw(st.sampled_from(["auto", "u32", "u16", "bitmap"]))
        slots["codec"] = f"topk:density={draw(densities)!r},wire={draw(wires)},select={draw(selectors)},index={index}"
        slots["exchange"] = draw(st.sampled_from(["auto", "gather"]))
        slots["feedback"] = draw(
            st.one_of(
                st.just("none"),
                st.floats(1e-3, 1).map(lambda decay: f"ef14:decay={decay!r}"),
                st.tuples(st.floats(0, 0.999), st.booleans(), st.booleans(), st.floats(0, 1e6)).map(
                    lambda t: f"dgc:momentum={t[0]!r},nesterov={int(t[1])},mask={int(t[2])},clip_norm={t[3]!r}"
                ),
            )
        )
        if draw(st.booleans()):
            slots["policy"] = (
                f"warmup:steps={draw(st.integers(1, 10**9))},densities={'/'.join(map(repr, draw(st.lists(densities, min_size=1, max_size=4))))}"
            )
    slots["min_numel"] = draw(st.integers(0, 2**40))
    slots["start_step"] = draw(st.integers(0, 2**40))
    slots["timeout"] = draw(st.floats(1e-3, 1e9))
    slots["seed"] = draw(st.integers(0, 2**63 - 1))
    slots["check_every"] = draw(st.integers(0, 2**40))
    return Config(**slots)


@settings(max_examples=300, deadline=None)
@given(configs())
def test_text_round_trip(config: Config) -> None:
    again = Config.parse(str(config))
    assert again == config and hash(again) == hash(config) and str(again) == str(config)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), eval(repr(config), {"Config": Config})):
        assert other == config


@settings(max_examples=300, deadline=None)
@given(configs(), configs())
def test_equal_exactly_if_the_text_is(a: Config, b: Config) -> None:
    assert (a == b) == (str(a) == str(b))
    assert len({a, b}) == (1 if a == b else 2)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused_with_a_reason(text: str) -> None:
    try:
        config = Config.parse(text)
    except ConfigError as error:
        assert str(error) and error.code == "invalid_config"
    else:
        assert Config.parse(str(config)) == config


@settings(max_examples=500, deadline=None)
@given(configs(), st.data())
def test_damaged_text_is_parsed_or_refused(config: Config, data: st.DataObject) -> None:
    text = str(config)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", ",", ":", "=", " ", "/", "-", "1e400", "nan", "\x00"])) + text[at + 1 :]
    try:
        again = Config.parse(damaged)
    except ConfigError as error:
        assert str(error)
    else:
        assert Config.parse(str(again)) == again


@settings(max_examples=200, deadline=None)
@given(densities, st.floats(0, 0.999), st.booleans(), st.booleans(), st.none() | st.floats(0, 1e6), st.integers(0, 10**6), wires, selectors)
def test_dgc_preset_is_the_grammar_preset(density, momentum, nesterov, mask, clip_norm, warmup_steps, wire, select) -> None:  # noqa: ANN001
    made = dgc(
        density, momentum=momentum, nesterov=nesterov, mask=mask, clip_norm=clip_norm, warmup_steps=warmup_steps, wire=wire, select=select
    )
    text = (
        f"dgc:density={density!r},momentum={momentum!r},nesterov={int(nesterov)},mask={int(mask)},clip_norm={0 if clip_norm is None else clip_norm!r},"
        f"warmup_steps={warmup_steps},wire={wire},select={select}"
    )
    assert made == Config.parse(text)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 0.999),
    st.just("auto") | st.integers(1, 10**6),
    st.none() | st.floats(0, 1e6),
    st.sampled_from(["l1", "l2"]),
    st.just("tensor") | st.integers(1, 1024).map(lambda n: 8 * n),
)
def test_onebit_adam_preset_is_the_grammar_preset(beta1, freeze, clip_norm, scale, block) -> None:  # noqa: ANN001
    made = onebit_adam(beta1=beta1, freeze=freeze, clip_norm=clip_norm, scale=scale, block=block)
    text = f"onebit_adam:beta1={beta1!r},freeze={freeze},clip_norm={0 if clip_norm is None else clip_norm!r},scale={scale},block={block}"
    assert made == Config.parse(text)


def test_defaults() -> None:
    assert onebit_adam() == Config.parse("onebit_adam") and onebit_adam(min_numel=7) == Config.parse("onebit_adam min_numel=7")
    with pytest.raises(ConfigError, match="freeze"):
        onebit_adam(freeze=-1)
    assert Config() == Config.parse("codec=none") == Config.parse(str(Config()))
    assert dgc() == Config.parse("dgc") and dgc().codec.startswith("topk:density=0.001,")
    assert error_feedback("ef14", codec="topk:density=0.01") == Config.parse("codec=topk:density=0.01 feedback=ef14")
    assert error_feedback(codec="topk:density=0.01", decay=0.5, min_numel=7) == Config.parse(
        "codec=topk:density=0.01 feedback=ef14:decay=0.5 min_numel=7"
    )
    with pytest.raises(ConfigError, match=r"kind='ef14:decay=.9' has keys.*keyword arguments"):
        error_feedback("ef14:decay=.9", codec="topk:density=0.01", residual="bf16")
    config = dgc(0.01, min_numel=5, timeout=1.5)
    assert (config.min_numel, config.timeout, config.start_step, config.seed, config.check_every) == (5, 1.5, 0, 0, 0)
    assert config.keys_of("feedback")["momentum"] == "0.9" and math.isclose(float(config.keys_of("codec")["density"]), 0.01)


def test_a_value_not_a_place() -> None:
    config = dgc()
    for name in ("codec", "min_numel", "new"):
        with pytest.raises(AttributeError):
            setattr(config, name, 1)
    assert config != str(config) and config != None  # noqa: E711


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("topk:density=1.5", ["topk", "codec=topk:density=1.5"]),
        ("codec=topk:density=1.5", ["topk", "density=1.5", "(0, 1]"]),
        ("codec=topk:density=nan", ["density"]),
        ("codec=topk", ["density"]),
        ("codec=topk:density=0.1,colour=red", ["colour", "wire"]),
        ("codec=tpok:density=0.1", ["tpok", "topk"]),
        ("codecs=topk:density=0.1", ["codecs", "codec"]),
        ("codec=none feedback=dgc", ["feedback=dgc", "sparse"]),
        ("dgc:density=0.1 codec=none", ["codec"]),
        ("codec=topk:density=0.1 codec=none", ["codec"]),
        ("dgc:momentum=1", ["momentum", "[0, 1)"]),
        ("dgc min_numel=-1", ["min_numel"]),
        ("dgc timeout=0", ["timeout"]),
        ("dgc exchange=two_phase", ["two_phase", "gather"]),
    ],
)
def test_refusals_name_what_is_wrong_and_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse(text)
    for word in words:
        assert word in str(caught.value), caught.value
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, thinwire.Error) and isinstance(caught.value, RuntimeError)
    assert caught.value.code == "invalid_config"


@pytest.mark.parametrize("slots", [{"codec": "none feedback=ef14"}, {"codec": ""}, {"colour": "red"}, {"min_numel": 1.5}])
def test_slots_by_name_are_refused_alike(slots: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config(**slots)
    with pytest.raises(ConfigError, match="by name"):
        Config("codec=none")
