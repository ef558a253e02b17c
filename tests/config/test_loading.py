"""Loading: overrides, shipped files, and every mistake in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fptquant.config.labels import EXAMPLE_LABELS
from fptquant.config.loading import dump_config, find_config, load_config, parse_config, shipped_configs
from fptquant.config.quantization import SITE_SETS
from fptquant.config.schema import Config
from fptquant.config.tables import load_table
from fptquant.errors import UserError


def mistakes(*overrides: str, file: str | Path = "rtn") -> list[str]:
    """The lines of the message, without the first."""
    with pytest.raises(UserError) as caught:
        load_config(file, *overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


METHODS = [name for name, path in shipped_configs().items() if path.parent.name != "tables"]


@pytest.mark.parametrize("name", METHODS)
def test_shipped_configs_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    file = tmp_path / "again.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/methods/rtn.yaml") == find_config("rtn")
    (tmp_path / "configs" / "methods").mkdir(parents=True)
    own = tmp_path / "configs" / "methods" / "rtn.yaml"
    own.write_text("name: mine\n", encoding="utf-8")
    assert load_config("configs/methods/rtn.yaml").name == "mine"


def test_a_recipe_says_how_it_differs_from_another(tmp_path: Path) -> None:
    parent = load_config("fptquant-local")
    file = tmp_path / "own.yaml"
    file.write_text(
        "extends: fptquant-local\nname: own\ntransforms: {value_mixing: {start: identity}, up_scaling: null}\n"
        "quantization: {label: w3a16, weight: {range: {candidates: 7}}}\n"
    )
    own = load_config(file)
    assert own.name == "own"
    assert own.transforms.used == tuple(name for name in parent.transforms.used if name != "up_scaling")
    assert own.transforms.value_mixing is not None
    assert own.transforms.value_mixing.start == "identity"
    assert own.quantization.label == "w3a16"
    assert own.quantization.weight.range == parent.quantization.weight.range.model_copy(update={"candidates": 7})
    (tmp_path / "child.yaml").write_text("extends: own.yaml\nname: child\nquantization: w4a8kv8-static\n")
    child = load_config(tmp_path / "child.yaml", "seed=3")
    assert (child.quantization.label, child.quantization.weight.range.candidates, child.seed) == ("w4a8kv8-static", 7, 3)


def test_recipes_that_extend_nothing_or_themselves(tmp_path: Path) -> None:
    def refused(text: str, name: str = "own.yaml") -> str:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / name)
        return str(caught.value)

    assert "name: is required" in refused("extends: rtn\nseed: 1\n")
    assert "there is no config 'rtm'; did you mean 'rtn'?" in refused("extends: rtm\nname: own\n")
    offered = refused("extends: nonsense\nname: own\n")
    assert "one of: " in offered
    assert "extends is 3; write the name" in refused("extends: 3\nname: own\n")
    (tmp_path / "other.yaml").write_text("extends: own.yaml\nname: other\n")
    assert "which extends it in turn" in refused("extends: other.yaml\nname: own\n")
    assert "did you mean rounding?" in refused("extends: rtn\nname: own\nroundin: {method: gptq}\n", "wrong.yaml")


def test_overrides_are_yaml_values() -> None:
    overrides = ("seed=7", "local.lr=1e-3", "local.method=adamw", "transforms.up_scaling=false", "model=a/b")
    config = load_config("fptquant-local", *overrides)
    assert (config.seed, config.local.lr, config.transforms.up_scaling, config.model) == (7, 0.001, None, "a/b")
    assert load_config("rtn", "transforms.value_mixing.start=identity").transforms.value_mixing is not None


def test_a_label_keeps_the_choices_of_the_method() -> None:
    before = load_config("fptquant-local", "quantization.full_precision_tokens=2")
    after = load_config("fptquant-local", "quantization.full_precision_tokens=2", "quantization=w3a4kv4-dynamic-g64")
    assert after.quantization.label == "w3a4kv4-dynamic-g64"
    assert after.quantization.weight.range == before.quantization.weight.range
    assert after.quantization.full_precision_tokens == 2
    narrow = load_config("fptquant-local", "quantization=w4a8kv8-static", "quantization.weight.bits=3")
    assert narrow.quantization.label == "w3a8kv8-static"


def test_a_label_alone_is_a_quantization() -> None:
    assert parse_config({"name": "x", "quantization": "w4a16"}).quantization.weight.bits == 4


def test_every_mistake_is_reported_at_once() -> None:
    found = mistakes(
        "transfroms.up_scaling={}", "quantization.weight.bits=9", "quantization.weight.bit=3", "seed=a", "dtype=fp32",
        "quantization.overrides.down_inn.bits=4", "device=gpu", "evaluation=3", "transforms.residual_rotation={}", "nonsense",
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 10
    for expected in (
        "transfroms: unknown key; did you mean transforms?",
        "quantization.weight.bits: 9 bits are not possible; choose 2 to 8, or 16",
        "quantization.weight.bit: unknown key; did you mean bits?",
        "seed: must be a valid integer, not 'a'",
        "dtype: 'fp32' is not possible; did you mean float32?",
        "quantization.overrides.down_inn: 'down_inn' is not possible; did you mean down_in?",
        "device: 'gpu' is not possible; write auto, cpu, cuda or cuda:0",
        "evaluation: must hold keys and values, not 3",
        "norm_gains: kept is not possible with transforms.residual_rotation",
        "nonsense: is not of the form key=value",
    ):
        assert expected in text


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 12, 17, 32])
def test_impossible_bits(bits: int) -> None:
    for part in ("weight", "activation", "kv_cache"):
        assert "choose 2 to 8, or 16" in mistakes(f"quantization.{part}.bits={bits}")[0]
    assert "choose 2 to 8, or 16" in mistakes(f"quantization=w{abs(bits)}a8" if bits > 0 else "quantization.weight.bits=1")[0]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["transforms.residual_rotation={}"], "norm_gains"),
        (["transforms.residual_scaling={}"], "norm_gains"),
        (["quantization.weight.group_size=64"], "quantization.weight.group_size"),
        (["quantization.weight.granularity=per_group"], "quantization.weight.group_size"),
        (["quantization.activation.granularity=per_token"], "quantization.activation.granularity"),
        (["quantization.kv_cache.dynamic=true", "quantization.kv_cache.granularity=per_head"], "quantization.kv_cache.granularity"),
        (["quantization.overrides.q.symmetric=true"], "quantization.overrides.q"),
        (["quantization=w4a16", "quantization.overrides.down_in.symmetric=true"], "quantization.overrides.down_in"),
        (["local.method=closed_form", "local.p=3", "transforms.query_key_rotation={}"], "local.p"),
        (["norm_gains=fused", "transforms.residual_rotation.learn=true"], "transforms.residual_rotation.learn"),
        (["quantization.full_precision_tokens=512"], "quantization.full_precision_tokens"),
        (["quantization.full_precision_tokens=8", "training.window=8"], "quantization.full_precision_tokens"),
        (["quantization=w4a16", "training.lr.weight_range=null"], "training.lr"),
        (["norm_gains=kept", "training.lr.residual_rotation=0.1"], "norm_gains"),
        (["smoothing={}"], "smoothing"),
        (["smoothing={}", "transforms.value_mixing={start: identity, constraint: orthogonal}"], "smoothing"),
        (["smoothing={}", "transforms.value_mixing={}"], "smoothing"),
        (["rounding={method: gptq, window: 8}", "quantization.full_precision_tokens=8"], "quantization.full_precision_tokens"),
        (["smoothing={}", "transforms.up_scaling={}", "local={method: closed_form, p: 4}"], "smoothing"),
        (["smoothing={}", "transforms.norm_scaling={}", "training.lr.residual_rotation=0.1", "norm_gains=fused"],
         "transforms.norm_scaling"),
        (["rounding={method: gptq, act_order: true, static_groups: false}", "quantization=w4a16-g64"], "rounding.act_order"),
        (["rounding={method: gptq, search_ranges: true, static_groups: false}", "quantization=w4a16-g64"],
         "rounding.search_ranges"),
        (["rounding={method: autoround, windows: 4}"], "rounding.batch"),
        (["rounding={method: gptq, text: 'wikitext2,add_bos_token=false'}"], "rounding.text"),
        (["transforms={kronecker: {}, down_hadamard: {}}"], "transforms.kronecker"),
        (["transforms={kronecker: {}, out_hadamard: {}}"], "transforms.kronecker"),
        (["transforms={query_key_mixing: {}, query_key_hadamard: {}}"], "transforms.query_key_mixing"),
        (["transforms={kronecker: {}, block_rotation: {}}"], "transforms.kronecker"),
        (["transforms={down_hadamard: {}, block_rotation: {}}"], "transforms.block_rotation"),
        (["transforms.query_key_rotation={constraint: scale}", "local={method: adamw}"],
         "transforms.query_key_rotation.constraint"),
        (["transforms.value_mixing={constraint: diagonal}"], "transforms.value_mixing.start"),
        (["quantization.overrides.down_in.full_precision_tokens=512"], "quantization.overrides.down_in.full_precision_tokens"),
    ],
)  # fmt: skip
def test_contradictions(overrides: list[str], path: str) -> None:
    found = mistakes(*overrides)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")


def test_learning_rates_of_what_is_not_there_are_no_mistake() -> None:
    training = load_config("rtn", "quantization=w4a8kv8-dynamic", "training.steps=3").training
    assert training is not None
    assert (training.steps, training.lr.query_key_rotation, training.lr.residual_rotation) == (3, 0.002, None)
    found = mistakes("quantization=w16a16", "training.lr.query_key_rotation=0.1", "norm_gains=fused")
    assert found == ["training.lr: nothing would be trained; give a learning rate to one of these: residual_rotation"]
    nothing = mistakes("quantization=w16a16", "training={}")
    assert nothing == ["training.lr: nothing can be trained: the config uses no transform and no range"]
    overridden = load_config("rtn", "quantization=w16a16", "training={}", "quantization.overrides.down_in.bits=8")
    assert overridden.training is not None


WITHOUT_EFFECT = [
    ("local.lr", ["local.lr=0.1"]),
    ("local.steps", ["local.steps=7"]),
    ("local.value_steps", ["local.method=adamw", "local.value_steps=7"]),
    ("local.value_steps", ["transforms.value_mixing=false", "local={value_steps: 7}"]),
    ("local.up_p", ["transforms.up_scaling=false", "local.up_p=3"]),
    ("local.p", ["local.method=none", "local.p=3"]),
    ("transforms.residual_rotation.lr", ["transforms.residual_rotation.lr=0.1"]),
    ("quantization.weight.range.p", ["quantization.weight.range.p=3"]),
    ("quantization.weight.range.candidates", ["quantization.weight.range={method: percentile, candidates: 5}"]),
    ("quantization.weight.range.clip_ratio", ["quantization.weight.range.clip_ratio=0.8"]),
    ("quantization.weight.range.method", ["quantization=w16a8", "quantization.weight.range.method=lp"]),
    ("quantization.weight.symmetric", ["quantization=w16a8", "quantization.weight.symmetric=false"]),
    ("quantization.activation.range.clip_ratio", ["quantization.activation.range.clip_ratio=0.8"]),
    ("quantization.activation.range.lowest_ratio", ["quantization=w4a4-dynamic", "quantization.activation.range.lowest_ratio=0.2"]),
    ("quantization.kv_cache.symmetric", ["quantization=w4a8", "quantization.kv_cache.symmetric=true"]),
    ("quantization.full_precision_tokens", ["quantization=w4a16", "quantization.full_precision_tokens=1"]),
    ("quantization.prefix", ["quantization=w4a16", "quantization.prefix=auto"]),
    ("quantization.prefix", ["quantization=w16a16", "quantization.prefix=[1]"]),
    ("transforms.query_key_hadamard", ["quantization=w4a8", "transforms.query_key_hadamard={}"]),
    ("transforms.norm_scaling", ["transforms.norm_scaling={}"]),
    ("rounding.act_order", ["rounding.act_order=true"]),
    ("rounding.windows", ["rounding.windows=3"]),
    ("rounding.method", ["quantization=w16a8", "rounding.method=gptq"]),
    ("rounding.static_groups", ["rounding={method: gptq, static_groups: false}"]),
    ("rounding.search_ranges", ["rounding={method: nearest, search_ranges: true}"]),
    ("rounding.candidates", ["rounding={method: gptq, candidates: 9}"]),
    ("rounding.descent_sweeps", ["rounding={method: autoround, descent_sweeps: 4}"]),
    ("rounding.iterations", ["rounding={method: gptq, iterations: 20}"]),
    ("rounding.learn_clipping", ["rounding.learn_clipping=false"]),
    ("rounding.damping", ["rounding={method: autoround, damping: 0.1}"]),
    ("rounding.lr", ["rounding={method: gptq, lr: 0.1}"]),
    ("quantization.overrides.o_in.symmetric", ["quantization.overrides.o_in={bits: 16, symmetric: true}"]),
    ("quantization.overrides.o_in.range.p", ["quantization.overrides.o_in.range={method: mse, p: 3.0}"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "overrides"), WITHOUT_EFFECT)
def test_what_is_given_without_effect_is_a_mistake(path: str, overrides: list[str]) -> None:
    found = mistakes(*overrides, file="fptquant-local")
    assert len(found) == 1
    assert found[0].startswith(f"{path}: has no effect")
    load_config("fptquant-local", *overrides, several=True)


def test_a_file_chooses_for_every_setting_but_does_not_contradict_itself(tmp_path: Path) -> None:
    for name in METHODS:
        for label in EXAMPLE_LABELS:
            load_config(name, f"quantization={label}")
    file = tmp_path / "own.yaml"
    file.write_text("name: own\ntransforms: {value_mixing: {}}\nlocal: {lr: 0.1}\nquantization: {label: w4a16, prefix: auto}\n")
    assert mistakes(file=file) == ["local.lr: has no effect: they belong to AdamW; set local.method=adamw or remove it"]
    assert load_config(file, "local.method=adamw").local.lr == 0.1
    assert mistakes("quantization=w4a8", file=file)[0].startswith("local.lr")
    with pytest.raises(UserError, match=r"local\.lr: has no effect"):
        parse_config({"name": "x", "local": {"lr": 0.1}})


def test_what_an_override_leaves_without_effect_is_no_mistake_and_not_saved(tmp_path: Path) -> None:
    config = load_config("smoke", "local.method=none", "quantization.weight.range.method=min_max")
    assert config.local.value_steps == 5
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    again = load_config(file)
    assert (again.local.value_steps, again.quantization.weight.range.candidates) == (100, 80)
    assert dump_config(again) == dump_config(config)


SHARED = [
    ("quantization.activation.granularity", "per_head", "attn_in has no heads"),
    ("quantization.activation.granularity", "per_group", "per_group needs a group size"),
    ("quantization.kv_cache.group_size", "32", "32 has no meaning with granularity = per_head"),
    ("quantization.overrides.down_in.granularity", "per_head", "down_in has no heads"),
    ("quantization.overrides.o_in.granularity", "per_group", "per_group needs a group size"),
    ("quantization.overrides.k_cache.group_size", "16", "16 has no meaning with granularity = per_head"),
]


@pytest.mark.parametrize(("key", "value", "message"), SHARED)
def test_ranges_that_nothing_can_share(key: str, value: str, message: str) -> None:
    found = mistakes(f"{key}={value}")
    assert message in "\n".join(found)
    assert all(key.rpartition(".")[0] in line for line in found)


def test_channels_of_softmax_outputs_are_tokens() -> None:
    options = ["quantization.sites=linears_kv_bmm", "quantization.activation={bits: 8, granularity: per_group, group_size: 64}"]
    assert mistakes(*options) == [
        "quantization.activation.granularity: the channels of softmax_out are tokens; set per_head or per_tensor there"
    ]
    load_config("rtn", *options, "quantization.overrides.softmax_out.granularity=per_head")


def test_groups_of_a_method_stay_for_static_labels(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "name: own\nquantization:\n  label: w4a8kv8-static\n  activation: {granularity: per_group, group_size: 64}\n"
        "  overrides: {o_in: {granularity: per_head}}\n"
    )
    static = load_config(file, "quantization=w4a4kv4-static").quantization
    assert (static.activation.granularity, static.activation.group_size) == ("per_group", 64)
    assert static.setting == "w4a4kv4-static, activations per group of 64, o_in per head"
    dynamic = load_config(file, "quantization=w4a4kv4-dynamic").quantization
    assert (dynamic.activation.granularity, dynamic.activation.group_size) == ("per_token", None)
    assert mistakes("quantization=w4a4-dynamic", "quantization.overrides.o_in.granularity=per_head", file=file)[0].startswith(
        "quantization.overrides.o_in.granularity: has no effect"
    )


def test_windows_of_the_evaluation() -> None:
    assert load_config("rtn", "evaluation.windows=all").evaluation.windows == "all"
    for text in ("0", "some", "true"):
        assert mistakes(f"evaluation.windows={text}")[0].endswith("is no number of windows; write at least 1, or all")


def test_prefixes() -> None:
    for text, value in (("auto", "auto"), ("[1, 2]", [1, 2]), ("'a text'", "a text"), ("null", None)):
        assert load_config("rtn", f"quantization.prefix={text}").quantization.prefix == value
    for text in ("true", "[]", "''", "3", "[a]", "[-1]", "[true]", "{}"):
        found = mistakes(f"quantization.prefix={text}")
        assert len(found) == 1
        assert "is no prefix; write auto, a text, a list of token ids, or null" in found[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.lr.up_scaling=0.1"], "training.lr.up_scaling: has no effect: transforms.up_scaling is not used"),
        (["training.lr.kv_cache_range=0.1"], "training.lr.kv_cache_range: has no effect: quantization.kv_cache has no"),
        (["training.objective=hidden_mse", "training.temperature=2.0"], "training.temperature: has no effect: the objective"),
    ],
)  # fmt: skip
def test_trained_settings_without_effect(overrides: list[str], message: str) -> None:
    found = mistakes("quantization=w4a16", *overrides)
    assert len(found) == 1
    assert found[0].startswith(message)
    without = load_config("rtn", "quantization=w4a16", "training.lr.up_scaling=null", "training.objective=hidden_mse")
    assert without.training is not None


def test_a_text_that_nobody_learns_from_is_refused() -> None:
    assert load_config("gptq", "text=model").text == "model"
    assert load_config("rtn", "quantization=w4a16", "text=model", several=True).text == "model"
    for overrides in (["text=model"], ["text=model", "rounding.method=gptq", "rounding.text=topics"]):
        with pytest.raises(UserError, match="text: has no effect: no stage learns from it"):
            load_config("rtn", "quantization=w4a16", *overrides)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    for content, message in [
        ("- a\n- b\n", "must hold keys and values"),
        ("name: [", "is not valid YAML"),
        ("name: x\nname: y\n", "'name' is given twice"),
        ("name: {{model}}\n", "cannot be a key"),
        ("name: x\nseed: 2026-13-01\n", "month must be in 1..12"),
    ]:
        file = tmp_path / "bad.yaml"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_config(file)
    with pytest.raises(UserError, match="did you mean 'fptquant-local'"):
        load_config("fptquant-locl")
    for override in ("model={{name}}", "seed=2026-13-01"):
        with pytest.raises(UserError, match="is not valid YAML; put text"):
            load_config("rtn", override)


def test_configs_are_frozen_and_fill_in_their_names() -> None:
    config = load_config("rtn", "quantization=w4a16", "output=runs/{name}/{setting}")
    assert config.output_folder == "runs/rtn/w4a16"
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_the_schema_names_the_sites_that_exist() -> None:
    from fptquant.quantizers import sites

    assert {name: set(points) for name, points in SITE_SETS.items()} == {
        name: set(points) for name, points in sites.SITE_SETS.items()
    }
    assert set(SITE_SETS["all"]) == set(sites.POINTS)


def test_dumps_are_plain_yaml() -> None:
    assert Config.model_validate(yaml.safe_load(dump_config(load_config("smoke")))) == load_config("smoke")


def test_a_table_is_not_taken_for_a_method() -> None:
    with pytest.raises(UserError, match="table of several methods; `fptquant table` makes it"):
        load_config("demo")


def test_a_method_and_a_table_are_told_apart() -> None:
    with pytest.raises(UserError, match="rtn is one method; `fptquant run` takes it"):
        load_table("rtn")
    with pytest.raises(UserError, match="demo is a table of several methods"):
        load_config("demo")
    with pytest.raises(UserError, match="there is no config 'rtx'") as caught:
        load_config("rtx")
    assert "ablation" not in str(caught.value)
    with pytest.raises(UserError, match="there is no config 'ablatoin'; did you mean 'ablation'") as caught:
        load_table("ablatoin")
    assert "quarot" not in str(caught.value)
