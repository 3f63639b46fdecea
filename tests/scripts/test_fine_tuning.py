"""train_toy.py with adapters: they alone are trained and stored, and the base stays as it was."""

import hashlib
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_decoder import data, evaluation, language_model, nnx_model
from flax import nnx
from train_toy.run import train

import gemma_mlp
from tests.scripts.toy import (
    COMMAND,
    SMALL,
    check_curve,
    check_records,
    check_same_runs,
    config,
    curve,
    final_state,
    flags,
    interrupt_at,
    metrics,
)

pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("compiled_once")]

TUNING = {"lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 3e-2, "steps": 20, "eval_every": 10}
INT4 = {"base_dtype": "int4", "base_group_size": 8}
ADAPTERS = 2 * 3 * 2 * (16 + 32)  # layers, weights, rank, in and out


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another text than that of the base: capital letters."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_bytes(data.python_documentation()[100_000:112_000].upper())
    return path


@pytest.fixture(scope="module")
def tuned(finished, other, tmp_path_factory):
    """(folder, summary, what the base's folder held before) of a finished fine-tuning."""
    before = files_in(finished[0])
    workdir = tmp_path_factory.mktemp("tuned")
    return workdir, train(config(workdir, other, base=str(finished[0]), **TUNING, **INT4)), before


def files_in(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_adapters_learn_the_other_text_and_leave_the_records_of_any_run(tuned):
    workdir, summary, _ = tuned
    check_records(workdir, summary, TUNING["steps"], TUNING["eval_every"])
    assert summary["heldout_bits_per_byte"] < summary["heldout_bits_per_byte_before"] - 0.1
    assert summary["sample_before"].split("|")[0] == summary["sample"].split("|")[0]
    assert summary["trained_parameters"] == ADAPTERS < summary["parameters"] / 10


@pytest.mark.slow
def test_checkpoints_hold_the_adapters_and_their_moments_alone(finished, tuned):
    state = final_state(tuned[0])
    paths = [path for path, _ in jax.tree.leaves_with_path(state["params"])]
    assert len(paths) == 2 * 3 * 2 and all("_proj_lora_" in path[-1].key for path in paths)
    counts = [leaf.size for leaf in jax.tree.leaves(state["opt_state"])]
    assert sum(count for count in counts if count > 1) == 2 * ADAPTERS
    step = tuned[0] / "checkpoints" / "20"
    assert size_of(step) < size_of(finished[0] / "checkpoints" / "40") / 3


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_the_base_stays_as_it_was(finished, tuned):
    assert files_in(finished[0]) == tuned[2]


@pytest.mark.slow
def test_base_and_adapters_have_the_figures_of_the_run_in_a_model_made_by_hand(finished, tuned, other):
    """The model is converted by the functions of gemma_mlp.nnx, which the run itself does not call."""
    workdir, summary, _ = tuned
    settings = config(workdir, other)
    model = nnx_model.Decoder(settings.mlp, 2, 2, rngs=nnx.Rngs(0))
    put(model, nnx.Param, final_state(finished[0])["params"])
    gemma_mlp.nnx.quantize(model, "int4", 8)
    corpus = data.load_corpus(str(other), settings.heldout_fraction, settings.heldout_max_bytes)

    def heldout():
        by_hand = language_model.LanguageModel(lambda key: {}, lambda params, tokens: model(tokens))
        return evaluation.make_evaluation(by_hand, corpus, settings.seq_len)({})

    assert heldout() == pytest.approx(summary["heldout_bits_per_byte_before"], rel=1e-6)
    gemma_mlp.nnx.add_lora(model, 2, 4.0, rngs=nnx.Rngs(0))
    put(model, nnx.LoRAParam, final_state(workdir)["params"])
    assert heldout() == pytest.approx(summary["heldout_bits_per_byte"], rel=1e-6)


def put(model, kind, values):
    state = nnx.state(model, kind)
    nnx.replace_by_pure_dict(state, values)
    nnx.update(model, state)


@pytest.mark.slow
def test_interrupted_and_continued_gives_exactly_the_numbers_of_an_uninterrupted_run(
    finished, tuned, other, tmp_path, monkeypatch
):
    settings = config(tmp_path, other, base=str(finished[0]), **TUNING, **INT4)
    interrupt_at(15, settings, monkeypatch)
    continued = train(settings)
    assert continued["continued_from_step"] == 10
    for name in ("heldout_bits_per_byte_before", "sample_before", "heldout_bits_per_byte"):
        assert continued[name] == tuned[1][name]
    check_same_runs(tuned[0], tuned[1], tmp_path, continued)


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_both_shells_have_one_tree_of_adapters_and_give_the_same_logits(dtype):
    settings = config("unused", "", lora_rank=2, base="base", base_dtype=dtype or "")
    base = language_model.make("nnx", config("unused", "").mlp, 2, 2).init(jax.random.key(0))
    base = base if dtype is None else gemma_mlp.quantize(base, dtype)
    models = {api: language_model.make(api, settings.mlp, 2, 2) for api in ("nnx", "linen")}
    shapes, theirs = (jax.eval_shape(models[api].init, jax.random.key(0)) for api in ("nnx", "linen"))
    assert shapes == theirs
    adapters = jax.tree.map(lambda a: jnp.linspace(-0.3, 0.2, a.size, dtype=a.dtype).reshape(a.shape), shapes)
    params, tokens = language_model.join(base, adapters), jnp.arange(32).reshape(2, 16)
    logits = models["nnx"].logits(params, tokens)
    np.testing.assert_array_equal(logits, models["linen"].logits(params, tokens))
    zeros = language_model.join(base, jax.tree.map(jnp.zeros_like, adapters))
    assert jnp.abs(logits - models["nnx"].logits(zeros, tokens)).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 8}, r"both config.lora_rank and config.base.*Got: lora_rank=8\. Fix: .*--config.base=FOLDER"),
        ({"base": "runs/a"}, r"both config.lora_rank and config.base.*Got: base='runs/a'"),
        ({"base_dtype": "int4"}, r"both config.lora_rank and config.base.*Got: base_dtype='int4'"),
        ({"lora_rank": -1, "base": "runs/a"}, "config.lora_rank must be at least 0"),
        ({"lora_rank": 8, "base": "unused"}, "config.workdir must be another folder than config.base"),
        ({"lora_rank": 8, "base": "runs/a", "base_dtype": "int3"}, "config.base_dtype must be one of int8, int4"),
    ],
)
def test_fields_that_do_not_fit_together_raise(options, message):
    with pytest.raises(ValueError, match=message):
        config("unused", "", **options)


@pytest.mark.slow
def test_a_base_that_does_not_fit_is_refused_and_nothing_is_written(finished, tuned, other, tmp_path):
    def refused(message, base, **options):
        with pytest.raises(ValueError, match=message):
            train(config(tmp_path / "new", other, **TUNING | {"base": str(base)} | options))

    refused("must be the folder of a finished run.*absent", tmp_path / "absent")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints" / "10").mkdir(parents=True)
    (unfinished / "config.json").write_text((finished[0] / "config.json").read_text())
    refused("must be the folder of a finished run.*unfinished", unfinished)
    refused("must be a run that trained all parameters", tuned[0])
    different = r"hidden_dim is 32 in the base and 64 here; activation is 'gelu_tanh' in the base and 'silu' here. Fix"
    refused(different, finished[0], hidden_dim=64, activation="silu")
    refused("group_size must divide", finished[0], base_dtype="int4", base_group_size=5)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_fine_tuning_continues_only_with_its_base_and_its_adapters(finished, tuned, other, tmp_path):
    before = metrics(tuned[0])
    with pytest.raises(ValueError, match=r"base_dtype was 'int4' and is 'int8'; lora_rank was 2 and is 3"):
        settings = TUNING | INT4 | {"base_dtype": "int8", "lora_rank": 3}
        train(config(tuned[0], other, base=str(finished[0]), **settings))
    moved = tmp_path / "moved"
    moved.symlink_to(finished[0])
    assert train(config(tuned[0], other, base=str(moved), **TUNING, **INT4))["continued_from_step"] == 20
    assert metrics(tuned[0]) == before
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "checkpoints").symlink_to(finished[0] / "checkpoints")
    identity = json.loads((finished[0] / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(identity | {"seed": 7}))
    with pytest.raises(ValueError, match=r"base.seed was 0 and is 7"):
        train(config(tuned[0], other, base=str(changed), **TUNING, **INT4))


@pytest.mark.slow
def test_a_run_without_adapters_is_known_by_the_fields_it_had_before_there_were_adapters(finished):
    """So folders of older versions can be continued, and can be bases."""
    identity = json.loads((finished[0] / "config.json").read_text())
    assert not {name for name in identity if "lora" in name or "base" in name}


@pytest.mark.slow
def test_adapters_learn_in_linen(finished, other, tmp_path):
    summary = train(config(tmp_path, other, api="linen", base=str(finished[0]), base_dtype="int8", **TUNING))
    assert summary["heldout_bits_per_byte"] < summary["heldout_bits_per_byte_before"] - 0.1


@pytest.mark.slow
def test_value_checks_work_with_adapters(finished, tuned, other, tmp_path):
    checked = train(config(tmp_path, other, base=str(finished[0]), check_values=True, **TUNING, **INT4))
    assert checked["heldout_bits_per_byte"] == pytest.approx(tuned[1]["heldout_bits_per_byte"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_a_mesh_has_the_curve_of_one_device(finished, other, tmp_path):
    options = TUNING | INT4 | {"base": str(finished[0])}
    train(config(tmp_path / "one", other, **options))
    train(config(tmp_path / "mesh", other, mesh="data=2,fsdp=2,tensor=2", **options))
    check_curve(tmp_path / "mesh", curve(tmp_path / "one"))


@pytest.mark.slow
def test_the_command_says_what_the_base_scored(finished, other, tmp_path):
    settings = SMALL | TUNING | INT4 | {"data": other, "base": finished[0], "workdir": tmp_path}
    done = subprocess.run([*COMMAND, *flags(**settings)], check=True, capture_output=True, text=True)
    assert "its base, before fine-tuning" in done.stdout and "Before fine-tuning:" in done.stdout
