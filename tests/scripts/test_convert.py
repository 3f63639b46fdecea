"""scripts/convert.py converts from any form to any other and back."""

import convert
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from gemma_mlp import MLPConfig, checkpoint, layouts
from gemma_mlp.layouts.libraries import WITHOUT_POST_NORM
from tests.support.by_hand import CONFIG, GEMMA1, LAYERS, D, F, arrays, equal, huggingface, params
from tests.support.huggingface_folder import load, others, save, write
from tests.support.vary import slow_except

pytestmark = pytest.mark.promotes  # Orbax relies on promotion
ORBAX = [f"--embed_dim={D}", f"--hidden_dim={F}"]


def run(*arguments):
    with flagsaver.flagsaver():
        flags.FLAGS(["convert", *map(str, arguments)])
        convert.main()


ORBAX_LAYOUTS = [name for name in layouts.LAYOUTS if name not in {"huggingface", *WITHOUT_POST_NORM}]


@pytest.mark.parametrize("name", slow_except(["deepmind_stacked", "maxtext", "tunix"], ORBAX_LAYOUTS))
def test_there_and_back(tmp_path, capsys, name):
    source = write(tmp_path / "source", arrays(), shards=3)
    run(f"--source={source}", f"--target={tmp_path / 'c'}", f"--to={name}", "--transpose_gating_einsum")
    out = capsys.readouterr()
    assert f"for {LAYERS} layers, 0.0 MiB" in out.out
    assert "read back and the same, bit for bit" in out.out
    assert "reading: 100%" in out.err
    assert "verifying: 100%" in out.err
    got = checkpoint.read_orbax(tmp_path / "c", CONFIG, dtype="bfloat16")
    assert equal(got, params(arrays()))
    target = write(tmp_path / "target", arrays()[::-1])  # its blocks will be replaced
    run(f"--source={tmp_path / 'c'}", *ORBAX, f"--target={target}", "--to=huggingface", "--dtype=bfloat16")
    assert equal(
        {name: np.asarray(array) for name, array in load(target).items()}, huggingface(arrays()) | others(LAYERS)
    )


def test_gemma_1_by_t5x_and_a_new_hugging_face_folder(tmp_path):
    checkpoint.write_huggingface(tmp_path / "a", params(arrays(GEMMA1)), GEMMA1)
    run(f"--source={tmp_path / 'a'}", f"--target={tmp_path / 'b'}", "--to=t5x")
    back = [f"--source={tmp_path / 'b'}", *ORBAX, "--nopost_norm", "--dtype=bfloat16"]
    run(*back, f"--target={tmp_path / 'c'}", "--to=huggingface")
    assert equal(checkpoint.read_huggingface(tmp_path / "c"), params(arrays(GEMMA1)))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_of_a_t5gemma(tmp_path, part):
    source, settings = tmp_path / "source", {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS}
    write(source, arrays(), settings={"model_type": "t5gemma", "encoder": settings, "decoder": settings})
    layers = {"encoder": arrays(), "decoder": arrays()[::-1]}
    tensors = {
        name.replace("model.", f"model.{part}."): tensor
        for part in layers
        for name, tensor in huggingface(layers[part]).items()
    }
    save(source / "model.safetensors", tensors)
    arguments = [f"--source={source}", f"--part={part}"]
    run(*arguments, f"--target={tmp_path / 'orbax'}", "--to=tunix")
    assert equal(checkpoint.read_orbax(tmp_path / "orbax", CONFIG), params(layers[part]))
    run(*arguments, f"--target={tmp_path / 'new'}", "--to=huggingface")
    assert equal(checkpoint.read_huggingface(tmp_path / "new"), params(layers[part]))
    checkpoint.update_huggingface(source, params(arrays())[:1] * LAYERS, part=part)
    run(f"--source={tmp_path / 'orbax'}", *ORBAX, f"--part={part}", f"--target={source}", "--to=huggingface")
    assert equal(load(source), tensors)


def test_gemma_4_between_hugging_face_deepmind_and_maxtext(tmp_path):
    """All hold the same w, in float32 numbers of which no 1 + w is exact."""
    stored = [{name: (leaf / 3).astype(np.float32) for name, leaf in layer.items()} for layer in arrays()]
    settings = {"model_type": "gemma4_text", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS}
    source = write(tmp_path / "source", stored, settings=settings)
    for name in ("deepmind_flat", "maxtext"):
        orbax, target, new = (tmp_path / f"{kind}_{name}" for kind in ("orbax", "target", "new"))
        run(f"--source={source}", f"--target={orbax}", f"--to={name}", "--transpose_gating_einsum")
        config = MLPConfig(D, F, scale_plus_one=False)
        assert equal(checkpoint.read_orbax(orbax, config), params(stored))
        write(target, stored[::-1], settings=settings)
        back = [f"--source={orbax}", *ORBAX, "--noscale_plus_one", "--to=huggingface"]
        run(*back, f"--target={target}")
        assert equal(load(target), load(source))
        run(*back, f"--target={new}")
        assert checkpoint.read_config(new) == (config, LAYERS) and equal(
            checkpoint.read_huggingface(new), params(stored)
        )


def test_norms_of_another_kind_do_not_replace_those_of_a_folder(tmp_path):
    settings = {"model_type": "gemma4_text", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS}
    target = write(tmp_path / "target", arrays(), settings=settings)
    source = write(tmp_path / "source", arrays()[::-1])
    with pytest.raises(
        SystemExit, match=r"target multiply by w, so .* Got: scale_plus_one=True\. .*--noscale_plus_one"
    ):
        run(f"--source={source}", f"--target={target}", "--to=huggingface")
    with pytest.raises(SystemExit, match=r"source multiply by 1 \+ w, so .* Got: scale_plus_one=False"):
        run(f"--source={target}", f"--target={source}", "--to=huggingface")
    assert equal(checkpoint.read_huggingface(target), params(arrays()))


def test_addresses_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a", arrays())
    run("--source=~/a", "--target=~/b", "--to=tunix")
    run("--source=~/b", *ORBAX, "--target=~/a", "--to=huggingface")
    with pytest.raises(SystemExit, match="The target must be new"):
        run("--source=~/a", "--target=~/b", "--to=tunix")


@pytest.mark.parametrize("transpose", [False, True])
def test_an_orientation_that_shapes_do_not_tell_is_asked_for(tmp_path, transpose):
    config = MLPConfig(D, D, post_norm=False)
    layers = params(arrays(config))
    layout = layouts.deepmind_flat(config, transpose_gating_einsum=transpose)
    checkpoint.write_orbax(tmp_path / "a", layers, layout)
    source = [f"--source={tmp_path / 'a'}", f"--embed_dim={D}", f"--hidden_dim={D}", "--nopost_norm"]
    target = [f"--target={tmp_path / 'b'}", "--to=huggingface"]
    with pytest.raises(SystemExit, match="must decide its orientation"):
        run(*source, *target)
    said = f"--source_transpose_gating_einsum={str(transpose).lower()}"
    run(*source, *target, "--from=deepmind_flat", said)
    assert equal(checkpoint.read_huggingface(tmp_path / "b"), layers)


def test_norms_are_rounded_only_on_request(tmp_path, capsys):
    layers = params(arrays(dtype=np.float32))
    layers = [jax.tree.map(lambda leaf: leaf * 1.001, layer) for layer in layers]
    checkpoint.write_huggingface(tmp_path / "a", layers, CONFIG)
    arguments = [f"--source={tmp_path / 'a'}", f"--target={tmp_path / 'b'}", "--to=maxtext"]
    with pytest.raises(SystemExit, match=r"stores 1 \+ w.*round_norms"):
        run(*arguments)
    assert not (tmp_path / "b").exists()
    run(*arguments, "--round_norms")
    assert (tmp_path / "b").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    source = write(tmp_path / "source", arrays())
    run(f"--source={source}", f"--target={tmp_path / 'c'}", "--to=gemma_mlp", "--dry_run", "--dtype=float32")
    out = capsys.readouterr().out
    assert "layers_0/mlp/gate_proj    float32   [4, 6]" in out
    assert "Dry run: nothing is written." in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=absent", "--target=new", "--to=tunix"], "The model of an Orbax checkpoint must be given"),
        (["--source=absent", *ORBAX, "--target=new", "--to=tunix"], "absent must be an Orbax checkpoint"),
        (["--source=source", "--target=source", "--to=tunix"], "The target must be new"),
        (["--source=absent", "--target=gs://a/b", "--to=huggingface"], "on this disk.*'gs://a/b', a URL.*copy that"),
        (["--source=source", "--target=s3://a/b", "--to=tunix"], "or a gs:// URL as a string.*'s3://a/b'"),
        (["--source=s3://a/b", *ORBAX, "--target=new", "--to=tunix"], "or a gs:// URL as a string.*'s3://a/b'"),
        (["--source=source", "--target=new", "--to=deepmind"], "orientation .* must be chosen"),
        (["--source=source", "--target=new", "--to=t5x"], "The layout must have a place for"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, message):
    write(tmp_path / "source", arrays())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", ["write_orbax", "write_huggingface", "update_huggingface"])
def test_a_target_that_reads_back_otherwise_is_reported(tmp_path, monkeypatch, how):
    source = write(tmp_path / "source", arrays())
    if how == "update_huggingface":
        write(tmp_path / "c", arrays())
    write_ = getattr(checkpoint, how)
    monkeypatch.setattr(
        checkpoint, how, lambda path, params, *rest, **options: write_(path, params[::-1], *rest, **options)
    )
    with pytest.raises(SystemExit, match="What is read back must be what was written"):
        run(
            f"--source={source}",
            f"--target={tmp_path / 'c'}",
            f"--to={'tunix' if how == 'write_orbax' else 'huggingface'}",
        )
