//! Products of bf16 values with the tiles of Intel's Advanced Matrix Extensions (AMX). Their intrinsics are
//! not stable in Rust, so the instructions are written in assembly.

use std::arch::asm;
use std::sync::OnceLock;

use super::operands::{DEPTH, Product, ROWS, RawProduct, Step, place, round};
use crate::kernels::cpu::gemm::micro::PANEL;

#[cfg(all(test, target_os = "linux"))]
mod emulator;

/// The operand of `ldtilecfg`: the shapes of the eight tile registers.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Returns whether this process may use the tiles and their products are correct. The check runs once.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cfg!(target_os = "linux") && has_tiles() && permitted() && works())
}

fn has_tiles() -> bool {
    use std::arch::x86_64::__cpuid_count;
    // Leaf 7: bit 22 of EDX is AMX-BF16, bit 24 AMX-TILE.
    let leaf = __cpuid_count(7, 0);
    leaf.edx & (1 << 22) != 0 && leaf.edx & (1 << 24) != 0
}

/// Requests permission from the system to use the tile registers. Without permission, using them is a fault.
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the system call only grants a permission. The kernel overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
        );
    }
    result == 0
}

/// Returns whether products of small integers, which are exact, are correct. If a machine or an emulator
/// computes something else, its tiles are not used.
fn works() -> bool {
    multiplies(false) && multiplies(true)
}

fn multiplies(accumulate: bool) -> bool {
    let (rows, count) = (3 * ROWS, 2);
    let depth = count * DEPTH;
    let integer = |i: usize, modulus: usize| (i % modulus) as f32 - 2.0;
    let a: Vec<u16> = (0..rows * depth).map(|i| round(integer(i, 5))).collect();
    let b: Vec<u16> = (0..depth * PANEL).map(|i| round(integer(i, 7))).collect();
    let steps: Vec<_> = (0..count).map(|i| Step { a: i * DEPTH, b: i * DEPTH * PANEL }).collect();
    let mut c = vec![1f32; rows * PANEL];
    // SAFETY: the machine has tiles, and the process may use them. The slices have the given sizes.
    unsafe {
        product(Product {
            c: c.as_mut_ptr(),
            c_row: PANEL,
            rows,
            a: a.as_ptr(),
            a_row: depth,
            b: b.as_ptr(),
            b_row: 2 * PANEL,
            steps: &steps,
            accumulate,
        });
    }
    let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    (0..rows * PANEL).all(|at| {
        let (i, j) = (at / PANEL, at % PANEL);
        let products = (0..depth).map(|k| value(a[i * depth + k]) * value(b[place(k, j)]));
        c[at] == f32::from(u8::from(accumulate)) + products.sum::<f32>()
    })
}

/// Configures the tiles of this thread: 16 rows of 64 bytes each.
///
/// # Safety
/// The process must be permitted to use the tiles.
unsafe fn configure() {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(ROWS as u8);
    let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: the operand is 64 bytes in the layout of palette 1, and lives until it is read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
}

/// # Safety
/// [`available`] must have returned true. All rows of all steps, up to the next multiple of [`ROWS`], must
/// be within memory that may be read, or written for `c`.
pub(super) unsafe fn product(operands: RawProduct) {
    // Each time, because other code on this thread may configure the tiles differently.
    // SAFETY: guaranteed by the caller.
    unsafe { configure() };
    for first in (0..operands.rows).step_by(2 * ROWS) {
        let some = operands.some(first, (operands.rows - first).min(2 * ROWS));
        // SAFETY: the rows from `first` on are rows of the product.
        unsafe {
            if some.rows > ROWS {
                two_by_two(some);
            } else {
                one_by_two(some);
            }
        }
    }
    // The system switches threads faster if it has no tiles to save.
    // SAFETY: the tiles hold no result.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Computes 32 rows by 32 columns, as two by two tiles. The code is one block of assembly from the first
/// load to the last store, because the compiler does not know that tiles keep their content between two
/// blocks.
///
/// # Safety
/// The requirements of [`product`] apply, and the tiles must be configured.
unsafe fn two_by_two(operands: RawProduct) {
    let RawProduct { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
    // SAFETY: each tile is 16 rows of 64 bytes within memory that the caller guarantees. A step holds two
    // offsets in values, of two bytes each. The second tile of `b` begins 64 bytes later in each row.
    unsafe {
        asm!(
            "test {accumulate}, {accumulate}",
            "jz 2f",
            "tileloadd tmm0, [{c0} + {c_row}*1]",
            "tileloadd tmm1, [{c0} + {c_row}*1 + 64]",
            "tileloadd tmm2, [{c1} + {c_row}*1]",
            "tileloadd tmm3, [{c1} + {c_row}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "test {count}, {count}",
            "jz 5f",
            "4:",
            "mov {at}, [{step}]",
            "lea {at}, [{a} + {at}*2]",
            "tileloadd tmm4, [{at} + {a_row}*1]",
            "add {at}, {a_tile}",
            "tileloadd tmm5, [{at} + {a_row}*1]",
            "mov {at}, [{step} + 8]",
            "lea {at}, [{b} + {at}*2]",
            "tileloadd tmm6, [{at} + {b_row}*1]",
            "tileloadd tmm7, [{at} + {b_row}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {step}, 16",
            "dec {count}",
            "jnz 4b",
            "5:",
            "tilestored [{c0} + {c_row}*1], tmm0",
            "tilestored [{c0} + {c_row}*1 + 64], tmm1",
            "tilestored [{c1} + {c_row}*1], tmm2",
            "tilestored [{c1} + {c_row}*1 + 64], tmm3",
            accumulate = in(reg) usize::from(accumulate),
            count = inout(reg) steps.len() => _,
            step = inout(reg) steps.as_ptr() => _,
            at = out(reg) _,
            c0 = in(reg) c,
            c1 = in(reg) c.add(ROWS * c_row),
            c_row = in(reg) c_row * size_of::<f32>(),
            a = in(reg) a,
            a_row = in(reg) a_row * size_of::<u16>(),
            a_tile = in(reg) ROWS * a_row * size_of::<u16>(),
            b = in(reg) b,
            b_row = in(reg) b_row * size_of::<u16>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Computes 16 rows by 32 columns: [`two_by_two`] without the lower half.
///
/// # Safety
/// The requirements of [`product`] apply, and the tiles must be configured.
unsafe fn one_by_two(operands: RawProduct) {
    let RawProduct { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
    // SAFETY: as in `two_by_two`.
    unsafe {
        asm!(
            "test {accumulate}, {accumulate}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {c_row}*1]",
            "tileloadd tmm1, [{c} + {c_row}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "3:",
            "test {count}, {count}",
            "jz 5f",
            "4:",
            "mov {at}, [{step}]",
            "lea {at}, [{a} + {at}*2]",
            "tileloadd tmm4, [{at} + {a_row}*1]",
            "mov {at}, [{step} + 8]",
            "lea {at}, [{b} + {at}*2]",
            "tileloadd tmm6, [{at} + {b_row}*1]",
            "tileloadd tmm7, [{at} + {b_row}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {step}, 16",
            "dec {count}",
            "jnz 4b",
            "5:",
            "tilestored [{c} + {c_row}*1], tmm0",
            "tilestored [{c} + {c_row}*1 + 64], tmm1",
            accumulate = in(reg) usize::from(accumulate),
            count = inout(reg) steps.len() => _,
            step = inout(reg) steps.as_ptr() => _,
            at = out(reg) _,
            c = in(reg) c,
            c_row = in(reg) c_row * size_of::<f32>(),
            a = in(reg) a,
            a_row = in(reg) a_row * size_of::<u16>(),
            b = in(reg) b,
            b_row = in(reg) b_row * size_of::<u16>(),
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Returns whether tests can use tiles, either of the machine or emulated ones.
#[cfg(test)]
pub(super) fn testable() -> bool {
    #[cfg(target_os = "linux")]
    let emulated = || emulator::install();
    #[cfg(not(target_os = "linux"))]
    let emulated = || false;
    available() || emulated()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The tests of `unit` and of convolutions show that tiles multiply correctly on all shapes.
    #[test]
    fn tiles_that_compute_something_else_are_not_used() {
        assert!(testable());
        assert!(works());
        if !available() {
            emulator::WRONG.set(true);
            assert!(!works());
            emulator::WRONG.set(false);
            assert!(works());
        }
    }
}
