"""What test/machine_code.py finds, on code that has it and on code that has not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

machine_code = pytest.importorskip("machine_code")

# Two branches of a loop read UR6; the first sets it.
LOOP = """
        /*0000*/                   UMOV UR4, URZ ;
.L_x_0:
        /*0010*/              @P0 BRA `(.L_x_1) ;
        /*0020*/                   UIADD3 UR6, UR4, 0x2, URZ ;
        /*0030*/                   UIADD3.64 UR8, UR6, 0x2, URZ ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   {}
        /*0060*/                   UIADD3 UR8, UR6, 0x4, URZ ;
.L_x_2:
        /*0070*/              @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("NOP ;", ["00060: UIADD3 UR8, UR6, 0x4, URZ  (UR6)"]),
        ("UIADD3 UR6, UR4, 0x2, URZ ;", []),
        ("@P2 R2UR UR6, R3 ;", []),
        ("ULDC.64 UR6, c[0x0][0x208] ;", []),
    ],
)
def test_registers_that_one_branch_sets(instruction: str, found: list[str]) -> None:
    # The other half of the pair that the first branch reads is of no matter here.
    set_before = LOOP.replace("UMOV UR4, URZ", "UMOV UR7, URZ ;\n        /*0008*/                   UMOV UR4, URZ")
    assert machine_code.unset_in(set_before.format(instruction)) == found


@pytest.mark.parametrize(
    ("operands", "registers"),
    [
        # Descriptors of both operands, of the right one alone, a tile's coordinates, its descriptor's address.
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", {"UR4", "UR5", "UR6", "UR7"}),
        ("HGMMA.64x64x16.F32.BF16 R24, R160, gdesc[UR4].tnspB, R24", {"UR6", "UR7"}),
        ("ELECT P5, UR62, PT", set()),
        ("UTMALDG.1D [UR40], [UR12]", {"UR40", "UR41", "UR42", "UR12", "UR13"}),
        ("UTMAREDG.1D.ADD [UR40], [UR12]", {"UR40", "UR41", "UR12", "UR13"}),
    ],
)
def test_registers_of_wide_operands(operands: str, registers: set[str]) -> None:
    found = machine_code.unset_in(f"        /*0000*/                   {operands} ;\n")
    assert {line.split("(")[-1][:-1] for line in found} == registers


def test_barriers_that_nothing_uses() -> None:
    text = """
    %free = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared1, #smem, mutable>
    %filled = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared1, #smem, mutable>
    %0 = ttg.memdesc_index %free[%c0_i32] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %0, 1 : !ttg.memdesc<1xi64>
    %1 = ttg.memdesc_index %filled[%c0_i32] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %1, 1 : !ttg.memdesc<1xi64>
    ttg.warp_specialize(%filled, %data) attributes {}
    """
    assert machine_code.unused_barriers(SimpleNamespace(asm={"ttgir": text})) == ["%free"]
