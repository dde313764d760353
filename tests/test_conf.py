"""conf/: composing, every kind of mistake, overrides, and what it costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import choices, compose
from conf.errors import ConfigError
from conf.json_schema import schemas, stale
from conf.problems import ConfigErrors
from conf.yaml import dump, read
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def edit(small: Path, file: str, text: str) -> None:
    (small / "conf" / file).write_text(text, encoding="utf-8")


def test_composes_with_defaults_files_experiment_and_origins(small: Path) -> None:
    composed = compose(conf=small / "conf")
    assert (composed.config.tune.steps, composed.config.tune.seed, composed.config.tune.batch) == (10, 7, 8)
    assert composed.origin("tune.steps") == "conf/tune/sft.yaml"
    assert composed.origin("tune.seed") == "conf/experiment/default.yaml"
    assert composed.origin("tune.batch") == "conf/schema.py"
    assert composed.values["select"]["policy"] == composed.values["collect"]["policy"]


def test_an_experiment_chooses_in_a_group(small: Path) -> None:
    composed = compose(["experiment=adapter"], conf=small / "conf")
    assert composed.config.tune.lora is not None
    assert composed.config.tune.lora.rank == 4


def test_yaml_is_read_as_omegaconf_reads_it(small: Path) -> None:
    edit(small, "tune/sft.yaml", "steps: 10\nlearning_rate: 1e-5\n")
    edit(small, "package/toy.yaml", "licence: 2024-01-01\ndescription: &x A toy.\nintended_use: *x\nlimitations: All.\n")
    composed = compose(conf=small / "conf")
    assert composed.config.tune.learning_rate == 1e-5
    assert (composed.config.package.licence, composed.config.package.intended_use) == ("2024-01-01", "A toy.")


def test_overrides_are_hydras(small: Path) -> None:
    composed = compose(["tune=lora", "tune.steps=21", "+tune.batch=3"], conf=small / "conf")
    assert composed.config.tune.lora is not None
    assert (composed.config.tune.steps, composed.config.tune.batch) == (21, 3)
    with pytest.raises(ConfigErrors, match=r"Could not override 'tune\.stepz'"):
        compose(["tune.stepz=1"], conf=small / "conf")


MISTAKES: dict[str, tuple[dict[str, str], list[str]]] = {
    "unknown key": (
        {"tune/sft.yaml": "steps: 1\nlearning_rat: 0.1\n"},
        [r"conf/tune/sft\.yaml: tune\.learning_rat: unknown key; did you mean learning_rate\?"],
    ),
    "unknown key, far": ({"tune/sft.yaml": "steps: 1\nzzz: 0.1\n"}, [r"conf/tune/sft\.yaml: tune\.zzz: unknown key; known here: accumulate, batch"]),
    "unknown nested key": (
        {
            "collect/toy.yaml": "datasets:\n  rows: {origin: {kind: http, url: https://example.org/x, sha265: x, licence: a, classification: public}, use: train}\npolicy: {}\n"
        },
        [
            r"conf/collect/toy\.yaml: collect\.datasets\.rows\.origin\.sha265: unknown key; did you mean sha256\?",
            r"collect\.datasets\.rows\.origin\.sha256: is mandatory",
        ],
    ),
    "unknown top-level key": (
        {"experiment/default.yaml": "# @package _global_\ntuen: {seed: 1}\n"},
        [r"conf/experiment/default\.yaml: tuen: unknown key; did you mean tune\?"],
    ),
    "wrong type": ({"tune/sft.yaml": "steps: many\n"}, [r'conf/tune/sft\.yaml: tune\.steps: input should be a valid integer; the value is "many"']),
    "a number as text": ({"tune/sft.yaml": "steps: '10'\n"}, [r"conf/tune/sft\.yaml: tune\.steps: input should be a valid integer"]),
    "out of range": (
        {"tune/sft.yaml": "steps: 1\nwarmup: 1.5\n"},
        [r"conf/tune/sft\.yaml: tune\.warmup: input should be less than or equal to 1; the value is 1\.5"],
    ),
    "not a number": ({"tune/sft.yaml": "steps: 1\nlearning_rate: .nan\n"}, [r"conf/tune/sft\.yaml: tune\.learning_rate: input should be a finite number"]),
    "mandatory, absent": (
        {"package/toy.yaml": "licence: MIT\nintended_use: x\nlimitations: y\n"},
        [r"conf/package/toy\.yaml: package\.description: is mandatory and has no value"],
    ),
    "mandatory, ???": ({"tune/sft.yaml": "steps: ???\n"}, [r"conf/tune/sft\.yaml: tune\.steps: is mandatory \(`\?\?\?`\) and has no value"]),
    "unknown choice": (
        {"experiment/default.yaml": "# @package _global_\ndefaults:\n  - override /tune: lorra\n"},
        [r"conf/experiment/default\.yaml: tune: there is no choice 'lorra'; did you mean lora\? conf/tune/ has: lora, sft"],
    ),
    "cross-field": ({"tune/sft.yaml": "steps: 1\nepochs: 1.0\n"}, [r"conf/tune/sft\.yaml: tune: set exactly one of epochs and steps: epochs=1\.0 steps=1"]),
    "cross-stage": (
        {"redteam/toy.yaml": "attacks: [bad, wrose]\nbenign: [good]\n"},
        [r"redteam\.attacks names 'wrose', which is no dataset of guard\.attacks with use: test or split"],
    ),
    "a gate on nothing": (
        {"gate/toy.yaml": "absolute:\n  r: {metric: evaluate.intnt, direction: at_least, limit: 0.5}\n"},
        [r"gate\.absolute\.r\.metric='evaluate\.intnt' is measured by no task of evaluate"],
    ),
    "an empty gate": ({"gate/toy.yaml": "absolute: {}\n"}, [r"conf/gate/toy\.yaml: gate: absolute is empty: a gate without a rule cannot hold"]),
    "environment": (
        {"package/toy.yaml": "licence: ${oc.env:HOME}\ndescription: x\nintended_use: x\nlimitations: y\n"},
        [r"conf/package/toy\.yaml: package\.licence: \$\{oc\.env:HOME\} would publish"],
    ),
    "environment with a blank": (
        {"package/toy.yaml": "licence: '${ oc.env:HOME}'\ndescription: x\nintended_use: x\nlimitations: y\n"},
        [r"would publish the environment"],
    ),
    "cycle": (
        {"tune/sft.yaml": "steps: ${tune.batch}\nbatch: ${tune.steps}\n"},
        [r"conf/tune/sft\.yaml: tune\.steps: interpolation", r"conf/tune/sft\.yaml: tune\.batch: interpolation"],
    ),
    "dangling interpolation": ({"tune/sft.yaml": "steps: ${tune.nowhere}\n"}, [r"conf/tune/sft\.yaml: tune\.steps: interpolation: .*nowhere"]),
    "unreadable": ({"tune/sft.yaml": "steps: [1\n"}, [r"conf/tune/sft\.yaml: unreadable YAML, line 2"]),
    "unreadable experiment": ({"experiment/default.yaml": "# @package _global_\ntune: [1\n"}, [r"conf/experiment/default\.yaml: unreadable YAML, line 3"]),
    "a key twice": ({"tune/sft.yaml": "steps: 1\nsteps: 2\n"}, [r"conf/tune/sft\.yaml: unreadable YAML, line 2: the key 'steps' stands here twice"]),
    "not a mapping": ({"tune/sft.yaml": "- 1\n"}, [r"conf/tune/sft\.yaml: holds a list"]),
    "defaults, not a list": (
        {"experiment/default.yaml": "# @package _global_\ndefaults: {override /tune: lora}\n"},
        [r"conf/experiment/default\.yaml: defaults: must be a list of choices, as `- tune: lora`; the value is \{"],
    ),
    "a header of two words": ({"experiment/default.yaml": "# @package a b\ntune: {seed: 7}\n"}, [r"conf: Too many components"]),
    "an override of nothing": (
        {"experiment/default.yaml": "# @package _global_\ndefaults:\n  - override /tune@x: lora\n"},
        [r"conf/experiment/default\.yaml: tune@x: there is no choice 'lora'"],
    ),
    "_target_": (
        {"tune/sft.yaml": "steps: 1\n_target_: os.system\n"},
        [r"conf/tune/sft\.yaml: tune\._target_: _target_ would let a configuration call any function"],
    ),
    "a rule of the guard": (
        {"experiment/default.yaml": "# @package _global_\nserve: {guard: {rules: {open: {pattern: '('}, odd: {pattern: a, action: drop}}}}\n"},
        [
            r"conf/experiment/default\.yaml: serve\.guard\.rules\.open: no regular expression of RE2's",
            r"conf/experiment/default\.yaml: serve\.guard\.rules\.odd\.action: input should be 'allow', 'flag', 'mask' or 'refuse'",
        ],
    ),
    "unknown kind": (
        {"select/toy.yaml": "candidates:\n  m: {kind: maid, licence: MIT}\nlimits: {licences: []}\npolicy: {}\n"},
        [r"conf/select/toy\.yaml: select\.candidates\.m\.kind: kind='maid' is none of 'pretrained', 'made'"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_names_file_and_key(name: str, small: Path) -> None:
    files, expected = MISTAKES[name]
    for file, text in files.items():
        edit(small, file, text)
    with pytest.raises(ConfigErrors) as caught:
        compose(conf=small / "conf")
    for pattern in expected:
        assert re.search(pattern, str(caught.value)), f"{pattern}\nnot in\n{caught.value}"
    assert len(caught.value.problems) == len(expected), str(caught.value)


def test_all_mistakes_at_once_exit_2_and_params_untouched(small: Path, python: Run) -> None:
    assert python("-m", "conf").returncode == 0
    before = (small / "params.yaml").read_bytes()
    edit(small, "tune/sft.yaml", "steps: [1\n")
    edit(small, "package/toy.yaml", "licence: ${oc.env:HOME}\ndescription: 3\nintended_use: x\nlimitations: y\nzz: 1\n")
    edit(small, "gate/toy.yaml", "absolute:\n  r: {metric: evaluate.intent, direction: above, limit: 0.5}\n")
    edit(small, "config.yaml", (small / "conf/config.yaml").read_text().replace("evaluate: toy", "evaluate: toi"))
    done = python("-m", "conf")
    assert done.returncode == 2
    assert (small / "params.yaml").read_bytes() == before
    for part in (
        "conf/tune/sft.yaml: unreadable",
        "package.licence: ${oc.env:HOME}",
        "package.description: input should be a valid string",
        "package.zz: unknown key",
        "gate.absolute.r.direction",
        "conf/config.yaml: evaluate: there is no choice 'toi'",
    ):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("6 errors")


def test_params_say_who_wrote_them_and_are_canonical(small: Path, python: Run) -> None:
    python("-m", "conf")
    text = (small / "params.yaml").read_text()
    first, rest = text.split("\n", 1)
    assert re.fullmatch(r"# Written by `python -m conf` from conf/ \(sha256 [0-9a-f]{64}\)\. Do not edit: .*", first)
    values = read(small / "params.yaml")
    assert list(values) == sorted(values)
    assert dump(values) == rest
    assert yaml.safe_load(text) == values, "another YAML reader sees other values"
    assert "composed" in python("-m", "conf").stderr or (small / "params.yaml").read_text() == text


def test_an_override_is_kept_and_named_until_conf_changes(small: Path, python: Run) -> None:
    python("-m", "conf")
    params = small / "params.yaml"
    params.write_text(params.read_text().replace("seed: 7", "seed: 8"))
    done = python("-m", "conf")
    assert done.returncode == 0
    assert "tune.seed=8 (conf/ says 7)" in done.stderr
    assert read(params)["tune"]["seed"] == 8
    assert python("-m", "conf", "--check").returncode == 1
    edit(small, "tune/sft.yaml", "steps: 11\n")
    assert "composed" in python("-m", "conf").stderr
    assert (read(params)["tune"]["seed"], read(params)["tune"]["steps"]) == (7, 11)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.97, 0.999])
@pytest.mark.parametrize("at_a_line", [True, False])
def test_what_is_left_of_a_cut_file_is_no_override(small: Path, python: Run, share: float, at_a_line: bool) -> None:
    python("-m", "conf")
    params = small / "params.yaml"
    whole = params.read_text()
    cut = whole[: int(len(whole) * share)]
    params.write_text(cut[: cut.rindex("\n") + 1] if at_a_line else cut)
    done = python("-m", "conf")
    assert (done.returncode, params.read_text()) == (0, whole)
    assert "was cut short, and is composed anew" in done.stderr


def test_a_choice_where_a_value_belongs_says_how_to_choose(small: Path, python: Run) -> None:
    python("-m", "conf")
    params = small / "params.yaml"
    values = read(params)
    values["tune"] = "lora"
    params.write_text(params.read_text().split("\n", 1)[0] + "\n" + dump(values))
    done = python("-m", "conf")
    assert done.returncode == 2
    assert "'lora' is a choice, not a value: put `tune: lora` into the defaults list" in done.stderr


def test_check_passes_on_fresh_params_and_fails_on_a_wrong_experiment_not_selected(small: Path, python: Run) -> None:
    python("-m", "conf")
    python("-m", "conf", "--schema")
    done = python("-m", "conf", "--check")
    assert (done.returncode, done.stderr) == (0, "")
    edit(small, "experiment/adapter.yaml", "# @package _global_\ntune: {lora: {rnk: 3}}\n")
    done = python("-m", "conf", "--check")
    assert done.returncode == 2
    assert "conf/experiment/adapter.yaml: tune.lora.rnk: unknown key; did you mean rank?" in done.stderr


def test_composing_imports_only_what_is_light() -> None:
    code = "import sys, conf.__main__ as m; m.check() if False else None; from conf.compose import compose; compose(); print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "trl",
        "peft",
        "bentoml",
        "great_expectations",
        "lm_eval",
        "datasets",
        "pandas",
        "numpy",
        "datatrove",
        "ctranslate2",
        "dvc",
        "rich",
        "ruamel",
        "scipy",
    }
    loaded = set(done.stdout.split())
    assert loaded & heavy == set()
    third_party = {n for n in loaded if n not in sys.stdlib_module_names and not n.startswith("_")}
    allowed = {
        "conf",
        "hydra",
        "attr",
        "cython_runtime",
        "omegaconf",
        "antlr4",
        "yaml",
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "typing_extensions",
        "typing_inspection",
        "packaging",
        "re2",
    }
    assert (
        third_party
        - allowed
        - {
            n
            for n in third_party
            if n.startswith(("__editable__", "distutils", "sitecustomize", "zope", "google", "mpl", "a1_", "pkg_resources", "setuptools"))
        }
        == set()
    )


def test_the_module_list_of_conf_is_closed() -> None:
    assert sorted(p.name for p in (ROOT / "conf").glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "compose.py",
        "errors.py",
        "json_schema.py",
        "patterns.py",
        "problems.py",
        "schema.py",
        "yaml.py",
    ]


@pytest.mark.parametrize("experiment", choices(ROOT / "conf").get("experiment", []))
def test_every_shipped_experiment_composes(experiment: str) -> None:
    assert compose([f"experiment={experiment}"]).config.gate.absolute


def test_every_shipped_choice_is_used_or_composes() -> None:
    used = {file for e in choices()["experiment"] for file in compose([f"experiment={e}"]).origins.values()}
    shipped = {f"conf/{group}/{name}.yaml" for group, names in choices().items() for name in names}
    for file in sorted(shipped - used):
        group, name = Path(file).parent.name, Path(file).stem
        compose([f"{group}={name}"])


def test_json_schemas_are_current_and_carry_the_docstrings() -> None:
    assert stale() == []
    tune = json.loads(schemas()["tune.json"])
    assert tune["properties"]["learning_rate"]["description"] == "Peak learning rate."
    assert "required" not in json.dumps(tune)


def test_the_schema_accepts_every_shipped_file() -> None:
    import jsonschema

    for group, names in choices().items():
        schema = json.loads(schemas()[f"{group}.json"])
        for name in names:
            jsonschema.validate(yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text()) or {}, schema)


def test_every_field_has_a_docstring() -> None:
    def walk(node: object) -> None:
        if isinstance(node, dict):
            for name, field in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else []:
                assert field.get("description"), name
            for inner in node.values():
                walk(inner)

    walk({k: v for k, v in json.loads(schemas()["experiment.json"]).items()})


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff\x85\u2028\u2029\ufffe\uffff"))
LIKE_SOMETHING_ELSE = st.lists(
    st.sampled_from([*"0179_.eE+-xob:~#'\"\n\\{[,&*!|>%@?= yn", "null", "true", "on", "off", "<<", "inf", "nan", "2024-01-01"]), max_size=5
)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | LIKE_SOMETHING_ELSE.map("".join),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdefgh", min_size=1) | LIKE_SOMETHING_ELSE.map("".join), inner, max_size=3),
        max_leaves=8,
    )
)
def test_canonical_text_means_the_same_to_every_reader(value: object) -> None:
    from ruamel.yaml import YAML

    text = dump({"value": value})
    assert YAML(typ="safe", pure=True).load(text)["value"] == value, "DVC"
    assert yaml.safe_load(text)["value"] == value, "libyaml"


@pytest.mark.parametrize(
    "text", ["1e5", "1e-5", "0o17", "+.5e3", "1:30", "012", "+_", "-_1", "on", "~", "", "=", "<<", ".nan", "2024-01-31", "a\nb", "a: b", "- a", "#", " a", "\t"]
)
def test_a_text_that_looks_like_something_else_stays_a_text(text: str) -> None:
    from ruamel.yaml import YAML

    written = dump({"value": text, "list": [text]})
    assert YAML(typ="safe", pure=True).load(written) == {"value": text, "list": [text]}, "DVC"
    assert yaml.safe_load(written) == {"value": text, "list": [text]}, "libyaml"


@pytest.mark.parametrize("text", ["1e-5", "on", "012", "1:30", "0o17", "1_000", ".5", "2024-01-31", "{a: b}", "'x'", "- 1\n- on", "~", "a: &x [on]\nb: *x"])
def test_what_is_not_canonical_is_read_as_dvc_reads_it(text: str, tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    file = tmp_path / "x.yaml"
    file.write_text(f"# line 1\n{text}\n", encoding="utf-8")
    assert repr(read(file)) == repr(YAML(typ="safe", pure=True).load(text))


@pytest.mark.parametrize("text", ["a: [1", "2024-13-45", "a: b: c", "\x00"])
def test_what_is_no_yaml_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml(:\d+)?: unreadable YAML: "):
        read(file)
