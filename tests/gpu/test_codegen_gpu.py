"""Audit of the CUDA and HIP kernels as nvcc and clang compile them, for every launch-table line."""

import re
from itertools import product

import codegen_runs
import pytest
from codegen_runs import (
    assert_memory_bound,
    assert_not_above_liger,
    assert_within_budgets,
    codegen,
    needs_liger,
)
from tiers import sampled

pytest.importorskip("rich")

from bench.__main__ import main  # noqa: E402
from bench.without_gpu.chips import AMD, CHIPS, NVIDIA, TRITON, resident_threads  # noqa: E402
from bench.without_gpu.codegen import (  # noqa: E402
    amdgcn,
    budgets,
    instances,
    launch_table,
    sass,
    toolchains,
)
from bench.without_gpu.codegen.audit import violations  # noqa: E402
from bench.without_gpu.codegen.loops import Shifted, hot_loops  # noqa: E402
from bench.without_gpu.codegen.table import is_plain  # noqa: E402
from csrc.toolchains import compilers  # noqa: E402
from csrc.toolchains import toolkits as build

#: The targets that have a backend here; clang 19 does not know gfx950.
BACKENDS = {
    target: backend
    for backend, targets in toolchains.TARGETS.items()
    for target in targets
    if target != "gfx950"
}
KERNELS = ("row_stats", "row_grad", "row_stats_grad")


@pytest.fixture(scope="session")
def audits(tmp_path_factory):
    """The command's JSON for one target, or several of one backend; each is compiled once."""
    made = {}

    def audit(*targets):
        backend = "hip" if targets[0].startswith("gfx") else "cuda"
        if not toolchains.find(backend):
            pytest.skip(f"no compiler for {backend}: {toolchains.advice(backend)}")
        if targets not in made:
            more = ["--executed"] if targets == ("sm_90",) else []
            more += [word for target in targets for word in ("--target", target)]
            folder = tmp_path_factory.mktemp("-".join(targets))
            made[targets] = codegen(folder, "--options", "--backend", backend, *more)
        return made[targets]

    return audit


@pytest.fixture(params=sampled(BACKENDS, []))
def compiled(audits, request):
    """(target, records of its kernels)."""
    return request.param, audits(request.param)["records"]


def test_lines_of_the_launch_table_can_be_launched():
    for line in launch_table.launch_table():
        assert line.threads % CHIPS[line.target].warp == 0, line
        assert line.segment % (32 * line.threads) == 0, line  # whole tiles
        assert line.why, line
    for target, kernel in product(CHIPS, KERNELS):
        widths = [line.columns for line in launch_table.lines(target, kernel)]
        assert widths[-1] is None and widths[:-1] == sorted(widths[:-1]), (target, kernel)


SHARED = re.compile(r"kStaticBytes = (\d+), kSpare = (\d+)")


@pytest.mark.parametrize("target", [name for name in NVIDIA if name != "sm_80"])
def test_a_row_that_is_read_once_leaves_room_for_a_second_block(target):
    """One block of a unit would load nothing while it computes: an SM of 12.0 has 100 KiB.

    The shared memory of a launch is dynamic, so the audit of machine code does not see it.
    """
    static, spare = map(int, SHARED.search(_text("csrc/gpu/row_stats_grad.cu")).groups())
    limits = CHIPS[target]
    registers = max(budgets.CSRC[target, "row_stats_grad"].bf16, 1)
    for line in launch_table.lines(target, "row_stats_grad"):
        columns = min(line.columns or line.segment, line.segment)
        shared = static + spare + 2 * columns
        assert shared <= limits.shared_bytes_of_block
        resident, _ = resident_threads(limits, line.threads, registers, shared)
        assert resident >= 2 * line.threads, line


def test_the_chips_are_those_of_the_build():
    """csrc/toolchains keeps a separate list, because it runs where nothing is installed."""
    assert ";".join(CHIPS[name].build for name in NVIDIA) == build.CUDA_TARGETS
    assert ";".join(CHIPS[name].build for name in AMD) == build.ROCM_TARGETS
    install = _text("docs/install.md")
    assert f"`{build.CUDA_TARGETS}`" in install and f"`{build.ROCM_TARGETS}`" in install


@pytest.mark.parametrize(
    ("page", "chips"), [("docs/verification.md", CHIPS), ("README.md", BACKENDS)]
)
def test_the_pages_name_the_chips_that_kernels_are_compiled_for(page, chips):
    targets = {**toolchains.TARGETS["cuda"], **toolchains.TARGETS["hip"]}
    assert {targets[name] for name in chips} <= set(_text(page).replace(",", " ").split())


def _text(page):
    return (codegen_runs.ROOT / page).read_text(encoding="utf-8")


def test_every_kernel_and_line_was_compiled(compiled):
    target, records = compiled
    expected = set()
    for columns, softcap, shifted, dtype in product(
        (None, 3, 4, 6), instances.CAPS, (False, True), instances.DTYPES.values()
    ):
        kernel = "row_stats" if columns else "row_grad"
        name = instances.Instance(kernel, dtype, columns, softcap, shifted).name
        lines = launch_table.lines(target, kernel)
        expected |= {(name, line.columns, line.threads) for line in lines}
    for softcap, shifted, dtype in product(
        instances.CAPS, (False, True), instances.DTYPES.values()
    ):
        if (shifted or softcap) and target.startswith("gfx"):
            continue  # AMD loads rows from any address; a softcap takes two reads there
        name = instances.Instance("row_stats_grad", dtype, None, softcap, shifted).name
        lines = launch_table.lines(target, "row_stats_grad")
        expected |= {(name, line.columns, line.threads) for line in lines}
    expected |= {(f"row_rescale {dtype}", None, 512) for dtype in instances.DTYPES.values()}
    for columns in (3, 4, 6):
        expected |= {(f"{kernel} x{columns}", None, 256) for kernel in ("fold_segments", "merge")}
    expected |= {("row_targets", None, 512), ("reduce", None, 512)}
    found = {(r["name"], r["columns"], r["threads"]) for r in records}
    assert found >= expected


@pytest.mark.long
def test_a_target_that_the_compiler_does_not_know_is_named(audits):
    audit = audits("gfx90a", "gfx942", "gfx950")
    compiled = {r["target"] for r in audit["records"]}
    refused = {one["target"]: one["reason"] for one in audit["not_compiled"]}
    assert compiled | set(refused) == {"gfx90a", "gfx942", "gfx950"}
    assert "gfx950" in compiled or "gfx950" in refused["gfx950"]


def test_no_spills_wide_accesses_and_limits_kept(compiled):
    _, records = compiled
    broken = [f"{r['name']} ..{r['columns']}: {t}" for r in records for t in violations(r)]
    assert not broken, "\n".join(broken)


def test_registers_and_bytes_in_flight_are_those_the_launch_table_was_chosen_for(compiled):
    target, records = compiled
    assert_within_budgets(filter(is_plain, records), budgets.CSRC, target)


def test_every_compiled_target_has_a_budget():
    assert set(budgets.CSRC) == set(product(BACKENDS, KERNELS))


def test_one_exp_per_element_and_little_more(compiled):
    """A thread rescales its sum once per tile. A small softcap takes one more exp per element."""
    _, records = compiled
    once = {"statistics": 1.0, "gradient": 1.0, "one read": 2.0, "rescaling": 0.0, None: 0.0}
    more = {"statistics": 1 / 8, "one read": 1 / 8}
    for r in records:
        if r["pass"]:
            loop = r["loops"][r["pass"]]
            short = "softcap" in r["name"] and "large" not in r["name"]
            least = once[r["pass"]] * (2 if short else 1)
            assert least <= loop["exps"] <= least + more.get(r["pass"], 0), r["name"]


def test_memory_is_what_bounds_both_passes(compiled):
    _, records = compiled
    assert_memory_bound(filter(is_plain, records))


def test_four_loads_at_once(compiled):
    """Every thread has four 16-byte loads in flight; two suffice behind a softcap, where arithmetic
    is the limit, and in unaligned one-read kernels."""
    _, records = compiled
    for r in records:
        if r["pass"] and r["pass"] != "rescaling":
            least = (
                2 if "softcap" in r["name"] or r["pass"] == "one read" and not r["aligned"] else 4
            )
            assert r["loops"][r["pass"]]["loads_at_once"] >= least, r["name"]


def test_unaligned_rows_ask_the_cache_and_not_the_memory_for_more(compiled):
    target, records = compiled
    for r in records:
        if r["pass"]:
            loop = r["loops"][r["pass"]]
            more = 2 if not r["aligned"] and BACKENDS[target] == "cuda" else 0
            assert loop["requested"] == loop["loaded"] + more == r["element_bytes"] + more


@pytest.mark.long
def test_executed_as_read(audits):
    """The PTX, executed on two whole rows, moves the bytes that the machine code's loops say."""
    audit = audits("sm_90")
    plain = {
        (r["dtype"], r["pass"]): r["loops"][r["pass"]]
        for r in audit["records"]
        if is_plain(r) and r["columns"] is None
    }
    plain = {key: loop for key, loop in plain.items() if key[1] != "rescaling"}
    assert len(audit["executed"]) == len(plain) == 9
    for one in audit["executed"]:
        loop = plain[one["dtype"], one["pass"]]
        for key in ("loaded", "stored", "exps"):
            assert one[key] == pytest.approx(loop[key], rel=0.06), (one, key)


@pytest.mark.long
@needs_liger
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_not_above_liger_in_either_pass(backend, tmp_path):
    pytest.importorskip("triton")
    if not toolchains.find(backend):
        pytest.skip(f"no compiler for {backend}: {toolchains.advice(backend)}")
    compared = assert_not_above_liger(codegen(tmp_path, "--backend", backend, "--peer", "liger"))
    beside = [target for target, its in BACKENDS.items() if its == backend and target in TRITON]
    assert len(compared) == len(beside) * 3 * 2


def test_compiled_as_in_the_build():
    """The audit compiles with the build's flags that affect device code."""
    assert set(toolchains.FLAGS["cuda"]) <= set(compilers.NVCC_FLAGS)
    assert set(toolchains.FLAGS["hip"]) - {"--offload-device-only"} <= set(build.HIP_FLAGS)


def test_a_named_backend_without_a_compiler(monkeypatch, capsys):
    monkeypatch.delenv("FUSED_SFT_LOSS_WITHOUT", raising=False)
    monkeypatch.setattr(toolchains, "find", lambda backend: None)
    assert main(["codegen", "--backend", "hip"]) == 1
    assert "apt-get install" in capsys.readouterr().err


# Tests of the parsers, on known text.


@pytest.mark.parametrize(
    ("mangled", "expected"),
    {
        "_ZN3fsl3gpu16row_stats_kernelINS0_4BF16ELi4ELi0ELb1EEEvNS_9StatsArgsENS0_5UnitsE": (
            instances.Instance("row_stats", "bfloat16", 4, 0, True)
        ),
        "_ZN3fsl3gpu15row_grad_kernelINS0_3F32ELi1ELb0ELb0EEEvNS_8GradArgsENS0_5UnitsEii": (
            instances.Instance("row_grad", "float32", None, instances.SMALL_CAP, False)
        ),
        "_ZN3fsl3gpu21row_stats_grad_kernelINS0_3F16ELi2ELb1EEEvNS_13StatsGradArgsENS0_5Units": (
            instances.Instance("row_stats_grad", "float16", None, instances.LARGE_CAP, True)
        ),
        "_ZN3fsl3gpu18row_rescale_kernelINS0_4BF16EEEvNS_11RescaleArgsEii": (
            instances.Instance("row_rescale", "bfloat16")
        ),
        "_ZN3fsl3gpu12merge_kernelILi6EEEvNS_9MergeArgsE": (
            instances.Instance("merge", statistics=6)
        ),
        "_ZN3fsl3gpu18row_targets_kernelENS_11TargetsArgsE": instances.Instance("row_targets"),
    }.items(),
)
def test_names_of_kernels(mangled, expected):
    assert instances.instance(mangled) == expected


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="TEMPLATES"):
        instances.instance("_ZN3fsl3gpu13other_kernelILi6EEEvi")


SASS = """
\t.section\t.text.first,"ax",@progbits
        /*0000*/                   MUFU.EX2 R4, R4 ;
        /*0010*/                   EXIT ;
\t.section\t.text.second,"ax",@progbits
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR10][R12.64] ;
        /*0010*/                   LDG.E.128 R8, desc[UR10][R12.64+0x10] ;
        /*0020*/                   LD.E R8, desc[UR10][R12.64+0x10] ;
EXPS        /*0030*/               CALL.REL.NOINC `($__internal_0_$__cuda_slowpath) ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
$__internal_0_$__cuda_slowpath:
        /*0060*/                   RET.REL.NODEC R2 `(second) ;
""".replace("EXPS", 9 * "        /*0028*/                   MUFU.EX2 R4, R4 ;\n")


def test_kernels_of_a_cubin():
    codes = sass.parse_kernels(SASS)
    assert [len(code.instructions) for code in codes.values()] == [2, 16]
    (loop,) = hot_loops(codes["second"], 2, Shifted(exps=1))
    # 36 bytes for eight logits of 16 bytes; the next lane loads 16 of them too.
    assert (loop.purpose, loop.elements, loop.exps) == ("statistics", 8, 9 / 8)
    assert (loop.requested, loop.loaded, loop.generic_accesses) == (4.5, 2.5, 1)
    assert loop.loads_at_once == 2  # the third load overwrites a register of the second


INFO = """
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
.nv.info.first
\t<0x10>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x200 0x1 0x1
.nv.info.second
\t<0x11>
\tAttribute:\tEIATTR_CRS_STACK_SIZE
\tFormat:\tEIFMT_SVAL
\tValue:\t0x0
"""


def test_launch_bounds_of_a_cubin():
    assert sass.launch_bounds(INFO) == {"first": 512}


NOTE = """
  - .agpr_count:     0
    .args:
      - .offset:         0
        .size:           88
    .group_segment_fixed_size: 256
    .max_flat_workgroup_size: 512
    .name:           {name}
    .private_segment_fixed_size: 8
    .sgpr_count:     60
    .sgpr_spill_count: 2
    .vgpr_count:     {registers}
    .vgpr_spill_count: 1
"""

AMDGCN = f"""
first: ; @first
\ts_endpgm
.Lfunc_end0:
second: ; @second
.LBB1_0:
\tv_exp_f32_e32 v1, v1
\tbuffer_store_dword v1, off, s[0:3], 0 offset:4 ; 4-byte Folded Spill
\tglobal_load_dwordx4 v[1:4], v0, s[2:3]
\tbuffer_load_dwordx4 v[1:4], v5, s[4:7], 0 offen
\tflat_store_dwordx4 v[0:1], v[1:4]
\ts_cbranch_scc1 .LBB1_0
\ts_endpgm
.Lfunc_end1:
amdhsa.kernels:{NOTE.format(name="first", registers=22)}{NOTE.format(name="second", registers=44)}
amdhsa.target:   amdgcn-amd-amdhsa--gfx90a
amdhsa.version:
  - 1
  - 2
"""


def test_a_spilled_sgpr_counts_where_an_inner_loop_moves_it():
    in_loop = "\tv_readlane_b32 s4, v7, 0\n\tv_exp_f32_e32 v1, v1\n"
    listing = AMDGCN.replace("\tv_exp_f32_e32 v1, v1\n", in_loop)
    assert amdgcn.kernels(listing)["second"].resources["spills"] == 3
    before = AMDGCN.replace(".LBB1_0:\n", "\tv_writelane_b32 v7, s4, 0\n.LBB1_0:\n")
    assert amdgcn.kernels(before)["second"].resources["spills"] == 1


def test_kernels_of_an_amdgcn_listing():
    kernels = amdgcn.kernels(AMDGCN)
    assert [k.resources["registers"] for k in kernels.values()] == [22, 44]
    assert kernels["second"].resources["spills"] == 1  # the two SGPRs are not moved in the loop
    assert kernels["second"].resources["threads_limit"] == 512
    assert len(kernels["first"].code.instructions) == 1
    (loop,) = hot_loops(kernels["second"].code, 2)
    assert (loop.purpose, loop.elements) == ("gradient", 16)
    assert (loop.local_accesses, loop.generic_accesses) == (1, 1)
    assert loop.loads_at_once == 1  # the second load overwrites registers of the first
