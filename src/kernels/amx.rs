//! Products of bf16 tiles by Intel's Advanced Matrix Extensions. Their intrinsics are not stable, so
//! the instructions stand here in assembly.

use std::arch::asm;
use std::sync::OnceLock;

use super::bf16::{DEPTH, Operands, PANEL};

#[cfg(all(test, target_os = "linux"))]
mod emulator;

/// Rows of a tile.
const ROWS: usize = 16;

/// `ldtilecfg`'s operand: the shapes of the eight tile registers.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Whether this process may use the tiles, and they compute what they should. Asked once.
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

/// Asks the system for the tile registers: without, their use is a fault.
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that changes nothing but what it is asked for; the kernel overwrites rcx
    // and r11.
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

/// One product of small integers, which has one right answer: a machine, or an emulator of one, that
/// gives another is not used.
fn works() -> bool {
    let (rows, depth) = (2 * ROWS + 3, 2 * DEPTH);
    let integer = |i: usize, modulus: usize| (i % modulus) as f32 - 2.0;
    let a: Vec<u16> = (0..rows * depth).map(|i| super::bf16::round(integer(i, 5))).collect();
    let b: Vec<u16> = (0..depth * PANEL).map(|i| super::bf16::round(integer(i, 7))).collect();
    let mut c = vec![1f32; rows * PANEL];
    // SAFETY: the machine has tiles and we may use them; the slices are as long as the sizes say.
    unsafe {
        product(Operands {
            c: c.as_mut_ptr(),
            c_row: PANEL,
            rows,
            a: a.as_ptr(),
            a_row: depth,
            b: b.as_ptr(),
            depth,
            accumulate: true,
        });
    }
    let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    (0..rows * PANEL).all(|at| {
        let (i, j) = (at / PANEL, at % PANEL);
        let products =
            (0..depth).map(|k| value(a[i * depth + k]) * value(b[super::bf16::place(k, j)]));
        c[at] == 1.0 + products.sum::<f32>()
    })
}

/// Configures this thread's tiles, all of 16 rows of 64 bytes.
///
/// # Safety
/// The process must be permitted to use them.
unsafe fn configure() {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    row_bytes[..8].fill(64);
    rows[..8].fill(ROWS as u8);
    let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: the operand is 64 bytes in the layout of palette 1, and stays until it is read.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
}

/// # Safety
/// [`available`] must have said so, and all rows lie within memory that may be read, or written for
/// `c`.
pub(super) unsafe fn product(operands: Operands) {
    // Each time, since whatever else runs on this thread may use tiles in its own way.
    // SAFETY: as the caller promises.
    unsafe { configure() };
    for first in (0..operands.rows).step_by(2 * ROWS) {
        let some = operands.some(first, (operands.rows - first).min(2 * ROWS));
        // SAFETY: rows from `first` on, no more than there are.
        unsafe {
            if some.rows == 2 * ROWS {
                tiles(some);
            } else {
                incomplete_tiles(some);
            }
        }
    }
    // Threads are switched faster without tiles to save.
    // SAFETY: nothing is left in them.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// Fewer than 32 rows, by way of copies of so many.
///
/// # Safety
/// As [`product`], with the tiles configured.
unsafe fn incomplete_tiles(operands: Operands) {
    let Operands { c, c_row, rows, a, a_row, depth, accumulate, .. } = operands;
    let mut whole_c = [0f32; 2 * ROWS * PANEL];
    let mut whole_a = vec![0u16; 2 * ROWS * depth];
    // SAFETY: rows of the caller's, as long as the sizes say, to and from those of the copies.
    unsafe {
        for i in 0..rows {
            if accumulate {
                let to = whole_c.as_mut_ptr().add(i * PANEL);
                c.add(i * c_row).copy_to_nonoverlapping(to, PANEL);
            }
            a.add(i * a_row).copy_to_nonoverlapping(whole_a.as_mut_ptr().add(i * depth), depth);
        }
        let (c_copy, a_copy) = (whole_c.as_mut_ptr(), whole_a.as_ptr());
        tiles(Operands { c: c_copy, c_row: PANEL, a: a_copy, a_row: depth, ..operands });
        for i in 0..rows {
            c.add(i * c_row).copy_from_nonoverlapping(whole_c.as_ptr().add(i * PANEL), PANEL);
        }
    }
}

/// 32 rows by 32 columns, as two by two tiles. One piece of assembly from the first tile loaded to
/// the last one stored, since the compiler knows nothing of tiles that live on between two.
///
/// # Safety
/// As [`product`], with the tiles configured.
unsafe fn tiles(operands: Operands) {
    let Operands { c, c_row, a, a_row, b, depth, accumulate, .. } = operands;
    let (c_bytes, a_bytes) = (c_row * size_of::<f32>(), a_row * size_of::<u16>());
    // SAFETY: each tile is 16 rows of 64 bytes within what the caller promises. Tiles of `a` are
    // `DEPTH` values apart; 32 rows of `b` are 16 rows of pairs, of 128 bytes, the second tile's 64
    // further on.
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
            "test {steps}, {steps}",
            "jz 5f",
            "4:",
            "tileloadd tmm4, [{a0} + {a_row}*1]",
            "tileloadd tmm6, [{b} + {b_row}*1]",
            "tileloadd tmm7, [{b} + {b_row}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {a_row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, {a_step}",
            "add {a1}, {a_step}",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 4b",
            "5:",
            "tilestored [{c0} + {c_row}*1], tmm0",
            "tilestored [{c0} + {c_row}*1 + 64], tmm1",
            "tilestored [{c1} + {c_row}*1], tmm2",
            "tilestored [{c1} + {c_row}*1 + 64], tmm3",
            accumulate = in(reg) usize::from(accumulate),
            steps = inout(reg) depth / DEPTH => _,
            c0 = in(reg) c,
            c1 = in(reg) c.add(ROWS * c_row),
            c_row = in(reg) c_bytes,
            a0 = inout(reg) a => _,
            a1 = inout(reg) a.add(ROWS * a_row) => _,
            a_row = in(reg) a_bytes,
            a_step = const DEPTH * size_of::<u16>(),
            b = inout(reg) b => _,
            b_row = in(reg) 4 * PANEL,
            b_step = const DEPTH * PANEL * size_of::<u16>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Whether tests may use the tiles: the machine's, or emulated ones.
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

    /// That the tiles multiply rightly on all shapes, the tests of `bf16` and `half_conv` show.
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
