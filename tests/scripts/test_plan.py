"""The planner's arithmetic, and plans by the CPU's compiler. test_plan_compilers.py plans with the chips' compilers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import meshes
import pytest
from plan import attempts, chips, search
from plan.stack import LAYERS, SAVES, Case, build

from gemma_mlp.aot import Collective

ROOT = Path(__file__).parents[2]
GIB = 2**30


def case(preset="gemma2_27b", program="train", mesh=(1, 16, 16), tokens=8192, save="input"):
    return Case(preset, program, mesh, tokens, save, sequence_parallel=True)


class TestChips:
    def test_targets_are_read(self):
        assert chips.parse("v5e:16x16") == (chips.CHIPS["v5e"], 256, "tpu v5e:16x16")
        assert chips.parse("v5p:8x8x8") == (chips.CHIPS["v5p"], 512, "tpu v5p:8x8x8")
        assert chips.parse("tpu7x:2x2x1") == (chips.CHIPS["tpu7x"], 8, "tpu tpu7x:2x2x1")  # two devices a chip
        assert chips.parse("h200:16") == (chips.CHIPS["h200"], 16, "h200:16")

    @pytest.mark.parametrize("target", ["v5e", "tpu v5e:2x2", "h100:8", "v5e:2x", "v5e:0x2", ""])
    def test_an_unknown_target_is_explained(self, target):
        with pytest.raises(
            ValueError, match=r"must be CHIP:TOPOLOGY, where the chip is one of v5e, v5p, v6e, tpu7x, h200\."
        ):
            chips.parse(target)

    def test_figures_are_those_of_the_makers(self):
        """TFLOP/s and GB/s of memory and links are those that makers print. Programs get a little less memory."""
        figures = {name: (c.flops / 1e12, c.hbm_speed / 1e9, c.link_speed / 1e9) for name, c in chips.CHIPS.items()}
        assert figures == {
            "v5e": (197, 819, 400 / 2),
            "v5p": (459, 2765, 1200 / 2),
            "v6e": (918, 1640, 800 / 2),
            "tpu7x": (2307 / 2, 7380 / 2, 1200 / 2 / 2),
            "h200": (1979 / 2, 4800, 900 / 2),
        }
        printed = {"v5e": 16 * GIB, "v5p": 96 * GIB, "v6e": 32 * GIB, "tpu7x": 192 * GIB / 2, "h200": 141e9}
        assert all(0.97 * size < chips.CHIPS[name].hbm_bytes <= size for name, size in printed.items())

    @pytest.mark.parametrize(
        ("groups", "speed"),
        [
            (((0, 1, 7), (8, 15)), 450e9),  # each group is in one host
            (((0, 8),), 50e9),  # over one card of each host
            (((0, 1, 8, 9),), 100e9),  # over two cards of each host
            ((tuple(range(16)),), 400e9),
        ],
    )
    def test_hosts_of_h200s_are_joined_by_their_network(self, groups, speed):
        assert chips.CHIPS["h200"].speed_within(groups) == speed
        assert chips.CHIPS["v5e"].speed_within(groups) == 200e9


def test_flops_are_those_of_the_parameters_and_of_what_is_recomputed():
    """Training takes 6 FLOPs for each parameter and token, and more for what is recomputed."""
    assert (LAYERS["gemma2_2b"], LAYERS["gemma2_9b"], LAYERS["gemma2_27b"]) == (26, 42, 46)
    parameters = 509_607_936 * 46
    for save, recomputed in {"gate_up": 0, "input": 2 / 3, "block": 5 / 3}.items():
        assert case(save=save).flops() == pytest.approx((6 + 2 * recomputed) * parameters * 16 * 8192 / 256)
    assert case(program="forward", mesh=(2, 4, 1)).flops() == 2 * parameters * 8192
    assert list(SAVES) == ["block", "input", "gate_up"]  # the order in which the search tries them


def count_matmuls(jaxpr):
    """The number of dot_generals in a layer on a TPU. A loop counts once, a choice by platform as its last branch."""
    found = 0
    for equation in jaxpr.eqns:
        inner = [getattr(each, "jaxpr", each) for each in jax.tree.leaves(list(equation.params.values()))]
        inner = [each for each in inner if hasattr(each, "eqns")]
        found += (equation.primitive.name == "dot_general") + sum(
            map(count_matmuls, inner[-1:] if equation.primitive.name == "cond" else inner)
        )
    return found


@pytest.mark.promotes  # optax does
@pytest.mark.parametrize("save", SAVES)
def test_a_step_has_the_matmuls_that_are_counted(save):
    mesh = jax.make_mesh((1, 1, 1), meshes.AXES, (jax.sharding.AxisType.Auto,) * 3, devices=jax.devices("cpu")[:1])
    for program, matmuls in {"train": SAVES[save].matmuls, "forward": 3}.items():
        step, arguments, _ = build(case("gemma3_270m", program, (1, 1, 1), 64, save), mesh)
        assert count_matmuls(jax.make_jaxpr(step)(*arguments).jaxpr) == matmuls


class TestTransfers:
    @pytest.mark.parametrize(
        ("groups", "axes"),
        [
            (((0, 1, 2), (3, 4, 5)), "tensor"),
            (((0, 3), (1, 4)), "fsdp"),
            (((0, 6), (1, 7)), "data"),
            (((0, 1, 2, 3, 4, 5),), "fsdp, tensor"),
            (((0, 6), (6, 0), (3, 9), (9, 3)), "data"),
            (((0, 1), (1, 2), (2, 0)), "tensor"),
            (((0, 1), (2, 5)), "fsdp, tensor"),
            ((tuple(range(12)),), "data, fsdp, tensor"),
        ],
    )
    def test_the_axes_of_groups_are_named(self, groups, axes):
        assert attempts.axes_of(groups, (2, 2, 3)) == axes

    def test_transfers_are_summed_by_kind_and_axes(self):
        ring = ((0, 1), (1, 0))
        found = [
            Collective("all-reduce", 8, ((0, 2), (1, 3)), 5),
            Collective("collective-permute", 100, ring, 3),
            Collective("collective-permute", 10, ring, None),
        ]
        permutes = {"kind": "collective-permute", "axes": "tensor", "runs": 4, "result_bytes": 310, "sent_bytes": 310}
        sums = {"kind": "all-reduce", "axes": "fsdp", "runs": 5, "result_bytes": 40, "sent_bytes": 40}
        assert attempts.transfers(found, (1, 2, 2)) == [permutes | {"at_least": True}, sums | {"at_least": False}]


class TestSearch:
    def test_meshes_divide_the_sizes(self):
        found = search.all_meshes(8, "gemma2_2b", 8192)
        assert len(found) == len(set(found)) == 10 and (1, 8, 1) in found and found[-1] == (1, 1, 8)
        assert max(fsdp for _, fsdp, _ in search.all_meshes(512, "gemma2_2b", 8192)) == 256  # 2304 = 9 * 256
        assert max(tensor for *_, tensor in search.all_meshes(8, "gemma2_2b", 2)) == 2

    def test_each_mesh_and_rule_has_all_policies(self):
        ladders = search.cases([(1, 8, 1), (1, 4, 2)], "gemma2_2b", "train", 64)
        assert [(ladder[0].mesh, ladder[0].sequence_parallel) for ladder in ladders] == [
            ((1, 8, 1), False),
            ((1, 4, 2), True),
            ((1, 4, 2), False),
        ]
        assert all([each.save for each in ladder] == ["block", "input", "gate_up"] for ladder in ladders)
        assert [len(ladder) for ladder in search.cases([(1, 8, 1)], "gemma2_2b", "forward", 64)] == [1]

    def test_policies_that_save_more_than_one_that_does_not_fit_are_skipped(self):
        tried = []

        def attempt(each):
            tried.append(each.save)
            return {"case": str(each), "fits": each.save == "block", "needed_bytes": 1}

        rows = list(search.search(search.cases([(1, 8, 1)], "gemma2_2b", "train", 64), attempt))
        assert tried == ["block", "input"]
        assert rows[2]["skipped"] == "save=input does not fit already" and not rows[2]["fits"]

    def test_the_fastest_that_fits_comes_first(self):
        speeds = {"slow": (100, 1), "large": (2001, 9), "small": (2000, 3), "too large": (9000, 99)}
        rows = [
            {"case": name, "fits": name != "too large", "roofline_tokens_per_second": speed, "needed_bytes": size}
            for name, (speed, size) in speeds.items()
        ]
        assert [row["case"] for row in search.ranked(rows)] == ["small", "large", "slow"]

    def test_the_message_that_nothing_fits_names_the_leanest_case(self):
        rows = [
            {"case": "mesh=a", "fits": False, "needed_bytes": 20 * GIB},
            {"case": "mesh=b", "fits": False, "needed_bytes": 17.5 * GIB},
            {"case": "mesh=c", "fits": False, "skipped": "save=block does not fit already"},
        ]
        assert search.nothing_fits(rows, "v5e:2x2", 15.75 * GIB).startswith(
            "Nothing fits v5e:2x2: a chip has 15.75 GiB, and the leanest case needs 17.50 GiB, mesh=b. Fix: take more"
        )

    def test_a_mesh_is_read_from_text(self):
        assert meshes.parse("data=2,fsdp=16,tensor=8") == (2, 16, 8)
        assert meshes.parse("tensor=8, fsdp=16") == (1, 16, 8)
        for text in ("", "8", "data=0,fsdp=1", "fsdp=-8", "fsdp=2,fsdp=4", "fsdp=2,rows=4"):
            with pytest.raises(ValueError, match=r"data=1,fsdp=2,tensor=4\."):
                meshes.parse(text)


class TestByThisMachinesCompiler:
    """Gemma 3 270M: D = 640, F = 2048, 18 layers. The CPU counts as eight devices."""

    CHIP = chips.Chip(hbm_bytes=GIB, flops=1e12, hbm_speed=1e12, link_speed=1e9)

    def attempt(self, chip=CHIP, **options):
        return attempts.attempt(case("gemma3_270m", mesh=(2, 2, 2), tokens=16, **options), chip, "cpu")

    @pytest.mark.promotes  # optax does
    def test_a_training_step_has_the_bytes_and_flops_of_arithmetic(self):
        row = self.attempt()
        assert row["mesh"] == dict(zip(meshes.AXES, (2, 2, 2))) and row["layers"] == 18 and row["tokens"] == 4 * 16
        weights, norms = 18 * 3 * 640 * 2048 // 4, 18 * 2 * 640 // 2  # weights over fsdp and tensor, norms over fsdp
        state = 3 * 4 * (weights + norms) + 4  # parameters and AdamW's two moments in float32, and its count
        assert row["bytes"]["arguments"] == state + 16 * 640 * 2 // 2  # a row's sequence, its length over tensor
        # The loss and a table of results. The new state overwrites the donated one.
        assert 4 <= row["bytes"]["results"] <= 256
        assert row["needed_bytes"] == sum(row["bytes"][name] for name in ("arguments", "results", "temporary"))
        assert row["flops"] == 11 * 2 * 640 * 2048 * 18 * 16 // 2
        seconds = row["roofline_seconds"]
        assert seconds["FLOPs"] == row["flops"] / 1e12
        # The step reads its arguments and writes its results and the new state.
        assert seconds["HBM"] * 1e12 == pytest.approx(row["bytes"]["arguments"] + state + row["bytes"]["results"])
        assert seconds["links"] == pytest.approx(sum(each["sent_bytes"] for each in row["transfers"]) / 1e9)
        assert row["bound"] == "links" and row["roofline_tokens_per_second"] == 64 / seconds["links"]
        assert row["fits"] and not any(each["at_least"] for each in row["transfers"])
        sent = {}
        for each in row["transfers"]:
            sent[each["axes"]] = sent.get(each["axes"], 0) + each["sent_bytes"]
        # A chip has a shard of every weight's gradient, and must send it at least once to sum it over data's two rows.
        assert sent["data"] >= 4 * weights / 2 and sent["fsdp"] > 0 and sent["tensor"] > 0

    def test_a_forward_pass_reads_its_arguments_and_writes_its_result(self):
        row = self.attempt(program="forward")
        residual = 16 * 640 * 2 // 2  # bfloat16
        assert residual <= row["bytes"]["results"] <= residual + 256 < row["bytes"]["arguments"]
        moved = row["bytes"]["arguments"] + row["bytes"]["results"]
        assert row["roofline_seconds"]["HBM"] * 1e12 == pytest.approx(moved)

    def test_what_does_not_fit_says_what_it_needs(self):
        row = self.attempt(chip=chips.Chip(hbm_bytes=2**20, flops=1, hbm_speed=1, link_speed=1), program="forward")
        assert not row["fits"] and row["needed_bytes"] > 2**20

    def test_a_mesh_that_does_not_divide_is_explained(self):
        with pytest.raises(ValueError, match="A split axis must be a multiple"):
            attempts.attempt(case("gemma3_270m", mesh=(1, 1, 8), tokens=12), self.CHIP, "cpu")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.save=all", "config.save must be among block, input, gate_up."),
        ("--config.tokens=0", "config.tokens must be a whole number of at least 1."),
        ("--config.mesh=data=1,fsdp=2,tensor=2", "A mesh of v5e:16x16 must have 256 devices."),
    ],
)
def test_wrong_settings_are_explained(flag, message, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), flag, f"--config.workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode != 0 and message in done.stderr and done.stderr.count("\n") == 1
