"""The compilers of the TPUs and of the H200 report the right bytes, FLOPs and transfers of known matmuls."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_mlp import aot

pytestmark = pytest.mark.needs_compilers
X = jax.ShapeDtypeStruct((256, 512), "bfloat16")
W = jax.ShapeDtypeStruct((512, 1024), "bfloat16")


@pytest.mark.parametrize(
    "target", ["tpu v4:2x2x1", "tpu v5e:2x2", "tpu v5p:2x2x1", "tpu v6e:2x2", "tpu tpu7x:2x2x1", "h200"]
)
def test_one_matmul_on_one_chip_has_known_bytes_and_flops(target):
    compiled = aot.compile_for(target, jnp.dot, X, W)
    assert compiled.argument_bytes == 2 * (256 * 512 + 512 * 1024)
    assert compiled.output_bytes == 2 * 256 * 1024
    assert compiled.collectives == ()
    assert "HloModule" in compiled.text
    if target != "h200":
        assert compiled.flops == pytest.approx(2 * 256 * 512 * 1024, rel=0.01)


def test_a_contraction_over_a_mesh_axis_is_one_all_reduce():
    mesh = Mesh(aot.devices("tpu v5e:2x2"), ("tensor",))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P(None, "tensor")))
    w = jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=NamedSharding(mesh, P("tensor", None)))
    compiled = aot.compile_for("tpu v5e:2x2", lambda x, w: jnp.dot(x, w, out_sharding=None), x, w)
    assert [collective.kind for collective in compiled.collectives] == ["all-reduce"]
    assert compiled.argument_bytes == 2 * (256 * 512 + 512 * 1024) // 4


def test_an_unknown_topology_is_explained():
    with pytest.raises(ValueError, match=r"libtpu must know the topology.*'tpu v5e:3x7'"):
        aot.devices("tpu v5e:3x7")


def test_a_program_that_does_not_fit_says_what_it_needs():
    """40 GiB of arguments on a chip of 15.75 GiB."""
    x = jax.ShapeDtypeStruct((20, 2**30), "bfloat16")
    with pytest.raises(aot.DoesNotFit, match="must fit the memory of a chip") as error:
        aot.compile_for("tpu v5e:2x2", jnp.sum, x)
    assert 40 * 2**30 <= error.value.needed_bytes < 50 * 2**30
