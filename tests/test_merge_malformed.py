"""Promises about bad input: it is refused with file, tensor and remedy, and nothing appears under the final name."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import CONFIG, VOCAB, load, save, trio, weights
from safetensors import safe_open
from safetensors.torch import save_file

from c2f_utils.errors import C2FError
from c2f_utils.merge import Recipe, plan_merge, run_merge
from c2f_utils.merge.headers import ITEM_BYTES, build_header, read_header

HEAD, NORM, UP = "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def parts(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(file: Path, header: object, data: bytes) -> None:
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(blob)) + blob + data)


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Rewrite the coarse model's header."""

    def apply(folder: Path) -> None:
        file = folder / "coarse/model.safetensors"
        table, data = parts(file)
        put(file, change(table) or table, data)

    return apply


def entry(name: str, **changes: object) -> Callable[[Path], None]:
    return header(lambda table: table[name].update(changes))


def config(role: str = "coarse", **changes: object) -> Callable[[Path], None]:
    return lambda folder: (folder / role / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def tensors(change: Callable[[dict], object], role: str = "coarse", **changes: object) -> Callable[[Path], None]:
    """Rewrite a model's tensors with the reference writer."""

    def apply(folder: Path) -> None:
        found = load(folder / role)
        save(folder / role, change(found) or found, **changes)

    return apply


def value(number: float, name: str = UP, role: str = "coarse", place: int = 7) -> Callable[[Path], None]:
    def poison(found: dict) -> None:
        found[name].view(-1)[place] = number

    return tensors(poison, role)


def sharded(change: Callable[[Path, dict], None]) -> Callable[[Path], None]:
    """Shard the coarse model, then change its folder and index."""

    def apply(folder: Path) -> None:
        found = load(folder / "coarse")
        (folder / "coarse/model.safetensors").unlink()
        save(folder / "coarse", found, shards=2)
        file = folder / "coarse/model.safetensors.index.json"
        index = json.loads(file.read_text())
        result = change(folder / "coarse", index)
        if result is None and file.exists() and file.read_bytes()[:1] == b"{":
            file.write_text(json.dumps(index))

    return apply


def raw(change: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "coarse/model.safetensors")


def tokenizers(coarse: dict, instruct: dict) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for role, vocab in (("coarse", coarse), ("instruct", instruct)):
            (folder / role / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))

    return apply


def renamed(index: dict, old: str, new: str) -> None:
    index["weight_map"] = {name: new if file == old else file for name, file in index["weight_map"].items()}


FILE = "coarse/model.safetensors"
SHARD = "model-00002-of-00002.safetensors"

# name: (what is done to a sound trio, words the message must hold)
MALFORMED = {
    # the file itself
    "empty file": (raw(lambda f: f.write_bytes(b"")), (FILE, "too short", "again")),
    "seven bytes": (raw(lambda f: f.write_bytes(b"1234567")), (FILE, "too short")),
    "a text file": (
        raw(lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n" * 3)),
        (FILE, "truncated or not"),
    ),
    "lying length": (
        raw(lambda f: f.write_bytes(struct.pack("<Q", 10**15) + f.read_bytes()[8:])),
        (FILE, "header says"),
    ),
    "huge length": (raw(lambda f: f.write_bytes(b"\xff" * 8 + f.read_bytes()[8:])), (FILE, "header says")),
    "cut in the header": (raw(lambda f: f.write_bytes(f.read_bytes()[:100])), (FILE, "header says")),
    "cut in the data": (raw(lambda f: f.write_bytes(f.read_bytes()[:-1])), (FILE, "truncated", "again")),
    "bytes at the end": (raw(lambda f: f.write_bytes(f.read_bytes() + b"x")), (FILE, "belong to no tensor")),
    "not JSON": (raw(lambda f: put(f, b"{'a': 1}", b"")), (FILE, "not JSON")),
    "a long number": (raw(lambda f: put(f, b'{"a": ' + b"9" * 5000 + b"}", b"")), (FILE, "not JSON")),
    "a name a million times": (
        raw(lambda f: put(f, b"{" + b",".join([b'"a":1'] * 1_000_000) + b"}", b"")),
        (FILE, "'a' twice"),
    ),
    "a name of a megabyte": (raw(lambda f: put(f, {"x" * 2**20: 3}, b"")), (FILE, "expected dtype")),
    "metadata that is nested": (
        header(lambda t: {**t, "__metadata__": {"format": json.loads("[" * 500 + "]" * 500)}}),
        (FILE, "__metadata__"),
    ),
    "not UTF-8": (raw(lambda f: put(f, b'{"\xff": 1}', b"")), (FILE, "not JSON")),
    "deep nesting": (raw(lambda f: put(f, b"[" * 100_000, b"")), (FILE, "not JSON")),
    "a list": (raw(lambda f: put(f, [], b"")), (FILE, "expected an object")),
    "a folder in its place": (raw(lambda f: (f.unlink(), f.mkdir())), (FILE, "cannot be read")),
    # entries
    "a name twice": (
        raw(lambda f: put(f, b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"")),
        (FILE, "'a' twice"),
    ),
    "an entry that is a number": (header(lambda t: {**t, UP: 3}), (FILE, UP, "expected dtype")),
    "no dtype": (header(lambda t: t[UP].pop("dtype") and None), (FILE, UP, "expected dtype")),
    "an extra key": (entry(UP, color="red"), (FILE, UP, "expected dtype")),
    "unknown dtype": (entry(UP, dtype="F4"), (FILE, UP, "'F4' is not supported")),
    "dtype that is a list": (entry(UP, dtype=["F32"]), (FILE, UP, "not supported")),
    "negative size": (entry(UP, shape=[-24, -16]), (FILE, UP, "natural numbers")),
    "fractional size": (entry(UP, shape=[24.0, 16]), (FILE, UP, "natural numbers")),
    "boolean size": (entry(UP, shape=[True, 384]), (FILE, UP, "natural numbers")),
    "a hundred thousand sizes": (entry(UP, shape=[2**62] * 100_000), (FILE, UP, "natural numbers")),
    "sizes beyond any file": (entry(UP, shape=[2**62, 2**62]), (FILE, UP, "expected")),
    "shape and bytes differ": (entry(UP, shape=[24, 17]), (FILE, UP, "bytes for shape")),
    "dtype and bytes differ": (entry(UP, dtype="BF16"), (FILE, UP, "bytes for shape")),
    "offsets backwards": (header(lambda t: t[UP]["data_offsets"].reverse()), (FILE, UP, "[begin, end]")),
    "three offsets": (header(lambda t: t[UP]["data_offsets"].append(0)), (FILE, UP, "[begin, end]")),
    "offsets as text": (entry(UP, data_offsets=["0", "1536"]), (FILE, UP, "[begin, end]")),
    "overlapping tensors": (
        header(lambda t: t[UP].update(data_offsets=list(t["model.layers.0.mlp.gate_proj.weight"]["data_offsets"]))),
        (FILE, "overlaps"),
    ),
    "a hole": (header(lambda t: t.pop(UP) and None), (FILE, "leaves a hole")),
    "data past the end": (
        header(lambda t: t[NORM].update(data_offsets=[o + 10**6 for o in t[NORM]["data_offsets"]])),
        (FILE, "hole"),
    ),
    "metadata that is no text": (header(lambda t: {**t, "__metadata__": {"format": 1}}), (FILE, "__metadata__")),
    # layout
    "no weights": (raw(lambda f: f.unlink()), ("coarse", "neither", "save a model there")),
    "only a pickle": (raw(lambda f: f.rename(f.with_name("pytorch_model.bin"))), ("pickle", "safe_serialization")),
    "both layouts": (
        sharded(lambda d, i: save_file({"a": torch.ones(1)}, d / "model.safetensors")),
        ("coarse", "both", "remove it"),
    ),
    "a missing shard": (sharded(lambda d, i: (d / SHARD).unlink()), (SHARD, "missing", "download")),
    "a damaged shard": (sharded(lambda d, i: (d / SHARD).write_bytes(b"\0" * 20)), (SHARD, "is not JSON")),
    "index without a map": (sharded(lambda d, i: i.pop("weight_map") and None), ("index.json", "damaged")),
    "index with an empty map": (sharded(lambda d, i: i.update(weight_map={})), ("index.json", "damaged")),
    "index that is no JSON": (
        sharded(lambda d, i: (d / "model.safetensors.index.json").write_text("<html>")),
        ("index.json", "damaged"),
    ),
    "a tensor in the wrong shard": (
        sharded(lambda d, i: i["weight_map"].update({HEAD: SHARD})),
        (HEAD, SHARD, "save the model"),
    ),
    "a tensor in no shard": (
        sharded(lambda d, i: i["weight_map"].update({"ghost": SHARD})),
        ("ghost", "does not hold"),
    ),
    "a tensor the index forgets": (
        sharded(lambda d, i: i["weight_map"].pop(EMBED) and None),
        (EMBED, "does not place"),
    ),
    "a shard outside the folder": (
        sharded(lambda d, i: i["weight_map"].update({EMBED: "../instruct/model.safetensors"})),
        (EMBED, "plain file name"),
    ),
    "a shard name that is a number": (
        sharded(lambda d, i: i["weight_map"].update({EMBED: 3})),
        (EMBED, "plain file name"),
    ),
    "a shard that is a card": (
        sharded(lambda d, i: [(d / SHARD).rename(d / "README.md"), renamed(i, SHARD, "README.md")] and None),
        ("README.md", "ends in .safetensors"),
    ),
    "an index that is nested": (
        sharded(lambda d, i: (d / "model.safetensors.index.json").write_text("[" * 100_000)),
        ("index.json", "damaged"),
    ),
    "a tensor in two shards": (
        sharded(lambda d, i: save_file({**safe(d / SHARD), HEAD: torch.ones(VOCAB, 16)}, d / SHARD)),
        (HEAD, "in both"),
    ),
    # configs
    "no config": (lambda d: (d / "coarse/config.json").unlink(), ("coarse/config.json", "does not exist")),
    "config cut off": (lambda d: (d / "coarse/config.json").write_text('{"a'), ("coarse/config.json", "damaged")),
    "config that is nested": (
        lambda d: (d / "coarse/config.json").write_text('{"a": ' + "[" * 100_000),
        ("coarse/config.json", "damaged"),
    ),
    "config that is nested and whole": (
        config(rope_parameters=json.loads("[" * 400 + "]" * 400)),
        ("coarse/config.json", "damaged"),
    ),
    "config that is a list": (lambda d: (d / "coarse/config.json").write_text("[]"), ("coarse/config.json", "damaged")),
    "another rope base": (config(rope_theta=1e6), ("rope_theta", "10000.0", "1000000.0", "allow: [rope_theta]")),
    "another rope base, new spelling": (
        config(rope_theta=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        ("rope_theta", "1000000.0"),
    ),
    "rope scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}), ("rope_scaling", "factor")),
    "no sliding window": (config(sliding_window=None), ("sliding_window", "4096")),
    "another norm constant": (config(rms_norm_eps=1e-6), ("rms_norm_eps",)),
    "other heads": (config(num_attention_heads=8), ("num_attention_heads",)),
    "other key heads": (config(num_key_value_heads=4), ("num_key_value_heads",)),
    "another head size": (config(head_dim=8), ("head_dim",)),
    "another activation": (config(hidden_act="gelu"), ("hidden_act", "gelu")),
    "another architecture": (config(model_type="llama"), ("model_type", "llama")),
    "quantised": (config(quantization_config={"bits": 4}), ("quantised", "full-precision")),
    "a base with another window": (config("base", sliding_window=1024), ("sliding_window", "base")),
    # tensors
    "a missing tensor": (tensors(lambda t: t.pop(UP) is None), ("coarse", UP, "lacks")),
    "an extra tensor": (tensors(lambda t: t.update({"v_head.weight": torch.ones(16)})), ("v_head", "ignore: [")),
    "another shape": (tensors(lambda t: t.update({UP: torch.ones(24, 15)})), (UP, "[24, 15]", "same size")),
    "another rank of shape": (tensors(lambda t: t.update({UP: torch.ones(24 * 16)})), (UP, "[384]")),
    "another vocabulary": (tensors(lambda t: t.update({EMBED: torch.ones(VOCAB + 1, 16)})), (EMBED, "common_prefix")),
    "whole numbers for weights": (
        tensors(lambda t: t.update({UP: torch.ones(24, 16, dtype=torch.int8)})),
        (UP, "I8", "unquantised"),
    ),
    "eight-bit floats": (
        tensors(lambda t: t.update({UP: torch.ones(24, 16).to(torch.float8_e4m3fn)})),
        (UP, "F8_E4M3"),
    ),
    "untied without a head": (
        tensors(lambda t: {n: v for n, v in t.items() if n != HEAD}),
        ("coarse", "not tied", HEAD),
    ),
    "an unknown place": (
        lambda d: [
            tensors(lambda t: t.update({"vision.proj": torch.ones(4)}), r)(d) for r in ("base", "instruct", "coarse")
        ],
        ("vision", "where in the network", "set: 0.0"),
    ),
    "tokens renumbered": (tokenizers({"a": 0, "b": 1}, {"a": 1, "b": 0}), ("tokenizer", "'a'", "other ids")),
    "an id reused": (tokenizers({"a": 0, "new": 1}, {"a": 0, "old": 1}), ("tokenizer", "id 1", "'old'")),
    # values, found while streaming
    "NaN in coarse": (value(float("nan")), (FILE, UP, "nan", "element 7", "retrain")),
    "NaN in base": (value(float("nan"), role="base"), ("base/model.safetensors", UP, "element 7")),
    "NaN in instruct": (value(float("nan"), role="instruct"), ("instruct/model.safetensors", UP, "element 7")),
    "infinity in coarse": (value(float("inf")), (FILE, UP, "inf", "element 7")),
    "minus infinity in a norm": (value(float("-inf"), NORM), (FILE, NORM, "-inf", "element 7")),
    "NaN at the very end": (value(float("nan"), HEAD, place=-1), (FILE, HEAD, f"element {VOCAB * 16 - 1}")),
    "infinities that cancel": (
        lambda d: [value(float("inf"), role=role)(d) for role in ("base", "coarse")],
        (UP, "inf", "element 7"),
    ),
}


def safe(file: Path) -> dict:
    with safe_open(file, "pt") as handle:
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}


def test_at_least_sixty_kinds_of_bad_input_are_covered():
    assert len(MALFORMED) >= 60


@pytest.mark.parametrize("case", MALFORMED)
def test_bad_input_is_refused_with_file_tensor_and_remedy(tmp_path, case):
    change, words = MALFORMED[case]
    paths = trio(tmp_path)
    change(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(C2FError) as error:
        run_merge(plan_merge(Recipe(**paths)), tmp_path / "out")
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize("role", ["base", "instruct", "coarse"])
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_tensor_too_few_or_too_many_in_any_model_is_named(tmp_path, role, change):
    paths = trio(tmp_path)
    edit = {
        "missing": lambda t: t.pop(UP) is None,
        "extra": lambda t: t.update({"model.layers.0.odd.weight": torch.ones(3)}),
    }
    tensors(edit[change], role)(tmp_path)
    with pytest.raises(C2FError, match="up_proj" if change == "missing" else "odd"):
        plan_merge(Recipe(**paths))
    if role != "instruct" and change == "extra":
        assert any("odd" not in p.name for p in plan_merge(Recipe(**paths, ignore=["odd"])).placements)


@pytest.mark.parametrize("operator", ["trim", "dare", "ties", "dots", "slerp", "orthogonal", "tsv", "lerp"])
@pytest.mark.parametrize("role", ["base", "instruct", "coarse"])
def test_no_operator_lets_a_nan_through(tmp_path, operator, role):
    if operator == "lerp" and role == "base":
        pytest.skip("lerp does not read the base")
    paths = trio(tmp_path)
    value(float("nan"), "model.layers.1.mlp.down_proj.weight", role)(tmp_path)
    with pytest.raises(C2FError, match=f"{role}/model.safetensors.*down_proj.*element 7"):
        run_merge(plan_merge(Recipe(**paths, operator={"name": operator}, seed=5)), tmp_path / "out", threads=1)
    assert not list(tmp_path.glob("out*"))


def test_a_nan_in_a_copied_tensor_is_found_too(tmp_path):
    paths = trio(tmp_path, torch.bfloat16)
    value(float("nan"), role="instruct")(tmp_path)
    with pytest.raises(C2FError, match="element 7"):
        run_merge(plan_merge(Recipe(**paths, coefficient={"default": 0.0})), tmp_path / "out")


def test_every_problem_of_three_models_is_reported_at_once(tmp_path):
    paths = trio(tmp_path)
    config("base", sliding_window=1)(tmp_path)
    config(rope_theta=1e6, hidden_act="gelu")(tmp_path)
    with pytest.raises(C2FError) as error:
        plan_merge(Recipe(**paths))
    assert all(word in str(error.value) for word in ("sliding_window", "rope_theta", "hidden_act"))
    tensors(lambda t: t.update({UP: torch.ones(2, 2)}), role="base")(tmp_path)
    tensors(lambda t: t.pop(NORM) is None)(tmp_path)
    with pytest.raises(C2FError) as error:
        plan_merge(Recipe(**paths))
    assert UP in str(error.value) and NORM in str(error.value)
    plan = plan_merge(Recipe(**paths), strict=False)
    assert len(plan.problems) >= 2
    with pytest.raises(C2FError, match="cannot run"):
        run_merge(plan, tmp_path / "out")


def test_an_allowed_difference_is_noted_and_let_through(tmp_path):
    paths = trio(tmp_path)
    config(rope_theta=1e6)(tmp_path)
    plan = plan_merge(Recipe(**paths, allow=["rope_theta"]))
    assert any("rope_theta" in note and "allowed" in note for note in plan.notes)


def test_equal_settings_in_old_and_new_spelling_agree(tmp_path):
    paths = trio(tmp_path)
    new = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "head_dim", "num_key_value_heads")}
    new |= {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "dtype": "float32",
        "num_key_value_heads": 2,
    }
    (tmp_path / "coarse/config.json").write_text(json.dumps(new))
    assert not plan_merge(Recipe(**paths)).problems


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_setting_left_out_means_that_architecture_s_default(tmp_path, kind):
    paths = trio(tmp_path)
    default = {"llama": None, "mistral": 4096}[kind]
    for role, window in (("base", default), ("instruct", default), ("coarse", "left out")):
        settings = {**CONFIG, "model_type": kind, "sliding_window": window}
        if window == "left out":
            del settings["sliding_window"]
        (tmp_path / role / "config.json").write_text(json.dumps(settings))
    assert not plan_merge(Recipe(**paths)).problems
    config("base", model_type=kind, sliding_window=77)(tmp_path)
    with pytest.raises(C2FError, match="sliding_window"):
        plan_merge(Recipe(**paths))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coarse": "/nowhere/at/all"}, "does not exist"),
        ({"base": "{coarse}"}, "same folder"),
        ({"coarse": "{instruct}"}, "same folder"),
        ({"instruct": "{coarse}/config.json"}, "is a file"),
    ],
)
def test_wrong_paths_are_refused(tmp_path, changes, words):
    paths = trio(tmp_path)
    changes = {role: path.format(**paths) for role, path in changes.items()}
    with pytest.raises(C2FError, match=words):
        plan_merge(Recipe(**{**paths, **changes}))


def test_a_hub_model_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    paths = trio(tmp_path)
    with pytest.raises(C2FError, match="no-such/model.*neither a folder nor available"):
        plan_merge(Recipe(**{**paths, "coarse": "no-such/model"}))


def test_a_negative_coefficient_is_refused_where_votes_are_weighted(tmp_path):
    paths = trio(tmp_path)
    with pytest.raises(C2FError, match="negative"):
        plan_merge(Recipe(**paths, operator={"name": "ties"}, coefficient={"default": -0.1}))


def test_a_rule_that_matches_nothing_is_noted(tmp_path):
    paths = trio(tmp_path)
    plan = plan_merge(Recipe(**paths, coefficient={"rules": [{"match": "mpl", "set": 0.1}]}))
    assert any("'mpl' matches no tensor" in note for note in plan.notes)


# --- the header reader against the reference implementation ---------------------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_headers_are_read_as_the_reference_reads_them(table):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_file(
            {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in table.items()}, file, {"format": "pt"}
        )
        found = read_header(file)
        with safe_open(file, "pt") as handle:
            assert set(found.tensors) == set(handle.keys()) and found.metadata == handle.metadata()
            for name, info in found.tensors.items():
                part = handle.get_slice(name)
                assert (list(info.shape), info.dtype) == (part.get_shape(), part.get_dtype())


def test_headers_we_write_are_read_by_the_reference(tmp_path):
    entries = [("a", "BF16", (3, 2), 12), ("ü", "F32", (), 4), ("empty", "U8", (0, 3), 0)]
    data = bytes(range(16))
    (tmp_path / "a.safetensors").write_bytes(build_header(entries, {"format": "pt"}) + data)
    found = read_header(tmp_path / "a.safetensors")
    assert found.tensors["a"].offset % 8 == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        assert handle.get_tensor("a").view(torch.uint8).numpy().tobytes() == data[:12]
        assert handle.get_tensor("empty").shape == (0, 3)
    assert set(ITEM_BYTES) >= {"BF16", "F32", "U8"}


@settings(deadline=None, max_examples=150)
@given(position=st.integers(0, 4000), byte=st.integers(0, 255))
def test_one_changed_byte_of_a_header_never_does_worse_than_an_error(position, byte):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        save_file(weights(0), file)
        content = bytearray(file.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        content[position % (8 + length)] = byte
        file.write_bytes(content)
        try:
            found = read_header(file)
        except C2FError as error:
            assert str(file) in str(error)
        else:
            assert sum(info.nbytes for info in found.tensors.values()) == len(content) - len(found.raw)


def test_the_command_ends_with_two_and_no_traceback(tmp_path):
    pytest.importorskip("c2f_utils.__main__")
    paths = trio(tmp_path)
    value(float("nan"))(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(paths))
    command = [
        sys.executable,
        "-m",
        "c2f_utils",
        "merge",
        str(tmp_path / "recipe.json"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "Traceback" not in done.stderr and UP in done.stderr + done.stdout
    assert not list(tmp_path.glob("out*"))
