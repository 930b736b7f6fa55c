"""Promises of the stream: same bytes however cut, nothing half done under the final name, nothing finished lost."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_models import VOCAB, WIDTH, load, raw, save, shapes, trio, weights

from c2f_utils.__main__ import main
from c2f_utils.errors import C2FError
from c2f_utils.merge import (
    Merger,
    Recipe,
    kernels,
    load_report,
    merge_state_dicts,
    open_stored,
    plan_merge,
    run_merge,
    stream,
    verify,
)
from c2f_utils.merge import journal as journals

OPERATORS = [
    {"name": "residue"},
    {"name": "lerp"},
    {"name": "slerp"},
    {"name": "trim", "density": 0.3},
    {"name": "trim", "density": 0.3, "scope": "global"},
    {"name": "dare", "density": 0.5},
    {"name": "ties", "density": 0.4},
    {"name": "ties", "density": 0.4, "scope": "global"},
    {"name": "dots"},
    {"name": "dots", "density": 0.4, "scope": "global"},
    {"name": "orthogonal"},
    {"name": "tsv"},
]
IDENTITY = [operator for operator in OPERATORS if operator["name"] not in ("ties", "dots", "tsv")]


def label(operator: dict) -> str:
    return "-".join(str(value) for value in operator.values())


def merge(paths: dict, out: Path, **changes: object):
    run = {key: changes.pop(key) for key in ("chunk_mib", "threads", "resume") if key in changes}
    return run_merge(plan_merge(Recipe(**{**paths, **changes})), out, **{"threads": 1, **run})


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", IDENTITY, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_residue_gives_instruct_byte_for_byte(tmp_path, operator, dtype):
    paths = trio(tmp_path, dtype, shards=2)
    merge(paths, tmp_path / "out", operator=operator, coefficient={"default": 0.0})
    for file in Path(paths["instruct"]).glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["lerp", "slerp"])
def test_the_whole_way_gives_coarse_byte_for_byte(tmp_path, name):
    paths = trio(tmp_path, torch.bfloat16)
    merge(paths, tmp_path / "out", operator={"name": name}, coefficient={"default": 1.0})
    assert raw(tmp_path / "out") == raw(paths["coarse"])


def test_copying_keeps_signed_zeros_and_subnormals(tmp_path):
    base = weights(0)
    special = weights(1, base)
    special["model.norm.weight"][:4] = torch.tensor([-0.0, 1e-41, -1e-45, 0.0])
    for role, tensors in {"base": base, "instruct": special, "coarse": weights(2, base)}.items():
        save(tmp_path / role, tensors)
    paths = {role: str(tmp_path / role) for role in ("base", "instruct", "coarse")}
    merge(paths, tmp_path / "out", coefficient={"default": 0.0})
    assert raw(tmp_path / "out") == raw(paths["instruct"])


def test_when_instruct_is_base_the_residue_operator_is_a_blend(tmp_path):
    paths = trio(tmp_path)
    same = {**paths, "instruct": paths["base"]}
    merge(same, tmp_path / "residue", coefficient={"default": 0.4})
    merge(same, tmp_path / "lerp", coefficient={"default": 0.4}, operator={"name": "lerp"})
    left, right = load(tmp_path / "residue"), load(tmp_path / "lerp")
    assert all(torch.allclose(left[name], right[name], rtol=1e-6, atol=1e-8) for name in left)


# --- invariances ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, spans and samples so small that tiny tensors are cut many times."""
    for module in ("kernels", "ranges", "compute", "in_memory", "readers", "stream", "residues"):
        found = __import__(f"c2f_utils.merge.{module}", fromlist=["BLOCK"])
        if hasattr(found, "BLOCK"):
            monkeypatch.setattr(found, "BLOCK", 64)
    monkeypatch.setattr(stream, "SPAN", 256)
    monkeypatch.setattr("c2f_utils.merge.compute._MEASURE_ALL", 10**9)


@pytest.mark.parametrize("out_dtype", ["same", "bfloat16_stochastic"])
@pytest.mark.parametrize("operator", OPERATORS, ids=label)
def test_chunks_shards_and_threads_change_no_byte(tmp_path, monkeypatch, small_blocks, operator, out_dtype):
    paths = trio(tmp_path, torch.float32)
    whole = merge(paths, tmp_path / "whole", operator=operator, out_dtype=out_dtype, threads=1)
    # chunk_mib counts in MiB; the smallest is 64 Ki elements, more than a whole tensor here, so the chunk is set
    # directly
    plan = plan_merge(Recipe(**paths, operator=operator, out_dtype=out_dtype))
    real = stream._Merge.__init__

    def tiny(self, *args):
        real(self, *args)
        self.chunk = 128

    monkeypatch.setattr(stream._Merge, "__init__", tiny)
    cut = run_merge(plan, tmp_path / "cut", threads=3)
    assert everything(tmp_path / "whole") == everything(tmp_path / "cut")
    assert whole == cut or whole.rows == cut.rows
    for role in ("base", "coarse"):  # other layouts of the same inputs
        save(tmp_path / f"{role}3", load(paths[role]), shards=3)
    other = {**paths, "base": str(tmp_path / "base3"), "coarse": str(tmp_path / "coarse3")}
    merge(other, tmp_path / "other", operator=operator, out_dtype=out_dtype, threads=2)
    assert (tmp_path / "other/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    save(tmp_path / "instruct3", load(paths["instruct"]), shards=3)
    merge(
        {**paths, "instruct": str(tmp_path / "instruct3")}, tmp_path / "sharded", operator=operator, out_dtype=out_dtype
    )
    assert raw(tmp_path / "sharded") == raw(tmp_path / "whole")


def test_torch_threads_change_no_byte_and_are_given_back(tmp_path):
    paths = trio(tmp_path)
    before = torch.get_num_threads()
    try:
        merge(paths, tmp_path / "one", operator={"name": "slerp"})
        torch.set_num_threads(2)
        merge(paths, tmp_path / "two", operator={"name": "slerp"})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


@pytest.mark.parametrize("operator", OPERATORS, ids=label)
def test_merging_in_memory_gives_the_stream_s_bits(tmp_path, small_blocks, operator):
    paths = trio(tmp_path)
    recipe = Recipe(**paths, operator=operator, coefficient={"knots": [[0, 0.1], [1, 0.6]]}, seed=3)
    run_merge(plan_merge(recipe), tmp_path / "out", threads=2)
    merged = merge_state_dicts(recipe, *(load(paths[role]) for role in ("base", "instruct", "coarse")))
    stored = load(tmp_path / "out")
    assert merged.keys() == stored.keys() and all(torch.equal(merged[name], stored[name]) for name in stored)


@pytest.mark.parametrize("operator", OPERATORS, ids=label)
def test_merging_what_stays_on_the_disk_gives_the_stream_s_bits(tmp_path, small_blocks, operator):
    recipe = Recipe(**trio(tmp_path), operator=operator, coefficient={"knots": [[0, 0.1], [1, 0.6]]}, seed=3)
    run_merge(plan_merge(recipe), tmp_path / "out")
    models = open_stored(recipe)
    merger = Merger(models["base"], models["instruct"], models["coarse.0"])
    written = load(tmp_path / "out")
    for _ in range(2):  # the second time with what was found of whole tensors the first time
        merged = dict(merger.tensors(recipe))
        assert merged.keys() == written.keys() and all(torch.equal(merged[name], written[name]) for name in written)


@pytest.mark.parametrize("out_dtype", ("same", "bfloat16_stochastic"))
@pytest.mark.parametrize("operator", OPERATORS, ids=label)
def test_what_runs_on_a_gpu_gives_the_cpu_s_values(tmp_path, monkeypatch, operator, out_dtype):
    recipe = Recipe(**trio(tmp_path), operator=operator, out_dtype=out_dtype, seed=3)
    models = open_stored(recipe)
    three = models["base"], models["instruct"], models["coarse.0"]
    expected = dict(Merger(*three).tensors(recipe))
    elsewhere = Merger(*three)
    list(elsewhere.tensors(recipe))  # statistics are found on the CPU wherever the merge is made
    monkeypatch.setattr(kernels, "on_cpu", lambda part: False)
    found = dict(elsewhere.tensors(recipe))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 700), seed=st.integers(0, 100), operator=st.sampled_from(OPERATORS[:-1]))
def test_any_length_gives_the_same_values_in_any_block(monkeypatch, count, seed, operator):
    sets = []
    for part in range(3):
        generator = torch.Generator().manual_seed(seed + part)
        sets.append({"model.layers.0.mlp.up_proj.weight": torch.randn(count, generator=generator)})
    recipe = Recipe(base="b", instruct="i", coarse="c", operator=operator)
    whole = merge_state_dicts(recipe, *sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("c2f_utils.merge.ranges.BLOCK", 8)
        small = merge_state_dicts(recipe, *sets)
    name = next(iter(whole))
    exact = operator["name"] not in ("slerp", "orthogonal")  # their sums are over blocks, whose size is fixed in use
    assert (
        torch.equal(whole[name], small[name])
        if exact
        else torch.allclose(whole[name], small[name], rtol=1e-5, atol=1e-6)
    )


def test_the_seed_decides_the_random_operators_and_nothing_else_does(tmp_path):
    paths = trio(tmp_path)
    for number, seed in enumerate((0, 0, 1)):
        merge(paths, tmp_path / f"{number}", operator={"name": "dare"}, seed=seed)
    assert raw(tmp_path / "0") == raw(tmp_path / "1") != raw(tmp_path / "2")
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    merge(paths, tmp_path / "3", operator={"name": "dare"})
    assert torch.equal(torch.random.get_rng_state(), before) and raw(tmp_path / "3") == raw(tmp_path / "0")


# --- kill, resume, failure ------------------------------------------------------------------------------------------


def killed_at(paths: dict, out: Path, step: int, how: str, operator: dict) -> bool:
    """Run a merge in a child that kills itself at journal line `step`; says whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            seen = 0
            real = journals.Journal.append

            def append(self, line):
                nonlocal seen
                seen += 1
                if seen == step and how == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                if seen == step and how == "half":
                    with open(self.path, "ab") as file:
                        file.write(json.dumps(line).encode()[:7])
                    os.kill(os.getpid(), signal.SIGKILL)
                real(self, line)
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            journals.Journal.append = append
            merge(paths, out, operator=operator)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


GLOBAL = {"name": "ties", "scope": "global"}


@pytest.mark.parametrize(
    ("operator", "how"),
    [
        ({"name": "ties"}, "after"),
        (GLOBAL, "half"),
        pytest.param({"name": "ties"}, "before", marks=pytest.mark.slow),
        pytest.param({"name": "ties"}, "half", marks=pytest.mark.slow),
        pytest.param(GLOBAL, "before", marks=pytest.mark.slow),
        pytest.param(GLOBAL, "after", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_journal_step_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch, operator, how):
    monkeypatch.setattr(stream, "SPAN", 1 << 16)
    paths = trio(tmp_path, torch.bfloat16, shards=2)
    merge(paths, tmp_path / "wanted", operator=operator)
    wanted = everything(tmp_path / "wanted")
    steps = 0
    for step in range(1, 80):
        out = tmp_path / "out"
        if not killed_at(paths, out, step, how, operator):
            break
        steps += 1
        assert not out.exists(), "half a model under the final name"
        merge(paths, out, operator=operator, threads=2 if step % 5 == 0 else 1)
        assert everything(out) == wanted, f"killed {how} line {step}"
        shutil.rmtree(out)
        assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    assert 20 < steps <= 60


def test_killed_again_and_again_it_still_arrives(tmp_path):
    paths = trio(tmp_path)
    merge(paths, tmp_path / "wanted")
    for _ in range(40):
        if not killed_at(paths, tmp_path / "out", 4, "after", {"name": "residue"}):
            break
    assert everything(tmp_path / "out") == everything(tmp_path / "wanted")


def test_half_lines_of_two_kills_cost_only_their_own_step(tmp_path, monkeypatch):
    paths = trio(tmp_path)
    total = len(plan_merge(Recipe(**paths)).placements)
    for _ in range(2):
        assert killed_at(paths, tmp_path / "out", 6, "half", {"name": "residue"})
    done, real = [], stream.merge_chunk
    monkeypatch.setattr(stream, "merge_chunk", lambda *args: done.append(1) or real(*args))
    merge(paths, tmp_path / "out")
    assert len(done) == total - 4 - 5  # the first journal line is the start; the second run began at its sixth


def test_killed_at_the_commit_itself_the_final_name_is_free(tmp_path):
    paths = trio(tmp_path)
    child = os.fork()
    if child == 0:
        os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        merge(paths, tmp_path / "out")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and not (tmp_path / "out").exists()
    merge(paths, tmp_path / "out")
    merge(paths, tmp_path / "wanted")
    assert everything(tmp_path / "out") == everything(tmp_path / "wanted")


def test_killed_right_after_the_commit_the_next_call_finds_the_result(tmp_path):
    paths = trio(tmp_path)
    child = os.fork()
    if child == 0:
        journals.Journal.remove = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        merge(paths, tmp_path / "out")
        os._exit(0)
    os.waitpid(child, 0)
    report = merge(paths, tmp_path / "out")
    assert report.rows and not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_resuming_notices_bytes_lost_in_a_power_cut(tmp_path):
    paths = trio(tmp_path)
    merge(paths, tmp_path / "wanted")
    assert killed_at(paths, tmp_path / "out", 12, "after", {"name": "residue"})
    partial = next(path for path in tmp_path.glob("out.partial-*") if path.is_dir())
    file = partial / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = len(content) - sum(t.nbytes for t in load(paths["base"]).values())
    content[start : start + 64] = bytes(64)
    file.write_bytes(content)
    merge(paths, tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "wanted")


def test_without_resume_a_merge_starts_again(tmp_path):
    paths = trio(tmp_path)
    assert killed_at(paths, tmp_path / "out", 9, "after", {"name": "residue"})
    assert not merge(paths, tmp_path / "out", resume=False).resumed
    assert killed_at(paths, tmp_path / "again", 9, "after", {"name": "residue"})
    assert merge(paths, tmp_path / "again").resumed


def test_a_full_disk_keeps_what_is_done_and_says_how_to_go_on(tmp_path, monkeypatch):
    paths = trio(tmp_path)
    real, calls = os.pwrite, 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(C2FError, match="disk is full.*run again to resume"):
        merge(paths, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert merge(paths, tmp_path / "out").resumed
    merge(paths, tmp_path / "wanted")
    assert everything(tmp_path / "out") == everything(tmp_path / "wanted")


def test_a_page_lost_while_flushing_on_the_way_is_not_forgotten_at_the_end(tmp_path, monkeypatch, small_blocks):
    paths, out = trio(tmp_path), tmp_path / "out"
    expected = merge(paths, tmp_path / "expected")
    flushed = []

    def lost(handle: int) -> None:
        flushed.append(handle)
        if len(flushed) == 1:
            raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(stream, "_FLUSH_EVERY", 64)
    monkeypatch.setattr(os, "fdatasync", lost)
    with pytest.raises(C2FError, match="nput/output error"):
        merge(paths, out)
    assert flushed and not out.exists()
    assert merge(paths, out).fingerprint == expected.fingerprint


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    paths = trio(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.statvfs_result and type("U", (), {"free": 10})())
    with pytest.raises(C2FError, match="10 are free"):
        merge(paths, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "coarse", "instruct"]


def test_an_interrupt_leaves_only_the_partial_folder(tmp_path, monkeypatch):
    paths = trio(tmp_path)
    real, calls = journals.Journal.append, 0

    def append(self, line):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        real(self, line)

    monkeypatch.setattr(journals.Journal, "append", append)
    with pytest.raises(KeyboardInterrupt):
        merge(paths, tmp_path / "out", threads=2)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob("out.partial-*"))
    assert merge(paths, tmp_path / "out").resumed


def test_two_merges_cannot_write_the_same_output(tmp_path, monkeypatch):
    paths = trio(tmp_path)
    plan, refused, real = plan_merge(Recipe(**paths)), [], journals.Journal.append

    def append(self, line):
        if not refused:  # a second merge begins while the first one works
            with pytest.raises(C2FError, match="another merge is writing") as error:
                run_merge(plan, tmp_path / "out")
            refused.append(error)
        real(self, line)

    monkeypatch.setattr(journals.Journal, "append", append)
    run_merge(plan, tmp_path / "out", threads=1)
    assert (
        refused
        and merge(paths, tmp_path / "wanted")
        and everything(tmp_path / "out") == everything(tmp_path / "wanted")
    )


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    paths = trio(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(C2FError, match="not empty"):
        merge(paths, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(C2FError, match="is a file"):
        merge(paths, tmp_path / "file")


def test_an_empty_output_folder_is_used(tmp_path):
    paths = trio(tmp_path)
    (tmp_path / "out").mkdir()
    merge(paths, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_the_same_merge_again_is_found_done_and_another_is_refused(tmp_path):
    paths = trio(tmp_path)
    first = merge(paths, tmp_path / "out")
    stamp = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert merge(paths, tmp_path / "out") == first and (tmp_path / "out/model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(C2FError, match="holds another merge"):
        merge(paths, tmp_path / "out", seed=1)


def test_inputs_overwritten_between_plan_and_run_are_noticed(tmp_path):
    paths = trio(tmp_path)
    plan = plan_merge(Recipe(**paths))
    save(Path(paths["coarse"]), weights(9))
    with pytest.raises(C2FError, match="changed since the plan"):
        run_merge(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_of_an_earlier_merge_is_remembered_in_the_process(tmp_path):
    paths = trio(tmp_path)
    merge(paths, tmp_path / "first")
    save(Path(paths["coarse"]), weights(9, load(paths["base"]), 0.1))
    merge(paths, tmp_path / "second")
    merged, expected = load(tmp_path / "second"), merge_state_dicts(Recipe(**paths), *(load(p) for p in paths.values()))
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert raw(tmp_path / "first") != raw(tmp_path / "second")


def test_read_only_inputs_and_symlinks_are_fine(tmp_path):
    paths = trio(tmp_path / "store")
    links = {}
    for role, path in paths.items():
        (tmp_path / role).mkdir()
        for file in Path(path).iterdir():
            file.chmod(0o444)
            (tmp_path / role / file.name).symlink_to(file)  # the layout of the hub's cache
        links[role] = str(tmp_path / role)
    merge(links, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").is_symlink()
    verify(tmp_path / "out", Recipe(**links))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    paths = trio(tmp_path)
    (tmp_path / "wall").write_text("")
    with pytest.raises(C2FError, match="cannot be written"):
        merge(paths, tmp_path / "wall" / "out")


@pytest.mark.parametrize("wrong", [{"chunk_mib": 0.0}, {"chunk_mib": 1e9}, {"threads": 0}])
def test_impossible_arguments_are_refused(tmp_path, wrong):
    paths = trio(tmp_path)
    with pytest.raises(C2FError, match=next(iter(wrong))):
        merge(paths, tmp_path / "out", **wrong)


# --- structure ------------------------------------------------------------------------------------------------------


def test_the_output_is_sharded_like_instruct_and_loads(tmp_path):
    paths = trio(tmp_path, torch.bfloat16, shards=3)
    merge(paths, tmp_path / "out", out_dtype="float32")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    wanted = json.loads((Path(paths["instruct"]) / "model.safetensors.index.json").read_text())
    assert index["weight_map"].items() == wanted["weight_map"].items()
    assert index["metadata"]["total_size"] == 2 * wanted["metadata"]["total_size"]


def test_transformers_loads_the_result_and_no_residue_gives_instruct_s_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    paths = trio(tmp_path, torch.bfloat16, shards=2)
    merge(paths, tmp_path / "zero", coefficient={"default": 0.0})
    merge(paths, tmp_path / "out", out_dtype="float32")
    ids = torch.arange(8)[None] + 3
    models = [
        AutoModelForCausalLM.from_pretrained(path) for path in (paths["instruct"], tmp_path / "zero", tmp_path / "out")
    ]
    logits = [model(ids).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert bool(torch.isfinite(logits[2]).all()) and not torch.equal(logits[0].float(), logits[2].float())
    assert next(models[2].parameters()).dtype == torch.float32


def test_tokenizer_and_generation_files_follow_instruct_and_stale_ones_do_not(tmp_path):
    paths = trio(tmp_path)
    instruct = Path(paths["instruct"])
    (instruct / "tokenizer_config.json").write_text('{"a": 1}')
    (instruct / "chat_template.jinja").write_text("{{ x }}")
    (instruct / "README.md").write_text("the instruct model's card")
    (instruct / "training_args.bin").write_bytes(b"\x80")
    merge(paths, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "merge_report.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert "Fine Actor" in (tmp_path / "out/README.md").read_text()


def tied(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def roles(folder: Path, **models: tuple) -> dict[str, str]:
    """Write models given as (tensors, config changes)."""
    for role, (tensors, config) in models.items():
        save(folder / role, tensors, **config)
    return {role: str(folder / role) for role in models}


@pytest.fixture
def three() -> list[dict]:
    base = weights(0)
    return [base, weights(1, base, 0.01), weights(2, base, 0.002)]


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def test_tied_models_stay_tied_and_store_the_matrix_once(tmp_path, three):
    base, instruct, coarse = map(tied, three)
    paths = roles(tmp_path, base=(base, TIED), instruct=(instruct, TIED), coarse=(coarse, TIED))
    merge(paths, tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_coarse_lends_its_embedding_to_an_untied_head(tmp_path, three):
    base, instruct, coarse = three
    paths = roles(tmp_path, base=(tied(base), TIED), instruct=(instruct, UNTIED), coarse=(tied(coarse), TIED))
    merge(paths, tmp_path / "out", coefficient={"default": 1.0})
    change = coarse["model.embed_tokens.weight"] - base["model.embed_tokens.weight"]
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], instruct["lm_head.weight"] + change)


def test_a_separate_coarse_head_is_not_dropped_in_silence(tmp_path, three):
    base, instruct, coarse = three
    paths = roles(tmp_path, base=(tied(base), TIED), instruct=(tied(instruct), TIED), coarse=(coarse, UNTIED))
    with pytest.raises(C2FError, match="untie it, or leave this head out"):
        plan_merge(Recipe(**paths))
    merge(paths, tmp_path / "out", ignore=["lm_head"])
    assert "lm_head.weight" not in load(tmp_path / "out")


def test_a_tied_model_that_stores_its_head_twice_is_written_once(tmp_path, three):
    base, instruct, coarse = three
    for tensors in three:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    paths = roles(tmp_path, base=(base, TIED), instruct=(instruct, TIED), coarse=(coarse, TIED))
    merge(paths, tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    instruct["lm_head.weight"][0, 0] += 1
    paths = roles(tmp_path, base=(base, TIED), instruct=(instruct, TIED), coarse=(coarse, TIED))
    with pytest.raises(C2FError, match="set tie_word_embeddings to false"):
        merge(paths, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_extended_vocabularies_need_the_rule_and_keep_instruct_s_rows(tmp_path, three):
    base, _, coarse = three
    wide = weights(5, vocab=VOCAB + 3)
    paths = roles(tmp_path, base=(base, {}), instruct=(wide, {"vocab_size": VOCAB + 3}), coarse=(coarse, {}))
    with pytest.raises(C2FError, match="vocab: common_prefix"):
        plan_merge(Recipe(**paths))
    merge(paths, tmp_path / "out", vocab="common_prefix", coefficient={"default": 1.0})
    merged = load(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(merged[VOCAB:], wide["lm_head.weight"][VOCAB:])
    assert torch.equal(
        merged[:VOCAB], wide["lm_head.weight"][:VOCAB] + (coarse["lm_head.weight"] - base["lm_head.weight"])
    )
    for operator in OPERATORS:
        changes = {"vocab": "common_prefix", "coefficient": {"default": 0.7}, "operator": operator}
        merge(paths, tmp_path / label(operator), **changes)
        verify(tmp_path / label(operator), Recipe(**paths, **changes))


def test_a_padded_coarse_vocabulary_gives_its_common_rows(tmp_path, three):
    base, instruct, _ = three
    padded = {
        n: torch.cat([t, torch.ones(24, WIDTH)]) if "embed" in n or "head" in n else t for n, t in three[2].items()
    }
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(padded, {"vocab_size": VOCAB + 24}))
    merge(paths, tmp_path / "out", vocab="common_prefix")
    assert load(tmp_path / "out")["lm_head.weight"].shape == (VOCAB, WIDTH)


@pytest.mark.parametrize("change", ["bare", "base_model.model.", "module.", "_orig_mod."])
def test_wrappers_prefixes_are_seen_through(tmp_path, three, change):
    base, instruct, coarse = three
    if change == "bare":
        renamed = {name.removeprefix("model."): tensor for name, tensor in coarse.items()}
    else:
        renamed = {change + name: tensor for name, tensor in coarse.items()}
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(renamed, {}))
    merge(paths, tmp_path / "out")
    plain = roles(tmp_path, coarse=(coarse, {}))
    merge({**paths, **plain}, tmp_path / "plain")
    assert raw(tmp_path / "out") == raw(tmp_path / "plain")


def test_constants_are_copied_when_equal_and_refused_when_not(tmp_path, three):
    base, instruct, coarse = three
    for tensors in three:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
        tensors["model.layers.0.mask"] = torch.tensor([True, False])
        tensors["model.layers.0.count"] = torch.tensor(7)
    del base["model.layers.0.self_attn.rotary_emb.inv_freq"]  # old versions stored it, new ones do not
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(coarse, {}))
    merge(paths, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged["model.layers.0.count"].shape == () and merged["model.layers.0.count"] == 7
    coarse["model.layers.0.count"] = torch.tensor(8)
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(coarse, {}))
    with pytest.raises(C2FError, match="layers.0.count"):
        merge(paths, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_empty_and_scalar_tensors_pass(tmp_path, three):
    for number, tensors in enumerate(three):
        tensors["model.layers.0.empty"] = torch.empty(0, 4)
        tensors["model.layers.0.scale"] = torch.tensor(float(number))
    paths = roles(
        tmp_path, **{role: (tensors, {}) for role, tensors in zip(("base", "instruct", "coarse"), three, strict=True)}
    )
    for operator in OPERATORS:
        merge(paths, tmp_path / label(operator), operator=operator)
        merged = load(tmp_path / label(operator))
        assert merged["model.layers.0.empty"].shape == (0, 4) and merged["model.layers.0.scale"].shape == ()
    assert load(tmp_path / "residue")["model.layers.0.scale"] == pytest.approx(1 + 0.3 * 2)


def test_mixed_dtypes_merge_in_float32_and_keep_instruct_s(tmp_path, three):
    base, instruct, coarse = three
    mixed = {name: tensor.to(torch.float16 if "norm" in name else torch.bfloat16) for name, tensor in instruct.items()}
    wide = {name: tensor.double() for name, tensor in base.items()}
    paths = roles(tmp_path, base=(wide, {}), instruct=(mixed, {}), coarse=(coarse, {}))
    merge(paths, tmp_path / "out", coefficient={"default": 1.0})
    for name, tensor in load(tmp_path / "out").items():
        assert tensor.dtype == mixed[name].dtype
        assert torch.equal(tensor, (mixed[name].float() + (coarse[name] - base[name])).to(tensor.dtype)), name


def test_coefficients_are_not_rounded_to_the_weights_dtype(tmp_path):
    paths = trio(tmp_path, torch.bfloat16)
    merge(paths, tmp_path / "out", out_dtype="float32", coefficient={"default": 0.3})
    base, instruct, coarse = ({n: t.double() for n, t in load(path).items()} for path in paths.values())
    for name, tensor in load(tmp_path / "out").items():
        wanted = instruct[name] + 0.3 * (coarse[name] - base[name])
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-9)


def test_an_overflow_of_the_output_dtype_is_an_error_and_not_an_infinity(tmp_path, three):
    base, instruct, coarse = ({name: tensor.half() for name, tensor in tensors.items()} for tensors in three)
    instruct["model.norm.weight"][3], coarse["model.norm.weight"][3], base["model.norm.weight"][3] = 60000, 60000, 0
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(coarse, {}))
    with pytest.raises(C2FError, match=r"model\.norm\.weight.*overflows F16 at element 3"):
        merge(paths, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    merge(paths, tmp_path / "wide", out_dtype="float32")
    assert load(tmp_path / "wide")["model.norm.weight"][3] == pytest.approx(78000)


def test_large_finite_values_are_not_taken_for_overflow(tmp_path, three):
    for tensors in three:
        tensors["model.norm.weight"][:] = 1e30
    paths = roles(
        tmp_path, **{role: (tensors, {}) for role, tensors in zip(("base", "instruct", "coarse"), three, strict=True)}
    )
    report = merge(paths, tmp_path / "out")
    assert all(value is None or value == pytest.approx(1.0) for value in report.survival.values())


# --- report and survival --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "expected"), [(1e-3, 0.09), (2.5e-3, 0.35), (1e-2, 0.99), (5e-2, 1.0)])
def test_survival_follows_the_measured_table_and_warns_below_nine_tenths(tmp_path, ratio, expected):
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    base = 0.02 * torch.randn(400_000, generator=generator)
    instruct = (base + 0.001 * torch.randn(400_000, generator=generator)).bfloat16()
    coarse = (base + ratio * 0.02 * torch.randn(400_000, generator=generator)).bfloat16()
    models = {"base": base.bfloat16(), "instruct": instruct, "coarse": coarse}
    for role, tensor in models.items():
        save(tmp_path / role, {name: tensor})
    report = merge({role: str(tmp_path / role) for role in models}, tmp_path / "out")
    assert report.survival["mlp"] == pytest.approx(expected, abs=0.05)
    assert bool(report.warnings) == (expected < 0.9)
    if report.warnings:
        assert "bfloat16_stochastic" in report.warnings[0] and "LoRA" in report.warnings[0]
    for remedy in ("float32", "bfloat16_stochastic"):
        cured = merge({role: str(tmp_path / role) for role in models}, tmp_path / remedy, out_dtype=remedy)
        assert cured.survival["mlp"] == pytest.approx(1.0, abs=0.06) and not cured.warnings


def test_the_report_says_when_nothing_was_merged(tmp_path, three):
    base, instruct, _ = three
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(base, {}))
    assert "every coarse residue is zero" in merge(paths, tmp_path / "zero").warnings[0]
    paths = roles(tmp_path, base=(base, {}), instruct=(instruct, {}), coarse=(instruct, {}))
    assert any("same residue" in warning for warning in merge(paths, tmp_path / "twin").warnings)


def test_a_base_that_is_no_ancestor_is_warned_about(tmp_path, three):
    base, _, coarse = three
    paths = roles(tmp_path, base=(base, {}), instruct=(weights(77, spread=0.2), {}), coarse=(coarse, {}))
    assert any("ancestor" in warning for warning in merge(paths, tmp_path / "out").warnings)


def test_the_report_holds_what_the_tensors_are(tmp_path):
    paths = trio(tmp_path)
    report = merge(paths, tmp_path / "out")
    base, instruct, coarse = (load(paths[role]) for role in ("base", "instruct", "coarse"))
    row = next(row for row in report.rows if row["tensor"] == "model.layers.1.mlp.up_proj.weight")
    d_coarse, d_instruct = (model[row["tensor"]] - base[row["tensor"]] for model in (coarse, instruct))
    assert row["norm_coarse"] == pytest.approx(d_coarse.norm().item(), rel=1e-5)
    assert row["norm_instruct"] == pytest.approx(d_instruct.norm().item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(d_coarse.flatten(), d_instruct.flatten(), dim=0).item()
    assert row["cosine"] == pytest.approx(cosine, abs=1e-5) and row["layer"] == 1 and row["module"] == "up_proj"
    assert load_report(tmp_path / "out") == report
    assert str(tmp_path) not in json.dumps(report.to_dict()["inputs"])


def test_the_plan_is_a_table_of_every_tensor(tmp_path):
    plan = plan_merge(Recipe(**trio(tmp_path, torch.bfloat16), coefficient={"rules": [{"match": "head", "set": 0.0}]}))
    table = plan.table()
    assert list(table["tensor"]) == list(load(plan.recipe.instruct)) or set(table["tensor"]) == set(shapes())
    assert table.set_index("tensor").loc["lm_head.weight", "action"] == "instruct"
    assert table["bytes_written"].sum() == sum(tensor.nbytes for tensor in load(plan.recipe.instruct).values())
    assert plan.peak_memory() > 0 and plan.bytes_written > table["bytes_written"].sum()


@pytest.mark.parametrize(
    ("operator", "models_read"),
    [("residue", 3), ("lerp", 2), ("slerp", 6), ("trim", 5), ("ties", 6), ("dare", 3), ("dots", 9)],
)
def test_the_plan_counts_the_bytes_that_are_read(tmp_path, monkeypatch, operator, models_read):
    from c2f_utils.merge.readers import Files

    paths = trio(tmp_path)
    plan = plan_merge(Recipe(**paths, operator={"name": operator}))
    read, real = 0, Files.read

    def counted(self, info, start, stop, buffer):
        nonlocal read
        read += (stop - start) * 4
        return real(self, info, start, stop, buffer)

    monkeypatch.setattr(Files, "read", counted)
    run_merge(plan, tmp_path / "out", threads=1)
    size = sum(tensor.nbytes for tensor in load(paths["base"]).values())
    assert plan.bytes_read == models_read * size == read


def test_verification_finds_one_wrong_unit_in_a_sampled_slice(tmp_path):
    paths = trio(tmp_path)
    merge(paths, tmp_path / "out")
    assert verify(tmp_path / "out", Recipe(**paths)).worst < 1
    file = tmp_path / "out/model.safetensors"
    content = bytearray(file.read_bytes())
    for position in range(len(content) - 4 * 16 * VOCAB, len(content), 4):
        content[position + 1] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(C2FError, match="not what its recipe gives"):
        verify(tmp_path / "out", Recipe(**paths), samples=200)
    with pytest.raises(C2FError, match="another recipe"):
        verify(tmp_path / "out", Recipe(**paths, seed=4))


def test_the_command_verifies_what_it_merged_and_writes_that_down(tmp_path, capsys):
    paths = trio(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(paths))
    command = ["merge", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "out")]
    assert main(command) == 0 and load_report(tmp_path / "out").verified is None
    assert main([*command, "--verify"]) == 0 and "verified: 64 slices" in capsys.readouterr().out
    found = load_report(tmp_path / "out").verified
    assert found["slices"] == 64 and 0 < found["worst"] <= 1
    file = tmp_path / "out/model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: -16 * VOCAB] + bytes(byte ^ 0x40 for byte in content[-16 * VOCAB :]))
    assert main([*command, "--verify"]) == 2 and "not what its recipe gives" in capsys.readouterr().err
    assert load_report(tmp_path / "out").verified is None


@pytest.mark.parametrize("operator", OPERATORS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_passes_verification_in_float64(tmp_path, operator, dtype):
    paths = trio(tmp_path, dtype)
    for out_dtype in ("same", "bfloat16_stochastic"):
        changes = {"operator": operator, "out_dtype": out_dtype}
        merge(paths, tmp_path / out_dtype, **changes)
        assert verify(tmp_path / out_dtype, Recipe(**paths, **changes)).worst <= 1


def test_a_merge_whose_report_knows_no_scales_is_verified_as_before(tmp_path):
    paths, changes = trio(tmp_path), {"operator": {"name": "trim", "density": 0.3}}
    merge(paths, tmp_path / "out", **changes)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(values.pop("scales") == [] for values in report["statistics"].values())
    (tmp_path / "out" / "merge_report.json").write_text(json.dumps(report))
    assert verify(tmp_path / "out", Recipe(**paths, **changes)).worst <= 1


def test_kernels_do_not_write_into_their_inputs():
    parts = {what: torch.randn(64) for what in ("instruct", "base", "coarse.0", "delta.instruct", "delta.coarse.0")}
    before = {what: part.clone() for what, part in parts.items()}
    stats = kernels.Statistics(((2.0, 0.1), (0.1, 1.0)), (kernels.Threshold(0.5, 0, 0.5),) * 2, 64, (1.5, 2.0))
    for kernel, options in (
        (kernels.residue, {}),
        (kernels.lerp, {}),
        (kernels.slerp, {}),
        (kernels.trim, {"density": 0.5, "scope": "tensor"}),
        (kernels.dare, {"density": 0.5, "seed": 0}),
        (kernels.ties, {"density": 0.5, "scope": "tensor"}),
        (kernels.dots, {"density": 0.5, "instruct": 0.8, "scope": "tensor"}),
        (kernels.orthogonal, {}),
        (kernels.tsv, {"rank": 0.0}),
    ):
        kernel(kernels.Piece("t", (8, 8), 0, parts.__getitem__, (1.0,), stats), 0.3, **options)
    assert all(torch.equal(parts[what], before[what]) for what in parts)
