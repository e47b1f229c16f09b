//! Products of bf16 tiles by Intel's Advanced Matrix Extensions. Their intrinsics are not stable, so
//! the instructions stand here in assembly.

use std::arch::asm;
use std::sync::OnceLock;

use super::bf16::{DEPTH, Operands, PANEL, ROWS, Step};

#[cfg(all(test, target_os = "linux"))]
mod emulator;

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

/// Products of small integers, which have one right answer: a machine, or an emulator of one, that
/// gives another is not used.
fn works() -> bool {
    multiplies(false) && multiplies(true)
}

fn multiplies(accumulate: bool) -> bool {
    let (rows, count) = (3 * ROWS, 2);
    let depth = count * DEPTH;
    let integer = |i: usize, modulus: usize| (i % modulus) as f32 - 2.0;
    let a: Vec<u16> = (0..rows * depth).map(|i| super::bf16::round(integer(i, 5))).collect();
    let b: Vec<u16> = (0..depth * PANEL).map(|i| super::bf16::round(integer(i, 7))).collect();
    let steps: Vec<_> = (0..count).map(|i| Step { a: i * DEPTH, b: i * DEPTH * PANEL }).collect();
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
            b_row: 2 * PANEL,
            steps: &steps,
            accumulate,
        });
    }
    let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    (0..rows * PANEL).all(|at| {
        let (i, j) = (at / PANEL, at % PANEL);
        let products =
            (0..depth).map(|k| value(a[i * depth + k]) * value(b[super::bf16::place(k, j)]));
        c[at] == f32::from(u8::from(accumulate)) + products.sum::<f32>()
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
/// [`available`] must have said so, and all rows of all steps, up to the next multiple of [`ROWS`], lie
/// within memory that may be read, or written for `c`.
pub(super) unsafe fn product(operands: Operands) {
    // Each time, since whatever else runs on this thread may use tiles in its own way.
    // SAFETY: as the caller promises.
    unsafe { configure() };
    for first in (0..operands.rows).step_by(2 * ROWS) {
        let some = operands.some(first, (operands.rows - first).min(2 * ROWS));
        // SAFETY: rows from `first` on, no more than there is room for.
        unsafe {
            if some.rows > ROWS {
                two_by_two(some);
            } else {
                one_by_two(some);
            }
        }
    }
    // Threads are switched faster without tiles to save.
    // SAFETY: nothing is left in them.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// 32 rows by 32 columns, as two by two tiles. One piece of assembly from the first tile loaded to
/// the last one stored, since the compiler knows nothing of tiles that live on between two.
///
/// # Safety
/// As [`product`], with the tiles configured.
unsafe fn two_by_two(operands: Operands) {
    let Operands { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
    // SAFETY: each tile is 16 rows of 64 bytes within what the caller promises. A step is two numbers
    // of values, of two bytes each; the second tile of `b` begins 64 bytes further on in each row.
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

/// 16 rows by 32 columns: as [`two_by_two`], without the lower half.
///
/// # Safety
/// As [`product`], with the tiles configured.
unsafe fn one_by_two(operands: Operands) {
    let Operands { c, c_row, a, a_row, b, b_row, steps, accumulate, .. } = operands;
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
