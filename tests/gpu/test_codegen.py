"""Audit of every line of Triton's launch table, compiled for six GPUs without the GPUs."""

import copy

import pytest
from codegen_runs import (
    assert_memory_bound,
    assert_not_above_liger,
    assert_within_budgets,
    codegen,
    needs_liger,
)
from tiers import sampled

pytest.importorskip("triton")
pytest.importorskip("rich")

from bench.without_gpu.chips import CHIPS, TRITON, resident_threads  # noqa: E402
from bench.without_gpu.codegen import amdgcn, budgets, sass  # noqa: E402
from bench.without_gpu.codegen.audit import violations  # noqa: E402
from bench.without_gpu.codegen.loops import hot_loops  # noqa: E402
from bench.without_gpu.codegen.predict import predict  # noqa: E402
from bench.without_gpu.codegen.table import is_plain  # noqa: E402


@pytest.fixture(scope="session", params=sampled(TRITON, []))
def target(request):
    return request.param


@pytest.fixture(scope="session")
def compiled(target, tmp_path_factory):
    """The records of one target."""
    folder = tmp_path_factory.mktemp(target)
    return codegen(folder, "--backend", "triton", "--target", target)["records"]


def test_every_line_of_the_launch_table_was_compiled(compiled, target):
    from fused_sft_loss.triton_kernels.launch import USES, lines, shape_for

    from bench.without_gpu import triton_offline

    chip = triton_offline.CHIPS[target]
    expected = {
        (use.split()[0], shape.columns, str(dtype)[6:], shape.threads, shape.runs)
        for shape in lines(chip)
        for use in USES
        if shape_for(chip, use, shape.columns or triton_offline.WIDEST) == shape
        for dtype in triton_offline.DTYPES
    }
    keys = ("kernel", "columns", "dtype", "threads", "runs")
    assert {tuple(r[key] for key in keys) for r in compiled if r["pass"]} == expected
    rest = {r["kernel"] for r in compiled if not r["pass"]}
    assert rest == {"fold_segments", "merge", "reduce", "row_targets"}


def test_registers_and_bytes_in_flight_are_those_the_launch_table_was_chosen_for(compiled, target):
    assert_within_budgets(compiled, budgets.TRITON, target)


def test_every_chip_has_a_budget_and_a_name_in_liger():
    from bench.without_gpu.codegen import peers

    assert set(peers.ARCHITECTURES) == set(TRITON)
    for use in ("row_stats", "row_grad"):
        assert {chip for chip, other in budgets.TRITON if other == use} == set(TRITON)


def test_no_spills_wide_accesses_and_limits_kept(compiled, target):
    assert compiled and {r["target"] for r in compiled} == {target}
    broken = [f"{r['name']}: {text}" for r in compiled for text in violations(r)]
    assert not broken, "\n".join(broken)


def test_one_exp_per_element_and_little_more(compiled):
    """A thread rescales its sum once per tile: at most one more exp per eight elements."""
    for r in compiled:
        if is_plain(r):
            loop = r["loops"][r["pass"]]
            most = 1.0 + (1 / 8 if r["pass"] == "statistics" else 0)
            assert 1.0 <= loop["exps"] <= most, r["name"]


def test_memory_is_what_bounds_both_passes(compiled):
    assert_memory_bound(r for r in compiled if is_plain(r) and r["columns"] is None)


@pytest.mark.long
@needs_liger
def test_not_above_liger_in_either_pass(tmp_path):
    compared = assert_not_above_liger(codegen(tmp_path, "--backend", "triton", "--peer", "liger"))
    assert len(compared) == len(TRITON) * 3 * 2


# Tests of the audit: each rule is broken on purpose, and the parsers read bad code.

DOCTORED = {
    "spills": lambda r: r.update(spills=2),
    "scratch bytes": lambda r: r.update(scratch_bytes=16),
    "local accesses": lambda r: r.update(local_accesses=4),
    "at most 1024 threads": lambda r: r.update(threads=2048),
    "shared memory": lambda r: r.update(shared_bytes=r["shared_bytes_limit"] + 1),
    "fit a unit": lambda r: r.update(resident_threads=0),
    "loads of 16 bytes": lambda r: r["loops"]["gradient"].update(load_bytes=[8, 16]),
    "stores of 16 bytes": lambda r: r["loops"]["gradient"].update(store_bytes=[4]),
    "bytes loaded": lambda r: r["loops"]["gradient"].update(loaded=4.0),
    "bytes stored": lambda r: r["loops"]["zeros"].update(stored=0.0),
    "hot loop for zeros": lambda r: r["loops"].pop("zeros"),
    "unexpected loop": lambda r: r["loops"].update(statistics=r["loops"]["gradient"]),
    "no local accesses in": lambda r: r["loops"]["gradient"].update(local_accesses=1),
    "no generic accesses in": lambda r: r["loops"]["zeros"].update(generic_accesses=1),
}


@pytest.mark.parametrize("rule", DOCTORED)
def test_the_audit_sees(compiled, rule):
    sound = next(r for r in compiled if r["kernel"] == "row_grad" and r["dtype"] == "bfloat16")
    assert violations(sound) == []
    doctored = copy.deepcopy(sound)
    DOCTORED[rule](doctored)
    assert any(rule in text for text in violations(doctored))


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDG.E.64 R4, desc[UR10][R12.64] ;
        /*0030*/                   LDG.E.U16 R6, desc[UR10][R12.64+0x8] ;
        /*0040*/                   STL [R1+0x4], R5 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   FADD R5, R4, R5 ;
.L_x_2:
        /*0080*/                   BRA.U !UP0, `(.L_x_0) ;
.L_x_1:
        /*0090*/                   STG.E desc[UR10][R2.64], R5 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""

AMDGCN = """
kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:
\tv_exp_f32_e32 v1, v1
\tscratch_store_dword off, v1, s0
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; header, entered in the middle
\tglobal_load_dwordx2 v[1:2], v0, s[2:3]
\tglobal_store_short v0, v1, s[2:3]
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
\tv_exp_f32_e32 v1, v1
"""


def test_hot_loop_is_found_in_sass():
    (loop,) = hot_loops(sass.parse_text(SASS), element_bytes=2)
    assert (loop.purpose, loop.elements, loop.instructions) == ("statistics", 5, 7 / 5)
    assert (loop.load_bytes, loop.store_bytes, loop.local_accesses) == ([2, 8], [], 1)


def test_hot_loop_is_found_in_amdgcn():
    (loop,) = hot_loops(amdgcn.parse_text(AMDGCN), element_bytes=2)
    assert (loop.purpose, loop.elements, loop.instructions) == ("gradient", 4, 6 / 4)
    assert (loop.load_bytes, loop.store_bytes, loop.local_accesses) == ([8], [2], 1)


def test_a_loop_around_a_loop_is_not_hot():
    outer = SASS.replace("/*0090*/", "/*0088*/ BRA.U UP1, `(.L_x_0) ;\n        /*0090*/")
    nested = outer.replace("LDC R1, c[0x0][0x28] ;\n", "NOP ;\n.L_x_9:\n").replace(
        "STG.E desc[UR10][R2.64], R5 ;",
        "STG.E desc[UR10][R2.64], R5 ;\n        /*0098*/ @P1 BRA `(.L_x_9) ;",
    )
    (loop,) = hot_loops(sass.parse_text(nested), element_bytes=2)
    assert loop.purpose == "statistics"


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "resident", "reason"),
    [  # computed by hand: 64 Ki registers of 32 bits per SM, 512 per lane of a SIMD
        ("sm_90", 256, 32, 0, 2048, "threads"),
        ("sm_90", 128, 40, 0, 1536, "registers"),
        ("sm_90", 1024, 65, 0, 0, "registers"),
        ("sm_80", 32, 16, 0, 1024, "blocks"),
        ("sm_90", 128, 32, 56 * 1024, 512, "shared memory"),
        ("gfx942", 256, 64, 0, 2048, "threads"),
        ("gfx942", 256, 72, 0, 1792, "registers"),
        ("gfx942", 256, 32, 33 * 1024, 256, "shared memory"),
    ],
)
def test_occupancy(target, threads, registers, shared, resident, reason):
    assert resident_threads(CHIPS[target], threads, registers, shared) == (resident, reason)


def test_prediction_finds_the_narrowest_pipe():
    chip = CHIPS["sm_90"]
    loop = {"loaded": 2.0, "stored": 0.0, "instructions": 8.0, "work": {"transcendental": 1.0}}
    assert predict(chip, loop)["bytes_per_second"] == chip.bandwidth
    loop["work"]["transcendental"] = 10.0
    slow = predict(chip, loop)
    assert slow["bound"] == "mufu"
    assert slow["bytes_per_second"] == pytest.approx(2 * 132 * 1.98e9 * 16 / 10)
    loop["instructions"] = 1000.0
    assert predict(chip, loop)["bound"] == "issue"
