"""Promises of the recipe: one form in YAML, JSON and Python, refused early with every problem, coefficients by depth
and rule.
"""

import json
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from c2f_utils.errors import C2FError
from c2f_utils.merge import Recipe, load_recipe
from c2f_utils.merge.recipe import Coefficient

PATHS = {"base": "b", "instruct": "i", "coarse": "c"}
ISSUE = r"""
base: path-or-hub-id
instruct: path-or-hub-id
coarse: path-or-hub-id            # or a list of {path, weight} for operators with several residues
operator: {name: residue}
coefficient: {default: 0.3, knots: [[0.0, 0.1], [1.0, 0.5]],
  rules: [{match: 'mlp\.', scale: 1.2}, {match: 'lm_head', set: 0.0}]}
out_dtype: same                   # same, float32, bfloat16, bfloat16_stochastic
seed: 0
"""


def test_the_documented_recipe_file_loads(tmp_path):
    (tmp_path / "recipe.yaml").write_text(ISSUE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.coefficient.rules[0].scale == 1.2 and recipe.coefficient.knots == ((0.0, 0.1), (1.0, 0.5))


finite = st.floats(-2, 2, allow_nan=False)


@given(
    default=finite,
    knots=st.none() | st.lists(st.tuples(st.floats(0, 1), finite), min_size=1, max_size=4, unique_by=lambda k: k[0]),
    rules=st.lists(st.sampled_from([{"match": r"mlp\.", "scale": 0.5}, {"match": "lm_head", "set": 0.0}]), max_size=3),
    operator=st.sampled_from(
        [{"name": "residue"}, {"name": "trim", "density": 0.25, "scope": "global"}, {"name": "dare"}]
    ),
    out_dtype=st.sampled_from(["same", "float32", "bfloat16", "bfloat16_stochastic"]),
    seed=st.integers(0, 2**40),
)
def test_a_recipe_survives_dict_json_and_yaml(default, knots, rules, operator, out_dtype, seed):
    coefficient = {"default": default, "knots": sorted(knots) if knots else None, "rules": rules}
    recipe = Recipe(**PATHS, operator=operator, coefficient=coefficient, out_dtype=out_dtype, seed=seed)
    plain = recipe.to_dict()
    assert Recipe.from_dict(plain) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(plain))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == recipe


def test_a_recipe_is_frozen_and_can_be_a_papermill_parameter():
    recipe = Recipe(**PATHS)
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3
    assert eval(repr(recipe.to_dict())) == recipe.to_dict()  # papermill writes parameters as Python literals


def test_numbers_without_a_point_are_numbers_in_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("base: b\ninstruct: i\ncoarse: c\ncoefficient: {default: 1e-6}\n")
    assert load_recipe(tmp_path / "r.yaml").coefficient.default == 1e-6


def test_a_bare_operator_and_a_bare_coefficient_are_the_usual_ones():
    short = Recipe(**PATHS, operator="trim", coefficient=0.7)
    assert short == Recipe(**PATHS, operator={"name": "trim"}, coefficient={"default": 0.7})
    assert Recipe(**PATHS, coefficient=1).coefficient.default == 1.0


def test_every_problem_of_a_recipe_is_reported_at_once():
    with pytest.raises(C2FError) as error:
        Recipe(base=3, instruct="i", cors="c", out_dtype="int8", seed=-1, coefficient={"default": float("nan"), "x": 1})
    text = str(error.value)
    for expected in ("base", "coarse", "cors", "out_dtype", "seed", "coefficient.default", "coefficient.x"):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operator": {"name": "residual"}}, "unknown; expected one of"),
        ({"operator": {}}, "operator.name"),
        ({"operator": {"name": "residue", "density": 0.1}}, "no such key"),
        ({"operator": {"name": "trim", "density": 1.5}}, "within 0 and 1"),
        ({"operator": {"name": "trim", "density": "half"}}, "not a finite number"),
        ({"operator": {"name": "trim", "density": True}}, "not a finite number"),
        ({"operator": {"name": "trim", "scope": "layer"}}, "tensor or global"),
        ({"operator": {"name": "dare", "density": 0.0}}, "divides by it"),
        ({"operator": {"name": "dots", "density": 0.0}}, "dots divides by the norm of what is kept"),
        ({"operator": {"name": "dots", "instruct": "all"}}, "finite number"),
        ({"operator": {"name": "dare", "seed": 0.5}}, "whole number"),
        ({"operator": {"name": "tsv", "rank": 2.0}}, "operator.rank"),
        ({"operator": 3}, "operator: expected a name such as residue, or {name: trim"),
        ({"coefficient": "half"}, "coefficient: expected a number such as 0.5, or {default: 0.5"),
        ({"coefficient": {"knots": []}}, "at least one depth"),
        ({"coefficient": {"knots": [[0.5, 1], [0.5, 2]]}}, "strictly increasing"),
        ({"coefficient": {"knots": [[0.0, 1], [1.5, 2]]}}, "within 0 and 1"),
        ({"coefficient": {"knots": [[0.0, 1, 2]]}}, "knots"),
        ({"coefficient": {"rules": [{"match": "("}]}}, "exactly one of scale and set"),
        ({"coefficient": {"rules": [{"match": "(", "set": 0.0}]}}, "not a regular expression"),
        ({"coefficient": {"rules": [{"match": "a", "set": 0.0, "scale": 1.0}]}}, "exactly one"),
        ({"coarse": []}, "empty list"),
        ({"coarse": [{"path": "a"}, {"path": "b"}], "operator": {"name": "slerp"}}, "takes one coarse model"),
        ({"coarse": [{"path": "a", "wait": 1}]}, "unknown key"),
        ({"vocab": "union"}, "vocab"),
        ({"ignore": ["("]}, "regular expression"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "0"}, "seed"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(change, words):
    with pytest.raises(C2FError, match=re.escape(words)):
        Recipe(**{**PATHS, **change})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.yaml", "base: [", "cannot be parsed"),
        ("r.json", "{", "cannot be parsed"),
        ("r.yaml", "- a\n- b\n", "holds a list; expected a mapping"),
        ("r.yaml", "", "base: missing"),
        ("r.yaml", "base: b\n", "missing"),
    ],
)
def test_a_damaged_recipe_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(C2FError, match=words) as error:
        load_recipe(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(C2FError, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_depth_runs_from_the_embedding_to_the_head():
    ramp = Coefficient(knots=((0.0, 0.0), (1.0, 1.0)))
    assert ramp.at("model.embed_tokens.weight", 4) == 0.0
    assert ramp.at("model.layers.0.mlp.up_proj.weight", 4) == pytest.approx(0.2)
    assert ramp.at("model.layers.3.mlp.up_proj.weight", 4) == pytest.approx(0.8)
    assert ramp.at("model.norm.weight", 4) == 1.0
    assert ramp.at("lm_head.weight", 4) == 1.0


def test_one_layer_sits_half_way():
    assert Coefficient(knots=((0.0, 0.0), (1.0, 1.0))).at("model.layers.0.mlp.up_proj.weight", 1) == 0.5


def test_outside_the_knots_the_coefficient_is_constant():
    inner = Coefficient(knots=((0.4, 2.0), (0.6, 4.0)))
    assert inner.at("model.embed_tokens.weight", 2) == 2.0 and inner.at("lm_head.weight", 2) == 4.0


def test_rules_apply_in_order_to_the_full_name():
    rules = (
        {"match": r"mlp\.", "scale": 2.0},
        {"match": "up_proj", "set": 0.5},
        {"match": r"layers\.1\.", "scale": 3.0},
    )
    coefficient = Coefficient(default=0.1, rules=rules)
    assert coefficient.at("model.layers.0.mlp.down_proj.weight", 20) == pytest.approx(0.2)
    assert coefficient.at("model.layers.0.mlp.up_proj.weight", 20) == 0.5
    assert coefficient.at("model.layers.1.mlp.up_proj.weight", 20) == 1.5
    assert coefficient.at("model.layers.10.mlp.up_proj.weight", 20) == 0.5  # layers\.1\. is not layer 10


def test_an_unknown_place_has_no_coefficient_until_a_rule_sets_one():
    name = "vision.adapter.weight"
    assert Coefficient().at(name, 2) is None
    assert Coefficient(rules=({"match": "vision", "scale": 2.0},)).at(name, 2) is None
    assert Coefficient(rules=({"match": "vision", "set": 0.25},)).at(name, 2) == 0.25


def test_extrapolating_and_negative_coefficients_are_allowed():
    assert Recipe(**PATHS, coefficient={"default": -0.5}).coefficient.default == -0.5
    assert Recipe(**PATHS, coefficient={"default": 1.5}).coefficient.default == 1.5
